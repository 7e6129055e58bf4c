"""The loop's options: parts of a step, recomputing, trackers, samples, what is loaded or fresh."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from conftest import NAMES, toy_config, toy_training
from lavit.config import InputError, TrainConfig
from lavit.model import LaVIT
from lavit.pixels.decoder import Pixels
from lavit.train.batches import Shard, to_device
from lavit.train.checkpoint import latest_checkpoint
from lavit.train.encoded import Encoded, language_stage
from lavit.train.feeds import CorpusPixels
from lavit.train.first import first_language
from lavit.train.health import Alarm
from lavit.train.loop import Stage, train
from lavit.train.metrics import check_trackers
from lavit.train.pixels import PixelsStage
from lavit.train.run import open_run, train_stages
from lavit.train.spread import make_accelerator
from lavit.visual_tokenizer.tokenizer import VisualTokenizer, cosine_distance


def train_language(data: Path, out: Path, training: TrainConfig, **options: object) -> list[dict]:
    """Figures of stage 2, on a tokenizer of its own."""
    train_stages(open_run(out, data, toy_config(), training, **options), ("tokenizer", "language"))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == "language"]


def with_language(**changes: object) -> TrainConfig:
    """A few steps, each reported; rows enough to be divided."""
    training = replace(toy_training(4), log_every=1)
    return replace(training, language=replace(training.language, rows=4, **changes))


@pytest.fixture(scope="module")
def plain(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return train_language(toy_data, tmp_path_factory.mktemp("plain") / "run", with_language())


@pytest.mark.parametrize(
    ("change", "tolerance"),
    [
        ({"accumulate": 2}, 1e-5),
        ({"accumulate": 4, "recompute": True}, 1e-5),
        ({"recompute": True}, 1e-6),
    ],
    ids=str,
)
def test_parts_of_a_step_and_recomputed_blocks_change_nothing(
    plain: list[dict], toy_data: Path, tmp_path: Path, change: dict, tolerance: float
) -> None:
    """Losses, gradients (their norm) and every other figure of four steps."""
    found = train_language(toy_data, tmp_path / "run", with_language(**change))
    assert len(found) == len(plain) == 4
    for mine, theirs in zip(found, plain, strict=True):
        for name in set(theirs) - {"stage", "peak_gib"}:
            assert mine[name] == pytest.approx(theirs[name], rel=tolerance, abs=tolerance), name


def kept_bytes(forward: Callable[[], torch.Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward one, which runs too."""
    seen: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward().backward()
    return sum(seen.values())


@pytest.mark.parametrize("dense", [True, False])
def test_stage_1_recomputes_its_blocks_to_the_same_gradients(dense: bool) -> None:
    torch.manual_seed(0)
    config = replace(toy_config().visual_tokenizer, merger_depth=3, reconstructor_depth=3)
    tokenizer = VisualTokenizer(config)
    patches, noise = torch.randn(4, 16, 32), torch.rand(4, 16, 2)
    found = []
    for on in (False, True):
        tokenizer.recompute(on)
        tokenizer.zero_grad()

        def forward() -> torch.Tensor:
            out = tokenizer(patches, noise, quantise=False, dense=dense)
            return cosine_distance(out.features, patches).mean()

        kept = kept_bytes(forward)
        found.append((kept, [p.grad.clone() for p in tokenizer.parameters()]))
    assert found[1][0] < 0.6 * found[0][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_stage_3_recomputes_its_blocks_to_the_same_gradients() -> None:
    torch.manual_seed(0)
    config = toy_config().pixels
    pixels = Pixels.build(replace(config, unet={**config.unet, "depth": 6}))
    for weight in pixels.unet.parameters():  # blocks begin as the identity
        torch.nn.init.normal_(weight, std=0.1)
    latents, features = torch.randn(4, 12, 8, 8), torch.randn(4, 16, 32)
    found = []
    for on in (False, True):
        pixels.recompute(on)
        pixels.zero_grad()
        generators = [torch.Generator().manual_seed(number) for number in range(4)]
        kept = kept_bytes(lambda g=generators: pixels(latents, features, generator=g))
        found.append((kept, [p.grad.clone() for p in pixels.unet.parameters()]))
    assert found[1][0] < 0.6 * found[0][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_a_step_of_stage_3_in_parts_is_the_step(
    toy_run: Path, toy_data: Path, tmp_path: Path
) -> None:
    """Losses and norms of the gradient, of the decoder on noisy codes."""
    found = []
    for parts in (1, 4):
        out = tmp_path / str(parts)
        for part in ("vision", "visual_tokenizer"):
            shutil.copytree(toy_run / part, out / part)
        training = replace(toy_training(3), log_every=1)
        changed = {"accumulate": parts, "recompute": parts > 1, "code_noise": 0.5}
        training = replace(training, pixels=replace(training.pixels, **changed))
        train_stages(open_run(out, toy_data, toy_config(), training), ("pixels",))
        lines = (out / "metrics.jsonl").read_text().splitlines()
        found.append(
            [(json.loads(line)["loss"], json.loads(line)["gradient_norm"]) for line in lines]
        )
    assert len(found[0]) == 3
    for mine, theirs in zip(*found, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


def test_averaged_weights_forget_the_first_ones_and_then_move_as_asked() -> None:
    """A short training ends near its last weights; in a long one each step has its share."""
    config = toy_config()
    pixels, tokenizer = Pixels.build(config.pixels), VisualTokenizer(config.visual_tokenizer)
    pictures = CorpusPixels.__new__(CorpusPixels)  # none are drawn here
    training = replace(toy_training().pixels, ema=0.95)
    stage = PixelsStage(pixels, tokenizer, pictures, training, seed=0)
    weights = pixels.unet.conv_in.weight
    mean = stage.averaged["unet.conv_in.weight"].zero_()
    torch.nn.init.ones_(weights)
    for step in range(50):  # with 0.95 from the start 8 % would be left of the first
        stage.after_step(step)
    assert (1 - mean).max() < 1e-6

    torch.nn.init.constant_(weights, 2.0)
    stage.after_step(400)
    assert torch.allclose(mean, torch.tensor(1.05))


def test_recomputing_really_drops_activations(toy_data: Path, tmp_path: Path) -> None:
    """Bytes that the forward pass keeps for the backward one."""
    run = open_run(tmp_path / "run", toy_data, toy_config(), toy_training(1))
    train_stages(run, ("tokenizer", "language"))
    language = LaVIT.from_pretrained(run.folder, parts=("language",)).language.train()
    embeddings = torch.randn(2, 64, language.width, requires_grad=True)
    how = {
        "documents": torch.zeros(2, 64, dtype=torch.long),
        "positions": torch.arange(64).expand(2, -1),
    }
    kept = []
    for on in (False, True):
        language.recompute(on)
        kept.append(kept_bytes(lambda: language.hidden(embeddings, **how).sum()))
    assert kept[1] < 0.5 * kept[0]


def test_shards_and_parts_are_one_division() -> None:
    items = torch.arange(12)
    parts = [Shard(rank, 2).part(number, 3).of(items) for rank in range(2) for number in range(3)]
    assert torch.cat(parts).equal(items)
    assert torch.cat(parts[:3]).equal(Shard(0, 2).of(items))


def test_only_what_goes_to_cuda_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """And then the host need not wait for the copy."""
    pinned, asked, plain = [], [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t) or t)

    def to(tensor: torch.Tensor, device: torch.device, **how: bool) -> torch.Tensor:
        asked.append((device.type, how))
        return plain(tensor, "cpu", **how)

    monkeypatch.setattr(torch.Tensor, "to", to)
    tensor = torch.arange(3)
    for device in ("cpu", "cuda"):
        assert to_device(tensor, torch.device(device)).equal(tensor)
    assert asked == [("cpu", {"non_blocking": True}), ("cuda", {"non_blocking": True})]
    assert len(pinned) == 1


def test_fewer_rows_than_processes_are_refused(toy_data: Path, tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", toy_data, toy_config(), with_language())
    train_stages(run, ("tokenizer",))
    encoded = Encoded(run)
    stage = language_stage(run, encoded, *first_language(run, encoded))
    assert len(stage.batch(0, Shard(3, 4)).rows.ids) == 1
    for rank in range(5):
        with pytest.raises(InputError, match="4 rows a step cannot be shared by 5 processes"):
            stage.batch(0, Shard(rank, 5))


def test_samples_are_written_of_the_same_pictures(toy_data: Path, tmp_path: Path) -> None:
    training = replace(with_language(), sample_every=2)
    train_language(toy_data, tmp_path / "run", training)
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    ]
    assert sorted({line["step"] for line in lines}) == [2, 4]
    pictures = [line["picture"] for line in lines]
    assert pictures[:4] == pictures[4:] and len(set(pictures)) == 4
    codes = toy_config().visual_tokenizer.codes
    for line in lines:
        assert line["wanted"].rstrip(".") in NAMES and isinstance(line["caption"], str)
        assert line["codes"] and all(0 <= code < codes for code in line["codes"])


def test_sampling_does_not_change_the_training(
    plain: list[dict], toy_data: Path, tmp_path: Path
) -> None:
    found = train_language(toy_data, tmp_path / "run", replace(with_language(), sample_every=1))
    assert [line["loss"] for line in found] == [line["loss"] for line in plain]


def test_trackers_are_chosen_and_missing_ones_named(toy_data: Path, tmp_path: Path) -> None:
    training = replace(toy_training(2), log_every=1)
    train_stages(
        open_run(tmp_path / "a", toy_data, toy_config(), training, trackers=("tensorboard",)),
        ("tokenizer",),
    )
    assert list((tmp_path / "a" / "tensorboard" / "tokenizer").glob("events.*"))
    train_stages(
        open_run(tmp_path / "b", toy_data, toy_config(), training, trackers=()), ("tokenizer",)
    )
    assert (
        not (tmp_path / "b" / "tensorboard").exists()
        and (tmp_path / "b" / "metrics.jsonl").exists()
    )
    with pytest.raises(InputError, match="tensorboard, wandb, trackio"):
        check_trackers(["clearml"])


def test_a_tracker_without_its_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(InputError, match=r"pip install 'lavit\[train\]'"):
        check_trackers(["wandb"])


def test_the_log_says_what_is_loaded_and_what_is_fresh(
    toy_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="lavit"):
        train_language(toy_data, tmp_path / "run", with_language())
    lines = [line for line in caplog.messages if line.startswith("language: ")]
    said = {line.split(": ")[1]: line for line in lines}
    assert "fresh, train" in said["rows"] and "fresh, train" in said["lm"]
    reader = [line for line in lines if line.startswith("language: reader: ")]
    assert any("copied from the tokenizer, train" in line for line in reader)
    assert any("fresh, train" in line for line in reader)
    config = toy_config()
    visual = 2 + config.visual_tokenizer.codes
    width = config.language.architecture["hidden_size"]
    assert f"{visual * width:,} weights" in said["rows"]


def test_bf16_on_a_machine_without_it_is_refused(toy_data: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported():
        open_run(tmp_path, toy_data, toy_config(), replace(toy_training(), precision="bf16"))
        return
    with pytest.raises(InputError, match="bf16 needs a GPU"):
        open_run(tmp_path, toy_data, toy_config(), replace(toy_training(), precision="bf16"))


class OneBadGradient(Stage):
    """The loss of its tenth step is a number, but its gradient is none."""

    name, steps, config = "language", 20, SimpleNamespace(learning_rate=1e-3, weight_decay=0.0)

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = torch.nn.Linear(2, 1)

    def batch(self, step: int, shard: Shard) -> int:
        return step

    def losses(self, module: torch.nn.Module, batch: int, step: int) -> dict:
        found = module(torch.ones(1, 2)).sum()
        return {"loss": found + (0 * found).sqrt() if batch == 9 else found}


@pytest.mark.parametrize("log_every", [1, 20])
def test_weights_that_are_no_numbers_are_never_saved(tmp_path: Path, log_every: int) -> None:
    """Whether a report or a checkpoint comes first, and again when the command is repeated."""
    for _ in range(2):
        accelerator = make_accelerator("fp32")
        how = {"clip": 1.0, "warmup": 0.1, "checkpoint_every": 5, "trackers": ()}
        with pytest.raises(Alarm, match="a gradient up to step 10 is not a number"):
            train(OneBadGradient(), tmp_path, accelerator=accelerator, log_every=log_every, **how)
        newest = latest_checkpoint(tmp_path / "checkpoints" / "language")
        assert newest.name == "5"
        weights = load_file(newest / "module.safetensors")
        assert all(weight.isfinite().all() for weight in weights.values())

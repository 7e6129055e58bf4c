"""The loop's options: parts of a step, recomputing, trackers, samples, what is loaded or fresh."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import NAMES, toy_config, toy_training
from lavit.config import InputError, TrainConfig
from lavit.model import LaVIT
from lavit.train.batches import Shard
from lavit.train.metrics import check_trackers
from lavit.train.run import Run


def train_language(data: Path, out: Path, training: TrainConfig, **options: object) -> list[dict]:
    """Figures of stage 2, on a tokenizer of its own."""
    Run(out, data, toy_config(), training, **options).train(("tokenizer", "language"))
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


def test_recomputing_really_drops_activations(toy_data: Path, tmp_path: Path) -> None:
    """Bytes that the forward pass keeps for the backward one."""
    run = Run(tmp_path / "run", toy_data, toy_config(), toy_training(1))
    run.train(("tokenizer", "language"))
    language = LaVIT.from_pretrained(run.folder, parts=("language",)).language.train()
    embeddings = torch.randn(2, 64, language.width, requires_grad=True)
    documents = torch.zeros(2, 64, dtype=torch.long)
    positions = torch.arange(64).expand(2, -1)
    kept = []
    for on in (False, True):
        language.recompute(on)
        seen: dict[int, int] = {}

        def keep(tensor: torch.Tensor, seen: dict[int, int] = seen) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            language.hidden(embeddings, documents=documents, positions=positions).sum().backward()
        kept.append(sum(seen.values()))
    assert kept[1] < 0.5 * kept[0]


def test_shards_and_parts_are_one_division() -> None:
    items = torch.arange(12)
    parts = [Shard(rank, 2).part(number, 3).of(items) for rank in range(2) for number in range(3)]
    assert torch.cat(parts).equal(items)
    assert torch.cat(parts[:3]).equal(Shard(0, 2).of(items))


def test_fewer_rows_than_processes_are_refused(toy_data: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", toy_data, toy_config(), with_language())
    run.train(("tokenizer",))
    stage = run._language_stage(*run._first_language())
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
    Run(tmp_path / "a", toy_data, toy_config(), training, trackers=("tensorboard",)).train(
        ("tokenizer",)
    )
    assert list((tmp_path / "a" / "tensorboard" / "tokenizer").glob("events.*"))
    Run(tmp_path / "b", toy_data, toy_config(), training, trackers=()).train(("tokenizer",))
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
    assert "copied from the tokenizer, train" in said["merger"]
    config = toy_config()
    visual = 2 + config.visual_tokenizer.codes
    width = config.language.architecture["hidden_size"]
    assert f"{visual * width:,} weights" in said["rows"]


def test_bf16_on_a_machine_without_it_is_refused(toy_data: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported():
        Run(tmp_path, toy_data, toy_config(), replace(toy_training(), precision="bf16"))
        return
    with pytest.raises(InputError, match="bf16 needs a GPU"):
        Run(tmp_path, toy_data, toy_config(), replace(toy_training(), precision="bf16"))

"""Stage 1 whole: two ranks are one with the same batch; a killed run ends as one that was not."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

import ranks
from conftest import toy_config, toy_training
from lavit import presets
from lavit.baselines.vqgan import Vqgan, VqganStage
from lavit.cli import main
from lavit.config import InputError, Terminated
from lavit.data.features import Features
from lavit.files import load_tensors
from lavit.train import loop
from lavit.train.batches import Shard
from lavit.train.feeds import CorpusFeatures
from lavit.train.metrics import Metrics
from lavit.train.spread import make_accelerator
from lavit.train.tokenizer import TokenizerStage
from lavit.visual_tokenizer.codebook import Codebook
from lavit.visual_tokenizer.tokenizer import VisualTokenizer

STEPS = 16  # of each phase
TESTS = Path(__file__).parent


@pytest.mark.filterwarnings(
    "ignore:`broadcast_buffers` is deprecated:FutureWarning"
)  # accelerate knows no other name yet
def test_two_ranks_end_as_one_with_the_same_batch(tmp_path: Path) -> None:
    mp.start_processes(
        ranks.run_stage, (str(tmp_path), ranks.free_port()), nprocs=2, start_method="fork"
    )
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    one = ranks.train_stage(tmp_path / "one")
    assert (first["ranks"], second["ranks"], one["ranks"]) == (2, 2, 1)
    for part in ("codebook", "weights"):
        for name, value in first[part].items():
            assert torch.equal(value, second[part][name]), name
            torch.testing.assert_close(value, one[part][name], rtol=1e-4, atol=1e-5, msg=name)
    assert len(one["figures"]) == 9
    assert sum(figures.get("revived", 0) for figures in one["figures"]) > 0
    agree(first["figures"], one["figures"])


def agree(mine: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    for step, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert set(a) == set(b)
        for name in a:
            assert a[name] == pytest.approx(b[name], abs=1e-5), (step, name)


def test_a_step_in_four_parts_is_a_step_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, start = [], TokenizerStage.prepare

    def counted(stage: TokenizerStage) -> None:
        started.append(stage)
        start(stage)

    monkeypatch.setattr(TokenizerStage, "prepare", counted)
    parts, one = (
        ranks.train_stage(tmp_path / "parts", accumulate=4),
        ranks.train_stage(tmp_path / "one"),
    )
    for name, value in parts["weights"].items():
        torch.testing.assert_close(value, one["weights"][name], rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(parts["codebook"], one["codebook"], rtol=1e-4, atol=1e-5)
    agree(parts["figures"], one["figures"])
    assert len(started) == len(set(started)) == 2  # k-means once in each run, not in each part


def test_a_batch_that_ranks_cannot_share_is_refused(toy_features: TokenizerStage) -> None:
    with pytest.raises(InputError, match="8 pictures cannot be shared by 3 ranks"):
        toy_features.batch(0, Shard(0, 3))


@pytest.fixture
def toy_features() -> TokenizerStage:
    features = Features(torch.randn(6, 16, 32, generator=ranks.seeded(0)).numpy())
    tokenizer = VisualTokenizer(toy_config().visual_tokenizer)
    config = toy_training().tokenizer
    feed = CorpusFeatures(features, batch=config.batch, seed=0)
    return TokenizerStage(tokenizer, feed, config, seed=0)


def long_preset() -> presets.Preset:
    """The toy model, with a checkpoint in the middle of each phase."""
    training = toy_training(STEPS)
    training = replace(
        training, checkpoint_every=8, tokenizer=replace(training.tokenizer, train_selector=True)
    )
    return presets.Preset(toy_config(), training, minutes=1.0)


def words(data: Path, out: Path) -> list[str]:
    return ["train", "tokenizer", "--data", str(data), "--out", str(out), "--preset", "toy"]


def last_step(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") * 2 if path.exists() else 0


def stage_of(kind: str) -> TokenizerStage | VqganStage:
    """Two phases of three steps on made-up features."""
    torch.manual_seed(0)
    config = replace(toy_config().visual_tokenizer, codes=16)
    if kind == "vqgan":
        config = replace(config, dim=3 * 8**2, heads=1, keep="all")
    features = Features(torch.randn(8, 16, config.dim, generator=ranks.seeded(0)).numpy())
    feed = CorpusFeatures(features, batch=4, seed=0)
    training = replace(toy_training(3).tokenizer, batch=4)
    if kind == "vqgan":
        return VqganStage(Vqgan(config, width=8), feed, training, seed=0)
    return TokenizerStage(VisualTokenizer(config), feed, training, seed=0)


@pytest.mark.parametrize("kind", ["lavit", "vqgan"])
@pytest.mark.parametrize("saving", [False, True])
def test_sigterm_in_k_means_ends_it_at_once_and_loses_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saving: bool, kind: str
) -> None:
    """Or while the step before it is saved; the same command starts the codes anew."""
    where = (loop, "save_checkpoint") if saving else (Codebook, "k_means")
    work, done = getattr(*where), []

    def stopped(*args: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        work(*args, **options)
        done.append(where)

    def go(name: str) -> None:
        how = {"checkpoint_every": 100, "log_every": 1, "trackers": ()}
        accelerator = make_accelerator("fp32")
        loop.train(
            stage_of(kind), tmp_path / name, accelerator=accelerator, clip=1.0, warmup=0.1, **how
        )

    with monkeypatch.context() as patch, pytest.raises(Terminated, match="is saved at step 3:"):
        patch.setattr(*where, stopped)
        go("stopped")
    assert len(done) == saving
    for name in ("stopped", "whole"):
        go(name)
    assert figures(tmp_path / "stopped") == figures(tmp_path / "whole")


# Python 3.12 on forks of a process with threads
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_kill_minus_nine_and_the_same_command_give_the_same_codebook(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(presets.PRESETS, "toy", long_preset)
    main(words(toy_data, tmp_path / "whole"))
    run = tmp_path / "killed"
    write = Metrics.write

    def killed(*args: Any, **options: Any) -> None:
        write(*args, **options)
        if last_step(run) == STEPS + 12:  # phase b, behind a checkpoint
            os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        Metrics.write = killed
        try:
            main(words(toy_data, run))
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not (run / "visual_tokenizer").exists()
    saved = [path.name for path in (run / "checkpoints" / "tokenizer").iterdir()]
    assert last_step(run) == STEPS + 12 and str(STEPS + 8) in saved and str(2 * STEPS) not in saved
    main(words(toy_data, run))
    where = "visual_tokenizer/model.safetensors"
    whole, resumed = (load_tensors(folder / where) for folder in (tmp_path / "whole", run))
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    assert figures(run) == figures(tmp_path / "whole")


def figures(run: Path) -> list[dict[str, float]]:
    """All that was logged but for the memory of the process."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "peak_gib"} for line in lines]

"""Two gloo ranks train as one process does: DDP and FSDP2, whose checkpoints are the same."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from conftest import toy_config
from lavit.config import InputError, read_json
from lavit.model import LaVIT
from lavit.train.encoded import Encoded
from lavit.train.first import first_language
from lavit.train.plan import GIB, plan_stage
from lavit.train.run import open_run, train_stages
from lavit.train.spread import make_accelerator
from ranks import free_port
from ranks_language import train_rank, training

# Python 3.12 on forks of a process with threads
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


def figures(run: Path, stage: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage]


@pytest.fixture(scope="module")
def tokenizer_run(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose first stage is trained: where the others start."""
    out = tmp_path_factory.mktemp("ranks") / "run"
    train_stages(open_run(out, toy_data, toy_config(), training(), trackers=()), ("tokenizer",))
    return out


@pytest.fixture(scope="module")
def alone(tokenizer_run: Path, toy_data: Path) -> Path:
    """Stages 2 and 3 in one process."""
    out = tokenizer_run.with_name("alone")
    shutil.copytree(tokenizer_run, out)
    train_stages(
        open_run(out, toy_data, toy_config(), training(), trackers=()), ("language", "pixels")
    )
    return out


def figures_apart(mine: Path, theirs: Path, stage: str) -> list[tuple[str, int]]:
    """Figures, by name and step, that differ by more than 1e-4; a missing step is one too."""
    a, b = figures(mine, stage), figures(theirs, stage)
    if not len(a) == len(b) == 4:
        return [("steps", len(a)), ("steps", len(b))]
    return [
        (name, there["step"])
        for here, there in zip(a, b, strict=True)
        for name in set(there) - {"stage", "peak_gib"}
        if here[name] != pytest.approx(there[name], rel=1e-4, abs=1e-4)
    ]


def weights_apart(mine: Path, theirs: Path, part: str) -> set[str]:
    """Weights of a part that differ by more than 1e-3, or that one of both lacks."""
    found, wanted = (
        getattr(LaVIT.from_pretrained(out), part).state_dict() for out in (mine, theirs)
    )
    near = {
        name
        for name in found.keys() & wanted
        if torch.allclose(found[name], wanted[name], atol=1e-3)
    }
    return (found.keys() | wanted.keys()) - near


@pytest.fixture(scope="module")
def on_two_ranks(tokenizer_run: Path, toy_data: Path) -> dict[str, Path]:
    """The same stages on two ranks, under DDP, under FSDP2 and on streams (ranks_language.py)."""
    runs = {name: tokenizer_run.with_name(name) for name in ("ddp", "fsdp", "whole", "stopped")}
    for layout in ("ddp", "fsdp"):
        shutil.copytree(tokenizer_run, runs[layout])
    work = (free_port(), str(toy_data), *map(str, runs.values()))
    mp.start_processes(train_rank, work, nprocs=2, start_method="fork")
    return runs


@pytest.mark.parametrize("stage", ["language", "pixels"])
def test_ddp_on_two_ranks_is_one_process(
    on_two_ranks: dict[str, Path], alone: Path, stage: str
) -> None:
    assert figures_apart(on_two_ranks["ddp"], alone, stage) == []
    assert weights_apart(on_two_ranks["ddp"], alone, stage) == set()


def test_fsdp2_on_two_ranks_is_one_process(on_two_ranks: dict[str, Path], alone: Path) -> None:
    assert figures_apart(on_two_ranks["fsdp"], alone, "language") == []
    assert weights_apart(on_two_ranks["fsdp"], alone, "language") == set()


def test_only_the_first_rank_of_fsdp2_loads_the_whole(
    on_two_ranks: dict[str, Path], tokenizer_run: Path, toy_data: Path
) -> None:
    """The other one holds its shards and a tensor; the weights are those of one process."""
    out = tokenizer_run.with_name("begun")
    shutil.copytree(tokenizer_run, out)
    run = open_run(out, toy_data, toy_config(), training(), trackers=())
    torch.manual_seed(run.training.seed)
    language, _ = first_language(run, Encoded(run))
    wanted = dict(language.named_parameters())
    found = load_file(on_two_ranks["fsdp"] / "loaded.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    peaks = [read_json(on_two_ranks["fsdp"] / f"loading-{rank}.json")["peak"] for rank in (0, 1)]
    sizes = [weight.nbytes for weight in found.values()]
    # a half, and of one tensor what was sent, and its part
    assert peaks[1] < sum(sizes) / 2 + 2.1 * max(sizes) < sum(sizes) < peaks[0]


def test_a_rank_of_fsdp2_holds_what_the_plan_says(on_two_ranks: dict[str, Path]) -> None:
    """Weights and moments of its shards, to 10 %."""
    model, out = toy_config(), on_two_ranks["fsdp"]
    found = LaVIT.from_pretrained(out).language.lm.config
    architecture = model.language.architecture | {"vocab_size": found.vocab_size - 2 - 32}
    model = replace(model, language=replace(model.language, architecture=architecture))
    plan = plan_stage("language", model, training(), gpus=2, precision="fp32")
    for rank in range(2):
        held = read_json(out / f"held-{rank}.json")
        for name in ("weights", "moments"):
            assert plan.gib[name] * GIB == pytest.approx(held[name], rel=0.1), name


def test_a_checkpoint_of_fsdp2_goes_on_in_one_process(
    on_two_ranks: dict[str, Path], alone: Path, tokenizer_run: Path, toy_data: Path
) -> None:
    """From its middle to the same end: weights, moments and all."""
    sharded = on_two_ranks["fsdp"]
    out = sharded.with_name("resumed")
    shutil.copytree(sharded, out)
    saved = out / "checkpoints" / "language"
    assert {path.name for path in saved.iterdir()} == {"2", "4"}
    whole = load_file(saved / "4" / "module.safetensors")
    shutil.rmtree(saved / "4")
    shutil.rmtree(out / "language")
    shutil.copy(tokenizer_run / "config.json", out)  # as it was before the stage ended
    train_stages(open_run(out, toy_data, toy_config(), training(), trackers=()), ("language",))
    assert figures_apart(out, alone, "language") == []
    resumed = load_file(saved / "4" / "module.safetensors")
    assert set(resumed) == set(whole)
    assert all(torch.allclose(resumed[name], whole[name], atol=1e-3) for name in whole)


@pytest.mark.parametrize("stage", ["tokenizer", "language", "pixels"])
def test_a_stopped_run_of_two_ranks_on_streams_ends_as_a_whole_one(
    on_two_ranks: dict[str, Path], stage: str
) -> None:
    """The ranks share a folder of eight pictures, four a step."""
    whole, stopped = (figures(on_two_ranks[name], stage) for name in ("whole", "stopped"))
    assert [line["loss"] for line in whole] == [line["loss"] for line in stopped]
    assert len(whole) == (6 if stage == "tokenizer" else 4)


def test_fsdp2_needs_processes() -> None:
    with pytest.raises(InputError, match="torchrun"):
        make_accelerator(fsdp=True)

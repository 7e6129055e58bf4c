"""Work of one of two gloo ranks in stages 2 and 3, for tests/test_distributed.py."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from conftest import short_streams, toy_config, toy_training
from lavit.config import TrainConfig, write_json
from lavit.files import save_tensors
from lavit.train import loop
from lavit.train.encoded import Encoded
from lavit.train.first import first_language
from lavit.train.run import Run, open_run, train_stages
from lavit.train.settings import STAGES
from lavit.train.spread import shard, whole
from ranks import join_ranks


def training() -> TrainConfig:
    """Few steps, each reported, rows and pictures for two ranks; one checkpoint on the way."""
    toy = replace(toy_training(3), log_every=1, checkpoint_every=2)
    return replace(
        toy,
        language=replace(toy.language, steps=4, rows=4, accumulate=2, optimizer="muon"),
        pixels=replace(toy.pixels, steps=4),
    )


def streaming() -> TrainConfig:
    """All three stages on streams, a checkpoint in the middle of each."""
    found = replace(training(), checkpoint_every=3)
    return replace(found, **{one: replace(getattr(found, one), stream=True) for one in STAGES})


def stop_once(save: Callable[..., None]) -> Callable[..., None]:
    """A `save_checkpoint` that stops every rank behind the first checkpoint of each stage."""
    stopped: set[str] = set()

    def then_stop(folder: Path, *rest: object, **options: object) -> None:
        save(folder, *rest, **options)
        if folder.name not in stopped:
            stopped.add(folder.name)
            raise KeyboardInterrupt

    return then_stop


def noting(save: Callable[..., None]) -> Callable[..., None]:
    """A `save_checkpoint` that also writes what this rank holds, in bytes."""

    def local(tensor: torch.Tensor) -> int:
        own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return own.nbytes

    def then_note(
        folder: Path, step: int, module: Any, optimizer: Any, *rest: Any, **how: Any
    ) -> None:
        save(folder, step, module, optimizer, *rest, **how)
        moments = (t for one in optimizer.state.values() for t in one.values())
        held = {
            "weights": sum(map(local, module.parameters())),
            "moments": sum(map(local, moments)),
        }
        write_json(folder.parent.parent / f"held-{dist.get_rank()}.json", held)

    return then_note


def on_streams(data: str, whole: Path, stopped: Path) -> None:
    """Three stages, once without a stop and once with three."""
    short_streams(pytest.MonkeyPatch())  # of this rank, which ends
    train_stages(open_run(whole, data, toy_config(), streaming(), trackers=()))
    loop.save_checkpoint = stop_once(loop.save_checkpoint)
    for stage in STAGES:
        with contextlib.suppress(KeyboardInterrupt):
            train_stages(open_run(stopped, data, toy_config(), streaming(), trackers=()))
            raise AssertionError(f"{stage} was not stopped")
    train_stages(open_run(stopped, data, toy_config(), streaming(), trackers=()))


class Held(TorchDispatchMode):
    """Bytes of tensors made inside that live together, at most; those on meta have none."""

    def __init__(self) -> None:
        super().__init__()
        self.living, self.most = WeakIdKeyDictionary(), 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, DTensor):
                storage = tensor.untyped_storage()
                self.living[storage] = 0 if tensor.is_meta else storage.nbytes()
        self.most = max(self.most, sum(self.living.values()))
        return out


def note_loading(run: Run) -> None:
    """Load stage 2 as it begins; write the weights, and what this rank held of them at most."""
    torch.manual_seed(run.training.seed)
    with Held() as held:
        language, _ = first_language(run, Encoded(run))
        shard(language, run.accelerator)
    write_json(run.folder / f"loading-{dist.get_rank()}.json", {"peak": held.most})
    weights = {name: whole(weight.detach()) for name, weight in language.named_parameters()}
    if run.main:
        save_tensors(weights, run.folder / "loaded.safetensors")


def train_rank(
    rank: int, port: int, data: str, ddp: str, fsdp: str, whole: str, stopped: str
) -> None:
    """Train as one of two ranks: stages 2 and 3 under DDP, all on streams, stage 2 under FSDP2."""
    join_ranks(rank, port)
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "true"  # as accelerate's launcher has it
    run = open_run(Path(ddp), data, toy_config(), training(), trackers=())
    assert run.accelerator.num_processes == 2  # two that train alone would agree as well
    train_stages(run, ("language", "pixels"))
    on_streams(data, Path(whole), Path(stopped))
    # the ranks stay together, the layout is another
    AcceleratorState._reset_state(reset_partial_state=False)
    loop.save_checkpoint = noting(loop.save_checkpoint)
    run = open_run(Path(fsdp), data, toy_config(), training(), trackers=(), fsdp=True)
    note_loading(run)
    train_stages(run, ("language",))

    dist.destroy_process_group()

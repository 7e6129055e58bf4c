"""Work of one of two gloo ranks in stages 2 and 3, for tests/test_distributed.py.

It is apart so that ranks start alone:

python -m torch.distributed.run --nproc-per-node 2 tests/ranks_language.py DATA DDP FSDP

DDP and FSDP are the two run folders.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from conftest import toy_config, toy_training
from lavit.config import TrainConfig
from lavit.train.run import Run


def training() -> TrainConfig:
    """Few steps, each reported, rows and pictures for two ranks; one checkpoint on the way."""
    toy = replace(toy_training(3), log_every=1, checkpoint_every=2)
    return replace(
        toy,
        language=replace(toy.language, steps=4, rows=4, optimizer="muon"),
        pixels=replace(toy.pixels, steps=4),
    )


def main(data: str, ddp: str, fsdp: str) -> None:
    """Train stages 2 and 3 under DDP and stage 2 under FSDP2 on this rank."""
    torch.set_num_threads(1)
    run = Run(Path(ddp), data, toy_config(), training(), trackers=())
    assert run.accelerator.num_processes == 2  # two that train alone would agree as well
    run.train(("language", "pixels"))
    # the ranks stay together, the layout is another
    AcceleratorState._reset_state(reset_partial_state=False)
    Run(Path(fsdp), data, toy_config(), training(), trackers=(), fsdp=True).train(("language",))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Figures of a run: JSON lines always, and by wish TensorBoard, wandb or trackio.

metrics.jsonl      one line a report: stage, step, figures; a resumed run drops lines behind its checkpoint
samples.jsonl      what stage 2 says and draws of the same pictures as it learns, likewise
tensorboard/       with the tracker of that name
"""

from __future__ import annotations

import json
import logging
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lavit.config import InputError, require

log = logging.getLogger(__name__)
Write = Callable[[int, dict[str, float]], None]


class Metrics:
    """Writes the figures of one stage; only the first rank (`enabled`) does."""

    def __init__(self, run: Path, stage: str, start: int, *, trackers: Sequence[str], enabled: bool) -> None:
        self.stage, self.enabled = stage, enabled
        self.path, self.samples_path = run / "metrics.jsonl", run / "samples.jsonl"
        self.opened: list[tuple[Write, Callable[[], None]]] = []
        if not enabled:
            return
        run.mkdir(parents=True, exist_ok=True)
        for path in (self.path, self.samples_path):
            kept = [line for line in _lines(path) if line["stage"] != stage or line["step"] <= start]
            if path.exists() or kept:
                path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        for name in trackers:
            self.opened.append(_opener(name)(run, stage, start))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one line of figures."""
        if not self.enabled:
            return
        _append(self.path, {"stage": self.stage, "step": step, **values})
        for write, _ in self.opened:
            write(step, values)

    def write_samples(self, step: int, samples: Sequence[dict[str, Any]]) -> None:
        """Append a line for each sample."""
        for sample in samples if self.enabled else ():
            _append(self.samples_path, {"stage": self.stage, "step": step, **sample})

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        for _, close in self.opened:
            close()


def check_trackers(names: Sequence[str]) -> None:
    """Raise `InputError` for a tracker that is unknown or whose package is missing, before anything is trained."""
    for name in names:
        _opener(name)
        require({"tensorboard": "torch.utils.tensorboard"}.get(name, name), extra="train")


def peak_gib() -> float:
    """Most memory this process has used: of the GPU where there is one (tensors), else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:  # the line that was being written when the run was killed
                log.warning("%s: dropped an unfinished line", path)


def _tensorboard(run: Path, stage: str, start: int) -> tuple[Write, Callable[[], None]]:
    board = require("torch.utils.tensorboard", extra="train").SummaryWriter(
        str(run / "tensorboard" / stage), purge_step=start
    )

    def write(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            board.add_scalar(name, value, step)

    return write, board.close


def _wandb(run: Path, stage: str, start: int) -> tuple[Write, Callable[[], None]]:
    opened = require("wandb", extra="train").init(project="lavit", name=f"{run.name} {stage}", dir=str(run))
    return lambda step, values: opened.log(values, step=step), opened.finish


def _trackio(run: Path, stage: str, start: int) -> tuple[Write, Callable[[], None]]:
    package = require("trackio", extra="train")
    opened = package.init(project="lavit", name=f"{run.name} {stage}", resume="allow")
    return lambda step, values: opened.log(values, step=step), opened.finish


TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}


def _opener(name: str) -> Callable[[Path, str, int], tuple[Write, Callable[[], None]]]:
    if name not in TRACKERS:
        raise InputError(f"there is no tracker {name!r}: choose from {', '.join(TRACKERS)}")
    return TRACKERS[name]

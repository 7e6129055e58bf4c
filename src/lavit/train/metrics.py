"""Figures of a run: JSON lines always, and by wish TensorBoard, wandb or trackio.

metrics.jsonl      one line a report: stage, step, figures; a resumed run drops those past its start
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

from lavit.config import InputError, require, write_whole

log = logging.getLogger(__name__)
PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
Write = Callable[[int, dict[str, float]], None]


class Metrics:
    """Writes the figures of one stage; only the first rank (`enabled`) does."""

    def __init__(
        self,
        run: Path,
        stage: str,
        start: int,
        *,
        trackers: Sequence[str],
        enabled: bool,
    ) -> None:
        self.run, self.stage, self.enabled = run, stage, enabled
        self.opened: list[tuple[Write, Callable[[], None]]] = []
        if not enabled:
            return
        run.mkdir(parents=True, exist_ok=True)
        for path in filter(Path.exists, (run / "metrics.jsonl", run / "samples.jsonl")):
            lines = list(read_lines(path))
            kept = [line for line in lines if line["stage"] != stage or line["step"] <= start]
            write_whole(path, "".join(map(_line, kept)))
        self.opened = [_open(name, run, stage, start) for name in trackers]

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line of figures, to the trackers too."""
        self.append("metrics.jsonl", step, values)
        for write, _ in self.opened:
            write(step, values)

    def append(self, name: str, step: int, values: dict[str, Any]) -> None:
        """One more line of a file."""
        if self.enabled:
            line = {"stage": self.stage, "step": step, **values}
            with (self.run / name).open("a", encoding="utf-8") as file:
                file.write(_line(line))

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *raised: object) -> None:
        for _, close in self.opened:
            close()


def check_trackers(names: Sequence[str]) -> None:
    """Raise `InputError` for a tracker that is unknown or whose package is missing."""
    for name in names:
        if name not in PACKAGES:
            known = ", ".join(PACKAGES)
            raise InputError(f"there is no tracker {name!r}: choose from {known}")
        require(PACKAGES[name], extra="train")


def peak_gib() -> float:
    """Most memory this process has used: of the GPU where there is one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a file of JSON lines, none if there is no file; a line cut off is dropped."""
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            log.warning("%s: dropped an unfinished line", path)


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"


def _open(name: str, run: Path, stage: str, start: int) -> tuple[Write, Callable[[], None]]:
    """What writes a step's figures to a tracker, and what closes it."""
    check_trackers([name])
    package = require(PACKAGES[name], extra="train")
    if name == "tensorboard":
        board = package.SummaryWriter(str(run / name / stage), purge_step=start + 1)

        def write(step: int, values: dict[str, float]) -> None:
            for figure, value in values.items():
                board.add_scalar(figure, value, step)

        return write, board.close
    options = {"dir": str(run)} if name == "wandb" else {"resume": "allow"}
    opened = package.init(project="lavit", name=f"{run.name} {stage}", **options)
    return lambda step, values: opened.log(values, step=step), opened.finish

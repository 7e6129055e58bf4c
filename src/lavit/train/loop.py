"""One training loop for every stage, on Accelerate: a stage gives losses for a batch, the loop knows nothing of them.

A batch is a function of (seed, step), so a killed run that starts again with the same command reads the last checkpoint
and goes on to the same losses. One step stands together in `_step`; what happens once in a while is around it.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lavit.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from lavit.train.health import Alarm

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """Which part of every batch this process trains on."""

    rank: int = 0
    ranks: int = 1

    def of(self, items: Tensor) -> Tensor:
        """This rank's share of the items of a global batch: neighbouring ones, in rank order."""
        return items.tensor_split(self.ranks)[self.rank]


@runtime_checkable
class Stage(Protocol):
    """What a stage must say: its module, rates, batches and losses; see train/stages.py."""

    name: str
    steps: int
    module: nn.Module

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for AdamW, each with its own `lr` and `weight_decay`."""

    def batch(self, step: int, shard: Shard) -> Any:
        """This rank's batch of a step: a function of the step and the seed alone."""

    def losses(self, module: nn.Module, batch: Any, step: int, accelerator: Accelerator) -> dict[str, Tensor]:
        """`loss` to go backward, and figures to log beside it."""

    def after_step(self, step: int) -> dict[str, float]:
        """Whatever follows the optimiser's step (codebook, averaged weights); more figures."""

    def state(self) -> dict[str, Tensor]:
        """Tensors beyond the module's that a resumed run needs."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""


@dataclass
class Report:
    """One line of progress, for who watches: the CLI draws it, tests read it."""

    stage: str
    step: int
    steps: int
    seconds_left: float
    rate: float  # steps a second
    figures: dict[str, float] = field(default_factory=dict)


def schedule(step: int, steps: int, warmup: float) -> float:
    """Multiple of the learning rate: linear warm-up over a share of the steps, then a cosine to 0."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def train(
    stage: Stage,
    run: Path,
    *,
    accelerator: Accelerator,
    clip: float,
    warmup: float,
    betas: tuple[float, float] = (0.9, 0.99),
    checkpoint_every: int = 200,
    log_every: int = 10,
    watch: Callable[[Report], None] | None = None,
) -> None:
    """Train a stage to its end, resuming from `run/checkpoints/<stage>` if something lies there.

    Metrics go to `run/metrics.jsonl` and `run/tensorboard`. Raises `Alarm` when a run is failing (train/health.py); the
    last checkpoint stays.
    """
    folder = run / "checkpoints" / stage.name
    optimizer = torch.optim.AdamW(stage.parameter_groups(), betas=betas, eps=1e-6)
    base = [group["lr"] for group in optimizer.param_groups]
    module, optimizer = accelerator.prepare(stage.module, optimizer)
    start = 0
    if found := latest_checkpoint(folder):
        start = load_checkpoint(found, accelerator.unwrap_model(module), optimizer, stage)
        log.info("%s resumes at step %d", stage.name, start)
    shard = Shard(accelerator.process_index, accelerator.num_processes)
    with Metrics(run, stage.name, start, enabled=accelerator.is_main_process) as metrics:
        started = time.perf_counter()
        for step in range(start, stage.steps):
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * schedule(step, stage.steps, warmup)
            figures = _step(stage, module, optimizer, step, shard, accelerator, clip)
            last = step + 1 == stage.steps
            if (step + 1) % log_every == 0 or last:
                values = {name: float(value) for name, value in figures.items()}
                if not math.isfinite(values["loss"]):
                    raise Alarm(
                        f"{stage.name}: the loss is {values['loss']} at step {step + 1}: lower the learning rate"
                    )
                metrics.write(step + 1, values)
                if watch:
                    rate = (step + 1 - start) / (time.perf_counter() - started)
                    watch(
                        Report(
                            stage.name,
                            step + 1,
                            stage.steps,
                            (stage.steps - step - 1) / rate,
                            rate,
                            values,
                        )
                    )
            if (step + 1) % checkpoint_every == 0 or last:
                accelerator.wait_for_everyone()
                if accelerator.is_main_process:
                    save_checkpoint(folder, step + 1, accelerator.unwrap_model(module), optimizer, stage)
    accelerator.free_memory()


def _step(
    stage: Stage,
    module: nn.Module,
    optimizer: Any,
    step: int,
    shard: Shard,
    accelerator: Accelerator,
    clip: float,
) -> dict[str, Tensor | float]:
    """Forward, backward, clip, step."""
    batch = stage.batch(step, shard)
    with accelerator.autocast():
        losses = stage.losses(module, batch, step, accelerator)
    optimizer.zero_grad(set_to_none=True)
    accelerator.backward(losses["loss"])
    norm = accelerator.clip_grad_norm_(module.parameters(), clip)
    optimizer.step()
    after = stage.after_step(step)
    mean = {name: accelerator.reduce(value.detach(), "mean") for name, value in losses.items()}
    return {**mean, "gradient_norm": norm, **after}


class Metrics:
    """Metrics of a run as JSON lines and TensorBoard events.

    A resumed run drops the lines that the killed one wrote after its last checkpoint, so that steps appear once.
    """

    def __init__(self, run: Path, stage: str, start: int, *, enabled: bool) -> None:
        self.stage, self.enabled = stage, enabled
        self.path = run / "metrics.jsonl"
        if not enabled:
            return
        run.mkdir(parents=True, exist_ok=True)
        kept = [line for line in self._lines() if line["stage"] != stage or line["step"] <= start]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(run / "tensorboard" / stage), purge_step=start)

    def _lines(self) -> Iterator[dict[str, Any]]:
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:  # the line that was being written when the run was killed
                    log.warning("%s: dropped an unfinished line", self.path)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append one line."""
        if not self.enabled:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"stage": self.stage, "step": step, **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            self.board.close()

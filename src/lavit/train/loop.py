"""One training loop for every stage, on Accelerate: a stage gives losses for a batch, the loop knows nothing of them.

A batch is a function of (seed, step), so a killed run that starts again with the same command reads the last checkpoint
and goes on to the same losses. One step stands together in `_step`; what happens once in a while is around it. How the
model lies over processes is train/spread.py's, figures are train/metrics.py's.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lavit.config import InputError
from lavit.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from lavit.train.health import Alarm
from lavit.train.metrics import Metrics, peak_gib
from lavit.train.muon import Muon
from lavit.train.spread import whole

log = logging.getLogger(__name__)
Figure = Tensor | tuple[Tensor, Tensor]  # a mean over processes, or a sum and the count to divide it by


@dataclass(frozen=True)
class Shard:
    """Which part of every batch this process trains on; with accumulation, which part of a step's batch comes now."""

    rank: int = 0
    ranks: int = 1

    def part(self, number: int, parts: int) -> Shard:
        """Part `number` of `parts` of this shard."""
        return Shard(self.rank * parts + number, self.ranks * parts)

    def of(self, items: Tensor) -> Tensor:
        """This rank's share of the items of a global batch: neighbouring ones, in rank order."""
        return items.tensor_split(self.ranks)[self.rank]


@runtime_checkable
class Stage(Protocol):
    """What a stage must say: its module, rates, batches and losses; see train/stages.py.

    A stage may also have `accumulate` (parts of a step, default 1) and `shards` (whether FSDP2 may spread its module).
    """

    name: str
    steps: int
    module: nn.Module

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for `Muon`, each with its own `lr` and `weight_decay`; AdamW's unless they say otherwise."""

    def batch(self, step: int, shard: Shard) -> Any:
        """This rank's batch of a step: a function of the step and the seed alone."""

    def losses(self, module: nn.Module, batch: Any, step: int, accelerator: Accelerator) -> dict[str, Figure]:
        """`loss` to go backward (the sum over the parts of a step is its loss), and figures to log beside it."""

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
    keep_last: int = 2,
    log_every: int = 10,
    trackers: Sequence[str] = ("tensorboard",),
    watch: Callable[[Report], None] | None = None,
    sample: Callable[[int], Sequence[dict[str, Any]]] | None = None,
    sample_every: int = 0,
) -> None:
    """Train a stage to its end, resuming from `run/checkpoints/<stage>` if something lies there.

    Figures go to `run/metrics.jsonl` and the trackers, what `sample` gives every `sample_every` steps to
    `run/samples.jsonl`. Raises `Alarm` when a run is failing (train/health.py); the last checkpoint stays.
    """
    if accelerator.is_fsdp2 and not getattr(stage, "shards", False):
        raise InputError(f"FSDP2 shards the language stage only: train {stage.name} without --fsdp (DDP)")
    folder = run / "checkpoints" / stage.name
    optimizer = Muon(stage.parameter_groups(), betas=betas, eps=1e-6, fused=True)
    base = [group["lr"] for group in optimizer.param_groups]
    module, optimizer = accelerator.prepare(stage.module, optimizer)
    plain, start = accelerator.unwrap_model(module), 0
    if found := latest_checkpoint(folder):
        start = load_checkpoint(found, plain, optimizer, stage, accelerator=accelerator)
        log.info("%s resumes at step %d: all that trains is loaded from %s", stage.name, start, found)
    shard = Shard(accelerator.process_index, accelerator.num_processes)
    main = accelerator.is_main_process
    with Metrics(run, stage.name, start, trackers=trackers, enabled=main) as metrics:
        started = time.perf_counter()
        for step in range(start, stage.steps):
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * schedule(step, stage.steps, warmup)
            parts, after = _step(stage, module, optimizer, step, shard, accelerator, clip)
            done, last = step + 1, step + 1 == stage.steps
            if done % log_every == 0 or last:
                values = {**pool(parts, accelerator), **{name: float(value) for name, value in after.items()}}
                if not math.isfinite(values["loss"]):
                    raise Alarm(f"{stage.name}: the loss is {values['loss']} at step {done}: lower the learning rate")
                rate = (done - start) / (time.perf_counter() - started)
                metrics.write(done, {**values, "peak_gib": peak_gib()})
                if watch:
                    watch(Report(stage.name, done, stage.steps, (stage.steps - done) / rate, rate, values))
            if main and sample and sample_every and (done % sample_every == 0 or last):
                metrics.write_samples(done, sample(done))
            if done % checkpoint_every == 0 or last:
                save_checkpoint(folder, done, plain, optimizer, stage, accelerator=accelerator, keep=keep_last)
                accelerator.wait_for_everyone()
    accelerator.free_memory()


def _step(
    stage: Stage,
    module: nn.Module,
    optimizer: Any,
    step: int,
    shard: Shard,
    accelerator: Accelerator,
    clip: float,
) -> tuple[list[dict[str, Figure]], dict[str, Tensor | float]]:
    """Forward and backward of every part, clip, step. Returns the figures of the parts, and those after the step."""
    optimizer.zero_grad(set_to_none=True)
    parts, figures = getattr(stage, "accumulate", 1), []
    for number in range(parts):
        batch = stage.batch(step, shard.part(number, parts))
        with contextlib.nullcontext() if number + 1 == parts else accelerator.no_sync(module):
            with accelerator.autocast():
                losses = stage.losses(module, batch, step, accelerator)
            accelerator.backward(losses["loss"])
        figures.append({name: _detached(figure) for name, figure in losses.items()})
    norm = accelerator.clip_grad_norm_(module.parameters(), clip)
    optimizer.step()
    return figures, {"gradient_norm": whole(norm), **stage.after_step(step)}


def _detached(figure: Figure) -> Figure:
    return figure.detach() if isinstance(figure, Tensor) else (figure[0].detach(), figure[1])


def pool(parts: Sequence[dict[str, Figure]], accelerator: Accelerator) -> dict[str, float]:
    """Figures of a step over its parts and all processes: `loss` added over parts, pairs as sum over count, means meant."""
    names = list(parts[0])
    sums, counts = [], []
    for name in names:
        found = [part[name] for part in parts]
        pairs = [figure if isinstance(figure, tuple) else (figure, torch.ones(())) for figure in found]
        sums.append(sum(float(total) for total, _ in pairs))
        counts.append(1.0 if name == "loss" else sum(float(count) for _, count in pairs))
    both = torch.tensor([sums, counts], device=accelerator.device)
    totals, numbers = accelerator.reduce(both, "sum")
    return dict(zip(names, (totals / numbers.clamp(min=1e-12)).tolist(), strict=True))

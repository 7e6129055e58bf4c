"""One training loop for every stage, on Accelerate: a stage gives losses for a batch.

A batch is a function of (seed, step), so a killed run that starts again with the same command reads
the last checkpoint and goes on to the same losses. One step is `step_once`; what happens now and
then stands around it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lavit.config import InputError, Terminated
from lavit.train.batches import Shard
from lavit.train.checkpoint import (
    drop_all_but,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from lavit.train.health import Alarm, check_gradients
from lavit.train.metrics import Metrics, peak_gib
from lavit.train.muon import Muon
from lavit.train.spread import shard, whole

log = logging.getLogger(__name__)
SumAndCount = tuple[Tensor, Tensor | float]  # a sum, and the count to divide it by
Metric = Tensor | SumAndCount  # a mean over processes, or such a pair


class Stage(ABC):
    """What a stage says: its module, rates, batches and losses; the rest where it needs it."""

    name: str
    steps: int
    module: nn.Module
    config: Any  # of this stage's training
    accumulate = 1  # parts of a step
    shards = False  # whether FSDP2 may spread the module
    prepared = -1  # a step that `prepare` comes before; all is saved before it
    accelerator: Accelerator  # of the training that this stage is in

    @property
    def shard(self) -> Shard:
        """What this process trains on."""
        return Shard(self.accelerator.process_index, self.accelerator.num_processes)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for `Muon`, by default one; AdamW's unless `muon` is true."""
        rate, decay = self.config.learning_rate, self.config.weight_decay
        params = [p for p in self.module.parameters() if p.requires_grad]
        return [{"params": params, "lr": rate, "weight_decay": decay}]

    def prepare(self) -> None:
        """Work that takes long, once, before the step `prepared`; SIGTERM ends it at once."""
        raise NotImplementedError

    @abstractmethod
    def batch(self, step: int, shard: Shard) -> Any:
        """This rank's batch of a step: a function of the step and the seed alone."""

    @abstractmethod
    def losses(self, module: nn.Module, batch: Any, step: int) -> dict[str, Metric]:
        """`loss` to go backward (its sum over the parts of a step counts), and figures to log."""

    def after_step(self, step: int) -> dict[str, float]:
        """Whatever follows the optimiser's step (codebook, averaged weights); more figures."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Tensors beyond the module's that a resumed run needs; every process calls."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` gave."""
        assert not state, f"the stage {self.name} has no state beyond its module's"


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
    """Multiple of the learning rate: linear warm-up over a share of the steps, a cosine to 0."""
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

    Figures go to `run/metrics.jsonl` and the trackers, what `sample` gives every `sample_every`
    steps to `run/samples.jsonl`. Raises `Alarm` when a run is failing; the last checkpoint stays.
    SIGTERM ends the step, saves it and raises `Terminated`.
    """
    if accelerator.is_fsdp2 and not stage.shards:
        said = "FSDP2 shards the language stage only"
        raise InputError(f"{said}: train {stage.name} without --fsdp (DDP)")
    counts = {"checkpoint_every": checkpoint_every, "keep_last": keep_last, "log_every": log_every}
    for name, count in (*counts.items(), ("accumulate", stage.accumulate)):
        if count < 1:
            raise InputError(f"{name} is {count}: give 1 or more")
    stage.accelerator, folder = accelerator, run / "checkpoints" / stage.name
    if accelerator.is_fsdp2:
        module = shard(stage.module, accelerator)
    else:
        module = accelerator.prepare_model(stage.module)
    optimizer: Any = Muon(stage.parameter_groups(), betas=betas, eps=1e-6, fused=True)
    base = [group["lr"] for group in optimizer.param_groups]
    optimizer = accelerator.prepare_optimizer(optimizer)
    plain, start = accelerator.unwrap_model(module), 0
    if found := latest_checkpoint(folder):
        start = load_checkpoint(found, plain, optimizer, stage, accelerator=accelerator)
        said = "%s resumes at step %d: all that trains is loaded from %s"
        log.info(said, stage.name, start, found)
    main = accelerator.is_main_process
    for other in drop_all_but(folder, keep_last) if main and folder.is_dir() else ():
        log.warning("%s is no checkpoint and is left alone", other)
    opened = Metrics(run, stage.name, start, trackers=trackers, enabled=main)
    with opened as metrics, _sigterms() as came:
        started, norms = time.perf_counter(), torch.zeros((), device=accelerator.device)
        for step in range(start, stage.steps):
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * schedule(step, stage.steps, warmup)
            if step == stage.prepared:
                _prepare(stage, step, came)
            parts, after = step_once(stage, module, optimizer, step, clip=clip)
            done, last = step + 1, step + 1 == stage.steps
            norms += after["gradient_norm"]  # looked at where the host waits anyway
            if done % log_every == 0 or last:
                values = pool(parts, accelerator) | {name: float(after[name]) for name in after}
                if not math.isfinite(values["loss"]):
                    said = f"{stage.name}: the loss is {values['loss']} at step {done}"
                    raise Alarm(f"{said}: lower the learning rate")
                check_gradients(norms, stage.name, done)
                rate = (done - start) / (time.perf_counter() - started)
                metrics.write(done, {**values, "peak_gib": peak_gib()})
                if watch:
                    left = (stage.steps - done) / rate
                    watch(Report(stage.name, done, stage.steps, left, rate, values))
            if main and sample and sample_every and (done % sample_every == 0 or last):
                for line in sample(done):
                    metrics.append("samples.jsonl", done, line)
            ending = _by_any(came, accelerator)
            if done % checkpoint_every == 0 or last or ending or done == stage.prepared:
                check_gradients(norms, stage.name, done)
                state = {"accelerator": accelerator, "keep": keep_last}
                save_checkpoint(folder, done, plain, optimizer, stage, **state)
                accelerator.wait_for_everyone()
            if ending:
                raise _stopped(f"{stage.name} is saved at step {done}")
    accelerator.free_memory()


def _prepare(stage: Stage, step: int, came: list[int]) -> None:
    """Long work of a stage that was just saved; SIGTERM ends it at once."""
    kept = f"{stage.name} is saved at step {step}"
    if _by_any(came, stage.accelerator):  # while it was saved
        raise _stopped(kept)
    with _sigterms(kept):
        stage.prepare()


def _stopped(kept: str) -> Terminated:
    return Terminated(f"stopped by SIGTERM, {kept}: the same command goes on from there")


@contextlib.contextmanager
def _sigterms(kept: str = "") -> Iterator[list[int]]:
    """The SIGTERMs that have come; they raise what is `kept`, or do nothing else. Threads get
    none.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return

    def note(number: int, _: object) -> None:
        came.append(number)
        if kept:
            raise _stopped(kept)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield came
    except Exception:
        if kept and came:  # libraries make errors of their own of what a handler raises
            raise _stopped(kept) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _by_any(came: list[int], accelerator: Accelerator) -> bool:
    """Whether a signal came to any process; all must end at one step."""
    if accelerator.num_processes == 1:
        return len(came) > 0
    counted = torch.tensor([float(len(came))], device=accelerator.device)
    return float(accelerator.reduce(counted, "sum")) > 0


def step_once(
    stage: Stage,
    module: nn.Module,
    optimizer: Any,
    step: int,
    *,
    clip: float,
) -> tuple[list[dict[str, SumAndCount]], dict[str, Tensor | float]]:
    """Forward and backward of every part, clip, step: figures of the parts, and those after it."""
    optimizer.zero_grad(set_to_none=True)
    accelerator, parts, figures = stage.accelerator, stage.accumulate, []
    for number in range(parts):
        batch = stage.batch(step, stage.shard.part(number, parts))
        # FSDP2 sums in every part: what waits for the last one would be whole gradients
        sums = number + 1 == parts or accelerator.is_fsdp2
        with contextlib.nullcontext() if sums else accelerator.no_sync(module):
            with accelerator.autocast():
                losses = stage.losses(module, batch, step)
            accelerator.backward(losses["loss"])
        figures.append({name: _as_pair(figure) for name, figure in losses.items()})
    norm = accelerator.clip_grad_norm_(module.parameters(), clip)
    optimizer.step()
    return figures, {"gradient_norm": whole(norm), **stage.after_step(step)}


def _as_pair(figure: Metric) -> SumAndCount:
    total, count = figure if isinstance(figure, tuple) else (figure, 1.0)
    return total.detach(), count


def pool(parts: Sequence[dict[str, SumAndCount]], accelerator: Accelerator) -> dict[str, float]:
    """Figures of a step over its parts and all processes: sum by count, `loss` a sum."""
    names = list(parts[0])
    sums = [sum(float(part[name][0]) for part in parts) for name in names]
    counts = [1.0 if n == "loss" else sum(float(part[n][1]) for part in parts) for n in names]
    both = torch.tensor([sums, counts], device=accelerator.device)
    totals, numbers = accelerator.reduce(both, "sum")
    return dict(zip(names, (totals / numbers.clamp(min=1e-12)).tolist(), strict=True))

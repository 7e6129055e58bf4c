"""What a step of stage 2 costs: its target tokens and its FLOPs, counted on real documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.flop_counter import (
    FlopCounterMode,
    mm_flop,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from lavit.config import TrainConfig
from lavit.data.documents import WINDOW
from lavit.sequence import IGNORE
from lavit.train.encoded import Encoded, language_stage
from lavit.train.first import first_language
from lavit.train.language import LanguageStage
from lavit.train.run import Run

COUNTED = 3  # steps whose FLOPs are counted


@dataclass(frozen=True)
class Cost:
    """Of stage 2; `steps` and `seconds` of a run, the others of a step."""

    targets_per_step: float = 0.0
    flops_per_step: float = 0.0
    steps: int = 0
    seconds: float = 0.0

    @property
    def flops(self) -> float:
        """FLOPs of the run."""
        return self.steps * self.flops_per_step


def cost_of(run: Run[TrainConfig], encoded: Encoded) -> Cost:
    """Target tokens of a window of rows, and FLOPs of some steps, forward and backward."""
    torch.manual_seed(run.training.seed)
    language, text = first_language(run, encoded)
    stage = language_stage(run, encoded, language, text)
    stage.accelerator = Accelerator()
    steps, targets = window(stage), targets_per_step(stage)
    with FlopCounterMode(display=False, custom_mapping=_on_cpu()) as counter:
        for step in range(min(COUNTED, steps)):
            batch = stage.batch(step, stage.shard)
            stage.losses(stage.module, batch, step)["loss"].backward()  # type: ignore[union-attr]
    return Cost(targets, counter.get_total_flops() / min(COUNTED, steps))


def window(stage: LanguageStage) -> int:
    """Steps after which documents are drawn and packed anew."""
    return -(-WINDOW // stage.config.rows)


def targets_per_step(stage: LanguageStage) -> float:
    """Target tokens of a step, the mean of a window."""
    steps = range(window(stage))
    return sum(int((stage.documents.batch(n).labels != IGNORE).sum()) for n in steps) / len(steps)


def _on_cpu() -> dict[Any, Any]:
    """Formulae of what is counted as nothing, by the shapes of its arguments: the attention that
    CPUs have, and products that are added in place.
    """
    name = "_scaled_dot_product_flash_attention_for_cpu"
    forward, backward = (getattr(torch.ops.aten, f"{name}{end}") for end in ("", "_backward"))
    return {
        forward: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
        backward: lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4]),
        torch.ops.aten.addmm_: lambda _, a, b, **__: mm_flop(a, b),
    }

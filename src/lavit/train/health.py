"""Health of a training: is the codebook alive, does the selector select, is the loss a number?

Quiet failures cost the most (dead codes seen only after days), so each step's figures carry them
and `Alarm` stops a run that is failing, naming what to change. Live codes are counted by *use* over
a window of steps: averaged mass stays above zero for codes that nobody uses. Checks run after every
step, before a checkpoint is written: the last checkpoint is of a healthy step.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from lavit.train.loop import Stage


class Alarm(RuntimeError):
    """A training is failing: what, and what to change. The last checkpoint stays."""


class CodeUse:
    """Use of each code, and revivals, over the last `window` steps."""

    def __init__(self, codes: int, window: int) -> None:
        self.codes = codes
        self.counts: deque[Tensor] = deque(maxlen=window)
        self.revived: deque[int] = deque(maxlen=window)

    def add(self, codes: Int[Tensor, "total"], *, revived: int = 0) -> None:
        """Count one step's codes, and how many were revived after it."""
        # the host waits: the window of counts is kept off the device
        self.counts.append(torch.bincount(codes.cpu(), minlength=self.codes))
        self.revived.append(revived)

    def figures(self) -> dict[str, float]:
        """Share of live codes, perplexity, and number of revivals over the window."""
        if not self.counts:
            return {}
        return {**use_figures(self._counts().sum(0)), "revived": float(sum(self.revived))}

    @property
    def reachable(self) -> float:
        """Share of the codes that the window's tokens would use if all were equally likely."""
        return 1 - math.exp(-float(self._counts().sum()) / self.codes)

    def _counts(self) -> Int[Tensor, "steps codes"]:
        none = torch.zeros(0, self.codes, dtype=torch.long)
        return torch.cat([none, *(count[None] for count in self.counts)])

    def state(self) -> dict[str, Tensor]:
        """The window; inverse of `load_state`."""
        revived = torch.tensor(list(self.revived), dtype=torch.long)
        return {"use": self._counts(), "revived": revived}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take a window back."""
        self.counts.clear()
        self.revived.clear()
        self.counts.extend(state["use"])
        self.revived.extend(state["revived"].tolist())


def use_figures(counts: Int[Tensor, "codes"]) -> dict[str, float]:
    """Live codes (share of the codebook) and perplexity of a histogram of use."""
    share = counts.double() / counts.sum().clamp(min=1)
    entropy = -(share * share.clamp(min=1e-12).log()).sum()
    return {"live_codes": float((counts > 0).double().mean()), "perplexity": float(entropy.exp())}


def selector_figures(
    probability: Float[Tensor, "images patches"],
    kept: Int[Tensor, "all_images"],
) -> dict[str, Tensor]:
    """How decided the selector is, how many patches are kept, and how these lengths spread.

    `kept` may count patches of more pictures than `probability` has (those of all ranks).
    "kept_histogram/0.3" is the share of pictures that keep 30 to 40 % of their patches.
    """
    patches, lengths = probability.shape[1], kept.float()
    tenths = (kept * 10 // patches).clamp(max=9)
    histogram = torch.bincount(tenths, minlength=10).float() / len(kept)
    return {
        "kept": lengths.mean() / patches,
        "decided": ((probability < 0.1) | (probability > 0.9)).float().mean(),
        "length_spread": lengths.std(unbiased=False) / lengths.mean(),
        **{f"kept_histogram/{tenth / 10:.1f}": share for tenth, share in enumerate(histogram)},
    }


def check_features(patches: Tensor, step: int) -> None:
    """Raise `Alarm` if the encoder's features hold something that is not a number."""
    if not torch.isfinite(patches).all():  # the host waits: one bad value spoils all weights
        raise Alarm(
            f"the encoder's features at step {step} are not all finite: they are kept in float16 "
            "(up to 65504), so give an earlier layer or another encoder, and delete the run's cache"
        )


def check_finite(loss: Tensor, parameters: Iterable[Tensor], step: int) -> None:
    """Raise `Alarm` if the loss, or any weight after the step, is not a number."""
    # the host waits, once a step: what is no number must not be saved
    if not torch.isfinite(loss) or not torch.nn.utils.get_total_norm(parameters).isfinite():
        raise Alarm(
            f"the loss is {float(loss):.4g} at step {step} and loss or weights are no longer "
            "numbers: lower the learning rate or lengthen the warm-up; the same command goes on "
            "from the last checkpoint, which is of a good step"
        )


def check_gradients(norms: Tensor, stage: str, step: int) -> None:
    """Raise `Alarm` if one of the gradients whose norms were added up is not a number: weights
    behind it are none either, and must not be saved.
    """
    if not torch.isfinite(norms):
        raise Alarm(
            f"{stage}: a gradient up to step {step} is not a number: lower the learning rate; the "
            "same command goes on from the last checkpoint, which is of a good step"
        )


def check_selector(kept: float, step: int, *, patches: int = 100) -> None:
    """Raise `Alarm` if all or next to none (one of `patches`) are kept after 50 steps."""
    if step < 50:
        return
    said = f"the selector keeps {kept:.0%} of the patches at step {step}"
    if kept >= 0.98:
        raise Alarm(
            f"{said}, all of them: raise the rate weight (λ), lower the selector's learning rate, "
            "or check the features' scale"
        )
    if kept <= max(0.02, 1.05 / patches):
        raise Alarm(
            f"{said}, next to none: raise the wanted share (ρ) or the rate weight (λ), "
            "lower the selector's learning rate or the reward for decided selectors"
        )


def check_codes(
    live: float,
    step: int,
    *,
    steps_with_codes: int,
    window: int,
    reachable: float = 1.0,
) -> None:
    """Raise `Alarm` if a codebook has collapsed: a window uses under a tenth of `reachable`."""
    if steps_with_codes >= 2 * window and live < 0.1 * reachable:
        raise Alarm(
            f"the codebook has collapsed: only {live:.1%} of the codes are alive at step {step}: "
            "start with k-means after a longer phase a, lower the commitment weight, or revive "
            "sooner (patience)"
        )


def parameter_lines(stage: Stage, origins: dict[str, str]) -> list[str]:
    """Where each part's weights come from and whether they train, one line a part.

    `origins` says by prefix of the weights' names where they came from; others and LoRA are fresh.
    """
    counts: Counter[tuple[str, ...]] = Counter()
    for name, parameter in stage.module.named_parameters():
        said = [origin for prefix, origin in origins.items() if name.startswith(prefix)]
        origin = said[0] if said and ".lora_" not in name else "fresh"
        does = "train" if parameter.requires_grad else "frozen"
        counts[name.split(".")[0], origin, does] += parameter.numel()
    line = "{}: {}: {:,} weights, {}, {}"
    return [line.format(stage.name, part, n, *rest) for (part, *rest), n in counts.items()]

"""Health of a training: is the codebook alive, is the selector doing something, is the loss a number?

Quiet failures cost the users of such tokenizers the most (dead codes seen only after days), so each step's figures
carry them and `Alarm` stops a run that is failing, naming what to change. Live codes are counted by *use* over a window
of tokens, not by averaged mass, which stays above zero for codes that nobody uses. Checks run after every step, before
a checkpoint is written: the last checkpoint is of a healthy step.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from lavit.train.loop import Stage


class Alarm(RuntimeError):
    """A training is failing; the message says what and what to change. The last checkpoint stays."""


class CodeUse:
    """Use of each code, and revivals, over the last `window` steps."""

    def __init__(self, codes: int, window: int) -> None:
        self.codes = codes
        self.counts: deque[Tensor] = deque(maxlen=window)
        self.revived: deque[int] = deque(maxlen=window)

    def add(self, codes: Int[Tensor, "total"], *, revived: int = 0) -> None:
        """Count one step's codes, and how many were revived after it."""
        self.counts.append(torch.bincount(codes.cpu(), minlength=self.codes))
        self.revived.append(revived)

    def figures(self) -> dict[str, float]:
        """Share of live codes, perplexity, and number of revivals over the window."""
        if not self.counts:
            return {}
        return {**use_figures(self._total()), "revived": float(sum(self.revived))}

    @property
    def reachable(self) -> float:
        """Share of the codes that as many tokens as the window holds would use if all codes were equally likely."""
        return 1 - math.exp(-float(self._total().sum()) / self.codes) if self.counts else 0.0

    def _total(self) -> Tensor:
        return torch.stack(list(self.counts)).sum(0)

    def state(self) -> dict[str, Tensor]:
        """The window; inverse of `load_state`."""
        counts = torch.stack(list(self.counts)) if self.counts else torch.zeros(0, self.codes, dtype=torch.long)
        return {"use": counts, "revived": torch.tensor(list(self.revived), dtype=torch.long)}

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
    probability: Float[Tensor, "images patches"], kept: Int[Tensor, "all_images"]
) -> dict[str, Tensor]:
    """How decided the selector is, how many patches are kept, how the lengths spread, and their histogram.

    `kept` may hold the counts of more pictures than `probability` (those of all ranks). "kept_histogram/0.3" is the share
    of pictures that keep 30 to 40 % of their patches.
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
    """Raise `Alarm` if the encoder's features hold something that is not a number: no token could be chosen from it."""
    if not torch.isfinite(patches).all():
        raise Alarm(
            f"the encoder's features at step {step} are not all finite: they are kept in float16 (up to 65504), so give an "
            "earlier layer or another encoder, and delete the run's cache"
        )


def check_finite(loss: Tensor, parameters: Iterable[Tensor], step: int) -> None:
    """Raise `Alarm` if the loss, or any weight after the step, is not a number."""
    finite = torch.isfinite(loss) and torch.isfinite(torch.nn.utils.get_total_norm(parameters))
    if not finite:
        raise Alarm(
            f"the loss is {float(loss):.4g} at step {step} and loss or weights are no longer numbers: lower the learning "
            "rate or lengthen the warm-up; the same command goes on from the last checkpoint, which is of a good step"
        )


def check_selector(kept: float, step: int, *, patches: int = 100) -> None:
    """Raise `Alarm` if everything or next to nothing (about one of `patches` a picture) is kept, 50 steps into a run."""
    if step < 50:
        return
    if kept >= 0.98:
        raise Alarm(
            f"the selector keeps {kept:.0%} of the patches at step {step}, all of them: raise the rate weight (λ), "
            "lower the selector's learning rate, or check the features' scale"
        )
    if kept <= max(0.02, 1.05 / patches):
        raise Alarm(
            f"the selector keeps {kept:.0%} of the patches at step {step}, next to none: raise the wanted share (ρ) or the "
            "rate weight (λ), lower the selector's learning rate or the reward for decided selectors"
        )


def check_codes(live: float, step: int, *, steps_with_codes: int, window: int, reachable: float = 1.0) -> None:
    """Raise `Alarm` if a codebook has collapsed: under a tenth of the `reachable` share of codes is used in a window."""
    if steps_with_codes >= 2 * window and live < 0.1 * reachable:
        raise Alarm(
            f"the codebook has collapsed: only {live:.1%} of the codes are alive at step {step}: start with k-means after "
            "a longer phase a, lower the commitment weight, or revive sooner (patience)"
        )


def parameter_lines(stage: Stage, origins: dict[str, str]) -> list[str]:
    """Where each part's weights come from and which train, one line a part: a model that starts from nothing by mistake
    is seen before its first step.

    `origins` says by prefix of the weights' names where they came from; what no prefix matches is fresh, except adapters'.
    """
    trained: dict[tuple[str, str], int] = {}
    frozen: dict[tuple[str, str], int] = {}
    for name, parameter in stage.module.named_parameters():
        origin = next((said for prefix, said in origins.items() if name.startswith(prefix)), "fresh")
        origin = "fresh" if ".lora_" in name else origin
        found = trained if parameter.requires_grad else frozen
        key = (name.split(".")[0], origin)
        found[key] = found.get(key, 0) + parameter.numel()
    lines = [f"{stage.name}: {part}: {count:,} weights, {origin}, train" for (part, origin), count in trained.items()]
    lines += [f"{stage.name}: {part}: {count:,} weights, {origin}, frozen" for (part, origin), count in frozen.items()]
    return lines

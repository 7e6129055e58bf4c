"""Health of a training: is the codebook alive, is the selector doing something, is the loss a number?

Quiet failures cost the users of such tokenizers the most (dead codes seen only after days), so each step's figures
carry them and `Alarm` stops a run that is failing, naming what to change. Live codes are counted by *use* over a window
of tokens, not by averaged mass, which stays above zero for codes that nobody uses.
"""

from __future__ import annotations

from collections import deque

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Alarm(RuntimeError):
    """A training is failing; the message says what and what to change. The last checkpoint stays."""


class CodeUse:
    """Use of each code over the last `window` steps."""

    def __init__(self, codes: int, window: int) -> None:
        self.codes = codes
        self.counts: deque[Tensor] = deque(maxlen=window)

    def add(self, codes: Int[Tensor, "total"]) -> None:
        """Count one step's codes."""
        self.counts.append(torch.bincount(codes.cpu(), minlength=self.codes))

    def figures(self) -> dict[str, float]:
        """Share of live codes and perplexity over the window."""
        if not self.counts:
            return {}
        return use_figures(torch.stack(list(self.counts)).sum(0))


def use_figures(counts: Int[Tensor, "codes"]) -> dict[str, float]:
    """Live codes (share of the codebook) and perplexity of a histogram of use."""
    share = counts.double() / counts.sum().clamp(min=1)
    entropy = -(share * share.clamp(min=1e-12).log()).sum()
    return {"live_codes": float((counts > 0).double().mean()), "perplexity": float(entropy.exp())}


def selector_figures(probability: Float[Tensor, "images patches"], kept: Int[Tensor, "images"]) -> dict[str, Tensor]:
    """How decided the selector is, and how the lengths spread."""
    decided = ((probability < 0.1) | (probability > 0.9)).float().mean()
    lengths = kept.float()
    spread = lengths.std(unbiased=False) / lengths.mean()
    return {
        "kept": lengths.mean() / probability.shape[1],
        "decided": decided,
        "length_spread": spread,
    }


def check_selector(kept: float, step: int) -> None:
    """Raise `Alarm` if everything or nothing is kept."""
    if step >= 50 and not 0.02 < kept < 0.98:
        raise Alarm(
            f"the selector keeps {kept:.0%} of the patches at step {step}: raise the rate weight (λ), "
            "lower the selector's learning rate, or check the features' scale"
        )


def check_codes(live: float, step: int, *, steps_with_codes: int, window: int) -> None:
    """Raise `Alarm` if a codebook has collapsed after a whole window of use."""
    if steps_with_codes >= 2 * window and live < 0.1:
        raise Alarm(
            f"only {live:.0%} of the codes are alive at step {step}: start with k-means after a longer phase a, "
            "lower the commitment weight, or revive sooner (patience)"
        )

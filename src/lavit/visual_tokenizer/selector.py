"""Selector: which patches deserve a token (paper Sec. 3.1, Eq. 1), and policies of keeping them.

    patches ─ LayerNorm ─ Linear ─ GELU ─┬─ first half: local ──────────────┬─ MLP ─ log-softmax
                                         └─ second half: mean over patches ─┘

Two logits per patch, 0 = keep and 1 = drop. Training draws a hard Gumbel-softmax mask with
straight-through gradient. The published modules draw noise at inference too, so a picture gets
other tokens every time; here inference is deterministic but for the policy `sample`.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lavit.config import InputError
from lavit.visual_tokenizer.layers import Keep, Patches, initialise

Baseline = Literal["random", "strided", "norm", "all", "scattered", "dealt", "mean"]
LEARNT = ("auto", "threshold", "top_k", "rate", "sample", "scattered", "dealt", "mean")
PolicyKind = Literal["auto", "threshold", "top_k", "rate", "sample"] | Baseline


@dataclass(frozen=True)
class KeepPolicy:
    """How many and which patches are kept once the selector has learnt.

    auto: the expected count round(Σ p) of most probable patches; threshold: p > value; top_k: value
    patches; rate: value · N patches; sample: a Gumbel draw (needs a generator). Baselines for
    comparison at the rate `value`: random (needs a generator), strided, norm (largest feature
    norm), and all. Baselines whose numbers are the selector's: scattered (as many as `auto`,
    anywhere), dealt (as many as `auto` keeps of some training picture), mean (as many as it keeps
    on average); what they draw, the picture's features seed. At least one patch is always kept.
    """

    kind: PolicyKind = "auto"
    value: float = 0.0
    min_tokens: int = 1
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.min_tokens < 1:
            raise InputError(f"min_tokens must be at least 1, not {self.min_tokens}")
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise InputError(f"max_tokens {self.max_tokens} is below min_tokens {self.min_tokens}")
        if self.kind == "top_k" and (self.value < 1 or self.value != int(self.value)):
            raise InputError(f"top_k needs a whole number of at least 1, not {self.value}")
        if self.kind in ("rate", "random", "strided", "norm") and not 0 < self.value <= 1:
            raise InputError(f"{self.kind} needs a share of patches in 0..1, not {self.value}")
        if self.kind == "threshold" and not 0 <= self.value <= 1:
            raise InputError(f"threshold needs a probability in 0..1, not {self.value}")

    @property
    def learnt(self) -> bool:
        """Whether it needs a selector that has learnt."""
        return self.kind in LEARNT

    @property
    def of_lengths(self) -> bool:
        """Whether it needs the lengths of training pictures."""
        return self.kind in ("dealt", "mean")

    @classmethod
    def parse(cls, keep: str | int | float | KeepPolicy) -> KeepPolicy:
        """Read "auto", "all", 64 (tokens), 0.25 (share of patches), or "kind:value"."""
        if isinstance(keep, KeepPolicy):
            return keep
        if isinstance(keep, bool) or not isinstance(keep, str | int | float):
            raise InputError(f"keep must be a name, a number of tokens or a share, not {keep!r}")
        if isinstance(keep, int):
            return cls("top_k", keep)
        if isinstance(keep, float):
            return cls("rate", keep)
        kind, _, value = keep.partition(":")
        try:
            if not value and kind.replace(".", "", 1).isdigit():
                return cls.parse(float(kind) if "." in kind else int(kind))
            return cls(kind, float(value) if value else 0.0)  # type: ignore[arg-type]  # checked
        except (ValueError, TypeError, OverflowError) as error:
            hint = "try auto, all, 64, 0.25 or top_k:64"
            raise InputError(f"keep={keep!r} is not understood ({error}): {hint}") from error


class Selector(nn.Module):
    """Two log-probabilities per patch: keep, drop. Computes in fp32 whatever the surroundings."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.local = nn.Linear(dim, dim)
        self.head = nn.Sequential(
            nn.Linear(dim, dim // 2),
            nn.GELU(),
            nn.Linear(dim // 2, dim // 4),
            nn.GELU(),
            nn.Linear(dim // 4, 2),
        )
        initialise(self)

    def forward(self, patches: Patches) -> Float[Tensor, "images patches 2"]:
        """Log-probabilities, channel 0 = keep, 1 = drop."""
        with torch.autocast(patches.device.type, enabled=False):
            x = nn.functional.gelu(self.local(self.norm(patches.float())))
            local, shared = x.chunk(2, -1)
            shared = shared.mean(1, keepdim=True).expand_as(local)
            return self.head(torch.cat([local, shared], -1)).log_softmax(-1)


def gumbel(shape: tuple[int, ...], generator: torch.Generator) -> Float[Tensor, "..."]:
    """Standard Gumbel noise, fp32, from the generator's device."""
    uniform = torch.rand(shape, generator=generator, device=generator.device)
    return -torch.log(-torch.log(uniform.clamp(1e-10, 1 - 1e-7)))


def straight_through(
    log_probs: Float[Tensor, "images patches 2"],
    noise: Float[Tensor, "images patches 2"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, "images patches"]:
    """Hard Gumbel-softmax keep mask of zeros and ones with the soft mask's gradient (Eq. 1).

    A picture whose draw keeps nothing keeps its most probable patch.
    """
    soft = ((log_probs + noise) / temperature).softmax(-1)[..., 0]
    hard = (soft > 0.5).float()
    best = torch.zeros_like(hard).scatter_(1, log_probs[..., 0].argmax(1, keepdim=True), 1.0)
    hard = torch.where(hard.sum(1, keepdim=True) == 0, best, hard)
    return hard + (soft - soft.detach())  # in this order: exactly 0 or 1


def select(
    log_probs: Float[Tensor, "images patches 2"],
    policy: KeepPolicy,
    *,
    patches: Patches | None = None,
    generator: torch.Generator | None = None,
    lengths: Int[Tensor, "pictures"] | None = None,
) -> Keep:
    """Keep mask of a policy, each image on its own.

    `norm`, `scattered` and `dealt` need the patches; `sample` and `random` need a generator;
    `dealt` and `mean` the lengths of training pictures, else `InputError`. Ties go to the earlier
    patch.
    """
    probability = log_probs[..., 0].exp()
    images, total = probability.shape
    value = min(policy.value, total)
    rate = torch.full((images,), value * total, device=probability.device)
    score, count = probability, rate
    if policy.kind in ("norm", "scattered", "dealt") and patches is None:
        raise InputError(f"keep={policy.kind!r} looks at the features: give the patches")
    if policy.of_lengths and lengths is None:
        raise InputError(f"keep={policy.kind!r} needs a tokenizer that was trained with it")
    if policy.kind in ("auto", "scattered"):
        count = probability.double().sum(1)
    if policy.kind == "scattered" and patches is not None:
        score = torch.stack([torch.rand(total, generator=seeded_by(one)) for one in patches])
        score = score.to(probability.device)
    elif policy.kind == "dealt" and patches is not None and lengths is not None:
        places = [torch.randint(len(lengths), (), generator=seeded_by(one)) for one in patches]
        count = lengths[torch.stack(places).to(lengths.device)]
    elif policy.kind == "mean" and lengths is not None:
        count = lengths.double().mean().expand(images)
    elif policy.kind == "threshold":
        count = (probability > policy.value).sum(1)
    elif policy.kind == "top_k":
        count = torch.full_like(rate, value)
    elif policy.kind == "all":
        count = torch.full_like(rate, total)
    elif policy.kind in ("sample", "random") and generator is None:
        raise InputError(f"keep={policy.kind!r} is random: give a generator (or a seed)")
    elif policy.kind == "sample" and generator is not None:
        noisy = log_probs + gumbel(tuple(log_probs.shape), generator).to(log_probs.device)
        score = noisy[..., 0] - noisy[..., 1]
        count = (score > 0).sum(1)
    elif policy.kind == "random":
        score = torch.rand(images, total, generator=generator).to(probability.device)
    elif policy.kind == "strided":
        kept = max(1, round(policy.value * total))
        even = torch.linspace(0, total - 1, kept, device=probability.device).round().long()
        score = torch.zeros_like(probability).index_fill_(1, even, 1.0)
    elif policy.kind == "norm" and patches is not None:
        score = patches.float().norm(dim=-1)
    elif policy.kind not in ("auto", "rate"):
        raise InputError(f"there is no keep policy {policy.kind!r}")
    count = count.round().long().clamp(policy.min_tokens, min(policy.max_tokens or total, total))
    order = score.argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1) < count[:, None]  # an order's own order is the rank


def seeded_by(patches: Float[Tensor, "patches dim"]) -> torch.Generator:
    """A generator that is a function of a picture's features."""
    return torch.Generator().manual_seed(zlib.crc32(patches.cpu().contiguous().numpy().tobytes()))

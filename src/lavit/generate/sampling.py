"""How the next token is chosen: a frozen `Sampling`, the paper's protocols as presets, pure functions on logits.

Guidance works on logits (paper Eq. 7): l = l_u + a (l_c - l_u), where the unconditional stream is a bare [image start].
Filters set what is forbidden to -inf; `draw` inverts the cumulative distribution at one uniform number per row, which
comes from that row's own generator. So a row's tokens depend on its seed and its logits, and on no other row.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lavit.config import InputError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one modality is written. Wrong values raise `InputError`.

    Lengths count text ids, or codes of one image; the end that closes them is not counted.
    """

    temperature: float = 1.0  # 0 takes the most likely token
    top_k: int = 0  # keep the k most likely tokens; 0 keeps all
    top_p: float = 1.0  # keep the smallest set of tokens that holds this much probability
    min_p: float = 0.0  # keep tokens at least this likely, relative to the most likely one
    guidance: float = 1.0  # a of Eq. 7, inside images; 1 leaves the conditional logits as they are
    min_tokens: int = 1  # the end is forbidden before
    max_tokens: int = 200  # the end is forced here
    seed: int | tuple[int, ...] | None = 0  # sample i takes seed + i, or its own entry; None: a fresh one each time
    n: int = 1  # samples of one prompt
    beams: int = 1  # above 1: beam search, text only; the n best come out
    length_penalty: float = 1.0  # a beam's score is its log-probability / length ** penalty
    # True: stop as soon as `beams` answers are finished; False: when the running ones look no better; "never": when
    # no running one can be better any more
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        self._check_kinds()
        for holds, line in (
            (self.temperature >= 0, f"temperature {self.temperature} is below 0: use 0 for the most likely token"),
            (self.top_k >= 0, f"top_k {self.top_k} is below 0: use 0 to keep every token"),
            (0 < self.top_p <= 1, f"top_p {self.top_p} is not in (0, 1]: use 1 to keep every token"),
            (0 <= self.min_p <= 1, f"min_p {self.min_p} is not in [0, 1]: use 0 to keep every token"),
            (self.guidance >= 0, f"guidance {self.guidance} is below 0: use 1 for none, 3 or 4 to draw"),
            (self.max_tokens >= 1, f"max_tokens {self.max_tokens} must be at least 1"),
            (0 <= self.min_tokens <= self.max_tokens,
             f"min_tokens {self.min_tokens} is not in 0..{self.max_tokens} (max_tokens)"),
            (self.n >= 1, f"n is {self.n}: ask for at least one sample"),
            (self.beams >= 1, f"beams is {self.beams}: use 1 for no beam search"),
            (self.beams == 1 or self.n <= self.beams,
             f"n={self.n} samples from {self.beams} beams: use at least {self.n} beams"),
            (self.beams == 1 or self.temperature == 0,
             f"beam search draws nothing: set temperature=0 (it is {self.temperature}) or beams=1"),
        ):  # fmt: skip
            if not holds:
                raise InputError(line)

    def _check_kinds(self) -> None:
        for name in ("temperature", "top_p", "min_p", "guidance", "length_penalty"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise InputError(f"{name} is {value!r}: give a finite number")
        for name in ("top_k", "min_tokens", "max_tokens", "n", "beams"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise InputError(f"{name} is {value!r}: give a whole number")
        if self.early_stopping not in (True, False, "never"):
            raise InputError(f"early_stopping is {self.early_stopping!r}: give True, False or 'never'")
        seeds = self.seed if isinstance(self.seed, tuple) else (self.seed,)
        for seed in seeds:
            known = isinstance(seed, int) and not isinstance(seed, bool) and -(2**63) <= seed < 2**63
            if not known and (seed is not None or isinstance(self.seed, tuple)):
                raise InputError(f"seed {seed!r} is no seed: give an int below 2**63, a tuple of n of them, or None")
        if isinstance(self.seed, tuple) and len(self.seed) != self.n:
            raise InputError(f"{len(self.seed)} seeds for n={self.n} samples: give one seed for each")

    @property
    def drawing(self) -> tuple[float, int, float, float]:
        """What `choose` goes by: rows that agree in it can be drawn together."""
        return (self.temperature, self.top_k, self.top_p, self.min_p)

    def seeds(self) -> tuple[int, ...]:
        """The seed of each of the n samples; sample i of seed s is the single sample of seed s + i."""
        if isinstance(self.seed, tuple):
            return self.seed
        first = secrets.randbits(48) if self.seed is None else self.seed
        return tuple(first + i for i in range(self.n))

    def generators(self) -> list[torch.Generator]:
        """One CPU generator for each of the n samples."""
        return [torch.Generator().manual_seed(seed) for seed in self.seeds()]


def caption() -> Sampling:
    """The paper's captions: beam 2, 8-36 new tokens."""
    return Sampling(temperature=0.0, beams=2, min_tokens=8, max_tokens=36)


def question() -> Sampling:
    """The paper's answers to questions: beam 5, 2-10 new tokens, no length penalty, early stopping."""
    return Sampling(
        temperature=0.0,
        beams=5,
        min_tokens=2,
        max_tokens=10,
        length_penalty=0.0,
        early_stopping=True,
    )


def draw_published() -> Sampling:
    """Images as the published defaults write them: top-k 50, guidance 4, 20-200 codes."""
    return Sampling(top_k=50, guidance=4.0, min_tokens=20, max_tokens=200)


def draw_paper() -> Sampling:
    """Images as the paper writes them: top-k 200, guidance 2, four samples of which a scorer keeps the best."""
    return Sampling(top_k=200, guidance=2.0, min_tokens=20, max_tokens=200, n=4)


def guide(
    conditional: Float[Tensor, "rows vocab"],
    unconditional: Float[Tensor, "rows vocab"],
    scale: Float[Tensor, "rows"],
) -> Float[Tensor, "rows vocab"]:
    """Guided logits (Eq. 7): l_u + a (l_c - l_u), one a for each row."""
    return torch.lerp(unconditional, conditional, scale[:, None])


def top_k(logits: Float[Tensor, "rows vocab"], k: int) -> Float[Tensor, "rows vocab"]:
    """Forbid all but the k most likely tokens (ties at the border stay)."""
    if not 0 < k < logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[:, -1:], -torch.inf)


def top_p(logits: Float[Tensor, "rows vocab"], p: float) -> Float[Tensor, "rows vocab"]:
    """Forbid all but the smallest set of most likely tokens whose probability reaches p."""
    if p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probability = ordered.softmax(-1)
    beyond = probability.cumsum(-1) - probability >= p  # what stands before a token already reaches p
    beyond[:, 0] = False
    return logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)


def min_p(logits: Float[Tensor, "rows vocab"], p: float) -> Float[Tensor, "rows vocab"]:
    """Forbid tokens less likely than p times the most likely one."""
    if p <= 0:
        return logits
    return logits.masked_fill(logits < logits.max(-1, keepdim=True).values + math.log(p), -torch.inf)


def draw(logits: Float[Tensor, "rows vocab"], uniform: Float[Tensor, "rows"]) -> Int[Tensor, "rows"]:
    """Draw one index from each row's softmax: where its cumulative distribution passes the uniform number."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    total = cumulative[:, -1]
    target = torch.minimum(uniform.double() * total, total.nextafter(torch.zeros_like(total)))  # never past the last
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]


def choose(
    logits: Float[Tensor, "rows vocab"], sampling: Sampling, generators: list[torch.Generator]
) -> Int[Tensor, "rows"]:
    """Next index of each row: filter, then draw with the row's generator (the most likely one at temperature 0)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = top_k(logits.float() / sampling.temperature, sampling.top_k)
    logits = min_p(top_p(logits, sampling.top_p), sampling.min_p)
    uniform = torch.cat([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
    return draw(logits, uniform.to(logits.device))

"""How the next token is chosen: a frozen `Sampling`, and pure functions on logits.

Filters set what is forbidden to -inf; `draw` inverts the cumulative distribution at one uniform
number per row, which comes from that row's own generator. So a row's tokens depend on its seed and
its logits, and on no other row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from lavit.config import InputError

Logits = Float[Tensor, "rows vocab"]
REALS = ("temperature", "top_p", "min_p", "guidance", "length_penalty")
WHOLES = ("top_k", "min_tokens", "max_tokens", "beams")


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
    beams: int = 1  # above 1: beam search, text only
    length_penalty: float = 1.0  # a beam's score is its log-probability / length ** penalty
    # True: stop as soon as `beams` answers are finished; False: when the running ones look no
    # better; "never": when no running one can be better any more
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        self._check_kinds()
        for holds, line in (
            (self.temperature >= 0,
             f"temperature {self.temperature} is below 0: use 0 for the most likely token"),
            (self.top_k >= 0, f"top_k {self.top_k} is below 0: use 0 to keep every token"),
            (0 < self.top_p <= 1,
             f"top_p {self.top_p} is not in (0, 1]: use 1 to keep every token"),
            (0 <= self.min_p <= 1,
             f"min_p {self.min_p} is not in [0, 1]: use 0 to keep every token"),
            (self.guidance >= 0,
             f"guidance {self.guidance} is below 0: use 1 for none, 3 or 4 to draw"),
            (self.max_tokens >= 1, f"max_tokens {self.max_tokens} must be at least 1"),
            (0 <= self.min_tokens <= self.max_tokens,
             f"min_tokens {self.min_tokens} is not in 0..{self.max_tokens} (max_tokens)"),
            (self.beams >= 1, f"beams is {self.beams}: use 1 for no beam search"),
            (self.beams == 1 or self.temperature == 0,
             f"beam search draws nothing: set temperature=0 (it is {self.temperature}) or beams=1"),
        ):  # fmt: skip
            if not holds:
                raise InputError(line)

    def _check_kinds(self) -> None:
        for name in (*REALS, *WHOLES):
            value, kind = getattr(self, name), int if name in WHOLES else int | float
            if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value):
                what = "whole" if name in WHOLES else "finite"
                raise InputError(f"{name} is {value!r}: give a {what} number")
        stopping = self.early_stopping
        if stopping not in (True, False, "never"):
            raise InputError(f"early_stopping is {stopping!r}: give True, False or 'never'")


def guide(conditional: Logits, unconditional: Logits, scale: Float[Tensor, "rows"]) -> Logits:
    """Guided logits (paper Eq. 7): l_u + a (l_c - l_u), one a for each row."""
    return torch.lerp(unconditional, conditional, scale[:, None])


def top_k(logits: Logits, k: int) -> Logits:
    """Forbid all but the k most likely tokens (ties at the border stay)."""
    if not 0 < k < logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[:, -1:], -torch.inf)


def top_p(logits: Logits, p: float) -> Logits:
    """Forbid all but the smallest set of most likely tokens whose probability reaches p."""
    if p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probability = ordered.softmax(-1)
    beyond = probability.cumsum(-1) - probability >= p  # what stands before already reaches p
    beyond[:, 0] = False
    return logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)


def min_p(logits: Logits, p: float) -> Logits:
    """Forbid tokens less likely than p times the most likely one."""
    if p <= 0:
        return logits
    least = logits.max(-1, keepdim=True).values + math.log(p)
    return logits.masked_fill(logits < least, -torch.inf)


def draw(logits: Logits, uniform: Float[Tensor, "rows"]) -> Int[Tensor, "rows"]:
    """One index from each row's softmax: where its cumulative distribution passes the uniform."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    total = cumulative[:, -1]
    below = total.nextafter(torch.zeros_like(total))  # never past the last
    target = torch.minimum(uniform.double() * total, below)
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]


def choose(logits: Logits, sampling: Sampling, generators: list[Generator]) -> Int[Tensor, "rows"]:
    """Next index of each row: filter, draw with the row's generator (at temperature 0 the best)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = top_k(logits.float() / sampling.temperature, sampling.top_k)
    logits = min_p(top_p(logits, sampling.top_p), sampling.min_p)
    uniform = [torch.rand(1, generator=own, dtype=torch.float64) for own in generators]
    return draw(logits, torch.cat(uniform).to(logits.device))

"""Allocation gain: is it worth something that a picture decides how many tokens it gets?

d(i, L) is the distortion of picture i from its L best patches (by the selector's probability)
through the codebook. The gain is how much worse pictures become when their lengths are dealt out
anew among them, as a share of the distortion at the mean length:

    gain = mean over i and permutations of [d(i, L_perm(i)) - d(i, L_i)] / mean d(i, mean L)

The same number of tokens is spent either way. It is 0 where all lengths are equal, and below 0
where lengths are dealt out worse than by chance. Only a model trained on permuted lengths could say
what allocation is worth in training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lavit.evaluate.exam import BATCH, Exam
from lavit.evaluate.figures import Figure, ratio
from lavit.modules.tokenizer import VisualTokenizer, cosine_distance

PERMUTATIONS = 20

Distortion = Callable[[int, int], float]


def dealt(lengths: Sequence[int], groups: Sequence[int] | None = None) -> np.ndarray:
    """The lengths in 20 other orders, [permutations, pictures]; with `groups` only among pictures
    of one group.
    """
    rng = np.random.default_rng(0)
    given = np.asarray(lengths)
    found = np.empty((PERMUTATIONS, len(given)), dtype=np.int64)
    of = np.zeros(len(given), dtype=np.int64) if groups is None else np.asarray(groups)
    for row in found:
        for group in np.unique(of):
            at = np.flatnonzero(of == group)
            row[at] = given[rng.permutation(at)]
    return found


def gains(distortion: Distortion, lengths: Sequence[int], orders: np.ndarray) -> tuple[list[float], list[float]]:
    """What each picture loses by other lengths (mean over orders), and its distortion at the mean
    length.
    """
    middle = mean_length(lengths)
    lost = [
        float(np.mean([distortion(i, int(other)) - distortion(i, own) for other in orders[:, i]]))
        for i, own in enumerate(lengths)
    ]
    return lost, [distortion(i, middle) for i in range(len(lengths))]


def mean_length(lengths: Sequence[int]) -> int:
    """The mean length as a number of tokens."""
    return max(1, round(float(np.mean(lengths))))


def allocation_gain(exam: Exam) -> Figure:
    """The gain over the pictures of the ladder, and over those with equal numbers of things."""
    count = exam.count
    features, tokens = exam.encoded("ladder", count)
    lengths = tokens.lengths.tolist()
    things = [len(exam.scene("ladder", n).things) for n in range(count)]
    orders, inside = dealt(lengths), dealt(lengths, things)
    middle = mean_length(lengths)
    wanted = [sorted({lengths[i], middle, *orders[:, i].tolist(), *inside[:, i].tolist()}) for i in range(count)]

    def make(numbers: list[int]) -> list[dict[str, float]]:
        pairs = [(i, length) for i in numbers for length in wanted[i]]
        values = iter(distortions(exam.tokenizer, features, pairs))
        return [{str(length): next(values) for length in wanted[i]} for i in numbers]

    table = exam.made(f"distortion of {count}", range(count), make)

    def distortion(i: int, length: int) -> float:
        return table[i][str(length)]

    equal = ratio("", *gains(distortion, lengths, inside))
    details = {
        "equal_things": equal.value,
        "equal_things_low": equal.low,
        "equal_things_high": equal.high,
        "mean_tokens": float(np.mean(lengths)),
    }
    floor = ("lengths dealt out by chance", 0.0)
    return ratio("allocation_gain", *gains(distortion, lengths, orders), floor=floor, details=details)


@torch.no_grad()
def distortions(
    tokenizer: VisualTokenizer,
    features: Float[Tensor, "images patches dim"],
    pairs: Sequence[tuple[int, int]],
) -> list[float]:
    """d(i, L) of pairs: 1 - cos, mean over patches, in the tokenizer's own space."""
    found: list[float] = []
    for at in range(0, len(pairs), BATCH):
        part = pairs[at : at + BATCH]
        patches = features[[i for i, _ in part]]
        score = tokenizer.selector(tokenizer.prepare(patches))[..., 0].exp()
        order = score.argsort(dim=1, descending=True, stable=True)
        place = torch.arange(order.shape[1], device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(1, order, place)
        keep = rank < torch.tensor([length for _, length in part], device=rank.device)[:, None]
        rebuilt = tokenizer.reconstruct(patches, keep, quantise=True)
        found += cosine_distance(rebuilt, tokenizer.standard(patches)).tolist()
    return found

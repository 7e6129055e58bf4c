"""Allocation gain: is it worth something that a picture decides how many tokens it gets?

d(i, L) is the distortion of picture i from its L best patches (by the selector's probability)
through the codebook. The gain is how much worse pictures become when their lengths are permuted
among them, as a share of the distortion at the mean length:

    gain = mean over i and permutations of [d(i, L_perm(i)) - d(i, L_i)] / mean d(i, mean L)

The same number of tokens is spent either way. It is 0 where all lengths are equal, and below 0
where lengths are assigned worse than by chance. Only a model trained on permuted lengths could say
what allocation is worth in training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from lavit.evaluate.distance import distances
from lavit.evaluate.exam import Exam
from lavit.evaluate.examinee import BATCH
from lavit.evaluate.figures import Figure, average, ratio
from lavit.visual_tokenizer.layers import Patches
from lavit.visual_tokenizer.tokenizer import VisualTokenizer

PERMUTATIONS = 20


def dealt(lengths: Sequence[int], groups: Sequence[int] | None = None) -> np.ndarray:
    """The lengths in 20 random orders, [permutations, pictures]; with `groups` inside these."""
    rng = np.random.default_rng(0)
    given = np.asarray(lengths)
    found = np.empty((PERMUTATIONS, len(given)), dtype=np.int64)
    of = np.zeros(len(given), dtype=np.int64) if groups is None else np.asarray(groups)
    for row in found:
        for group in np.unique(of):
            at = np.flatnonzero(of == group)
            row[at] = given[rng.permutation(at)]
    return found


def gains(
    distortion: Callable[[int, int], float],
    lengths: Sequence[int],
    orders: np.ndarray,
) -> tuple[list[float], list[float]]:
    """Each picture's loss by other lengths (mean over orders), and d at the mean length."""
    middle = mean_length(lengths)
    lost = [
        average([distortion(i, int(other)) - distortion(i, own) for other in orders[:, i]])
        for i, own in enumerate(lengths)
    ]
    return lost, [distortion(i, middle) for i in range(len(lengths))]


def mean_length(lengths: Sequence[int]) -> int:
    """The mean length as a number of tokens."""
    return max(1, round(average(lengths)))


def allocation_gain(exam: Exam) -> Figure:
    """The gain over the pictures of the ladder, and over those with equal numbers of things."""
    count = exam.count
    features, tokens = exam.encoded("ladder", count)
    lengths = tokens.lengths.tolist()
    things = [len(exam.scene("ladder", n).things) for n in range(count)]
    orders, inside = dealt(lengths), dealt(lengths, things)
    middle = mean_length(lengths)
    dealt_out = np.concatenate([orders, inside]).T.tolist()
    wanted = [sorted({lengths[i], middle, *dealt_out[i]}) for i in range(count)]

    def make(numbers: list[int]) -> list[dict[str, float]]:
        pairs = [(i, length) for i in numbers for length in wanted[i]]
        values = iter(distortions(exam.tokenizer, features, pairs))
        return [{str(length): next(values) for length in wanted[i]} for i in numbers]

    table = exam.made(f"distortion of {count}", range(count), make)

    def distortion(i: int, length: int) -> float:
        return table[i][str(length)]

    equal = ratio(*gains(distortion, lengths, inside))
    return ratio(
        *gains(distortion, lengths, orders),
        floor=("lengths assigned by chance", 0.0),
        details={
            "equal_things": equal.value,
            "equal_things_low": equal.low,
            "equal_things_high": equal.high,
            "mean_tokens": average(lengths),
        },
    )


@torch.no_grad()
def distortions(
    tokenizer: VisualTokenizer,
    features: Patches,
    pairs: Sequence[tuple[int, int]],
) -> list[float]:
    """d(i, L) of pairs: 1 - cos, mean over patches, in the tokenizer's own space."""
    found: list[float] = []
    for at in range(0, len(pairs), BATCH):
        images, lengths = torch.tensor(pairs[at : at + BATCH], device=features.device).T
        patches = features[images]
        score = tokenizer.selector(tokenizer.prepare(patches))[..., 0].exp()
        rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        found += distances(tokenizer, patches, rank < lengths[:, None])
    return found

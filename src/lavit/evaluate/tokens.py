"""What the tokenizer loses and uses on scenes: distance, live codes, kept share."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lavit.data.scenes.sample import scene_at
from lavit.evaluate.exam import BATCH, Exam
from lavit.evaluate.figures import Figure, average, mean, plain
from lavit.visual_tokenizer.layers import Patches
from lavit.visual_tokenizer.tokenizer import VisualTokenizer, cosine_distance

PICTURES = 20_000  # in which a live code is used at least once
TOGETHER = 100  # pictures that are kept together
OTHER_SEED = 7_700_017  # of scenes like training's that no training is likely to have seen


@torch.no_grad()
def distances(
    tokenizer: VisualTokenizer,
    features: Patches,
    keep: Bool[Tensor, "images patches"],
    *,
    quantise: bool = True,
) -> list[float]:
    """1 - cos of each picture's features and those rebuilt from its tokens, mean over patches, in
    the tokenizer's own space; with `quantise` False without the look-up.
    """
    found = []
    for part, mask in zip(features.split(BATCH), keep.split(BATCH), strict=True):
        rebuilt = tokenizer.reconstruct(part, mask, quantise=quantise)
        found += cosine_distance(rebuilt, tokenizer.standard(part)).tolist()
    return found


def constant_distance(
    tokenizer: VisualTokenizer,
    features: Patches,
    others: Float[Tensor, "others patches dim"],
) -> float:
    """The same for an answer that is always the mean of other pictures, place by place."""
    answer = tokenizer.standard(others).mean(0)
    target = tokenizer.standard(features)
    return float(cosine_distance(answer.expand_as(target), target).mean())


def distance_figure(
    tokenizer: VisualTokenizer,
    features: Patches,
    keep: Bool[Tensor, "images patches"],
    others: Float[Tensor, "others patches dim"],
    **beside: Any,
) -> Figure:
    """Mean 1 - cos of pictures; `others` are what the constant answer is made of."""
    unquantised = distances(tokenizer, features, keep, quantise=False)
    return mean(
        distances(tokenizer, features, keep),
        floor=("mean feature of each place", constant_distance(tokenizer, features, others)),
        ceiling=("without the look-up", average(unquantised)),
        **beside,
    )


def tokenizer_distance(exam: Exam) -> Figure:
    """Mean 1 - cos on test scenes."""
    features, tokens = exam.encoded("test", exam.count)
    others, _ = exam.encoded("valid", min(exam.count, 100))
    every = average(distances(exam.tokenizer, features, torch.ones_like(tokens.keep)))
    details = {"all_patches_kept": every}
    return distance_figure(exam.tokenizer, features, tokens.keep, others, details=details)


def kept_share(exam: Exam) -> Figure:
    """Share of the patches of test scenes that are kept."""
    _, tokens = exam.encoded("test", exam.count)
    patches = tokens.keep.shape[1]
    kept = tokens.lengths.double()
    spread = float(kept.std() / kept.mean()) if len(kept) > 1 else 0.0
    details = {"patches": patches, "spread": spread}
    return mean((kept / patches).tolist(), details=details, within=(0.0, 1.0))


def live_codes(exam: Exam) -> Figure:
    """Share of the codebook used at least once in 20,000 pictures like training's, unseen by it;
    fewer pictures (`--count`) use fewer codes.
    """
    size, pictures = exam.tokenizer.config.codes, exam.scaled(PICTURES)

    def make(numbers: list[int]) -> list[list[int]]:
        scenes = [scene_at("train", n, seed=OTHER_SEED, rules=exam.rules) for n in numbers]
        features = exam.features([exam.picture(scene) for scene in scenes])
        return [codes.tolist() for codes in exam.tokenizer.encode(features).split()]

    used = len(set().union(*exam.made("codes", range(pictures), make, together=TOGETHER)))
    return plain(used / size, pictures, note=f"{used} of {size} codes")

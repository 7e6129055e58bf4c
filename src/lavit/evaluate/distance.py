"""Measures of any pictures: what a tokenizer loses of their features, what a JPEG file needs."""

from __future__ import annotations

import io
from typing import Any

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from lavit.evaluate.examinee import BATCH
from lavit.evaluate.figures import Figure, average, mean
from lavit.visual_tokenizer.layers import Patches
from lavit.visual_tokenizer.tokenizer import VisualTokenizer, cosine_distance


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


def jpeg_bytes(picture: Image.Image) -> int:
    """Size of a picture as a JPEG file of quality 75."""
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=75)
    return len(stream.getvalue())

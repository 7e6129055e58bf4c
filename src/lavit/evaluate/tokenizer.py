"""How good the visual tokenizer is: reconstruction, live codes, kept share, and whether lengths follow content."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor

from lavit.evaluate.figures import Figure, mean, plain
from lavit.modules.tokenizer import VisualTokenizer, cosine_distance
from lavit.sequence import VisualTokens
from lavit.train.health import use_figures

BATCH = 64


def complexity(image: Image.Image) -> int:
    """Bytes of the picture as lossless WebP at 224 px: the yardstick of how much there is to say about it."""
    stream = io.BytesIO()
    image.resize((224, 224), Image.Resampling.BICUBIC).save(stream, "WEBP", lossless=True)
    return len(stream.getvalue())


def encode_all(tokenizer: VisualTokenizer, patches: Float[Tensor, "images patches dim"]) -> VisualTokens:
    """Visual tokens of many features, under the default policy."""
    parts = [tokenizer.encode(part) for part in patches.split(BATCH)]
    return VisualTokens(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.lengths for part in parts]),
        torch.cat([part.keep for part in parts]),
    )


@torch.no_grad()
def reconstruction(
    tokenizer: VisualTokenizer,
    patches: Float[Tensor, "images patches dim"],
    train_mean: Float[Tensor, "patches dim"],
    *,
    where: str,
) -> Figure:
    """1 - cos of pictures through their codes; floor: the mean feature per position; ceiling: without the look-up."""
    coded, continuous, constant = [], [], []
    for part in patches.split(BATCH):
        keep = tokenizer.select(part)
        coded.append(cosine_distance(tokenizer.reconstruct(part, keep, quantise=True), part))
        continuous.append(cosine_distance(tokenizer.reconstruct(part, keep, quantise=False), part))
        constant.append(cosine_distance(train_mean.expand_as(part), part))
    floor, ceiling = float(torch.cat(constant).mean()), float(torch.cat(continuous).mean())
    values = torch.cat(coded).tolist()
    return mean(
        f"reconstruction 1 - cos, {where}",
        values,
        floor=("mean feature per position", floor),
        ceiling=("unquantised", ceiling),
        note=f"{float(np.mean(values)) / floor:.2f} of the floor",
    )


def code_use(tokens: VisualTokens, codes: int, *, where: str) -> list[Figure]:
    """Live codes and perplexity over one pass, revival and averages off."""
    use = use_figures(torch.bincount(tokens.codes, minlength=codes))
    count = len(tokens.codes)
    return [
        plain(
            f"live codes, {where}",
            use["live_codes"],
            count,
            note=f"of {codes} codes; n counts tokens",
        ),
        plain(f"code perplexity, {where}", use["perplexity"], count),
    ]


def lengths(tokens: VisualTokens, images: Sequence[Image.Image], *, where: str) -> list[Figure]:
    """Share of patches kept, its spread, and the rank correlation of length with picture complexity."""
    kept = tokens.lengths.float()
    patches = tokens.keep.shape[1]
    sizes = [complexity(image) for image in images]
    vary = len(kept.unique()) > 1 and len(set(sizes)) > 1  # what is constant follows nothing
    follows = float(spearmanr(kept.numpy(), sizes).statistic) if vary else 0.0
    return [
        mean(f"kept share, {where}", (kept / patches).tolist()),
        plain(f"length spread (std / mean), {where}", float(kept.std() / kept.mean()), len(kept)),
        plain(f"rank correlation of length and bytes, {where}", follows, len(kept)),
    ]

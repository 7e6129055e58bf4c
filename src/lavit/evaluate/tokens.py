"""What the tokenizer loses and uses on scenes: distance, live codes, kept share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lavit.data.scenes.sample import scene_at
from lavit.evaluate.exam import BATCH, Exam, tokens_of
from lavit.evaluate.figures import Figure, mean, plain
from lavit.modules.tokenizer import VisualTokenizer, cosine_distance

PICTURES = 20_000  # in which a live code is used at least once
BLOCK = 100  # pictures of a block of them
OTHER_SEED = 7_700_017  # of scenes like training's that no training is likely to have seen


@torch.no_grad()
def distances(
    tokenizer: VisualTokenizer,
    features: Float[Tensor, "images patches dim"],
    keep: Bool[Tensor, "images patches"],
    *,
    quantise: bool = True,
) -> list[float]:
    """1 - cos between each picture's features and those rebuilt from its tokens, mean over patches,
    in the tokenizer's own space; with `quantise` False without the look-up.
    """
    found = []
    for part, mask in zip(features.split(BATCH), keep.split(BATCH), strict=True):
        rebuilt = tokenizer.reconstruct(part, mask, quantise=quantise)
        found += cosine_distance(rebuilt, tokenizer.standard(part)).tolist()
    return found


def constant_distance(
    tokenizer: VisualTokenizer,
    features: Float[Tensor, "images patches dim"],
    others: Float[Tensor, "others patches dim"],
) -> float:
    """The same for an answer that is always the mean of other pictures, place by place."""
    answer = tokenizer.standard(others).mean(0)
    target = tokenizer.standard(features)
    return float(cosine_distance(answer.expand_as(target), target).mean())


def tokenizer_distance(exam: Exam) -> Figure:
    """Mean 1 - cos on test scenes."""
    features, tokens = exam.encoded("test", exam.count)
    others, _ = exam.encoded("valid", min(exam.count, 100))
    tokenizer = exam.tokenizer
    floor = constant_distance(tokenizer, features, others)
    unquantised = float(np.mean(distances(tokenizer, features, tokens.keep, quantise=False)))
    every = float(np.mean(distances(tokenizer, features, torch.ones_like(tokens.keep))))
    return mean(
        "tokenizer_distance",
        distances(tokenizer, features, tokens.keep),
        floor=("mean feature of each place", floor),
        ceiling=("without the look-up", unquantised),
        details={"all_patches_kept": every},
    )


def kept_share(exam: Exam) -> Figure:
    """Share of the patches of test scenes that are kept."""
    _, tokens = exam.encoded("test", exam.count)
    patches = tokens.keep.shape[1]
    kept = tokens.lengths.double()
    spread = float(kept.std() / kept.mean()) if len(kept) > 1 else 0.0
    details = {"patches": patches, "spread": spread}
    return mean("kept_share", (kept / patches).tolist(), details=details, within=(0.0, 1.0))


def live_codes(exam: Exam) -> Figure:
    """Share of the codebook that is used at least once in 20,000 pictures like training's, which
    training did not see.

    With fewer pictures (`--count`) the figure is lower; `count` says how many there were.
    """
    size = exam.tokenizer.config.codes
    pictures = exam.scaled(PICTURES)
    blocks = range(-(-pictures // BLOCK))

    def make(numbers: list[int]) -> list[str]:
        return [_used(exam, range(b * BLOCK, min((b + 1) * BLOCK, pictures)), size) for b in numbers]

    used = np.zeros(size, dtype=bool)
    for bits in exam.made(f"codes of {pictures}", blocks, make, together=1):
        used |= unpacked(bits, size)
    return plain("live_codes", float(used.mean()), pictures, note=f"{int(used.sum())} of {size} codes")


def _used(exam: Exam, numbers: Sequence[int], size: int) -> str:
    """Codes that pictures of these numbers use, as bits in hex."""
    scenes = [scene_at("train", number, seed=OTHER_SEED, rules=exam.rules) for number in numbers]
    codes = tokens_of(exam.tokenizer, exam.features([exam.picture(scene) for scene in scenes])).codes
    return np.packbits(np.bincount(codes.cpu().numpy(), minlength=size) > 0).tobytes().hex()


def unpacked(bits: str, size: int) -> np.ndarray:
    """Bits in hex as booleans."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(bits), dtype=np.uint8))[:size].astype(bool)

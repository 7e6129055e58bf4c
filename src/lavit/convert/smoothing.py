"""What the published softmax's smoothing changes on given pictures (method, Sec. 2).

The published modules add 1e-6 / N to every masked share; ours compute the kept rows alone, without
it. On real weights it could matter where a masked logit towers above all allowed ones: so here both
are computed, for the merger that makes the codes and for the one through which pictures are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lavit.config import TO_SEE
from lavit.files import load_strictly, load_tensors
from lavit.images import ImageInput, open_image
from lavit.model import LaVIT
from lavit.visual_tokenizer.merger import Merger

SMOOTHING = 1e-6


@dataclass(frozen=True)
class Smoothed:
    """Effect on one picture: relative differences of merged rows, and codes that change."""

    kept: int  # patches
    written: float  # rows that become codes
    read: float  # rows that the language model reads
    codes: int  # that are others with smoothing


@torch.no_grad()
def smoothing_effect(folder: Path | str, pictures: Sequence[ImageInput]) -> list[Smoothed]:
    """The effect on each picture, by the model of a converted folder."""
    folder = Path(folder)
    model = LaVIT.from_pretrained(folder, parts=TO_SEE)
    tokenizer, config = model.visual_tokenizer, model.config.visual_tokenizer
    reader = Merger(config.dim, config.heads, config.merger_depth, config.mlp_ratio).eval()
    where = folder / "reader" / "model.safetensors"
    prefix = "merger."
    tensors = {n.removeprefix(prefix): t for n, t in load_tensors(where).items() if prefix in n}
    load_strictly(reader, {name: tensor.float() for name, tensor in tensors.items()}, where)
    found = []
    for picture in pictures:
        patches = model.patches([open_image(picture)])
        keep = tokenizer.select(patches)
        inputs = tokenizer.prepare(patches)
        ours, theirs = rows_both_ways(tokenizer.merger, inputs, keep)
        codes = [tokenizer.codebook.index(tokenizer.codebook.project(x)) for x in (ours, theirs)]
        changed = int((codes[0] != codes[1]).sum())
        read = relative_difference(*rows_both_ways(reader, inputs, keep))
        written = relative_difference(ours, theirs)
        found.append(Smoothed(int(keep.sum()), written, read, changed))
    return found


@torch.no_grad()
def rows_both_ways(merger: Merger, inputs: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Merged rows `[kept, dim]` of ours, and of the dense form with the published smoothing."""
    mask = keep.to(inputs.dtype)
    dense, _ = merger.masked(inputs, mask, dense=True, smoothing=SMOOTHING)
    return merger(inputs, keep), dense[keep]


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm of theirs."""
    return float((ours - theirs).norm() / theirs.norm())

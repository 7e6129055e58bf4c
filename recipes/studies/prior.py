"""Prior: how much of a picture comes from its tokens, how much from what the decoder knows?

Command   lavit compare recipes/studies/prior.py
Cost      lavit compare recipes/studies/prior.py --plan
Score     docs/results.md

One decoder a seed paints test pictures from four conditions: their true codes, those of another
picture with as many things, their own in another order, and none (the null condition, which a
tenth of its training has). Nothing else differs, so nothing is trained for it and there is no rate
to choose. The reconstructor knows the order of codes; the paper claims nothing of it, and pico's
codes may tell their places themselves, since features have them added (`position_code`).

From the paper: that a picture is decoded from its codes alone (Eq. 5). A reviewer asked what its
FID owes to the diffusion model; here the decoder starts from nothing, not from Stable Diffusion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

import lavit
from lavit.config import TO_READ
from lavit.evaluate.drawing import reconstruct_atoms, reconstruct_error
from lavit.evaluate.exam import Exam
from lavit.evaluate.figures import turned
from lavit.evaluate.study import Arm, Comparison, Study
from lavit.generate.pipeline import Pipeline
from lavit.model import LaVIT


class Painter(Pipeline):
    """A pipeline that changes codes before it paints them."""

    def paint(self, codes: Sequence[Tensor], **how: Any) -> list[Image]:
        """Pictures, as `Pipeline.paint`."""
        return super().paint(self.changed(codes, how), **how)

    def changed(self, codes: Sequence[Tensor], how: dict[str, Any]) -> Sequence[Tensor]:
        """The codes that are painted; `how` may be changed too."""
        return codes


class OfAnother(Painter):
    """Codes of another picture with as many things."""

    def changed(self, codes: Sequence[Tensor], how: dict[str, Any]) -> Sequence[Tensor]:
        """Each picture's in another's place."""
        return turned(codes)


class Permuted(Painter):
    """The picture's own codes in another order."""

    def changed(self, codes: Sequence[Tensor], how: dict[str, Any]) -> Sequence[Tensor]:
        """An order for each picture, drawn from its seed."""
        drawn = (torch.Generator().manual_seed(seed) for seed in how["seeds"])
        pairs = zip(codes, drawn, strict=True)
        return [one[torch.randperm(len(one), generator=generator)] for one, generator in pairs]


class NoCodes(Painter):
    """The null condition: guidance of 0 is what is painted without any."""

    def changed(self, codes: Sequence[Tensor], how: dict[str, Any]) -> Sequence[Tensor]:
        """The same codes, which count for nothing."""
        how["guidance"] = 0.0
        return codes


def conditioned(painter: type[Painter]) -> type[Exam]:
    """An exam whose pictures a painter paints."""

    class Conditioned(Exam):
        def opened(self) -> Pipeline:
            device, dtype = lavit.place()
            how: dict[str, Any] = {"parts": TO_READ, "device": device, "dtype": dtype}
            return painter(LaVIT.from_pretrained(self.folder, **how), safety=False)

    Conditioned.__qualname__ = f"Conditioned {painter.__name__}"
    return Conditioned


FIGURES = {"reconstruct_atoms": 1, "reconstruct_error": -1}  # and what is better
PAINTERS = {"true": Painter, "another": OfAnother, "permuted": Permuted, "none": NoCodes}

STUDY = Study(
    name="prior",
    claim="pictures are decoded from their tokens (Sec. 3.1, Eq. 5; no control is given)",
    at_scale="a decoder trained on hundreds of millions of pictures paints likely pictures "
    "without any token",
    arms={
        name: Arm(tokenizer_alone=True, pixels=True, exam=conditioned(painter))
        for name, painter in PAINTERS.items()
    },
    figures=tuple(FIGURES),
    comparisons=tuple(
        Comparison("true", name, figure, better if name != "permuted" else 0)
        for figure, better in FIGURES.items()
        for name in PAINTERS
        if name != "true"
    ),
    own={"reconstruct_atoms": reconstruct_atoms, "reconstruct_error": reconstruct_error},
)

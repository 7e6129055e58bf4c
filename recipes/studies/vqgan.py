"""VQGAN: codes that give pixels back on a fixed grid, against LaVIT's codes of meaning.

Command   lavit compare recipes/studies/vqgan.py
Cost      lavit compare recipes/studies/vqgan.py --plan
Score     docs/results.md, once it is run whole

The same LM over 100 codes of a picture of the size that LaVIT's decoder paints; it reads them as
codes and writes all of them, painted by VQGAN's own decoder. LaVIT writes a quarter as many and has
a diffusion decoder; it reads features, so one arm of it reads its codes, as VQGAN must, and the
claim of reading is judged between these two. VQGAN's stage 1 has 700 steps of 16 pictures at 1e-3,
about as long as LaVIT's tokenizer and decoder take together; the rates of stage 2 are for each arm
the best of 0.5, 1 and 2 times the preset's, by the likelihood of validation descriptions in seed 0.
lavit.baselines.vqgan says what is taken from the paper, and what differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL.Image import Image, Resampling
from torch import Tensor

import lavit
from lavit.config import TO_READ, VisionConfig
from lavit.data.scenes.render import render
from lavit.data.scenes.world import Scene
from lavit.evaluate.drawing import reconstruct_atoms, reconstruct_error
from lavit.evaluate.exam import Exam
from lavit.evaluate.figures import Figure, mean
from lavit.evaluate.study import Arm, Comparison, Study, in_model, in_training
from lavit.generate.pipeline import Pipeline
from lavit.generate.protocols import protocol_of
from lavit.images import to_image
from lavit.model import LaVIT
from lavit.presets import Preset, pico

READING = ("read_test_exact", "read_pairs_exact", "read_pairs_likelihood")
FIGURES = {
    "tokens_per_picture": 0,
    "reconstruct_atoms": 0,
    "reconstruct_error": 0,
    **dict.fromkeys(READING, 1),
    "write_minimal_pairs": 1,
    "draw_test_atoms": 1,
}


class Folded(Pipeline):
    """A pipeline whose codes give pixels without another decoder."""

    def paint(self, codes: Sequence[Tensor], **how: Any) -> list[Image]:
        """Pictures of codes."""
        with torch.inference_mode():
            patches = self.model.decode(codes)
        tokenizer: Any = self.model.visual_tokenizer
        return [to_image(picture) for picture in tokenizer.fold(patches).clamp(-1, 1)]


class VqganExam(Exam):
    """An exam of a model that paints by itself, and writes every code of the grid."""

    def opened(self) -> Pipeline:
        """With as many codes as there are patches."""
        device, dtype = lavit.place()
        model = LaVIT.from_pretrained(self.folder, parts=TO_READ, device=device, dtype=dtype)
        patches = model.config.vision.patches
        usual = protocol_of("default", patches)
        drawing = replace(usual.drawing, min_tokens=patches, max_tokens=patches)
        return Folded(model, safety=False, protocol=replace(usual, drawing=drawing))

    def picture(self, scene: Scene) -> Image:
        """A scene as training sees it: drawn at the size of the pool, then made smaller."""
        size = self.model.config.vision.image_size
        return render(scene, pico().model.vision.image_size).resize(
            (size, size), Resampling.BICUBIC
        )

    def needs(self, *parts: str) -> None:
        """All but a decoder."""
        super().needs(*(part for part in parts if part != "pixels"))


def tokens_per_picture(exam: Exam) -> Figure:
    """Codes of a test picture."""
    return mean(exam.encoded("test", exam.count)[1].lengths.tolist())


def reads_codes(preset: Preset) -> Preset:
    """LaVIT that reads rows of its codes."""
    return in_model(preset, "language", read_as="codes")


def of_pixels(preset: Preset) -> Preset:
    """VQGAN in place of encoder, tokenizer and decoder, on pictures of the decoder's size."""
    model, small = preset.model, preset.training.tokenizer
    size, grid = model.pixels.size, model.vision.grid
    patch = size // grid
    half, dim = (0.5, 0.5, 0.5), 3 * patch**2
    vision = VisionConfig(source="pixels", image_size=size, grid=grid, dim=dim, mean=half, std=half)
    tokenizer = replace(
        model.visual_tokenizer,
        dim=dim,
        heads=1,
        merger_depth=1,
        reconstructor_depth=1,
        position_code=False,
        standardise=False,
        keep="all",
        rival={"_class_name": "Vqgan"},
    )
    pixels = replace(model.pixels, features_dim=dim)
    preset = replace(
        preset, model=replace(model, vision=vision, visual_tokenizer=tokenizer, pixels=pixels)
    )
    long = {"steps_a": max(1, small.steps_a // 3), "steps_b": 3 * small.steps_b}
    rates = {"learning_rate": 1e-3, "weight_decay": 0.0, "commitment": 0.25, "optimizer": "adamw"}
    preset = in_training(preset, "tokenizer", batch=min(16, small.batch), **rates, **long)
    return in_model(preset, "language", read_as="codes")


STUDY = Study(
    name="vqgan",
    claim="codes of meaning are read and written better than codes of pixels, with fewer of them "
    "(Sec. 2; the paper names Esser's codes without a figure)",
    at_scale="a VQGAN of weeks keeps what is small, which scenes have little of; an LM of billions "
    "learns longer codes",
    arms={
        "LaVIT": Arm(rates=True, pixels=True),
        "LaVIT, codes read": Arm(reads_codes, rates=True),
        "VQGAN": Arm(of_pixels, rates=True, exam=VqganExam),
    },
    figures=tuple(FIGURES),
    comparisons=(
        *(
            Comparison("LaVIT", "VQGAN", figure, better * (figure not in READING))
            for figure, better in FIGURES.items()
        ),
        *(Comparison("LaVIT, codes read", "VQGAN", figure, 1) for figure in READING),
    ),
    rates=(0.5, 1.0, 2.0),
    own={
        "tokens_per_picture": tokens_per_picture,
        "reconstruct_atoms": reconstruct_atoms,
        "reconstruct_error": reconstruct_error,
    },
)

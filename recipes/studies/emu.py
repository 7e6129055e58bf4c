"""Emu: a picture as 32 embeddings that are regressed (Fig. 1b), against LaVIT's codes.

Command   lavit compare recipes/studies/emu.py
Cost      lavit compare recipes/studies/emu.py --plan
Score     docs/results.md, once it is run whole

Same encoder, LM, documents and target tokens (one for each row of a picture, as for each code).
Figures of identity go through what each paints from: features rebuilt from codes, or from rows;
drawings are painted by a decoder of the same size that learnt from those. Emu's squared error has
20 times the weight: its rows have a mean square of 0.05, so that it counts about 1 a row at first.
LaVIT writes with its own guidance; Emu's rows are predicted, not drawn, so that there is nothing to
guide. Each arm's rates: the best of 0.5, 1 and 2 times the preset's, by the likelihood of
validation descriptions in seed 0.
lavit.baselines.emu says what is taken from the paper, and what differs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lavit
from lavit.baselines.emu import Emu, EmuEncoded
from lavit.config import TO_READ
from lavit.evaluate.exam import Exam
from lavit.evaluate.study import Arm, Comparison, Study, in_model
from lavit.generate.pipeline import Pipeline
from lavit.generate.protocols import protocol_of
from lavit.generate.request import Completion
from lavit.presets import Preset
from lavit.visual_tokenizer.layers import Patches

FIGURES = (
    "read_test_exact",
    "read_pairs_exact",
    "read_pairs_likelihood",
    "identity_kept",
    "write_identity",
    "draw_test_atoms",
)
DIGITS = 4  # of rows that are kept
WEIGHT = 20.0  # of the squared error


class EmuExam(Exam):
    """An exam of a model whose pictures are rows."""

    def opened(self) -> Pipeline:
        """Without guidance."""
        device, dtype = lavit.place()
        self.emu = Emu.from_pretrained(self.folder, parts=TO_READ, device=device, dtype=dtype)
        usual = protocol_of("default", self.emu.config.vision.patches)
        protocol = replace(usual, drawing=replace(usual.drawing, guidance=1.0))
        return Pipeline(self.emu, safety=False, protocol=protocol)

    def true_codes(self, split: str) -> list[Any]:
        """Rows of pictures."""
        return self.emu.rows(self.encoded(split, self.count)[0]).tolist()

    def written_codes(self, completion: Completion) -> list[Any]:
        """Rows that were predicted."""
        return [[round(x, DIGITS) for x in one.tolist()] for one in completion.embeddings]

    def rebuilt(self, features: Patches) -> Patches:
        """Features through rows."""
        return self.emu.decode(list(self.emu.rows(features)))


def regresses(preset: Preset) -> Preset:
    """Emu's way in and out, with a former as deep and as wide as LaVIT's merger."""
    tokenizer = preset.model.visual_tokenizer
    sizes = {"patches": tokenizer.patches, "heads": tokenizer.heads, "queries": 32}
    sizes |= {
        "weight": WEIGHT,
        "depth": tokenizer.merger_depth,
        "rebuild_depth": tokenizer.reconstructor_depth,
    }
    return in_model(preset, "language", reader={"_class_name": "EmuReader", **sizes})


STUDY = Study(
    name="emu",
    claim="one objective over discrete tokens beats regressing embeddings, in reading and in "
    "writing (Fig. 1, Tables 1 and 2)",
    at_scale="Emu starts from a trained LM and Stable Diffusion, whose own knowledge mends what "
    "regression blurs",
    arms={
        "LaVIT": Arm(rates=True, pixels=True),
        "Emu": Arm(regresses, rates=True, pixels=True, exam=EmuExam, conditioned=EmuEncoded),
    },
    figures=FIGURES,
    comparisons=tuple(Comparison("LaVIT", "Emu", figure, 1) for figure in FIGURES),
    rates=(0.5, 1.0, 2.0),
)

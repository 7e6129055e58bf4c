"""Targets: what should be predicted at the positions of a picture that is read?

Command   lavit compare recipes/studies/targets.py
Cost      lavit compare recipes/studies/targets.py --plan
Score     docs/results.md, once it is run whole

Reading alone, and every position of a picture is a target (Eq. 6). LaVIT predicts the code of the
next kept patch; rivals regress, at the same positions, its features (as Emu does its embeddings),
its pixels (MAE) or its HOG (MaskFeat), by a squared error of which an answer of 0 would get about 1
of each goal; `none` predicts nothing there, so that its budget of target tokens is of words alone
(the column of equal FLOPs is the fair one for it). Each arm's rates: the best of 0.5, 1 and 2 times
the preset's, by the likelihood of validation descriptions in seed 0. lavit.baselines.regression
says what is taken from the papers.
"""

from __future__ import annotations

from functools import partial

from lavit.config import Mixture
from lavit.evaluate.study import Arm, Comparison, Study, in_model, in_training
from lavit.presets import Preset

FIGURES = ("read_test_exact", "read_pairs_exact", "read_pairs_likelihood")
GOALS = {"features": "features", "pixels (MAE)": "pixels", "HOG (MaskFeat)": "hog"}
WEIGHTS = {"hog": 10.0}  # its entries' squares have a mean of 0.09, those of the others of 1


def reads(preset: Preset, goals: str = "", supervised: bool = True) -> Preset:
    """Reading alone; image positions regress `goals`, or predict codes."""
    reading = {"mixture": Mixture(reading=1.0), "read_share": 1.0}
    preset = in_training(preset, "language", supervise_read_images=supervised, **reading)
    if not goals:
        return preset
    sizes = {"picture": preset.model.vision.image_size, "grid": preset.model.vision.grid}
    weight = WEIGHTS.get(goals, 1.0)
    reader = {"_class_name": "GoalReader", "goals": goals, "weight": weight, **sizes}
    return in_model(preset, "language", reader=reader)


STUDY = Study(
    name="targets",
    claim="predicting the next code beats regressing the next feature by far (Sec. 4.4); codes are "
    "nearer to words than pixels or gradients",
    at_scale="a large LM models images for their own sake; here three layers share their room with "
    "words",
    arms={
        "codes": Arm(reads, rates=True),
        **{name: Arm(partial(reads, goals=kind), rates=True) for name, kind in GOALS.items()},
        "none": Arm(partial(reads, supervised=False), rates=True),
    },
    figures=FIGURES,
    comparisons=tuple(
        Comparison("codes", name, figure, 1 if name != "none" else 0)
        for figure in FIGURES
        for name in (*GOALS, "none")
    ),
    rates=(0.5, 1.0, 2.0),
)

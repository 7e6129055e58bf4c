"""Input: should pictures that are read enter as continuous features or as rows of their codes?

Command   lavit compare recipes/studies/input.py
Cost      lavit compare recipes/studies/input.py --plan
Score     docs/results.md
"""

from __future__ import annotations

from lavit.evaluate.study import Arm, Comparison, Study, in_model

FIGURES = (
    "read_test_exact",
    "read_pairs_exact",
    "read_pairs_likelihood",
    "write_minimal_pairs",
)

STUDY = Study(
    name="input",
    claim="features lose nothing to the codebook and read better (Sec. 3.2; no figures are given)",
    at_scale="a codebook of 16,384 codes that was trained longer loses less than one of 1,024",
    arms={
        "features": Arm(),
        "codes": Arm(lambda preset: in_model(preset, "language", read_as="codes")),
    },
    figures=FIGURES,
    comparisons=tuple(
        Comparison("features", "codes", figure, figure.startswith("read")) for figure in FIGURES
    ),
)

"""Composition: how many pairs of things must training show for the others to be read and drawn?

Command   lavit compare recipes/studies/composition.py
Cost      lavit compare recipes/studies/composition.py --plan
Score     docs/results.md, once it is run whole

Pairs are held out by one hash, so those of a share of 0.1 are held out in every arm: all arms are
tested on the same 500 scenes of them. Every scene of training has at most two kinds of things, and
each object comes as often as every other. What is drawn is judged by what is written.
"""

from __future__ import annotations

from lavit.data.scenes.splits import Rules
from lavit.evaluate.study import Arm, Comparison, Study

SHARES = (0.1, 0.5, 0.9)
FIGURES = ("read_pairs_exact", "read_pairs_likelihood", "write_minimal_pairs")

STUDY = Study(
    name="composition",
    claim="none by the paper; unified models are said to combine what they learnt apart",
    at_scale="more objects and a longer training make pairs of each rarer and the rule clearer",
    arms={f"{share:g} held out": Arm(rules=Rules(24, share, plain=True)) for share in SHARES},
    figures=FIGURES,
    comparisons=tuple(
        Comparison("0.1 held out", f"{share:g} held out", figure)
        for figure in FIGURES
        for share in SHARES[1:]
    ),
    rules=Rules(24, SHARES[0], plain=True),
    count=500,
)

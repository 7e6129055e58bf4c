"""Omni: does drawing help reading, reading drawing, and joint training beat bolting on?

Command   lavit compare recipes/studies/omni.py
Cost      lavit compare recipes/studies/omni.py --plan
Score     docs/results.md

`texts` is the language model that the adapter and one joint arm begin with: the same one, trained
on the texts of scenes without pictures, once a seed. The last three arms are of transfer: pairs of
things are divided in halves by a hash; `read half` reads the one, `draw half` draws the other, and
`both halves` does both, so that what it reads of the second half it learnt by drawing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from lavit.config import Mixture
from lavit.data.scenes.lexicon import names_in
from lavit.evaluate.study import Arm, Comparison, Study, in_model, in_training
from lavit.presets import Preset

FIGURES = ("read_test_exact", "read_pairs_exact", "write_identity")
Row = dict[str, Any]


def learns(preset: Preset, train_lm: bool = True, **shares: float) -> Preset:
    """Kinds of documents in these shares."""
    return in_training(preset, "language", mixture=Mixture(**shares), train_lm=train_lm)


def bolted(preset: Preset) -> Preset:
    """A linear adapter before a frozen LM."""
    reader = {"_class_name": "LinearReader", "patches": preset.model.vision.patches}
    return in_model(learns(preset, False, reading=1.0), "language", reader=reader)


def drawn(row: Row) -> bool:
    """Whether the things of a picture are of the half that is drawn."""
    names = "|".join(sorted(names_in(row["texts"][0])[0]))
    return hashlib.sha256(names.encode()).digest()[0] % 2 == 1


def halves(rows: Iterable[Row]) -> Iterator[Row]:
    """Descriptions of the one half, prompts of the other."""
    for row in rows:
        yield {**row, "texts": []} if drawn(row) else {**row, "prompts": []}


BOTH = {"reading": 3.0, "writing": 1.0}
ARMS = {
    "joint": Arm(partial(learns, **BOTH)),
    "joint from texts": Arm(partial(learns, **BOTH), lm_of="texts"),
    "reading": Arm(partial(learns, reading=1.0)),
    "drawing": Arm(partial(learns, writing=1.0)),
    "texts": Arm(partial(learns, text=1.0), measured=False),
    "adapter": Arm(bolted, lm_of="texts", share=0.5, measured=False),
    "adapter, fine-tuned": Arm(partial(learns, reading=1.0), goes_on="adapter", share=0.5),
    "both halves": Arm(partial(learns, **BOTH), rows=halves),
    "read half": Arm(partial(learns, reading=1.0), rows=halves),
    "draw half": Arm(partial(learns, writing=1.0), rows=halves),
}
READ, WRITTEN = FIGURES[:2], FIGURES[2]

STUDY = Study(
    name="omni",
    claim="one objective over both modalities lets reading and writing help each other (Sec. 1, "
    "3.2; no ablation is given)",
    at_scale="an LM of billions of weights has room for both at once; three layers may not",
    arms=ARMS,
    figures=FIGURES,
    comparisons=(
        *(Comparison("joint", "reading", figure, 1) for figure in READ),
        Comparison("joint", "drawing", WRITTEN, 1),
        *(Comparison("joint from texts", "adapter, fine-tuned", figure, 1) for figure in READ),
        *(Comparison("joint from texts", "joint", figure) for figure in FIGURES),
        *(Comparison("both halves", "read half", figure, 1) for figure in READ),
        Comparison("both halves", "draw half", WRITTEN, 1),
    ),
    seeds=5,
)

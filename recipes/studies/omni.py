"""Omni: does drawing help reading, reading drawing, and joint training beat bolting on?

Command   lavit compare recipes/studies/omni.py
Cost      lavit compare recipes/studies/omni.py --plan
Score     docs/results.md, once it is run whole

`texts` is the language model that the adapter and one joint arm begin with: the same one, trained
on prose (Python's manual) and the texts of scenes without pictures, once a seed. The adapter and
its fine-tuning have rates of their own, each the best of 0.5, 1 and 2 times the preset's by the
likelihood of validation descriptions in seed 0. The last arms are of transfer: pairs of things are
divided in halves by a hash; `read half` reads the one, `draw half` draws the other, and `both
halves` does both, so what it reads of the drawn half (`read_drawn_exact`) it learnt by drawing.
Descriptions are some 60 % of the target tokens of `joint` and `both halves`, so arms that do one
thing alone see more of it; `as much` says those that see as many, by which claims are judged. In
the column of equal FLOPs they see a quarter fewer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pydoc_data.topics import topics
from typing import Any

from lavit.config import Mixture
from lavit.data.scenes.lexicon import names_in
from lavit.evaluate.exam import Exam
from lavit.evaluate.figures import Figure, share
from lavit.evaluate.reading import items_of, read_exact
from lavit.evaluate.study import Arm, Comparison, Study, in_model, in_training
from lavit.presets import Preset

FIGURES = (
    "read_test_exact",
    "read_pairs_exact",
    "read_pairs_likelihood",
    "write_minimal_pairs",
    "read_drawn_exact",
    "read_told_exact",
)
PROSE = 0.1  # documents of it for one of the texts of scenes
Row = dict[str, Any]


def manual() -> Sequence[str]:
    """Topics of Python's manual, as CPython carries it."""
    return [topics[name] for name in sorted(topics)]


def learns(preset: Preset, train_lm: bool = True, **shares: float) -> Preset:
    """Kinds of documents in these shares."""
    return in_training(preset, "language", mixture=Mixture(**shares), train_lm=train_lm)


def bolted(preset: Preset) -> Preset:
    """A linear adapter before a frozen LM."""
    reader = {"_class_name": "LinearReader", "patches": preset.model.vision.patches}
    return in_model(learns(preset, False, reading=1.0), "language", reader=reader)


def drawn(row: Row) -> bool:
    """Whether the things of a picture are of the half that is drawn."""
    return to_draw("|".join(sorted(names_in(row["texts"][0])[0])))


def to_draw(names: str) -> bool:
    """Whether things of these sorted names are of the half that is drawn."""
    return hashlib.sha256(names.encode()).digest()[0] % 2 == 1


def told(rows: Iterable[Row]) -> Iterator[Row]:
    """Whole descriptions as texts: a frozen LM must have seen how they end."""
    for row in rows:
        yield {**row, "prompts": row["texts"]}


def halves(rows: Iterable[Row]) -> Iterator[Row]:
    """Descriptions of the one half, prompts of the other."""
    for row in rows:
        yield {**row, "texts": []} if drawn(row) else {**row, "prompts": []}


def of_half(exam: Exam, wanted: bool) -> Figure:
    """Share of test pictures of one half whose captions are exact."""
    items = items_of(exam, "test")
    whole = read_exact(exam, "test")
    names = ["|".join(sorted(exam.scene("test", item).names)) for item in items]
    hits = [hit for hit, one in zip(whole.items, names, strict=True) if to_draw(one) == wanted]
    return share([bool(hit) for hit in hits], floor=whole.floor)


BOTH = {"reading": 3.0, "writing": 1.0}
LIKE_JOINT = 0.6  # of its target tokens are of descriptions
REST = 1 - LIKE_JOINT
ARMS = {
    "joint": Arm(partial(learns, **BOTH)),
    "joint from texts": Arm(partial(learns, **BOTH), lm_of="texts"),
    "reading": Arm(partial(learns, reading=1.0)),
    "reading, as much": Arm(partial(learns, reading=1.0), share=LIKE_JOINT),
    "drawing": Arm(partial(learns, writing=1.0)),
    "drawing, as much": Arm(partial(learns, writing=1.0), share=REST),
    "texts": Arm(partial(learns, text=1.0), rows=told, texts=PROSE, measured=False),
    "adapter": Arm(bolted, lm_of="texts", share=0.5, rates=True, measured=False),
    "adapter, fine-tuned": Arm(
        partial(learns, reading=1.0), goes_on="adapter", share=0.5, rates=True
    ),
    "both halves": Arm(partial(learns, **BOTH), rows=halves),
    "read half": Arm(partial(learns, reading=1.0), rows=halves),
    "read half, as much": Arm(partial(learns, reading=1.0), rows=halves, share=LIKE_JOINT),
    "draw half": Arm(partial(learns, writing=1.0), rows=halves),
    "draw half, as much": Arm(partial(learns, writing=1.0), rows=halves, share=REST),
}
READ, WRITTEN, HALVES = FIGURES[:3], FIGURES[3], FIGURES[4:]

STUDY = Study(
    name="omni",
    claim="one objective over both modalities lets reading and writing help each other (Sec. 1, "
    "3.2; no ablation is given)",
    at_scale="an LM of billions of weights has room for both at once; three layers may not",
    arms=ARMS,
    figures=FIGURES,
    comparisons=(
        *(Comparison("joint", "reading", figure) for figure in READ),
        *(Comparison("joint", "reading, as much", figure, 1) for figure in READ),
        Comparison("joint", "drawing", WRITTEN),
        Comparison("joint", "drawing, as much", WRITTEN, 1),
        *(Comparison("joint from texts", "adapter, fine-tuned", figure, 1) for figure in READ),
        # whose text tokenizers differ, and so what is likely a token
        *(Comparison("joint from texts", "joint", one) for one in FIGURES if one != READ[2]),
        *(Comparison("both halves", "read half", figure) for figure in HALVES),
        *(Comparison("both halves", "read half, as much", figure, 1) for figure in HALVES),
        Comparison("both halves", "draw half", WRITTEN),
        Comparison("both halves", "draw half, as much", WRITTEN, 1),
    ),
    seeds=5,
    rates=(0.5, 1.0, 2.0),
    own={
        "read_drawn_exact": partial(of_half, wanted=True),
        "read_told_exact": partial(of_half, wanted=False),
    },
    texts=manual,
)

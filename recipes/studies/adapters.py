"""Adapters: LaVIT against the readers of the paper's Fig. 1a, with a frozen and a trained LM.

Command   lavit compare recipes/studies/adapters.py
Cost      lavit compare recipes/studies/adapters.py --plan
Score     docs/results.md, once it is run whole

All arms begin with one language model of the same seed, trained on the texts of scenes without
pictures, and learn to read alone. Each has its own rates: the best of 0.5, 1 and 2 times the
preset's, by the likelihood of validation descriptions in seed 0. The Q-Former is narrower and
shallower than BLIP-2's (12 layers of 768), else as it is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from lavit.config import Mixture
from lavit.evaluate.study import Arm, Comparison, Study, in_model, in_training
from lavit.presets import Preset

Row = dict[str, Any]
READERS: dict[str, dict[str, Any]] = {
    "LaVIT": {},
    "linear": {"_class_name": "LinearReader"},
    "resampler": {"_class_name": "Resampler", "latents": 64, "depth": 6},
    "Q-Former": {
        "_class_name": "QFormer", "queries": 32, "hidden": 224, "depth": 6, "heads": 4, "every": 2,
    },
}  # fmt: skip
FIGURES = ("read_test_exact", "read_pairs_exact", "read_pairs_likelihood")


def texts(preset: Preset) -> Preset:
    """Texts alone, without their pictures."""
    return in_training(preset, "language", mixture=Mixture(text=1.0))


def told(rows: Iterable[Row]) -> Iterator[Row]:
    """Whole descriptions as texts: a frozen LM must have seen how they end."""
    for row in rows:
        yield {**row, "prompts": row["texts"]}


def reads_by(preset: Preset, reader: dict[str, Any], train_lm: bool) -> Preset:
    """Reading alone, by a reader, behind an LM that trains or not."""
    if reader.get("_class_name") == "LinearReader":
        reader = {**reader, "patches": preset.model.vision.patches}
    reading = {"mixture": Mixture(reading=1.0), "train_lm": train_lm}
    return in_model(in_training(preset, "language", **reading), "language", reader=reader)


def arms() -> dict[str, Arm]:
    """Each reader with both kinds of LM, and the LM that they begin with."""
    found = {
        f"{name}, LM {'trained' if train else 'frozen'}": Arm(
            partial(reads_by, reader=reader, train_lm=train), lm_of="texts", rates=True
        )
        for train in (True, False)
        for name, reader in READERS.items()
    }
    return {**found, "texts": Arm(texts, rows=told, measured=False)}


STUDY = Study(
    name="adapters",
    claim="an LM that learns pictures as a language reads them better than one that is given an "
    "adapter's rows (Fig. 1, Table 1)",
    at_scale="an LM of billions of weights that was trained on prose has more to lose and to give "
    "than one of three layers; adapters are trained on hundreds of millions of pairs",
    arms=arms(),
    figures=FIGURES,
    comparisons=tuple(
        Comparison(f"LaVIT, LM {lm}", f"{name}, LM {lm}", figure, 1)
        for figure in FIGURES
        for lm in ("trained", "frozen")
        for name in READERS
        if name != "LaVIT"
    ),
    rates=(0.5, 1.0, 2.0),
)

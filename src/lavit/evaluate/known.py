"""What a model was trained on, if that was scenes: their rules, and words that they do not have."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lavit.config import InputError, read_json
from lavit.data.corpus import origin_of, parse_mixture
from lavit.data.scenes.lexicon import unknown_words
from lavit.data.scenes.splits import Rules

RULES = ("objects", "held_out_pairs", "plain")


def training_of(folder: Path) -> dict[str, Any]:
    """The training that made a model, if its folder says."""
    path = folder / "training.json"
    return read_json(path) if path.is_file() else {}


def scenes_of(folder: Path) -> dict[str, Any] | None:
    """Options of the scenes a model learnt from, by training.json or else its data; or None."""
    said = training_of(folder)
    origin = said.get("origin")
    if origin is None and said.get("data"):
        try:
            origin = origin_of(str(said["data"]))
        except InputError:  # a name that is not there any more
            return None
    scenes = origin.get("scenes") if isinstance(origin, dict) else None
    return scenes if isinstance(scenes, dict) else None


def trained_rules(folder: Path) -> Rules | None:
    """The rules that a model's training kept to; None if it was not, or not only, scenes."""
    scenes = scenes_of(folder)
    if scenes is None or scenes.get("split", "train") != "train":
        return None
    return Rules(**{name: scenes[name] for name in RULES if name in scenes})


def rules_of(
    folder: Path, objects: int | None = None, held_out_pairs: float | None = None,
) -> Rules:  # fmt: skip
    """The rules that are asked for; the rest is as in the model's training, else as nano has it."""
    known = scenes_of(folder) or {}
    asked = {"objects": objects, "held_out_pairs": held_out_pairs}
    known = known | {name: value for name, value in asked.items() if value is not None}
    return Rules(**{name: known[name] for name in RULES if name in known})


def strange_words(folder: Path, texts: Iterable[str]) -> list[str]:
    """Words that the language of scenes lacks, each once; none for a model of other data."""
    if scenes_of(folder) is None:
        return []
    return list(dict.fromkeys(word for text in texts for word in unknown_words(text)))


def is_scenes(data: str) -> bool:
    """Is a source, or one of a mixture, scenes: "scenes", or a data set of `lavit data scenes`?"""
    for name, _ in parse_mixture(data):
        path = Path(name)
        endless = path.name.partition(":")[0] == "scenes" and not path.exists()
        if endless or "scenes" in origin_of(name):
            return True
    return False

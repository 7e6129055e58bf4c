"""What a model was trained on, if that was scenes: their rules, and words that they do not have."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lavit.config import InputError, read_json
from lavit.data.corpus import origin_of
from lavit.data.scenes.lexicon import unknown_words
from lavit.data.scenes.splits import Rules


def scenes_of(folder: Path) -> dict[str, Any] | None:
    """Options of the scenes a model learnt from; None where it learnt from other data.

    They stand in its training.json under "origin", or else beside the data that it names.
    """
    path = folder / "training.json"
    said = read_json(path) if path.is_file() else {}
    origin = said.get("origin")
    if origin is None and said.get("data"):
        try:
            origin = origin_of(str(said["data"]))
        except InputError:  # a name that is not there any more
            return None
    scenes = origin.get("scenes") if isinstance(origin, dict) else None
    return scenes if isinstance(scenes, dict) else None


def rules_of(folder: Path, objects: int | None = None, held_out_pairs: float | None = None) -> Rules:
    """The rules that are asked for; what is not said is as the model's training had it, else as
    nano has it.
    """
    known = scenes_of(folder) or {}
    asked = {"objects": objects, "held_out_pairs": held_out_pairs}
    known |= {name: value for name, value in asked.items() if value is not None}
    return Rules(**{name: known[name] for name in asked if name in known})


def strange_words(folder: Path, texts: Iterable[str]) -> list[str]:
    """Words that the language of scenes lacks, each once; none for a model of other data."""
    if scenes_of(folder) is None:
        return []
    return list(dict.fromkeys(word for text in texts for word in unknown_words(text)))

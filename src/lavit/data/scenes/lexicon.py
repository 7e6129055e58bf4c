"""The words of scenes: nouns with their plurals and synonyms, numbers, adjectives, tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from lavit.data.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    PATTERNS,
    SHAPES,
    Group,
    Size,
    kind_of,
    objects,
)

NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZES: dict[str, Size] = {
    "small": "small", "little": "small", "tiny": "small",
    "big": "big", "large": "big", "huge": "big",
}  # fmt: skip
PATTERN_WORDS = {**{word: word for word in PATTERNS}, "stripy": "striped", "spotted": "dotted"}
TRIMMINGS = {"striped": "stripes", "dotted": "dots"}  # patterns as something that a ground has
SPELLINGS = {"grey": "gray", "colored": "coloured", "color": "colour", "recolor": "recolour"}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PLACES = {
    "above": "above", "over": "above",
    "below": "below", "under": "below", "beneath": "below", "underneath": "below",
}  # fmt: skip
OTHER_WORDS = """
    a an the of on against in with and is are there to left right background nothing it empty
    picture draw paint show me make create please that no stripes dots
    add remove take away replace by move swap exchange places put bigger smaller larger
    instead change into turn colour recolour pattern style flat outlined drawn become
    so number them be should what which how many any more than fewer or where do you
    see this describe short caption everything full together both things thing from
    first second pictures combine now one for delete erase get rid give its yes
"""


@dataclass(frozen=True)
class Noun:
    """A name in a text: of which thing, and whether the word can mean one, or several."""

    name: str
    one: bool
    many: bool


def plural(word: str) -> str:
    """The regular plural of a word or phrase."""
    if " of " in word:
        head, tail = word.split(" of ", 1)
        return f"{plural(head)} of {tail}"
    if word.endswith("fish"):
        return word
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + ("es" if re.search(r"(s|x|z|ch|sh)$", word) else "s")


def noun(name: str, number: int) -> str:
    """The word for so many things of a name."""
    if number == 1:
        return name
    return plural(name) if name in SHAPES else kind_of(name).plural


def are(group: Group) -> str:
    """The verb of a group: is, or are."""
    return "is" if group.number == 1 else "are"


def article(words: str) -> str:
    """Words with "a" or "an" before them."""
    vowel = words[0] in "aeiou" and not words.startswith("unicorn")
    return f"{'an' if vowel or words.startswith('hour') else 'a'} {words}"


@cache
def nouns(count: int | None = None) -> dict[tuple[str, ...], Noun]:
    """All nouns, as tuples of words; `count`: of the first objects of the list alone."""
    found: dict[tuple[str, ...], Noun] = {}
    kinds = objects()[:count]
    names = [(name, name, noun(name, 2)) for name in (*SHAPES, *(kind.name for kind in kinds))]
    synonyms = [(kind.name, word, plural(word)) for kind in kinds for word in kind.synonyms]
    for name, one, many in names + synonyms:
        for words in (one, many):
            meant = Noun(name, words == one, words == many)
            found.setdefault(tuple(words.lower().split()), meant)
    return found


LONGEST = 3  # words of a noun


def _plain(text: str) -> str:
    return text.lower().replace("’", "'")


def split(text: str, *, strictly: bool = True) -> list[str] | None:
    """Words and marks of a text, in lower case; `strictly`: None if something else stands in it."""
    words = re.findall(r"[a-z]+(?:['-][a-z]*)*|\d+|[.,:?!]", _plain(text))
    if strictly and re.sub(r"\s", "", _plain(text)) != "".join(words):
        return None
    return [SPELLINGS.get(word, word) for word in words]


def tokens(words: list[str]) -> list[str | Noun]:
    """Words with the longest nouns put together."""
    table = nouns()
    found: list[str | Noun] = []
    place = 0
    while place < len(words):
        for length in range(LONGEST, 0, -1):
            one = table.get(tuple(words[place : place + length]))
            if one is not None and place + length <= len(words):
                found.append(one)
                place += length
                break
        else:
            found.append(words[place])
            place += 1
    return found


def names_in(text: str) -> tuple[frozenset[str], frozenset[tuple[str, str]]]:
    """Names that stand in a text, and shapes that it names together with a colour.

    Texts outside the language are read too: what is not a name is passed over.
    """
    found = tokens(split(text, strictly=False) or [])
    names = frozenset(token.name for token in found if isinstance(token, Noun))
    coloured = set()
    for place, token in enumerate(found):
        if not isinstance(token, Noun) or token.name not in SHAPES:
            continue
        before = [word for word in found[max(0, place - 2) : place] if word not in SIZES]
        after = [word for word in found[place + 1 : place + 4] if word not in ("is", "are", "be")]
        coloured |= {(token.name, word) for word in before[-1:] if word in COLOURS}
        coloured |= {(token.name, word) for word in after[:1] if word in COLOURS}
    return names, frozenset(coloured)


@cache
def vocabulary(count: int | None = None) -> frozenset[str]:
    """Every word of the language: of descriptions, prompts, questions and edits.

    `count`: the language of a world with no more than these first objects.
    """
    words = {word for key in nouns(count) for word in key}
    words |= {*BACKGROUNDS, *COLOURS, *PATTERN_WORDS, *SIZES, *PLACES, *NUMBERS, *SPELLINGS}
    return frozenset(words.union(OTHER_WORDS.split()))


def unknown_words(text: str, count: int | None = None) -> list[str]:
    """Words of a text that the language (of `count` objects) does not know, each once, in order."""
    words = re.findall(r"[^\s.,:;?!\"()]+", _plain(text))
    known = vocabulary(count) | set("123456789")
    return list(dict.fromkeys(word for word in words if word not in known))

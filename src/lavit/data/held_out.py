"""A share of any user's pictures that training leaves out, so that there is something to measure a
model on.

A source without splits of its own (a folder of pictures, one table, shards that name no other
split) is divided by a hash of each picture's bytes: below 0.05 it is in the split "held_out", else
in "train". So names, order and shards do not matter, more pictures move none, the same files as a
folder, as tars or as a table are divided alike, and of copies of a file none is held out while
another is learnt. Hashed are the length and the first bytes of a file, so that a stream reads no
more of those that it passes over. A source of fewer than 40 pictures is all training; streams are
always divided.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lavit.config import InputError
from lavit.data.look import PICTURES

HELD_OUT = "held_out"
SHARE = 0.05
FEWEST = 40  # pictures of a source that is divided
HEAD = 2**16  # bytes of a picture that are hashed
OTHERS = ("test", "valid", "validation", "val", "dev", HELD_OUT)  # names that tell of splits


def divides(path: Path) -> bool:
    """Has a source on disk no splits of its own?"""
    if path.is_file():
        return True
    if not path.is_dir():
        return False  # a hub name: its own splits
    if lists_splits(path):
        return False
    if (path / "train").is_dir():
        others = [sub for sub in path.iterdir() if sub.is_dir() and sub.name != "train"]
        return not any(file.is_file() for sub in others for file in sub.rglob("*"))
    files = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
    return not any(map(_tells, files))


def _tells(file: Path) -> bool:
    """Does a file's place in its source say that it is of another split? A picture's own name says
    nothing.
    """
    folder = file.parent.name.lower()
    stem = "" if file.suffix.lower() in PICTURES else file.stem.lower()
    words = {folder, *re.split(r"[-._\s]", stem)}
    return not words.isdisjoint(OTHERS) or HELD_OUT in stem


def lists_splits(folder: Path) -> bool:
    """Does a data set's card say which files its splits are?"""
    card = folder / "README.md"
    return card.is_file() and "data_files:" in card.read_text(encoding="utf-8", errors="replace")


def shards_of(shards: Sequence[Path], split: str, folder: Path) -> Sequence[Path]:
    """The shards of a split: those that name it; all of them are train where none does."""
    names = {shard: shard.relative_to(folder).as_posix() for shard in shards}
    named = [shard for shard, name in names.items() if split in name]
    if not named and split != "train":
        raise InputError(f"{str(folder)!r} has no {shards[0].suffix} shard named {split!r}")
    for name in names.values() if named and split == "train" else ():
        if not any(word in name for word in (split, *OTHERS)):
            said = f"{str(folder)!r} has shards named {split!r}, and {name} names no split"
            raise InputError(f"{said}: rename it, or give it a folder of its own")
    return named or shards


def is_held_out(image: Any, folder: Path) -> bool:
    """Does a picture, a cell of `datasets`, hash below the share? Paths are below the folder."""
    digest = hashlib.sha256(_content(image, folder)).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < SHARE


def _content(image: Any, folder: Path) -> bytes:
    """How long a picture's file is, and how it begins; the path of one that cannot be read."""
    if isinstance(image, Mapping):
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if isinstance(image, bytes):
        return b"%d " % len(image) + image[:HEAD]
    try:
        with (folder / str(image)).open("rb") as file:
            return b"%d " % os.fstat(file.fileno()).st_size + file.read(HEAD)
    except (OSError, ValueError):
        return str(image).encode()


def part_of(rows: Any, split: str, image: str, folder: Path, data: str, *, streaming: bool) -> Any:
    """The rows of one split of a source that is divided; few pictures are all training."""
    out = split == HELD_OUT
    if streaming:
        return rows.filter(lambda row: is_held_out(row[image], folder) == out)
    count = len(rows)
    if count >= FEWEST:
        held = [is_held_out(row[image], folder) for row in rows.select_columns([image])]
        if 0 < sum(held) < count:  # copies of one picture are on one side
            return rows.select([number for number, one in enumerate(held) if one == out])
    if not out:
        return rows
    why = f"by chance none of {count} pictures is held out"
    if count < FEWEST:
        few = f"of fewer than {FEWEST} pictures ({count})"
        why = f"{few} none is held out, and all are in the split train"
    raise InputError(f"{data!r} has no split {split!r}: {why}")

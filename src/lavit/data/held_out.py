"""A share of any user's pictures that training leaves out, so that there is something to measure a
model on.

A source without splits of its own (a folder of pictures, one table, shards that name no other
split) is divided by a hash of each record's name: below 0.05 it is in the split "held_out", else in
"train". The name is the picture's path below the source, the key of a WebDataset record, or, for a
picture inside a table, its bytes; so neither order nor shards matter, and more pictures move none.
A source of fewer than 40 pictures is all training; streams are always divided.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavit.config import InputError

HELD_OUT = "held_out"
SHARE = 0.05
FEWEST = 40  # pictures of a source that is divided
OTHERS = ("test", "valid", "validation", "val", "dev", HELD_OUT)  # names that tell of splits


def divides(path: Path) -> bool:
    """Has a source on disk no splits of its own?"""
    if path.is_file():
        return True
    if not path.is_dir():
        return False  # a hub name: its own splits
    card = path / "README.md"
    if card.is_file() and "data_files:" in card.read_text(encoding="utf-8", errors="replace"):
        return False
    folders = [sub for sub in path.iterdir() if sub.is_dir()]
    if (path / "train").is_dir():
        others = [sub for sub in folders if sub.name != "train" and any(file.is_file() for file in sub.rglob("*"))]
        return not others
    stems = {word for file in path.rglob("*") for word in (file.parent.name, *_words(file.stem))}
    return not stems & set(OTHERS)


def _words(stem: str) -> list[str]:
    return stem.replace("-", " ").replace(".", " ").split()


def is_held_out(row: Mapping[str, Any], image: str, folder: Path) -> bool:
    """Does a record's name hash below the share?"""
    digest = hashlib.sha256(_name(row, image, folder)).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < SHARE


def _name(row: Mapping[str, Any], image: str, folder: Path) -> bytes:
    value = row[image]
    if row.get("__key__"):
        return str(row["__key__"]).encode()
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        return hashlib.sha256(value).digest()
    try:
        return (folder.resolve() / str(value)).relative_to(folder.resolve()).as_posix().encode()
    except ValueError:
        return str(value).encode()


def part_of(rows: Any, split: str, *, image: str, folder: Path, data: str, streaming: bool) -> Any:
    """The rows of one split of a source that is divided; few pictures are all training."""
    columns = [name for name in (image, "__key__") if name in rows.column_names]
    if streaming:
        return rows.filter(lambda row: is_held_out(row, image, folder) == (split == HELD_OUT))
    if len(rows) < FEWEST:
        if split == "train":
            return rows
        raise InputError(
            f"{data!r} has no split {split!r}: of fewer than {FEWEST} pictures ({len(rows)}) "
            "none is held out, and all are in the split train"
        )
    held = [is_held_out(row, image, folder) for row in rows.select_columns(columns)]
    if not any(held):
        if split == "train":
            return rows
        raise InputError(f"{data!r} has no split {split!r}: by chance none of {len(rows)} pictures is held out")
    return rows.select([number for number, out in enumerate(held) if out == (split == HELD_OUT)])


def check_split(data: str, split: str) -> None:
    """Raise `InputError` unless a source that is divided has such a split."""
    if split not in ("train", HELD_OUT):
        raise InputError(f"{data!r} has no split {split!r}: it has train and {HELD_OUT}, by hash")

"""Looking at files before a library opens them: what would be passed over or mistaken is said.

A shard that is cut short and a broken line of JSON, of which libraries say less; pictures that a
folder's metadata does not name, which `datasets` passes over; links to pictures, whose table would
else be one of texts.
"""

from __future__ import annotations

import csv
import logging
import os
from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lavit.config import InputError
from lavit.data.lines import json_lines

log = logging.getLogger(__name__)
PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
ENDS = {".tar": bytes(1024), ".parquet": b"PAR1"}  # of whole shards
LINKS = ("url", "image_url", "img_url", "image_link", "picture_url")
SAMPLE = 32  # rows whose links are looked at


def look_at(path: Path, streaming: bool) -> None:
    """Name a line that is broken, and a file that is empty or cut short."""
    kinds = ("metadata.jsonl", "metadata.csv", *(f"*{suffix}" for suffix in ENDS))
    files = [path] if path.is_file() else [file for kind in kinds for file in path.rglob(kind)]
    for file in sorted(files):
        if file.stat().st_size < 2**12 and not file.read_bytes().strip():
            raise InputError(f"{file} is empty: it names no records")
        if path.is_file() and path.suffix.lower() == ".parquet" and not _rows_of(path):
            raise InputError(f"{path} is empty: it has no rows")
        if end := ENDS.get(file.suffix.lower()):
            with file.open("rb") as shard:
                shard.seek(-min(len(end), file.stat().st_size), os.SEEK_END)
                if shard.read() != end:
                    kind = file.suffix.lower()[1:]
                    raise InputError(f"{file} is cut short, or no {kind}: its end is missing")
        elif file.suffix.lower() == ".jsonl" and not streaming:
            deque(json_lines(file), maxlen=0)


def _rows_of(table: Path) -> int:
    """Of a parquet file; one that cannot be read is named later, so it counts as one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(table).num_rows)
    except (pa.ArrowException, OSError):
        return 1


@lru_cache(maxsize=1000)  # once, although each split and stage opens its source
def say_unnamed(folder: Path) -> None:
    """Count and name the pictures of a folder that its metadata files, if any, do not name."""
    tables = [file for kind in ("jsonl", "csv") for file in folder.rglob(f"metadata.{kind}")]
    named = {os.path.normpath(table.parent / name) for table in tables for name in _names(table)}
    if not named:
        return
    talks = folder / "conversations.jsonl"  # has pictures of its own
    said = talks.read_text(encoding="utf-8", errors="replace") if talks.is_file() else ""
    files = (file for file in folder.rglob("*") if file.suffix.lower() in PICTURES)
    rest = sorted(str(file) for file in files if os.path.normpath(file) not in named)
    rest = [file for file in rest if os.path.relpath(file, folder) not in said]
    if rest:
        first = ", ".join(rest[:3]) + (", ..." if len(rest) > 3 else "")
        words = "left out %d pictures of %s that its %s does not name: %s"
        log.warning(words, len(rest), folder, tables[0].name, first)


def _names(table: Path) -> Iterator[str]:
    """Of the files that a metadata file names."""
    with table.open(encoding="utf-8", errors="replace", newline="") as file:
        rows = (row for _, row in json_lines(table)) if table.suffix == ".jsonl" else None
        for row in rows or csv.DictReader(file):
            for key, value in row.items():
                if str(key).endswith(("file_name", "file_names")):
                    yield from map(str, value if isinstance(value, list) else [value])


def link_column(rows: Any) -> str | None:
    """The column of a table that holds links to pictures; None where there is none.

    A column "url" does if most of its links end as pictures do, or if sizes stand beside it:
    tables of prose name the pages that it is from.
    """
    names = {name.lower(): name for name in rows.column_names}
    column = next((names[one] for one in LINKS if one in names), None)
    if column is None or column.lower() != "url" or names.keys() >= {"width", "height"}:
        return column
    links = [str(row[column]) for row in rows.take(SAMPLE) if row[column]]
    ends = [os.path.splitext(urlsplit(link).path)[1].lower() in PICTURES for link in links]
    return column if sum(ends) > len(links) / 2 else None

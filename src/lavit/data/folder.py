"""A data folder that a builder makes: written whole beside its place and moved there, or not at all.

A mark, a file that the builder writes, tells its own folders from others: an earlier one is replaced, any other is left alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lavit.config import InputError


def check_place(out: Path, mark: str, what: str) -> None:
    """Raise `InputError` unless `out` is new, empty, or holds `what`, which is a folder with the file `mark`."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{str(out)!r} is a file: give a folder for {what}")
    if out.is_dir() and any(out.iterdir()) and not (out / mark).exists():
        raise InputError(f"{str(out)!r} is not empty and holds no {what}: give a new folder")


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `out` when all went well; `InputError` where it cannot be written."""
    partial = out.with_name(out.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        yield partial
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    except OSError as error:
        raise InputError(f"{str(out)!r} cannot be written: {error.strerror or error}") from error

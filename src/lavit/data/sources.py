"""Pictures with texts from files, folders and the hub, read through Hugging Face `datasets`.

A source is a folder of pictures (`imagefolder`, splits by its README.md or sub-folders, columns by
metadata.jsonl), a .jsonl/.json/.csv/.parquet file with an image column, WebDataset .tar shards (one
file or a folder of them), or the name of a data set on the hub; without pictures, a .txt file, a
folder of them, or a table with a text column is a source of text. Pictures stay encoded until
asked for, so a broken one never ends an iteration: `readable` sorts such records out and names
them, `check` reports on a whole source.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from lavit.config import InputError, require
from lavit.data.held_out import HELD_OUT, OTHERS, divides, lists_splits, part_of, shards_of
from lavit.data.look import PICTURES, link_column, look_at, say_unnamed
from lavit.data.text import Texts, text_files
from lavit.files import naming
from lavit.images import open_image

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "file_name", "image_path", "path")
TEXT_COLUMNS = ("text", "caption", "captions", "name", "txt", "texts", "prompt", "sentences")
PROSE_COLUMNS = ("content", "document", "body")  # of tables without pictures
BUILDERS = {
    ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".tar": "webdataset",
}  # fmt: skip
LICENCE_WORDS = ("license", "licence", "attribution", "copying", "notice")


@dataclass(frozen=True)
class Record:
    """One picture, still encoded, with its texts and all other columns."""

    image: str | bytes  # a path, or the encoded file
    texts: tuple[str, ...]
    name: str  # where it came from, for messages
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of its file; 0 for one that is not there."""
        if not isinstance(self.image, str):
            return len(self.image)
        return os.stat(self.image).st_size if os.path.isfile(self.image) else 0

    def open(self) -> Image.Image:
        """The picture as RGB; a broken or absent one raises `InputError` naming the record."""
        if self.image == b"":
            raise InputError(f"{self.name}: it holds no picture")
        try:
            return open_image(self.image)
        except InputError as error:
            if isinstance(self.image, bytes):
                raise InputError(f"{self.name}: {error}") from error
            raise


@dataclass(frozen=True, eq=False)
class Streamed:
    """A source that is read as it comes: rows of `datasets`, pictures not decoded."""

    rows: Any
    image: str | None  # the column of pictures; None: texts alone
    text: str | None
    folder: Path  # of pictures that are paths
    name: str
    endless: bool = False  # records are drawn at random, without end

    @property
    def of_files(self) -> bool:
        """Are its pictures files of a folder? Then one that is passed over is not read."""
        return getattr(self.rows.info, "builder_name", None) == "imagefolder"

    def record(self, row: Mapping[str, Any], place: object) -> Record:
        """A row as a record, of texts alone without a picture; `place` names what has no path."""
        cells = dict(row)
        found = None if self.image is None else cells.pop(self.image, None)
        image, name = _encoded(found, self.folder, f"{self.name}[{place}]")
        with naming(f"{self.name}, record {place}"):
            texts = texts_of(cells.get(self.text)) if self.text else ()
        return Record(image, texts, name, cells)


class Records(Streamed, Sequence[Record]):
    """A map-style source: `len`, index, iterate; rows are read from disk when asked for."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]  # no slices
        if not -len(self) <= index < len(self):  # iteration ends by IndexError
            raise IndexError(index)
        return self.record(self.rows[index], index)


def load_records(data: str | Path, split: str = "train", *, whole: bool = False) -> Records:
    """Open one split of a source of pictures, as `open_source` does.

    A missing or empty source, an unknown split and a source without pictures raise `InputError`.
    """
    found = open_source(data, split, whole=whole)
    if isinstance(found, Texts):
        raise InputError(f"{str(data)!r} holds no pictures, only texts")
    return found


def open_source(
    data: str | Path,
    split: str = "train",
    *,
    whole: bool = False,
) -> Records | Texts:
    """Open one split of a source; where there are no pictures, its texts.

    Columns are found by name. A source without splits of its own has "train" and "held_out"
    (data/held_out.py); `whole`: both, as "train".
    """
    if _is_text(Path(data)):
        return text_files(Path(data))
    rows, image, text = _open(data, split, whole=whole)
    if image is None:
        return Texts(rows, column=text, name=str(data))
    return Records(rows, image, text, _folder(data), str(data))


def stream_source(data: str | Path, split: str = "train") -> Streamed:
    """The same as a stream: tars, tables and hub names, whatever their size.

    "scenes", or "scenes:SEED", are scenes without end (data/scenes).
    """
    kind, _, seed = str(data).partition(":")
    if kind == "scenes" and (not seed or seed.isdigit()) and not Path(data).exists():
        require("datasets", extra="train")
        from lavit.data.scenes.dataset import stream_rows

        rows = stream_rows(int(seed or 0), split=split)
        return Streamed(rows, "image", "texts", Path(), str(data), endless=True)
    return Streamed(*_open(data, split, streaming=True), _folder(data), str(data))


def _folder(data: str | Path) -> Path:
    path = Path(data)
    return path.parent if path.is_file() else path


def _open(
    data: str | Path,
    split: str,
    *,
    whole: bool = False,
    streaming: bool = False,
) -> tuple[Any, str | None, str | None]:
    """Rows of a split whose pictures stay encoded, the column of pictures (None: texts alone) and
    that of texts.
    """
    datasets = require("datasets", extra="train")
    name, divided = str(data), divides(Path(data))
    if divided and split not in ("train", HELD_OUT):
        raise InputError(f"{name!r} has no split {split!r}: it has train and {HELD_OUT}, by hash")
    rows = _load(datasets, data, "train" if divided else split, streaming)
    if not streaming and len(rows) == 0:
        raise InputError(f"{name!r} is empty: split {split!r} holds no records")
    if rows.features is None:
        try:
            rows = rows._resolve_features()
        except Exception as error:  # of whatever reads the first rows
            raise InputError(f"{name!r} cannot be opened: {_why(error)}") from error
    names = rows.column_names
    image = next((one for one in IMAGE_COLUMNS if one in names), None)
    if image is not None and not _shows(rows, image):
        image = None  # a path of something else
    words = TEXT_COLUMNS if image else (*TEXT_COLUMNS, *PROSE_COLUMNS)
    text = next((one for one in words if one in names), None)
    if image is None and (links := link_column(rows)):
        first = f"{name!r} holds links to pictures ({links}): download them, img2dataset makes tars"
        raise InputError(f"{first}; to train on its texts alone, leave that column out")
    if image is None and text is None:
        lacks = f"{name!r} has no picture column among {', '.join(names)}"
        raise InputError(f"{lacks}: call that column image")
    if image is None:
        if divided and split != "train" and not streaming:
            raise InputError(f"{name!r} holds texts alone and has no split {split!r}")
        return rows, None, text
    if isinstance(rows.features[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    if divided and not whole:
        rows = part_of(rows, split, image, _folder(data), name, streaming=streaming)
    return rows, image, text


def _is_text(path: Path) -> bool:
    if path.is_file():
        return path.suffix.lower() == ".txt"
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else []
    return bool(files) and all(file.suffix.lower() == ".txt" for file in files)


def _shows(rows: Any, column: str) -> bool:
    """Does a column hold pictures? Encoded ones, or paths that end as pictures do."""
    feature = rows.features[column]
    if getattr(feature, "dtype", None) not in ("string", "large_string"):
        return True
    first = next((row[column] for row in rows.take(8) if row[column]), "")
    return column == "image" or Path(str(first)).suffix.lower() in PICTURES


def readable(records: Iterable[Record]) -> tuple[list[Record], list[tuple[str, str]]]:
    """Decode every picture once: the records that open, and (name, reason) of those that do not."""
    found = list(tried(records))
    good = [record for record, size in found if not isinstance(size, str)]
    return good, [(record.name, why) for record, why in found if isinstance(why, str)]


def tried(records: Iterable[Record]) -> Iterator[tuple[Record, tuple[int, int] | str]]:
    """Each record with its picture's size, or why it does not open."""
    for record in records:
        try:
            yield record, record.open().size
        except InputError as error:
            yield record, str(error)


def _load(datasets: Any, data: str | Path, split: str, streaming: bool) -> Any:
    """A `datasets.Dataset`, or `IterableDataset`; what the library raises becomes one line."""
    from lavit.data.tars import load_dataset  # which imports `datasets`

    path, name, cache = Path(data), str(data), None
    if path.exists() and not streaming:
        cache = Path(datasets.config.HF_DATASETS_CACHE) / f"lavit-{_fingerprint(path)}"
    where: dict[str, Any] = {
        "cache_dir": None if cache is None else str(cache),
        "streaming": streaming,
    }
    if not (cache and cache.exists()):
        look_at(path, streaming)
    try:
        if path.is_file():
            builder, files = BUILDERS.get(path.suffix.lower()), {split: str(path)}
            if builder is None:
                kinds = ", ".join(BUILDERS)
                raise InputError(f"{name!r} is not a known kind of data file: {kinds}")
            return load_dataset(builder, data_files=files, split=split, **where)
        if path.is_dir():
            return _load_folder(load_dataset, path, split, where)
        named = path.suffix.lower() in (*BUILDERS, ".txt")  # a hub name ends otherwise
        if named or isinstance(data, Path) or name.count("/") > 1 or name.startswith((".", "~")):
            raise InputError(f"{name!r} does not exist: give a folder, a file or a hub name")
        return load_dataset(name, split=split, **where)
    except InputError:
        raise
    except Exception as error:  # datasets has no common error class
        absent = "" if path.exists() else " is not a file or folder here, and as a name on the hub"
        opened = f"{name!r}{absent}, split {split!r}, cannot be opened"
        raise InputError(f"{opened}: {_why(error)}") from error


def _why(error: Exception) -> str:
    """A line of what `datasets` says, and of what made it say so."""
    cause = error.__cause__ or error.__context__
    lines = (str(error) or "it has no records").splitlines()
    return f"{lines[0]}{f' ({str(cause).splitlines()[0]})' if cause and str(cause) else ''}"


def _fingerprint(path: Path) -> str:
    """Of names, sizes and times of all files: changed data never comes from the old cache."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    found = [(str(file.resolve()), file.stat()) for file in files if file.is_file()]
    stats = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


def _load_folder(load_dataset: Any, path: Path, split: str, where: Mapping[str, Any]) -> Any:
    """By README.md if it lists splits; tar or parquet shards; else pictures, in SPLIT/ or not."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    if not files:
        raise InputError(f"{str(path)!r} is empty: no pictures, no shards, no tables")
    if lists_splits(path):
        return load_dataset(str(path), split=split, **where)
    pictured = not PICTURES.isdisjoint(file.suffix.lower() for file in files)
    for suffix in (".tar", ".parquet"):
        shards = [file for file in files if file.suffix.lower() == suffix]
        if pictured and any(shard.stem != "metadata" for shard in shards):
            both = f"{str(path)!r} holds pictures and {suffix} shards"
            raise InputError(f"{both}, of which one would be ignored: give each its own folder")
        if shards and not pictured:
            chosen = {split: [str(file) for file in shards_of(shards, split, path)]}
            return load_dataset(BUILDERS[suffix], data_files=chosen, split=split, **where)
    if not pictured:
        raise InputError(f"{str(path)!r} holds no pictures and no .tar or .parquet shards")
    inside = (path / split).is_dir()
    others = sorted(sub.name for sub in path.iterdir() if sub.is_dir())
    if not inside and split != "train":
        found = ", ".join(others) or "none"
        raise InputError(f"{str(path)!r} has no split {split!r}: its sub-folders are {found}")
    if not inside and (named := [name for name in others if name.lower() in OTHERS]):
        said = f"{str(path)!r} has {named[0]}/, and no train/"
        raise InputError(f"{said}: put what is to be learnt into train/")
    folder = (path / split if inside else path).resolve()
    say_unnamed(folder)
    pattern = f"{folder}/**"
    return load_dataset("imagefolder", data_files={split: pattern}, split=split, **where)


def _encoded(value: Any, folder: Path, name: str) -> tuple[str | bytes, str]:
    """(path or bytes, name) of a cell: datasets' {"bytes", "path"}, plain bytes, or a path."""
    if isinstance(value, Mapping):
        place = value.get("path") or name
        if value.get("bytes") is not None:
            return value["bytes"], f"{name} {place}" if place != name else name
        value = value.get("path")
    if isinstance(value, bytes):
        return value, name
    if not value or not isinstance(value, str):
        return b"", name
    path = folder / str(value)  # an absolute path stays as it is
    return str(path), str(path)


def texts_of(value: Any) -> tuple[str, ...]:
    """Texts of a cell: a text, or a list of them; empty ones are none."""
    items = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(item, Mapping | list | tuple) for item in items):
        raise InputError(f"a text is {str(value)[:60]!r}: give a text, or a list of texts")
    return tuple(str(item).strip() for item in items if item is not None and str(item).strip())


def below(name: str, data: str | Path) -> str:
    """A record's name below its source, so that a source may move."""
    path = Path(os.path.abspath(name))  # a link among the pictures keeps its place
    for folder in (Path(data).absolute(), Path(data).resolve()):
        if path.is_relative_to(folder):
            return path.relative_to(folder).as_posix()
    return name.removeprefix(str(data))


def licence_files(folder: Path) -> tuple[str, ...]:
    """Names of the files of a folder that state a licence."""
    named = (file.name for file in folder.iterdir()) if folder.is_dir() else ()
    return tuple(sorted(n for n in named if n.lower().startswith(LICENCE_WORDS)))

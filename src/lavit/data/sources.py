"""Pictures with texts from wherever they lie, read through Hugging Face `datasets`; nothing decoded
until asked.

A source is a folder of pictures (`imagefolder`, splits by its README.md or sub-folders, columns by
metadata.jsonl), a .jsonl/.json/.csv/.parquet file with an image column, WebDataset .tar shards (one
file or a folder of them), or the name of a data set on the hub; without pictures, a .txt file, a folder
of them, or a table with a text column is a source of text. Pictures are kept encoded, so that
a broken one never ends an iteration: `readable` sorts such records out and names them, `check`
reports on a whole source.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from lavit.config import InputError, require
from lavit.data.held_out import check_split, divides, part_of
from lavit.data.text import Texts, text_files
from lavit.images import open_image

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "file_name", "image_path", "path")
TEXT_COLUMNS = ("text", "caption", "captions", "name", "txt", "texts", "prompt", "sentences")
PROSE_COLUMNS = ("content", "document", "body")  # of tables without pictures
BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".tar": "webdataset",
}
PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
LICENCE_WORDS = ("license", "licence", "attribution", "copying", "notice")


@dataclass(frozen=True)
class Record:
    """One picture, still encoded, with its texts and all other columns."""

    image: str | bytes  # a path, or the encoded file
    texts: tuple[str, ...]
    name: str  # where it came from, for messages
    columns: Mapping[str, Any] = field(default_factory=dict)

    def open(self) -> Image.Image:
        """The picture as RGB; a broken or absent one raises `InputError` naming the record."""
        try:
            return open_image(self.image)
        except InputError as error:
            if isinstance(self.image, bytes):
                raise InputError(f"{self.name}: {error}") from error
            raise


class Pictures(Sequence[Record]):
    """A map-style source: `len`, index, iterate; rows are read from disk when asked for."""

    def __init__(self, rows: Any, *, image: str, text: str | None, folder: Path, name: str) -> None:
        """`rows` is a `datasets.Dataset` whose image column is not decoded; paths are below
        `folder`.
        """
        self.rows, self.image, self.text = rows, image, text
        self.folder, self.name = folder, name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        if not -len(self) <= index < len(self):  # iteration ends by IndexError
            raise IndexError(index)
        return _record(self.rows[index], self.image, self.text, self.folder, f"{self.name}[{index}]")


@dataclass(frozen=True)
class Streamed:
    """A source of which nothing is read before it is asked for: a `datasets.IterableDataset` and its columns."""

    rows: Any
    image: str | None  # None: texts alone
    text: str | None
    folder: Path
    name: str

    def record(self, row: Mapping[str, Any]) -> Record:
        """A row as a record; one of texts alone has no picture."""
        name = f"{self.name}[{row.get('__key__', '')}]"
        if self.image is None:
            return Record(image=b"", texts=_texts(row[self.text]), name=name, columns=row)
        return _record(row, self.image, self.text, self.folder, name)


@dataclass(frozen=True)
class Report:
    """What `check` found in a source."""

    records: int
    broken: tuple[tuple[str, str], ...]  # (record, reason)
    without_text: int
    texts: int
    characters: tuple[int, float, int]  # shortest, mean and longest text
    sizes: Mapping[str, int]  # "width x height" -> pictures
    columns: tuple[str, ...]
    licences: Mapping[str, int]  # value of a licence column -> records
    licence_files: tuple[str, ...]


def load_records(
    data: str | Path,
    split: str = "train",
    *,
    image_column: str | None = None,
    text_column: str | None = None,
    cache: Path | None = None,
    whole: bool = False,
) -> Pictures:
    """Open one split of a source; columns are found by name unless given, `cache` is where
    `datasets` writes, `whole` takes a source without splits of its own whole.

    A missing or empty source, an unknown split and a source without pictures raise `InputError`.
    """
    columns = {"image_column": image_column, "text_column": text_column}
    found = open_source(data, split, cache=cache, whole=whole, **columns)
    if isinstance(found, Texts):
        raise InputError(f"{str(data)!r} holds no pictures, only texts")
    return found


def open_source(
    data: str | Path,
    split: str = "train",
    *,
    image_column: str | None = None,
    text_column: str | None = None,
    cache: Path | None = None,
    whole: bool = False,
) -> Pictures | Texts:
    """Open one split of a source as `load_records` does; where there are no pictures, its texts.

    A source without splits of its own has "train" and "held_out" (data/held_out.py); `whole`: both together, as "train".
    """
    path = Path(data)
    if _is_text(path):
        return text_files(path)
    datasets = require("datasets", extra="train")
    rows, divided = _load_split(datasets, data, split, cache)
    if len(rows) == 0:
        raise InputError(f"{str(data)!r} is empty: split {split!r} holds no records")
    rows, image, text = _columns(datasets, rows, data, image_column, text_column)
    if image is None:
        if divided and split != "train":
            raise InputError(f"{str(data)!r} holds texts alone and has no split {split!r}")
        return Texts(rows, column=text, name=str(data))
    if divided and not whole:
        rows = part_of(rows, split, image=image, folder=_folder(path), data=str(data), streaming=False)
    return Pictures(rows, image=image, text=text, folder=_folder(path), name=str(data))


def stream_source(data: str | Path, split: str = "train") -> Streamed:
    """The same as a stream: tars, tables and hub names, whatever their size.

    "scenes", or "scenes:SEED", are scenes without end (data/scenes).
    """
    datasets = require("datasets", extra="train")
    kind, _, seed = str(data).partition(":")
    if kind == "scenes" and (not seed or seed.isdigit()) and not Path(data).exists():
        from lavit.data.scenes.dataset import stream_rows

        rows = stream_rows(int(seed or 0), split=split)
        return Streamed(rows, "image", "texts", Path(), str(data))
    rows, divided = _load_split(datasets, data, split, None, streaming=True)
    rows, image, text = _columns(datasets, rows, data, None, None)
    folder = _folder(Path(data))
    if divided and image is not None:
        rows = part_of(rows, split, image=image, folder=folder, data=str(data), streaming=True)
    return Streamed(rows, image, text, folder, str(data))


def _load_split(
    datasets: Any, data: str | Path, split: str, cache: Path | None, *, streaming: bool = False
) -> tuple[Any, bool]:
    """Rows of a split, or of all of a source that has none of its own, and whether it has none."""
    divided = divides(Path(data))
    if divided:
        check_split(str(data), split)
    return _load(datasets, data, "train" if divided else split, cache, streaming=streaming), divided


def _folder(path: Path) -> Path:
    return path.parent if path.is_file() else path


def _columns(
    datasets: Any, rows: Any, data: str | Path, image_column: str | None, text_column: str | None
) -> tuple[Any, str | None, str | None]:
    """Rows whose pictures stay encoded, the column of pictures (None: texts alone) and that of texts."""
    if rows.features is None:
        rows = rows._resolve_features()
    image = _column(rows.column_names, image_column, IMAGE_COLUMNS, data)
    if image is not None and image_column is None and not _shows(rows, image):
        image = None  # a path of something else
    text = _column(rows.column_names, text_column, TEXT_COLUMNS if image else (*TEXT_COLUMNS, *PROSE_COLUMNS), data)
    if image is None and text is None:
        raise InputError(
            f"{str(data)!r} has no picture column among {', '.join(rows.column_names)}: "
            f"name it image, or give image_column"
        )
    if image is not None and isinstance(rows.features[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))
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
    good, bad = [], []
    for record, reason in _tried(records):
        if isinstance(reason, str):
            bad.append((record.name, reason))
        else:
            good.append(record)
    return good, bad


def check(data: str | Path, split: str = "train", **columns: Any) -> Report:
    """Read all of a split and report on it, held-out records too; keyword arguments as `load_records`."""
    records = load_records(data, split, whole=split == "train", **columns)
    sizes: Counter[str] = Counter()
    licences: Counter[str] = Counter()
    lengths: list[int] = []
    broken, without_text = [], 0
    for record, opened in _tried(records):
        if isinstance(opened, str):
            broken.append((record.name, opened))
        else:
            sizes[f"{opened[0]}x{opened[1]}"] += 1
        without_text += not record.texts
        lengths += [len(text) for text in record.texts]
        for name, value in record.columns.items():
            if name.lower() in ("license", "licence"):
                licences[str(value)] += 1
    count = max(len(lengths), 1)
    return Report(
        records=len(records),
        broken=tuple(broken),
        without_text=without_text,
        texts=len(lengths),
        characters=(min(lengths, default=0), sum(lengths) / count, max(lengths, default=0)),
        sizes=dict(sizes.most_common()),
        columns=tuple(records.rows.column_names),
        licences=dict(licences.most_common()),
        licence_files=licence_files(records.folder),
    )


def _tried(records: Iterable[Record]) -> Iterator[tuple[Record, tuple[int, int] | str]]:
    for record in records:
        try:
            yield record, record.open().size
        except InputError as error:
            yield record, str(error)


def _load(datasets: Any, data: str | Path, split: str, cache: Path | None, *, streaming: bool = False) -> Any:
    """A `datasets.Dataset`, or `IterableDataset` if `streaming`; whatever the library raises on bad data becomes one line."""
    path = Path(data)
    if cache is None and path.exists() and not streaming:
        cache = Path(datasets.config.HF_DATASETS_CACHE) / f"lavit-{_fingerprint(path)}"
    where = {"cache_dir": None if cache is None else str(cache), "streaming": streaming}
    try:
        if path.is_file():
            builder = BUILDERS.get(path.suffix.lower())
            if builder is None:
                kinds = ", ".join(BUILDERS)
                raise InputError(f"{str(data)!r} is no data file that is known here: {kinds}")
            return datasets.load_dataset(builder, data_files={split: str(path)}, split=split, **where)
        if path.is_dir():
            return _load_folder(datasets, path, split, where)
        named = path.suffix.lower() in (*BUILDERS, ".txt")  # a hub name ends otherwise
        if named or isinstance(data, Path) or str(data).count("/") > 1 or str(data).startswith((".", "~")):
            raise InputError(f"{str(data)!r} does not exist: give a folder, a file or a hub name")
        return datasets.load_dataset(str(data), split=split, **where)
    except InputError:
        raise
    except Exception as error:  # datasets has no common error class
        lines = str(error).splitlines() or [type(error).__name__]
        cause = error.__cause__ or error.__context__
        why = f"{lines[0]}{f' ({str(cause).splitlines()[0]})' if cause and str(cause) else ''}"
        raise InputError(f"{str(data)!r}, split {split!r}, cannot be opened: {why}") from error


def _fingerprint(path: Path) -> str:
    """Of names, sizes and times of all files: a folder that was made anew is never served from the old one's cache."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return hashlib.sha256(repr(stats).encode()).hexdigest()[:16]


def _load_folder(datasets: Any, path: Path, split: str, where: Mapping[str, Any]) -> Any:
    """By README.md if it lists splits; tar or parquet shards; else pictures, in SPLIT/ or all in
    one.
    """
    files = sorted(file for file in path.rglob("*") if file.is_file())
    if not files:
        raise InputError(f"{str(path)!r} is empty: no pictures, no shards, no tables")
    card = path / "README.md"
    if card.is_file() and "data_files:" in card.read_text(encoding="utf-8", errors="replace"):
        return datasets.load_dataset(str(path), split=split, **where)
    inside = path / split if (path / split).is_dir() else None
    kinds = Counter(file.suffix.lower() for file in files)
    for suffix in (".tar", ".parquet"):
        if kinds[suffix] and not any(kinds[picture] for picture in PICTURES):
            shards = [str(file) for file in files if file.suffix.lower() == suffix]
            named = [shard for shard in shards if split in Path(shard).relative_to(path).as_posix()]
            if not named and split != "train":
                raise InputError(f"{str(path)!r} has no {suffix} shard named {split!r}")
            chosen = {split: named or shards}
            return datasets.load_dataset(BUILDERS[suffix], data_files=chosen, split=split, **where)
    if not any(kinds[picture] for picture in PICTURES):
        raise InputError(f"{str(path)!r} holds no pictures and no .tar or .parquet shards")
    if inside is None and split != "train":
        found = ", ".join(sorted(sub.name for sub in path.iterdir() if sub.is_dir())) or "none"
        raise InputError(f"{str(path)!r} has no split {split!r}: its sub-folders are {found}")
    pattern = f"{(inside or path).resolve()}/**"
    return datasets.load_dataset("imagefolder", data_files={split: pattern}, split=split, **where)


def _column(names: Sequence[str], given: str | None, known: Sequence[str], data: str | Path) -> str | None:
    if given is not None and given not in names:
        raise InputError(f"{str(data)!r} has no column {given!r}: it has {', '.join(names)}")
    return given or next((name for name in known if name in names), None)


def _record(cells: Mapping[str, Any], image: str, text: str | None, folder: Path, name: str) -> Record:
    """A row as a record; `name` is for rows whose picture has no path."""
    row = dict(cells)
    encoded, name = _encoded(row.pop(image), folder, name)
    return Record(image=encoded, texts=_texts(row.get(text)) if text else (), name=name, columns=row)


def _encoded(value: Any, folder: Path, name: str) -> tuple[str | bytes, str]:
    """(path or bytes, name) of a cell: datasets' {"bytes", "path"}, plain bytes, or a path."""
    if isinstance(value, Mapping):
        place = value.get("path") or name
        if value.get("bytes") is not None:
            return value["bytes"], f"{name} {place}" if place != name else name
        value = value.get("path")
    if isinstance(value, bytes):
        return value, name
    if not value:
        return b"", name
    path = folder / str(value)  # an absolute path stays as it is
    return str(path), str(path)


def _texts(value: Any) -> tuple[str, ...]:
    items = value if isinstance(value, list | tuple) else [value]
    return tuple(str(item).strip() for item in items if item is not None and str(item).strip())


def licence_files(folder: Path) -> tuple[str, ...]:
    """Names of the files of a folder that state a licence."""
    named = (file.name for file in folder.iterdir()) if folder.is_dir() else ()
    return tuple(sorted(n for n in named if n.lower().startswith(LICENCE_WORDS)))

"""WebDataset tars as rows of a picture, a text and a key: a sample is the files side by side whose
names differ in their endings alone.

`datasets` takes its columns from the first samples: it refuses tars whose first ones differ, finds
no picture of another ending and no text that only later ones have, and ends at a file that comes
twice. Here every sample is a row: one without a picture says so when it is opened, and a file that
comes again begins another sample. A sample's .json gives its caption where no text stands beside
it (img2dataset writes both). A source whose first samples all lack pictures is one of texts.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import datasets
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.packaged_modules.webdataset.webdataset import WebDataset, base_plus_ext

from lavit.data.look import PICTURES
from lavit.data.sources import IMAGE_COLUMNS, TEXT_COLUMNS, texts_of
from lavit.data.tables import Tables

log = logging.getLogger(__name__)
ENDINGS = (*IMAGE_COLUMNS, *sorted(ending[1:] for ending in PICTURES))  # the first one is taken
FIRST = 10_000  # samples that are looked through for a picture
Sample = dict[str, Any]


def load_dataset(
    path: str, *, split: str, cache_dir: str | None, streaming: bool, **of: Any
) -> Any:
    """`datasets.load_dataset`, but for tars and parquet: here, in a folder or on the hub."""
    builder = datasets.load_dataset_builder(path, cache_dir=cache_dir, **of)
    if isinstance(builder, WebDataset):
        same = ("hash", "base_path", "token", "repo_id", "storage_options")
        given = {name: getattr(builder, name) for name in same}
        files = builder.config.data_files
        builder = Tars(cache_dir=cache_dir, dataset_name="tars", data_files=files, **given)
    elif isinstance(builder, Parquet):
        builder.__class__ = Tables
    if streaming:
        return builder.as_streaming_dataset(split=split)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)


class Tars(WebDataset):  # type: ignore[misc]  # which is Any
    """Reads tars as the header says; what is no picture and no text is passed over."""

    VERSION = datasets.Version("0.1.0")  # of how they are read: another fills its cache anew

    def _split_generators(self, dl_manager: Any) -> list[Any]:
        image, text = datasets.Image(decode=False), datasets.Value("string")
        self.info.features = datasets.Features(image=image, text=text, __key__=text)
        splits: list[Any] = super()._split_generators(dl_manager)
        rows = (row for split in splits for _, row in self._generate_examples(**split.gen_kwargs))
        if not any(row["image"]["bytes"] for row in itertools.islice(rows, FIRST)):
            del self.info.features["image"]
        return splits

    def _generate_examples(
        self, tar_paths: Any, tar_iterators: Any
    ) -> Iterator[tuple[str, Sample]]:
        for number, (path, files) in enumerate(zip(tar_paths, tar_iterators, strict=True)):
            for place, row in enumerate(_rows(path, files)):
                yield f"{number}_{place}", {name: row[name] for name in self.info.features}


def _rows(path: str, files: Iterable[tuple[str, Any]]) -> Iterator[Sample]:
    """A row for each sample of a tar."""
    key, found = "", dict[str, tuple[str, bytes]]()
    for name, file in files:
        base, ending = base_plus_ext(name)
        if base is None:
            continue
        ending = ending.lower()
        if found and (base != key or ending in found):
            yield _row(path, key, found)
            found = {}
        key = base
        found[ending] = name, file.read() if ending in (*ENDINGS, *TEXT_COLUMNS, "json") else b""
    if found:
        yield _row(path, key, found)


def _row(path: str, key: str, found: dict[str, tuple[str, bytes]]) -> Sample:
    """Of the files of a sample, by their endings."""
    name, data = next((found[one] for one in ENDINGS if one in found), (key, b""))
    row: Sample = {"__key__": key, "image": {"path": name, "bytes": data}, "text": None}
    if text := next((found[one] for one in (*TEXT_COLUMNS, "json") if one in found), None):
        try:
            said = text[1].decode()
            row["text"] = said if found.get("json") is not text else _caption(said)
        except UnicodeDecodeError:
            _leave_out(path, text[0], "it is not UTF-8")
        except (ValueError, RecursionError):
            _leave_out(path, text[0], "it is no JSON object")
    return row


def _caption(said: str) -> str | None:
    """The first text of a JSON object by the name that columns of texts have."""
    cells = json.loads(said)
    if not isinstance(cells, dict):
        raise ValueError(said)
    return next((text for name in TEXT_COLUMNS for text in texts_of(cells.get(name))), None)


@lru_cache(maxsize=10_000)  # once, although epochs read it again
def _leave_out(path: str, name: str, why: str) -> None:
    log.warning("left out the text %s of %s: %s", name, path, why)

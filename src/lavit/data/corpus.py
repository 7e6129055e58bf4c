"""A data set as training sees it: readable pictures with what to say of them, questions, and edits.

Any source of data/sources.py gives pictures and texts. A starter folder gives more: drawing prompts from its metadata,
questions.jsonl and edits.jsonl. Broken pictures are left out, counted and named.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavit.config import InputError
from lavit.data import starter
from lavit.data.sources import Record, load_records, readable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Picture:
    """One picture, what a reader should say of it, and what may be said to have it drawn."""

    record: Record
    captions: tuple[str, ...]
    prompts: tuple[str, ...]

    @property
    def row(self) -> Mapping[str, Any]:
        """All columns of the source."""
        return self.record.columns


@dataclass(frozen=True)
class Question:
    """A question about picture number `picture`, and its answer."""

    picture: int
    question: str
    answer: str


@dataclass(frozen=True)
class Edit:
    """Picture number `source` and an instruction that give picture number `target`."""

    source: int
    prompt: str
    target: int
    kind: str


@dataclass(frozen=True)
class Corpus:
    """Pictures of one or more splits, questions and edits about them, and the broken ones with reasons."""

    pictures: tuple[Picture, ...]
    questions: tuple[Question, ...] = ()
    edits: tuple[Edit, ...] = ()
    broken: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.pictures)


def load_corpus(data: str | Path, splits: Sequence[str] = ("train",)) -> Corpus:
    """Open splits of a source; raises `InputError` if no picture of it can be read.

    Questions and edits are those whose pictures are all in these splits.
    """
    pictures: list[Picture] = []
    broken: list[tuple[str, str]] = []
    for split in splits:
        good, bad = readable(load_records(data, split))
        pictures += [_picture(record) for record in good]
        broken += bad
    for name, reason in broken:
        log.warning("left out %s: %s", name, reason)
    if not pictures:
        raise InputError(f"{data} has no readable picture in {', '.join(splits)} ({len(broken)} broken)")
    folder = Path(data)
    places = {_place(picture.record, folder): number for number, picture in enumerate(pictures)}
    questions = [
        Question(places[line["image"]], line["question"], line["answer"])
        for line in _lines(folder / "questions.jsonl")
        if line["image"] in places
    ]
    edits = [
        Edit(places[line["source"]], line["prompt"], places[line["target"]], line["kind"])
        for line in _lines(folder / "edits.jsonl")
        if line["source"] in places and line["target"] in places
    ]
    return Corpus(tuple(pictures), tuple(questions), tuple(edits), tuple(broken))


def _picture(record: Record) -> Picture:
    row = record.columns
    if {"name", "artist", "group", "keywords"} <= set(row):  # a starter folder
        return Picture(record, tuple(starter.captions(row)), tuple(starter.prompts(row)))
    if not record.texts:
        raise InputError(f"{record.name} has no text: give a column text, caption or name")
    return Picture(record, record.texts, record.texts)


def _place(record: Record, folder: Path) -> str:
    try:
        return Path(record.name).resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        return record.name


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

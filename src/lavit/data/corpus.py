"""Data as training sees it: readable pictures with what to say of them, questions, edits, and texts without pictures.

Any source of data/sources.py gives pictures and texts, or texts alone. A column `prompts` holds texts that ask for a picture
where its captions do not. A folder may give more: questions.jsonl and edits.jsonl about its pictures. Several sources are one
string, `pictures,shapes:0.5,prose.jsonl:0.2`: a document of training comes from each in proportion to the weight behind its
colon (1 where none stands). Broken pictures are left out, counted and named.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lavit.config import InputError, read_json
from lavit.data.sources import Record, open_source, readable
from lavit.data.text import Texts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Picture:
    """One picture, what a reader should say of it, and what may be said to have it drawn."""

    record: Record
    captions: tuple[str, ...]
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """A question about picture number `picture`, and its answer."""

    picture: int
    question: str
    answer: str


@dataclass(frozen=True)
class Edit:
    """Pictures of these numbers, in order, and an instruction that give picture number `target`."""

    sources: tuple[int, ...]
    prompt: str
    target: int
    kind: str


@dataclass(frozen=True)
class Part:
    """One source of a corpus: which pictures, questions and edits are its, and how often documents are drawn from it."""

    name: str
    weight: float
    pictures: range
    questions: range
    edits: range
    texts: Sequence[str] = ()


@dataclass(frozen=True)
class Corpus:
    """Pictures of one or more splits, questions and edits about them, and the broken ones with reasons.

    `parts` are its sources (none given: one, of everything).
    """

    pictures: tuple[Picture, ...]
    questions: tuple[Question, ...] = ()
    edits: tuple[Edit, ...] = ()
    broken: tuple[tuple[str, str], ...] = ()
    parts: tuple[Part, ...] = ()

    def __post_init__(self) -> None:
        if not self.parts:
            counts = (range(len(items)) for items in (self.pictures, self.questions, self.edits))
            object.__setattr__(self, "parts", (Part("", 1.0, *counts),))

    def __len__(self) -> int:
        return len(self.pictures)


def parse_mixture(data: str | Path) -> list[tuple[str, float]]:
    """Sources and weights of `A,B:0.5`; a name that exists as it stands is one source. Bad weights raise `InputError`."""
    if isinstance(data, Path) or Path(data).exists():
        return [(str(data), 1.0)]
    found = []
    for piece in str(data).split(","):
        name, colon, weight = piece.strip().rpartition(":")
        if not colon or Path(piece.strip()).exists() or not _is_number(weight):
            name, weight = piece.strip(), "1"
        if not name or not 0 < float(weight) < float("inf"):
            raise InputError(
                f"{piece!r} of {str(data)!r} is no source with a positive weight: write SOURCE or SOURCE:0.5"
            )
        found.append((name, float(weight)))
    return found


def origin_of(data: str | Path) -> dict[str, Any]:
    """How the first source with an origin.json was made, as that file says; empty where none has one."""
    places = [Path(name) / "origin.json" for name, _ in parse_mixture(data)]
    return next((read_json(place) for place in places if place.is_file()), {})


def load_corpus(data: str | Path, splits: Sequence[str] = ("train",)) -> Corpus:
    """Open splits of a source or mixture; raises `InputError` if no picture of it can be read.

    Questions and edits are those whose pictures are all in these splits. A source of a mixture may lack splits other than
    train, as long as one source has them; texts alone belong to train.
    """
    mixture = parse_mixture(data)
    loaded: list[Corpus] = []
    lacking: list[InputError] = []
    for name, weight in mixture:
        try:
            loaded.append(_load_source(name, weight, splits))
        except InputError as error:
            if len(mixture) == 1 or "train" in splits:
                raise
            lacking.append(error)
    if not loaded:
        raise lacking[0]
    corpus = _join(loaded)
    for name, reason in corpus.broken:
        log.warning("left out %s: %s", name, reason)
    if not corpus.pictures:
        what = "texts alone: add a source of pictures" if any(len(part.texts) for part in corpus.parts) else ""
        raise InputError(
            f"{data} has no readable picture in {', '.join(splits)} ({what or f'{len(corpus.broken)} broken'})"
        )
    return corpus


def _load_source(name: str, weight: float, splits: Sequence[str]) -> Corpus:
    """One source as a corpus of its own."""
    folder = Path(name)
    records: list[Record] = []
    broken: list[tuple[str, str]] = []
    for split in splits:
        found = open_source(name, split)
        if isinstance(found, Texts):
            if split != "train":
                raise InputError(f"{name} holds texts alone and has no split {split!r}")
            nothing = range(0)
            return Corpus((), parts=(Part(name, weight, nothing, nothing, nothing, found),))
        good, bad = readable(found)
        records += good
        broken += bad
    places = {_place(record, folder): number for number, record in enumerate(records)}
    questions = tuple(
        Question(places[line["image"]], line["question"], line["answer"])
        for line in _lines(folder / "questions.jsonl")
        if line["image"] in places
    )
    edits = tuple(
        Edit(tuple(places[file] for file in line["sources"]), line["prompt"], places[line["target"]], line["kind"])
        for line in _lines(folder / "edits.jsonl")
        if places.keys() >= {*line["sources"], line["target"]}
    )
    asked = {question.picture for question in questions}
    pictures = tuple(_picture(record, number in asked) for number, record in enumerate(records))
    counts = (range(len(items)) for items in (pictures, questions, edits))
    return Corpus(pictures, questions, edits, tuple(broken), (Part(name, weight, *counts),))


def _join(corpora: Sequence[Corpus]) -> Corpus:
    """Several sources as one corpus; pictures keep their order, one source after the other."""
    pictures: list[Picture] = []
    questions: list[Question] = []
    edits: list[Edit] = []
    parts: list[Part] = []
    for corpus in corpora:
        first = len(pictures)
        starts = (first, len(questions), len(edits))
        pictures += corpus.pictures
        questions += [replace(question, picture=question.picture + first) for question in corpus.questions]
        edits += [_moved(edit, first) for edit in corpus.edits]
        ends = (len(pictures), len(questions), len(edits))
        parts += [replace(part, **_ranges(starts, ends)) for part in corpus.parts]
    broken = tuple(one for corpus in corpora for one in corpus.broken)
    return Corpus(tuple(pictures), tuple(questions), tuple(edits), broken, tuple(parts))


def _moved(edit: Edit, first: int) -> Edit:
    """The same edit where its source's pictures begin at number `first`."""
    return replace(edit, sources=tuple(one + first for one in edit.sources), target=edit.target + first)


def _ranges(starts: Sequence[int], ends: Sequence[int]) -> dict[str, range]:
    names = ("pictures", "questions", "edits")
    return {name: range(start, end) for name, start, end in zip(names, starts, ends, strict=True)}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _picture(record: Record, asked: bool) -> Picture:
    """What may be said of a picture; one without words must at least be asked about."""
    if not record.texts and not asked:
        raise InputError(f"{record.name} has no text: give a column text, caption or name")
    asking = record.columns.get("prompts")
    if asking is None:
        asking = [text.removesuffix(".") for text in record.texts]  # who asks for a picture ends with no full stop
    return Picture(record, record.texts, tuple(asking))


def _place(record: Record, folder: Path) -> str:
    try:
        return Path(record.name).resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        return record.name


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

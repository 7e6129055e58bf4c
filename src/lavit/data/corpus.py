"""Data as training sees it: readable pictures and what to say of them, questions, edits, and texts.

Any source of data/sources.py gives pictures and texts, or texts alone. A column `prompts` holds
texts that ask for a picture where its captions do not. A folder may give more: questions.jsonl and
edits.jsonl about its pictures, conversations.jsonl with pictures of their own. Several sources are
one string, `pictures,shapes:0.5,a.jsonl:0.2`: a document of training comes from each in proportion
to the weight behind its colon (1 where none stands). Broken pictures are left out, counted and
named; those without texts serve stages 1 and 3.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from posixpath import normpath
from typing import Any

from lavit.config import InputError, read_json
from lavit.data.conversations import Conversation, load_conversations
from lavit.data.lines import json_lines
from lavit.data.sources import Record, below, open_source, readable, texts_of
from lavit.data.text import Texts

log = logging.getLogger(__name__)
NAMED = 10_000  # records left out whose names are kept


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
class CorpusPart:
    """One source of a corpus: its pictures, questions, edits, talks or texts, and its weight."""

    name: str
    weight: float
    pictures: range = range(0)
    questions: range = range(0)
    edits: range = range(0)
    talks: range = range(0)
    texts: Sequence[str] = ()


@dataclass(frozen=True)
class Corpus:
    """Pictures, questions, edits and talks about them, and the broken ones with reasons.

    `parts` are its sources (none given: one, of everything).
    """

    pictures: tuple[Picture, ...]
    questions: tuple[Question, ...] = ()
    edits: tuple[Edit, ...] = ()
    talks: tuple[Conversation, ...] = ()
    broken: tuple[tuple[str, str], ...] = ()
    parts: tuple[CorpusPart, ...] = ()

    def __post_init__(self) -> None:
        if not self.parts:
            pictures, questions = range(len(self.pictures)), range(len(self.questions))
            numbers = pictures, questions, range(len(self.edits)), range(len(self.talks))
            object.__setattr__(self, "parts", (CorpusPart("", 1.0, *numbers),))

    def __len__(self) -> int:
        return len(self.pictures)


class LeftOut(dict[str, str]):
    """Names of records that cannot be used, and why: each is logged once and counted.

    Only the first `NAMED` are kept, so that a data set of any size takes no more memory.
    """

    count = 0

    def add(self, name: str, reason: object) -> None:
        """Name a record, unless it was named before."""
        if name in self:
            return
        self.count += 1
        reason = str(reason).removeprefix(f"{name}: ")
        if len(self) < NAMED:
            self[name] = reason
        log.warning("left out %s: %s (%d so far)", name, reason, self.count)


def parse_mixture(data: str | Path) -> list[tuple[str, float]]:
    """Sources and weights of `A,B:0.5`; a name that exists as it stands is one source.

    Bad weights raise `InputError`.
    """
    if isinstance(data, Path) or Path(data).exists():
        return [(str(data), 1.0)]
    found = []
    for piece in str(data).split(","):
        name, colon, after = piece.strip().rpartition(":")
        if name == "scenes" and after.isdigit():
            colon = ""  # scenes:5 are those of seed 5; a weight of them is scenes:0:5
        weight = _number(after) if colon and not Path(piece.strip()).exists() else None
        if weight is None:
            name, weight = piece.strip(), 1.0
        if not name or not 0 < weight < float("inf"):
            lacks = f"{piece!r} of {str(data)!r} is not a source with a positive weight"
            raise InputError(f"{lacks}: write SOURCE or SOURCE:0.5")
        found.append((name, weight))
    return found


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def origin_of(data: str | Path) -> dict[str, Any]:
    """How the sources of a mixture were made, by their origin.json; empty where none has one.

    It is what the first that has one says; `others` lists what the rest say, their names where they
    say nothing. A file has NAME.origin.json, or its folder's.
    """
    said = {name: _said_of(Path(name)) for name, _ in parse_mixture(data)}
    first = next((name for name, origin in said.items() if origin), None)
    if first is None:
        return {}
    others = [origin or name for name, origin in said.items() if name != first]
    return said[first] | ({"others": others} if others else {})


def with_more(model: Path, data: str | Path) -> dict[str, Any]:
    """The origin of what is trained on `data` from a model; `others` names what says nothing."""
    said = read_json(model / "training.json") if (model / "training.json").is_file() else {}
    origin = said.get("origin") or {"others": [said.get("data") or model.name]}
    more = origin_of(data)
    others = [*origin.get("others", ()), *more.pop("others", ()), more or str(data)]
    return origin | {"others": others}


def _said_of(source: Path) -> dict[str, Any]:
    places = [source / "origin.json", source.absolute().with_suffix(".origin.json")]
    if source.is_file():
        places.append(source.parent / "origin.json")
    return next((read_json(place) for place in places if place.is_file()), {})


def load_corpus(
    data: str | Path, splits: Sequence[str] = ("train",), *, talks: bool = False
) -> Corpus:
    """Open splits of a source or mixture; raises `InputError` if no picture of it can be read.

    Questions and edits are those whose pictures are all in these splits; texts alone belong to
    train. A source of a mixture may lack splits other than train, as long as one source has them.
    With `talks` come conversations and their pictures, which belong to no split.
    """
    mixture = parse_mixture(data)
    kinds = ("pictures", "questions", "edits", "talks")
    every: dict[str, list[Any]] = {kind: [] for kind in kinds}
    broken: Broken = []
    parts: list[CorpusPart] = []
    lacking: list[InputError] = []
    for name, weight in mixture:
        try:
            found = _load_source(name, splits, talks, first=len(every["pictures"]))
        except InputError as error:
            if len(mixture) == 1 or "train" in splits:
                raise
            lacking.append(error)
            continue
        spans = {}
        for kind, known in every.items():
            before = len(known)
            known += getattr(found, kind)
            spans[kind] = range(before, len(known))
        broken += found.broken
        parts.append(CorpusPart(name, weight, **spans, texts=found.texts))
    if not parts:
        raise lacking[0]
    for name, reason in broken:
        log.warning("left out %s: %s", name, reason)
    if not every["pictures"]:
        why = f"{len(broken)} broken"
        if any(len(part.texts) for part in parts):
            why = "texts alone: add a source of pictures"
        raise InputError(f"{data} has no readable picture in {', '.join(splits)} ({why})")
    whole = {kind: tuple(known) for kind, known in every.items()}
    return Corpus(**whole, broken=tuple(broken), parts=tuple(parts))


Broken = list[tuple[str, str]]


@dataclass(frozen=True)
class _Source:
    """What one source holds, pictures of its talks last: lists, or texts alone."""

    pictures: Sequence[Picture] = ()
    questions: Sequence[Question] = ()
    edits: Sequence[Edit] = ()
    talks: Sequence[Conversation] = ()
    broken: Sequence[tuple[str, str]] = ()
    texts: Sequence[str] = ()


def _load_source(name: str, splits: Sequence[str], with_talks: bool, first: int) -> _Source:
    """One source, its pictures numbered from `first`."""
    folder = Path(name)
    records: list[Record] = []
    broken: Broken = []
    for split in splits:
        found = open_source(name, split)
        if isinstance(found, Texts):
            if split != "train":
                raise InputError(f"{name} holds texts alone and has no split {split!r}")
            return _Source(texts=found)
        good, bad = readable(found)
        records += good
        broken += bad
    places = {below(record.name, folder): place for place, record in enumerate(records, first)}
    asked = _lines(folder / "questions.jsonl", image=str, question=str, answer=str)
    changed = _lines(folder / "edits.jsonl", sources=list, prompt=str, target=str, kind=str)
    questions, edits = [], []
    for line in asked:
        if (place := places.get(normpath(line["image"]))) is not None:
            questions.append(Question(place, line["question"], line["answer"]))
    for line in changed:
        names = [normpath(one) for one in (*line["sources"], line["target"])]
        if len(known := [places[one] for one in names if one in places]) == len(names):
            edits.append(Edit(tuple(known[:-1]), line["prompt"], known[-1], line["kind"]))
    for what, lines, used in (("questions", asked, questions), ("edits", changed, edits)):
        if len(used) < len(lines):
            lack = "%d of %d lines of %s/%s.jsonl name pictures that are not among those read"
            log.info(lack, len(lines) - len(used), len(lines), name, what)
    silent = sum(not record.texts for record in records)
    if silent:
        log.info("%d of %d pictures of %s have no text", silent, len(records), name)
    talks: list[Conversation] = []
    if with_talks and (path := folder / "conversations.jsonl").is_file():
        said = load_conversations(path, first=first + len(records))
        talks += said.items
        records += said.pictures  # what is broken was logged
    pictures = [picture_of(record) for record in records]
    return _Source(pictures, questions, edits, talks, broken)


def picture_of(record: Record) -> Picture:
    """What may be said of a picture."""
    asking = record.columns.get("prompts")
    if asking is None:  # who asks for a picture ends with no full stop
        asking = [text.removesuffix(".") for text in record.texts]
    return Picture(record, record.texts, texts_of(asking))


def _lines(path: Path, **kinds: type) -> list[dict[str, Any]]:
    """Objects of a file of JSON lines with these fields; none where there is no file."""
    rows = list(json_lines(path)) if path.is_file() else []
    for number, row in rows:
        for name, kind in kinds.items():
            value = row.get(name)
            parts = value if isinstance(value, list) else [""]
            if not isinstance(value, kind) or not all(isinstance(part, str) for part in parts):
                lacks = f"{name} is {str(value)[:40]!r}, expected a {kind.__name__}"
                raise InputError(f"{path}, line {number}: {lacks}")
    return [row for _, row in rows]

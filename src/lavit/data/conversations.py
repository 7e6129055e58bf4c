"""Conversations with pictures on both sides, from a file, as documents of fine-tuning.

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"},
                                               {"type": "text", "text": "…"}]},
                  {"role": "assistant", "content": "…"}]}

Other forms (LLaVA, ShareGPT, TRL's parquet) become this one (conversation_forms.py). Each turn of
the assistant is a document of its own (layout.py): what stands before it, and the turn as what is
learnt, text up to and including the end of turn, and pictures as their codes. Paths are below the
file's folder, or below a folder of pictures that is given. A conversation that cannot be used (a
picture that is missing or broken, no answer, a turn longer than a row) is left out, counted and
named; none left raises `InputError`. Every epoch shows each document once.
"""

from __future__ import annotations

import hashlib
import logging
from bisect import bisect
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lavit.config import InputError
from lavit.data.conversation_forms import messages_of, shared_rows
from lavit.data.corpus import Corpus
from lavit.data.documents import Rows
from lavit.data.sources import Record, readable
from lavit.data.text import TextPieces
from lavit.layout import check_messages, replies
from lavit.sequence import IGNORE, Batch, Document, Sequence, fill_rows, lay_out

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conversation:
    """Messages, whose pictures are given as numbers of the conversations' list of pictures."""

    name: str  # file and line, for messages to the user
    messages: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Conversations:
    """All usable conversations, their pictures (each once), and the others with reasons."""

    items: tuple[Conversation, ...]
    pictures: tuple[Record, ...]
    broken: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def counts(self) -> dict[str, int]:
        """How much there is of what."""
        said = Counter({"user": 0, "assistant": 0, "system": 0})
        images: Counter[str] = Counter()
        for message in (message for item in self.items for message in item.messages):
            role = str(message["role"])
            said[role] += 1
            images[role] += sum(map(_is_image, _parts(message)))
        return {
            "conversations": len(self.items),
            "left out": len(self.broken),
            **{f"{role} messages": count for role, count in said.items()},
            "pictures": len(self.pictures),
            "pictures read or edited": images["user"],
            "pictures written": images["assistant"],
        }


def load_conversations(data: str | Path, images: Path | None = None) -> Conversations:
    """Read a file of conversations and look at every picture; `InputError` if none can be used.

    Paths of pictures are below `images`, or below the file's folder.
    """
    path = Path(data)
    below = path.parent if images is None else Path(images)
    read: list[tuple[str, Any]] = []
    broken: list[tuple[str, str]] = []
    pictures: dict[str, Record] = {}
    for name, row in shared_rows(path):
        try:
            messages = _messages(messages_of(row))
            pictures |= {_key(part): _record(part, below) for part in _images(messages)}
            read.append((name, messages))
        except InputError as error:
            broken.append((name, str(error)))
    good, bad = readable(pictures.values())
    numbers = {record.name: number for number, record in enumerate(good)}
    reasons = dict(bad)
    items = []
    for name, messages in read:
        missing = [place for part in _images(messages) if (place := _key(part)) in reasons]
        if missing:
            broken.append((name, reasons[missing[0]]))
        else:
            numbered = tuple(_numbered(message, numbers) for message in messages)
            items.append(Conversation(name, numbered))
    found = Conversations(tuple(items), tuple(good), tuple(broken))
    _refuse_none(found.items, broken, path)
    return found


def _refuse_none(items: Any, broken: list[tuple[str, str]], path: Any) -> None:
    for name, reason in broken:
        log.warning("left out %s: %s", name, reason)
    if not items:
        why = "it is empty"
        if broken:
            why = f"{len(broken)} left out, the first, {broken[0][0]}: {broken[0][1]}"
        raise InputError(f"{path} has no conversation that can be used ({why})")


def _messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not any(message.get("role") == "assistant" for message in messages):
        raise InputError("no turn of the assistant: there is nothing to learn")
    if not all(isinstance(part.get("image"), str | bytes) for part in _images(messages)):
        raise InputError('a picture has no path: {"type": "image", "image": "a.png"}')
    check_messages(messages)
    return messages


def _key(part: Mapping[str, Any]) -> str:
    """The name of a picture: its path, or a hash of the file that it is."""
    image = part["image"]
    return image if isinstance(image, str) else hashlib.sha256(image).hexdigest()[:16]


def _record(part: Mapping[str, Any], below: Path) -> Record:
    image = part["image"]
    return Record(str(below / image) if isinstance(image, str) else image, (), _key(part))


def _parts(message: Mapping[str, Any]) -> list[Any]:
    content = message.get("content")
    return content if isinstance(content, list) else []


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "image"


def _images(messages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return (part for message in messages for part in _parts(message) if _is_image(part))


def _numbered(message: Mapping[str, Any], numbers: Mapping[str, int]) -> dict[str, Any]:
    parts = message.get("content")
    if not isinstance(parts, list):
        return dict(message)
    parts = [{**p, "image": numbers[_key(p)]} if _is_image(p) else p for p in parts]
    return {**message, "content": parts}


class ConversationDocuments(Rows):
    """Conversations as packed rows: a batch is a function of (seed, step).

    `codes[picture]` are the stage-1 codes. The last `text_rows` of a step are of texts alone, which
    keep the LM's language alive (paper Sec. 3.2).
    """

    corpus = Corpus(())  # fine-tuning knows no other data

    def __init__(
        self,
        conversations: Conversations,
        codes: tuple[tuple[int, ...], ...],
        *,
        texts: TextPieces | None = None,
        text_rows: int = 0,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        self.codes, self.texts, self.text_rows = codes, texts, text_rows
        self.sequences: list[Sequence] = []
        broken: list[tuple[str, str]] = []
        for item in conversations.items:
            try:
                self.sequences += self._lay_out(item)
            except InputError as error:
                broken.append((item.name, str(error)))
        self.broken = tuple(broken)
        _refuse_none(self.sequences, broken, "the data")
        self._epochs: list[int] = [0]  # first row of each epoch
        self._rows: tuple[int, list[list[int]]] | None = None

    def documents(self, conversation: Conversation) -> list[Document]:
        """A document for each turn of the assistant."""
        turns = replies(conversation.messages, self.tokenizer)
        return [self.segments(parts, self.codes.__getitem__) for parts in turns]

    def _lay_out(self, conversation: Conversation) -> list[Sequence]:
        found = [lay_out(one, self.vocabulary) for one in self.documents(conversation)]
        for sequence in found:
            self.check_length(sequence)
            if all(label == IGNORE for label in sequence.labels):
                raise InputError("every label is masked: a turn of the assistant is empty")
        return found

    def _epoch(self, number: int) -> list[list[int]]:
        """Rows of an epoch, in which each document stands once."""
        rng = np.random.default_rng([self.seed, number])
        order = rng.permutation(len(self.sequences)).tolist()
        lengths = [len(self.sequences[item]) for item in order]
        rows = -(-sum(lengths) // self.config.tokens)
        filled, left = fill_rows(lengths, rows, self.config.tokens)
        while left:
            rows += -(-left * min(lengths) // self.config.tokens)
            filled, left = fill_rows(lengths, rows, self.config.tokens)
        return [[order[place] for place in row] for row in filled if row]

    def _row(self, number: int) -> list[Sequence]:
        """A row of the endless list of epochs."""
        while True:
            epoch = bisect(self._epochs, number) - 1
            if self._rows is None or self._rows[0] != epoch:
                self._rows = (epoch, self._epoch(epoch))
            rows, at = self._rows[1], number - self._epochs[epoch]
            if epoch + 1 == len(self._epochs):
                self._epochs.append(self._epochs[epoch] + len(rows))
            if at < len(rows):
                return [self.sequences[item] for item in rows[at]]

    def batch(self, step: int) -> Batch:
        """Rows of a step."""
        own = self.config.rows - self.text_rows
        rows = [self._row(number) for number in range(step * own, (step + 1) * own)]
        return self.pack([*rows, *(self._text_row(step, row) for row in range(self.text_rows))])

    def _text_row(self, step: int, row: int) -> list[Sequence]:
        """Pieces of texts until the next one would not fit."""
        assert self.texts is not None
        rng = np.random.default_rng([self.seed, step, row])
        found: list[Sequence] = []
        while True:
            piece = lay_out((self.texts.draw(rng),), self.vocabulary)
            if sum(map(len, found)) + len(piece) > self.config.tokens:
                return found
            found.append(piece)

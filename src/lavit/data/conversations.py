"""Conversations with pictures on both sides, from a file.

    {"messages": [{"role": "user", "content": [{"type": "image", "image": "a.png"},
                                               {"type": "text", "text": "…"}]},
                  {"role": "assistant", "content": "…"}]}

Other forms (LLaVA, ShareGPT, TRL's parquet) become this one (conversation_forms.py); documents of
them are made in documents.py and conversation_documents.py. Paths are below the file's folder, or
below a folder of pictures that is given. A conversation that cannot be used (a picture that is
missing or broken, no answer) is left out, counted and named; none left raises `InputError`.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavit.config import InputError
from lavit.conversation import check_messages
from lavit.data.conversation_forms import messages_of, shared_rows
from lavit.data.sources import Record, readable

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


def load_conversations(
    data: str | Path, images: Path | None = None, *, first: int = 0
) -> Conversations:
    """Read a file of conversations and look at every picture; `InputError` if none can be used.

    Paths of pictures are below `images`, or below the file's folder; pictures are numbered from
    `first`.
    """
    path = Path(data)
    below = path.parent if images is None else Path(images)
    if images is not None and not below.is_dir():
        raise InputError(f"{below} is no folder: give the one that pictures are below")
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
    numbers = {record.name: number for number, record in enumerate(good, first)}
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
    refuse_none(found.items, broken, path)
    return found


def refuse_none(items: Any, broken: list[tuple[str, str]], path: Any) -> None:
    """Name what was left out; `InputError` if nothing is left."""
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
    check_messages(messages)
    if messages[-1]["role"] != "assistant":
        raise InputError("the last message is not the assistant's: end with what is to be learnt")
    for message in messages:
        if message["role"] == "assistant" and not _says(message["content"]):
            raise InputError("every label is masked: a turn of the assistant is empty")
    for part in _images(messages):
        if not isinstance(part["image"], str | bytes):
            like = '{"type": "image", "image": "a.png"}'
            raise InputError(f"a picture is {part['image']!r:.40}, not a path: write {like}")
        if part.get("keep", "auto") != "auto":
            cure = "the model's own choice is what it is trained for, so leave 'keep' out"
            raise InputError(f"a picture says keep {part['keep']!r:.40}: {cure}")
    return messages


def _says(content: Any) -> bool:
    """Whether there is anything to learn: a picture, or words."""
    parts = [{"text": content}] if isinstance(content, str) else content
    return any(_is_image(part) or part["text"].strip() for part in parts)


def _key(part: Mapping[str, Any]) -> str:
    """The name of a picture: its path, or a hash of the file that it is."""
    image = part["image"]
    return image if isinstance(image, str) else hashlib.sha256(image).hexdigest()[:16]


def _record(part: Mapping[str, Any], below: Path) -> Record:
    image = part["image"]
    if isinstance(image, str) and (Path(image).is_absolute() or ".." in Path(image).parts):
        cure = "name the folder that pictures are below (--images), and paths from there"
        raise InputError(f"the path {image!r} leads out of {below}: {cure}")
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

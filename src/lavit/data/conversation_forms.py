"""The forms in which conversations are shared, as messages in the form of Hugging Face chats.

    messages    {"messages": [{"role", "content"}, …]}, with "images": [path, …] for the marks
                <image> or {"type": "image"} of the contents, in order (TRL, LLaMA-Factory), or
                by the number that {"type": "image", "index": 0} says
    LLaVA       {"image": path or list, "conversations": [{"from": "human", "value": …}, …]}
    ShareGPT    the same with "images", and "system" beside them
    TRL         {"prompt": messages, "completion": messages}

A file is of JSON lines, of one JSON list, or parquet (pictures inside as {"bytes", "path"}).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lavit.config import InputError, require
from lavit.conversation import ROLES

MARK = "<image>"
SUFFIXES = (".jsonl", ".json", ".parquet")
KEYS = ("messages", "conversations", "prompt")
NAMED = re.compile(rb'"(?:messages|conversations|completion)"\s*:\s*\[')
HEAD = 65536  # bytes of a file that say what it is
SPEAKERS = {"human": "user", "gpt": "assistant", "model": "assistant"} | {r: r for r in ROLES}

MessageDict = dict[str, Any]


def holds_conversations(path: Path) -> bool:
    """Whether a file is of one of these forms, by its beginning or its columns."""
    if path.suffix.lower() not in SUFFIXES or not path.is_file():
        return False
    if path.suffix.lower() == ".parquet":
        try:
            names = {*require("pyarrow.parquet", extra="train").read_schema(path).names}
        except (OSError, ValueError) as error:  # pyarrow's own are of these two
            said = str(error).splitlines()[0]
            raise InputError(f"{path} is not a readable parquet file: {said}") from error
        return bool({"messages", "conversations"} & names) or {"prompt", "completion"} <= names
    with path.open("rb") as file:
        return bool(NAMED.search(file.read(HEAD)))


def shared_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Names and rows of a file; a line that is no JSON is an `InputError` in place of its row.

    Raises `InputError` for a file that cannot be read.
    """
    if path.suffix.lower() == ".parquet":
        yield from _parquet_rows(path)
        return
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} is not a readable file of conversations: {error}") from error
    if path.suffix.lower() == ".json":
        try:
            rows = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} is not JSON: {error}") from error
        if not isinstance(rows, list):
            raise InputError(f"{path} is no list of conversations")
        yield from ((f"{path.name}[{number}]", row) for number, row in enumerate(rows))
        return
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            try:
                yield f"{path.name}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"{path.name}:{number}", InputError(str(error))


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    parquet = require("pyarrow.parquet", extra="train")
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                yield f"{path.name}[{number}]", row
                number += 1
    except (OSError, ValueError) as error:  # pyarrow's own errors are these
        why = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is not a readable parquet file: {why}") from error


def messages_of(row: Any) -> list[MessageDict]:
    """The messages of a row in any of these forms.

    Pictures are {"type": "image", "image": path or bytes}. Raises `InputError` for other forms, and
    where marks and pictures differ in number.
    """
    if isinstance(row, InputError):
        raise row
    if not isinstance(row, Mapping) or not any(row.get(key) is not None for key in KEYS):
        like = '{"messages": [{"role": "user", "content": …}, …]}'
        raise InputError(f"no list of messages: a line is {like}")
    if row.get("conversations") is not None:
        said = _spoken(row)
    elif row.get("messages") is not None:
        said = row["messages"]
    else:
        said = [*_listed(row["prompt"]), *_listed(row.get("completion"))]
    said = [_message(one) for one in _listed(said)]
    images = row.get("images")
    images = row.get("image") if images is None else images
    return _with_pictures(said, [] if images is None else images)


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
        like = '{"messages": [{"role": "user", "content": …}, …]}'
        raise InputError(f"no list of messages: a line is {like}")
    return value


def _spoken(row: Mapping[str, Any]) -> list[MessageDict]:
    """Turns of {"from", "value"} as messages."""
    system = row.get("system")
    said = [{"role": "system", "content": system}] if system else []
    for turn in _listed(row["conversations"]):
        speaker = turn.get("from", turn.get("role"))
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise InputError(f"a turn is from {speaker!r}: use human, gpt or system")
        said.append({"role": SPEAKERS[speaker], "content": turn.get("value", turn.get("content"))})
    return said


def _message(message: Mapping[str, Any]) -> MessageDict:
    """A message whose parts have no empty columns, which parquet adds."""
    content = message.get("content")
    return {**message, "content": [*map(_part, content)] if isinstance(content, list) else content}


def _part(part: Any) -> MessageDict:
    """A part of a message; a picture's path is its "image", else it is a mark of one."""
    if not isinstance(part, Mapping):
        like = '{"type": "text", "text": "hello"}'
        raise InputError(f"a part of a message is {part!r:.40}: write {like}")
    found = {key: value for key, value in part.items() if value is not None}
    if "path" in found and found.get("type") == "image":
        found.setdefault("image", found.pop("path"))
    if "image" in found or found.get("type") != "image":
        found.pop("index", None)
    return found


def _with_pictures(messages: list[MessageDict], images: Any) -> list[MessageDict]:
    """Pictures in place of their marks, by number or in order; without marks, before the first
    question.
    """
    pictures = [_picture(one) for one in (images if isinstance(images, list) else [images])]
    contents = [message["content"] for message in messages]
    marked = sum(map(_marks, contents))
    listed = (part for content in contents if isinstance(content, list) for part in content)
    numbers = [part["index"] for part in listed if "index" in part]
    known = range(len(pictures))
    if numbers and (
        len(numbers) != marked
        or not all(isinstance(number, int) and number in known for number in numbers)
        or any(number not in numbers for number in known)
    ):
        said = f"{len(pictures)} pictures for {marked} marks, of which {len(numbers)} say an index"
        raise InputError(f"{said} ({numbers}): every mark says one of 0..{len(pictures) - 1}")
    if not numbers and marked and marked != len(pictures):
        raise InputError(f"{len(pictures)} pictures for {marked} marks ({MARK}): one mark each")
    rest = iter([pictures[number] for number in numbers] if numbers else pictures)
    found = []
    for message in messages:
        content = message["content"]
        if not marked and pictures and message.get("role") == "user":
            parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
            content = [*rest, *parts]  # all of them; none is left for the next
        elif marked and _marks(content):
            content = _filled(content, rest)
        found.append({**message, "content": content})
    return found


def _marks(content: Any) -> int:
    if isinstance(content, str):
        return content.count(MARK)
    parts = content if isinstance(content, list) else []
    return sum(
        "image" not in part if part.get("type") == "image" else str(part.get("text")).count(MARK)
        for part in parts
    )


def _filled(content: Any, pictures: Iterator[MessageDict]) -> list[MessageDict]:
    """A content with pictures where their marks were."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    found: list[MessageDict] = []
    for part in parts:
        if part.get("type") == "image":
            found.append(part if "image" in part else next(pictures))
            continue
        for number, words in enumerate(str(part.get("text", "")).split(MARK)):
            if number:
                found.append(next(pictures))
            if words.strip():
                found.append({"type": "text", "text": words.strip("\n")})
    return found


def _picture(value: Any) -> MessageDict:
    """A picture of a path, or of parquet's {"bytes", "path"}."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, str | bytes):
        said = f"a picture is {value!r:.40}, neither a path nor a file"
        raise InputError(f'{said}: write "images": ["a.png"]')
    return {"type": "image", "image": value}

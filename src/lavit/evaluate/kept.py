"""What a model said and drew, item by item, in a file: an evaluation that was stopped goes on where
it was.

A line is one item: {"key", "task", "item", "chunk", "made", "check"}, and its "name" where items
have names. The key is a hash of the weights, the configuration, the seed and the world; lines of
another key are left alone. `check` is a hash of the rest: a line that was changed is made again.
Items are made in chunks of fixed borders, so that an item is always computed in a batch with the
same others, stopped or not; of a chunk that was being written when its evaluation stopped, the
lines are cut off.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lavit.config import InputError

log = logging.getLogger(__name__)
TOGETHER = 32  # items of a chunk
Progress = Callable[[str, int, int], None]  # of what, how many are done, of how many


def checked(row: dict[str, Any]) -> str:
    """A hash of a line."""
    return hashlib.sha256(json.dumps(row).encode()).hexdigest()[:12]


def _unfinished(lines: Sequence[bytes]) -> int:
    """How many lines at the end are of a chunk that was being written."""
    torn = int(bool(lines) and not lines[-1].endswith(b"\n"))
    chunks = []
    for line in reversed(lines[: len(lines) - torn]):
        try:
            row = json.loads(line)
            chunks.append((row["key"], row["task"], row["chunk"]))
        except (ValueError, KeyError, TypeError):
            break
        if chunks[-1] != chunks[0]:
            break
    same = chunks.count(chunks[0]) if chunks else 0
    return torn + (same % int(chunks[0][2].rpartition(":")[2]) if same else 0)


def _chunk_name(chunk: Sequence[int]) -> str:
    return f"{chunk[0]}-{chunk[-1]}:{len(chunk)}"


def _placed(items: Sequence[int], together: int) -> Iterator[tuple[int, str]]:
    """Each item with the name of its chunk."""
    for at in range(0, len(items), together):
        chunk = items[at : at + together]
        yield from ((item, _chunk_name(chunk)) for item in chunk)


class Kept:
    """Predictions under a key, in a file of JSON lines or (no path) in memory alone."""

    def __init__(
        self,
        path: Path | None,
        key: str,
        progress: Progress = lambda task, done, count: None,
        *,
        names: Sequence[str] = (),  # of the items, beside their numbers
        valid: Callable[[Any], bool] = lambda made: True,  # whether one that was kept still holds
    ) -> None:
        self.path, self.key, self.progress = path, key, progress
        self.names, self.valid = names, valid
        self.found: dict[tuple[str, int, str], Any] = {}
        data = path.read_bytes() if path is not None and path.exists() else b""
        lines = data.splitlines(keepends=True)
        self.unfinished = sum(map(len, lines[len(lines) - _unfinished(lines) :]))  # bytes
        self.whole = len(data) - self.unfinished
        self._read(lines)

    def take(self, path: Path) -> None:
        """Know what another process has written so far, too."""
        self._read(path.read_bytes().splitlines(keepends=True), path)

    def _read(self, lines: Sequence[bytes], path: Path | None = None) -> None:
        changed, lost = 0, set()
        for line in lines:
            try:
                row = json.loads(line)
                if row["key"] != self.key:
                    continue
                at = (row["task"], row["item"], row["chunk"])
                if row.pop("check", None) != checked(row):
                    changed += 1
                elif self.valid(row["made"]):
                    self.found[at] = row["made"]
                else:
                    lost.add(at)
            except (ValueError, KeyError, TypeError):
                continue  # cut off when an evaluation was stopped
        if changed:
            said = "%d predictions of %s were changed: they are made again"
            log.warning(said, changed, path or self.path)
        if lost := lost - self.found.keys():
            said = "what %d predictions of %s drew is gone or was changed: it is drawn again"
            log.warning(said, len(lost), path or self.path)

    def missing(self, task: str, items: Sequence[int], together: int = TOGETHER) -> bool:
        """Whether `made` of these would have to make any."""
        return any((task, *at) not in self.found for at in _placed(items, together))

    def made(
        self,
        task: str,
        items: Sequence[int],
        make: Callable[[list[int]], list[Any]],
        *,
        together: int = TOGETHER,
    ) -> list[Any]:
        """What `make` answers for items (plain data); those that are kept are not made again."""
        answers: list[Any] = []
        for at in range(0, len(items), together):
            chunk = list(items[at : at + together])
            name = _chunk_name(chunk)
            known = [self.found.get((task, item, name)) for item in chunk]
            if any(one is None for one in known):
                known = json.loads(json.dumps(make(chunk)))  # the same whether it was read or made
                self._add(task, chunk, name, known)
            answers += known
            self.progress(task, len(answers), len(items))
        return answers

    def _add(self, task: str, chunk: list[int], name: str, made: list[Any]) -> None:
        lines = ""
        for item, one in zip(chunk, made, strict=True):
            self.found[task, item, name] = one
            row = {"key": self.key, "task": task, "item": item, "chunk": name, "made": one}
            row |= {"name": self.names[item]} if self.names else {}
            lines += json.dumps({**row, "check": checked(row)}) + "\n"
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                if self.unfinished:
                    file.truncate(self.whole)
                file.write(lines)
            self.unfinished = 0
        except OSError as error:
            said = f"{self.path} cannot be written ({error.strerror})"
            raise InputError(f"{said}: give --json FILE where predictions may be kept") from error

"""Text without pictures: sources of it, and how a long text is cut into documents.

Text alone keeps a language model's own language alive while it learns pictures (paper Sec. 3.2
mixes RedPajama in). A text is drawn by its length and then one of its pieces evenly, so that every
piece of a source comes about equally often. Only the piece that finishes its text ends with the
LM's end token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lavit.config import InputError
from lavit.layout import ids_of
from lavit.sequence import Text

CACHED = 5000  # texts whose pieces are kept


class Texts(Sequence[str]):
    """A map-style source of text alone; rows are read from disk when asked for."""

    def __init__(self, rows: Any, *, column: str | None, name: str) -> None:
        """`rows`: a `datasets.Dataset` with a text `column`, or (None) a list of strings."""
        self.rows, self.column, self.name = rows, column, name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        if not -len(self) <= index < len(self):  # iteration ends by IndexError
            raise IndexError(index)
        found = self.rows[index]
        return str((found if self.column is None else found[self.column]) or "").strip()

    @cached_property
    def characters(self) -> list[int]:
        """Length of each text."""
        return [len(text) for text in self]


def text_files(path: Path) -> Texts:
    """A .txt file as one text, or a folder of .txt files as one text each."""
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    try:
        texts = [file.read_text(encoding="utf-8") for file in files]
        return Texts(texts, column=None, name=str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not readable UTF-8 text: {error}") from error


def cut(ids: Sequence[int], tokens: int, end: int) -> tuple[Text, ...]:
    """Ids of one text as documents of at most `tokens`; the last ends with the id `end`."""
    *whole, last = [tuple(ids[at : at + tokens]) for at in range(0, len(ids), tokens)] or [()]
    if len(last) == tokens:  # the text's last token stands in a row with the end token
        whole, last = [*whole, last[:-1]], last[-1:]
    return (*map(Text, whole), Text((*last, end)))


class TextPieces:
    """Draws pieces of a text source as documents."""

    def __init__(
        self, texts: Sequence[str], text: PreTrainedTokenizerBase, tokens: int, end: int
    ) -> None:
        """`tokens` is the length of a row. A source without any text raises `InputError`."""
        self.texts, self.tokenizer, self.tokens, self.end = texts, text, tokens, end
        self.until = np.cumsum(getattr(texts, "characters", None) or [len(text) for text in texts])
        if not len(self.until) or self.until[-1] == 0:
            raise InputError(f"{getattr(texts, 'name', 'a source of text')} has no text in it")
        self._of = lru_cache(maxsize=CACHED)(self._cut)

    def _cut(self, number: int) -> tuple[Text, ...]:
        return cut(ids_of(self.tokenizer, self.texts[number]), self.tokens, self.end)

    def draw(self, rng: np.random.Generator) -> Text:
        """A text by its length, one of its pieces evenly."""
        number = int(np.searchsorted(self.until, rng.integers(self.until[-1]), side="right"))
        pieces = self._of(number)
        return pieces[rng.integers(len(pieces))]

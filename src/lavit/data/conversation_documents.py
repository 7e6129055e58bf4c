"""Conversations as documents of fine-tuning: packed rows, a batch a function of (seed, step).

Every turn of the assistant is learnt once, text up to and including the end of turn, pictures as
their codes: with a chat template that only appends, replies in words are learnt in one document and
pictures in another, else each turn is a document of its own (conversation.py). A document longer
than a row leaves its conversation out, which is counted and named. Every epoch shows each document
once.
"""

from __future__ import annotations

from bisect import bisect
from typing import Any

import numpy as np

from lavit.config import InputError
from lavit.conversation import replies
from lavit.data.conversations import Conversation, Conversations, refuse_none
from lavit.data.corpus import Corpus
from lavit.data.documents import Rows
from lavit.data.text import TextPieces
from lavit.sequence import IGNORE, Batch, Document, Sequence, fill_rows, lay_out


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
        refuse_none(self.sequences, broken, "the data")
        self._epochs: list[int] = [0]  # first row of each epoch
        self._rows: tuple[int, list[list[int]]] | None = None

    def documents(self, conversation: Conversation) -> list[Document]:
        """Documents in which every turn of the assistant is learnt."""
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

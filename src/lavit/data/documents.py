"""Documents of stage 2, drawn from a corpus and packed into rows: a function of (seed, step).

Their kinds are those of `Mixture` (edits are of one picture or several; of a conversation it is
replies in words or in pictures, and what stands before them); layout.py and conversation.py say how
each looks. A picture that has several questions is asked up to `ASKED` of them in one document,
since reading it is most of the cost.

Each document comes from one source of the corpus, chosen by the sources' weights, and is of a kind
that this source has. A source of texts gives pieces of them (data/text.py). A share of the writing
documents loses its prompt: what is left, a bare image, trains the unconditional branch of guidance.
Images inside a prompt for writing enter as codes, images that are read as features (method, Sec. 3
and 5).

Some steps share a window of rows: documents are drawn until they would overflow it, then spread
over its rows. So rows are full, each holds long documents and short ones, and no length is favoured
(`fill_from_front`). A document longer than a row is left out, counted and named.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Sequence_
from dataclasses import fields
from functools import partial
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from lavit.config import InputError, LanguageTraining, Mixture
from lavit.conversation import replies
from lavit.data.corpus import Corpus, CorpusPart, LeftOut
from lavit.data.text import TextPieces
from lavit.layout import (
    ImagePart,
    Part,
    TextPart,
    asking,
    drawing,
    editing,
    ids_of,
    reading,
    segments,
)
from lavit.sequence import (
    Batch,
    Document,
    Image,
    Sequence,
    Text,
    fill_from_front,
    lay_out,
    pack,
    supervise_some,
)
from lavit.vocabulary import Vocabulary

Rng = np.random.Generator
T = TypeVar("T")
Codes = Callable[[int], tuple[int, ...]]  # of a picture, by its number
KINDS = tuple(field.name for field in fields(Mixture))
ASKED = 4  # questions of one document
WINDOW = 64  # rows that are filled together, at least
MOST_LONG = 100  # documents longer than a row for each one that is not


class Source:
    """One part of a corpus as a source of documents: its kinds and their shares."""

    def __init__(self, part: CorpusPart, corpus: Corpus, mixture: Mixture) -> None:
        self.part = part
        self.read = [number for number in part.pictures if corpus.pictures[number].captions]
        self.written = [number for number in part.pictures if corpus.pictures[number].prompts]
        have = {
            "reading": self.read,
            "writing": self.written,
            "question": part.questions,
            "edit": part.edits,
            "conversation": part.talks,
            "text": self.written,
        }
        weights = np.array([getattr(mixture, kind) * (len(have[kind]) > 0) for kind in KINDS])
        if len(part.texts):
            weights = np.eye(len(KINDS))[-1]
        if weights.sum() <= 0:
            wanted = ", ".join(kind for kind in KINDS if getattr(mixture, kind) > 0)
            has = f"{len(self.read)} of its {len(part.pictures)} pictures have texts"
            none = f"the source {part.name!r} gives no document of the kinds {wanted}"
            raise InputError(f"{none}: {has}, and there are {len(part.questions)} questions")
        self.until = np.cumsum(weights / weights.sum())


class Rows:
    """What all documents of training share: text as ids, documents as rows, rows as batches."""

    def __init__(
        self,
        *,
        text: PreTrainedTokenizerBase,
        vocabulary: Vocabulary,
        config: LanguageTraining,
        seed: int,
        rows: Callable[[int], int] | None = None,
    ) -> None:
        """`rows` of a reader: as how many a picture with so many codes is read."""
        self.tokenizer, self.vocabulary, self.config, self.seed = text, vocabulary, config, seed
        self.read_rows = rows
        self.left_out = LeftOut()

    def ids(self, text: str, controls: bool = False) -> tuple[int, ...]:
        """Ids of a text; see `ids_of`."""
        return ids_of(self.tokenizer, text, controls)

    def segments(self, parts: Sequence_[Part], codes: Codes) -> Document:
        """Parts, whose pictures are numbers, as a document; one may enter as codes of its own."""
        look = partial(segments, end=self.vocabulary.end, rows=self.read_rows)
        return look(parts, self.ids, partial(_own, codes))

    def lay_out(self, document: Document, rng: Rng) -> Sequence:
        """A document as ids, with labels for a share of the codes that are read."""
        read = self.config.supervise_read_images
        laid = lay_out(document, self.vocabulary, supervise_read_images=read)
        self.check_length(laid)
        return supervise_some(laid, self.config.read_share, rng)

    def check_length(self, sequence: Sequence) -> None:
        """Raise `InputError` for a document that no row holds."""
        if len(sequence) > self.config.tokens:
            long = f"{len(sequence)} tokens are more than a row of {self.config.tokens}"
            raise InputError(f"{long}: use longer rows")

    def spread(self, lengths: list[int], rows: int, seed: list[int]) -> list[list[int]]:
        """As many of the first documents as fit together: their numbers in rows of any order."""
        filled = fill_from_front(lengths, rows, self.config.tokens)
        return [filled[row] for row in np.random.default_rng(seed).permutation(rows)]

    def pack(self, rows: list[list[Sequence]]) -> Batch:
        """Rows as a batch."""
        return pack(rows, self.vocabulary, tokens=self.config.tokens)


class Documents(Rows):
    """Draws documents of a corpus; `codes[picture]` are the stage-1 codes."""

    def __init__(self, corpus: Corpus, codes: tuple[tuple[int, ...], ...], **shared: Any) -> None:
        super().__init__(**shared)
        self.corpus, self.codes = corpus, codes
        self._ids: dict[tuple[str, bool], tuple[int, ...]] = {}
        self._window: tuple[int, list[list[Sequence]]] | None = None
        self._asked: dict[int, list[int]] = {}
        for number, question in enumerate(corpus.questions):
            self._asked.setdefault(question.picture, []).append(number)
        self.sources = [Source(part, corpus, self.config.mixture) for part in corpus.parts]
        weights = np.array([part.weight for part in corpus.parts])
        self.until = np.cumsum(weights / weights.sum())
        self.pieces = {
            number: TextPieces(part.texts, self.tokenizer, self.config.tokens, self.vocabulary.end)
            for number, part in enumerate(corpus.parts)
            if len(part.texts)
        }

    def ids(self, text: str, controls: bool = False) -> tuple[int, ...]:
        """The same, kept: most texts come again."""
        if (text, controls) not in self._ids:
            self._ids[text, controls] = super().ids(text, controls)
        return self._ids[text, controls]

    def draw(self, rng: Rng) -> Document:
        """One document."""
        number = by_shares(self.until, rng)
        if number in self.pieces:
            return (self.pieces[number].draw(rng),)
        source = self.sources[number]
        kind = KINDS[by_shares(source.until, rng)]
        return self.segments(getattr(self, f"_{kind}")(source, rng), self.codes.__getitem__)

    def _name(self, document: Document) -> str:
        """What a document is about: its first picture, or how its text begins."""
        for segment in document:
            if isinstance(segment, Image):
                return self.corpus.pictures[segment.index].record.name
        first = document[0]
        assert isinstance(first, Text)
        return f"a text, {self.tokenizer.decode(list(first.ids[:16]))!r}"

    def _reading(self, source: Source, rng: Rng) -> list[Part]:
        number = one_of(source.read, rng)
        return reading(number, one_of(self.corpus.pictures[number].captions, rng))

    def _writing(self, source: Source, rng: Rng) -> list[Part]:
        number = one_of(source.written, rng)
        prompts = self.corpus.pictures[number].prompts
        return asked_for(prompts, number, self.config.unconditional_fraction, rng)

    def _question(self, source: Source, rng: Rng) -> list[Part]:
        picture = self.corpus.questions[one_of(source.part.questions, rng)].picture
        numbers = rng.permutation(self._asked[picture])[:ASKED]
        asked = (self.corpus.questions[number] for number in numbers)
        return asking(picture, *((one.question, one.answer) for one in asked))

    def _edit(self, source: Source, rng: Rng) -> list[Part]:
        edit = self.corpus.edits[one_of(source.part.edits, rng)]
        return editing(edit.sources, edit.prompt, edit.target)

    def _conversation(self, source: Source, rng: Rng) -> list[Part]:
        talk = self.corpus.talks[one_of(source.part.talks, rng)]
        try:
            return one_of(replies(talk.messages, self.tokenizer), rng)
        except InputError as error:
            raise InputError(f"{talk.name}: {error}") from error

    def _text(self, source: Source, rng: Rng) -> list[Part]:
        prompts = self.corpus.pictures[one_of(source.written, rng)].prompts
        return [TextPart(one_of(prompts, rng), target=True, ends=True)]

    def _rows(self, window: int, rows: int) -> list[list[Sequence]]:
        """Documents of each row of a window; the last one is kept, since steps come in order."""
        if self._window is None or self._window[0] != window:
            rng = np.random.default_rng([self.seed, window])
            drawn: list[Sequence] = []
            room, long = rows * self.config.tokens, 0
            while room >= 0:
                document: Document | None = None
                try:
                    document = self.draw(rng)
                    drawn.append(self.lay_out(document, rng))
                except InputError as error:
                    about = str(error).partition(": ")[0]  # what could not be drawn
                    self.left_out.add(self._name(document) if document else about, error)
                    long += 1
                    if long > MOST_LONG * (1 + len(drawn)):
                        raise InputError(f"next to no document fits: {error}") from error
                    continue
                room -= len(drawn[-1])
            filled = self.spread([len(one) for one in drawn], rows, [self.seed, window, 1])
            self._window = (window, [[drawn[number] for number in row] for row in filled])
        return self._window[1]

    def batch(self, step: int) -> Batch:
        """Rows of a step."""
        steps = -(-WINDOW // self.config.rows)
        rows = self._rows(step // steps, steps * self.config.rows)
        first = step % steps * self.config.rows
        return self.pack(rows[first : first + self.config.rows])


def _own(codes: Codes, part: ImagePart) -> tuple[int, ...]:
    """The codes that a part enters with; those of its picture, where it has none of its own."""
    return codes(part.image) if part.read or part.codes is None else part.codes


def one_of(items: Sequence_[T], rng: Rng) -> T:
    """One of these, each as likely as the others."""
    return items[int(rng.integers(len(items)))]


def asked_for(
    prompts: Sequence_[str], number: int, unconditional_fraction: float, rng: Rng
) -> list[Part]:
    """A picture that is drawn as one of its prompts asks; unasked for a share, or without any."""
    if not prompts or rng.random() < unconditional_fraction:
        return drawing(None, number)
    plain = rng.random() < 0.5  # half of the prompts are the first, the plain one
    return drawing(prompts[0] if plain else one_of(prompts, rng), number)


def by_shares(until: np.ndarray, rng: Rng) -> int:
    """A number drawn by shares that `until` adds up; one without a share is never drawn."""
    return int(np.searchsorted(until, rng.random() * until[-1], side="right"))

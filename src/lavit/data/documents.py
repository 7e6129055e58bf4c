"""Documents of stage 2, drawn from a corpus and packed into rows; a batch is a function of (seed, step).

    reading    [image read] caption .                     writing    prompt [image written]
    question   [image read] Question: … Answer: | answer  edit       [image] … instruction | [image written]
    text       prompt-like text .                         (what stands before | gives no loss)

A picture that has several questions is asked up to `ASKED` of them in one document, since reading it is most of the cost.

Each document comes from one source of the corpus, chosen by the sources' weights, and is of a kind that this source has. A
source of texts gives pieces of them (data/text.py). A share of the writing documents loses its prompt: what is left, a bare
image, trains the unconditional branch of guidance. Images inside a prompt for writing enter as codes, images that are read
as features (method, Sec. 3 and 5).

Some steps share a window of rows: documents are drawn until they would overflow it, then spread over its rows. So rows are
full, each holds long documents and short ones, and no length is favoured (`fill_from_front`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from transformers import PreTrainedTokenizerBase

from lavit.config import InputError, LanguageTraining
from lavit.data.corpus import Corpus, Part
from lavit.data.text import TextPieces
from lavit.sequence import Batch, Document, Image, Sequence, Text, fill_from_front, lay_out, pack, supervise_some
from lavit.vocabulary import Vocabulary

KINDS = ("reading", "writing", "question", "edit", "text")
ASKED = 4  # questions of one document
WINDOW = 64  # rows that are filled together, at least


def question_text(question: str) -> str:
    """The paper's prompt for questions."""
    return f"Question: {question} Answer:"


def answer_text(answer: str) -> str:
    """An answer as it follows the prompt."""
    return f" {answer}"


class Source:
    """One part of a corpus as a source of documents: its kinds and their shares."""

    def __init__(self, part: Part, corpus: Corpus, mixture: tuple[float, ...]) -> None:
        self.part = part
        self.read = [number for number in part.pictures if corpus.pictures[number].captions]
        self.written = [number for number in part.pictures if corpus.pictures[number].prompts]
        have = (self.read, self.written, part.questions, part.edits, self.written)
        weights = np.array([weight * (len(items) > 0) for weight, items in zip(mixture, have, strict=True)])
        if len(part.texts):
            weights = np.eye(len(KINDS))[-1]
        if weights.sum() <= 0:
            raise InputError(
                f"the source {part.name!r} gives no document: it has pictures for {len(self.read)} readings and "
                f"{len(part.questions)} questions, the mixture of kinds is {mixture}"
            )
        self.until = np.cumsum(weights / weights.sum())


class Documents:
    """Draws documents of a corpus; `codes[picture]` are the stage-1 codes."""

    def __init__(
        self,
        corpus: Corpus,
        codes: tuple[tuple[int, ...], ...],
        *,
        text: PreTrainedTokenizerBase,
        vocabulary: Vocabulary,
        config: LanguageTraining,
        seed: int,
    ) -> None:
        self.corpus, self.codes = corpus, codes
        self.vocabulary, self.config, self.seed = vocabulary, config, seed
        self.tokenizer = text
        self._ids: dict[str, tuple[int, ...]] = {}
        self._window: tuple[int, list[list[Sequence]]] | None = None
        self._asked: dict[int, list[int]] = {}
        for number, question in enumerate(corpus.questions):
            self._asked.setdefault(question.picture, []).append(number)
        self.sources = [Source(part, corpus, config.mixture) for part in corpus.parts]
        weights = np.array([part.weight for part in corpus.parts])
        self.until = np.cumsum(weights / weights.sum())
        self.pieces = {
            number: TextPieces(part.texts, text, config.tokens)
            for number, part in enumerate(corpus.parts)
            if len(part.texts)
        }

    def ids(self, text: str) -> tuple[int, ...]:
        """Text ids, without the tokenizer's own begin and end."""
        if text not in self._ids:
            self._ids[text] = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._ids[text]

    def draw(self, rng: np.random.Generator) -> Document:
        """One document."""
        number = _kind(self.until, rng)
        if number in self.pieces:
            return (self.pieces[number].draw(rng),)
        source = self.sources[number]
        kind = KINDS[_kind(source.until, rng)]
        make: Callable[[Source, np.random.Generator], Document] = getattr(self, f"_{kind}")
        return make(source, rng)

    def _image(self, picture: int, *, read: bool, target: bool = True) -> Image:
        return Image(self.codes[picture], read=read, index=picture, target=target)

    def _reading(self, source: Source, rng: np.random.Generator) -> Document:
        number = _one(source.read, rng)
        captions = self.corpus.pictures[number].captions
        return self._image(number, read=True), Text(self.ids(captions[rng.integers(len(captions))]))

    def _writing(self, source: Source, rng: np.random.Generator) -> Document:
        number = _one(source.written, rng)
        prompts = self.corpus.pictures[number].prompts
        image = self._image(number, read=False)
        if rng.random() < self.config.unconditional_fraction:
            return (image,)
        plain = rng.random() < 0.5  # half of the prompts are the first, the plain one
        return Text(self.ids(prompts[0 if plain else rng.integers(len(prompts))])), image

    def _question(self, source: Source, rng: np.random.Generator) -> Document:
        picture = self.corpus.questions[_one(source.part.questions, rng)].picture
        asked = [self.corpus.questions[number] for number in rng.permutation(self._asked[picture])[:ASKED]]
        segments: list[Text | Image] = [self._image(picture, read=True, target=False)]
        for one in asked:  # every answer ends as the only one does
            segments.append(Text(self.ids(question_text(one.question)), target=False))
            segments.append(Text((*self.ids(answer_text(one.answer)), self.vocabulary.end), closes=False))
        return tuple(segments)

    def _edit(self, source: Source, rng: np.random.Generator) -> Document:
        edit = self.corpus.edits[_one(source.part.edits, rng)]
        return (
            *(self._image(picture, read=False, target=False) for picture in edit.sources),
            Text(self.ids(edit.prompt), target=False),
            self._image(edit.target, read=False),
        )

    def _text(self, source: Source, rng: np.random.Generator) -> Document:
        prompts = self.corpus.pictures[_one(source.written, rng)].prompts
        return (Text(self.ids(prompts[rng.integers(len(prompts))])),)

    def _drawn(self, window: int) -> Iterator[Sequence]:
        rng = np.random.default_rng([self.seed, window])
        while True:
            laid = lay_out(self.draw(rng), self.vocabulary, supervise_read_images=self.config.supervise_read_images)
            yield supervise_some(laid, self.config.read_share, rng)

    def _rows(self, window: int, rows: int) -> list[list[Sequence]]:
        """Documents of each row of a window; the last one is kept, since steps come in order."""
        if self._window is None or self._window[0] != window:
            drawn, total = [], 0
            for sequence in self._drawn(window):
                drawn.append(sequence)
                total += len(sequence)
                if total > rows * self.config.tokens:
                    break
            filled = fill_from_front([len(sequence) for sequence in drawn], rows, self.config.tokens)
            order = np.random.default_rng([self.seed, window, 1]).permutation(rows)
            self._window = (window, [[drawn[number] for number in filled[row]] for row in order])
        return self._window[1]

    def batch(self, step: int) -> Batch:
        """Rows of a step."""
        steps = -(-WINDOW // self.config.rows)
        rows = self._rows(step // steps, steps * self.config.rows)
        first = step % steps * self.config.rows
        return pack(rows[first : first + self.config.rows], self.vocabulary, tokens=self.config.tokens)


def _one(numbers: list[int] | range, rng: np.random.Generator) -> int:
    return numbers[int(rng.integers(len(numbers)))]


def _kind(until: np.ndarray, rng: np.random.Generator) -> int:
    """A number drawn by shares that `until` adds up; one without a share is never drawn."""
    return int(np.searchsorted(until, rng.random() * until[-1], side="right"))

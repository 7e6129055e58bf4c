"""Documents of stage 2, drawn from a corpus and packed into rows; a batch is a function of (seed, step).

    reading    [image read] caption .                     writing    prompt [image written]
    question   [image read] Question: … Answer: | answer  edit       [image] instruction | [image written]
    text       prompt-like text .                         (what stands before | gives no loss)

A share of the writing documents loses its prompt: what is left, a bare image, trains the unconditional branch of
guidance. Images inside a prompt for writing enter as codes, images that are read as features (method, Sec. 3 and 5).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from transformers import PreTrainedTokenizerBase

from lavit.config import InputError, LanguageTraining
from lavit.data.corpus import Corpus
from lavit.sequence import Batch, Document, Image, Sequence, Text, lay_out, pack
from lavit.vocabulary import Vocabulary

KINDS = ("reading", "writing", "question", "edit", "text")
MISSES = 32  # documents in a row that fit nowhere before a batch counts as full


def question_text(question: str) -> str:
    """The paper's prompt for questions."""
    return f"Question: {question} Answer:"


def answer_text(answer: str) -> str:
    """An answer as it follows the prompt."""
    return f" {answer}"


class Documents:
    """Draws documents of a corpus; `codes[picture * views + view]` are the stage-1 codes."""

    def __init__(
        self,
        corpus: Corpus,
        codes: tuple[tuple[int, ...], ...],
        *,
        views: int,
        text: PreTrainedTokenizerBase,
        vocabulary: Vocabulary,
        config: LanguageTraining,
        seed: int,
    ) -> None:
        self.corpus, self.codes, self.views = corpus, codes, views
        self.vocabulary, self.config, self.seed = vocabulary, config, seed
        self.tokenizer = text
        self._ids: dict[str, tuple[int, ...]] = {}
        have = {"question": bool(corpus.questions), "edit": bool(corpus.edits)}
        weights = np.array([w * have.get(kind, True) for kind, w in zip(KINDS, config.mixture, strict=True)])
        if weights.sum() <= 0:
            raise InputError("the mixture of documents is all zero: give reading or writing a weight")
        self.weights = weights / weights.sum()

    def ids(self, text: str) -> tuple[int, ...]:
        """Text ids, without the tokenizer's own begin and end."""
        if text not in self._ids:
            self._ids[text] = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._ids[text]

    def draw(self, rng: np.random.Generator) -> Document:
        """One document."""
        kind = KINDS[rng.choice(len(KINDS), p=self.weights)]
        make: Callable[[np.random.Generator], Document] = getattr(self, f"_{kind}")
        return make(rng)

    def _image(self, picture: int, rng: np.random.Generator, *, read: bool, target: bool = True) -> Image:
        row = picture * self.views + (int(rng.integers(self.views)) if read else 0)
        return Image(self.codes[row], read=read, index=row, target=target)

    def _reading(self, rng: np.random.Generator) -> Document:
        number = int(rng.integers(len(self.corpus)))
        captions = self.corpus.pictures[number].captions
        return self._image(number, rng, read=True), Text(self.ids(captions[rng.integers(len(captions))]))

    def _writing(self, rng: np.random.Generator) -> Document:
        number = int(rng.integers(len(self.corpus)))
        prompts = self.corpus.pictures[number].prompts
        image = self._image(number, rng, read=False)
        if rng.random() < self.config.unconditional_fraction:
            return (image,)
        plain = rng.random() < 0.5  # half of the prompts are the first, the plain one
        return Text(self.ids(prompts[0 if plain else rng.integers(len(prompts))])), image

    def _question(self, rng: np.random.Generator) -> Document:
        asked = self.corpus.questions[rng.integers(len(self.corpus.questions))]
        image = self._image(asked.picture, rng, read=True, target=False)
        prompt = Text(self.ids(question_text(asked.question)), target=False)
        return image, prompt, Text(self.ids(answer_text(asked.answer)))

    def _edit(self, rng: np.random.Generator) -> Document:
        edit = self.corpus.edits[rng.integers(len(self.corpus.edits))]
        source = self._image(edit.source, rng, read=False, target=False)
        return (
            source,
            Text(self.ids(edit.prompt), target=False),
            self._image(edit.target, rng, read=False),
        )

    def _text(self, rng: np.random.Generator) -> Document:
        prompts = self.corpus.pictures[rng.integers(len(self.corpus))].prompts
        return (Text(self.ids(prompts[rng.integers(len(prompts))])),)

    def batch(self, step: int) -> Batch:
        """Rows of a step: documents are drawn until nothing more fits, each into the first row with room."""
        rng = np.random.default_rng([self.seed, step])
        rows: list[list[Sequence]] = [[] for _ in range(self.config.rows)]
        room = [self.config.tokens] * self.config.rows
        missed = 0
        while missed < MISSES:
            document = lay_out(
                self.draw(rng),
                self.vocabulary,
                supervise_read_images=self.config.supervise_read_images,
            )
            if len(document) > self.config.tokens:
                raise InputError(f"a document has {len(document)} tokens, a row {self.config.tokens}: use longer rows")
            place = next((r for r, free in enumerate(room) if free >= len(document)), None)
            if place is None:
                missed += 1
                continue
            rows[place].append(document)
            room[place] -= len(document)
        return pack(rows, self.vocabulary, tokens=self.config.tokens)

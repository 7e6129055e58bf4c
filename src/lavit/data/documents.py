"""Documents of stage 2, drawn from a corpus and packed into rows; a batch is a function of (seed, step).

    reading    [image read] caption .                     writing    prompt [image written]
    question   [image read] Question: … Answer: | answer  edit       [image] instruction | [image written]
    text       prompt-like text .                         (what stands before | gives no loss)

Behind a picture that is read stands what a memory tells of it, where the model has one (modules/memory.py), without loss; and
before a prompt or an edit what the memory shows of it. Half of them are not shown the picture that is wanted: the model is to
copy what is right, and to draw what is not there.
A picture that has several questions is asked up to `ASKED` of them in one document, since reading it is most of the cost.

Each document comes from one source of the corpus, chosen by the sources' weights, and is of a kind that this source has. A
source of texts gives pieces of them (data/text.py). A share of the writing documents loses its prompt: what is left, a bare
image, trains the unconditional branch of guidance. Images inside a prompt for writing enter as codes, images that are read
as features (method, Sec. 3 and 5).

Some steps share a window of rows: documents are drawn until they would overflow it, then spread over its rows. So rows are
full, each holds long documents and short ones, and no length is favoured (`fill_from_front`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lavit.config import InputError, LanguageTraining
from lavit.data.corpus import Corpus, Part
from lavit.data.text import TextPieces
from lavit.modules.memory import Memory
from lavit.sequence import Batch, Document, Image, Segment, Sequence, Text, fill_from_front, lay_out, pack
from lavit.vocabulary import Vocabulary

KINDS = ("reading", "writing", "question", "edit", "text")
ASKED = 4  # questions of one document
HIDDEN = 0.5  # of the pictures that are written are not among those that the memory shows before their prompt
WINDOW = 64  # rows that are filled together, at least


def question_text(question: str) -> str:
    """The paper's prompt for questions."""
    return f"Question: {question} Answer:"


def answer_text(answer: str) -> str:
    """An answer as it follows the prompt."""
    return f" {answer}"


def recalled_text(texts: list[str]) -> str:
    """What a memory tells with a picture, right behind it: a line for each text. A picture that it shows has one too."""
    return "".join(f"{text}\n" for text in texts)


def shown_segments(memory: Memory, numbers: Iterable[int], ids: Callable[[str], tuple[int, ...]]) -> Iterator[Segment]:
    """Remembered pictures as they stand before what is drawn from: codes and text of each."""
    for number in numbers:
        yield Image(memory.codes_of(number), read=False, target=False)
        yield Text(ids(recalled_text([memory.text_of(number)])), target=False)


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
    """Draws documents of a corpus; `codes[picture * views + view]` are the stage-1 codes, `told` what a memory tells there."""

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
        told: list[list[str]] | None = None,
        memory: Memory | None = None,
        remembered: list[int] | None = None,
        shown: int = 0,
    ) -> None:
        """`memory` holds the pictures that are `remembered`, in this order, and shows up to `shown` before a prompt."""
        self.memory, self.shown = memory, shown
        self.places = {number: place for place, number in enumerate(remembered or ())}
        self.corpus, self.codes, self.views, self.told = corpus, codes, views, told
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

    def _image(self, picture: int, rng: np.random.Generator, *, read: bool, target: bool = True) -> Image:
        row = picture * self.views + (int(rng.integers(self.views)) if read else 0)
        codes = self.codes[row]
        if read and self.config.thinned:  # how many are left; which ones is drawn with the patches (train/language.py)
            codes = codes[: thinned_count(len(codes), self.config.thinned, rng)]
        return Image(codes, read=read, index=row, target=target)

    def _read(self, picture: int, rng: np.random.Generator, *, target: bool = True) -> Document:
        """A picture that is read, and what a memory tells of it."""
        image = self._image(picture, rng, read=True, target=target)
        if self.told is None:
            return (image,)
        return image, Text(self.ids(recalled_text(self.told[image.index])), target=False)

    def _reading(self, source: Source, rng: np.random.Generator) -> Document:
        number = _one(source.read, rng)
        captions = self.corpus.pictures[number].captions
        return *self._read(number, rng), Text(self.ids(captions[rng.integers(len(captions))]))

    def _writing(self, source: Source, rng: np.random.Generator) -> Document:
        number = _one(source.written, rng)
        prompts = self.corpus.pictures[number].prompts
        image = self._image(number, rng, read=False)
        if rng.random() < self.config.unconditional_fraction:
            return (image,)
        plain = rng.random() < 0.5  # half of the prompts are the first, the plain one
        prompt = prompts[0 if plain else rng.integers(len(prompts))]
        return *self._shown(prompt, number, rng), Text(self.ids(prompt)), image

    def _shown(
        self, prompt: str, picture: int, rng: np.random.Generator, *, source: int | None = None
    ) -> Iterator[Segment]:
        """What a memory shows of a prompt for a picture, or for an edit of `source`: half of the time not itself."""
        memory = self.memory
        if memory is None or not self.shown or (source is not None and source not in self.places):
            return
        hidden = [self.places[picture]] if picture in self.places and rng.random() < HIDDEN else []
        if source is None:
            numbers = memory.mentioned(prompt, self.shown, without=hidden)
        else:
            place = self.places[source]
            text, manner = memory.text_of(place), float(memory.manners[place])
            numbers = memory.changed(text, manner, prompt, self.shown, without=[*hidden, place])
        yield from shown_segments(memory, numbers, self.ids)

    def _question(self, source: Source, rng: np.random.Generator) -> Document:
        picture = self.corpus.questions[_one(source.part.questions, rng)].picture
        asked = [self.corpus.questions[number] for number in rng.permutation(self._asked[picture])[:ASKED]]
        segments: list[Text | Image] = [*self._read(picture, rng, target=False)]
        for one in asked:  # every answer ends as the only one does
            segments.append(Text(self.ids(question_text(one.question)), target=False))
            segments.append(Text((*self.ids(answer_text(one.answer)), self.vocabulary.end), closes=False))
        return tuple(segments)

    def _edit(self, source: Source, rng: np.random.Generator) -> Document:
        edit = self.corpus.edits[_one(source.part.edits, rng)]
        return (
            *self._shown(edit.prompt, edit.target, rng, source=edit.source),
            self._image(edit.source, rng, read=False, target=False),
            Text(self.ids(edit.prompt), target=False),
            self._image(edit.target, rng, read=False),
        )

    def _text(self, source: Source, rng: np.random.Generator) -> Document:
        prompts = self.corpus.pictures[_one(source.written, rng)].prompts
        return (Text(self.ids(prompts[rng.integers(len(prompts))])),)

    def _drawn(self, window: int) -> Iterator[Sequence]:
        rng = np.random.default_rng([self.seed, window])
        while True:
            yield lay_out(self.draw(rng), self.vocabulary, supervise_read_images=self.config.supervise_read_images)

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


def thinned_count(count: int, most: float, rng: np.random.Generator) -> int:
    """How many of `count` patches are left where a random share of at most `most` is left out: one at least."""
    return max(1, round(count * (1 - most * rng.random())))


def thin(keep: Bool[Tensor, "patches"], count: int, rng: np.random.Generator) -> Bool[Tensor, "patches"]:
    """A mask of `count` of the kept patches."""
    kept = keep.nonzero()[:, 0]
    if count == len(kept):
        return keep
    return torch.zeros_like(keep).index_fill(0, kept[torch.from_numpy(rng.permutation(len(kept))[:count])], True)


def _one(numbers: list[int] | range, rng: np.random.Generator) -> int:
    return numbers[int(rng.integers(len(numbers)))]


def _kind(until: np.ndarray, rng: np.random.Generator) -> int:
    """A number drawn by shares that `until` adds up; one without a share is never drawn."""
    return int(np.searchsorted(until, rng.random() * until[-1], side="right"))

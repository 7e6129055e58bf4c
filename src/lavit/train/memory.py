"""The memory of a training corpus, and what it tells of the corpus's own pictures (modules/memory.py).

What is told in training must be as often right as what will be told in use, or the LM learns to mistrust it. So a picture
does not recall itself, but its moved and redrawn views recall it, as a known thing in another hand does; and all are compared
under a metric that was fitted without their text (two folds). Time grows with the square of the number of pictures: 4,598 of
them, described by 3,520 numbers each, take 46 seconds of two cores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lavit.data.corpus import Corpus
from lavit.data.features import Features
from lavit.modules.memory import Memory
from lavit.train.reader import SAY_NOTHING

FOLDS = 2


def remembered_texts(corpus: Corpus) -> list[str]:
    """What a memory keeps of each picture: its first caption, else its answers that are not yes or no, else nothing."""
    answers: list[set[str]] = [set() for _ in corpus.pictures]
    for question in corpus.questions:
        if question.answer not in SAY_NOTHING:
            answers[question.picture].add(question.answer)
    said = (
        p.captions[0] if p.captions else ", ".join(sorted(a)) for p, a in zip(corpus.pictures, answers, strict=True)
    )
    return [text.strip().removesuffix(".") for text in said]


def remember(corpus: Corpus, features: Features, count: int) -> tuple[Memory, list[list[str]]]:
    """The memory of a corpus, and the `count` texts told with each row of its features."""
    texts = remembered_texts(corpus)
    rows = torch.from_numpy(features.described.astype("float32")).view(len(features), features.views, -1)
    kept = [number for number, text in enumerate(texts) if text]
    memory = _memory(rows, texts, kept)
    place = {number: at for at, number in enumerate(kept)}
    fold_of = {text: number % FOLDS for number, text in enumerate(memory.texts)}
    told: list[list[str]] = [[] for _ in range(len(features.array))]
    for fold in range(FOLDS):
        others = [number for number in kept if fold_of[texts[number]] != fold]
        judge = _memory(rows, texts, others or kept).emptied()  # one text alone has no others
        judge.add(rows[kept, 0], [texts[number] for number in kept])
        for number in (n for n, text in enumerate(texts) if fold_of.get(text, 0) == fold):
            likeness = judge.likeness(rows[number])
            if number in place:
                likeness[0, place[number]] = -torch.inf
            first = number * features.views
            told[first : first + features.views] = judge.nearest(likeness, count)
    return memory, told


def _memory(rows: Float[Tensor, "pictures views described"], texts: Sequence[str], numbers: list[int]) -> Memory:
    """Of some of the pictures."""
    views = (rows[numbers, 1:] - rows[numbers, :1]).flatten(0, 1)
    return Memory.of(rows[numbers, 0], [texts[number] for number in numbers], views)

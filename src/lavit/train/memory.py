"""The memory of a training corpus, and what it tells of the corpus's own pictures (modules/memory.py).

Pictures and their moved and redrawn views recall what use would recall, the picture itself before all, under a metric that
was fitted without their text (two folds). What is told is then right more often than it will be of new pictures; a LM that
is told wrong more often learns its training pictures by heart instead, and trusts itself where it should not (LOG.md).
Time grows with the square of the number of pictures: 4,598 of them, described by 3,520 numbers each, take 46 seconds of two
cores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lavit.config import InputError
from lavit.data.corpus import Corpus
from lavit.data.features import Features
from lavit.images import to_image
from lavit.modules.memory import Memory
from lavit.sequence import VisualTokens
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


def remembered_pictures(corpus: Corpus) -> list[int]:
    """Numbers of the pictures that a memory of this corpus holds, in its order."""
    return [number for number, text in enumerate(remembered_texts(corpus)) if text]


def remember(corpus: Corpus, features: Features, tokens: VisualTokens, count: int) -> tuple[Memory, list[list[str]]]:
    """The memory of a corpus, and the `count` texts told with each row of its features."""
    texts = remembered_texts(corpus)
    codes = [part.tolist() for part in tokens.split()[:: features.views]]
    rows = torch.from_numpy(features.described.astype("float32")).view(len(features), features.views, -1)
    kept = remembered_pictures(corpus)
    memory = _memory(rows, texts, kept, codes)
    fold_of = {text: number % FOLDS for number, text in enumerate(memory.texts)}
    told: list[list[str]] = [[] for _ in range(len(features.array))]
    for fold in range(FOLDS):
        others = [number for number in kept if fold_of[texts[number]] != fold]
        judge = _memory(rows, texts, others or kept).emptied()  # one text alone has no others
        judge.add(rows[kept, 0], [texts[number] for number in kept])
        for number in (n for n, text in enumerate(texts) if fold_of.get(text, 0) == fold):
            first = number * features.views
            told[first : first + features.views] = judge.recall(rows[number], count)
    return memory, told


def remember_pictures(
    memory: Memory, corpus: Corpus, tokens: VisualTokens, pictures: Float[Tensor, "rows 3 size size"]
) -> Int[Tensor, "rows 2"]:
    """Give a memory copies of its pictures, of rows (picture and view) in -1..1; returns what a decoder is shown of them.

    For each row: the row of the remembered picture whose codes are most like its own, and of the likest other picture.
    """
    kept = remembered_pictures(corpus)
    if len(kept) != len(memory):
        raise InputError(
            f"the memory holds {len(memory)} pictures, this data {len(kept)}: train its language stage again"
        )
    views = len(pictures) // len(corpus)
    memory.keep_pictures([to_image(pictures[number * views]) for number in kept])
    place = {number: at for at, number in enumerate(kept)}
    rows = []
    for row, codes in enumerate(tokens.split()):
        own = [place[row // views]] if row // views in place else []
        found = (memory.likest(codes.tolist()), memory.likest(codes.tolist(), without=own))
        rows.append([kept[number] * views for number in found])
    return torch.tensor(rows)


def _memory(
    rows: Float[Tensor, "pictures views described"],
    texts: Sequence[str],
    numbers: list[int],
    codes: Sequence[Sequence[int]] | None = None,
) -> Memory:
    """Of some of the pictures."""
    views = (rows[numbers, 1:] - rows[numbers, :1]).flatten(0, 1)
    codes = codes and [codes[number] for number in numbers]
    return Memory.of(rows[numbers, 0], [texts[number] for number in numbers], views, codes)

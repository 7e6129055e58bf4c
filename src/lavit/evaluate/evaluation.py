"""What is measured: a run and its data (`lavit eval RUN`).

Of a mixture the first source is read, written and drawn; the others are asked about where they have a split `test`, and
texts alone are read where a file of held-out texts lies beside them. Held-out pictures are those of the starter data's
split `other_hand`: emoji that the run knows, in the hand it has not seen; `unseen` are families it has seen in neither. A
third artist is read where `lavit data third` has drawn one beside the first source, and of it the names that the run knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lavit.config import InputError, read_json
from lavit.data.corpus import Corpus, load_corpus, parse_mixture
from lavit.data.third import SPLIT, third_beside
from lavit.evaluate.image import Gallery, pooled
from lavit.evaluate.words import name_of
from lavit.generate.pipeline import Pipeline
from lavit.storage import WEIGHTS, model_folder

Progress = Callable[[str, int, int], None]
HELD_OUT = "other_hand"
READ = 400  # pictures of one kind that are read at most; of held-out ones all


@dataclass
class Evaluation:
    """A run and the data it is measured on; features are computed once."""

    pipeline: Pipeline
    data: str
    limit: int | None
    progress: Progress | None

    @cached_property
    def sources(self) -> list[str]:
        """The sources of the mixture, without their weights."""
        return [name for name, _ in parse_mixture(self.data)]

    @cached_property
    def train(self) -> Corpus:
        """Pictures of the first source that the run was trained on."""
        return load_corpus(Path(self.sources[0]))

    @cached_property
    def held_out(self) -> Corpus:
        """Known emoji in the hand that the run has not seen."""
        return load_corpus(Path(self.sources[0]), (HELD_OUT,))

    @cached_property
    def unseen(self) -> Corpus:
        """Emoji of families that the run has not seen in any hand."""
        return load_corpus(Path(self.sources[0]), ("unseen",))

    @cached_property
    def third(self) -> Corpus | None:
        """A choice of known names in the hand of an artist whom the run has not seen; None without such pictures."""
        folder = third_beside(Path(self.sources[0]))
        if folder is None:
            return None
        names = {name_of(picture) for picture in self.train.pictures}  # not `known`, which takes features
        known = [picture for picture in load_corpus(folder, (SPLIT,)).pictures if name_of(picture) in names]
        return Corpus(tuple(known[i] for i in self.some(READ, len(known)))) if known else None

    def patches(self, corpus: Corpus, what: str) -> Float[Tensor, "images patches dim"]:
        """Encoder features of a corpus."""
        parts = []
        for number, picture in enumerate(corpus.pictures):
            parts.append(self.pipeline.model.patches([picture.record.open()]))
            if self.progress and (number % 20 == 0 or number + 1 == len(corpus)):
                self.progress(f"features, {what}", number + 1, len(corpus))
        return torch.cat(parts)

    @cached_property
    def train_patches(self) -> Float[Tensor, "images patches dim"]:
        """Features of the training pictures."""
        return self.patches(self.train, "train")

    @cached_property
    def held_out_patches(self) -> Float[Tensor, "images patches dim"]:
        """Features of the held-out pictures."""
        return self.patches(self.held_out, "held out")

    @cached_property
    def unseen_patches(self) -> Float[Tensor, "images patches dim"]:
        """Features of the pictures of unseen families."""
        return self.patches(self.unseen, "unseen")

    @cached_property
    def third_patches(self) -> Float[Tensor, "images patches dim"]:
        """Features of the third artist's pictures."""
        return self.patches(self.third, "third artist")

    @cached_property
    def known(self) -> Gallery:
        """The training pictures."""
        return Gallery(pooled(self.train_patches), tuple(name_of(picture) for picture in self.train.pictures))

    @cached_property
    def gallery(self) -> Gallery:
        """Every real picture, all names."""
        parts = [self.train_patches, self.held_out_patches, self.unseen_patches]
        names = [name_of(p) for corpus in (self.train, self.held_out, self.unseen) for p in corpus.pictures]
        return Gallery(torch.cat([pooled(part) for part in parts]), tuple(names))

    def some(self, count: int, of: int, *, seed: int = 0) -> list[int]:
        """Numbers of a fixed random choice."""
        chosen = np.random.default_rng([seed, of]).permutation(of)[: min(count, of, self.limit or of)]
        return sorted(chosen.tolist())


def trained_on(model: str | Path) -> str:
    """The mixture that a run or shipped model was trained on; `InputError` if a shipped one's is not built yet."""
    folder = model_folder(model)
    data: str = read_json(folder / "training.json")["data"]
    missing = [name for name, _ in parse_mixture(data) if not Path(name).exists()]
    if missing and folder.parent == WEIGHTS:
        raise InputError(f"{', '.join(missing)} missing: lavit data {folder.name} builds it, or give --data")
    return data

"""What stages 1 and 3 see of a step: pictures of a corpus, encoded beforehand, or of streams.

A corpus gives batches that are functions of (seed, step), the same on one rank and on two. A stream
goes forward only: every rank reads its own part of it, keeps no more than two batches, and its
place is saved with the stage. Codes and features of a picture are the same on both ways.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from jaxtyping import Float, Int
from PIL.Image import Image
from torch import Tensor

from lavit.config import InputError
from lavit.data.features import HALF, Features, Pictures
from lavit.data.stream import StreamedPictures
from lavit.images import scale_levels
from lavit.train.batches import Shard, draw_batch, draw_pictures

T = TypeVar("T")
State = dict[str, Tensor]


@dataclass(frozen=True)
class FeatureBatch:
    """Features of pictures of this rank, fp16 where they are streamed, and their places in the
    global batch, which seed their noise.
    """

    patches: Float[Tensor, "images patches dim"]
    places: Int[Tensor, "images"]


@dataclass(frozen=True)
class PixelBatch:
    """Pictures of this rank in -1..1, their codes, codes to err with, and places as above."""

    pictures: Float[Tensor, "images 3 size size"]
    codes: Sequence[Tensor]
    others: Sequence[Tensor]
    places: Int[Tensor, "images"]


class _Corpus:
    """A corpus has no place to save: a batch is a function of the step."""

    def state(self) -> State:
        return {}

    def load_state(self, state: State) -> None:
        if state:
            said = "this stage was begun on a stream"
            raise InputError(f"{said}: go on with --stream, or give another --out")


class CorpusFeatures(_Corpus):
    """Features of a corpus, encoded beforehand."""

    def __init__(self, features: Features, *, batch: int, seed: int) -> None:
        self.features, self.size, self.seed = features, batch, seed

    def batch(self, step: int, shard: Shard) -> FeatureBatch:
        """Pictures of a step: epoch after epoch in new orders."""
        drawn = draw_batch(len(self.features), self.size, shard, seed=self.seed, step=step)
        return FeatureBatch(self.features.rows(drawn.pictures), drawn.places)

    def some(self, count: int) -> Float[Tensor, "images patches dim"]:
        """Features of pictures drawn at random."""
        all_ = len(self.features)
        return self.features.rows(draw_pictures(all_, min(all_, count), seed=self.seed, step=0))


class CorpusPixels(_Corpus):
    """Pictures of a corpus, opened when their step comes, and their codes."""

    def __init__(
        self,
        pictures: Pictures,
        codes: Sequence[Tensor],
        *,
        batch: int,
        seed: int,
    ) -> None:
        self.pictures, self.codes, self.size, self.seed = pictures, codes, batch, seed

    def batch(self, step: int, shard: Shard) -> PixelBatch:
        """Pictures of a step: epoch after epoch in new orders."""
        drawn = draw_batch(len(self.pictures), self.size, shard, seed=self.seed, step=step)
        codes = [self.codes[number] for number in drawn.pictures.tolist()]
        return PixelBatch(self.pictures.rows(drawn.pictures), codes, self.codes, drawn.places)


class _Streamed(Generic[T]):
    """Pictures of a stream; a step's, of this rank, are kept until the next step."""

    def __init__(
        self,
        data: str,
        make: Callable[[list[Image]], Sequence[T]],
        *,
        batch: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if batch % ranks:
            said = f"a batch of {batch} pictures cannot be shared by {ranks} ranks"
            raise InputError(f"{said}: give a multiple")
        self.data, self.make, self.size, self.seed, self.ranks = data, make, batch, seed, ranks
        how = {"seed": seed, "rank": rank, "ranks": ranks}
        self.stream = StreamedPictures(data, make, count=batch // ranks, **how)
        self._step = -1
        self._kept: list[T] = []

    def _part(self, step: int, shard: Shard) -> tuple[list[T], Int[Tensor, "images"]]:
        """What a part of a step holds, and its places in the global batch."""
        if self.size % shard.ranks:
            said = f"a batch of {self.size} pictures cannot be shared by {shard.ranks} ranks"
            raise InputError(f"{said} (or parts of a step): give a multiple")
        if step != self._step:
            self._step, self._kept = step, self.stream.ahead.take()
        parts = shard.ranks // self.ranks
        mine = Shard(shard.rank % parts, parts).of(torch.arange(len(self._kept)))
        return [self._kept[number] for number in mine], shard.of(torch.arange(self.size))

    def state(self) -> State:
        """Places of all processes."""
        return {"stream": self.stream.ahead.state()}

    def load_state(self, state: State) -> None:
        """Go on from there."""
        if "stream" not in state:
            said = "this stage was begun without a stream"
            raise InputError(f"{said}: leave --stream out, or give another --out")
        self.stream.ahead.load_state(state["stream"])
        self._step = -1


class StreamedFeatures(_Streamed[Tensor]):
    """Features of a stream; `make` encodes pictures, one tensor [patches dim] (fp16) each."""

    def batch(self, step: int, shard: Shard) -> FeatureBatch:
        """The next pictures, if the step is a new one."""
        found, places = self._part(step, shard)
        return FeatureBatch(torch.stack(found), places)

    def some(self, count: int) -> Float[Tensor, "images patches dim"]:
        """Features of the first pictures of the whole stream, whatever the rank."""
        first = StreamedPictures(self.data, self.make, count=count, seed=self.seed).read()
        return torch.stack(first).float()


class StreamedPixels(_Streamed[tuple[Tensor, Tensor]]):
    """Pictures of a stream; `make` gives each as levels [3 size size] (0..255) and its codes."""

    def batch(self, step: int, shard: Shard) -> PixelBatch:
        """The next pictures, if the step is a new one; `others` are those of this rank's step."""
        found, places = self._part(step, shard)
        pictures, codes = zip(*found, strict=True)
        others = [codes for _, codes in self._kept]
        return PixelBatch(scale_levels(torch.stack(pictures), HALF, HALF), codes, others, places)


FeatureFeed = CorpusFeatures | StreamedFeatures
PixelFeed = CorpusPixels | StreamedPixels

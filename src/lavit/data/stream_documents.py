"""Documents of stage 2 from streams: pictures are encoded block by block and become documents as
data/documents.py makes them (reading, writing, texts of sources without pictures). Other kinds of
the mixture need a whole data set: they are left out, which is said.

Rows are filled window by window with the documents in the order of the stream, so none is lost but
broken pictures and documents longer than a row, which are counted and named.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image as Picture
from torch import Tensor

from lavit.config import InputError
from lavit.data.corpus import Picture as PictureTexts
from lavit.data.corpus import picture_of
from lavit.data.documents import WINDOW, Rng, Rows, asked_for, one_of
from lavit.data.stream import UNUSABLE, Ahead, StreamPlace, Streams, Taken
from lavit.data.text import cut
from lavit.layout import reading
from lavit.sequence import Batch, VisualTokens, lay_out
from lavit.sequence import Sequence as Document

log = logging.getLogger(__name__)
RECORDS = 32  # that are read and encoded together
Encode = Callable[[list[Picture.Image]], tuple[Float[Tensor, "images patches dim"], VisualTokens]]
Shown = tuple[Float[Tensor, "images patches dim"], Bool[Tensor, "images patches"]]


@dataclass(frozen=True)
class Block:
    """Documents of some records, and where the streams stood before them.

    Read pictures are numbered within the block; `patches` (fp16) and `keep` are theirs alone.
    """

    start: StreamPlace
    documents: tuple[Document, ...]
    patches: dict[int, Tensor]
    keep: dict[int, Tensor]


class StreamingDocuments(Rows):
    """Packed rows of this process from streams; call `batch` step after step.

    `config.rows` are those of all processes; `encode` gives features and tokens of pictures,
    `sizes` are the number of patches and their channels. Rows are made ahead on a thread.
    """

    def __init__(
        self,
        data: str,
        encode: Encode,
        *,
        sizes: tuple[int, int],
        rank: int = 0,
        ranks: int = 1,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        config = self.config
        if config.rows % ranks:
            rows = f"{config.rows} rows a step"
            raise InputError(f"{rows} cannot be shared evenly by {ranks} processes of a stream")
        self.streams = Streams(data, seed=self.seed, rank=rank, ranks=ranks)
        self.left_out = self.streams.left_out
        self.encode, self.sizes, self.rank = encode, sizes, rank
        self.rows = config.rows // ranks
        kinds = config.mixture
        lost = {k: v for k, v in vars(kinds).items() if v and k not in ("reading", "writing")}
        if lost and not rank:
            log.warning("a stream gives no documents of the kinds %s", ", ".join(lost))
        both = kinds.reading + kinds.writing
        self.reading = kinds.reading / both if both else 1.0
        self._blocks: list[Block] = []  # read, and not all of it served
        self._skip = 0  # documents of the first block that earlier windows took
        self._read = 0  # number of the next block
        self._window: list[list[tuple[Block, Document]]] = []
        self._served = 0  # rows of the window
        self._start = self._here()  # where the window began
        self._ahead = Ahead(self._next, self._place, self._go_to, rank=rank, ranks=ranks)

    def batch(self, step: int) -> Batch:
        """The next rows; `images` number the pictures of `pictures`. Steps must come in order."""
        batch, self._patches, self._keep = self._ahead.take()
        return batch

    def pictures(self, images: Int[Tensor, "images"]) -> Shown:
        """Features (fp16) and masks of pictures of the last batch."""
        return self._patches[images], self._keep[images]

    def state(self) -> UInt8[Tensor, "bytes"]:
        """The place behind the last batch; every process must call."""
        return self._ahead.state()

    def load_state(self, state: UInt8[Tensor, "bytes"]) -> None:
        """Go to where `state` was taken: the window is read again, what was served passed over."""
        self._ahead.load_state(state)

    def _next(self) -> tuple[Batch, Tensor, Tensor]:
        """Rows, and features and masks of the pictures that they read."""
        if self._served == len(self._window):
            self._fill()
        rows = self._window[self._served : self._served + self.rows]
        self._served += self.rows
        served = [(block, document) for row in rows for block, document in row]
        shown = [(block, image) for block, document in served for image in document.images]
        patches = torch.zeros(0, *self.sizes, dtype=torch.half)
        keep = torch.zeros(0, self.sizes[0], dtype=torch.bool)
        if shown:
            patches = torch.stack([block.patches[image] for block, image in shown])
            keep = torch.stack([block.keep[image] for block, image in shown])
        packed = self.pack([[document for _, document in row] for row in rows])
        return replace(packed, images=torch.arange(len(shown))), patches, keep

    def _fill(self) -> None:
        """A new window: as many of the next documents as fit together."""
        rows, empty = self.rows * -(-WINDOW // self.rows), 0
        while sum(len(one) for _, one in self._waiting()) <= rows * self.config.tokens:
            self._blocks.append(self._next_block())
            empty = 0 if self._blocks[-1].documents else empty + 1
            if empty * RECORDS >= UNUSABLE:
                raise self.streams.nothing(empty * RECORDS)
        self._start = {**self._blocks[0].start, "skip": self._skip}
        waiting = self._waiting()
        lengths, seed = [len(one) for _, one in waiting], [self.seed, self.rank, self._read, 1]
        filled = self.spread(lengths, rows, seed)
        self._window = [[waiting[number] for number in row] for row in filled]
        self._skip += sum(map(len, filled))
        while self._blocks and self._skip >= len(self._blocks[0].documents):
            self._skip -= len(self._blocks.pop(0).documents)
        self._served = 0

    def _waiting(self) -> list[tuple[Block, Document]]:
        """Documents that are read and not served."""
        return [(block, one) for block in self._blocks for one in block.documents][self._skip :]

    def _here(self) -> StreamPlace:
        return {"streams": self.streams.state(), "block": self._read, "skip": 0}

    def _next_block(self) -> Block:
        start = self._here()
        rng = np.random.default_rng([self.seed, self.rank, self._read])
        self._read += 1
        documents: list[Document] = []
        pictures: list[tuple[Picture.Image, Taken]] = []
        for _ in range(RECORDS):
            taken = self.streams.take(rng)
            if taken.pictured:
                image = self.streams.open(taken)
                pictures += [(image, taken)] if image is not None else []
            elif texts := taken.record.texts:
                text = texts[int(rng.integers(len(texts)))]
                pieces = cut(self.ids(text), self.config.tokens, self.vocabulary.end)
                documents += [lay_out((piece,), self.vocabulary) for piece in pieces]
        patches: dict[int, Tensor] = {}
        keep: dict[int, Tensor] = {}
        if pictures:
            features, tokens = self.encode([image for image, _ in pictures])
            # the host waits on the stream's thread, once for all pictures of the block
            features, tokens = features.to("cpu", torch.half), tokens.cpu()
            both = zip(tokens.split(), pictures, strict=True)
            for number, (codes, (_, taken)) in enumerate(both):
                said = picture_of(taken.record)
                try:
                    documents.append(self._document(tuple(codes.tolist()), number, said, rng))
                except InputError as error:
                    self.streams.leave_out(taken, error)
                    continue
                if documents[-1].images:
                    patches[number] = features[number].clone()  # the others are not kept
                    keep[number] = tokens.keep[number]
        order = rng.permutation(len(documents))
        return Block(start, tuple(documents[number] for number in order), patches, keep)

    def _document(
        self, codes: tuple[int, ...], number: int, said: PictureTexts, rng: Rng
    ) -> Document:
        """A picture that is read or written; without a text for it, it is written unasked."""
        if rng.random() < self.reading and said.captions:
            parts = reading(number, one_of(said.captions, rng))
        else:
            parts = asked_for(said.prompts, number, self.config.unconditional_fraction, rng)
        return self.lay_out(self.segments(parts, lambda _: codes), rng)

    def _place(self) -> StreamPlace:
        return {"start": self._start, "served": self._served}

    def _go_to(self, place: StreamPlace) -> None:
        start = place["start"]
        self.streams.load_state(start["streams"])
        self._blocks, self._skip, self._read = [], start["skip"], start["block"]
        self._window, self._served = [], 0
        if place["served"]:
            self._fill()
            self._served = place["served"]

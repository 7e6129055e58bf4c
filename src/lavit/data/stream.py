"""Streams: sources that are read as they come (WebDataset tars, parquet shards, hub names).

Each process reads its own part of the shards and never looks ahead: pictures are encoded on the
fly, block by block, and become documents as data/documents.py makes them (reading, writing, text).
Rows are filled window by window with the documents in the order of the stream, so none is lost but
broken pictures and documents longer than a row, which are counted and named. The place in the
stream is a small JSON state; a run that resumes from it reads the same records, into the same rows.
(datasets' `IterableDataset.state_dict`.)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image as Picture
from torch import Tensor

from lavit.config import InputError, require
from lavit.data.corpus import Corpus, CorpusPart, parse_mixture
from lavit.data.documents import WINDOW, Rng, Rows, by_shares
from lavit.data.sources import Record, stream_source
from lavit.data.text import cut
from lavit.layout import drawing, reading
from lavit.sequence import Batch, Text, VisualTokens, lay_out
from lavit.sequence import Sequence as Document

BLOCK = 32  # records that are read and encoded together
EMPTY = 16  # blocks without any document before a stream is given up
Encode = Callable[[list[Picture.Image]], tuple[Float[Tensor, "images patches dim"], VisualTokens]]
Shown = tuple[Float[Tensor, "images patches dim"], Bool[Tensor, "images patches"]]


class Stream:
    """One source as an endless sequence of this process's records; its place can be saved."""

    def __init__(self, name: str, *, split: str = "train", rank: int = 0, ranks: int = 1) -> None:
        """Fewer shards than processes raise `InputError`: some would have nothing to read."""
        parts = require("datasets.distributed", extra="train")
        self.source, self.name = stream_source(name, split), name
        shards = self.source.rows.num_shards
        if shards < ranks:
            few = f"{name!r} has {shards} shards for {ranks} processes"
            raise InputError(f"{few}: make more shards, or start at most {shards} processes")
        self.rows = parts.split_dataset_by_node(self.source.rows, rank, ranks)
        self.epoch, self.taken = 0, 0  # records of this epoch
        self._records: Any = None

    def take(self) -> Record:
        """The next record; after the last comes the first again."""
        for _ in range(2):
            if self._records is None:
                self.rows.set_epoch(self.epoch)
                self._records = iter(self.rows)
            try:
                row = next(self._records, None)
            except Exception as error:  # whatever reads shards: a file of theirs is what is wrong
                said = " ".join(str(error).split())[:200]
                where = f"{self.name!r} is damaged behind record {self.taken}"
                raise InputError(f"{where}: {said or type(error).__name__}") from error
            if row is not None:
                self.taken += 1
                return self.source.record(row, f"streamed {self.taken}")
            self.epoch, self.taken, self._records = self.epoch + 1, 0, None
        raise InputError(f"{self.name!r} has no records for this process")

    def state(self) -> dict[str, Any]:
        """The place in the stream, as JSON data."""
        rows = None if self._records is None else self.rows.state_dict()
        return {"epoch": self.epoch, "taken": self.taken, "rows": rows}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to a place."""
        self.epoch, self.taken, self._records = state["epoch"], state["taken"], None
        if state["rows"] is not None:
            self.rows.set_epoch(self.epoch)
            self.rows.load_state_dict(state["rows"])
            self._records = iter(self.rows)


@dataclass(frozen=True)
class Block:
    """Documents of some records, and where the streams stood before them.

    Read pictures are numbered within the block.
    """

    start: dict[str, Any]
    documents: tuple[Document, ...]
    patches: Float[Tensor, "images patches dim"]
    keep: Bool[Tensor, "images patches"]


class StreamingDocuments(Rows):
    """Packed rows of this process from streams; call `batch` step after step.

    `config.rows` are those of all processes; `encode` gives features and tokens of pictures,
    `sizes` are the number of patches and their channels.
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
        config, mixture = self.config, parse_mixture(data)
        self.streams = [Stream(name, rank=rank, ranks=ranks) for name, _ in mixture]
        self.until = np.cumsum([weight for _, weight in mixture])
        if config.rows % ranks:
            rows = f"{config.rows} rows a step"
            raise InputError(f"{rows} cannot be shared evenly by {ranks} processes of a stream")
        self.encode, self.sizes, self.rank, self.ranks = encode, sizes, rank, ranks
        self.rows = config.rows // ranks
        kinds = config.mixture
        both = kinds.reading + kinds.writing
        self.reading = kinds.reading / both if both else 1.0
        self._blocks: list[Block] = []  # read, and not all of it served
        self._skip = 0  # documents of the first block that earlier windows took
        self._read = 0  # number of the next block
        self._window: list[list[tuple[Block, Document]]] = []
        self._served = 0  # rows of the window
        self._start: dict[str, Any] = {}  # where the window began

    def batch(self, step: int) -> Batch:
        """The next rows; `images` number the pictures of `pictures`. Steps must come in order."""
        if self._served == len(self._window):
            self._fill()
        rows = self._window[self._served : self._served + self.rows]
        self._served += self.rows
        served = [(block, document) for row in rows for block, document in row]
        shown = [(block, image) for block, document in served for image in document.images]
        self._patches, self._keep = self._no_pictures()
        if shown:
            self._patches = torch.stack([block.patches[image] for block, image in shown])
            self._keep = torch.stack([block.keep[image] for block, image in shown])
        packed = self.pack([[document for _, document in row] for row in rows])
        return replace(packed, images=torch.arange(len(shown)))

    def _no_pictures(self) -> Shown:
        return torch.zeros(0, *self.sizes), torch.zeros(0, self.sizes[0], dtype=torch.bool)

    def pictures(self, images: Int[Tensor, "images"]) -> Shown:
        """Features and masks of pictures of the last batch."""
        return self._patches[images], self._keep[images]

    def _fill(self) -> None:
        """A new window: as many of the next documents as fit together."""
        rows = self.rows * -(-WINDOW // self.rows)
        while sum(len(one) for _, one in self._waiting()) <= rows * self.config.tokens:
            self._blocks.append(self._next_block())
            empty = not any(block.documents for block in self._blocks[-EMPTY:])
            if len(self._blocks) >= EMPTY and empty:
                why = next(reversed(self.left_out.values()), "they hold nothing")
                raise InputError(f"{EMPTY * BLOCK} records in a row give no document: {why}")
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

    def _next_block(self) -> Block:
        start = {"streams": [stream.state() for stream in self.streams], "block": self._read}
        rng = np.random.default_rng([self.seed, self.rank, self._read])
        self._read += 1
        texts: list[str] = []
        pictures: list[tuple[Picture.Image, str, str]] = []  # with its text and name
        for _ in range(BLOCK):
            stream = self.streams[by_shares(self.until, rng)]
            record = stream.take()
            text = record.texts[int(rng.integers(len(record.texts)))] if record.texts else ""
            if stream.source.image is None:
                texts += [text] * bool(text)
                continue
            try:
                pictures.append((record.open(), text, record.name))
            except InputError as error:
                self.leave_out(record.name, error)
        pieces = [piece for text in texts for piece in self._cut(text)]
        documents = [lay_out((piece,), self.vocabulary) for piece in pieces]
        patches, keep = self._no_pictures()
        if pictures:
            patches, tokens = self.encode([image for image, _, _ in pictures])
            patches, keep = patches.cpu(), tokens.keep.cpu()
            both = zip(tokens.split(), pictures, strict=True)
            for number, (codes, (_, text, name)) in enumerate(both):
                try:
                    documents.append(self._document(tuple(codes.tolist()), number, text, rng))
                except InputError as error:
                    self.leave_out(name, error)
        order = rng.permutation(len(documents))
        return Block(start, tuple(documents[number] for number in order), patches, keep)

    def _document(self, codes: tuple[int, ...], number: int, text: str, rng: Rng) -> Document:
        """A picture with its text, read or written; without text, it is written unasked."""
        reads, luck = rng.random() < self.reading, rng.random()
        unasked = not text or (not reads and luck < self.config.unconditional_fraction)
        read = reads and not unasked
        parts = reading(number, text) if read else drawing(None if unasked else text, number)
        return self.lay_out(self.segments(parts, lambda _: codes), rng)

    def _cut(self, text: str) -> tuple[Text, ...]:
        return cut(self.ids(text), self.config.tokens, self.vocabulary.end)

    def share(self) -> None:
        """Tell every process the places of all, for `state`; every process must call."""
        mine = {"start": self._start, "served": self._served}
        self._places = [mine]
        if dist.is_initialized() and self.ranks > 1:
            self._places = [{}] * self.ranks
            dist.all_gather_object(self._places, mine)

    def state(self) -> UInt8[Tensor, "bytes"]:
        """Places of all processes after the last `share`, as JSON in bytes."""
        return torch.tensor(list(json.dumps(self._places).encode()), dtype=torch.uint8)

    def load_state(self, state: UInt8[Tensor, "bytes"]) -> None:
        """Go to where `state` was taken: the window is read again, what was served passed over."""
        places = json.loads(bytes(state.tolist()))
        if len(places) != self.ranks:
            before = f"this run read its stream with {len(places)} processes"
            raise InputError(f"{before}: go on with as many, not {self.ranks}")
        place = places[self.rank]
        start = place["start"]
        for stream, saved in zip(self.streams, start["streams"], strict=True):
            stream.load_state(saved)
        self._blocks, self._skip, self._read = [], start["skip"], start["block"]
        self._fill()
        self._served = place["served"]


def stream_texts(data: str, *, records: int = 10_000) -> Corpus:
    """Texts of the first records of each source, to train a text tokenizer on."""
    parts = []
    for name, weight in parse_mixture(data):
        source = stream_source(name)
        first = (source.record(row, "") for row in source.rows.take(records))
        texts = tuple(text for record in first for text in record.texts)
        parts.append(CorpusPart(name, weight, texts=texts))
    return Corpus((), parts=tuple(parts))

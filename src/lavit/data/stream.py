"""Streams: sources that are read as they come (WebDataset tars, parquet shards, folders, hub
names), so that memory does not depend on the size of the data.

Each process reads its own part of the shards, in an order of shards that is new in every epoch, and
shuffles the records that it reads within a buffer. Pictures are encoded on the fly. What cannot be
used is left out, counted and named in the first epoch. A batch is made on a thread while the one
before it is trained on (`Ahead`).

The place in the streams is a small JSON state of every process, which belongs to the batches that
were taken and not to those made ahead: a buffer is read again from where it began, and what was
served of it is passed over, so that a resumed run reads the same records in the same order.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import UInt8
from PIL.Image import Image
from torch import Tensor

from lavit.config import InputError, require
from lavit.data.corpus import Corpus, CorpusPart, LeftOut, parse_mixture
from lavit.data.documents import Rng, by_shares
from lavit.data.sources import Record, stream_source
from lavit.vision.encoder import BLOCK

log = logging.getLogger(__name__)
BUFFER = 1024  # records that are shuffled together, with their encoded pictures
FILES = 20_000  # the same of records that are paths: a folder is often sorted by its sub-folders
RECORDS_DRAW, SOURCES_DRAW, SHARDS_DRAW = 12, 13, 14  # kinds of random numbers, as `Randomness`
UNUSABLE = 512  # records in a row that give nothing before a stream is given up
T = TypeVar("T")
StreamPlace = dict[str, Any]  # JSON data


class Stream:
    """One source as an endless sequence of this process's records; its place can be saved."""

    def __init__(
        self, name: str, *, split: str = "train", seed: int = 0, rank: int = 0, ranks: int = 1
    ) -> None:
        """Fewer shards than processes raise `InputError`, since each would read everything; a
        folder of pictures can be shared by any number.
        """
        parts = require("datasets.distributed", extra="train")
        self.source, self.name = stream_source(name, split), name
        shards = self.source.rows.num_shards
        if shards < ranks and not self.source.of_files:
            few = f"{name!r} has {shards} shards for {ranks} processes"
            raise InputError(f"{few}: make more shards, or start at most {shards} processes")
        self.rows = parts.split_dataset_by_node(self.source.rows, rank, ranks)
        self.size = FILES if self.source.of_files else 1 if self.source.endless else BUFFER
        self.seed, self.rank = seed, rank
        self.epoch, self.read = 0, 0  # records of this epoch that were read
        self._rest: Iterator[Any] | None = None  # of this epoch
        self._loaded: StreamPlace | None = None  # the rows' place until a row of it was read
        self._buffer: list[Record] = []  # read, shuffled and not taken
        self._start: StreamPlace = self._place()  # where the buffer began
        self._taken = 0  # of the buffer

    def take(self) -> Record:
        """The next record; after the last one of an epoch comes the first of the next."""
        if not self._buffer:
            self._fill()
        self._taken += 1
        return self._buffer.pop()

    def _fill(self) -> None:
        """Read and shuffle the next buffer, whose size varies so that epochs divide differently."""
        for _ in range(2):
            self._start, self._taken = self._place(), 0
            rng = np.random.default_rng([self.seed, RECORDS_DRAW, self.rank, self.epoch, self.read])
            found = list(self._records(int(rng.integers(self.size // 2, self.size)) + 1))
            if found:
                self._buffer = [found[number] for number in rng.permutation(len(found))]
                return
            self.epoch, self.read, self._rest = self.epoch + 1, 0, None
        raise InputError(f"{self.name!r} has no records for this process")

    def _records(self, count: int) -> Iterator[Record]:
        """The next records of an epoch, as many as that if there are."""
        rows = self._rows()
        for _ in range(count):
            try:
                row = next(rows, None)
                self._loaded = None
            except Exception as error:  # whatever reads shards: a file of theirs is what is wrong
                said = " ".join(str(error).split())[:200]
                where = f"{self.name!r} is damaged behind record {self.read}"
                raise InputError(f"{where}: {said or type(error).__name__}") from error
            if row is None:
                return
            self.read += 1
            yield self.source.record(row, f"streamed {self.read}")

    def _rows(self, place: StreamPlace | None = None) -> Iterator[Any]:
        """What is left of an epoch's rows; its number gives `datasets` an order of the shards."""
        if self._rest is None:
            order = np.random.default_rng([self.seed, SHARDS_DRAW, self.epoch]).integers(1, 2**31)
            self.rows.set_epoch(int(order))
            self.rows.load_state_dict(place)
            self._rest = iter(self.rows)
        return self._rest

    def _place(self) -> StreamPlace:
        rows = self._loaded  # which `datasets` does not say before it has read on
        if rows is None and self._rest is not None:
            rows = self.rows.state_dict()
        shards = self.source.rows.num_shards  # of all processes
        return {"epoch": self.epoch, "read": self.read, "rows": rows, "shards": shards}

    def state(self) -> StreamPlace:
        """The place in the stream, as JSON data."""
        return {**self._start, "taken": self._taken} if self._buffer else self._place()

    def load_state(self, state: StreamPlace) -> None:
        """Go to a place."""
        now, before = self.source.rows.num_shards, state.get("shards")
        if before not in (None, now):
            said = f"{self.name!r} has {now} shards, and had {before} when its place was saved"
            log.warning("%s: this epoch goes on with other records, not with all of them", said)
        self.epoch, self.read, self._rest, self._buffer = state["epoch"], state["read"], None, []
        self._loaded = state["rows"]
        if self._loaded is not None:
            self._rows(self._loaded)
        for _ in range(state.get("taken", 0)):
            self.take()


@dataclass(frozen=True)
class Taken:
    """A record of a stream: of a source of pictures, and of its first epoch, or not."""

    record: Record
    pictured: bool
    first: bool


class Streams:
    """Several sources, drawn from by their weights, and what was left out of them."""

    def __init__(
        self,
        data: str,
        *,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        pictures: bool = False,
    ) -> None:
        """`pictures`: sources of texts alone are no part of it."""
        found = [
            (Stream(name, seed=seed, rank=rank, ranks=ranks), weight)
            for name, weight in parse_mixture(data)
        ]
        if pictures:
            found = [pair for pair in found if pair[0].source.image is not None]
        if not found:
            raise InputError(f"{data!r} holds texts alone: add a source of pictures")
        self.streams = [stream for stream, _ in found]
        self.until = np.cumsum([weight for _, weight in found])
        self.left_out = LeftOut()

    def take(self, rng: Rng) -> Taken:
        """A record of a stream that is drawn."""
        stream = self.streams[by_shares(self.until, rng)]
        record = stream.take()
        return Taken(record, stream.source.image is not None, stream.epoch == 0)

    def open(self, taken: Taken) -> Image | None:
        """A record's picture; a broken one is left out."""
        try:
            return taken.record.open()
        except InputError as error:
            self.leave_out(taken, error)
            return None

    def leave_out(self, taken: Taken, reason: object) -> None:
        """Name and count a record; those of later epochs were named in the first."""
        if taken.first:
            self.left_out.add(taken.record.name, reason)

    def nothing(self, records: int) -> InputError:
        """What to raise after so many records in a row that gave nothing."""
        why = next(reversed(self.left_out.values()), "they hold nothing")
        return InputError(f"{records} records in a row give nothing to train on: {why}")

    def state(self) -> list[StreamPlace]:
        """The place in every stream."""
        return [stream.state() for stream in self.streams]

    def load_state(self, state: list[StreamPlace]) -> None:
        """Go to a place in every stream."""
        for stream, place in zip(self.streams, state, strict=True):
            stream.load_state(place)


class Ahead(Generic[T]):
    """What `make` gives, each made on a thread while the one before it is in use.

    `place` says where making stands, as JSON data, and `go_to` goes there; both are called between
    two calls of `make`.
    """

    def __init__(
        self,
        make: Callable[[], T],
        place: Callable[[], StreamPlace],
        go_to: Callable[[StreamPlace], None],
        *,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.make, self.place, self.go_to, self.rank, self.ranks = make, place, go_to, rank, ranks
        self._next: Future[tuple[T, StreamPlace]] | None = None
        self._behind = place()  # what was taken

    def take(self) -> T:
        """The next one."""
        made, self._behind = (self._next or self._begin()).result()
        self._next = self._begin()
        return made

    def _begin(self) -> Future[tuple[T, StreamPlace]]:
        thread = ThreadPoolExecutor(1, thread_name_prefix="stream")
        begun = thread.submit(self._work)
        thread.shutdown(wait=False)  # it ends with its work: none is left when a training is
        return begun

    def _work(self) -> tuple[T, StreamPlace]:
        return self.make(), self.place()

    def state(self) -> UInt8[Tensor, "bytes"]:
        """Places of all processes, as JSON in bytes; every process must call."""
        places = [self._behind]
        if self.ranks > 1 and dist.is_initialized():
            places = [{}] * self.ranks
            dist.all_gather_object(places, self._behind)
        return torch.tensor(list(json.dumps(places).encode()), dtype=torch.uint8)

    def load_state(self, state: UInt8[Tensor, "bytes"]) -> None:
        """Go to where `state` was taken."""
        places = json.loads(bytes(state.tolist()))
        if len(places) != self.ranks:
            before = f"this run read its stream with {len(places)} processes"
            raise InputError(f"{before}: go on with as many, not {self.ranks}")
        if self._next is not None:
            self._next.result()
        self._next, self._behind = None, places[self.rank]
        self.go_to(self._behind)


class StreamedPictures(Generic[T]):
    """Batches of `count` pictures of this process, which need no texts.

    `make` gives what is kept of each picture of a block of them, so that few are open at a time.
    """

    def __init__(
        self,
        data: str,
        make: Callable[[list[Image]], Sequence[T]],
        *,
        count: int,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        how = {"seed": seed, "rank": rank, "ranks": ranks}
        self.streams = Streams(data, **how, pictures=True)
        self.make, self.count, self.seed, self.rank = make, count, seed, rank
        self._number = 0  # of the next batch
        self.ahead = Ahead(self.read, self._place, self._go_to, rank=rank, ranks=ranks)

    def read(self) -> list[T]:
        """The next batch, made here and now; `ahead.take()` gives one that was made on a thread."""
        rng = np.random.default_rng([self.seed, SOURCES_DRAW, self.rank, self._number])
        self._number += 1
        made: list[T] = []
        while len(made) < self.count:
            block = min(BLOCK, self.count - len(made))
            made += self.make([self._picture(rng) for _ in range(block)])
        return made

    def _picture(self, rng: Rng) -> Image:
        for _ in range(UNUSABLE):
            image = self.streams.open(self.streams.take(rng))
            if image is not None:
                return image
        raise self.streams.nothing(UNUSABLE)

    def _place(self) -> StreamPlace:
        return {"streams": self.streams.state(), "number": self._number}

    def _go_to(self, place: StreamPlace) -> None:
        self._number = place["number"]
        self.streams.load_state(place["streams"])


def stream_texts(data: str, *, records: int = 10_000) -> Corpus:
    """Texts of the first records of each source, to train a text tokenizer on."""
    parts = []
    for name, weight in parse_mixture(data):
        source = stream_source(name)
        first = (source.record(row, "") for row in source.rows.take(records))
        texts = tuple(text for record in first for text in record.texts)
        parts.append(CorpusPart(name, weight, texts=texts))
    return Corpus((), parts=tuple(parts))

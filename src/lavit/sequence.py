"""Text and images as one stream of ids: segments ⇄ documents ⇄ packed batches (paper Sec. 3.2).

A document is a tuple of segments. The paper's kinds, and how they look as ids (S image start, E
image end, c codes, f slots that take continuous merger features, t text, . end of text):

    [text]          t t t .
    [image, text]   S f f f E t t t .        the image is read
    [text, image]   t t t S c c c E .        the image is written

Labels are the next id of the same document. At the slots of a read image the labels are the stage-1
codes of the same mask. Packed rows hold whole documents; attention never crosses them and positions
restart (block-diagonal):

    documents   0 0 0 1 1        mask  1 . . . .
    positions   0 1 2 0 1              1 1 . . .
                                       1 1 1 . .
                                       . . . 1 .
                                       . . . 1 1
"""

from __future__ import annotations

from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice, zip_longest

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lavit.config import InputError
from lavit.vocabulary import Vocabulary

IGNORE = -100  # label of a position that gives no loss
WAITING = 256  # documents among which a row finds those that fill it


@dataclass(frozen=True)
class VisualTokens:
    """Images as tokens: a ragged batch, image after image in raster order of the kept patches."""

    codes: Int[Tensor, "total"]
    lengths: Int[Tensor, "images"]
    keep: Bool[Tensor, "images patches"]

    @classmethod
    def joined(cls, parts: Sequence_[VisualTokens]) -> VisualTokens:
        """The images of several batches, in order."""
        names = ("codes", "lengths", "keep")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def cpu(self) -> VisualTokens:
        """The same images on the CPU."""
        # the host waits, once for all of them
        return VisualTokens(self.codes.cpu(), self.lengths.cpu(), self.keep.cpu())

    def split(self) -> tuple[Int[Tensor, "kept"], ...]:
        """Codes of each image."""
        return self.codes.split(self.lengths.tolist())


@dataclass(frozen=True)
class Text:
    """Ids of text; `target=False` gives it no loss (prompts of fine-tuning)."""

    ids: tuple[int, ...]
    target: bool = True


@dataclass(frozen=True)
class Image:
    """Codes of one image. `read`: it enters as features of the source's picture at `index`, as
    `rows` of them (None: one for each code).
    """

    codes: tuple[int, ...]
    read: bool
    index: int = -1
    target: bool = True
    rows: int | None = None


Segment = Text | Image
Document = tuple[Segment, ...]


@dataclass(frozen=True)
class Sequence:
    """One document as ids, labels and slots, each of the same length."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    slots: tuple[bool, ...]
    images: tuple[int, ...]  # source index of each read image, in order

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Batch:
    """Packed rows. `images` are the source indices of read images, in the order of their slots."""

    ids: Int[Tensor, "rows tokens"]
    labels: Int[Tensor, "rows tokens"]
    positions: Int[Tensor, "rows tokens"]
    documents: Int[Tensor, "rows tokens"]  # number of the document inside its row; -1 at padding
    slots: Bool[Tensor, "rows tokens"]
    images: Int[Tensor, "images"]

    def to(self, device: torch.device | str) -> Batch:
        """The same rows on a device."""
        return Batch(*(getattr(self, name).to(device) for name in Batch.__dataclass_fields__))

    @property
    def useful(self) -> float:
        """Share of positions that hold a document's token."""
        return float((self.documents >= 0).float().mean())


@lru_cache(maxsize=8192)
def image_ids(codes: tuple[int, ...], vocabulary: Vocabulary) -> tuple[int, ...]:
    """Start, codes, end of one image as joint ids; `InputError` for a code that is none."""
    if codes and not 0 <= min(codes) <= max(codes) < vocabulary.codes:
        said = f"an image has codes of {min(codes)}..{max(codes)}"
        raise InputError(f"{said}: this model's are 0..{vocabulary.codes - 1}")
    ids = vocabulary.ids(torch.tensor(codes, dtype=torch.long)).tolist()
    return (vocabulary.image_start, *ids, vocabulary.image_end)


def slot_lengths(slots: Bool[Tensor, "rows tokens"]) -> list[int]:
    """Numbers of slots of the read images of packed rows, in order."""
    edges = F.pad(slots.int(), (1, 1)).diff(dim=1)  # the host waits: how many is data
    return ((edges < 0).nonzero() - (edges > 0).nonzero())[:, 1].tolist()


def lay_out(
    document: Document,
    vocabulary: Vocabulary,
    *,
    supervise_read_images: bool = True,
) -> Sequence:
    """Turn a document into ids, next-id labels and slots.

    A read image without `supervise_read_images`, or with rows that are not as many as its codes,
    gives no loss inside; its end still predicts what follows.
    """
    ids: list[int] = []
    target: list[bool] = []  # may this id be predicted?
    slots: list[bool] = []
    images: list[int] = []
    for segment in document:
        if isinstance(segment, Text):
            piece, wanted = segment.ids, segment.target
            slot = [False] * len(piece)
        else:
            if not segment.codes:
                raise InputError("an image has no codes: every image keeps at least one patch")
            codes, supervised = segment.codes, supervise_read_images or not segment.read
            if segment.read and segment.rows not in (None, len(codes)):
                codes, supervised = (0,) * segment.rows, False
            piece = image_ids(codes, vocabulary)
            slot = [False, *([segment.read] * len(codes)), False]
            wanted = segment.target and supervised
            images += [segment.index] * segment.read
        ids += piece
        slots += slot
        target += [wanted] * len(piece)
    labels = [ids[i + 1] if target[i + 1] else IGNORE for i in range(len(ids) - 1)] + [IGNORE]
    return Sequence(tuple(ids), tuple(labels), tuple(slots), tuple(images))


def supervise_some(sequence: Sequence, share: float, rng: np.random.Generator) -> Sequence:
    """Keep a random share of the codes of read images as labels; all else is as it was."""
    if share >= 1 or not any(sequence.slots):
        return sequence
    spared = rng.random(len(sequence)) >= share
    within = (*sequence.slots[1:], False)  # a label is the next id
    kept = zip(sequence.labels, within, spared, strict=True)
    labels = (IGNORE if inside and spare else label for label, inside, spare in kept)
    return replace(sequence, labels=tuple(labels))


def exact_choice(lengths: Sequence_[int], room: int) -> list[int]:
    """Numbers of items that fill `room` as well as any choice does: a knapsack, on bits."""
    numbers: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        if length <= room:
            numbers.setdefault(length, []).append(number)
    within = (1 << room + 1) - 1
    sums, steps = 1, []  # bit s: some choice adds up to s
    for length, at in numbers.items():
        for number in at[: room // length]:
            steps.append((number, length, sums))
            sums |= sums << length & within
    total, chosen = sums.bit_length() - 1, []
    for number, length, before in reversed(steps):
        if not before >> total & 1:
            chosen.append(number)
            total -= length
    return chosen


def fill_rows(lengths: Sequence_[int], rows: int, capacity: int) -> tuple[list[list[int]], int]:
    """Put items into `rows` rows of `capacity`; returns the rows and how many items are left.

    A row takes the next items while there is room for some more, then the choice among those that
    wait which fills it best.
    """
    coming = iter(range(len(lengths)))
    waiting: list[int] = []
    filled: list[list[int]] = []
    tail = 4 * sorted(lengths)[len(lengths) // 2] if lengths else 0
    for _ in range(rows):
        waiting += islice(coming, WAITING - len(waiting))
        row: list[int] = []
        later: list[int] = []
        room = capacity
        for number in waiting:
            if room - lengths[number] >= tail or not row:
                row.append(number)
                room -= lengths[number]
            else:
                later.append(number)
        places = exact_choice([lengths[number] for number in later], room)
        chosen = dict.fromkeys(later[place] for place in places)
        filled.append([*row, *chosen])
        waiting = [number for number in later if number not in chosen]
    return filled, len(waiting) + sum(1 for _ in coming)


def fill_from_front(lengths: Sequence_[int], rows: int, capacity: int) -> list[list[int]]:
    """Fill rows with as many of the first items as fit together, whatever their lengths.

    No item may be longer than a row. Returns the item numbers of each row: all of 0, 1, … up to
    some number.
    """
    count = total = 0
    for length in lengths:
        total += length
        if total > rows * capacity:
            break
        count += 1
    filled, left = fill_rows(lengths[:count], rows, capacity)
    while left:
        count -= -(-left * 2 // 3)
        filled, left = fill_rows(lengths[:count], rows, capacity)
    return filled


def pack(
    rows: Sequence_[Sequence_[Sequence]],
    vocabulary: Vocabulary,
    *,
    tokens: int | None = None,
) -> Batch:
    """Lay the documents of each row one after the other; inverse of `unpack`.

    `tokens` is the length of a row (default: the longest); its tail is document -1, without loss.
    """
    width = tokens or max(sum(map(len, row)) for row in rows)
    shape = (len(rows), width)
    ids = torch.full(shape, vocabulary.end)
    labels = torch.full(shape, IGNORE)
    positions = torch.zeros(shape, dtype=torch.long)
    documents = torch.full(shape, -1)
    slots = torch.zeros(shape, dtype=torch.bool)
    images: list[int] = []
    for r, row in enumerate(rows):
        at = 0
        for number, sequence in enumerate(row):
            to = at + len(sequence)
            ids[r, at:to] = torch.tensor(sequence.ids)
            labels[r, at:to] = torch.tensor(sequence.labels)
            positions[r, at:to] = torch.arange(len(sequence))
            documents[r, at:to] = number
            slots[r, at:to] = torch.tensor(sequence.slots)
            images += sequence.images
            at = to
    if not bool((labels != IGNORE).any()):
        raise InputError("every label of this batch is masked: no document in it has a target")
    return Batch(ids, labels, positions, documents, slots, torch.tensor(images, dtype=torch.long))


def unpack(batch: Batch, vocabulary: Vocabulary) -> list[list[Sequence]]:
    """Documents of each row, as they went into `pack`."""
    images = iter(batch.images.tolist())
    rows = []
    for r in range(len(batch.ids)):
        row = []
        for number in range(int(batch.documents[r].max()) + 1):
            at = batch.documents[r] == number
            ids = batch.ids[r, at]
            slots = batch.slots[r, at]
            reads = int((slots[1:] & (ids[:-1] == vocabulary.image_start)).sum())
            labels, seen = tuple(batch.labels[r, at].tolist()), tuple(islice(images, reads))
            row.append(Sequence(tuple(ids.tolist()), labels, tuple(slots.tolist()), seen))
        rows.append(row)
    return rows


def attention_mask(documents: Int[Tensor, "rows tokens"]) -> Bool[Tensor, "rows 1 tokens tokens"]:
    """Causal inside a document, nothing across (drawn in the header). Padding sees only itself."""
    same = documents[:, :, None] == documents[:, None, :]
    tokens = documents.shape[1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=documents.device).tril()
    itself = torch.eye(tokens, dtype=torch.bool, device=documents.device)
    real = (documents >= 0)[:, :, None]
    return ((same & causal & real) | itself)[:, None]


def check_slots(slots: Bool[Tensor, "rows tokens"], lengths: Sequence_[int]) -> None:
    """Raise `InputError` unless each image has as many slots as features: one mask made both."""
    pairs = zip_longest(slot_lengths(slots), lengths, fillvalue=0)
    for image, (wanted, given) in enumerate(pairs):
        if wanted != given:
            counts = f"image {image} has {wanted} slots but {given} features"
            raise InputError(f"{counts}: codes and features must come from the same keep mask")


def fill_slots(
    embeddings: Float[Tensor, "rows tokens width"],
    slots: Bool[Tensor, "rows tokens"],
    features: Float[Tensor, "total width"],
) -> Float[Tensor, "rows tokens width"]:
    """Put image features into their slots, in order.

    Raises `InputError` with both counts if they disagree: one keep mask must have made both.
    """
    wanted, given = int(slots.sum()), len(features)  # the host waits: one number
    if wanted != given:
        counts = f"{wanted} image slots but {given} image features"
        raise InputError(f"{counts}: codes and features must come from the same keep mask")
    return embeddings.masked_scatter(slots[..., None], features.to(embeddings.dtype))

"""Pictures of a step: a function of (seed, step), so that one rank and two see the same."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from lavit.config import InputError


@dataclass(frozen=True)
class Shard:
    """The part of every batch that a process trains on; with accumulation, of a part of a step."""

    rank: int = 0
    ranks: int = 1

    def part(self, number: int, parts: int) -> Shard:
        """Part `number` of `parts` of this shard."""
        return Shard(self.rank * parts + number, self.ranks * parts)

    def of(self, items: Tensor) -> Tensor:
        """This rank's share of the items of a global batch: neighbouring ones, in rank order."""
        return items.tensor_split(self.ranks)[self.rank]


@dataclass(frozen=True)
class PictureBatch:
    """Pictures of this rank, and their places in the global batch, which seed their noise."""

    pictures: Int[Tensor, "images"]
    places: Int[Tensor, "images"]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; on its way to CUDA it is pinned, so that the host need not wait."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Randomness(IntEnum):
    """What is drawn at random in training: each has a stream of its own."""

    ORDER = 1  # of the pictures of an epoch
    SELECTOR = 3  # Gumbel noise of the keep masks
    K_MEANS = 4  # first centres
    REVIVAL = 5  # vectors that dead codes take
    DIFFUSION = 6  # noise, its level, and dropped conditions
    CODE_NOISE = 11  # codes of stage 3 that are another picture's


def seeded(seed: int, of: Randomness, *numbers: int) -> torch.Generator:
    """A generator whose stream depends on the seed, on what it is for, and on all the numbers."""
    state = np.random.SeedSequence((seed, of, *numbers)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def draw_pictures(count: int, batch: int, *, seed: int, step: int) -> Int[Tensor, "batch"]:
    """Pictures of a step: epoch after epoch in new orders, each picture once an epoch."""
    at = range(step * batch, (step + 1) * batch)
    return torch.stack([_order(count, seed, i // count)[i % count] for i in at])


@lru_cache(maxsize=2)  # a step may end one epoch and begin the next
def _order(count: int, seed: int, epoch: int) -> Int[Tensor, "pictures"]:
    """All pictures in the order of an epoch."""
    return torch.randperm(count, generator=seeded(seed, Randomness.ORDER, epoch))


def draw_batch(count: int, batch: int, shard: Shard, *, seed: int, step: int) -> PictureBatch:
    """A rank's part of the pictures of a step; `InputError` if they cannot be shared evenly."""
    if batch % shard.ranks:
        said = f"a batch of {batch} pictures cannot be shared by {shard.ranks} ranks"
        raise InputError(f"{said} (or parts of a step): give a multiple")
    places = shard.of(torch.arange(batch))
    return PictureBatch(draw_pictures(count, batch, seed=seed, step=step)[places], places)

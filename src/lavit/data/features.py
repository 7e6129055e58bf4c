"""Encoder features of a data set, computed once, and their tokens: training reads them from a file.

The file is a float16 array [pictures, patches, dim]. An interrupted computation goes on where it
stopped; another list of pictures or another encoder makes another file.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL.Image import Image
from torch import Tensor

from lavit.config import VisionConfig, read_json, to_json, write_json
from lavit.data.sources import Record
from lavit.images import pixels
from lavit.sequence import VisualTokens
from lavit.vision.encoder import BLOCK, Vision
from lavit.visual_tokenizer.tokenizer import VisualTokenizer

log = logging.getLogger(__name__)
SAVED = 512  # pictures between two marks on disk, and of features that are read at a time


@dataclass(frozen=True)
class Features:
    """A row for each picture."""

    array: np.ndarray

    def __len__(self) -> int:
        return len(self.array)

    def rows(self, pictures: Int[Tensor, "images"]) -> Float[Tensor, "images patches dim"]:
        """Features (fp32) of pictures."""
        return torch.from_numpy(np.asarray(self.array[pictures.numpy()], dtype=np.float32))


@dataclass(frozen=True)
class Pictures:
    """Pictures of `size` x `size` pixels, opened whenever they are asked for."""

    openers: Sequence[Callable[[], Image]]
    size: int

    def __len__(self) -> int:
        return len(self.openers)

    def rows(self, pictures: Int[Tensor, "images"]) -> Float[Tensor, "images 3 size size"]:
        """Pictures (fp32, -1..1) of these places."""
        images = [self.openers[place]() for place in pictures.tolist()]
        return pixels(images, self.size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def compute_features(
    records: Sequence[Record],
    vision: Vision,
    folder: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Features:
    """Features of pictures, from `folder` where they are there already.

    `progress` is called with (pictures done, pictures in all). The pictures must be readable
    (`data.corpus` sorts out).
    """
    encoder = to_json(replace(vision.config, sha256=None))  # the same once its file is pinned
    said = json.dumps([[record.name for record in records], encoder])
    key = hashlib.sha256(said.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    path, mark = folder / f"features-{key}.npy", folder / f"features-{key}.json"
    config = vision.config
    shape = (len(records), config.patches, config.dim)
    done = _done(path, mark, shape)
    if not done:
        np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
    array = np.load(path, mmap_mode="r")
    with path.open("r+b") as file:  # writing to the map would die of a full disk without a word
        file.seek(array.offset + array[:done].nbytes)
        while done < len(records):
            images = [record.open() for record in records[done : done + BLOCK]]
            file.write(vision.encode(images).cpu().half().numpy().tobytes())
            done += len(images)
            if done % SAVED and done < len(records):
                continue
            file.flush()
            write_json(mark, {"done": done})
            if progress:
                progress(done, len(records))
    return Features(array)


def _done(path: Path, mark: Path, shape: tuple[int, ...]) -> int:
    """How many pictures are in the file; none where it is not whole."""
    if not (mark.exists() and path.exists()):
        return 0
    try:
        if np.load(path, mmap_mode="r").shape == shape:
            return int(read_json(mark)["done"])
    except (ValueError, OSError, EOFError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s): its features are computed anew", path, error)
    return 0


def tokenize_features(
    tokenizer: VisualTokenizer,
    features: Features,
    pictures: Int[Tensor, "images"] | None = None,
) -> VisualTokens:
    """Visual tokens (on the CPU) of these pictures of cached features (None: of all), in order."""
    device = next(tokenizer.parameters()).device
    pictures = torch.arange(len(features)) if pictures is None else pictures
    parts = [tokenizer.encode(features.rows(one).to(device)) for one in pictures.split(SAVED)]
    whole = VisualTokens.joined(parts)
    return VisualTokens(whole.codes.cpu(), whole.lengths.cpu(), whole.keep.cpu())


def nothing_read(vision: VisionConfig) -> tuple[Features, VisualTokens]:
    """Features and tokens of no picture, for trainings that read none."""
    none, masks = torch.zeros(0, dtype=torch.long), torch.zeros(0, vision.patches, dtype=torch.bool)
    features = Features(np.zeros((0, vision.patches, vision.dim), dtype=np.float16))
    return features, VisualTokens(none, none, masks)

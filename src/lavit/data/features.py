"""Encoder features of a data set, computed once, and their tokens: training reads them from a file.

The file is a float16 array [pictures, patches, dim]; another one marks which chunks of pictures are
done, so that processes share the work and an interrupted computation goes on where it stopped, with
any number of them. Another list of pictures or another encoder makes other files.
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

from lavit.config import VisionConfig, to_json
from lavit.data.sources import Record
from lavit.images import pixels
from lavit.sequence import VisualTokens
from lavit.vision.encoder import BLOCK, Vision
from lavit.visual_tokenizer.tokenizer import VisualTokenizer

log = logging.getLogger(__name__)
CHUNK = 512  # pictures that a process encodes between two marks, and that are read at a time
HALF = (0.5, 0.5, 0.5)  # mean and deviation that bring a picture to -1..1


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
        return pixels(images, self.size, HALF, HALF)


def compute_features(
    records: Sequence[Record],
    vision: Vision,
    folder: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
    rank: int = 0,
    ranks: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> Features:
    """Features of pictures, from `folder` where they are there already.

    Processes share the work by chunks and `wait` for each other. `progress` is called with
    (pictures done, pictures in all). The pictures must be readable (`data.corpus` sorts out).
    """
    encoder = to_json(replace(vision.config, sha256=None))  # the same once its file is pinned
    said = json.dumps([[[record.name, record.size] for record in records], encoder])
    key = hashlib.sha256(said.encode()).hexdigest()[:16]
    path, marks = folder / f"features-{key}.npy", folder / f"features-{key}.done.npy"
    shape = (len(records), vision.config.patches, vision.config.dim)
    chunks = [range(at, min(at + CHUNK, len(records))) for at in range(0, len(records), CHUNK)]
    if rank == 0 and not _whole(path, marks, shape, len(chunks)):
        folder.mkdir(parents=True, exist_ok=True)
        marks.unlink(missing_ok=True)
        np.lib.format.open_memmap(path, "w+", np.float16, shape)
        new = marks.with_name(f".{marks.name}")
        np.save(new, np.zeros(len(chunks), dtype=np.bool_))
        new.replace(marks)  # last: where marks are there is a file
    wait()
    done = np.load(marks, mmap_mode="r+")
    missing = np.flatnonzero(~done)
    wait()  # nobody marks a chunk before all have seen what is missing
    array = np.load(path, mmap_mode="r")
    with path.open("r+b") as file:  # writing to the map would die of a full disk without a word
        for number in missing[rank::ranks]:
            chunk = chunks[number]
            file.seek(array.offset + array[: chunk.start].nbytes)
            for at in range(chunk.start, chunk.stop, BLOCK):
                images = [record.open() for record in records[at : min(at + BLOCK, chunk.stop)]]
                file.write(vision.encode(images).cpu().half().numpy().tobytes())
            file.flush()
            done[number] = True
            done.flush()
            if progress:
                counts = (len(one) for one, is_done in zip(chunks, done, strict=True) if is_done)
                progress(sum(counts), len(records))
    wait()
    return Features(array)


def _whole(path: Path, marks: Path, shape: tuple[int, ...], chunks: int) -> bool:
    """Whether the features and the marks of their chunks are there, and can be read."""
    if not (path.exists() and marks.exists()):
        return False
    try:
        found = np.load(path, mmap_mode="r").shape, np.load(marks).shape
    except (ValueError, OSError, EOFError) as error:
        log.warning("%s is damaged (%s): its features are computed anew", path, error)
        return False
    if found != (shape, (chunks,)):
        log.warning("%s is damaged (%s): its features are computed anew", path, found)
        return False
    return True


def tokenize_features(
    tokenizer: VisualTokenizer,
    features: Features,
    pictures: Int[Tensor, "images"] | None = None,
) -> VisualTokens:
    """Visual tokens (on the CPU) of these pictures of cached features (None: of all), in order."""
    device = next(tokenizer.parameters()).device
    pictures = torch.arange(len(features)) if pictures is None else pictures
    parts = [tokenizer.encode(features.rows(one).to(device)) for one in pictures.split(CHUNK)]
    return VisualTokens.joined(parts).cpu()


def nothing_read(vision: VisionConfig) -> tuple[Features, VisualTokens]:
    """Features and tokens of no picture, for trainings that read none."""
    none, masks = torch.zeros(0, dtype=torch.long), torch.zeros(0, vision.patches, dtype=torch.bool)
    features = Features(np.zeros((0, vision.patches, vision.dim), dtype=np.float16))
    return features, VisualTokens(none, none, masks)

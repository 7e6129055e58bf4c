"""Encoder features of a data set, computed once, and their tokens: training reads a file instead of running the encoder.

A picture has `views`: the picture itself, and small zooms, shifts and turns of it on white, every second one inked (dark
outlines drawn in) and the others cleaned (thin dark lines taken out), so that a reader does not learn a thing together
with the hand that drew it. The file is a float16 array [pictures · views, patches, dim], and beside it stands one of
descriptions (modules/memory.py); view v of picture i is row i · views + v. An interrupted computation goes on where it
stopped; another list of pictures, encoder or number of views makes another file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image, ImageChops, ImageFilter, ImageOps
from torch import Tensor

from lavit.config import to_json
from lavit.data.sources import Record
from lavit.images import pixels
from lavit.modules.memory import describe
from lavit.modules.selector import KeepPolicy
from lavit.modules.tokenizer import VisualTokenizer
from lavit.modules.vision import Vision
from lavit.sequence import VisualTokens

BLOCK = 32  # pictures encoded at a time
WHITE = (255, 255, 255)
VIEWS = 2  # version of `view_of`: cached features of older views are not read


@dataclass(frozen=True)
class Features:
    """The array, how many views each picture has, and descriptions of the rows for a memory."""

    array: np.ndarray
    views: int
    described: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.array) // self.views

    def rows(
        self, pictures: Int[Tensor, "images"], views: Int[Tensor, "images"] | None = None
    ) -> Float[Tensor, "images patches dim"]:
        """Features (fp32) of pictures in the given views (default: the plain one)."""
        at = pictures * self.views if views is None else pictures * self.views + views
        return torch.from_numpy(np.asarray(self.array[at.numpy()], dtype=np.float32))


def inked(image: Image.Image, *, width: int) -> Image.Image:
    """Dark outlines, about `width` pixels (odd), where neighbouring colours differ by more than a shade."""
    high, low = image.filter(ImageFilter.MaxFilter(width)), image.filter(ImageFilter.MinFilter(width))
    edge = np.asarray(ImageChops.difference(high, low)).max(-1, keepdims=True) / 255
    return Image.fromarray((np.asarray(image) * (1 - ((edge - 0.15) * 4).clip(0, 1))).astype(np.uint8))


def cleaned(image: Image.Image, *, width: int) -> Image.Image:
    """Without dark lines thinner than `width` pixels (odd): the neighbouring colours close over them."""
    return image.filter(ImageFilter.MaxFilter(width)).filter(ImageFilter.MinFilter(width))


def view_of(image: Image.Image, view: int, seed: int, *, mirrored: bool = False) -> Image.Image:
    """View 0 is the picture; odd ones are inked, even ones cleaned, all moved: zoom 0.8 to 1.05, shift to 8 %, turn to
    10 degrees, shade. If `mirrored`, each is followed by its mirror image: view 1 is then that of the picture.
    """
    if mirrored:
        image = view_of(image, view // 2, seed)
        return ImageOps.mirror(image) if view % 2 else image
    if view == 0:
        return image
    rng = np.random.default_rng([seed, view])
    pixel = max(1, round(min(image.size) / 80))  # half the width of a line that still shows
    image = inked(image, width=2 * pixel + 1) if view % 2 else cleaned(image, width=4 * pixel - 1)
    zoom, angle = rng.uniform(0.8, 1.05), np.deg2rad(rng.uniform(-10, 10))
    shift = rng.uniform(-0.08, 0.08, 2)
    width, height = image.size
    cos, sin = np.cos(angle) / zoom, np.sin(angle) / zoom
    cx, cy = width / 2, height / 2
    dx, dy = cx + shift[0] * width, cy + shift[1] * height
    matrix = (cos, sin, cx - cos * dx - sin * dy, -sin, cos, cy + sin * dx - cos * dy)
    moved = image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=WHITE)
    shade = rng.uniform(0.85, 1.0, 3)  # darken a little, channel by channel; white stays nearly white
    return Image.fromarray((np.asarray(moved) * shade).round().astype(np.uint8))


def compute_features(
    records: Sequence[Record],
    vision: Vision,
    folder: Path,
    *,
    views: int = 1,
    seed: int = 0,
    mirrored: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Features:
    """Features of pictures, from `folder` where they are there already.

    `views` counts all, mirror images too. `progress` is called with (pictures done, pictures in all). The pictures must be
    readable (`data.corpus` sorts out).
    """
    encoder = to_json(replace(vision.config, sha256=None))  # the same encoder before its file is pinned and after
    said = [[record.name for record in records], encoder, views, seed, VIEWS, *["mirrored"] * mirrored]
    key = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    path, beside = folder / f"features-{key}.npy", folder / f"described-{key}.npy"
    mark = folder / f"features-{key}.json"
    config = vision.config
    there = mark.exists() and path.exists() and beside.exists()
    done = json.loads(mark.read_text())["done"] if there else 0
    rows = len(records) * views
    array = _open(path, (rows, config.patches, config.dim), new=not done)
    device = next(vision.parameters()).device
    blank = torch.zeros(1, 3, config.image_size, config.image_size, device=device)
    described = _open(beside, (rows, describe(vision.looks(blank)).shape[1]), new=not done)
    while done < len(records):
        block = [record.open() for record in records[done : done + BLOCK]]
        at = range(done, done + len(block))
        images = [
            view_of(image, v, seed + i, mirrored=mirrored)
            for i, image in zip(at, block, strict=True)
            for v in range(views)
        ]
        for start in range(0, len(images), BLOCK):
            part = pixels(images[start : start + BLOCK], config.image_size, config.mean, config.std)
            row = done * views + start
            looks = vision.looks(part.to(device))
            array[row : row + len(part)] = looks[-1].half().cpu().numpy()
            described[row : row + len(part)] = describe(looks).half().cpu().numpy()
        done += len(block)
        array.flush()
        described.flush()
        mark.write_text(json.dumps({"done": done}))
        if progress:
            progress(done, len(records))
    return Features(np.load(path, mmap_mode="r"), views, np.load(beside, mmap_mode="r"))


@torch.no_grad()
def tokenize_features(
    tokenizer: VisualTokenizer,
    features: Features,
    *,
    policy: KeepPolicy | None = None,
    batch: int = 64,
) -> VisualTokens:
    """Visual tokens of every row (picture and view) of cached features, in order."""
    device = next(tokenizer.parameters()).device
    parts = []
    for start in range(0, len(features.array), batch):
        rows = torch.from_numpy(np.asarray(features.array[start : start + batch], dtype=np.float32))
        parts.append(tokenizer.encode(rows.to(device), policy))
    return VisualTokens(
        torch.cat([p.codes for p in parts]).cpu(),
        torch.cat([p.lengths for p in parts]).cpu(),
        torch.cat([p.keep for p in parts]).cpu(),
    )


def _open(path: Path, shape: tuple[int, ...], *, new: bool) -> np.memmap:
    return np.lib.format.open_memmap(path, mode="w+" if new else "r+", dtype=np.float16, shape=shape if new else None)

"""Drawings spoiled: what a judge must not take for the thing itself.

Each takes a drawing (RGBA, cut to what is drawn) and returns another of the same size. The judge is
trained on such drawings as "unknown" (recipes/judge.py) and measured on them (judge_errors.py).
"""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image, ImageFilter

BLOBS = ("blurred", "coarse", "scrambled", "blended")
SHOWS = 0.3  # what differs less from the drawing as it was may still pass for it
Rng = np.random.Generator
COLOURFUL = 40.0  # of 255: a drawing less colourful than this looks the same in other hues


def half(drawing: Image.Image, rng: Rng, *, share: float = 0.5) -> Image.Image:
    """A drawing of which one side is gone: `share` of its width or height is kept."""
    width, height = drawing.size
    side = int(rng.integers(4))
    along = height if side % 2 else width
    kept = max(2, round(along * share))
    start = 0 if side < 2 else along - kept
    box = (0, start, width, start + kept) if side % 2 else (start, 0, start + kept, height)
    return drawing.crop(box)


def hue(drawing: Image.Image, rng: Rng) -> Image.Image | None:
    """A drawing in other hues; None if it has too little colour for that to show."""
    pixels = np.asarray(drawing).astype(np.float32)
    rgb, solid = pixels[..., :3], pixels[..., 3:] / 255
    chroma = (rgb.max(-1) - rgb.min(-1)) * solid[..., 0]
    if chroma.sum() / max(1.0, float(solid.sum())) < COLOURFUL:
        return None
    turned = rgb @ _rotation(int(rng.integers(9, 28)) * 10)
    pixels[..., :3] = turned.clip(0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


@cache
def _rotation(degrees: int) -> np.ndarray:
    """A turn of RGB about the gray axis."""
    angle = np.deg2rad(degrees)
    axis = np.full((3, 3), (1 - np.cos(angle)) / 3)
    wave = np.sin(angle) / np.sqrt(3) * np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    return (axis + np.cos(angle) * np.eye(3) + wave).T.astype(np.float32)


def blob(
    drawing: Image.Image, other: Image.Image, rng: Rng, first: str | None = None,
) -> Image.Image | None:  # fmt: skip
    """A drawing as bad painters leave it: one of `BLOBS`, `first` if it shows; `other` is mixed in
    by one kind. None if nothing shows, as a square stays a square."""
    kinds = rng.permutation(BLOBS).tolist()
    for kind in [first, *kinds] if first else kinds:
        spoiled = _as(kind, drawing.convert("RGBa"), other, rng)
        if difference(drawing.convert("RGBa"), spoiled) >= SHOWS:
            return spoiled.convert("RGBA")
    return None


def _as(kind: str, soft: Image.Image, other: Image.Image, rng: Rng) -> Image.Image:
    """A blob of one kind. Drawings are premultiplied, so that nothing bleeds in."""
    size, side = soft.size, max(soft.size)
    if kind == "blurred":
        return soft.filter(ImageFilter.GaussianBlur(side * float(rng.uniform(0.13, 0.25))))
    if kind == "coarse":
        cells = int(rng.integers(2, 5))
        small = soft.resize((cells, cells), Image.Resampling.BOX)
        return small.resize(size, Image.Resampling.BICUBIC)
    if kind == "scrambled":
        return _scrambled(soft, rng)
    mixed = other.convert("RGBa").resize(size, Image.Resampling.BICUBIC)
    return Image.blend(soft, mixed, float(rng.uniform(0.4, 0.6)))


def joined(drawing: Image.Image, other: Image.Image, rng: Rng) -> Image.Image | None:
    """Half of one drawing joined to half of another; None if it does not show."""
    soft = drawing.convert("RGBa")
    mixed = other.convert("RGBa").resize(soft.size, Image.Resampling.BICUBIC)
    spoiled, (width, height) = soft.copy(), soft.size
    at = (0, height // 2) if rng.random() < 0.5 else (width // 2, 0)
    spoiled.paste(mixed.crop((*at, width, height)), at)
    return spoiled.convert("RGBA") if difference(soft, spoiled) >= SHOWS else None


def difference(a: Image.Image, b: Image.Image) -> float:
    """From 0 to 1, over what either of two premultiplied drawings covers."""
    first, second = (np.asarray(one).astype(np.float32) for one in (a, b))
    covered = np.maximum(first[..., 3], second[..., 3]).sum()
    return float(np.abs(first - second).max(axis=-1).sum() / max(1.0, float(covered)))


def _scrambled(drawing: Image.Image, rng: Rng) -> Image.Image:
    """Its pieces, three by three, in another order."""
    width, height = (max(1, side // 3) for side in drawing.size)
    order = rng.permutation(9)
    while (order == np.arange(9)).sum() > 2:
        order = rng.permutation(9)
    spoiled = Image.new(drawing.mode, (width * 3, height * 3))
    for place, piece in enumerate(order.tolist()):
        x, y = (piece % 3) * width, (piece // 3) * height
        spoiled.paste(
            drawing.crop((x, y, x + width, y + height)),
            ((place % 3) * width, (place // 3) * height),
        )
    return spoiled.resize(drawing.size)

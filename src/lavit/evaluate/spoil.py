"""Drawings spoiled: what a judge must not take for the thing itself.

Each takes a drawing (RGBA, cut to what is drawn) and returns another of the same size. The judge is
trained on such drawings as "unknown" (recipes/judge.py) and measured on them (judge_errors.py).
"""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image, ImageFilter

BLOBS = ("blurred", "coarse", "scrambled", "blended", "joined")
COLOURFUL = 40.0  # of 255: a drawing less colourful than this looks the same in other hues


def half(drawing: Image.Image, rng: np.random.Generator, *, share: float = 0.5) -> Image.Image:
    """A drawing of which one side is gone: `share` of its width or height is kept."""
    width, height = drawing.size
    side = int(rng.integers(4))
    along = height if side % 2 else width
    kept = max(2, round(along * share))
    start = 0 if side < 2 else along - kept
    box = (0, start, width, start + kept) if side % 2 else (start, 0, start + kept, height)
    return drawing.crop(box)


def hue(drawing: Image.Image, rng: np.random.Generator) -> Image.Image | None:
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
    drawing: Image.Image, other: Image.Image, rng: np.random.Generator, kind: str | None = None
) -> Image.Image:
    """A drawing as bad painters leave it; `other` is mixed in by some kinds of `BLOBS`."""
    kind = kind or BLOBS[int(rng.integers(len(BLOBS)))]
    size, side = drawing.size, max(drawing.size)
    soft = drawing.convert("RGBa")  # premultiplied, so that nothing bleeds in
    if kind == "blurred":
        pad = Image.new("RGBa", size)
        pad.paste(soft)
        spoiled = pad.filter(ImageFilter.GaussianBlur(side * float(rng.uniform(0.13, 0.25))))
    elif kind == "coarse":
        cells = int(rng.integers(2, 5))
        spoiled = soft.resize((cells, cells), Image.Resampling.BOX)
        spoiled = spoiled.resize(size, Image.Resampling.BICUBIC)
    elif kind == "scrambled":
        spoiled = _scrambled(soft, rng)
    elif kind == "blended":
        mixed = other.convert("RGBa").resize(size, Image.Resampling.BICUBIC)
        spoiled = Image.blend(soft, mixed, float(rng.uniform(0.4, 0.6)))
    else:
        spoiled = soft.copy()
        mixed = other.convert("RGBa").resize(size, Image.Resampling.BICUBIC)
        if rng.random() < 0.5:
            spoiled.paste(mixed.crop((0, size[1] // 2, *size)), (0, size[1] // 2))
        else:
            spoiled.paste(mixed.crop((size[0] // 2, 0, *size)), (size[0] // 2, 0))
    return spoiled.convert("RGBA")


def _scrambled(drawing: Image.Image, rng: np.random.Generator) -> Image.Image:
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

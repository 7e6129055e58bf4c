"""Drawings and pictures spoiled: what a judge must not take for the thing or the scene itself.

Most take a drawing (RGBA, cut to what is drawn) and return another. The judge is trained on such
drawings as "unknown" (recipes/judge.py) and measured on others of them (judging.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageFilter

from lavit.data.scenes.world import Box

BLOBS = ("blurred", "coarse", "scrambled", "blended")
SHOWS = 0.3  # what differs less from the drawing as it was may still pass for it
GONE = 0.1  # of a drawing, at least, is gone where a side of it is
Rng = np.random.Generator
COLOURFUL = 40.0  # of 255: a drawing less colourful than this looks the same in other hues


def half(drawing: Image.Image, rng: Rng, *, share: float = 0.5) -> Image.Image | None:
    """A drawing of which one side is gone: `share` of its width or height is kept. None if there
    was next to nothing in the rest.
    """
    width, height = drawing.size
    side = int(rng.integers(4))
    along = height if side % 2 else width
    kept = max(2, round(along * share))
    start = 0 if side < 2 else along - kept
    box = (0, start, width, start + kept) if side % 2 else (start, 0, start + kept, height)
    left = drawing.crop(box)
    solid, rest = (np.asarray(one.getchannel("A")).sum() for one in (drawing, left))
    return left if 1 - rest / max(1, solid) >= GONE else None


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


def varied(drawing: Image.Image) -> bool:
    """Does a drawing look different in its mean colour alone?"""
    return difference(drawing.convert("RGBa"), flat(drawing).convert("RGBa")) >= SHOWS / 2


def flat(drawing: Image.Image) -> Image.Image:
    """A drawing all in its mean colour, of the same outline."""
    pixels = np.asarray(drawing.convert("RGBa")).astype(np.float64)
    mean = pixels[..., :3].sum((0, 1)) / max(1.0, pixels[..., 3].sum()) * 255
    red, green, blue = (int(channel) for channel in mean.clip(0, 255))
    silhouette = Image.new("RGBA", drawing.size, (red, green, blue))
    silhouette.putalpha(drawing.getchannel("A"))
    return silhouette


def behind(drawing: Image.Image, other: Image.Image, rng: Rng) -> Image.Image:
    """A drawing with another behind it, a quarter to a half of its side off; it grows by that.

    The same drawing twice is one that is drawn with a shift.
    """
    width, height = drawing.size
    angle, far = (
        float(rng.uniform(0, 2 * np.pi)),
        float(rng.uniform(0.25, 0.5)) * max(width, height),
    )
    right, down = round(far * np.cos(angle)), round(far * np.sin(angle))
    whole = Image.new("RGBA", (width + abs(right), height + abs(down)))
    front = (max(0, -right), max(0, -down))
    whole.alpha_composite(other.resize(drawing.size), (front[0] + right, front[1] + down))
    whole.alpha_composite(drawing, front)
    return whole


def outside(
    picture: Image.Image, drawing: Image.Image, boxes: Sequence[Box], rng: Rng,
) -> Box | None:  # fmt: skip
    """Set a drawing into a picture (RGBA, changed in place), a part of it beyond the border.

    Gives the box of what is seen of it; None if it came too near to one of `boxes`.
    """
    whole, (width, height) = picture.width, drawing.size
    side, seen, along = int(rng.integers(4)), rng.uniform(0.35, 0.75), rng.uniform(0.05, 0.95)
    across, length = (width, height) if side % 2 else (height, width)
    kept = max(2, round(across * float(seen)))
    place = round(float(along) * whole - length / 2)
    near = 0 if side < 2 else whole - kept
    hidden = across - kept if side < 2 else 0
    if side % 2:
        part = drawing.crop((hidden, 0, hidden + kept, length))
        at = (near, place)
    else:
        part = drawing.crop((0, hidden, length, hidden + kept))
        at = (place, near)
    at = (min(max(0, at[0]), whole - part.width), min(max(0, at[1]), whole - part.height))
    middle = ((at[0] + part.width / 2) / whole, (at[1] + part.height / 2) / whole)
    box = Box(*middle, max(part.size) / whole)
    if any(max(abs(box.x - b.x), abs(box.y - b.y)) < (box.side + b.side) / 2 for b in boxes):
        return None
    picture.alpha_composite(part, at)
    return box


def part(size: int, rng: Rng, *, wide: bool = False) -> Image.Image:
    """Where a picture has another background: a mask (L) of a side, a corner, a band, a frame or,
    if `wide`, of a side or a corner alone."""
    mask = np.zeros((size, size), dtype=np.uint8)
    share = float(rng.uniform(0.35, 0.5) if wide else rng.uniform(0.2, 0.5))
    long, start = round(size * share), int(rng.integers(size))
    way = int(rng.integers(2 if wide else 4))
    if way == 0:
        mask[:long] = 255
    elif way == 1:
        mask[: round(size * share**0.5), : round(size * share**0.5)] = 255
    elif way == 2:
        mask[min(start, size - long) :][:long] = 255
    else:
        edge = max(2, round(size * float(rng.uniform(0.04, 0.12))))
        mask[:] = 255
        mask[edge:-edge, edge:-edge] = 0
    return Image.fromarray(np.rot90(mask, int(rng.integers(4))).copy())


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

"""Pictures that the judge learns from, for its recipe: scenes without end, some of them spoiled.

Command   python recipes/judge.py RUN
Cost      that recipe's; a picture takes some 10 ms
Score     LOG.md has the judge's errors

A batch is pixels, the things in each picture and its ground. What is spoiled
(src/lavit/evaluate/spoil.py) is to be called "unknown".
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import IterableDataset

from lavit.data.scenes.render import background, rotated, sprite, stands_out
from lavit.data.scenes.world import BACKGROUNDS, COLOURS, PATTERNS, SHAPES, STYLES, Box, objects
from lavit.evaluate import spoil
from lavit.evaluate.detector import SIDE
from lavit.evaluate.judge import GROUNDS

CANVASES = (64, 96, 128)
MOST = 9  # things
TURN = 15.0
USES = 12  # of a drawing at one size and turn before it is drawn anew
SPOILED = 0.3  # of the things
IN_PARTS = 0.12  # of the pictures have two backgrounds
OUTSIDE = 0.12  # of the pictures have a thing that is cut by the border
BATCH = 32


@dataclass
class Drawings:
    """All drawings in a few sizes and turns, drawn anew now and then."""

    rng: np.random.Generator
    names: tuple[str, ...]
    kept: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        colours = [(shape, colour) for shape in SHAPES for colour in COLOURS]
        self.kinds = [(kind.name, None) for kind in objects()] + colours

    def some(self, *, objects_only: bool = False) -> tuple[str, str | None]:
        """A thing at random, a shape in one of five."""
        shapes = not objects_only and self.rng.random() < 0.2
        first, last = (len(objects()), len(self.kinds)) if shapes else (0, len(objects()))
        return self.kinds[int(self.rng.integers(first, last))]

    def draw(self, kind: tuple[str, str | None], style: str, canvas: int, big: bool) -> Image.Image:
        """A drawing (RGBA) as large as it stands in a picture of `canvas` pixels."""
        slot = (kind, style, canvas, big, int(self.rng.integers(1 if big else 3)))
        drawing, uses = self.kept.get(slot, (None, USES))
        if uses >= USES:
            side = self.rng.uniform(*((0.27, 0.36) if big else (0.175, 0.225))) * canvas
            spun = rotated(shrunk(*kind, style, big), float(self.rng.uniform(-TURN, TURN)))
            scale = side / max(spun.size)
            size = tuple(max(1, round(length * scale)) for length in spun.size)
            drawing, uses = spun.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0), 0
        self.kept[slot] = (drawing, uses + 1)
        return drawing


@cache
def shrunk(name: str, colour: str | None, style: str, big: bool) -> Image.Image:
    """A drawing small enough to be turned quickly."""
    drawing = sprite(name, colour, style)
    return drawing if big else drawing.reduce(2)


class Pictures(IterableDataset):
    """Batches without end: pixels (bytes), things, their number, ground and pattern."""

    def __init__(self, names: tuple[str, ...], seed: int) -> None:
        self.names, self.seed = names, seed

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        torch.set_num_threads(1)
        rng = np.random.default_rng(self.seed)
        drawings = Drawings(rng, self.names)
        while True:
            rows = [one_picture(rng, drawings) for _ in range(BATCH)]
            pixels, things, ground = zip(*rows, strict=True)
            yield (
                torch.from_numpy(np.stack(pixels)),
                torch.from_numpy(np.stack(things)),
                torch.tensor(ground),
            )


def one_picture(rng: np.random.Generator, drawings: Drawings) -> tuple:
    """A picture, its things (x, y, side, name, colour, style; name -1: none) and its ground."""
    things = np.full((MOST, 6), -1.0, dtype=np.float32)
    if rng.random() < 0.02:
        noise = rng.uniform(0, 255, (int(rng.choice([12, 24, 48, 96])),) * 2 + (3,))
        picture = Image.fromarray(noise.astype(np.uint8)).resize((SIDE, SIDE), Image.BICUBIC)
        return np.asarray(picture), things, (-1, -1)
    canvas = int(rng.choice(CANVASES, p=(0.4, 0.4, 0.2)))
    picture, grounds, told = grounded(rng, canvas)
    style = int(rng.integers(2))
    kind, boxes = None, []
    for number, (x, y, big) in enumerate(layout(rng)):
        if kind is None or rng.random() > 0.15:
            kind = drawings.some()
        if not shows(kind, style, grounds):
            kind = None
            continue
        drawing = drawings.draw(kind, tuple(STYLES)[style], canvas, big)
        name = drawings.names.index(kind[0])
        if rng.random() < SPOILED:
            other = drawings.draw(
                drawings.some(objects_only=True), tuple(STYLES)[style], canvas, big
            )
            drawing = spoiled(drawing, other, kind, rng)
            name = len(drawings.names) - 1
            if drawing is None:
                kind = None
                continue
        width, height = drawing.size
        left, top = round(x * canvas - width / 2), round(y * canvas - height / 2)
        left, top = (max(0, min(a, canvas - b)) for a, b in ((left, width), (top, height)))
        picture.alpha_composite(drawing, (left, top))
        colour = tuple(COLOURS).index(kind[1]) if kind[1] and name < len(drawings.names) - 1 else -1
        centre = ((left + width / 2) / canvas, (top + height / 2) / canvas)
        boxes.append(Box(*centre, max(width, height) / canvas))
        things[number] = (*centre, boxes[-1].side, name, colour, style)
    free = np.flatnonzero(things[:, 3] < 0)
    kind = drawings.some()
    if rng.random() < OUTSIDE and len(free) and shows(kind, style, grounds):
        drawing = drawings.draw(kind, tuple(STYLES)[style], canvas, rng.random() < 0.5)
        if box := spoil.beyond_border(picture, drawing, boxes, rng):
            things[free[0]] = (box.x, box.y, box.side, len(drawings.names) - 1, -1, style)
    return worn(picture.convert("RGB"), rng), things, told


def grounded(rng: np.random.Generator, canvas: int) -> tuple[Image.Image, list[str], tuple]:
    """An empty picture (RGBA), the colours of its background, and what is to be said of it: indices
    of colour and pattern, the last ones if it has two."""
    colours = tuple(BACKGROUNDS)
    ground, pattern = int(rng.integers(len(colours))), int(rng.integers(len(PATTERNS)))
    picture = background(colours[ground], PATTERNS[pattern], canvas).convert("RGBA")
    if rng.random() >= IN_PARTS:
        return picture, [colours[ground]], (ground, pattern)
    second, other = ground, pattern
    if wide := rng.random() < 0.5:
        other = (pattern + int(rng.integers(1, len(PATTERNS)))) % len(PATTERNS)
    if not wide or rng.random() < 0.2:
        second = (ground + int(rng.integers(1, len(colours)))) % len(colours)
    mask = spoil.part(canvas, rng, wide=wide)
    if rng.random() < 0.3:
        mask = mask.filter(ImageFilter.GaussianBlur(canvas * float(rng.uniform(0.01, 0.08))))
    elsewhere = background(colours[second], PATTERNS[other], canvas).convert("RGBA")
    told = (
        ground if second == ground else len(GROUNDS) - 1,
        pattern if other == pattern else len(PATTERNS),
    )
    return Image.composite(elsewhere, picture, mask), [colours[ground], colours[second]], told


def shows(kind: tuple[str, str | None], style: int, grounds: list[str]) -> bool:
    """Does a thing stand out from all of a picture's backgrounds?"""
    return all(kind[1] != on and stands_out(*kind, tuple(STYLES)[style], on) for on in grounds)


def layout(rng: np.random.Generator) -> Iterator[tuple[float, float, bool]]:
    """Where things stand, and whether they are big: many on a grid, or few anywhere."""
    if rng.random() < 0.35:
        for cell in rng.permutation(4)[: int(rng.integers(2, 5))].tolist():
            x, y = 0.5 + (cell % 2 - 0.5) * 0.46, 0.5 + (cell // 2 - 0.5) * 0.46
            dx, dy = rng.uniform(-0.045, 0.045, 2)
            yield x + dx, y + dy, True
        return
    number = int(rng.choice(10, p=(0.02, 0.06, 0.11, 0.07, 0.06, 0.06, 0.08, 0.14, 0.2, 0.2)))
    if number > 3 or (number and rng.random() < 0.3):
        for cell in rng.permutation(9)[:number].tolist():
            x, y = 0.5 + (cell % 3 - 1) * 0.305, 0.5 + (cell // 3 - 1) * 0.305
            dx, dy = rng.uniform(-0.03, 0.03, 2)
            yield x + dx, y + dy, False
        return
    spots: list[tuple[float, float, float]] = []
    for _ in range(number * 20):
        big = rng.random() < 0.5
        side = 0.36 if big else 0.225
        x, y = rng.uniform(side / 2 + 0.03, 0.97 - side / 2, 2)
        if all(max(abs(x - a), abs(y - b)) > (side + c) / 2 + 0.03 for a, b, c in spots):
            spots.append((x, y, side))
            yield x, y, big
        if len(spots) == number:
            return


def spoiled(
    drawing: Image.Image, other: Image.Image, kind: tuple, rng: np.random.Generator
) -> Image.Image | None:
    """A drawing that is to be called unknown; None where the spoiling might not show."""
    way = rng.random()
    if way < 0.35:  # half of it, or more
        if kind[0] in ("square", "diamond") and way < 0.2:  # their halves are shapes too
            return None
        share = rng.uniform(0.38, 0.55) if way < 0.2 else rng.uniform(0.6, 0.78)
        return spoil.half(drawing, rng, share=float(share))
    if way < 0.42:
        return None if kind[1] else spoil.hue(drawing, rng)
    if way < 0.5:
        return spoil.flat(drawing) if spoil.varied(drawing) else None
    if way < 0.64:
        return spoil.behind(drawing, drawing if way < 0.57 else other, rng)
    if way < 0.78:
        if kind[1] and way < 0.72:  # the shape in two colours
            other = recoloured(kind, rng).resize(drawing.size)
        return spoil.joined(drawing, other, rng)
    return spoil.blob(drawing, other, rng, "coarse" if way < 0.88 else None)


def recoloured(kind: tuple[str, str | None], rng: np.random.Generator) -> Image.Image:
    """A shape in another colour, flat."""
    others = [colour for colour in COLOURS if colour != kind[1]]
    return shrunk(kind[0], others[int(rng.integers(len(others)))], next(iter(STYLES)), big=True)


def worn(picture: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """A picture at the detector's size, after what pictures go through."""
    if rng.random() < 0.15:
        less = int(rng.integers(60, 84))
        picture = picture.resize((less, less), Image.Resampling.BICUBIC)
    if picture.size != (SIDE, SIDE):
        picture = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    if rng.random() < 0.3:
        picture = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 0.9))))
    pixels = np.asarray(picture).astype(np.float32)
    if rng.random() < 0.6:
        gain = rng.uniform(0.95, 1.05, 3) * rng.uniform(0.97, 1.03)
        pixels = (pixels - 128) * rng.uniform(0.92, 1.05) + 128
        pixels = pixels * gain
    if rng.random() < 0.4:
        pixels = pixels + rng.standard_normal(pixels.shape, np.float32) * rng.uniform(2, 10)
    pixels = pixels.clip(0, 255).astype(np.uint8)
    if rng.random() < 0.25:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=int(rng.integers(45, 96)))
        pixels = np.asarray(Image.open(file))
    return pixels

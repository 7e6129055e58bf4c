"""The judge: a detector of 0.4 M weights, trained on renders alone; two processes, one thread each.

Command   python recipes/judge.py RUN [--minutes 30]
              trains, sets the thresholds on `valid`, writes RUN/judge
          python recipes/judge.py RUN --start RUN/network.pt --minutes 0
              only the thresholds, and the names that are in the list now
          python recipes/judge.py RUN --ship      copies RUN/judge into the package
          python recipes/judge.py --table         the errors of the shipped judge (LOG.md has them)
          python recipes/judge.py --confusions    which objects it takes for which, at 64 pixels
Data      scenes of any things anywhere, both styles, turned by up to 15 degrees, blurred, noisy,
          JPEG, drawn for 64 to 128 px; among them drawings that are spoiled, and parts of
          backgrounds (src/lavit/evaluate/spoil.py), which are to be called "unknown"
Cost      30 minutes of two cores
Score     LOG.md has the table
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import judge_errors
import numpy as np
import torch
import tyro
from PIL import Image, ImageFilter
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lavit.data.scenes.render import background, rotated, sprite, stands_out
from lavit.data.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    PATTERNS,
    SHAPES,
    STYLES,
    Box,
    objects,
)
from lavit.evaluate import spoil
from lavit.evaluate.detector import CELLS, SIDE, Detector, Maps, fused
from lavit.evaluate.judge import FOLDER, GROUNDS, UNKNOWN, Judge, sizes
from lavit.train.muon import Muon

CANVASES = (64, 96, 128)
MOST = 9  # things
TURN = 15.0
USES = 12  # of a drawing at one size and turn before it is drawn anew
SPOILED = 0.3  # of the things
IN_PARTS = 0.12  # of the pictures have two backgrounds
OUTSIDE = 0.12  # of the pictures have a thing that is cut by the border
BATCH = 32
RATE = 3e-3  # at most; half of it for what was trained before
NEAR = 0.95  # cells from a centre that learn its answer


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
        if box := spoil.outside(picture, drawing, boxes, rng):
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


def losses(maps: Maps, things: Tensor, ground: Tensor) -> dict[str, Tensor]:
    """What the network still gets wrong, by kind."""
    pictures = len(things)
    there = things[..., 3] >= 0
    at = things[..., :2] * CELLS
    middle = torch.arange(CELLS) + 0.5
    right = at[..., 0, None, None] - middle  # [pictures things rows columns], broadcast
    down = at[..., 1, None, None] - middle[:, None]
    far = right.square() + down.square()
    far = far.masked_fill(~there[..., None, None], 1e9)
    nearest, which = far.min(dim=1)
    sigma = 0.35 + things[..., 2].gather(1, which.flatten(1)).view_as(nearest) * CELLS / 10
    target = torch.exp(-nearest / (2 * sigma.square()))
    hot = maps.heat.sigmoid().clamp(1e-4, 1 - 1e-4)
    centre = far.flatten(2).argmin(-1)  # the cell of each thing
    is_centre = torch.zeros(pictures, CELLS * CELLS).scatter_add_(1, centre, there.float()) > 0
    is_centre = is_centre.view_as(hot)
    positive = -(1 - hot).square() * hot.log() * is_centre
    negative = -((1 - target) ** 4) * hot.square() * (1 - hot).log() * ~is_centre
    count = there.sum().clamp(min=1)
    found = {"heat": (positive.sum() + negative.sum()) / count}
    picture, row, column = (nearest < NEAR**2).nonzero(as_tuple=True)
    thing = which[picture, row, column]
    weight = torch.exp(-nearest[picture, row, column])
    weight = weight / weight.sum().clamp(min=1e-6)
    x, y, side, name, colour, style = things[picture, thing].T

    def loss_of(logits: Tensor, answer: Tensor) -> Tensor:
        said = logits[picture, :, row, column]
        each = F.cross_entropy(said, answer.long(), ignore_index=-1, reduction="none")
        return (each * weight).sum()

    found["name"] = loss_of(maps.name, name)
    found["colour"] = loss_of(maps.colour, colour)
    found["style"] = 0.2 * loss_of(maps.style, style)
    wanted = torch.stack([x * CELLS - column - 0.5, y * CELLS - row - 0.5, 3 * side.log()], dim=1)
    place = maps.place[picture, :, row, column] * torch.tensor([1.0, 1.0, 3.0])
    found["place"] = ((place - wanted).abs().sum(dim=1) * weight).sum()
    found["ground"] = F.cross_entropy(maps.ground, ground[:, 0], ignore_index=-1)
    found["pattern"] = F.cross_entropy(maps.pattern, ground[:, 1], ignore_index=-1)
    return found


def train(
    names: tuple[str, ...], minutes: float, seed: int, start: Path | None, run: Path
) -> Detector:
    """The detector after `minutes`; the rate falls with the clock."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    network = Detector(sizes(names), norm=True).to(memory_format=torch.channels_last)
    if start is not None:
        _begin_from(network, names, torch.load(start, weights_only=True))
    heads = {*network.things.parameters(), *network.vote.parameters()}
    convolutions = [w for w in network.parameters() if w.ndim == 4 and w not in heads]
    others = [w for w in network.parameters() if w.ndim != 4 or w in heads]
    optimizer = Muon(
        [
            {"params": convolutions, "muon": True, "share": 0.5, "weight_decay": 0.1},
            {"params": others, "share": 1.0, "weight_decay": 0.01},
        ],
        lr=RATE,
    )
    batches = iter(DataLoader(Pictures(names, seed), batch_size=None, num_workers=1))
    begin, step, mean = time.monotonic(), 0, {}
    top = RATE if start is None else RATE / 2
    while minutes and (done := (time.monotonic() - begin) / 60 / minutes) < 1:
        rate = top * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * np.cos(np.pi * done)) + 1e-6
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        pixels, things, ground = next(batches)
        pixels = pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1)
        parts = losses(
            network(pixels.contiguous(memory_format=torch.channels_last)), things, ground
        )
        loss = sum(parts.values())
        network.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        step += 1
        for key, value in parts.items():
            mean[key] = 0.98 * mean.get(key, value.item()) + 0.02 * value.item()
        if step % 50 == 0:
            torch.save({"names": names, "weights": network.state_dict()}, run / "network.pt")
            said = " ".join(f"{key} {value:.3f}" for key, value in mean.items())
            print(f"{step} {done:.3f} {said}", flush=True)
    return network


def _begin_from(network: Detector, names: tuple[str, ...], saved: dict) -> None:
    """Take over what was trained, for the names that are still there."""
    weights, known = saved["weights"], list(saved["names"])
    rows = [0, *(1 + known.index(name) for name in names)]
    rows += list(range(1 + len(known), len(weights["things.bias"])))
    for key in ("things.weight", "things.bias"):
        weights[key] = weights[key][rows]
    network.load_state_dict(weights)


def write(network: Detector, names: tuple[str, ...], folder: Path) -> Judge:
    """Ship in half precision, with thresholds set on `valid`."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.half().contiguous() for key, value in fused(network).state_dict().items()}
    weights = folder / "judge.safetensors"
    save_file(state, weights)
    said = {
        "recipe": "recipes/judge.py",
        "license": "CC-BY-SA-4.0",  # as are the OpenMoji drawings that it was trained on
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "heat": 0.3,
        "sure": 0.5,
        "names": list(names),
    }
    where = folder / "judge.json"
    where.write_text(json.dumps(said, indent=1) + "\n", "utf-8")
    said["heat"], said["sure"] = judge_errors.thresholds(Judge.load(folder))
    where.write_text(json.dumps(said, indent=1) + "\n", "utf-8")
    return Judge.load(folder)


def main(
    run: Path = Path("runs/judge"),
    /,
    minutes: float = 30.0,
    seed: int = 0,
    start: Path | None = None,
    ship: bool = False,
    table: bool = False,
    confusions: bool = False,
    judge: Path = FOLDER,
) -> None:
    """Train the judge into `run`, ship it, or say how it errs."""
    if ship:
        shutil.copytree(run / "judge", FOLDER, dirs_exist_ok=True)
    elif table:
        print(judge_errors.table(Judge.load(judge), report=lambda line: print(line, flush=True)))
    elif confusions:
        for line in judge_errors.confusions(Judge.load(judge)):
            print(line)
    else:
        names = (*(kind.name for kind in objects()), *SHAPES, UNKNOWN)
        run.mkdir(parents=True, exist_ok=True)
        network = train(names, minutes, seed, start, run)
        torch.save({"names": names, "weights": network.state_dict()}, run / "network.pt")
        write(network, names, run / "judge")


if __name__ == "__main__":
    tyro.cli(main)

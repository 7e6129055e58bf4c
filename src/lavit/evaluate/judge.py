"""The judge: what a picture shows, seen from the picture alone, and is that what was wanted?

`Judge.look` runs the detector of detector.py over pictures and says background and things. A thing
whose name is less probable than a threshold (set on scenes of `valid`) is "unknown". The functions
below compare what was seen with the facts that were wanted. They are strict:

    a group   all things of one name. Unless they agree in size and colour, its number, size and
              colour are wrong, each of them. A thing that is unknown belongs to no group.
    extra     a thing of a name that was not wanted, or an unknown one: `all_right` fails
    free      what the wanted facts do not say (None)
    unknown   as a background or a pattern: no one of them in all of the picture, so it is wrong

A relation that is wanted holds if it is clear by half of what the world demands; the boxes are
measured, not known.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lavit.config import InputError
from lavit.data.scenes import world
from lavit.data.scenes.world import Box, Facts, Group, Relation, Size, extent, gap
from lavit.evaluate.detector import SIDE, Detector, Found, find
from lavit.files import load_strictly, load_tensors, sha256

FOLDER = Path(__file__).with_name("judge")
UNKNOWN = "unknown"
GROUNDS = (*world.BACKGROUNDS, UNKNOWN)
PATTERNS = (*world.PATTERNS, UNKNOWN)
BETWEEN = math.sqrt(max(world.EXTENTS["small"]) * min(world.EXTENTS["big"]))  # longer is big
LOOSE = world.CLEAR / 2  # relations of measured boxes are clear by this much
SHARED = 0.25  # and share this much of the other axis
BATCH = 32
FAINT = 0.1  # what is cooler than this is not even considered


@dataclass(frozen=True)
class SeenThing:
    """One thing as seen. `name` is "unknown" if it is like nothing well enough."""

    name: str
    colour: str | None  # of a shape
    size: Size
    box: Box
    style: str
    score: float


@dataclass(frozen=True)
class Seen:
    """What the judge sees in one picture; "unknown" is a background or pattern of several."""

    background: str
    pattern: str
    things: tuple[SeenThing, ...]

    def of(self, name: str) -> tuple[SeenThing, ...]:
        """The things of one name."""
        return tuple(thing for thing in self.things if thing.name == name)

    def counts(self) -> Counter[str]:
        """How many things of each name there are."""
        return Counter(thing.name for thing in self.things)

    def boxes(self) -> dict[str, list[Box]]:
        """Where the things of each name stand, unknown ones left out."""
        boxes: dict[str, list[Box]] = {}
        for thing in self.things:
            if thing.name != UNKNOWN:
                boxes.setdefault(thing.name, []).append(thing.box)
        return boxes

    def facts(self) -> Facts:
        """Groups of like things, and how they stand. Things of one name that differ in size or
        colour make several groups, and unknown ones groups of that name, as no scene has them."""
        kinds = Counter((thing.name, thing.size, thing.colour) for thing in self.things)
        groups = [Group(name, count, size, colour) for (name, size, colour), count in kinds.items()]
        related = world.relations(self.boxes(), clear=LOOSE)
        return Facts(self.background, self.pattern, frozenset(groups), related)


class Judge:
    """Looks at pictures. The same pictures are always seen the same."""

    def __init__(self, detector: Detector, names: Sequence[str], heat: float, sure: float) -> None:
        self.detector = detector.eval()
        self.names = tuple(names)  # that of the last logit is "unknown"
        self.heat = heat  # a cell that is as hot as this holds a thing
        self.sure = sure  # a name that is less probable than this is unknown

    @classmethod
    def load(cls, folder: Path = FOLDER) -> Judge:
        """The shipped judge. Raises `InputError` if its weights are not those it names."""
        said = json.loads((folder / "judge.json").read_text("utf-8"))
        weights = folder / "judge.safetensors"
        if sha256(weights) != said["sha256"]:
            raise InputError(f"{weights} is not the file that {folder / 'judge.json'} names")
        detector = Detector(sizes(said["names"]))
        load_strictly(detector, load_tensors(weights), weights)  # fp16, copied into fp32
        return cls(detector, said["names"], said["heat"], said["sure"])

    @torch.inference_mode()
    def found(self, pictures: Sequence[Image.Image]) -> list[tuple[str, str, list[Found]]]:
        """Background, pattern and everything the detector finds, before the thresholds."""
        found: list[tuple[str, str, list[Found]]] = []
        for start in range(0, len(pictures), BATCH):
            batch = [_pixels(one) for one in pictures[start : start + BATCH]]
            maps = self.detector(torch.stack(batch))
            grounds = [GROUNDS[one] for one in maps.ground.argmax(1).tolist()]
            patterns = [PATTERNS[one] for one in maps.pattern.argmax(1).tolist()]
            found += zip(grounds, patterns, find(maps, heat=FAINT), strict=True)
        return found

    def look(self, pictures: Sequence[Image.Image]) -> list[Seen]:
        """What each picture shows."""
        return [self.seen(*one) for one in self.found(pictures)]

    def seen(self, ground: str, pattern: str, found: Sequence[Found]) -> Seen:
        """What was found, with the thresholds applied."""
        things = tuple(self._named(one) for one in found if one.heat >= self.heat)
        return Seen(ground, pattern, things)

    def _named(self, found: Found) -> SeenThing:
        name = self.names[found.name] if found.sure >= self.sure else UNKNOWN
        colour = tuple(world.COLOURS)[found.colour] if name in world.SHAPES else None
        size: Size = "big" if found.side > BETWEEN else "small"
        style = tuple(world.STYLES.values())[found.style]
        box = Box(found.x, found.y, found.side)
        return SeenThing(name, colour, size, box, style, found.heat * found.sure)


def sizes(names: Sequence[str]) -> tuple[int, int, int, int, int]:
    """How many logits a detector of these names has, of each kind."""
    colours, styles = len(world.COLOURS), len(world.STYLES)
    return len(names), colours, styles, len(GROUNDS), len(PATTERNS)


def _pixels(picture: Image.Image) -> torch.Tensor:
    """A picture as the detector takes it."""
    picture = picture.convert("RGB")
    if picture.size != (SIDE, SIDE):
        picture = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def atoms(wanted: Facts, seen: Seen) -> tuple[int, int]:
    """How many of the wanted facts are right, and how many there are."""
    right = [wanted.background == seen.background] * (wanted.background is not None)
    right += [wanted.pattern == seen.pattern] * (wanted.pattern is not None)
    for group in wanted.groups:
        right += _of_group(group, seen)
    right += [holds(relation, seen) for relation in wanted.relations]
    return sum(right), len(right)


def _of_group(group: Group, seen: Seen) -> list[bool]:
    """Is it there, and are number, size and colour right, as far as they are wanted?"""
    things = seen.of(group.name)
    alike = len({(thing.size, thing.colour) for thing in things}) == 1
    right = [bool(things), alike and len(things) == group.number]
    right += [alike and things[0].size == group.size] * (group.size is not None)
    right += [alike and things[0].colour == group.colour] * (group.colour is not None)
    return right


def holds(relation: Relation, seen: Seen) -> bool:
    """Does a relation hold between the things of two names, as measured?"""
    boxes = seen.boxes()
    if relation.first not in boxes or relation.second not in boxes:
        return False
    first, second = extent(boxes[relation.first]), extent(boxes[relation.second])
    axis = 0 if relation.kind == "left of" else 1
    across = (first[1 - axis], second[1 - axis])
    shared = min(end for _, end in across) - max(start for start, _ in across)
    least = SHARED * min(end - start for start, end in across)
    return gap(first, second, axis) >= LOOSE and shared >= least


def extras(wanted: Facts, seen: Seen) -> int:
    """Things that were not wanted: of other names, unknown, or more than were asked for."""
    asked = {group.name: group.number for group in wanted.groups}
    return (seen.counts() - Counter(asked)).total()


def all_right(wanted: Facts, seen: Seen) -> bool:
    """Is every wanted fact right, with nothing more in the picture?"""
    right, count = atoms(wanted, seen)
    return right == count and not extras(wanted, seen)


def swapped(wanted: Facts, seen: Seen) -> bool:
    """Are the right things there, but two groups with each other's colours or places?"""
    if Counter({group.name: group.number for group in wanted.groups}) != seen.counts():
        return False
    coloured = [group for group in wanted.groups if group.colour is not None]
    for a, b in itertools.combinations(coloured, 2):
        shown = ({t.colour for t in seen.of(a.name)}, {t.colour for t in seen.of(b.name)})
        if a.colour != b.colour and shown == ({b.colour}, {a.colour}):
            return True
    return any(holds(Relation(r.kind, r.second, r.first), seen) for r in wanted.relations)

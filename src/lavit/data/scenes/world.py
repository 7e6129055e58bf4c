"""What a scene is: things on a background, and the facts that words can state of it.

A thing is an object (an emoji, which has no colour of its own in the language) or a shape (which
has one). Things of the same name form a group and share size and colour, so that a name picks out
one group. Lengths are shares of the picture's width; x goes right, y goes down.

Facts say what can be read off the picture: the background, the multiset of groups, and a relation
for each pair of groups that stands clearly side by side or one above the other. Style is no fact.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal

Size = Literal["small", "big"]
RGB = tuple[int, int, int]
Cell = tuple[int, int]  # row and column
Side = Literal["left of", "above"]

STYLES = {"twemoji": "flat", "openmoji": "outlined"}  # the word for each style of training
READ_STYLES = (*STYLES, "noto")  # noto is read only
PATTERNS = ("plain", "striped", "dotted")
BACKGROUNDS: dict[str, RGB] = {
    "white": (250, 250, 250),
    "gray": (176, 180, 186),
    "yellow": (255, 236, 140),
    "orange": (255, 200, 140),
    "green": (176, 226, 170),
    "blue": (160, 206, 248),
    "purple": (206, 180, 240),
    "pink": (255, 190, 214),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond")
COLOURS: dict[str, RGB] = {
    "red": (214, 32, 40),
    "orange": (244, 128, 20),
    "yellow": (248, 208, 16),
    "green": (40, 148, 60),
    "blue": (30, 92, 214),
    "purple": (126, 50, 168),
    "brown": (124, 74, 38),
    "black": (34, 34, 38),
}

SIDES: tuple[Side, Side] = ("left of", "above")  # of a relation along x, along y
CELLS = tuple(itertools.product(range(3), range(3)))  # (row, column), in reading order
PITCH = 0.305  # between the centres of neighbouring cells
EXTENTS: dict[Size, tuple[float, float]] = {"small": (0.19, 0.206), "big": (0.33, 0.345)}
JITTER = 0.03  # at most, where there is room for it
GAP = 1 / 16  # between things, and between a thing and the border, at least
CLEAR = 0.15  # two groups this far apart along an axis are beside each other
MOST_BIG = 2  # things in a scene with a big one, at most
MOST_GROUPS = 3
MOST_ALIKE = 4  # things in a group, at most


@dataclass(frozen=True)
class Kind:
    """One entry of the frozen list of objects."""

    name: str
    codepoint: str
    plural: str
    synonyms: tuple[str, ...]


@dataclass(frozen=True)
class Box:
    """A square: its centre and its side."""

    x: float
    y: float
    side: float

    def span(self, axis: Literal["x", "y"]) -> tuple[float, float]:
        """Where it begins and ends along an axis."""
        centre = getattr(self, axis)
        return centre - self.side / 2, centre + self.side / 2


@dataclass(frozen=True)
class Thing:
    """One object or shape: what it is and where it stands. `turn` is in degrees."""

    name: str
    colour: str | None  # of a shape; None for an object
    size: Size
    cell: Cell
    box: Box
    turn: float


@dataclass(frozen=True)
class Scene:
    """A picture as a program. Things stand in reading order of their cells."""

    background: str
    pattern: str
    style: str
    things: tuple[Thing, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the groups, in reading order of their first things."""
        return tuple(dict.fromkeys(thing.name for thing in self.things))

    @property
    def coloured(self) -> frozenset[tuple[str, str]]:
        """Shapes with their colours."""
        return frozenset((thing.name, thing.colour) for thing in self.things if thing.colour)


@dataclass(frozen=True, order=True)
class Group:
    """Things of one name: how many, how big, of which colour. None: not said."""

    name: str
    number: int
    size: Size | None = None
    colour: str | None = None


@dataclass(frozen=True, order=True)
class Relation:
    """Group `first` is left of, or above, group `second`."""

    kind: Side
    first: str
    second: str


@dataclass(frozen=True)
class Facts:
    """What is so in a scene, or what a text says of one; None: not said.

    `complete` facts of a scene say everything; a text may say less.
    """

    background: str | None
    pattern: str | None
    groups: frozenset[Group]
    relations: frozenset[Relation] = frozenset()

    @property
    def number(self) -> int:
        """Things in all groups."""
        return sum(group.number for group in self.groups)

    def group(self, name: str) -> Group | None:
        """The group of a name, if there is one."""
        return next((group for group in self.groups if group.name == name), None)

    def named(self, name: str) -> Group:
        """The group of a name that is known to be there."""
        return next(group for group in self.groups if group.name == name)


@cache
def objects() -> tuple[Kind, ...]:
    """The frozen list, in its order: nano uses the first 48."""
    path = Path(__file__).with_name("objects.tsv")
    lines = [line for line in path.read_text("utf-8").splitlines() if not line.startswith("#")]
    kinds = []
    for name, codepoint, plural, _, synonyms in csv.reader(lines, delimiter="\t"):
        words = tuple(word.strip() for word in synonyms.split(",") if word.strip())
        kinds.append(Kind(name, codepoint, plural or f"{name}s", words))
    return tuple(kinds)


@cache
def kind_of(name: str) -> Kind:
    """The entry of an object's name; `KeyError` if there is none."""
    return {kind.name: kind for kind in objects()}[name]


@lru_cache(maxsize=1024)
def facts(scene: Scene) -> Facts:
    """Everything that can be read off the picture of a scene."""
    boxes = boxes_of(scene.things)
    groups = frozenset(Group(t.name, len(boxes[t.name]), t.size, t.colour) for t in scene.things)
    return Facts(scene.background, scene.pattern, groups, relations(boxes))


def boxes_of(things: Iterable[Thing]) -> dict[str, list[Box]]:
    """Where the things of each group stand."""
    boxes: dict[str, list[Box]] = {}
    for thing in things:
        boxes.setdefault(thing.name, []).append(thing.box)
    return boxes


def relations(boxes: Mapping[str, Sequence[Box]], *, clear: float = CLEAR) -> frozenset[Relation]:
    """The relations of all pairs of groups that stand clearly beside each other."""
    return frozenset(one for far, one in _beside(boxes) if far >= clear)


def murky(boxes: Mapping[str, Sequence[Box]]) -> bool:
    """Does some pair of groups stand beside each other, but not clearly so?"""
    return any(far < CLEAR for far, _ in _beside(boxes))


def _beside(boxes: Mapping[str, Sequence[Box]]) -> Iterator[tuple[float, Relation]]:
    """Pairs of groups that stand beside each other, and how far apart."""
    extents = {name: extent(members) for name, members in boxes.items()}
    for (a, first), (b, second) in itertools.permutations(extents.items(), 2):
        for axis, kind in enumerate(SIDES):
            far = gap(first, second, axis)
            if far > 0 and overlap(first, second, axis):
                yield far, Relation(kind, a, b)


def apart(boxes: Sequence[Box]) -> bool:
    """Do things keep their distance from each other and from the border?"""
    least = GAP - 1e-9
    spans = [box.span(axis) for box in boxes for axis in ("x", "y")]
    return all(start >= least and end <= 1 - least for start, end in spans) and all(
        max(abs(a.x - b.x), abs(a.y - b.y)) - (a.side + b.side) / 2 >= least
        for a, b in itertools.combinations(boxes, 2)
    )


Extent = tuple[tuple[float, float], tuple[float, float]]  # where a group begins and ends in x and y


def extent(boxes: Sequence[Box]) -> Extent:
    """Where a group begins and ends along both axes."""
    across, down = (zip(*(box.span(axis) for box in boxes), strict=True) for axis in ("x", "y"))
    return (min(next(across)), max(next(across))), (min(next(down)), max(next(down)))


def gap(first: Extent, second: Extent, axis: int) -> float:
    """From where `first` ends to where `second` begins along axis 0 (x) or 1 (y)."""
    return second[axis][0] - first[axis][1]


def overlap(a: Extent, b: Extent, axis: int) -> bool:
    """Do two groups share a stretch across an axis, at least half of the smaller one's?"""
    (a0, a1), (b0, b1) = a[1 - axis], b[1 - axis]
    return min(a1, b1) - max(a0, b0) >= 0.5 * min(a1 - a0, b1 - b0)

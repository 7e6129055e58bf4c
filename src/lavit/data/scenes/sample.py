"""Scenes at random: how many things, which, and where they stand.

Things stand on a grid of 3 x 3 cells, jittered where there is room, apart from each other and from
the border. No two groups stand beside each other unclearly. What a split wants is tried again and
again until it is met, with the split's own randomness, so a scene depends on nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache

import numpy as np

from lavit.config import InputError
from lavit.data.scenes.splits import (
    HELD_OUT_COLOURS,
    Rules,
    generator,
    share_of,
    valid_world,
)
from lavit.data.scenes.world import (
    BACKGROUNDS,
    CELLS,
    COLOURS,
    EXTENTS,
    GAP,
    JITTER,
    MOST_ALIKE,
    MOST_BIG,
    PATTERNS,
    PITCH,
    SHAPES,
    STYLES,
    Box,
    Scene,
    Size,
    Thing,
    facts,
    gap,
    murky,
    relations,
)

TRIES = 20_000
TURN = 8.0  # degrees, at most
SHAPE_SHARE = 0.35  # of the groups
NUMBERS = (0.05, 0.25, 0.3, 0.2, 0.2)  # shares of scenes with 0, 1, ... things in training
LADDER = 10  # rungs: 0 to 9 things

Cell = tuple[int, int]


def scene_at(split: str, index: int, *, seed: int = 0, rules: Rules | None = None) -> Scene:
    """Picture `index` of a split. Raises `InputError` for an unknown split or negative numbers."""
    rules = rules or Rules()
    rng = generator(split, index, seed)
    for _ in range(TRIES):
        scene = _try(split, index, rng, rules)
        if scene is not None and belongs(scene, split, rules):
            return scene
    raise InputError(
        f"no scene of the split {split!r} was found with {rules.objects} objects and "
        f"held_out_pairs={rules.held_out_pairs}: with more of either there are some"
    )


def belongs(scene: Scene, split: str, rules: Rules) -> bool:
    """Is this scene one that a split may hold?"""
    if split == "ladder":
        return True
    if valid_world(scene):
        return False
    if split == "train":
        return rules.forbids(scene) is None
    pairs = {rules.pair_of(a, b) for a, b in itertools.combinations(scene.names, 2)} - {"train"}
    if split in ("pairs", "valid_pairs"):
        if pairs != {split}:
            return False
    elif pairs:
        return False
    held = {(thing.name, thing.colour) for thing in scene.things} & HELD_OUT_COLOURS
    if bool(held) != (split == "binding"):
        return False
    shown = [rules.style_of(name) in (None, scene.style) for name in scene.names]
    if split == "style":
        return not all(shown)
    if split != "noto" and not all(shown):
        return False
    if split in ("test", "noto"):
        return share_of(facts(scene)) == "test"
    return split != "valid" or share_of(facts(scene)) == "valid"


def _try(split: str, index: int, rng: np.random.Generator, rules: Rules) -> Scene | None:
    """One attempt at a scene of a split; None if it cannot be laid out."""
    style = "noto" if split == "noto" else tuple(STYLES)[int(rng.integers(len(STYLES)))]
    if split == "ladder":
        return ladder_scene(rng, rules, index % LADDER, style)
    if split == "number":
        number = 5 + index % 2
    elif split == "binding":
        number = 2
    elif split in ("test", "valid", "noto"):
        number = 1 + index % 4  # prompts of 1, 2, 3 and 4 things in turn
    elif split in ("pairs", "valid_pairs"):
        number = 2 + index % 3
    elif split == "style":
        number = 1 + index % 3
    else:
        number = int(rng.choice(len(NUMBERS), p=NUMBERS))
    if split == "binding":
        counts: tuple[int, ...] = (1, 1)
    else:
        counts = composition(rng, number, at_least=2 if "pairs" in split else 1)
    names, colours = names_for(rng, rules, len(counts), shapes_only=split == "binding")
    may_be_big = number <= MOST_BIG
    sizes = tuple("big" if may_be_big and rng.random() < 0.5 else "small" for _ in counts)
    layouts = placements(counts, sizes)
    if not layouts:
        return None
    cells = layouts[int(rng.integers(len(layouts)))]
    background = pick(rng, tuple(BACKGROUNDS))
    pattern = pick(rng, PATTERNS)
    groups = [
        (name, colour, size, group)
        for name, colour, size, group in zip(names, colours, sizes, cells, strict=True)
    ]
    return build(background, pattern, style, groups, rng)


def pick(rng: np.random.Generator, items: Sequence) -> object:
    """One of some items."""
    return items[int(rng.integers(len(items)))]


def composition(rng: np.random.Generator, number: int, *, at_least: int = 1) -> tuple[int, ...]:
    """A number of things as sizes of groups, all ways alike."""
    ways = [way for way in compositions(number) if len(way) >= min(at_least, number)]
    return ways[int(rng.integers(len(ways)))]


@cache
def compositions(number: int) -> tuple[tuple[int, ...], ...]:
    """All ways to split a number into at most three groups of at most four, in order."""
    found = [()] if number == 0 else []
    for groups in range(1, 4):
        for way in itertools.product(range(1, MOST_ALIKE + 1), repeat=groups):
            found += [way] * (sum(way) == number)
    return tuple(found)


def names_for(
    rng: np.random.Generator, rules: Rules, count: int, *, shapes_only: bool = False
) -> tuple[list[str], list[str | None]]:
    """Different names, and a colour for each that is a shape; shapes differ in colour too."""
    names: list[str] = []
    colours: list[str | None] = []
    while len(names) < count:
        shape = shapes_only or rng.random() < SHAPE_SHARE
        name = pick(rng, SHAPES if shape else rules.objects_named)
        colour = pick(rng, tuple(COLOURS)) if shape else None
        if name not in names and (colour is None or colour not in colours):
            names.append(name)
            colours.append(colour)
    return names, colours


def nominal(cell: Cell, size: Size, side: float | None = None) -> Box:
    """Where a thing stands without jitter: in its cell, or as near as the border allows."""
    side = sum(EXTENTS[size]) / 2 if side is None else side
    room = 0.5 - GAP - side / 2
    row, column = cell
    x, y = ((at - 1) * PITCH for at in (column, row))
    return Box(0.5 + max(-room, min(room, x)), 0.5 + max(-room, min(room, y)), side)


def apart(boxes: Sequence[Box]) -> bool:
    """Do things keep their distance from each other and from the border?"""
    slack = 1e-9
    for box in boxes:
        for axis in ("x", "y"):
            start, end = box.span(axis)
            if start < GAP - slack or end > 1 - GAP + slack:
                return False
    for a, b in itertools.combinations(boxes, 2):
        if (
            max(gap([a], [b], s) for s in "xy") < GAP - slack
            and max(gap([b], [a], s) for s in "xy") < GAP - slack
        ):
            return False
    return True


@cache
def placements(
    counts: tuple[int, ...], sizes: tuple[Size, ...]
) -> tuple[tuple[tuple[Cell, ...], ...], ...]:
    """All ways to give groups their cells so that every pair is clear, and one at least related."""
    found = []
    largest = tuple(max(EXTENTS[size]) for size in sizes)
    for cells in _choices(counts, CELLS):
        groups = [
            [nominal(cell, size, side) for cell in group]
            for group, size, side in zip(cells, sizes, largest, strict=True)
        ]
        named = {str(number): group for number, group in enumerate(groups)}
        if not apart([box for group in groups for box in group]) or murky(named):
            continue
        if len(counts) <= 1 or relations(named):
            found.append(cells)
    return tuple(found)


def _choices(counts: tuple[int, ...], free: Sequence[Cell]):
    if not counts:
        yield ()
        return
    for group in itertools.combinations(free, counts[0]):
        left = [cell for cell in free if cell not in group]
        for others in _choices(counts[1:], left):
            yield (group, *others)


def build(
    background: str,
    pattern: str,
    style: str,
    groups: Sequence[tuple[str, str | None, Size, Sequence[Cell]]],
    rng: np.random.Generator,
    kept: dict[Cell, Thing] | None = None,
) -> Scene | None:
    """A scene of groups (name, colour, size, cells), jittered where there is room.

    Things of `kept` stand as they are. None if the things do not stand clearly even unjittered.
    """
    kept = kept or {}
    wanted = [(name, colour, size, cell) for name, colour, size, cells in groups for cell in cells]
    wanted.sort(key=lambda one: one[3])
    for attempt in range(8):
        jitter = JITTER if attempt < 7 else 0.0
        things = tuple(kept.get(one[3]) or _thing(*one, jitter=jitter, rng=rng) for one in wanted)
        boxes: dict[str, list[Box]] = {}
        for thing in things:
            boxes.setdefault(thing.name, []).append(thing.box)
        if apart([thing.box for thing in things]) and not murky(boxes):
            return Scene(background, pattern, style, things)
    return None


def _thing(
    name: str,
    colour: str | None,
    size: Size,
    cell: Cell,
    *,
    jitter: float,
    rng: np.random.Generator,
) -> Thing:
    side = float(rng.uniform(*EXTENTS[size]))
    box = nominal(cell, size, side)
    dx, dy, turn = rng.uniform(-1, 1, 3)
    moved = Box(box.x + float(dx) * jitter, box.y + float(dy) * jitter, side)
    return Thing(name, colour, size, cell, moved, float(turn) * TURN)


def ladder_scene(rng: np.random.Generator, rules: Rules, number: int, style: str) -> Scene | None:
    """`number` small things in any cells, of any names, on a plain or patterned background."""
    cells = [CELLS[n] for n in sorted(rng.permutation(len(CELLS))[:number])]
    background, pattern = pick(rng, tuple(BACKGROUNDS)), pick(rng, PATTERNS)
    groups = []
    for cell in cells:
        names, colours = names_for(rng, rules, 1)
        if colours[0] == background:
            return None
        groups.append((names[0], colours[0], "small", (cell,)))
    things = tuple(
        _thing(name, colour, size, group[0], jitter=0.0, rng=rng)
        for name, colour, size, group in groups
    )
    return Scene(background, pattern, style, things)

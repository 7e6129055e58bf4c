"""Scenes at random: how many things, which, and where they stand.

Things stand on a grid of 3 x 3 cells, jittered where there is room, apart from each other and from
the border. No two groups stand beside each other unclearly. What a split wants is tried again and
again until it is met, with the split's own randomness, so a scene depends on nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np

from lavit.config import InputError
from lavit.data.scenes import world
from lavit.data.scenes.chance import Rng, pick, shuffled
from lavit.data.scenes.splits import (
    HELD_OUT_COLOURS,
    Rules,
    generator,
    hidden,
    share_of,
    valid_world,
)
from lavit.data.scenes.world import JITTER, Box, Cell, Scene, Size, Thing, apart, boxes_of, facts

Layout = tuple[tuple[Cell, ...], ...]  # cells of each group
TRIES = 20_000
PATIENCE = 100  # attempts at the same kinds
TURN = 8.0  # degrees, at most
SHAPE_SHARE = 0.35  # of the groups
NUMBERS = (0.03, 0.15, 0.27, 0.25, 0.3)  # shares of scenes with 0, 1, ... things in training
LADDER = 10  # rungs: 0 to 9 things
IN_TURN = {  # numbers of things in pictures 0, 1, ... of a split, over and over
    "valid": (1, 2, 3, 4), "valid_pairs": (2, 3, 4),
    "test": (1, 2, 3, 4), "pairs": (2, 3, 4), "binding": (2,), "number": (5, 6),
    "style": (1, 2, 3), "noto": (1, 2, 3, 4), "ladder": tuple(range(LADDER)),
    "valid_ladder": tuple(range(LADDER)),
}  # fmt: skip
SHARES = {"valid": "valid", "test": "test", "noto": "test"}  # where the facts must be held out


def scene_at(split: str, index: int, *, seed: int = 0, rules: Rules | None = None) -> Scene:
    """Picture `index` of a split. Raises `InputError` for an unknown split or negative numbers."""
    rules = rules or Rules()
    rng = generator(split, index, seed)
    for attempt in range(TRIES):
        kinds = rng
        if rules.plain and split == "train":  # kept for a while, so that none is met less often
            kinds = np.random.default_rng([4, seed, index, attempt // PATIENCE])
        scene = _try(split, index, rng, kinds, rules)
        if scene is not None and belongs(scene, split, rules):
            return scene
    raise InputError(
        f"no scene of the split {split!r} was found with {rules.objects} objects and "
        f"held_out_pairs={rules.held_out_pairs}: with more of either there are some"
    )


def belongs(scene: Scene, split: str, rules: Rules) -> bool:
    """Is this scene one that a split may hold?"""
    if "ladder" in split:
        return hidden(scene) is None
    if valid_world(scene):
        return False
    if split == "train":
        return rules.forbids(scene) is None
    pairs = {rules.pair_of(a, b) for a, b in itertools.combinations(scene.names, 2)} - {"train"}
    if pairs != {split} & {"pairs", "valid_pairs"}:
        return False
    if bool(scene.coloured & HELD_OUT_COLOURS) != (split == "binding"):
        return False
    strange = any(rules.style_of(name) not in (None, scene.style) for name in scene.names)
    if split != "noto" and strange != (split == "style"):
        return False
    return split not in SHARES or share_of(facts(scene)) == SHARES[split]


def _try(split: str, index: int, rng: Rng, of_kinds: Rng, rules: Rules) -> Scene | None:
    """One attempt at a scene of a split; None if it cannot be laid out. `of_kinds` says which."""
    style = "noto" if split == "noto" else pick(rng, tuple(world.STYLES))
    turns = IN_TURN.get(split)
    number = turns[index % len(turns)] if turns else int(of_kinds.choice(len(NUMBERS), p=NUMBERS))
    if "ladder" in split:
        return _ladder(rng, rules, number, style)
    counts: tuple[int, ...] = (1, 1)
    if split != "binding":
        least = min(2 if "pairs" in split else 1, number)
        ways = compositions(number)
        counts = pick(of_kinds, [way for way in ways if least <= len(way) <= rules.most_kinds])
    if rules.plain and split == "train":
        kinds = _even(of_kinds, rules, len(counts))
    else:
        kinds = _kinds(rng, rules, len(counts), shapes_only=split == "binding")
    may_be_big = number <= world.MOST_BIG
    sizes: tuple[Size, ...] = tuple(
        "big" if may_be_big and rng.random() < 0.5 else "small" for _ in counts
    )
    layouts = placements(counts, sizes)
    if not layouts:
        return None
    cells = pick(rng, layouts)
    background, pattern = pick(rng, tuple(world.BACKGROUNDS)), pick(rng, world.PATTERNS)
    each = zip(kinds.items(), sizes, cells, strict=True)
    groups = [(name, colour, size, own) for (name, colour), size, own in each]
    return build(background, pattern, style, groups, rng)


@cache
def compositions(number: int) -> tuple[tuple[int, ...], ...]:
    """All ways to split a number into at most three groups of at most four, in order."""
    found: list[tuple[int, ...]] = [()] if number == 0 else []
    for groups in range(1, 4):
        for way in itertools.product(range(1, world.MOST_ALIKE + 1), repeat=groups):
            found += [way] * (sum(way) == number)
    return tuple(found)


def _kinds(rng: Rng, rules: Rules, count: int, shapes_only: bool = False) -> dict[str, str | None]:
    """Different names, and a colour for each that is a shape; shapes differ in colour too."""
    found: dict[str, str | None] = {}
    while len(found) < count:
        shape = shapes_only or rng.random() < SHAPE_SHARE
        name = pick(rng, world.SHAPES if shape else rules.objects_named)
        colour = pick(rng, tuple(world.COLOURS)) if shape else None
        if name not in found and (colour is None or colour not in found.values()):
            found[name] = colour
    return found


def _even(rng: Rng, rules: Rules, count: int) -> dict[str, str | None]:
    """One kind or two that may stand together, so that each is met as often as every other."""
    names, ways, one, two = even_shares(rules)
    chosen: tuple[str, ...] = ()
    if count == 1:
        chosen = (names[int(rng.choice(len(names), p=one))],)
    elif count == 2:
        chosen = ways[int(rng.choice(len(ways), p=two))]
        chosen = chosen if rng.random() < 0.5 else chosen[::-1]
    colours = shuffled(rng, tuple(world.COLOURS))
    return {name: colours.pop() if name in world.SHAPES else None for name in chosen}


@cache
def even_shares(
    rules: Rules,
) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...], np.ndarray, np.ndarray]:
    """Names, pairs of them that training may show, and the shares of both among scenes of one kind
    and of two: all objects, and all shapes, come equally often where the pairs allow it.
    """
    names = (*rules.objects_named, *world.SHAPES)
    shape = np.array([name in world.SHAPES for name in names])
    wanted = np.where(shape, SHAPE_SHARE / shape.sum(), (1 - SHAPE_SHARE) / (~shape).sum())
    ways = [
        (a, b)
        for a, b in itertools.combinations(range(len(names)), 2)
        if rules.pair_of(names[a], names[b]) == "train"
    ]
    allowed = np.zeros((len(names), len(names)))
    for a, b in ways:
        allowed[a, b] = allowed[b, a] = 1.0
    scale = np.sqrt(wanted)
    for _ in range(500):  # symmetric scaling to equal sums
        scale = np.sqrt(scale * wanted / (allowed @ scale + 1e-12)) * allowed.any(1)
    two = np.array([scale[a] * scale[b] for a, b in ways])
    two /= two.sum()
    met = np.zeros(len(names))
    for (a, b), share in zip(ways, two, strict=True):
        met[[a, b]] += share
    kinds = _shares_of_kinds()  # scenes of one kind give what those of two lack
    one = np.clip(wanted * (kinds[0] + 2 * kinds[1]) - met * kinds[1], 0.0, None)
    pairs = tuple((names[a], names[b]) for a, b in ways)
    return names, pairs, one / one.sum(), two


def _shares_of_kinds() -> tuple[float, float]:
    """Shares of a plain world's scenes with one kind and with two."""
    found = [0.0, 0.0]
    for number, share in enumerate(NUMBERS):
        ways = [len(way) for way in compositions(number) if 1 <= len(way) <= 2]
        for kinds in ways:
            found[kinds - 1] += share / len(ways)
    return found[0], found[1]


@cache
def nominal(cell: Cell, size: Size, side: float | None = None) -> Box:
    """Where a thing stands without jitter: in its cell, or as near as the border allows."""
    side = sum(world.EXTENTS[size]) / 2 if side is None else side
    room = 0.5 - world.GAP - side / 2
    row, column = cell
    x, y = ((at - 1) * world.PITCH for at in (column, row))
    return Box(0.5 + max(-room, min(room, x)), 0.5 + max(-room, min(room, y)), side)


@cache
def placements(counts: tuple[int, ...], sizes: tuple[Size, ...]) -> tuple[Layout, ...]:
    """All ways to give groups their cells so that every pair is clear, and one at least related."""
    found = []
    for cells in _choices(counts, world.CELLS):
        groups = [*zip(cells, sizes, strict=True)]
        if len(groups) == 1:
            fits = apart(_nominals(*groups[0]))
        else:
            pairs = [_related(a, b) for a, b in itertools.combinations(sorted(groups), 2)]
            fits = None not in pairs and any(pairs)
        if fits or not groups:
            found.append(cells)
    return tuple(found)


@cache
def _nominals(cells: tuple[Cell, ...], size: Size) -> list[Box]:
    """Where the things of a group stand at their largest."""
    return [nominal(cell, size, max(world.EXTENTS[size])) for cell in cells]


@cache
def _related(
    first: tuple[tuple[Cell, ...], Size], second: tuple[tuple[Cell, ...], Size]
) -> bool | None:
    """Is one of two groups beside the other? None: unclear, or things are too near each other."""
    groups = {"first": _nominals(*first), "second": _nominals(*second)}
    if world.murky(groups) or not apart([*groups["first"], *groups["second"]]):
        return None
    return bool(world.relations(groups))


def _choices(counts: tuple[int, ...], free: Sequence[Cell]) -> Iterator[Layout]:
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
    rng: Rng,
) -> Scene | None:
    """A scene of groups (name, colour, size, cells), jittered where there is room.

    None if the things do not stand clearly even unjittered.
    """
    wanted = [(name, colour, size, cell) for name, colour, size, cells in groups for cell in cells]
    wanted.sort(key=lambda one: one[3])
    for attempt in range(8):
        jitter = JITTER if attempt < 7 else 0.0
        things = tuple(_thing(*one, jitter, rng) for one in wanted)
        if apart([thing.box for thing in things]) and not world.murky(boxes_of(things)):
            return Scene(background, pattern, style, things)
    return None


def _thing(name: str, colour: str | None, size: Size, cell: Cell, jitter: float, rng: Rng) -> Thing:
    side = float(rng.uniform(*world.EXTENTS[size]))
    box = nominal(cell, size, side)
    dx, dy, turn = (float(luck) for luck in rng.uniform(-1, 1, 3))
    box = Box(box.x + dx * jitter, box.y + dy * jitter, side)
    return Thing(name, colour, size, cell, box, turn * TURN)


def _ladder(rng: Rng, rules: Rules, number: int, style: str) -> Scene | None:
    """`number` small things in any cells, of any names, on a plain or patterned background."""
    cells = [world.CELLS[n] for n in sorted(rng.permutation(len(world.CELLS))[:number])]
    background, pattern = pick(rng, tuple(world.BACKGROUNDS)), pick(rng, world.PATTERNS)
    kinds: list[tuple[str, str | None]] = []
    for _ in cells:
        kinds += _kinds(rng, rules, 1).items()
    places = zip(kinds, cells, strict=True)
    things = tuple(_thing(*kind, "small", cell, 0.0, rng) for kind, cell in places)
    return Scene(background, pattern, style, things)

"""Edits: an instruction, a scene before and the scene after; all else stands exactly as before."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from lavit.data.scenes import world
from lavit.data.scenes.chance import Rng, pick, shuffled
from lavit.data.scenes.language import around, group_words, listed, place_words, the
from lavit.data.scenes.lexicon import NUMBERS, article, noun
from lavit.data.scenes.sample import SHAPE_SHARE, TURN, nominal
from lavit.data.scenes.splits import MOST_IN_TRAINING, DocumentRules, Rules, valid_world
from lavit.data.scenes.world import (
    JITTER,
    Box,
    Cell,
    Group,
    Relation,
    Scene,
    Thing,
    boxes_of,
    facts,
)

TRIES = 8  # at an edit of one kind; more if few scenes are allowed
PATIENCE = 60
TEXTS = {
    "add": ("add {group}", "add {group}", "put {group}", "draw {group}"),
    "remove": ("remove {group}", "take away {group}", "delete {group}"),
    "replace": (
        "replace {group} with {new}",
        "replace {group} by {new}",
        "turn {group} into {new}",
    ),
    "move": ("move {group}", "move {group}", "put {group}"),
    "swap": ("swap {groups}", "swap the places of {groups}", "exchange {groups}"),
    "recolour": (
        "make {group} {colour}",
        "paint {group} {colour}",
        "change the colour of {group} to {colour}",
    ),
    "resize": ("make {group} {size}", "make {group} {comparative}"),
    "number": ("make it {number} {noun}", "change the number of {many} to {number}"),
    "background": ("make the background {colour}", "change the background to {colour}"),
    "ground": ("put it on a {pattern} {colour} background",),
    "pattern": (
        "make the background {pattern}",
        "change the pattern of the background to {pattern}",
        "give it a {pattern} background",
    ),
    "style": ("draw it {style}", "make it {style}", "draw it in the {style} style"),
}


@dataclass(frozen=True)
class SceneEdit:
    """What is asked for, of which kind, the scenes that are shown, and the one that is right."""

    kind: str
    prompt: str
    sources: tuple[Scene, ...]
    target: Scene

    @property
    def source(self) -> Scene:
        """The first scene that is shown."""
        return self.sources[0]


Change = tuple[str, Scene] | None


def edit(
    scene: Scene,
    rng: Rng,
    rules: Rules,
    kind: str | None = None,
    *,
    allowed: Callable[[Scene], bool] | None = None,
    document: DocumentRules | None = None,
) -> SceneEdit | None:
    """An edit of a scene, of some kind or of any; None if the scene allows none.

    Without `allowed`, the edit is one of training: the target obeys the rules, and so do both
    scenes and the words together. With it, only targets that it lets through are made.
    """
    if document is None:
        document = DocumentRules(rules, training=allowed is None)
        if (document.training and rules.forbids(scene)) or not document.admits(scenes=[scene]):
            return None
    kinds = tuple(EDIT_KINDS) if kind is None else (kind,)
    shares = np.array([EDIT_KINDS[one] for one in kinds])
    tries = TRIES if allowed is None else PATIENCE
    for which in rng.choice(len(kinds), len(kinds), replace=False, p=shares / shares.sum()):
        for _ in range(tries):
            change = _change(kinds[which], scene, rng, rules)
            if change is None or not sound(change[1]) or change[1] == scene:
                continue
            text, target = change
            fine = rules.forbids(target) is None if allowed is None else allowed(target)
            if fine and document.admits([text], [target]):
                return SceneEdit(kinds[which], text, (scene,), target)
    return None


def sound(scene: Scene) -> bool:
    """Is this a picture of the world: things apart, each relation clear, and one at least?"""
    return not valid_world(scene) and (len(scene.names) < 2 or bool(facts(scene).relations))


def _change(kind: str, scene: Scene, rng: Rng, rules: Rules) -> Change:
    """One attempt at an edit of a kind; None if it fails."""
    if kind in OF_SCENES:
        return OF_SCENES[kind](scene, rng, rules)
    coloured = kind == "recolour"
    groups = sorted(group for group in facts(scene).groups if group.colour or not coloured)
    return OF_GROUPS[kind](scene, pick(rng, groups), rng, rules) if groups else None


def _say(rng: Rng, key: str, **words: str) -> str:
    return pick(rng, TEXTS[key]).format(**words)


def _with(scene: Scene, things: list[Thing]) -> Scene:
    """The scene with other things, in reading order."""
    return replace(scene, things=tuple(sorted(things, key=lambda thing: thing.cell)))


def _members(scene: Scene, name: str) -> list[Thing]:
    return [thing for thing in scene.things if thing.name == name]


def _others(scene: Scene, *names: str) -> list[Thing]:
    return [thing for thing in scene.things if thing.name not in names]


def _renamed(scene: Scene, group: Group, name: str, colour: str | None) -> Scene:
    """The scene with another name and colour for the things of a group."""
    new = [replace(thing, name=name, colour=colour) for thing in _members(scene, group.name)]
    return _with(scene, _others(scene, group.name) + new)


def _of(name: str, relations: frozenset[Relation]) -> frozenset[Relation]:
    return frozenset(one for one in relations if name in (one.first, one.second))


def _spots(
    things: list[Thing], rng: Rng, group: Group, wanted: Callable[[frozenset[Relation]], bool]
) -> tuple[Cell, ...] | None:
    """Free cells for so many more things of a group, in which the relations are as wanted."""
    taken = {thing.cell for thing in things}
    free = [cell for cell in world.CELLS if cell not in taken]
    boxes = boxes_of(things)
    for cells in shuffled(rng, list(itertools.combinations(free, group.number))):
        new = [nominal(cell, group.size) for cell in cells]
        then = {**boxes, group.name: boxes.get(group.name, []) + new}
        if wanted(world.relations(then)) and not world.murky(then):
            return cells
    return None


def _set(thing: Thing, cell: Cell, rng: Rng) -> Thing:
    """A thing in another cell, jittered there."""
    box = nominal(cell, thing.size, thing.box.side)
    dx, dy = (float(d) * JITTER for d in rng.uniform(-1, 1, 2))
    return replace(thing, cell=cell, box=Box(box.x + dx, box.y + dy, box.side))


def _new(group: Group, cells: tuple[Cell, ...], rng: Rng) -> list[Thing]:
    """New things of a group."""
    things, size = [], group.size
    assert size is not None  # groups of a scene have one
    for cell in cells:
        side = float(rng.uniform(*world.EXTENTS[size]))
        turn = float(rng.uniform(-1, 1)) * TURN
        thing = Thing(group.name, group.colour, size, cell, Box(0, 0, side), turn)
        things.append(_set(thing, cell, rng))
    return things


def _fresh_colour(scene: Scene, rng: Rng) -> str:
    """A colour that neither a shape nor the background has."""
    taken = {thing.colour for thing in scene.things} | {scene.background}
    return pick(rng, [colour for colour in world.COLOURS if colour not in taken])


def _fresh(scene: Scene, rng: Rng, rules: Rules) -> tuple[str, str | None]:
    """A name that the scene lacks, and a colour that no other shape has."""
    shape = rng.random() < SHAPE_SHARE
    choices = world.SHAPES if shape else rules.objects_named
    name = pick(rng, [name for name in choices if name not in scene.names])
    return name, _fresh_colour(scene, rng) if shape else None


def _places(scene: Scene, name: str, rng: Rng) -> str:
    """Every relation of a group: " to the right of the owl and above the star"."""
    said = facts(scene)
    there = ((place_words(kind, rng, 0.6), said.named(other)) for kind, other in around(said, name))
    words = shuffled(rng, [f"{where} {the(group)}" for where, group in there])
    return f" {listed(words)}" if words else ""


def _add(scene: Scene, rng: Rng, rules: Rules) -> Change:
    if len(scene.things) >= MOST_IN_TRAINING or len(scene.names) >= world.MOST_GROUPS:
        return None
    number = 2 if len(scene.things) <= 2 and rng.random() < 0.25 else 1
    name, colour = _fresh(scene, rng, rules)
    may_be_big = len(scene.things) + number <= world.MOST_BIG
    size: world.Size = "big" if may_be_big and rng.random() < 0.5 else "small"
    group = Group(name, number, size, colour)
    old = list(scene.things)
    cells = _spots(old, rng, group, lambda found: not old or bool(_of(name, found)))
    if cells is None:
        return None
    target = _with(scene, old + _new(group, cells, rng))
    where = _places(target, name, rng)
    if old and not where:
        return None
    return _say(rng, "add", group=group_words(group)) + where, target


def _swap(scene: Scene, rng: Rng, rules: Rules) -> Change:
    said = facts(scene)
    groups = sorted(said.groups)
    pairs = [p for p in itertools.combinations(groups, 2) if p[0].number == p[1].number]
    if not pairs:
        return None
    a, b = pick(rng, pairs)
    if rng.random() < 0.5:
        a, b = b, a
    things = _others(scene, a.name, b.name)
    for one, other in zip(_members(scene, a.name), _members(scene, b.name), strict=True):
        things += [_at(one, other), _at(other, one)]
    target = _with(scene, things)
    names = {**{name: name for name in scene.names}, a.name: b.name, b.name: a.name}
    wanted = frozenset(Relation(r.kind, names[r.first], names[r.second]) for r in said.relations)
    if facts(target).relations != wanted or not wanted:
        return None
    return _say(rng, "swap", groups=f"{the(a)} and {the(b)}"), target


def _at(thing: Thing, there: Thing) -> Thing:
    """A thing where another stands."""
    box = nominal(there.cell, thing.size, thing.box.side)
    if thing.size == there.size:
        box = replace(there.box, side=thing.box.side)
    return replace(thing, cell=there.cell, box=box)


def _background(scene: Scene, rng: Rng, rules: Rules) -> Change:
    colour = pick(rng, [c for c in world.BACKGROUNDS if c != scene.background])
    if rng.random() < 0.5:
        return _say(rng, "background", colour=colour), replace(scene, background=colour)
    pattern = pick(rng, world.PATTERNS)
    text = _say(rng, "ground", pattern=pattern, colour=colour)
    return text, replace(scene, background=colour, pattern=pattern)


def _pattern(scene: Scene, rng: Rng, rules: Rules) -> Change:
    pattern = pick(rng, [p for p in world.PATTERNS if p != scene.pattern])
    return _say(rng, "pattern", pattern=pattern), replace(scene, pattern=pattern)


def _style(scene: Scene, rng: Rng, rules: Rules) -> Change:
    if not scene.things or scene.style not in world.STYLES:
        return None
    style = pick(rng, [style for style in world.STYLES if style != scene.style])
    return _say(rng, "style", style=world.STYLES[style]), replace(scene, style=style)


def _remove(scene: Scene, group: Group, rng: Rng, rules: Rules) -> Change:
    return _say(rng, "remove", group=the(group)), _with(scene, _others(scene, group.name))


def _replace(scene: Scene, group: Group, rng: Rng, rules: Rules) -> Change:
    name, colour = _fresh(_with(scene, _others(scene, group.name)), rng, rules)
    if name == group.name:
        return None
    words = " ".join(word for word in (colour, noun(name, group.number)) if word)
    new = article(words) if group.number == 1 else words
    text = _say(rng, "replace", group=the(group), new=new)
    return text, _renamed(scene, group, name, colour)


def _move(scene: Scene, group: Group, rng: Rng, rules: Rules) -> Change:
    before = _of(group.name, facts(scene).relations)
    if not before:
        return None
    across = {Relation(r.kind, r.second, r.first) for r in before}
    other_side = rng.random() < 0.7

    def wanted(found: frozenset[Relation]) -> bool:
        mine = _of(group.name, found)
        return bool(mine & across if other_side else mine - before)

    rest = _others(scene, group.name)
    cells = _spots(rest, rng, group, wanted)
    if cells is None:
        return None
    members = _members(scene, group.name)
    moved = [_set(thing, cell, rng) for thing, cell in zip(members, cells, strict=True)]
    target = _with(scene, rest + moved)
    if not wanted(facts(target).relations):
        return None
    return _say(rng, "move", group=the(group)) + _places(target, group.name, rng), target


def _recolour(scene: Scene, group: Group, rng: Rng, rules: Rules) -> Change:
    colour = _fresh_colour(scene, rng)
    text = _say(rng, "recolour", group=the(group), colour=colour)
    return text, _renamed(scene, group, group.name, colour)


def _resize(scene: Scene, group: Group, rng: Rng, rules: Rules) -> Change:
    if len(scene.things) > world.MOST_BIG:
        return None
    size: world.Size = "small" if group.size == "big" else "big"
    comparative = {"small": "smaller", "big": "bigger"}[size]
    things = _others(scene, group.name)
    for thing in _members(scene, group.name):
        box = nominal(thing.cell, size, float(rng.uniform(*world.EXTENTS[size])))
        things.append(replace(thing, size=size, box=box))
    target = _with(scene, things)
    if facts(target).relations != facts(scene).relations:
        return None
    return _say(rng, "resize", group=the(group), size=size, comparative=comparative), target


def _number(scene: Scene, group: Group, rng: Rng, rules: Rules) -> Change:
    room = world.MOST_BIG if group.size == "big" else MOST_IN_TRAINING
    most = min(world.MOST_ALIKE, room - len(scene.things) + group.number)
    numbers = [n for n in range(1, most + 1) if n != group.number]
    if not numbers:
        return None
    number = pick(rng, numbers)
    kept = _others(scene, group.name) + shuffled(rng, _members(scene, group.name), number)
    missing = replace(group, number=max(0, number - group.number))
    so = facts(scene).relations
    cells = _spots(kept, rng, missing, so.__eq__)
    if cells is None:
        return None
    target = _with(scene, kept + _new(group, cells, rng))
    if facts(target).relations != so:
        return None
    words = {"number": NUMBERS[number], "noun": noun(group.name, number)}
    return _say(rng, "number", **words, many=noun(group.name, 2)), target


OF_SCENES: dict[str, Callable[[Scene, Rng, Rules], Change]] = {
    "add": _add, "swap": _swap, "background": _background, "pattern": _pattern, "style": _style,
}  # fmt: skip
OF_GROUPS: dict[str, Callable[[Scene, Group, Rng, Rules], Change]] = {
    "remove": _remove, "replace": _replace, "move": _move, "recolour": _recolour,
    "resize": _resize, "number": _number,
}  # fmt: skip
EDIT_KINDS = {  # how often each is tried first
    "add": 2.5, "remove": 0.7, "replace": 1.0, "move": 3.0, "swap": 3.0, "recolour": 1.5,
    "resize": 1.0, "number": 1.0, "background": 0.6, "pattern": 0.5, "style": 0.5,
}  # fmt: skip

"""Edits: an instruction, a scene before and the scene after; all else stands exactly as before."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from lavit.data.scenes.language import group_words, listed, the
from lavit.data.scenes.leaks import Document
from lavit.data.scenes.lexicon import NUMBERS, article, noun
from lavit.data.scenes.questions import around
from lavit.data.scenes.sample import JITTER, SHAPE_SHARE, TURN, apart, nominal
from lavit.data.scenes.splits import MOST_IN_TRAINING, Rules, valid_world
from lavit.data.scenes.world import (
    BACKGROUNDS,
    CELLS,
    COLOURS,
    EXTENTS,
    MOST_ALIKE,
    MOST_BIG,
    MOST_GROUPS,
    PATTERNS,
    SHAPES,
    STYLES,
    Box,
    Group,
    Relation,
    Scene,
    Thing,
    facts,
    murky,
    relations,
)

TRIES = 8  # at an edit of one kind; more if few scenes are allowed
PATIENCE = 60


@dataclass(frozen=True)
class Edit:
    """What is asked for, of which kind, and the scenes before and after."""

    kind: str
    prompt: str
    source: Scene
    target: Scene


Change = tuple[str, Scene] | None
Rng = np.random.Generator


def edit(
    scene: Scene,
    rng: Rng,
    rules: Rules,
    kind: str | None = None,
    *,
    allowed: Callable[[Scene], bool] | None = None,
    document: Document | None = None,
) -> Edit | None:
    """An edit of a scene, of some kind or of any; None if the scene allows none.

    Without `allowed`, the edit is one of training: the target obeys the rules, and so do both
    scenes and the words together. With it, only targets that it lets through are made.
    """
    if document is None:
        document = Document(rules, training=allowed is None)
        if (document.training and rules.forbids(scene)) or not document.admits(scenes=[scene]):
            return None
    kinds = tuple(OFTEN) if kind is None else (kind,)
    shares = np.array([OFTEN[one] for one in kinds])
    tries = TRIES if allowed is None else PATIENCE
    for which in rng.choice(len(kinds), len(kinds), replace=False, p=shares / shares.sum()):
        for _ in range(tries):
            change = EDITS[kinds[which]](scene, rng, rules)
            if change is None or not sound(change[1]) or change[1] == scene:
                continue
            text, target = change
            fine = rules.forbids(target) is None if allowed is None else allowed(target)
            if fine and document.admits([text], [target]):
                return Edit(kinds[which], text, scene, target)
    return None


def sound(scene: Scene) -> bool:
    """Is this a picture of the world: things apart, each relation clear, and one at least?"""
    if valid_world(scene) or not apart([thing.box for thing in scene.things]):
        return False
    return len(scene.names) < 2 or bool(facts(scene).relations)


def _with(scene: Scene, things: list[Thing] | tuple[Thing, ...]) -> Scene:
    """The scene with other things, in reading order."""
    return replace(scene, things=tuple(sorted(things, key=lambda thing: thing.cell)))


def _choose(rng: Rng, items):
    return items[int(rng.integers(len(items)))]


def _members(scene: Scene, name: str) -> list[Thing]:
    return [thing for thing in scene.things if thing.name == name]


def _any_group(scene: Scene, rng: Rng) -> Group | None:
    groups = sorted(facts(scene).groups)
    return _choose(rng, groups) if groups else None


def _free(scene: Scene) -> list[tuple[int, int]]:
    taken = {thing.cell for thing in scene.things}
    return [cell for cell in CELLS if cell not in taken]


def _spots(
    scene: Scene, rng: Rng, group: Group, wanted: Callable[[frozenset[Relation]], bool]
) -> tuple[tuple[int, int], ...] | None:
    """Free cells for so many more things of a group, in which the relations are as wanted."""
    choices = list(itertools.combinations(_free(scene), group.number))
    boxes: dict[str, list[Box]] = {}
    for thing in scene.things:
        boxes.setdefault(thing.name, []).append(thing.box)
    for which in rng.permutation(len(choices)):
        cells = choices[which]
        new = [nominal(cell, group.size) for cell in cells]
        then = {**boxes, group.name: boxes.get(group.name, []) + new}
        if wanted(relations(then)) and not murky(then):
            return cells
    return None


def _set(thing: Thing, cell: tuple[int, int], rng: Rng) -> Thing:
    """A thing in another cell, jittered there."""
    box = nominal(cell, thing.size, thing.box.side)
    dx, dy = (float(d) * JITTER for d in rng.uniform(-1, 1, 2))
    return replace(thing, cell=cell, box=Box(box.x + dx, box.y + dy, box.side))


def _new(name: str, colour: str | None, size: str, cell: tuple[int, int], rng: Rng) -> Thing:
    side = float(rng.uniform(*EXTENTS[size]))
    turn = float(rng.uniform(-1, 1)) * TURN
    return _set(Thing(name, colour, size, cell, Box(0, 0, side), turn), cell, rng)


def _fresh(scene: Scene, rng: Rng, rules: Rules) -> tuple[str, str | None]:
    """A name that the scene lacks, and a colour that no other shape has."""
    if rng.random() < SHAPE_SHARE:
        taken = {thing.colour for thing in scene.things} | {scene.background}
        colours = [colour for colour in COLOURS if colour not in taken]
        names = [name for name in SHAPES if name not in scene.names]
        return _choose(rng, names), _choose(rng, colours)
    names = [name for name in rules.objects_named if name not in scene.names]
    return _choose(rng, names), None


def _places(scene: Scene, name: str, rng: Rng) -> str:
    """Every relation of a group: "to the right of the owl and above the star"."""
    said = facts(scene)
    words = []
    for kind, other in around(said, name):
        side = f"to the {kind}" if kind.endswith(" of") and rng.random() < 0.6 else kind
        words.append(f"{side} {the(said.group(other))}")
    order = rng.permutation(len(words))
    return " ".join(["", listed([words[n] for n in order])]) if words else ""


def _add(scene: Scene, rng: Rng, rules: Rules) -> Change:
    if len(scene.things) >= MOST_IN_TRAINING or len(scene.names) >= MOST_GROUPS:
        return None
    number = 2 if len(scene.things) <= 2 and rng.random() < 0.25 else 1
    name, colour = _fresh(scene, rng, rules)
    may_be_big = len(scene.things) + number <= MOST_BIG
    size = "big" if may_be_big and rng.random() < 0.5 else "small"
    cells = _spots(
        scene,
        rng,
        Group(name, number, size),
        lambda found: not scene.things or any(name in (r.first, r.second) for r in found),
    )
    if cells is None:
        return None
    target = _with(scene, [*scene.things, *(_new(name, colour, size, c, rng) for c in cells)])
    where = _places(target, name, rng)
    if scene.things and not where:
        return None
    words = group_words(Group(name, number, size, colour))
    return f"{_choose(rng, ('add', 'add', 'put', 'draw'))} {words}{where}", target


def _remove(scene: Scene, rng: Rng, rules: Rules) -> Change:
    group = _any_group(scene, rng)
    if group is None:
        return None
    target = _with(scene, [thing for thing in scene.things if thing.name != group.name])
    return f"{_choose(rng, ('remove', 'take away', 'delete'))} {the(group)}", target


def _replace(scene: Scene, rng: Rng, rules: Rules) -> Change:
    group = _any_group(scene, rng)
    if group is None:
        return None
    rest = [thing for thing in scene.things if thing.name != group.name]
    name, colour = _fresh(_with(scene, rest), rng, rules)
    if name == group.name:
        return None
    things = [
        replace(thing, name=name, colour=colour) if thing.name == group.name else thing
        for thing in scene.things
    ]
    words = " ".join(word for word in (colour, noun(name, group.number)) if word)
    new = article(words) if group.number == 1 else words
    verb, link = _choose(rng, (("replace", "with"), ("replace", "by"), ("turn", "into")))
    return f"{verb} {the(group)} {link} {new}", _with(scene, things)


def _move(scene: Scene, rng: Rng, rules: Rules) -> Change:
    group = _any_group(scene, rng)
    if group is None:
        return None
    before = frozenset(r for r in facts(scene).relations if group.name in (r.first, r.second))
    if not before:
        return None
    across = {Relation(r.kind, r.second, r.first) for r in before}
    members = _members(scene, group.name)
    rest = _with(scene, [thing for thing in scene.things if thing.name != group.name])
    other_side = rng.random() < 0.7

    def wanted(found: frozenset[Relation]) -> bool:
        mine = {r for r in found if group.name in (r.first, r.second)}
        return bool(mine & across if other_side else mine - before)

    cells = _spots(rest, rng, group, wanted)
    if cells is None:
        return None
    moved = [_set(thing, cell, rng) for thing, cell in zip(members, cells, strict=True)]
    target = _with(scene, [*rest.things, *moved])
    if not wanted(facts(target).relations):
        return None
    verb = _choose(rng, ("move", "move", "put"))
    return f"{verb} {the(group)}{_places(target, group.name, rng)}", target


def _swap(scene: Scene, rng: Rng, rules: Rules) -> Change:
    said = facts(scene)
    groups = sorted(said.groups)
    pairs = [p for p in itertools.combinations(groups, 2) if p[0].number == p[1].number]
    if not pairs:
        return None
    a, b = (pair := _choose(rng, pairs))[0], pair[1]
    if rng.random() < 0.5:
        a, b = b, a
    things = [thing for thing in scene.things if thing.name not in (a.name, b.name)]
    for one, other in zip(_members(scene, a.name), _members(scene, b.name), strict=True):
        things += [_at(one, other), _at(other, one)]
    target = _with(scene, things)
    names = {a.name: b.name, b.name: a.name}
    wanted = frozenset(
        Relation(r.kind, names.get(r.first, r.first), names.get(r.second, r.second))
        for r in said.relations
    )
    if facts(target).relations != wanted or not wanted:
        return None
    words = f"{the(a)} and {the(b)}"
    return _choose(rng, (f"swap {words}", f"swap the places of {words}", f"exchange {words}")), (
        target
    )


def _at(thing: Thing, there: Thing) -> Thing:
    """A thing where another stands."""
    box = nominal(there.cell, thing.size, thing.box.side)
    if thing.size == there.size:
        box = replace(there.box, side=thing.box.side)
    return replace(thing, cell=there.cell, box=box)


def _recolour(scene: Scene, rng: Rng, rules: Rules) -> Change:
    shapes = sorted(group for group in facts(scene).groups if group.colour)
    taken = {thing.colour for thing in scene.things} | {scene.background}
    if not shapes:
        return None
    group = _choose(rng, shapes)
    colour = _choose(rng, [colour for colour in COLOURS if colour not in taken])
    things = [
        replace(thing, colour=colour) if thing.name == group.name else thing
        for thing in scene.things
    ]
    text = _choose(
        rng,
        (
            f"make {the(group)} {colour}",
            f"paint {the(group)} {colour}",
            f"change the colour of {the(group)} to {colour}",
        ),
    )
    return text, _with(scene, things)


def _resize(scene: Scene, rng: Rng, rules: Rules) -> Change:
    group = _any_group(scene, rng)
    if group is None or len(scene.things) > MOST_BIG:
        return None
    size = "small" if group.size == "big" else "big"
    things = []
    for thing in scene.things:
        if thing.name == group.name:
            box = nominal(thing.cell, size, float(rng.uniform(*EXTENTS[size])))
            thing = replace(thing, size=size, box=box)
        things.append(thing)
    target = _with(scene, things)
    if facts(target).relations != facts(scene).relations:
        return None
    word = _choose(rng, (size, "bigger" if size == "big" else "smaller"))
    return f"make {the(group)} {word}", target


def _number(scene: Scene, rng: Rng, rules: Rules) -> Change:
    group = _any_group(scene, rng)
    if group is None:
        return None
    room = MOST_BIG if group.size == "big" else MOST_IN_TRAINING
    most = min(MOST_ALIKE, room - len(scene.things) + group.number)
    numbers = [n for n in range(1, most + 1) if n != group.number]
    if not numbers:
        return None
    number = _choose(rng, numbers)
    members = _members(scene, group.name)
    rest = [thing for thing in scene.things if thing.name != group.name]
    kept = [members[n] for n in rng.permutation(len(members))[:number]]
    so = facts(scene).relations
    cells = _spots(
        _with(scene, rest + kept), rng, replace(group, number=number - len(kept)), so.__eq__
    )
    if cells is None:
        return None
    added = [_new(group.name, group.colour, group.size, cell, rng) for cell in cells]
    target = _with(scene, rest + kept + added)
    if facts(target).relations != so:
        return None
    words = f"{NUMBERS[number]} {noun(group.name, number)}"
    many = noun(group.name, 2)
    text = _choose(rng, (f"make it {words}", f"change the number of {many} to {NUMBERS[number]}"))
    return text, target


def _background(scene: Scene, rng: Rng, rules: Rules) -> Change:
    colour = _choose(rng, [c for c in BACKGROUNDS if c != scene.background])
    if rng.random() < 0.5:
        text = _choose(rng, (f"make the background {colour}", f"change the background to {colour}"))
        return text, replace(scene, background=colour)
    pattern = _choose(rng, PATTERNS)
    text = f"put it on a {pattern} {colour} background"
    return text, replace(scene, background=colour, pattern=pattern)


def _pattern(scene: Scene, rng: Rng, rules: Rules) -> Change:
    pattern = _choose(rng, [p for p in PATTERNS if p != scene.pattern])
    text = _choose(
        rng,
        (
            f"make the background {pattern}",
            f"change the pattern of the background to {pattern}",
            f"give it a {pattern} background",
        ),
    )
    return text, replace(scene, pattern=pattern)


def _style(scene: Scene, rng: Rng, rules: Rules) -> Change:
    others = [style for style in STYLES if style != scene.style]
    if not scene.things or scene.style not in STYLES:
        return None
    style = _choose(rng, others)
    word = STYLES[style]
    text = _choose(rng, (f"draw it {word}", f"make it {word}", f"draw it in the {word} style"))
    return text, replace(scene, style=style)


EDITS: dict[str, Callable[[Scene, Rng, Rules], Change]] = {
    "add": _add, "remove": _remove, "replace": _replace, "move": _move, "swap": _swap,
    "recolour": _recolour, "resize": _resize, "number": _number, "background": _background,
    "pattern": _pattern, "style": _style,
}  # fmt: skip
KINDS = tuple(EDITS)
OFTEN = {  # how often each is tried first
    "add": 2.5, "remove": 0.7, "replace": 1.0, "move": 3.0, "swap": 3.0, "recolour": 1.5,
    "resize": 1.0, "number": 1.0, "background": 0.6, "pattern": 0.5, "style": 0.5,
}  # fmt: skip

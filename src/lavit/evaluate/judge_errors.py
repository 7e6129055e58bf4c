"""How the judge errs: on true renders, and on renders in which one thing was spoiled.

Published beside every figure that the judge gives. *Right* is the share of scenes of which every
fact is seen right (`judge_test_all`); a *false accept* is a spoiled picture that passes for the
scene as it was (`judge_false_accepts`, the worst kind).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from lavit.data.scenes.render import render, sprite, stands_out, turned
from lavit.data.scenes.sample import nominal, scene_at
from lavit.data.scenes.splits import Rules
from lavit.data.scenes.world import (
    BACKGROUNDS,
    CELLS,
    COLOURS,
    EXTENTS,
    PATTERNS,
    SHAPES,
    STYLES,
    Box,
    Scene,
    Thing,
    facts,
    objects,
)
from lavit.evaluate import spoil
from lavit.evaluate.judge import Judge, Seen, all_right

SIZES = (64, 96, 128)  # pixels that decoders paint
SPOILED = ("replaced", "blob", "half", "swapped", "pattern", "blank", "noise")
WORDS = {
    "replaced": "one object replaced by another",
    "blob": "by a blob",
    "half": "by half of itself",
    "swapped": "two colours swapped",
    "pattern": "pattern only",
    "blank": "blank",
    "noise": "noise",
}
BEYOND = {"joined": "half of it joined to half of another"}  # kinds that no figure asks for


def scenes(split: str, count: int, *, objects: int) -> list[Scene]:
    """The first scenes of a split with so many objects of the list."""
    rules = Rules(objects=objects)
    return [scene_at(split, index, rules=rules) for index in range(count)]


def spoiled(scene: Scene, kind: str, size: int, rng: np.random.Generator) -> Image.Image:
    """The picture of a scene that was spoiled in one way."""
    if kind == "pattern":
        return render(replace(scene, things=()), size)
    if kind == "blank":
        return Image.new("RGB", (size, size), BACKGROUNDS[scene.background])
    if kind == "noise":
        pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        return Image.fromarray(pixels)
    if kind == "swapped":
        return render(_swapped(scene), size)
    place = int(rng.integers(len(scene.things)))
    thing = scene.things[place]
    if kind == "replaced":
        other = replace(thing, **_other(thing, scene, rng))
        return render(replace(scene, things=(*scene.things[:place], other, *scene.things[place + 1 :])), size)
    picture = render(replace(scene, things=(*scene.things[:place], *scene.things[place + 1 :])), size)
    drawing = drawn(thing, scene.style, size)
    if kind == "half":
        return pasted(picture, spoil.half(drawing, rng), thing.box)
    spoiling = spoil.joined if kind == "joined" else spoil.blob
    while True:  # until it shows
        other = replace(thing, name=_other(replace(thing, colour=None), scene, rng)["name"])
        changed = spoiling(drawing, drawn(replace(other, colour=None), scene.style, size), rng)
        if changed is not None:
            return pasted(picture, changed, thing.box)


def drawn(thing: Thing, style: str, size: int) -> Image.Image:
    """A thing alone (RGBA), as it stands in a picture of this size."""
    drawing = turned(sprite(thing.name, thing.colour, style), thing.turn)
    scale = thing.box.side * size / max(drawing.size)
    small = tuple(max(1, round(side * scale)) for side in drawing.size)
    return drawing.resize(small, Image.Resampling.LANCZOS, reducing_gap=3.0)


def pasted(picture: Image.Image, drawing: Image.Image, box: Box) -> Image.Image:
    """A picture with a drawing in the middle of a box."""
    whole = picture.convert("RGBA")
    width, height = drawing.size
    at = (round(box.x * whole.width - width / 2), round(box.y * whole.height - height / 2))
    whole.alpha_composite(drawing, at)
    return whole.convert("RGB")


def _other(thing: Thing, scene: Scene, rng: np.random.Generator) -> dict[str, str]:
    """Another name for a thing: of another object, or for a shape another shape."""
    names = SHAPES if thing.colour else tuple(kind.name for kind in objects())
    fits = [
        name for name in names if name != thing.name and stands_out(name, thing.colour, scene.style, scene.background)
    ]
    return {"name": fits[int(rng.integers(len(fits)))]}


def _swapped(scene: Scene) -> Scene:
    """Two groups of shapes with each other's colours."""
    colours = {thing.name: thing.colour for thing in scene.things if thing.colour}
    first, second = list(colours)[:2]
    exchanged = {first: colours[second], second: colours[first]}
    things = tuple(replace(thing, colour=exchanged.get(thing.name, thing.colour)) for thing in scene.things)
    return replace(scene, things=things)


def for_kind(kind: str, ordinary: Sequence[Scene], binding: Sequence[Scene]) -> Sequence[Scene]:
    """The scenes that can be spoiled in one way: colours are swapped in scenes of two shapes."""
    return binding if kind == "swapped" else ordinary


def right(judge: Judge, some: Sequence[Scene], size: int) -> float:
    """The share of scenes that are seen right in every fact, at one size of picture."""
    return accepted(some, judge.look([render(scene, size) for scene in some]))


def accepted(some: Sequence[Scene], seen: Sequence[Seen]) -> float:
    """The share of scenes of which every fact is seen, and nothing more."""
    return float(np.mean([all_right(facts(one), saw) for one, saw in zip(some, seen, strict=True)]))


def false_accepts(judge: Judge, kind: str, some: Sequence[Scene], size: int, *, seed: int = 0) -> float:
    """The share of pictures, each spoiled in one way, that pass for the scene as it was."""
    rng = np.random.default_rng([seed, tuple(WORDS | BEYOND).index(kind)])
    return accepted(some, judge.look([spoiled(scene, kind, size, rng) for scene in some]))


def things_wrong(some: Sequence[Scene], seen: Sequence[Seen]) -> dict[str, tuple[float, ...]]:
    """For each band: the share of things that are missed, unknown, and called something else."""
    counts: dict[str, Counter] = {band: Counter() for band in EXTENTS}
    for scene, saw in zip(some, seen, strict=True):
        for thing in scene.things:
            counts[thing.size][named(thing, saw)] += 1
    shares = {}
    for band, count in counts.items():
        total = max(1, sum(count.values()))
        missed, unknown = count[""] / total, count["unknown"] / total
        wrong = sum(number for name, number in count.items() if name not in ("", "unknown", "right"))
        shares[band] = (missed, unknown, wrong / total)
    return shares


def named(thing: Thing, saw: Seen) -> str:
    """ "right", or what a thing is taken for; "" if nothing is seen where it stands."""
    far = [(abs(s.box.x - thing.box.x) + abs(s.box.y - thing.box.y), s) for s in saw.things]
    near, one = min(far, key=lambda pair: pair[0], default=(1.0, None))
    if one is None or near > thing.box.side / 2:
        return ""
    if (one.name, one.colour, one.size) == (thing.name, thing.colour, thing.size):
        return "right"
    return one.name if one.name != thing.name else f"{one.colour} {one.size}"


def thresholds(judge: Judge, *, count: int = 200, objects: int | None = None) -> tuple[float, float]:
    """Heat and sureness that serve scenes of `valid` best: most right, fewest false accepts.

    What is weighed is scenes seen wrong plus three times what the worst kind of false accept has
    beyond 1 %, over pictures of 64 and 96 pixels.
    """
    ordinary = scenes("valid", count, objects=objects or len(_names(judge)))
    two = [s for s in ordinary if len({t.name for t in s.things if t.colour}) > 1]
    cases: list[tuple[str, Scene, tuple]] = []
    for size in (64, 96):
        true = judge.found([render(scene, size) for scene in ordinary])
        cases += [("true", scene, one) for scene, one in zip(ordinary, true, strict=True)]
        for kind in ("replaced", "blob", "half", "swapped"):
            rng = np.random.default_rng([1, SPOILED.index(kind)])
            some = for_kind(kind, ordinary, two)
            found = judge.found([spoiled(scene, kind, size, rng) for scene in some])
            cases += [(kind, scene, one) for scene, one in zip(some, found, strict=True)]

    def cost(heat: float, sure: float) -> float:
        strict = Judge(judge.detector, judge.names, heat=heat, sure=sure)
        passed: dict[str, list[bool]] = {}
        for kind, scene, one in cases:
            passed.setdefault(kind, []).append(all_right(facts(scene), strict.seen(*one)))
        share = {kind: float(np.mean(some)) for kind, some in passed.items()}
        worst = max(value for kind, value in share.items() if kind != "true")
        return 1 - share["true"] + 3 * max(0.0, worst - 0.01)

    grid = itertools.product((0.2, 0.3, 0.4, 0.5), (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9))
    return min(grid, key=lambda pair: cost(*pair))


def _names(judge: Judge) -> list[str]:
    """Names of the objects that a judge knows."""
    return [name for name in judge.names if name not in (*SHAPES, "unknown")]


def table(judge: Judge, *, count: int = 500, report: Callable[[str], None] = lambda line: None) -> str:
    """The judge's errors as a table in Markdown, for scenes of all objects and of the first 48."""
    columns = [(some, size) for some in (len(objects()), 48) for size in SIZES]
    rows: dict[str, list[str]] = {}
    made = {
        some: (scenes("test", count, objects=some), scenes("binding", count, objects=some))
        for some in (len(objects()), 48)
    }
    for some, size in columns:
        ordinary, binding = made[some]
        seen = judge.look([render(scene, size) for scene in ordinary])
        cells = {"right, `judge_test_all`": accepted(ordinary, seen)}
        for band, shares in things_wrong(ordinary, seen).items():
            for word, share in zip(("missed", "unknown", "wrong"), shares, strict=True):
                cells[f"{band} things: {word}"] = share
        for kind, word in (WORDS | BEYOND).items():
            spoilable = for_kind(kind, ordinary, binding)
            cells[f"accepted: {word}"] = false_accepts(judge, kind, spoilable, size)
        for row, share in cells.items():
            rows.setdefault(row, []).append(f"{100 * share:.1f}")
        report(f"{some} objects at {size} px: {cells}")
    head = [f"{some} objects, {size} px" for some, size in columns]
    small, big = (np.mean(EXTENTS[band]) for band in ("small", "big"))
    lengths = [f"{small * size:.0f} / {big * size:.0f}" for _, size in columns]
    lines = [["% of test scenes", *head], ["---"] * (len(head) + 1)]
    lines += [["pixels of a small / big thing", *lengths]]
    lines += [[row, *cells] for row, cells in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def confusions(judge: Judge, *, size: int = 64, renders: int = 60, seed: int = 0) -> list[str]:
    """What each drawing is taken for, worst first: small, nine in a picture, by name and style."""
    rng = np.random.default_rng(seed)
    kinds = [(name, None) for name in _names(judge)] + list(itertools.product(SHAPES, COLOURS))
    lines = []
    for style in STYLES:
        count = {kind: Counter() for kind in kinds}
        queue = [kind for _ in range(renders) for kind in rng.permutation(len(kinds)).tolist()]
        for start in range(0, len(queue), 32 * 9):
            some = []
            for first in range(start, min(start + 32 * 9, len(queue)), 9):
                nine = [kinds[index] for index in queue[first : first + 9]]
                some.append(_nine(nine, style, rng))
            seen = judge.look([render(scene, size) for scene in some])
            for scene, saw in zip(some, seen, strict=True):
                for thing in scene.things:
                    count[thing.name, thing.colour][named(thing, saw)] += 1
        for kind, said in count.items():
            wrong = 1 - said["right"] / max(1, sum(said.values()))
            what = ", ".join(f"{n or 'nothing'} {c}" for n, c in said.most_common(5) if n != "right")
            lines.append((wrong, f"{100 * wrong:5.1f} % {kind[1] or ''} {kind[0]} ({style}): {what}"))
    return [line for _, line in sorted(lines, reverse=True)]


def _nine(kinds: Sequence[tuple[str, str | None]], style: str, rng: np.random.Generator) -> Scene:
    """Small things in all cells, on a background on which most of them show."""
    grounds = rng.permutation(list(BACKGROUNDS)).tolist()

    def showing(ground: str) -> list[bool]:
        return [kind[1] != ground and stands_out(*kind, style, ground) for kind in kinds]

    ground = max(grounds[:3], key=lambda one: sum(showing(one)))
    things = []
    for kind, cell, shows in zip(kinds, CELLS, showing(ground), strict=False):
        box = nominal(cell, "small", float(rng.uniform(*EXTENTS["small"])))
        turn = float(rng.uniform(-8, 8))
        if shows:
            things.append(Thing(*kind, "small", cell, box, turn))
    return Scene(ground, PATTERNS[int(rng.integers(3))], style, tuple(things))

"""How the judge errs, for its recipe: thresholds on `valid`, the table of errors, what it confuses.

Command   python recipes/judge.py RUN, and its --table and --confusions
Cost      the table: minutes; the confusions: longer
Score     LOG.md has the table

*Right* is the share of scenes of which every fact is seen right (`judge_test_all`); a *false
accept* is a spoiled picture that passes for the scene as it was (`judge_false_accepts`).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from lavit.data.scenes.render import render, stands_out
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
    Scene,
    Thing,
    facts,
    objects,
)
from lavit.evaluate.judge import Judge, Seen, all_right
from lavit.evaluate.judging import SPOILED, for_kind, spoiled

SIZES = (64, 96, 128)  # pixels that decoders paint
RIGHT = 0.98  # of true renders, that a judge must see right


def scenes(split: str, count: int, *, objects: int) -> list[Scene]:
    """The first scenes of a split with so many objects of the list."""
    rules = Rules(objects=objects)
    return [scene_at(split, index, rules=rules) for index in range(count)]


def right(judge: Judge, some: Sequence[Scene], size: int) -> float:
    """The share of scenes that are seen right in every fact, at one size of picture."""
    return accepted(some, judge.look([render(scene, size) for scene in some]))


def accepted(some: Sequence[Scene], seen: Sequence[Seen]) -> float:
    """The share of scenes of which every fact is seen, and nothing more."""
    return float(np.mean([all_right(facts(one), saw) for one, saw in zip(some, seen, strict=True)]))


def false_accepts(judge: Judge, kind: str, some: Sequence[Scene], size: int) -> float:
    """The share of pictures, each spoiled in one way, that pass for the scene as it was."""
    rng = np.random.default_rng([0, tuple(SPOILED).index(kind)])
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
        wrong = total - count[""] - count["unknown"] - count["right"] if count else 0
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


def thresholds(judge: Judge, count: int = 200) -> tuple[float, float]:
    """Heat and sureness that serve scenes of `valid` best, over pictures of 64 and 96 pixels.

    Of those that see `RIGHT` of the scenes right (or the most, if none does), the ones that accept
    least of what is spoiled, beyond 1 % of each kind.
    """
    ordinary = scenes("valid", count, objects=len(_names(judge)))
    two = [s for s in ordinary if len({t.name for t in s.things if t.colour}) > 1]
    cases: list[tuple[str, Scene, tuple]] = []
    for size in (64, 96):
        true = judge.found([render(scene, size) for scene in ordinary])
        cases += [("true", scene, one) for scene, one in zip(ordinary, true, strict=True)]
        for kind in SPOILED:
            rng = np.random.default_rng([1, tuple(SPOILED).index(kind)])
            some = for_kind(kind, ordinary, two)
            found = judge.found([spoiled(scene, kind, size, rng) for scene in some])
            cases += [(kind, scene, one) for scene, one in zip(some, found, strict=True)]

    def cost(heat: float, sure: float) -> tuple[float, float]:
        strict = Judge(judge.detector, judge.names, heat=heat, sure=sure)
        passed: dict[str, list[bool]] = {}
        for kind, scene, one in cases:
            passed.setdefault(kind, []).append(all_right(facts(scene), strict.seen(*one)))
        share = {kind: float(np.mean(some)) for kind, some in passed.items()}
        beyond = sum(max(0.0, value - 0.01) for kind, value in share.items() if kind != "true")
        return max(0.0, RIGHT - share["true"]), beyond

    grid = itertools.product((0.2, 0.3, 0.4, 0.5), (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9))
    return min(grid, key=lambda pair: cost(*pair))


def _names(judge: Judge) -> list[str]:
    """Names of the objects that a judge knows."""
    return [name for name in judge.names if name not in (*SHAPES, "unknown")]


def table(judge: Judge, report: Callable[[str], None], *, count: int = 500) -> str:
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
        for kind, word in SPOILED.items():
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
            others = [(name, n) for name, n in said.most_common(5) if name != "right"]
            what = ", ".join(f"{name or 'nothing'} {n}" for name, n in others)
            thing = f"{kind[1] or ''} {kind[0]} ({style})"
            lines.append((wrong, f"{100 * wrong:5.1f} % {thing}: {what}"))
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

"""How far the judge itself can be trusted, at the size that the model paints: it bounds every
figure that it gives.

Published with every figure of the judge: on true renders the share that is seen right, and of
renders in which one thing was spoiled the share that passes for the scene as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from lavit.data.scenes.render import render, rotated, sprite, stands_out
from lavit.data.scenes.world import BACKGROUNDS, SHAPES, Box, Scene, Thing, facts, objects
from lavit.evaluate import spoil
from lavit.evaluate.drawing import all_of, seen_true, wanted
from lavit.evaluate.exam import Exam
from lavit.evaluate.figures import Figure, average, share, turned

SPOILED = {
    "replaced": "one object replaced by another",
    "blob": "by a blob",
    "half": "by half of itself",
    "swapped": "two colours swapped",
    "pattern": "pattern only",
    "blank": "blank",
    "noise": "noise",
}


def judge_test(exam: Exam) -> Figure:
    """Share of true test pictures of which the judge sees every fact right."""
    said, looks = wanted(exam, "test"), seen_true(exam, "test")
    floor = ("another picture", average(all_of(said, turned(looks))))
    return share(all_of(said, looks), floor=floor, details={"pixels": exam.drawn_size})


def false_accepts(exam: Exam) -> Figure:
    """Share of pictures, spoiled in the worst way, that pass for the true ones."""
    ordinary = [exam.scene("test", n) for n in range(exam.count)]
    binding = [exam.scene("binding", n) for n in range(exam.count)]
    found: dict[str, list[bool]] = {}
    for number, kind in enumerate(SPOILED):
        scenes = for_kind(kind, ordinary, binding)
        rngs = [exam.rng(n, 40 + number) for n in range(exam.count)]
        pairs = zip(scenes, rngs, strict=True)
        pictures = [spoiled(scene, kind, exam.drawn_size, rng) for scene, rng in pairs]
        found[kind] = all_of([facts(scene) for scene in scenes], exam.judge.look(pictures))
    details = {kind: average(hits) for kind, hits in found.items()}
    worst = max(found, key=lambda kind: (sum(found[kind]), kind))
    return share(found[worst], note=f"the worst kind: {worst}", details=details)


def for_kind(kind: str, ordinary: Sequence[Scene], binding: Sequence[Scene]) -> Sequence[Scene]:
    """The scenes that can be spoiled in one way: colours are swapped in scenes of two shapes."""
    return binding if kind == "swapped" else ordinary


def spoiled(scene: Scene, kind: str, size: int, rng: np.random.Generator) -> Image.Image:
    """The picture of a scene, spoiled as in `SPOILED`, or "joined" (halves of two things)."""
    if kind == "pattern":
        return render(replace(scene, things=()), size)
    if kind == "blank":
        return Image.new("RGB", (size, size), BACKGROUNDS[scene.background])
    if kind == "noise":
        return Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
    if kind == "swapped":
        return render(_swapped(scene), size)
    place = int(rng.integers(len(scene.things)))
    before, thing, after = scene.things[:place], scene.things[place], scene.things[place + 1 :]
    if kind == "replaced":
        other = replace(thing, name=_other(thing, scene, rng))
        return render(replace(scene, things=(*before, other, *after)), size)
    picture = render(replace(scene, things=(*before, *after)), size)
    drawing = drawn_thing(thing, scene.style, size)
    if kind == "half":
        return pasted(picture, spoil.half(drawing, rng), thing.box)
    spoiling = spoil.joined if kind == "joined" else spoil.blob
    while True:  # until it shows
        other = replace(thing, colour=None)
        other = replace(other, name=_other(other, scene, rng))
        changed = spoiling(drawing, drawn_thing(other, scene.style, size), rng)
        if changed is not None:
            return pasted(picture, changed, thing.box)


def drawn_thing(thing: Thing, style: str, size: int) -> Image.Image:
    """A thing alone (RGBA), as it stands in a picture of this size."""
    drawing = rotated(sprite(thing.name, thing.colour, style), thing.turn)
    scale = thing.box.side * size / max(drawing.size)
    width, height = (max(1, round(side * scale)) for side in drawing.size)
    return drawing.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)


def pasted(picture: Image.Image, drawing: Image.Image, box: Box) -> Image.Image:
    """A picture with a drawing in the middle of a box."""
    whole = picture.convert("RGBA")
    width, height = drawing.size
    at = (round(box.x * whole.width - width / 2), round(box.y * whole.height - height / 2))
    whole.alpha_composite(drawing, at)
    return whole.convert("RGB")


def _other(thing: Thing, scene: Scene, rng: np.random.Generator) -> str:
    """Another name for a thing: of another object, or for a shape another shape."""
    names = SHAPES if thing.colour else tuple(kind.name for kind in objects())
    fits = [name for name in names if name != thing.name]
    fits = [name for name in fits if stands_out(name, thing.colour, scene.style, scene.background)]
    return fits[int(rng.integers(len(fits)))]


def _swapped(scene: Scene) -> Scene:
    """Two groups of shapes with each other's colours."""
    colours = {thing.name: thing.colour for thing in scene.things if thing.colour}
    first, second = list(colours)[:2]
    colours[first], colours[second] = colours[second], colours[first]
    things = []
    for thing in scene.things:
        things.append(replace(thing, colour=colours.get(thing.name, thing.colour)))
    return replace(scene, things=tuple(things))

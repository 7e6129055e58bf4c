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
from lavit.data.scenes.world import (
    BACKGROUNDS,
    PATTERNS,
    SHAPES,
    Box,
    Scene,
    Thing,
    facts,
    objects,
)
from lavit.evaluate import spoil
from lavit.evaluate.drawing import all_of, seen_true, wanted
from lavit.evaluate.exam import Exam
from lavit.evaluate.figures import Figure, average, share, turned

SPOILED = {
    "replaced": "one object replaced by another",
    "blob": "by a blob",
    "half": "by half of itself",
    "cut": "by three quarters of itself",
    "joined": "half of it joined to half of another",
    "flat": "by its silhouette in its mean colour",
    "twice": "drawn twice, with a shift",
    "behind": "another behind it",
    "outside": "another that is cut by the border",
    "ground": "a part of the picture on another background",
    "overlaid": "a part of the picture in another pattern",
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
        rngs = (exam.rng(n, 40 + number) for n in range(exam.count))
        pairs = zip(scenes, rngs, strict=False)  # fewer scenes where not all can be spoiled so
        pictures = [spoiled(scene, kind, exam.drawn_size, rng) for scene, rng in pairs]
        found[kind] = all_of([facts(scene) for scene in scenes], exam.judge.look(pictures))
    found = {kind: hits for kind, hits in found.items() if hits}
    details = {kind: average(hits) for kind, hits in found.items()}
    worst = max(found, key=lambda kind: (average(found[kind]), kind))
    return share(found[worst], note=f"the worst kind: {worst}", details=details)


def for_kind(kind: str, ordinary: Sequence[Scene], binding: Sequence[Scene]) -> Sequence[Scene]:
    """The scenes that can be spoiled in one way: colours are swapped in scenes of two shapes, and
    a silhouette must show."""
    if kind == "flat":
        return [scene for scene in ordinary if _with_silhouettes(scene)]
    return binding if kind == "swapped" else ordinary


def spoiled(scene: Scene, kind: str, size: int, rng: np.random.Generator) -> Image.Image:
    """The picture of a scene, spoiled as in `SPOILED`."""
    if kind == "pattern":
        return render(replace(scene, things=()), size)
    if kind == "blank":
        return Image.new("RGB", (size, size), BACKGROUNDS[scene.background])
    if kind == "noise":
        return Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
    if kind == "swapped":
        return render(_swapped(scene), size)
    if kind in ("ground", "overlaid"):
        return _in_parts(scene, kind, size, rng)
    if kind == "outside":
        return _with_one_outside(scene, size, rng)
    places = _with_silhouettes(scene) if kind == "flat" else range(len(scene.things))
    place = places[int(rng.integers(len(places)))]
    before, thing, after = scene.things[:place], scene.things[place], scene.things[place + 1 :]
    if kind == "replaced":
        other = replace(thing, name=_other(thing, scene, rng))
        return render(replace(scene, things=(*before, other, *after)), size)
    picture = render(replace(scene, things=(*before, *after)), size)
    drawing = drawn_thing(thing, scene.style, size)
    while True:  # until it shows
        changed = _spoiled(drawing, _another(thing, scene, size, rng), kind, rng)
        if changed is not None:
            return pasted(picture, changed, thing.box)


def _with_silhouettes(scene: Scene) -> list[int]:
    """Places of the things that look different in one colour alone."""
    drawings = [sprite(thing.name, thing.colour, scene.style) for thing in scene.things]
    return [place for place, one in enumerate(drawings) if spoil.varied(one)]


def _spoiled(
    drawing: Image.Image, other: Image.Image, kind: str, rng: np.random.Generator
) -> Image.Image | None:
    """A drawing spoiled, with another one where that is needed; None if it does not show."""
    if kind in ("half", "cut"):
        return spoil.half(drawing, rng, share=0.5 if kind == "half" else 0.75)
    if kind == "flat":
        return spoil.flat(drawing)
    if kind in ("twice", "behind"):
        return spoil.behind(drawing, drawing if kind == "twice" else other, rng)
    return (spoil.joined if kind == "joined" else spoil.blob)(drawing, other, rng)


def _another(thing: Thing, scene: Scene, size: int, rng: np.random.Generator) -> Image.Image:
    """The drawing of another object in a thing's place."""
    other = replace(thing, colour=None)
    other = replace(other, name=_other(other, scene, rng))
    return drawn_thing(other, scene.style, size)


def _in_parts(scene: Scene, kind: str, size: int, rng: np.random.Generator) -> Image.Image:
    """A scene of which a part stands on another background, or in another pattern."""
    whole = kind == "overlaid"
    now, choices = (scene.pattern, PATTERNS) if whole else (scene.background, tuple(BACKGROUNDS))
    others = [one for one in choices if one != now]
    other = others[int(rng.integers(len(others)))]
    elsewhere = replace(scene, pattern=other) if whole else replace(scene, background=other)
    mask = spoil.part(size, rng, wide=whole)
    return Image.composite(render(elsewhere, size), render(scene, size), mask)


def _with_one_outside(scene: Scene, size: int, rng: np.random.Generator) -> Image.Image:
    """A scene with one object more, a part of which is beyond the border."""
    picture, boxes = render(scene, size).convert("RGBA"), [thing.box for thing in scene.things]
    thing = scene.things[int(rng.integers(len(scene.things)))]
    while spoil.beyond_border(picture, _another(thing, scene, size, rng), boxes, rng) is None:
        pass
    return picture.convert("RGB")


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

"""Does the model paint training pictures again?

The prompts are those of the training's own scenes, so that what was learnt by heart would show. A
drawing is a copy if it is nearer, in pixels, to one of the first 2,000 training pictures that have
the same facts (its own scene at least) than 95 % of other renders of such a scene are: renders with
the same things in the same cells and the same style, with fresh jitter, sizes and turns. So of
fresh renders about 5 % count as copies (the floor), and of training pictures all.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np
from PIL import Image

from lavit.data.scenes.dataset import unit_at
from lavit.data.scenes.sample import build
from lavit.data.scenes.splits import facts_key
from lavit.data.scenes.world import Scene, facts
from lavit.evaluate.drawing import drawn, words_for
from lavit.evaluate.exam import Exam
from lavit.evaluate.examinee import scenes_of
from lavit.evaluate.figures import Figure, average, share

POOL = 2_000  # training pictures
RENDERS = 40  # of each scene, to measure how near two of them are
NEAR = 5.0  # percentile


def draw_copies(exam: Exam) -> Figure:
    """Share of drawings that are copies of training pictures."""
    exam.needs("language", "pixels")
    seed = int((scenes_of(exam.folder) or {}).get("seed", 0))
    units = (unit_at("train", number, seed=seed, rules=exam.rules) for number in range(POOL))
    pool = list(islice((one.scene for unit in units for one in unit.pictures), POOL))
    items = [number for number, scene in enumerate(pool) if scene.things][: exam.count]

    def parts(item: int) -> list[str]:
        return [words_for(exam, pool[item], exam.rng(item, 30))]

    pictures = drawn(exam, f"train {seed}", items, parts)
    same: dict[str, list[Scene]] = {}
    for scene in pool:
        same.setdefault(facts_key(facts(scene)), []).append(scene)
    hits, floor = [], []
    for item, picture in zip(items, pictures, strict=True):
        true = [exam.small(scene) for scene in same[facts_key(facts(pool[item]))]]
        *renders, fresh = [exam.small(jittered(pool[item], n)) for n in range(RENDERS + 1)]
        hits.append(is_copy(picture, true, renders))
        floor.append(is_copy(fresh, true, renders))
        exam.progress("copies", len(hits), len(items))
    return share(hits, floor=("fresh renders", average(floor)))


def jittered(scene: Scene, number: int) -> Scene:
    """The same things in the same cells, with other jitter, sizes inside their band, and turns."""
    rng = np.random.default_rng([7, number])
    groups: dict[str, list[tuple[int, int]]] = {}
    for thing in scene.things:
        groups.setdefault(thing.name, []).append(thing.cell)
    first = {thing.name: thing for thing in reversed(scene.things)}
    wanted = [(name, first[name].colour, first[name].size, cells) for name, cells in groups.items()]
    return build(scene.background, scene.pattern, scene.style, wanted, rng) or scene


def is_copy(
    picture: Image.Image, training: Sequence[Image.Image], renders: Sequence[Image.Image]
) -> bool:
    """Is a picture nearer to one of training than 95 % of renders of the same facts are?"""

    def nearest(picture: Image.Image) -> float:
        return min(pixel_distance(picture, one) for one in training)

    return nearest(picture) < float(np.percentile([nearest(one) for one in renders], NEAR))


def pixel_distance(a: Image.Image, b: Image.Image) -> float:
    """Root of the mean squared difference of pixels, in levels of 0..255."""
    difference = np.asarray(a, dtype=np.float32) - np.asarray(b, dtype=np.float32)
    return float(np.sqrt(np.mean(difference**2)))

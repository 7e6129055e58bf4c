"""Minimal pairs: are a picture's codes likelier behind true words than behind the same words with
one thing's name changed?

Nothing is sampled and nothing judged, so the figure tells models apart that are still too young to
draw anything whole. Scenes are of `pairs`, whose things training never showed together. The other
name is an object's for an object, a shape's for a shape, and where there is one of a pair that
training never showed either, so that neither prompt is the more familiar.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lavit.data.scenes.chance import pick
from lavit.data.scenes.language import plainly
from lavit.data.scenes.splits import Rules
from lavit.data.scenes.world import SHAPES, Scene
from lavit.evaluate.exam import Exam
from lavit.evaluate.figures import Figure, share
from lavit.generate.score import drawn_likelihood

OTHER = 3  # of an item's random numbers


def write_minimal_pairs(exam: Exam) -> Figure:
    """Share of pictures whose codes are likelier behind their prompt than behind the other one."""
    exam.needs("language")
    hits = []
    for item, codes in enumerate(exam.true_codes("pairs")):
        scene = exam.scene("pairs", item)
        other = renamed(scene, exam.rules, exam.rng(item, OTHER))
        prompts = [plainly(one).removesuffix(".") for one in (scene, other)]
        likely = [drawn_likelihood(exam.model, words, tuple(codes)) for words in prompts]
        hits.append(likely[0] > likely[1])
    return share(hits, floor=("a guess", 0.5))


def renamed(scene: Scene, rules: Rules, rng: np.random.Generator) -> Scene:
    """The scene with another name for the things of one group."""
    old = pick(rng, scene.names)
    kinds = SHAPES if old in SHAPES else rules.objects_named
    fresh = [name for name in kinds if name not in scene.names]
    left = [name for name in scene.names if name != old]
    unseen = [new for new in fresh if any(rules.pair_of(new, one) != "train" for one in left)]
    new = pick(rng, unseen or fresh)
    changed = (replace(one, name=new if one.name == old else one.name) for one in scene.things)
    return replace(scene, things=tuple(changed))

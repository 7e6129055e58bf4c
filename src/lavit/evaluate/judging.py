"""How far the judge itself can be trusted, at the size that the model paints: it bounds every
figure that it gives.
"""

from __future__ import annotations

import numpy as np
from PIL.Image import Image

from lavit.data.scenes.world import Scene
from lavit.evaluate.drawing import all_of, seen, turned, wanted
from lavit.evaluate.exam import Exam
from lavit.evaluate.figures import Figure, share


def judge_test(exam: Exam) -> Figure:
    """Share of true test pictures of which the judge sees every fact right."""
    said = wanted(exam, "test")
    looks = seen(exam, "true test", [exam.small(exam.scene("test", n)) for n in range(exam.count)])
    floor = float(np.mean(all_of(said, turned(looks))))
    details = {"pixels": exam.drawn_size}
    return share("judge_test_all", all_of(said, looks), floor=("another picture", floor), details=details)


def false_accepts(exam: Exam) -> Figure:
    """Share of spoiled pictures that pass for the true ones, of the worst kind of spoiling; all
    kinds are details.
    """
    from lavit.evaluate.judge_errors import SPOILED, for_kind, spoiled

    ordinary = [exam.scene("test", n) for n in range(exam.count)]
    binding = [exam.scene("binding", n) for n in range(exam.count)]
    found: dict[str, list[bool]] = {}
    for number, kind in enumerate(SPOILED):
        scenes = for_kind(kind, ordinary, binding)
        pictures = [_spoiled(spoiled, scene, kind, exam, number, n) for n, scene in enumerate(scenes)]
        said = wanted(exam, "binding" if scenes is binding else "test")
        found[kind] = all_of(said, exam.judge.look(pictures))
    worst = max(found, key=lambda kind: (sum(found[kind]), kind))
    details = {kind: float(np.mean(hits)) for kind, hits in found.items()}
    return share("judge_false_accepts", found[worst], note=f"the worst kind: {worst}", details=details)


def _spoiled(spoiled, scene: Scene, kind: str, exam: Exam, number: int, item: int) -> Image:
    return spoiled(scene, kind, exam.drawn_size, exam.rng(item, 40 + number))

"""What reading and drawing cost: seconds after loading, and dynamic tokens against all patches kept.

Seconds are of this machine and say nothing alone; the ratio is of calls that take turns in one run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL import Image

from lavit.evaluate.figures import Figure, mean, share
from lavit.generate.pipeline import Pipeline


def seconds(call: Callable[[], Any]) -> float:
    """Wall seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def verbs(pipeline: Pipeline, images: Sequence[Image.Image], prompts: Sequence[str]) -> Iterator[Figure]:
    """Seconds of a caption and of a drawing, one at a time; the first call of each, which loads parts, is not counted."""
    pipeline.caption(images[0])
    yield mean("caption: seconds, after loading", [seconds(lambda i=i: pipeline.caption(i)) for i in images])
    pipeline.draw(prompts[0], seed=0)
    yield mean("drawing: seconds, after loading", [seconds(lambda p=p: pipeline.draw(p, seed=0)) for p in prompts])


def dynamic_against_all(
    pipeline: Pipeline,
    images: Sequence[Image.Image],
    right: Callable[[Sequence[str]], list[bool]],
    progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[Figure]:
    """Captions of pictures under "auto" and under "all", in turns; `right` judges the captions of all pictures."""
    said: dict[str, list[str]] = {"auto": [], "all": []}
    ratios = []
    for number, image in enumerate(images):
        took = {}
        for keep in said:
            took[keep] = seconds(lambda keep=keep, image=image: said[keep].append(pipeline.caption(image, keep=keep)))
        ratios.append(took["auto"] / took["all"])
        if progress and (number % 10 == 0 or number + 1 == len(images)):
            progress("dynamic against all", number + 1, len(images))
    kept = sum(int(pipeline.tokenize(image).lengths[0]) for image in images) / len(images)
    patches = pipeline.model.config.tokenizer.patches
    yield share(
        "caption: exact name, train, dynamic tokens",
        right(said["auto"]),
        ceiling=("all patches kept", sum(right(said["all"])) / len(images)),
        note=f"{kept:.1f} of {patches} tokens",
    )
    yield mean("caption: seconds, dynamic over all patches", ratios)

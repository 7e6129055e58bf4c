"""Does the model draw what the prompt says?

One sample a prompt, as the pipeline draws, nothing chosen among several.

Codes are written first (kept by item) and painted after, as `Pipeline.draw` does with the same
seeds. Full prompts state every fact, so the judge's verdict is over all facts of the scene, and of
a drawing over none else.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from lavit.data.scenes.language import plainly, prompt
from lavit.data.scenes.world import Facts, Scene, facts
from lavit.evaluate import judge
from lavit.evaluate.exam import Exam
from lavit.evaluate.figures import Figure, average, averages, mean, share, turned
from lavit.evaluate.judge import Seen
from lavit.generate.prompts import image_jobs
from lavit.layout import mixed

PartsOf = Callable[[int], list[Any]]  # the pictures and words that an item is written after


def prompt_of(exam: Exam, split: str, item: int) -> str:
    """The full prompt of a scene of a split."""
    return words_for(exam, exam.scene(split, item), exam.rng(item))


def words_for(exam: Exam, scene: Scene, rng: np.random.Generator) -> str:
    """A full prompt of a scene, worded as the model's training words them."""
    if exam.rules.plain:
        return plainly(scene).removesuffix(".")
    return prompt(scene, rng, full=True)


def written(exam: Exam, task: str, items: Sequence[int], parts: PartsOf) -> list[list[Any]]:
    """What is written of one image for each item, as `Pipeline.compose` samples it, kept by item:
    its codes, or what a rival writes in their place.
    """
    exam.needs("language")

    def make(numbers: list[int]) -> list[list[Any]]:
        prompts = [mixed(parts(number), read=False) for number in numbers]
        jobs = image_jobs(exam.model, exam.pipe.protocol, prompts, seed=exam.seeds(numbers))
        done = exam.pipe.engine.complete([job.request for job in jobs])
        return [exam.written_codes(completion) for completion in done]

    return exam.made(f"write {task}", items, make)


def painted(
    exam: Exam, task: str, items: Sequence[int], codes: Sequence[list[Any]],
) -> list[Image.Image]:  # fmt: skip
    """Pictures of codes, kept by item."""
    exam.needs("pixels")
    of = dict(zip(items, codes, strict=True))

    def make(numbers: list[int]) -> list[str]:
        chosen = [torch.tensor(of[number]) for number in numbers]
        return [packed(picture) for picture in exam.pipe.paint(chosen, seeds=exam.seeds(numbers))]

    return [unpacked(text) for text in exam.made(task, items, make)]


def packed(picture: Image.Image) -> str:
    """A picture as text: a PNG file in base 64."""
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def unpacked(text: str) -> Image.Image:
    """The picture of such a text."""
    return Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")


def drawn(exam: Exam, task: str, items: Sequence[int], parts: PartsOf) -> list[Image.Image]:
    """One drawing for each item, kept by item."""
    exam.needs("language", "pixels")
    return painted(exam, f"draw {task}", items, written(exam, task, items, parts))


def drawings(exam: Exam, split: str) -> list[Image.Image]:
    """Drawings of the prompts of a split."""
    return drawn(exam, split, range(exam.count), lambda item: [prompt_of(exam, split, item)])


def wanted(exam: Exam, split: str) -> list[Facts]:
    """The facts of a split's scenes."""
    return [facts(exam.scene(split, item)) for item in range(exam.count)]


def seen(exam: Exam, name: str, pictures: Sequence[Image.Image]) -> list[Seen]:
    """What the judge sees in pictures, looked at once for all figures."""
    if ("seen", name) not in exam.cache:
        exam.cache["seen", name] = exam.judge.look(pictures)
    return exam.cache["seen", name]


def seen_drawn(exam: Exam, split: str) -> list[Seen]:
    """What is seen in drawings of the prompts of a split."""
    return seen(exam, f"draw {split}", drawings(exam, split))


def seen_rebuilt(exam: Exam, split: str) -> list[Seen]:
    """What is seen of a split's pictures after their own tokens and the decoder."""
    exam.needs("visual_tokenizer", "pixels")
    items, codes = range(exam.count), exam.true_codes(split)
    pictures = painted(exam, f"reconstruct {split}", items, codes)
    return seen(exam, f"reconstruct {split}", pictures)


def seen_true(exam: Exam, split: str) -> list[Seen]:
    """What is seen in a split's true pictures, at the decoder's size."""
    pictures = [exam.small(exam.scene(split, item)) for item in range(exam.count)]
    return seen(exam, f"true {split}", pictures)


def all_of(said: Sequence[Facts], looks: Sequence[Seen]) -> list[bool]:
    """Is every fact right and nothing more there, picture by picture?"""
    return [judge.all_right(one, look) for one, look in zip(said, looks, strict=True)]


def atoms_of(said: Sequence[Facts], looks: Sequence[Seen]) -> list[float]:
    """Share of the facts that are right, picture by picture."""
    found = [judge.atoms(one, look) for one, look in zip(said, looks, strict=True)]
    return [right / max(1, count) for right, count in found]


def by_number(said: Sequence[Facts], values: Sequence[float]) -> dict[str, float]:
    """The mean of values for each number of things."""
    return averages([f"of_{one.number}" for one in said], values)


def failures(said: Sequence[Facts], looks: Sequence[Seen]) -> dict[str, float]:
    """Shares of drawings that fail at each skill."""
    rows = []
    for one, look in zip(said, looks, strict=True):
        names = Counter({group.name: group.number for group in one.groups})
        shown = look.counts()
        rows.append({
            "wrong_background": one.background != look.background,
            "wrong_pattern": one.pattern != look.pattern,
            "wrong_count": names.total() != shown.total(),
            "wrong_things": names != shown,
            "extra_things": bool(shown - names),
        })  # fmt: skip
    return {name: average([row[name] for row in rows]) for name in rows[0]}


def _scored(exam: Exam, split: str, score: Callable[..., list[Any]]) -> tuple[Any, ...]:
    """Facts, what is seen in their drawings, the scores of these, and what they lie between."""
    said, looks = wanted(exam, split), seen_drawn(exam, split)
    ends = {
        "floor": ("another prompt's drawing", average(score(said, turned(looks)))),
        "ceiling": ("true tokens", average(score(said, seen_rebuilt(exam, split)))),
    }
    return said, looks, score(said, looks), ends


def draw_all(exam: Exam, split: str) -> Figure:
    """Share of drawings in which every fact is right."""
    said, looks, hits, ends = _scored(exam, split, all_of)
    return share(hits, **ends, details={**by_number(said, hits), **failures(said, looks)})


def draw_atoms(exam: Exam, split: str) -> Figure:
    """Mean share of a prompt's facts that are right."""
    said, _, values, ends = _scored(exam, split, atoms_of)
    return mean(values, **ends, details=by_number(said, values), within=(0.0, 1.0))


def draw_swaps(exam: Exam) -> Figure:
    """Share of drawings of two coloured shapes in which their colours or places are swapped."""

    def swapped(looks: list[Seen]) -> list[bool]:
        pairs = zip(wanted(exam, "binding"), looks, strict=True)
        return [judge.swapped(one, look) for one, look in pairs]

    hits = swapped(seen_drawn(exam, "binding"))
    return share(hits, floor=("true tokens", average(swapped(seen_rebuilt(exam, "binding")))))


def reconstruct_atoms(exam: Exam) -> Figure:
    """Mean share of a test picture's facts that are right after tokens and decoder alone."""
    return mean(atoms_of(wanted(exam, "test"), seen_rebuilt(exam, "test")), within=(0.0, 1.0))


def reconstruct_error(exam: Exam) -> Figure:
    """Mean squared difference from the true picture there, of levels from 0 to 1."""
    exam.needs("visual_tokenizer", "pixels")
    items = range(exam.count)
    found = painted(exam, "reconstruct test", items, exam.true_codes("test"))
    true = [exam.small(exam.scene("test", item)) for item in items]
    levels = ([np.asarray(one) / 255.0 for one in pictures] for pictures in (found, true))
    return mean([float(np.square(a - b).mean()) for a, b in zip(*levels, strict=True)])


def reconstruct_all(exam: Exam) -> Figure:
    """Share of test pictures in which every fact is right after tokens and decoder alone."""
    said, looks = wanted(exam, "test"), seen_rebuilt(exam, "test")
    return share(
        all_of(said, looks),
        floor=("another picture", average(all_of(said, turned(looks)))),
        ceiling=("true pictures", average(all_of(said, seen_true(exam, "test")))),
        details={"atoms": average(atoms_of(said, looks)), **failures(said, looks)},
    )

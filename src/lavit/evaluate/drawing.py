"""Does the model draw what it is told? One sample a prompt, as the pipeline draws, nothing chosen
among several.

Codes are written first (kept by item) and painted after, as `Pipeline.draw` does with the same
seeds. Full prompts state every fact, so the judge's verdict is over all facts of the scene, and of
a drawing over none else.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from lavit.data.scenes.language import prompt
from lavit.data.scenes.world import Facts, facts
from lavit.evaluate.exam import Exam
from lavit.evaluate.figures import Figure, mean, share
from lavit.generate.prompts import writing, written_from

T = TypeVar("T")
APART = 4  # prompts of 1, 2, 3 and 4 things come in turn: another prompt of as many things


def prompts(exam: Exam, split: str, items: Iterable[int]) -> list[str]:
    """The full prompts of scenes."""
    return [prompt(exam.scene(split, item), exam.rng(item), full=True) for item in items]


def codes_for(exam: Exam, inputs: Sequence[Sequence[Any]], seeds: list[int]) -> list[list[int]]:
    """Codes that are written after words and pictures, one image each, as `Pipeline.generate`
    samples them.
    """
    jobs = writing(
        exam.model,
        exam.pipe.protocol,
        [written_from(one, read=False) for one in inputs],
        out="image",
        n=1,
        seed=list(seeds),
        sampling=None,
        picture=None,
        guidance=None,
    )
    done = exam.pipe.engine.complete([job.request for job in jobs])
    return [list(samples[0].images[0]) for samples in done]


def written(exam: Exam, split: str, items: Sequence[int]) -> list[list[int]]:
    """Codes written from the prompts of scenes."""
    exam.needs("language")

    def make(numbers: list[int]) -> list[list[int]]:
        return codes_for(exam, [[words] for words in prompts(exam, split, numbers)], exam.seeds(numbers))

    return exam.made(f"write {split}", items, make)


def painted(exam: Exam, task: str, items: Sequence[int], codes: Sequence[Sequence[int]]) -> list[Image.Image]:
    """Pictures of codes, kept by item."""
    exam.needs("pixels")
    place = {item: number for number, item in enumerate(items)}

    def make(numbers: list[int]) -> list[str]:
        chosen = [torch.tensor(codes[place[item]]) for item in numbers]
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


def drawings(exam: Exam, split: str) -> list[Image.Image]:
    """Drawings of the prompts of a split."""
    exam.needs("language", "pixels")
    items = range(exam.count)
    return painted(exam, f"draw {split}", items, written(exam, split, items))


def rebuilt(exam: Exam, split: str) -> list[Image.Image]:
    """The true pictures of a split through their own tokens and the decoder."""
    exam.needs("tokenizer", "pixels")
    _, tokens = exam.encoded(split, exam.count)
    codes = [one.tolist() for one in tokens.split()]
    return painted(exam, f"reconstruct {split}", range(exam.count), codes)


def wanted(exam: Exam, split: str) -> list[Facts]:
    """The facts of a split's scenes."""
    return [facts(exam.scene(split, item)) for item in range(exam.count)]


def seen(exam: Exam, name: str, pictures: Sequence[Image.Image]) -> list[Any]:
    """What the judge sees in pictures, looked at once for all figures."""
    if ("seen", name) not in exam.cache:
        exam.cache["seen", name] = exam.judge.look(pictures)
    return exam.cache["seen", name]


def all_of(said: Sequence[Facts], looks: Sequence[Any]) -> list[bool]:
    """Is every fact right and nothing more there, picture by picture?"""
    from lavit.evaluate.judge import all_right

    return [all_right(facts_, look) for facts_, look in zip(said, looks, strict=True)]


def atoms_of(said: Sequence[Facts], looks: Sequence[Any]) -> list[float]:
    """Share of the facts that are right, picture by picture."""
    from lavit.evaluate.judge import atoms

    found = [atoms(facts_, look) for facts_, look in zip(said, looks, strict=True)]
    return [right / max(1, count) for right, count in found]


def turned(items: Sequence[T], by: int = APART) -> list[T]:
    """The same items, each in another's place (one alone stays)."""
    by = by if len(items) > by else 1
    return [items[(n + by) % len(items)] for n in range(len(items))]


def by_number(said: Sequence[Facts], values: Sequence[float]) -> dict[str, float]:
    """The mean of values for each number of things."""
    numbers = sorted({one.number for one in said})
    return {
        f"of_{n}": float(np.mean([v for v, one in zip(values, said, strict=True) if one.number == n])) for n in numbers
    }


def _scored(exam: Exam, split: str, score: Callable[..., list[Any]]) -> tuple[Any, ...]:
    """Facts, what is seen in their drawings, the scores of these, and what they lie between."""
    said, looks = wanted(exam, split), seen(exam, f"draw {split}", drawings(exam, split))
    true = seen(exam, f"reconstruct {split}", rebuilt(exam, split))
    ends = {
        "floor": ("another prompt's drawing", float(np.mean(score(said, turned(looks))))),
        "ceiling": ("true tokens", float(np.mean(score(said, true)))),
    }
    return said, looks, score(said, looks), ends


def draw_all(exam: Exam, split: str) -> Figure:
    """Share of drawings in which every fact is right."""
    said, looks, hits, ends = _scored(exam, split, all_of)
    details = {**by_number(said, hits), **failures(said, looks)}
    return share(f"draw_{split}_all", hits, **ends, details=details)


def draw_atoms(exam: Exam, split: str) -> Figure:
    """Mean share of a prompt's facts that are right."""
    said, _, values, ends = _scored(exam, split, atoms_of)
    details = by_number(said, values)
    return mean(f"draw_{split}_atoms", values, **ends, details=details, within=(0.0, 1.0))


def failures(said: Sequence[Facts], looks: Sequence[Any]) -> dict[str, float]:
    """Shares of drawings that fail at each skill."""
    found: dict[str, list[bool]] = {}
    for one, look in zip(said, looks, strict=True):
        names = sorted(group.name for group in one.groups for _ in range(group.number))
        shown = [thing.name for thing in look.things]
        found.setdefault("wrong_background", []).append(one.background != look.background)
        found.setdefault("wrong_pattern", []).append(one.pattern != look.pattern)
        found.setdefault("wrong_count", []).append(len(names) != len(shown))
        found.setdefault("wrong_things", []).append(names != sorted(shown))
        extra = sum(max(0, shown.count(name) - names.count(name)) for name in set(shown))
        found.setdefault("extra_things", []).append(extra > 0)
    return {name: float(np.mean(values)) for name, values in found.items()}


def draw_swaps(exam: Exam) -> Figure:
    """Share of drawings of two coloured shapes in which their colours or places are swapped."""
    from lavit.evaluate.judge import swapped

    said, looks = wanted(exam, "binding"), seen(exam, "draw binding", drawings(exam, "binding"))
    hits = [swapped(one, look) for one, look in zip(said, looks, strict=True)]
    true = seen(exam, "reconstruct binding", rebuilt(exam, "binding"))
    floor = float(np.mean([swapped(one, look) for one, look in zip(said, true, strict=True)]))
    return share("draw_swaps", hits, floor=("true tokens", floor))


def reconstruct_all(exam: Exam) -> Figure:
    """Share of test pictures in which every fact is right after tokens and decoder, without the
    language model.
    """
    said = wanted(exam, "test")
    looks = seen(exam, "reconstruct test", rebuilt(exam, "test"))
    hits = all_of(said, looks)
    real = all_of(
        said,
        seen(exam, "true test", [exam.small(exam.scene("test", n)) for n in range(exam.count)]),
    )
    return share(
        "reconstruct_test_all",
        hits,
        floor=("another picture", float(np.mean(all_of(said, turned(looks))))),
        ceiling=("true pictures", float(np.mean(real))),
        details={"atoms": float(np.mean(atoms_of(said, looks))), **failures(said, looks)},
    )

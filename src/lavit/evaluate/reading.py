"""Does the model read what a picture shows? Free greedy captions and answers, judged by their
facts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL.Image import Image

from lavit.data.scenes.language import describe
from lavit.data.scenes.questions import normal, questions, right
from lavit.data.scenes.sample import scene_at
from lavit.data.scenes.world import Facts, facts
from lavit.evaluate.drawing import by_number, drawings, turned, wanted
from lavit.evaluate.exam import Exam
from lavit.evaluate.figures import Figure, share
from lavit.evaluate.tokens import OTHER_SEED

KNOWN = 3_000  # scenes like training's, whose questions a text-only answer is learnt from
SPLITS = ("test", "pairs", "binding", "number", "style", "noto")


def exact(texts: Sequence[str], said: Sequence[Facts]) -> list[bool]:
    """Does each text state just these facts?"""
    from lavit.evaluate.judge import text_exact

    return [text_exact(text, one) for text, one in zip(texts, said, strict=True)]


def items_of(exam: Exam, split: str) -> list[int]:
    """Scenes that are read: of `test` those with two things or more."""
    if split != "test":
        return list(range(exam.count))
    found, item = [], 0
    while len(found) < exam.count:
        if item % 4 and len(exam.scene(split, item).things) > 1:  # 1, 2, 3, 4 things in turn
            found.append(item)
        item += 1
    return found


def captions(exam: Exam, task: str, items: Sequence[int], pictures: Any) -> list[str]:
    """Captions of pictures, which `pictures(item)` opens."""
    exam.needs("language")

    def make(numbers: list[int]) -> list[str]:
        return exam.pipe.caption([pictures(number) for number in numbers], seed=exam.seed)

    return exam.made(task, items, make)


def read_exact(exam: Exam, split: str) -> Figure:
    """Share of captions that state all facts of their picture and nothing else."""
    items = items_of(exam, split)
    scenes = {item: exam.scene(split, item) for item in items}
    said = [facts(scenes[item]) for item in items]
    if split == "noto":
        exam.picture(scenes[items[0]])  # without its font nothing is asked
    texts = captions(exam, f"read {split}", items, lambda item: exam.picture(scenes[item]))
    hits = exact(texts, said)
    truth = [describe(scenes[item], exam.rng(item)) for item in items]
    return share(
        f"read_{split}_exact",
        hits,
        floor=("another picture's caption", float(np.mean(exact(turned(texts, 1), said)))),
        ceiling=("true descriptions", float(np.mean(exact(truth, said)))),
        details={**by_number(said, hits), **mistakes(texts, said)},
    )


def mistakes(texts: Sequence[str], said: Sequence[Facts]) -> dict[str, float]:
    """Shares of texts that fail at each skill; one that cannot be read fails at all."""
    from lavit.data.scenes.parse import parse

    parsed = [parse(text) for text in texts]
    found = {"unreadable": [one is None for one in parsed]}
    for name in ("background", "pattern", "relations"):
        found[f"wrong_{name}"] = [
            one is None or getattr(one, name) != getattr(true, name) for one, true in zip(parsed, said, strict=True)
        ]
    for name in ("name", "number", "size", "colour"):
        found[f"wrong_{name}"] = [
            one is None or _each(one, name) != _each(true, name) for one, true in zip(parsed, said, strict=True)
        ]
    return {name: float(np.mean(values)) for name, values in found.items()}


def _each(said: Facts, name: str) -> list[tuple[str, Any]]:
    return sorted((group.name, str(getattr(group, name))) for group in said.groups)


def question_of(exam: Exam, item: int) -> Any:
    """One question about a test scene."""
    for again in range(20):
        found = questions(exam.scene("test", item), exam.rng(item, 1 + again), exam.rules, 1)
        if found:
            return found[0]
    raise ValueError(f"no question about test scene {item}")


def answers(exam: Exam, task: str, pictures: Any) -> list[bool]:
    """Are the model's answers right, when `pictures(item)` is shown?"""
    exam.needs("language")

    def make(numbers: list[int]) -> list[str]:
        asked = [question_of(exam, number).question for number in numbers]
        return exam.pipe.ask([pictures(number) for number in numbers], asked, seed=exam.seed)

    items = range(exam.count)
    said = exam.made(task, items, make)
    return [
        right(answer, question_of(exam, item).question, exam.scene("test", item))
        for item, answer in zip(items, said, strict=True)
    ]


def text_only(exam: Exam) -> list[bool]:
    """Is the commonest right answer to a question's words right, or to its kind where the words are
    new?
    """
    if "text only" not in exam.cache:
        words: dict[str, Counter[str]] = {}
        for number in range(min(KNOWN, exam.scaled(KNOWN) * 4)):
            scene = scene_at("train", number, seed=OTHER_SEED + 2, rules=exam.rules)
            for one in questions(scene, np.random.default_rng([OTHER_SEED, number]), exam.rules, 3):
                for key in (one.question, one.kind):
                    words.setdefault(key, Counter())[normal(one.answer)] += 1
        hits = []
        for item in range(exam.count):
            one = question_of(exam, item)
            known = words.get(one.question) or words.get(one.kind) or Counter({"yes": 1})
            answer = min(known, key=lambda text: (-known[text], text))
            hits.append(right(answer, one.question, exam.scene("test", item)))
        exam.cache["text only"] = hits
    return exam.cache["text only"]


def answer_test(exam: Exam) -> Figure:
    """Share of questions about test scenes that are answered right."""
    hits = answers(exam, "answer", lambda item: exam.picture(exam.scene("test", item)))
    kinds: dict[str, list[bool]] = {}
    for item, hit in enumerate(hits):
        kinds.setdefault(question_of(exam, item).kind, []).append(hit)
    own = [
        right(one.answer, one.question, exam.scene("test", item))
        for item, one in ((n, question_of(exam, n)) for n in range(exam.count))
    ]
    return share(
        "answer_test",
        hits,
        floor=("best answer from the words alone", float(np.mean(text_only(exam)))),
        ceiling=("true answers", float(np.mean(own))),
        details={kind.replace(" ", "_"): float(np.mean(found)) for kind, found in sorted(kinds.items())},
    )


def answer_blind(exam: Exam) -> Figure:
    """The same when another scene's picture is shown."""

    def other(item: int) -> Image:
        return exam.picture(exam.scene("test", (item + 4) % exam.count))

    hits = answers(exam, "answer blind", other)
    return share(
        "answer_blind",
        hits,
        floor=("best answer from the words alone", float(np.mean(text_only(exam)))),
    )


def cycle_text(exam: Exam) -> Figure:
    """Share of prompts whose drawing the model itself reads as what was asked for."""
    said = wanted(exam, "test")
    drawn = drawings(exam, "test")
    texts = captions(exam, "cycle", range(exam.count), lambda item: drawn[item])
    real = captions(exam, "cycle ceiling", range(exam.count), lambda item: exam.small(exam.scene("test", item)))
    hits = exact(texts, said)
    return share(
        "cycle_text_exact",
        hits,
        floor=("another prompt's drawing", float(np.mean(exact(turned(texts), said)))),
        ceiling=("true pictures of the decoder's size", float(np.mean(exact(real, said)))),
        details=by_number(said, hits),
    )


READING = {f"read_{split}_exact": partial(read_exact, split=split) for split in SPLITS}

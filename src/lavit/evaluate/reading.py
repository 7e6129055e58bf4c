"""Does the model read what a picture shows? Free greedy captions and answers, judged by their
facts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL.Image import Image

from lavit.data.scenes.language import describe, plainly
from lavit.data.scenes.parse import parse
from lavit.data.scenes.questions import SceneQuestion, normal, questions, right
from lavit.data.scenes.sample import scene_at
from lavit.data.scenes.world import Facts, Scene, facts
from lavit.evaluate.drawing import by_number, drawings, wanted
from lavit.evaluate.exam import Exam
from lavit.evaluate.figures import Figure, average, averages, mean, share, turned
from lavit.evaluate.tokens import OTHER_SEED
from lavit.generate.score import likelihood

KNOWN = 3_000  # scenes like training's, whose questions a text-only answer is learnt from
SPLITS = ("test", "pairs", "binding", "number", "style", "noto")
PictureOf = Callable[[int], Image]  # the picture of an item


def exact(texts: Sequence[str], said: Sequence[Facts]) -> list[bool]:
    """Does each text state just these facts, none missing, extra, repeated or contradictory?"""
    return [parse(text) == one for text, one in zip(texts, said, strict=True)]


def items_of(exam: Exam, split: str) -> list[int]:
    """Scenes that are read: of `test` those with two things or more."""
    if split != "test":
        return list(range(exam.count))
    found: list[int] = []
    item = 0
    while len(found) < exam.count:
        if item % 4 and len(exam.scene(split, item).things) > 1:  # 1, 2, 3, 4 things in turn
            found.append(item)
        item += 1
    return found


def read_exact(exam: Exam, split: str) -> Figure:
    """Share of captions that state all facts of their picture and nothing else."""
    items = items_of(exam, split)
    scenes = {item: exam.scene(split, item) for item in items}
    said = [facts(scene) for scene in scenes.values()]
    if split == "noto":
        exam.picture(scenes[items[0]])  # without its font nothing is asked
    texts = exam.captions(f"read {split}", items, lambda item: exam.picture(scenes[item]))
    hits = exact(texts, said)
    truth = [told(exam, scene, item) for item, scene in scenes.items()]
    return share(
        hits,
        floor=("another picture's caption", average(exact(turned(texts, 1), said))),
        ceiling=("true descriptions", average(exact(truth, said))),
        details={**by_number(said, hits), **mistakes(texts, said)},
    )


def read_likelihood(exam: Exam) -> Figure:
    """Mean log-likelihood, in nats a token, of true descriptions of things never seen together."""
    exam.needs("language")
    scenes = [exam.scene("pairs", item) for item in range(exam.count)]
    texts = [told(exam, scene, item) for item, scene in enumerate(scenes)]
    model = exam.pipe.model
    shown = zip(texts, map(exam.picture, scenes), strict=True)
    return mean([likelihood(model, words, picture) for words, picture in shown])


def told(exam: Exam, scene: Scene, item: int) -> str:
    """The true description of a scene, worded as the model's training words them."""
    return plainly(scene) if exam.rules.plain else describe(scene, exam.rng(item))


def mistakes(texts: Sequence[str], said: Sequence[Facts]) -> dict[str, float]:
    """Shares of texts that fail at each skill; one that cannot be read fails at all."""
    rows = []
    for text, true in zip(texts, said, strict=True):
        read = parse(text)
        own = {} if read is None else skills(read)
        wrong = {f"wrong_{name}": own.get(name) != value for name, value in skills(true).items()}
        rows.append({"unreadable": read is None, **wrong})
    return {name: average([row[name] for row in rows]) for name in rows[0]}


def skills(said: Facts) -> dict[str, Any]:
    """What facts say, skill by skill."""
    found: dict[str, Any] = {"background": said.background, "pattern": said.pattern}
    found["relations"] = said.relations
    for name in ("name", "number", "size", "colour"):
        found[name] = sorted((group.name, str(getattr(group, name))) for group in said.groups)
    return found


def question_of(exam: Exam, item: int) -> SceneQuestion:
    """One question about a test scene."""
    for again in range(20):
        found = questions(exam.scene("test", item), exam.rng(item, 1 + again), exam.rules, 1)
        if found:
            return found[0]
    raise ValueError(f"no question about test scene {item}")


def model_answers(
    exam: Exam, task: str, items: Sequence[int], shown: PictureOf, question: Callable[[int], str],
) -> list[str]:  # fmt: skip
    """The model's answers to questions about pictures, kept by item."""
    exam.needs("language")

    def make(numbers: list[int]) -> list[str]:
        pictures = [shown(number) for number in numbers]
        asked = [question(number) for number in numbers]
        return exam.pipe.ask(pictures, asked, seed=exam.seeds(numbers))

    return exam.made(task, items, make)


def _right(exam: Exam, said: Sequence[str]) -> list[bool]:
    """Are answers to the questions about the test scenes right?"""
    hits = []
    for item, answer in enumerate(said):
        hits.append(right(answer, question_of(exam, item).question, exam.scene("test", item)))
    return hits


def _answered(exam: Exam, task: str, shown: PictureOf) -> list[bool]:
    """Are the model's answers right, when these pictures are shown?"""

    def question(item: int) -> str:
        return question_of(exam, item).question

    return _right(exam, model_answers(exam, task, range(exam.count), shown, question))


def text_only(exam: Exam) -> tuple[str, float]:
    """How often an answer that saw no picture is right: the commonest of training to a question's
    words, or else to its kind, or to its kind alone, whichever is better on `valid`.
    """
    if "text only" not in exam.cache:
        common: dict[str, Counter[str]] = {}
        for one, _ in _questions(exam, "train", min(KNOWN, exam.scaled(KNOWN) * 4), 3):
            for key in (one.question, one.kind):
                common.setdefault(key, Counter())[normal(one.answer)] += 1

        def by_words(one: SceneQuestion) -> str:
            found = common.get(one.question)
            return min(found, key=lambda text: (-found[text], text)) if found else by_kind(one)

        def by_kind(one: SceneQuestion) -> str:
            found = common.get(one.kind, Counter({"yes": 1}))
            return min(found, key=lambda text: (-found[text], text))

        chosen = list(_questions(exam, "valid", exam.scaled(KNOWN), 1))
        answer = max(
            (by_words, by_kind),
            key=lambda way: sum(right(way(one), one.question, scene) for one, scene in chosen),
        )
        said = [answer(question_of(exam, item)) for item in range(exam.count)]
        exam.cache["text only"] = average(_right(exam, said))
    return "best answer from the words alone", exam.cache["text only"]


def _questions(
    exam: Exam, split: str, count: int, each: int
) -> Iterator[tuple[SceneQuestion, Scene]]:
    """Up to `each` questions about each of the first scenes of a split, with their scene."""
    for number in range(count):
        scene = scene_at(split, number, seed=OTHER_SEED + 2, rules=exam.rules)
        rng = np.random.default_rng([OTHER_SEED, number])
        for one in questions(scene, rng, exam.rules, each):
            yield one, scene


def answer_test(exam: Exam) -> Figure:
    """Share of questions about test scenes that are answered right."""
    hits = _answered(exam, "answer", lambda item: exam.picture(exam.scene("test", item)))
    asked = [question_of(exam, item) for item in range(exam.count)]
    return share(
        hits,
        floor=text_only(exam),
        ceiling=("true answers", average(_right(exam, [one.answer for one in asked]))),
        details=averages([one.kind for one in asked], hits),
    )


def answer_blind(exam: Exam) -> Figure:
    """The same when another scene's picture is shown."""

    def other(item: int) -> Image:
        return exam.picture(exam.scene("test", item + 4))  # with as many things

    return share(_answered(exam, "answer blind", other), floor=text_only(exam))


def cycle_text(exam: Exam) -> Figure:
    """Share of prompts whose drawing the model itself reads as what was asked for."""
    said, drawn, items = wanted(exam, "test"), drawings(exam, "test"), range(exam.count)
    texts = exam.captions("cycle", items, lambda item: drawn[item])
    real = exam.captions("cycle ceiling", items, lambda item: exam.small(exam.scene("test", item)))
    hits = exact(texts, said)
    return share(
        hits,
        floor=("another prompt's drawing", average(exact(turned(texts), said))),
        ceiling=("true pictures of the decoder's size", average(exact(real, said))),
        details=by_number(said, hits),
    )


READING = {f"read_{split}_exact": partial(read_exact, split=split) for split in SPLITS}

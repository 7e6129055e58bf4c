"""Audit the language and the splits of scenes at length: what the tests check on hundreds.

Command   python recipes/audit_scenes.py
Cost      eight minutes on two cores, most of them SmolLM2's
Score     documents of training by kind and what is held out among them (none), scenes whose
          descriptions do not read back (none), words at random and texts of SmolLM2 that parse
          (none)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import numpy as np
import torch
import tyro

from lavit.config import LanguageConfig
from lavit.data.scenes.dataset import unit_at
from lavit.data.scenes.language import describe, plainly, prompt
from lavit.data.scenes.lexicon import vocabulary
from lavit.data.scenes.parse import parse
from lavit.data.scenes.sample import scene_at
from lavit.data.scenes.splits import Rules, violations
from lavit.data.scenes.tasks import scene_conversation
from lavit.data.scenes.world import Scene, facts
from lavit.language.smollm2 import SMOLLM2
from lavit.storage import load_base

BLOCK = 250  # units or scenes a process takes at a time
WAVE = 4  # blocks between two looks at the count
TALKS = 10  # units for each conversation
TOGETHER, WORDS = 50, 30  # texts that SmolLM2 writes at a time, and tokens of each
OPENINGS = (
    "A picture of", "The picture shows", "There is a", "There are two", "A small", "Two big",
    "On a red background", "A blue background with", "The background is", "Draw", "The owl is",
    "An empty", "Nothing on", "A green star", "Three small", "In this painting", "Paint me",
    "a dog left of", "It was", "What is",
)  # fmt: skip
WRONG = "WRONG "  # begins a line that should not be there

Document = tuple[str, list[str], list[Scene]]


def documents(index: int, rules: Rules) -> Iterator[Document]:
    """Every document of one unit: its kind, its texts, its scenes."""
    unit = unit_at("train", index, rules=rules)
    for one in unit.pictures:
        yield from (("description", [text], [one.scene]) for text in one.texts)
        yield from (("prompt", [text], [one.scene]) for text in one.prompts)
        asked = ([each.question, each.answer] for each in one.questions)
        yield from (("question", words, [one.scene]) for words in asked)
    if unit.change:
        kind = "edit" if len(unit.change.sources) == 1 else "several pictures"
        yield kind, [unit.change.prompt], [*unit.change.sources, unit.change.target]
    if index % TALKS == 0:
        talk = scene_conversation(
            np.random.default_rng([3, 0, index]), rules, 2 + index // TALKS % 3
        )
        yield "conversation", list(talk.texts), list(talk.scenes)


def leaks(first: int, rules: Rules) -> Counter[str]:
    """Documents of a block of units by kind, and what is held out in them."""
    found: Counter[str] = Counter()
    for index in range(first, first + BLOCK):
        for kind, texts, scenes in documents(index, rules):
            found[kind] += 1
            found.update(f"{WRONG}{kind}: {one}" for one in violations(texts, scenes, rules))
    return found


def unread(first: int, rules: Rules) -> Counter[str]:
    """Scenes of a block, and those whose description or full prompt does not give their facts."""
    found: Counter[str] = Counter()
    rng = np.random.default_rng([5, first])
    for index in range(first, first + BLOCK):
        scene = scene_at("train", index, seed=1, rules=rules)
        texts = (plainly(scene), describe(scene, rng), prompt(scene, rng, full=True))
        found["scene"] += 1
        found.update(f"{WRONG}not read back: {one}" for one in texts if parse(one) != facts(scene))
    return found


def at_random(count: int) -> Counter[str]:
    """Strings of the language's own words in any order, and those that parse."""
    rng, words = np.random.default_rng(4), sorted(vocabulary())
    texts = [" ".join(rng.choice(words, int(rng.integers(3, 15)))) for _ in range(count)]
    found = Counter({"string": count})
    found.update(f"{WRONG}parsed: {one}" for one in texts if parse(one))
    return found


@torch.no_grad()
def by_a_model(count: int) -> Counter[str]:
    """Texts that SmolLM2 writes behind `OPENINGS`, and those that parse."""
    lm, text = load_base(LanguageConfig(source=SMOLLM2), None)
    found: Counter[str] = Counter()
    torch.manual_seed(0)
    for at in range(0, count, TOGETHER):
        opening = OPENINGS[at // TOGETHER % len(OPENINGS)]
        given = text([opening] * min(TOGETHER, count - at), return_tensors="pt")
        how = {"do_sample": True, "max_new_tokens": WORDS, "pad_token_id": text.eos_token_id}
        for said in text.batch_decode(lm.generate(**given, **how), skip_special_tokens=True):
            found["text of SmolLM2"] += 1
            found.update([f"{WRONG}parsed: {said}"] * bool(parse(said.strip().lower())))
    return found


def main(
    documents: int = 200_000,
    scenes: int = 20_000,
    objects: int = 48,
    texts: int = 1000,
    processes: int = 2,
) -> None:
    """Print counts, and every line that should not be there."""
    found = at_random(2000) + by_a_model(texts)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for block in pool.map(partial(unread, rules=Rules(objects=160)), range(0, scenes, BLOCK)):
            found += block
        others, first = found.total(), 0
        while found.total() - others < documents:
            firsts = range(first, first + WAVE * BLOCK, BLOCK)
            found += sum(pool.map(partial(leaks, rules=Rules(objects=objects)), firsts), Counter())
            first += WAVE * BLOCK
    wrong = sum(count for line, count in found.items() if line.startswith(WRONG))
    for line, count in sorted(found.items()):
        print(f"{count:8d} {line}")
    print(f"{wrong:8d} violations")


if __name__ == "__main__":
    tyro.cli(main)

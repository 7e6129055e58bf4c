"""Does the model edit what it is shown, and put several pictures together? One sample each, judged
by the target's facts.

Edits come in all kinds in turn, on test scenes; the target is a test scene too where such an edit
is found, else one of training's world. Style is no fact, so of an edit of style the judge must also
see every thing in the style asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from lavit.data.scenes.edits import EDIT_KINDS, Edit, edit
from lavit.data.scenes.sample import belongs
from lavit.data.scenes.tasks import several
from lavit.data.scenes.world import STYLES, Facts, Scene, facts
from lavit.evaluate.drawing import all_of, atoms_of, codes_for, failures, painted, seen, turned
from lavit.evaluate.exam import Exam, tokens_of
from lavit.evaluate.figures import Figure, share

TRIES = 8  # scenes of `test` looked at for each edit that is wanted


@dataclass(frozen=True)
class Asked:
    """Scenes that are shown, what is asked, and the scene that is right."""

    item: int
    sources: tuple[Scene, ...]
    prompt: str
    target: Scene
    kind: str


def edits(exam: Exam) -> list[Asked]:
    """An edit of each of the first test scenes that can be edited."""
    if "edits" not in exam.cache:
        found: list[Asked] = []
        for item in range(TRIES * exam.count):
            if len(found) == exam.count:
                break
            made = edit_of(exam, item, tuple(EDIT_KINDS)[len(found) % len(EDIT_KINDS)])
            if made is not None:
                found.append(Asked(item, (made.source,), made.prompt, made.target, made.kind))
        exam.cache["edits"] = found
    return exam.cache["edits"]


def edit_of(exam: Exam, item: int, kind: str) -> Edit | None:
    """An edit of one kind of a test scene, if there is one."""
    scene, rules = exam.scene("test", item), exam.rules

    def unseen(target: Scene) -> bool:
        return belongs(target, exam.split("test"), rules)

    def fair(target: Scene) -> bool:
        return rules.forbids(target) is None

    for allowed in (unseen, fair):
        made = edit(scene, exam.rng(item, 60), rules, kind, allowed=allowed)
        if made is not None:
            return made
    return None


def compositions(exam: Exam) -> list[Asked]:
    """Prompts with several pictures."""
    if "compositions" not in exam.cache:
        found = []
        for item in range(exam.count):
            made = several(exam.rng(item, 61), exam.rules, split=exam.split("test"))
            found.append(Asked(item, tuple(made.sources), made.prompt, made.target, made.kind))
        exam.cache["compositions"] = found
    return exam.cache["compositions"]


def drawn(exam: Exam, task: str, asked: list[Asked], shown: list[Asked] | None = None) -> list[Image.Image]:
    """What the model draws; with `shown` the pictures of those stand in place of an edit's own."""
    exam.needs("language", "pixels")
    by_item = {one.item: (one, other) for one, other in zip(asked, shown or asked, strict=True)}

    def make(numbers: list[int]) -> list[list[int]]:
        inputs = []
        for number in numbers:
            one, other = by_item[number]
            inputs.append([*(exam.picture(scene) for scene in other.sources), one.prompt])
        return codes_for(exam, inputs, exam.seeds(numbers))

    items = [one.item for one in asked]
    codes = exam.made(f"write {task}", items, make)
    return painted(exam, f"draw {task}", items, codes)


def oracle(exam: Exam, task: str, asked: list[Asked]) -> list[Image.Image]:
    """The targets through their own tokens and the decoder."""
    exam.needs("tokenizer", "pixels")
    tokens = tokens_of(exam.tokenizer, exam.features([exam.picture(one.target) for one in asked]))
    codes = [one.tolist() for one in tokens.split()]
    return painted(exam, f"oracle {task}", [one.item for one in asked], codes)


def done(asked: Sequence[Asked], looks: Sequence[Any]) -> list[bool]:
    """Is the change made and everything else as it was?"""
    hits = all_of(targets(list(asked)), looks)
    return [
        hit and (one.kind != "style" or all(thing.style == STYLES[one.target.style] for thing in look.things))
        for one, look, hit in zip(asked, looks, hits, strict=True)
    ]


def targets(asked: list[Asked]) -> list[Facts]:
    """What must be seen."""
    return [facts(one.target) for one in asked]


def by_kind(asked: list[Asked], hits: list[bool]) -> dict[str, float]:
    """Share of hits for each kind of request."""
    kinds = sorted({one.kind for one in asked})
    found = {}
    for kind in kinds:
        own = [hit for one, hit in zip(asked, hits, strict=True) if one.kind == kind]
        found[kind.replace(" ", "_")] = float(np.mean(own))
    return found


def edit_all(exam: Exam) -> Figure:
    """Share of edits after which the change is made and everything else is as before."""
    asked = edits(exam)
    looks = seen(exam, "edit", drawn(exam, "edit", asked))
    hits = done(asked, looks)
    unchanged = seen(exam, "edit sources", [exam.small(one.sources[0]) for one in asked])
    best = done(asked, seen(exam, "edit oracle", oracle(exam, "edit", asked)))
    return share(
        "edit_test_all",
        hits,
        floor=("the source unchanged", float(np.mean(done(asked, unchanged)))),
        ceiling=("true tokens of the target", float(np.mean(best))),
        details={
            "atoms": float(np.mean(atoms_of(targets(asked), looks))),
            **by_kind(asked, hits),
            **failures(targets(asked), looks),
        },
    )


def edit_blind(exam: Exam) -> Figure:
    """The same with another picture as the source: what the instruction alone can do."""
    asked = edits(exam)
    looks = seen(exam, "edit blind", drawn(exam, "edit blind", asked, turned(asked)))
    return share("edit_blind", done(asked, looks))


def edit_oracle(exam: Exam) -> Figure:
    """The ceiling of edits: true tokens of the target through the decoder."""
    asked = edits(exam)
    looks = seen(exam, "edit oracle", oracle(exam, "edit", asked))
    real = done(asked, seen(exam, "edit targets", [exam.small(one.target) for one in asked]))
    ceiling = ("true pictures", float(np.mean(real)))
    return share("edit_oracle_all", done(asked, looks), ceiling=ceiling)


def source_copies(exam: Exam) -> Figure:
    """Share of edits that give the source again: all its facts, and nothing of the change."""
    asked = edits(exam)
    looks = seen(exam, "edit", drawn(exam, "edit", asked))
    before = [Asked(one.item, one.sources, one.prompt, one.sources[0], one.kind) for one in asked]
    best = seen(exam, "edit oracle", oracle(exam, "edit", asked))
    floor = ("true tokens of the target", float(np.mean(done(before, best))))
    return share("edit_source_copies", done(before, looks), floor=floor)


def compose_all(exam: Exam) -> Figure:
    """Share of prompts with several pictures whose drawing has every fact right."""
    asked = compositions(exam)
    looks = seen(exam, "compose", drawn(exam, "compose", asked))
    hits = done(asked, looks)
    best = done(asked, seen(exam, "compose oracle", oracle(exam, "compose", asked)))
    return share(
        "compose_test_all",
        hits,
        floor=("another prompt's drawing", float(np.mean(done(asked, turned(looks))))),
        ceiling=("true tokens of the target", float(np.mean(best))),
        details={"atoms": float(np.mean(atoms_of(targets(asked), looks))), **by_kind(asked, hits)},
    )

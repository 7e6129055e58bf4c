"""Does the model edit what it is shown, and put several pictures together? One sample each, judged
by the target's facts.

Edits come in all kinds in turn, on test scenes; the target is a test scene too where such an edit
is found, else one of training's world. Style is no fact, so of an edit of style the judge must also
see every thing in the style asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lavit.data.scenes.edits import EDIT_KINDS, SceneEdit, edit
from lavit.data.scenes.sample import belongs
from lavit.data.scenes.tasks import several
from lavit.data.scenes.world import STYLES, Facts, Scene, facts
from lavit.evaluate.drawing import all_of, atoms_of, drawn, failures, painted, seen
from lavit.evaluate.exam import Exam
from lavit.evaluate.figures import Figure, average, averages, share, turned
from lavit.evaluate.judge import Seen

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
            made = edit_of(exam, item, tuple(EDIT_KINDS)[len(found) % len(EDIT_KINDS)])
            if made is not None:
                found.append(Asked(item, (made.source,), made.prompt, made.target, made.kind))
            if len(found) == exam.count:
                break
        exam.cache["edits"] = found
    return exam.cache["edits"]


def edit_of(exam: Exam, item: int, kind: str) -> SceneEdit | None:
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


def compose_items(exam: Exam) -> list[Asked]:
    """Prompts with several pictures."""
    found = []
    for item in range(exam.count):
        made = several(exam.rng(item, 61), exam.rules, split=exam.split("test"))
        found.append(Asked(item, tuple(made.sources), made.prompt, made.target, made.kind))
    return found


def seen_edited(exam: Exam, task: str, asked: list[Asked]) -> list[Seen]:
    """What is seen in what the model draws."""
    of = {one.item: one for one in asked}

    def parts(item: int) -> list[Any]:
        return [*(exam.picture(scene) for scene in of[item].sources), of[item].prompt]

    return seen(exam, task, drawn(exam, task, list(of), parts))


def seen_oracle(exam: Exam, task: str, asked: list[Asked]) -> list[Seen]:
    """What is seen of the targets after their own tokens and the decoder."""
    exam.needs("visual_tokenizer", "pixels")
    tokens = exam.tokenizer.encode(exam.features([exam.picture(one.target) for one in asked]))
    codes = [one.tolist() for one in tokens.split()]
    pictures = painted(exam, f"oracle {task}", [one.item for one in asked], codes)
    return seen(exam, f"{task} oracle", pictures)


def targets(asked: list[Asked]) -> list[Facts]:
    """What must be seen."""
    return [facts(one.target) for one in asked]


def done(asked: list[Asked], looks: Sequence[Seen]) -> list[bool]:
    """Is the change made and everything else as it was?"""
    hits = []
    for one, look, hit in zip(asked, looks, all_of(targets(asked), looks), strict=True):
        styles = {thing.style for thing in look.things}
        hits.append(hit and (one.kind != "style" or styles <= {STYLES[one.target.style]}))
    return hits


def edit_all(exam: Exam) -> Figure:
    """Share of edits after which the change is made and everything else is as before."""
    asked = edits(exam)
    looks = seen_edited(exam, "edit", asked)
    hits = done(asked, looks)
    unchanged = seen(exam, "edit sources", [exam.small(one.sources[0]) for one in asked])
    best = done(asked, seen_oracle(exam, "edit", asked))
    return share(
        hits,
        floor=("the source unchanged", average(done(asked, unchanged))),
        ceiling=("true tokens of the target", average(best)),
        details={
            "atoms": average(atoms_of(targets(asked), looks)),
            **averages([one.kind for one in asked], hits),
            **failures(targets(asked), looks),
        },
    )


def edit_blind(exam: Exam) -> Figure:
    """The same with another picture as the source: what the instruction alone can do."""
    asked = edits(exam)
    pairs = zip(asked, turned(asked), strict=True)
    blind = [replace(one, sources=other.sources) for one, other in pairs]
    looks = seen_edited(exam, f"edit blind {exam.count}", blind)
    unchanged = seen(exam, "edit sources", [exam.small(one.sources[0]) for one in asked])
    floor = ("that picture unchanged", average(done(asked, turned(unchanged))))
    return share(done(asked, looks), floor=floor)


def edit_oracle(exam: Exam) -> Figure:
    """The ceiling of edits: true tokens of the target through the decoder."""
    asked = edits(exam)
    real = done(asked, seen(exam, "edit targets", [exam.small(one.target) for one in asked]))
    hits = done(asked, seen_oracle(exam, "edit", asked))
    return share(hits, ceiling=("true pictures", average(real)))


def source_copies(exam: Exam) -> Figure:
    """Share of edits that give the source again: all its facts, and nothing of the change."""
    asked = edits(exam)
    before = [replace(one, target=one.sources[0]) for one in asked]
    hits = done(before, seen_edited(exam, "edit", asked))
    best = done(before, seen_oracle(exam, "edit", asked))
    return share(hits, floor=("true tokens of the target", average(best)))


def compose_all(exam: Exam) -> Figure:
    """Share of prompts with several pictures whose drawing has every fact right."""
    asked = compose_items(exam)
    looks = seen_edited(exam, "compose", asked)
    hits = done(asked, looks)
    best = done(asked, seen_oracle(exam, "compose", asked))
    return share(
        hits,
        floor=("another prompt's drawing", average(done(asked, turned(looks)))),
        ceiling=("true tokens of the target", average(best)),
        details={
            "atoms": average(atoms_of(targets(asked), looks)),
            **averages([one.kind for one in asked], hits),
        },
    )

"""Documents of several pictures, and conversations; questions and edits are in their own files.

Everything that stands in one document obeys the rules together (`violations` says if not).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from lavit.data.scenes.chance import Rng, pick, shuffled, weighted
from lavit.data.scenes.edits import SceneEdit, edit, sound
from lavit.data.scenes.language import describe, mention, prompt, the
from lavit.data.scenes.questions import questions
from lavit.data.scenes.sample import scene_at
from lavit.data.scenes.splits import DocumentRules, Rules, valid_world
from lavit.data.scenes.world import BACKGROUNDS, PATTERNS, Scene, facts

FULL = ("describe the picture.", "describe everything in the picture.")  # ask for `describe`
SHORT = ("describe the picture in short.", "give me a short caption.")  # ask for `mention`
TOGETHER = (
    "both together", "put both together", "put the things of both pictures together",
    "combine both pictures",
)  # fmt: skip
SEVERAL_KINDS = ("together", "background")
TURNS = {"question": 0.4, "caption": 0.15, "drawing": 0.15, "edit": 0.3}
STREAM = 1 << 40  # the seed of scenes that are drawn inside documents
TRIES = 200


@dataclass(frozen=True)
class Message:
    """What one side says: texts and pictures, in order."""

    role: Literal["user", "assistant"]
    parts: tuple[str | Scene, ...]


@dataclass(frozen=True)
class SceneConversation:
    """Messages in turn, the user's first."""

    messages: tuple[Message, ...]

    @property
    def texts(self) -> tuple[str, ...]:
        """All its texts."""
        return tuple(p for m in self.messages for p in m.parts if isinstance(p, str))

    @property
    def scenes(self) -> tuple[Scene, ...]:
        """All its pictures."""
        return tuple(p for m in self.messages for p in m.parts if isinstance(p, Scene))


def some_scene(rng: Rng, rules: Rules, split: str = "train") -> Scene:
    """A scene of a split, at random."""
    return scene_at(split, int(rng.integers(STREAM)), seed=STREAM, rules=rules)


def several(rng: Rng, rules: Rules, kind: str | None = None, *, split: str = "train") -> SceneEdit:
    """Two pictures to make one of, drawn from a split.

    "together": the groups of both, each where it stands, on the background of the first.
    "background": the things of the first on the background of the second.
    """
    kind = kind or pick(rng, SEVERAL_KINDS)
    training = split == "train"
    while True:
        target = some_scene(rng, rules, split)
        if len(target.names) < (2 if kind == "together" else 1):
            continue
        if kind == "together":
            order = shuffled(rng, target.names)
            first = set(order[: int(rng.integers(1, len(order)))])
            a = replace(target, things=tuple(t for t in target.things if t.name in first))
            others = tuple(t for t in target.things if t.name not in first)
            b = replace(_other_ground(target, rng), things=others)
        else:
            a = _other_ground(target, rng)
            b = replace(
                some_scene(rng, rules, split),
                style=target.style,
                background=target.background,
                pattern=target.pattern,
            )
        if set(a.names) & set(b.names) or not (sound(a) and sound(b)):
            continue
        if training and (rules.forbids(a) or rules.forbids(b)):
            continue
        text = pick(rng, TOGETHER) if kind == "together" else _onto(target, rng)
        if DocumentRules(rules, training).admits([text], [a, b, target]):
            return SceneEdit(kind, text, (a, b), target)


def _onto(target: Scene, rng: Rng) -> str:
    """Words that ask for the things of one picture on the background of another."""
    things = "the things"
    if len(target.names) == 1:
        (group,) = facts(target).groups
        things = pick(rng, ("the thing" if group.number == 1 else things, the(group)))
    put = pick(rng, ("", "put "))
    return f"{put}{things} of the first picture on the background of the second"


def _other_ground(scene: Scene, rng: Rng) -> Scene:
    """The scene on a background of another colour."""
    colour = pick(rng, [colour for colour in BACKGROUNDS if colour != scene.background])
    return replace(scene, background=colour, pattern=pick(rng, PATTERNS))


def scene_conversation(
    rng: Rng, rules: Rules, turns: int, *, split: str = "train"
) -> SceneConversation:
    """So many turns about pictures: questions, captions, drawings, and edits of the last picture.

    It begins with a picture that the user shows or asks for. Scenes that are not edits belong to
    the split; in training, so does everything.
    """
    document = DocumentRules(rules, split == "train")
    messages: list[Message] = []
    last: Scene | None = None
    while len(messages) < 2 * turns:
        kind = weighted(rng, TURNS)
        shown: tuple[Scene, ...] = ()
        if last is None and kind != "drawing":
            shown = (some_scene(rng, rules, split),)
            document.admits(scenes=shown)
        seen = shown[0] if shown else last
        if turn := _turn(kind, seen, rng, document, split):
            asked, given = turn
            messages += [Message("user", (*shown, asked)), Message("assistant", (given,))]
            last = given if isinstance(given, Scene) else seen
        elif shown:
            document = DocumentRules(rules, split == "train")
    return SceneConversation(tuple(messages))


def _turn(
    kind: str,
    last: Scene | None,
    rng: Rng,
    document: DocumentRules,
    split: str,
) -> tuple[str, str | Scene] | None:
    """One request and its answer; None if this kind is not possible here."""
    rules = document.rules
    if kind == "drawing":
        for _ in range(TRIES):
            scene = some_scene(rng, rules, split)
            # later turns are judged by the scene, so a test leaves nothing of it open
            text = prompt(scene, rng, full=None if document.training else True)
            if document.admits([text], [scene]):
                return text, scene
        return None
    assert last is not None  # all else is about a picture
    if kind == "question":
        found = questions(last, rng, rules, 1, document=document)
        return (found[0].question, found[0].answer) if found else None
    if kind == "caption":
        ask, answer = (FULL, describe) if rng.random() < 0.5 else (SHORT, mention)
        return pick(rng, ask), answer(last, rng)
    allowed = None if document.training else (lambda scene: valid_world(scene) is None)
    one = edit(last, rng, rules, allowed=allowed, document=document)
    return (one.prompt, one.target) if one else None

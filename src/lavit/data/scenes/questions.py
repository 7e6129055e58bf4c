"""Questions about a scene whose answers are clear from its picture.

They are balanced per string: the words of a question say as little as can be about its answer. So
names that are asked for in vain come as often as they stand in pictures, and small numbers are
asked for less often than they occur.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from lavit.data.scenes.chance import Rng, pick, shuffled, weighted
from lavit.data.scenes.language import around, mention, the
from lavit.data.scenes.lexicon import NUMBERS, Noun, are, article, noun, split, tokens
from lavit.data.scenes.parse import parse
from lavit.data.scenes.render import stands_out
from lavit.data.scenes.splits import HELD_OUT_COLOURS, DocumentRules, Rules
from lavit.data.scenes.world import BACKGROUNDS, COLOURS, SHAPES, STYLES, Facts, Group, Scene, facts

KINDS = {  # how often each is tried
    "exists": 1.0, "how many": 2.6, "colour": 0.9, "background": 0.35, "pattern": 0.3,
    "where": 1.2, "bigger": 2.4, "compare": 2.0, "contents": 0.4,
}  # fmt: skip
ASKED = {1: 0.13, 2: 0.28, 3: 0.6, 4: 1.0}  # groups of so many things, when numbers are asked
ABSENT = 0.07  # of the questions of how many: none
CONTENTS = ("what is in the picture?", "what do you see?")
PATTERN_ASKED = ("what pattern is the background?", "is the background plain, striped or dotted?")


@dataclass(frozen=True)
class SceneQuestion:
    """A question, of which kind, and one right answer."""

    kind: str
    question: str
    answer: str


def questions(
    scene: Scene,
    rng: Rng,
    rules: Rules,
    count: int,
    *,
    document: DocumentRules | None = None,
) -> list[SceneQuestion]:
    """Up to `count` questions about a scene, no two alike.

    They ask for nothing that the rules keep away from the scene in training, unless the scene is
    itself held out. A `document` is what else stands beside them.
    """
    if document is None:
        document = DocumentRules(rules, training=rules.forbids(scene) is None)
        document.admits(scenes=[scene])
    said = facts(scene)
    found: dict[str, SceneQuestion] = {}
    for _ in range(6 * count + 6):
        if len(found) >= count:
            break
        kind = weighted(rng, KINDS)
        if kind != "contents":
            pair = ASKING[kind](said, rng, document)
        elif any(one.kind == kind for one in found.values()):
            continue
        else:
            pair = pick(rng, CONTENTS), mention(scene, rng).removesuffix(".")
        if pair and pair[0] not in found and document.admits(pair):
            found[pair[0]] = SceneQuestion(kind, *pair)
    return list(found.values())


Pair = tuple[str, str] | None


def _exists(said: Facts, rng: Rng, document: DocumentRules) -> Pair:
    if not said.groups:
        return None
    here = pick(rng, sorted(said.groups))
    yes = rng.random() < 0.5
    name, colour = here.name, here.colour
    if colour and rng.random() >= 0.5:
        colour = None
    if not yes and colour:
        if rng.random() < 0.5:
            name = pick(rng, SHAPES)
        group = said.group(name)
        taken = {said.background, group and group.colour}
        could = [c for c in COLOURS if c not in taken and (name, c) not in HELD_OUT_COLOURS]
        colour = pick(rng, could)
        if not document.admits_name(name, colour):
            return None
    elif not yes:
        stranger = _stranger(said, here, rng, document)
        if stranger is None:
            return None
        name = stranger
    adjective = f"{colour} " if colour else ""
    text = f"is there {article(adjective + name)}?"
    if rng.random() < 0.3:
        text = f"are there any {adjective}{noun(name, 2)}?"
    return text, "yes" if yes else "no"


def _how_many(said: Facts, rng: Rng, document: DocumentRules) -> Pair:
    if not said.groups:
        return None
    group = pick(rng, sorted(said.groups))
    name, answer = group.name, NUMBERS[group.number]
    if rng.random() < ABSENT:
        stranger = _stranger(said, group, rng, document)
        if stranger is None:
            return None
        name, answer = stranger, "none"
    elif rng.random() > ASKED.get(group.number, 1.0):
        return None
    verb = "are there" if rng.random() < 0.7 else "do you see"
    return f"how many {noun(name, 2)} {verb}?", answer


def _colour(said: Facts, rng: Rng, document: DocumentRules) -> Pair:
    shapes = [(group, group.colour) for group in sorted(said.groups) if group.colour]
    if not shapes:
        return None
    group, colour = pick(rng, shapes)
    return f"what colour {are(group)} {the(group)}?", colour


def _background(said: Facts, rng: Rng, document: DocumentRules) -> Pair:
    return ("what colour is the background?", said.background) if said.background else None


def _pattern(said: Facts, rng: Rng, document: DocumentRules) -> Pair:
    question = PATTERN_ASKED[rng.random() >= 0.5]
    return (question, said.pattern) if said.pattern else None


def _where(said: Facts, rng: Rng, document: DocumentRules) -> Pair:
    single = [group for group in sorted(said.groups) if len(around(said, group.name)) == 1]
    if not single:
        return None
    group = pick(rng, single)
    ((kind, other),) = around(said, group.name)
    return f"where {are(group)} {the(group)}?", f"{kind} {the(said.named(other))}"


def _bigger(said: Facts, rng: Rng, document: DocumentRules) -> Pair:
    pair = sorted(said.groups)
    if len(pair) != 2 or pair[0].size == pair[1].size or said.number > 2:
        return None
    a, b = shuffled(rng, pair)
    return f"which is bigger, {the(a)} or {the(b)}?", the(a if a.size == "big" else b)


def _compare(said: Facts, rng: Rng, document: DocumentRules) -> Pair:
    if len(said.groups) < 2:
        return None
    a, b = shuffled(rng, sorted(said.groups), 2)
    if a.number == b.number:
        return None
    text = f"are there more {noun(a.name, 2)} than {noun(b.name, 2)}?"
    return text, "yes" if a.number > b.number else "no"


ASKING: dict[str, Callable[[Facts, Rng, DocumentRules], Pair]] = {
    "exists": _exists, "how many": _how_many, "colour": _colour, "background": _background,
    "pattern": _pattern, "where": _where, "bigger": _bigger, "compare": _compare,
}  # fmt: skip


def _stranger(said: Facts, like: Group, rng: Rng, document: DocumentRules) -> str | None:
    """A name that is not here but could be, as often as it stands in pictures.

    It is a shape if `like` is one, so that shapes are asked for in vain as often as not.
    """
    names, shares = frequencies(document.rules, like.name in SHAPES)
    for _ in range(12):
        name = names[int(np.searchsorted(shares, rng.random()))]
        if said.group(name) is None and document.admits_name(name):
            return name
    return None


@cache
def frequencies(rules: Rules, shapes: bool) -> tuple[tuple[str, ...], np.ndarray]:
    """Shapes or objects, and the running sum of how often each stands in pictures of training."""
    names = SHAPES if shapes else rules.objects_named
    shares = [
        sum(
            stands_out(name, colour, style, ground)
            for style in STYLES
            if rules.style_of(name) in (None, style)
            for colour in (COLOURS if shapes else (None,))
            if (name, colour) not in HELD_OUT_COLOURS
            for ground in BACKGROUNDS
            if colour != ground
        )
        for name in names
    ]
    running = np.cumsum(shares)
    return names, running / running[-1]


def normal(answer: str) -> str:
    """An answer without case, articles and marks; synonyms as their names, digits as words."""
    words = split(answer.strip().rstrip(".!")) or []
    found = [token.name if isinstance(token, Noun) else token for token in tokens(words)]
    found = [NUMBERS[int(word)] if word.isdigit() and len(word) == 1 else word for word in found]
    found = ["none" if word == "zero" else word for word in found]
    text = " ".join(word for word in found if word not in ("a", "an", "the"))
    return re.sub(r"^(to|on) (?=(left|right) of)", "", text)


def answers(scene: Scene | Facts, question: str) -> frozenset[str]:
    """All right answers to a question, in normal form; empty if it cannot be answered."""
    said = scene if isinstance(scene, Facts) else facts(scene)
    if question.strip().lower() in CONTENTS:
        return frozenset(group.name for group in said.groups) or frozenset({"nothing"})
    found = tokens(split(question) or [])
    names = [token for token in found if isinstance(token, Noun)]
    text = " ".join("#" if isinstance(token, Noun) else token for token in found)
    first = said.group(names[0].name) if names else None
    if match := re.fullmatch(r"(?:is there an?|are there any) (?:(\w+) )?# \?", text):
        yes = first is not None and match[1] in (None, first.colour)
        return frozenset({"yes" if yes else "no"})
    if re.fullmatch(r"how many # (are there|do you see) \?", text):
        return frozenset({NUMBERS[first.number if first else 0]})
    if text == "what colour is the background ?":
        return frozenset(filter(None, (said.background,)))
    if text in tuple(" ".join(split(one) or ()) for one in PATTERN_ASKED):
        return frozenset(filter(None, (said.pattern,)))
    if re.fullmatch(r"what colour (is|are) the # \?", text) and first and first.colour:
        return frozenset({first.colour})
    if re.fullmatch(r"where (is|are) the # \?", text) and first:
        return frozenset(f"{kind} {other}" for kind, other in around(said, first.name))
    if len(names) != 2 or first is None or not (second := said.group(names[1].name)):
        return frozenset()
    if text == "which is bigger , the # or the # ?" and first.size != second.size:
        return frozenset({first.name if first.size == "big" else second.name})
    if text == "are there more # than # ?":
        return frozenset({"yes" if first.number > second.number else "no"})
    return frozenset()


def right(answer: str, question: str, scene: Scene | Facts) -> bool:
    """Is an answer right? What the picture shows may be said in part, if all of it is true."""
    if question.strip().lower() in CONTENTS:
        said = parse(answer)
        return said is not None and true_of(said, scene)
    return normal(answer) in answers(scene, question)


def true_of(said: Facts, scene: Scene | Facts) -> bool:
    """Is everything that a text says so in a scene?"""
    so = scene if isinstance(scene, Facts) else facts(scene)
    sayable = {
        Group(group.name, group.number, size, colour)
        for group in so.groups
        for size in (None, group.size)
        for colour in (None, group.colour)
    }
    return (
        said.background in (None, so.background)
        and said.pattern in (None, so.pattern)
        and bool(said.groups) == bool(so.groups)
        and said.groups <= sayable
        and said.relations <= so.relations
    )

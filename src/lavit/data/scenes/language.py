"""Scenes in words: descriptions, short captions and prompts, each in many wordings.

All of them state facts, all or some; `parse` reads them back. A relation is put between exactly
two groups, both named. Lower case; a full stop after descriptions and captions, none after prompts.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import replace

from lavit.data.scenes.chance import Rng, pick, shuffled
from lavit.data.scenes.lexicon import NUMBERS, OPPOSITE, TRIMMINGS, are, article, noun, plural
from lavit.data.scenes.world import SHAPES, Facts, Group, Relation, Scene, facts, kind_of

REQUESTS = (  # each as often as it stands here
    "", "", "", "draw ", "draw ", "paint ", "show me ", "a picture of ", "draw a picture of ",
)  # fmt: skip
Triple = tuple[str, str, str]  # of a name, a kind of relation in words, and a name
SYNONYMS = 0.08  # of the names in prompts
KEPT = {"sizes": 0.4, "relations": 0.5, "background": 0.6, "pattern": 0.5, "colours": 0.9}
BRIEF = {"sizes": 0.2, "relations": 0.4}  # of the facts in captions
FRAMES = (  # of things, what stands where (`more`), and the background
    "{things} on {a_ground}{more}",
    "{things} on {a_ground}{more}",
    "{things} against {a_ground}{more}",
    "{there} {things} on {a_ground}{more}",
    "{there} {things} against {a_ground}{more}",
    "on {a_ground}, {things}{more}",
    "on {a_ground}, {there} {things}{more}",
    "against {a_ground}, {things}{more}",
    "{a_plain} with {things}{more}",
    "{ground}: {things}{more}",
    "{things}{more}. the background is {painted}",
    "the background is {painted}. {there} {things}{more}",
    "the background is {painted}. {things}{more}",
)
NOTHING = (  # of an empty background
    "an empty {ground}",
    "an empty {ground}",
    "nothing on {a_ground}",
    "there is nothing on {a_ground}",
    "{a_plain} with nothing on it",
    "nothing. the background is {painted}",
    "the background is {painted}. there is nothing",
)
FIRST = ("the ", "on ", "against ", "there ")  # of sentences that no request is put before
WAYS = {  # of saying where a thing stands, beside the plain one
    "left of": ("to the left of", "to the left of", "on the left of"),
    "right of": ("to the right of", "to the right of", "on the right of"),
    "above": ("over",),
    "below": ("under",),
}


def describe(scene: Scene, rng: Rng) -> str:
    """Everything that can be read off a scene's picture, in one of many wordings.

    Things are named in reading order, so that what comes next can be seen.
    """
    return say(facts(scene), rng, order=scene.names) + "."


def plainly(scene: Scene, *, ground_first: bool = False) -> str:
    """The same in its plainest wording: things in reading order, background, relations.

    `ground_first`: the background before the things, where there are some.
    """
    said = facts(scene)
    ground = article(f"{said.pattern} {said.background} background")
    groups = sorted(said.groups, key=lambda group: scene.names.index(group.name))
    things = listed([group_words(group) for group in groups])
    words = [f"{things or 'nothing'} on {ground}"]
    if ground_first and things:
        words = [f"on {ground}, {things}"]
    relations = sorted(in_order(relation, scene.names) for relation in said.relations)
    relations.sort(key=lambda one: (scene.names.index(one[0]), scene.names.index(one[2])))
    for first, kind, second in relations:
        one, other = said.named(first), said.named(second)
        words.append(f"{the(one)} {are(one)} {kind} {the(other)}")
    return ". ".join(words) + "."


def mention(scene: Scene, rng: Rng) -> str:
    """A short caption: the things, their numbers and colours, sometimes sizes or a relation."""
    kept = {kind for kind, share in BRIEF.items() if rng.random() < share}
    return say(thin(facts(scene), {"colours", *kept}), rng, order=scene.names) + "."


def prompt(scene: Scene, rng: Rng, *, full: bool | None = None) -> str:
    """A text to draw a scene from. What it leaves out is free; `full` leaves nothing out.

    If `full` is None, half of the prompts are full.
    """
    said = facts(scene)
    if full is None:
        full = rng.random() < 0.5
    if not full:
        said = thin(said, {kind for kind, share in KEPT.items() if rng.random() < share})
    opening = pick(rng, REQUESTS)
    words = say(said, rng, synonyms=SYNONYMS)
    if words.startswith(FIRST) or ":" in words:
        return words
    return words if "picture of" in opening and words.startswith("nothing") else opening + words


def thin(said: Facts, kept: Container[str]) -> Facts:
    """What things there are, and the facts of some kinds (as in `KEPT`)."""
    groups = said.groups
    if "sizes" not in kept:
        groups = frozenset(replace(group, size=None) for group in groups)
    if "colours" not in kept:
        groups = frozenset(replace(group, colour=None) for group in groups)
    return Facts(
        said.background if "background" in kept else None,
        said.pattern if "pattern" in kept else None,
        groups,
        said.relations if "relations" in kept else frozenset(),
    )


def say(said: Facts, rng: Rng, *, synonyms: float = 0.0, order: Sequence[str] | None = None) -> str:
    """Exactly these facts, without the last full stop; groups in an `order` of names, or in any."""
    unsaid = said.background is None and said.pattern is None
    if not said.groups:
        return "nothing" if unsaid else pick(rng, NOTHING).format(**_grounds(said, rng))
    groups = shuffled(rng, sorted(said.groups))
    if order is not None:
        groups.sort(key=lambda group: order.index(group.name))
    names = {group.name: _word(group, rng, synonyms) for group in groups}
    relations = [related(one, rng, order) for one in shuffled(rng, sorted(said.relations))]
    if order is not None:
        relations.sort(key=lambda one: (order.index(one[0]), order.index(one[2])))
    words = {group.name: group_words(group, names[group.name]) for group in groups}
    if len(groups) == 2 and relations and rng.random() < 0.5:
        first, kind, second = relations.pop()
        things = f"{words[first]} {place_words(kind, rng)} {words[second]}"
    else:
        things = listed(list(words.values()))
    more = _clauses(relations, names, said, rng)
    there = "there is" if things.startswith(("a ", "an ", "one ")) else "there are"
    if unsaid:
        return f"{there} {things}{more}" if rng.random() < 0.2 else things + more
    return pick(rng, FRAMES).format(things=things, more=more, there=there, **_grounds(said, rng))


def _clauses(relations: list[Triple], names: dict[str, str], said: Facts, rng: Rng) -> str:
    """What stands where, to put after things: ", the owl above the star and left of the key"."""
    aside = len(relations) < 3 and rng.random() < 0.5
    joined = aside or rng.random() < 0.5
    text, subject = "", None
    for at, (first, kind, second) in enumerate(relations):
        link = " and " if joined and at == 1 else ", " if aside else ". "
        if link == " and " and first == subject:
            text += f" and {place_words(kind, rng)} the {names[second]}"
        elif not aside and rng.random() < 0.3:
            where = place_words(OPPOSITE[kind], rng, 0.5)
            verb = are(said.named(second))
            text += f"{link}{where} the {names[first]} {verb} the {names[second]}"
        else:
            verb = "" if aside else are(said.named(first)) + " "
            text += f"{link}the {names[first]} {verb}{place_words(kind, rng)} the {names[second]}"
            subject = first
    return text


def group_words(group: Group, word: str | None = None) -> str:
    """ "two small red stars"; what is not said is left out. `word` stands for the noun."""
    words = [group.size, group.colour, word or noun(group.name, group.number)]
    rest = " ".join(each for each in words if each)
    return article(rest) if group.number == 1 else f"{NUMBERS[group.number]} {rest}"


def the(group: Group) -> str:
    """ "the owl", "the owls"."""
    return f"the {noun(group.name, group.number)}"


def listed(items: list[str]) -> str:
    """ "a, b and c"."""
    return "".join(items) if len(items) < 2 else f"{', '.join(items[:-1])} and {items[-1]}"


def related(relation: Relation, rng: Rng, order: Sequence[str] | None = None) -> Triple:
    """A relation as (name, kind in words, name), put from the earlier end, or else from either."""
    ends = (relation.first, relation.second)
    either = ends if rng.random() < 0.5 else ends[::-1]
    return in_order(relation, either if order is None else order)


def in_order(relation: Relation, order: Sequence[str]) -> Triple:
    """A relation as (name, kind in words, name), put from the end that comes first."""
    if order.index(relation.first) < order.index(relation.second):
        return relation.first, relation.kind, relation.second
    return relation.second, OPPOSITE[relation.kind], relation.first


def place_words(kind: str, rng: Rng, longer: float = 0.3) -> str:
    """A relation's words: left of, or as often as `longer` says, others like to the left of."""
    return pick(rng, WAYS[kind]) if rng.random() < longer else kind


def around(said: Facts, name: str) -> list[tuple[str, str]]:
    """Where a group stands: (kind in words, other name) for each relation it is in."""
    relations = sorted(said.relations)  # a set has another order in each process
    found = [(r.kind, r.second) for r in relations if r.first == name]
    return found + [(OPPOSITE[r.kind], r.first) for r in relations if r.second == name]


def _word(group: Group, rng: Rng, synonyms: float) -> str:
    """The noun of a group, now and then a synonym."""
    if synonyms and group.name not in SHAPES:
        other = kind_of(group.name).synonyms
        if other and rng.random() < synonyms:
            word = pick(rng, other).lower()
            return word if group.number == 1 else plural(word)
    return noun(group.name, group.number)


def _grounds(said: Facts, rng: Rng) -> dict[str, str]:
    """Words for the background, as the places of `FRAMES` and `NOTHING` want them."""
    colour, pattern = said.background, said.pattern
    adjectives = [word for word in (pattern, colour) if word]
    turned = adjectives[::-1] if pattern != "plain" and rng.random() < 0.3 else adjectives
    ground = plain = f"{' '.join(turned)} background"
    either = adjectives if rng.random() < 0.5 else adjectives[::-1]
    painted = pick(rng, (" ".join(turned), " and ".join(either)))
    if colour and pattern in TRIMMINGS:
        if rng.random() < 0.2:
            ground = f"{colour} background with {TRIMMINGS[pattern]}"
        if rng.random() < 0.25:
            painted = f"{colour} with {TRIMMINGS[pattern]}"
    a_ground, a_plain = article(ground), article(plain)
    return {"ground": ground, "a_ground": a_ground, "a_plain": a_plain, "painted": painted}

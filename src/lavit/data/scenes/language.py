"""Scenes in words: descriptions, short captions and prompts, each in many wordings.

All of them state facts, all or some; `parse` reads them back. A relation is put between exactly
two groups, both named. Lower case; a full stop after descriptions and captions, none after prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lavit.data.scenes.chance import Rng, pick, shuffled
from lavit.data.scenes.lexicon import NUMBERS, OPPOSITE, article, noun, plural
from lavit.data.scenes.world import SHAPES, Facts, Group, Relation, Scene, facts, kind_of

OPENINGS = {
    "": 3,
    "draw ": 2,
    "paint ": 1,
    "show me ": 1,
    "a picture of ": 1,
    "draw a picture of ": 1,
}
REQUESTS = tuple(words for words, often in OPENINGS.items() for _ in range(often))
TRIMMINGS = {"striped": "stripes", "dotted": "dots"}  # patterns as something that a ground has
SYNONYMS = 0.08  # of the names in prompts
KEPT = {"sizes": 0.4, "relations": 0.5, "background": 0.6, "pattern": 0.5, "colours": 0.9}
WORDINGS = 8  # of what stands on what


def describe(scene: Scene, rng: Rng) -> str:
    """Everything that can be read off a scene's picture, in one of many wordings.

    Things are named in reading order, so that what comes next can be seen.
    """
    return say(facts(scene), rng, order=scene.names) + "."


def mention(scene: Scene, rng: Rng) -> str:
    """A short caption: the things, their numbers and colours, sometimes sizes or a relation."""
    sizes, relations = rng.random() < 0.2, rng.random() < 0.4
    said = thin(facts(scene), sizes=sizes, relations=relations, background=False, pattern=False)
    return say(said, rng, order=scene.names) + "."


def prompt(scene: Scene, rng: Rng, *, full: bool | None = None) -> str:
    """A text to draw a scene from. What it leaves out is free; `full` leaves nothing out.

    If `full` is None, half of the prompts are full.
    """
    said = facts(scene)
    if full is None:
        full = rng.random() < 0.5
    if not full:
        kept = zip(KEPT, rng.random(len(KEPT)) < tuple(KEPT.values()), strict=True)
        said = thin(said, **{kind: bool(keep) for kind, keep in kept})
    opening = pick(rng, REQUESTS)
    words = say(said, rng, synonyms=SYNONYMS)
    if words.startswith(("the ", "on ", "there ")) or ":" in words:
        return words
    return words if "picture of" in opening and words.startswith("nothing") else opening + words


def thin(
    said: Facts,
    *,
    sizes: bool = True,
    colours: bool = True,
    relations: bool = True,
    background: bool = True,
    pattern: bool = True,
) -> Facts:
    """Facts without those of some kinds."""
    groups = frozenset(
        replace(g, size=g.size if sizes else None, colour=g.colour if colours else None) for g in said.groups
    )
    return Facts(
        said.background if background else None,
        said.pattern if pattern else None,
        groups,
        said.relations if relations else frozenset(),
    )


def say(said: Facts, rng: Rng, *, synonyms: float = 0.0, order: Sequence[str] | None = None) -> str:
    """Exactly these facts, without the last full stop; groups in an `order` of names, or in any."""
    if not said.groups:
        return _nothing(said, rng)
    groups = shuffled(rng, sorted(said.groups))
    if order is not None:
        groups.sort(key=lambda group: order.index(group.name))
    names = {group.name: _word(group, rng, synonyms) for group in groups}
    relations = shuffled(rng, sorted(said.relations))
    if order is not None:
        at = list(names).index
        relations.sort(key=lambda one: sorted((at(one.first), at(one.second))))
    words = {group.name: group_words(group, names[group.name]) for group in groups}
    clauses: list[str] = []
    if len(groups) == 2 and relations and rng.random() < 0.6:
        first, kind, second = related(relations[0], rng, order)
        things = f"{words[first]} {place(kind, rng)} {words[second]}"
    else:
        things = listed(list(words.values()))
        for relation in relations:
            first, kind, second = related(relation, rng, order)
            verb = are(said.group(first))
            clauses.append(f"the {names[first]} {verb} {place(kind, rng)} the {names[second]}")
    if len(clauses) > 1 and rng.random() < 0.5:
        clauses = [" and ".join(clauses[:2]), *clauses[2:]]
    return ". ".join(_on_ground(things, clauses, said, rng))


def _on_ground(things: str, clauses: list[str], said: Facts, rng: Rng) -> list[str]:
    """Sentences of things, what stands where, and the background, if it is said."""
    there = "there is" if things.startswith(("a ", "an ", "one ")) else "there are"
    if said.background is None and said.pattern is None:
        return [f"{there} {things}" if rng.random() < 0.2 else things, *clauses]
    wording = int(rng.integers(WORDINGS))
    ground = _ground(said, rng)
    if wording == 4:
        return [f"{article(_plainly(said))} with {things}", *clauses]
    if wording == 5:
        return [things, *clauses, f"the background is {_painted(said, rng)}"]
    if wording == 6:
        return [f"the background is {_painted(said, rng)}", f"{there} {things}", *clauses]
    first = {
        2: f"{there} {things} on {article(ground)}",
        3: f"on {article(ground)}, {there} {things}",
        7: f"{ground}: {things}",
    }
    return [first.get(wording, f"{things} on {article(ground)}"), *clauses]


def group_words(group: Group, word: str | None = None) -> str:
    """ "two small red stars"; what is not said is left out. `word` stands for the noun."""
    words = [group.size, group.colour, word or noun(group.name, group.number)]
    rest = " ".join(each for each in words if each)
    return article(rest) if group.number == 1 else f"{NUMBERS[group.number]} {rest}"


def the(group: Group) -> str:
    """ "the owl", "the owls"."""
    return f"the {noun(group.name, group.number)}"


def are(group: Group) -> str:
    """The verb of a group: is, or are."""
    return "is" if group.number == 1 else "are"


def listed(items: list[str]) -> str:
    """ "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def related(relation: Relation, rng: Rng, order: Sequence[str] | None = None) -> tuple[str, str, str]:
    """A relation as (name, kind in words, name), put from the earlier end, or else from either."""
    forward = rng.random() < 0.5
    if order is not None:
        forward = order.index(relation.first) < order.index(relation.second)
    if forward:
        return relation.first, relation.kind, relation.second
    return relation.second, OPPOSITE[relation.kind], relation.first


def place(kind: str, rng: Rng, longer: float = 0.3) -> str:
    """A relation's words: left of, or as often as `longer` says, to the left of."""
    return f"to the {kind}" if kind.endswith(" of") and rng.random() < longer else kind


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


def _plainly(said: Facts) -> str:
    """ "striped blue background"."""
    return " ".join(word for word in (said.pattern, said.background, "background") if word)


def _ground(said: Facts, rng: Rng) -> str:
    """ "striped blue background", "blue background with stripes"."""
    if said.background and said.pattern in TRIMMINGS and rng.random() < 0.2:
        return f"{said.background} background with {TRIMMINGS[said.pattern]}"
    return _plainly(said)


def _painted(said: Facts, rng: Rng) -> str:
    """What the background is: "striped and blue", "blue with stripes"."""
    if said.background and said.pattern in TRIMMINGS and rng.random() < 0.3:
        return f"{said.background} with {TRIMMINGS[said.pattern]}"
    words = [word for word in (said.pattern, said.background) if word]
    return " and ".join(words if rng.random() < 0.5 else words[::-1])


def _nothing(said: Facts, rng: Rng) -> str:
    """Words for an empty picture."""
    if said.background is None and said.pattern is None:
        return "nothing"
    ground = _plainly(said)
    some = article(ground)
    empty = f"an empty {ground}"
    return pick(rng, (empty, empty, f"nothing on {some}", f"{some} with nothing on it"))

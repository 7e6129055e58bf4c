"""Scenes in words: descriptions, short captions and prompts, each in many wordings.

All of them state facts, all or some; `parse` reads them back. A relation is put between exactly
two groups, both named. Lower case; a full stop after descriptions and captions, none after prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lavit.data.scenes.chance import Rng
from lavit.data.scenes.lexicon import NUMBERS, OPPOSITE, article, noun, plural
from lavit.data.scenes.world import SHAPES, Facts, Group, Relation, Scene, facts, kind_of

REQUESTS = (
    "",
    "",
    "",
    "draw ",
    "draw ",
    "paint ",
    "show me ",
    "a picture of ",
    "draw a picture of ",
)
SYNONYMS = 0.08  # of the names in prompts
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
        keep = rng.random(5) < (0.4, 0.5, 0.6, 0.5, 0.9)
        said = thin(
            said, sizes=bool(keep[0]), relations=bool(keep[1]), background=bool(keep[2]),
            pattern=bool(keep[3]), colours=bool(keep[4]),
        )  # fmt: skip
    opening = REQUESTS[int(rng.integers(len(REQUESTS)))]
    words = say(said, rng, synonyms=SYNONYMS)
    if words.startswith(("the ", "on ", "there ")) or ":" in words:
        opening = ""
    if "picture of" in opening and words.startswith("nothing"):
        opening = ""
    return opening + words


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
        replace(g, size=g.size if sizes else None, colour=g.colour if colours else None)
        for g in said.groups
    )
    return Facts(
        said.background if background else None,
        said.pattern if pattern else None,
        groups,
        said.relations if relations else frozenset(),
    )


def say(
    said: Facts,
    rng: Rng,
    *,
    synonyms: float = 0.0,
    order: Sequence[str] | None = None,
) -> str:
    """Exactly these facts, without the last full stop; groups in an `order` of names, or in any."""
    if not said.groups:
        return _nothing(said, rng)
    groups = sorted(said.groups)
    groups = [groups[n] for n in rng.permutation(len(groups))]
    if order is not None:
        groups.sort(key=lambda group: order.index(group.name))
    at = [group.name for group in groups]
    names = {group.name: _word(group, rng, synonyms) for group in groups}
    relations = sorted(said.relations)
    relations = [relations[n] for n in rng.permutation(len(relations))]
    if order is not None:
        relations.sort(key=lambda one: sorted((at.index(one.first), at.index(one.second))))
    clauses: list[str] = []
    if len(groups) == 2 and relations and rng.random() < 0.6:
        first, kind, second = related(relations[0], rng, order)
        a, b = said.group(first), said.group(second)
        things = f"{_group(a, names)} {place(kind, rng)} {_group(b, names)}"
    else:
        things = listed([_group(group, names) for group in groups])
        for relation in relations:
            first, kind, second = related(relation, rng, order)
            verb = "is" if said.group(first).number == 1 else "are"
            clauses.append(f"the {names[first]} {verb} {place(kind, rng)} the {names[second]}")
    after = _sentences(clauses, rng)
    there = "there is" if things.startswith(("a ", "an ", "one ")) else "there are"
    if said.background is None and said.pattern is None:
        opening = f"{there} " if rng.random() < 0.2 else ""
        return ". ".join([opening + things, *after])
    wording = int(rng.integers(WORDINGS))
    ground = _ground(said, rng)
    if wording <= 1:
        sentences = [f"{things} on {article(ground)}", *after]
    elif wording == 2:
        sentences = [f"{there} {things} on {article(ground)}", *after]
    elif wording == 3:
        sentences = [f"on {article(ground)}, {there} {things}", *after]
    elif wording == 4:
        ground = _ground(said, rng, trimmed=False)
        sentences = [f"{article(ground)} with {things}", *after]
    elif wording == 5:
        sentences = [things, *after, f"the background is {_painted(said, rng)}"]
    elif wording == 6:
        sentences = [f"the background is {_painted(said, rng)}", f"{there} {things}", *after]
    else:
        sentences = [f"{ground}: {things}", *after]
    return ". ".join(sentences)


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
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def related(
    relation: Relation, rng: Rng, order: Sequence[str] | None = None
) -> tuple[str, str, str]:
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
    found = [(r.kind, r.second) for r in said.relations if r.first == name]
    return found + [(OPPOSITE[r.kind], r.first) for r in said.relations if r.second == name]


def _word(group: Group, rng: Rng, synonyms: float) -> str:
    """The noun of a group, now and then a synonym."""
    if synonyms and group.name not in SHAPES:
        other = kind_of(group.name).synonyms
        if other and rng.random() < synonyms:
            word = other[int(rng.integers(len(other)))].lower()
            return word if group.number == 1 else plural(word)
    return noun(group.name, group.number)


def _group(group: Group, names: dict[str, str]) -> str:
    return group_words(group, names[group.name])


def _sentences(clauses: list[str], rng: Rng) -> list[str]:
    """Clauses as sentences of their own, or two in one."""
    if len(clauses) > 1 and rng.random() < 0.5:
        return [" and ".join(clauses[:2]), *clauses[2:]]
    return clauses


def _ground(said: Facts, rng: Rng, *, trimmed: bool = True) -> str:
    """ "striped blue background", "blue background with stripes"."""
    patterned = said.pattern in ("striped", "dotted")
    if trimmed and said.background and patterned and rng.random() < 0.2:
        trimmings = "stripes" if said.pattern == "striped" else "dots"
        return f"{said.background} background with {trimmings}"
    return " ".join(word for word in (said.pattern, said.background, "background") if word)


def _painted(said: Facts, rng: Rng) -> str:
    """What the background is: "striped and blue", "blue with stripes"."""
    if said.background and said.pattern in ("striped", "dotted") and rng.random() < 0.3:
        return f"{said.background} with {'stripes' if said.pattern == 'striped' else 'dots'}"
    words = [word for word in (said.pattern, said.background) if word]
    return " and ".join(words if rng.random() < 0.5 else words[::-1])


def _nothing(said: Facts, rng: Rng) -> str:
    """Words for an empty picture."""
    if said.background is None and said.pattern is None:
        return "nothing"
    ground = " ".join(word for word in (said.pattern, said.background, "background") if word)
    return (
        f"an empty {ground}",
        f"an empty {ground}",
        f"nothing on {article(ground)}",
        f"{article(ground)} with nothing on it",
    )[int(rng.integers(4))]

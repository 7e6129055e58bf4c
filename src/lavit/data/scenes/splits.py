"""Which scenes training never sees.

`Rules` say, by hashes that no seed moves, which pairs of things, coloured shapes, drawings and
whole scenes are held out. They hold for everything that stands in a document of training: all its
scenes together and every word of its texts. Picture i of a split is a function of (seed, split, i);
the splits that measure have seeds of their own, which no user's seed reaches.

    train         what is left
    valid         scenes whose facts are held out, for validation
    valid_pairs   two things that training never shows together, for validation
    test          scenes whose facts are held out
    pairs         two things that training never shows together
    binding       two shapes; of one at least, training never shows the colour
    number        five or six things, in groups no larger than training's
    style         an object in a style in which training never shows it
    noto          scenes of test in a third style
    ladder        0 to 9 things in turn
    valid_ladder  the same, for validation
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np

from lavit.config import InputError
from lavit.data.scenes import world
from lavit.data.scenes.lexicon import names_in
from lavit.data.scenes.render import stands_out
from lavit.data.scenes.world import Facts, Scene, apart, boxes_of, facts, murky, objects

SPLITS = (
    "train", "valid", "valid_pairs",
    "test", "pairs", "binding", "number", "style", "noto", "ladder", "valid_ladder",
)  # fmt: skip
CHOOSING = ("train", "valid", "valid_pairs", "valid_ladder")  # splits that a user's seed moves
MEASURING_SEED = 0x5CE7E5  # of the other splits
TEST_SHARE = 0.05
VALID_SHARE = 0.02
VALID_PAIRS = 0.03
FEWEST = 3  # objects: an edit needs one that its scene lacks
MOST_IN_TRAINING = 4  # things
Coloured = tuple[str, str]  # a shape and its colour
# eight shapes in colours that training never shows; each shape and colour has others that it shows
HELD_OUT_COLOURS = frozenset(
    {
        ("circle", "red"), ("square", "blue"), ("triangle", "yellow"), ("star", "green"),
        ("heart", "purple"), ("diamond", "orange"), ("circle", "brown"), ("square", "black"),
    }
)  # fmt: skip


@dataclass(frozen=True)
class Rules:
    """The first `objects` of the list take part; `held_out_pairs` is the share of pairs held out.

    A `plain` world is for studies: at most two kinds in a scene, in training each as often as every
    other, two wordings, and single pictures alone. Raises `InputError` for a number or share that
    is out of range.
    """

    objects: int = 48
    held_out_pairs: float = 0.1
    plain: bool = False

    def __post_init__(self) -> None:
        most = len(objects())
        if not FEWEST <= self.objects <= most:
            said = f"scenes have {FEWEST} to {most} objects to choose from"
            raise InputError(f"{said}, not {self.objects}")
        share = self.held_out_pairs
        if not 0 <= share <= 1 - VALID_PAIRS:
            raise InputError(f"held_out_pairs is {share}: give a share from 0 to {1 - VALID_PAIRS}")

    @property
    def most_kinds(self) -> int:
        """Groups of a scene at most."""
        return 2 if self.plain else world.MOST_GROUPS

    def options(self) -> dict[str, Any]:
        """As plain data, which says of a plain world alone that it is one."""
        found = asdict(self)
        return found if self.plain else {k: found[k] for k in found if k != "plain"}

    @property
    def objects_named(self) -> tuple[str, ...]:
        """Names of the objects that take part."""
        return tuple(kind.name for kind in objects()[: self.objects])

    def pair_of(self, a: str, b: str) -> str:
        """ "train", "pairs" or "valid_pairs": where two things may stand together."""
        if a in world.SHAPES and b in world.SHAPES:
            return "train"
        at = _share("pair", *sorted((a, b)))
        if at < self.held_out_pairs:
            return "pairs"
        return "valid_pairs" if at < self.held_out_pairs + VALID_PAIRS else "train"

    def style_of(self, name: str) -> str | None:
        """The one style in which training shows an object, or None for both: a tenth have one."""
        if name in world.SHAPES:
            return None
        place = next(n for n, kind in enumerate(objects()) if kind.name == name)
        return tuple(world.STYLES)[place // 10 % 2] if place % 10 == 7 else None

    def held_out(self, names: Iterable[str], coloured: Iterable[Coloured] = ()) -> str | None:
        """Why things may not stand in one document of training, or None."""
        for a, b in itertools.combinations(sorted(set(names)), 2):
            if self.pair_of(a, b) != "train":
                return f"{a} and {b} are held out as a pair"
        for name, colour in coloured:
            if (name, colour) in HELD_OUT_COLOURS:
                return f"a {colour} {name} is held out"
        return None

    def forbids(self, scene: Scene) -> str | None:
        """Why training may not show a scene, or None if it may."""
        if reason := self.held_out(scene.names, scene.coloured):
            return reason
        if len(scene.things) > MOST_IN_TRAINING:
            return f"{len(scene.things)} things, more than {MOST_IN_TRAINING}"
        for name in scene.names:
            if self.style_of(name) not in (None, scene.style):
                return f"{name} is held out in the style {scene.style}"
        if scene.style not in world.STYLES:
            return f"the style {scene.style} is held out"
        share = share_of(facts(scene))
        return f"its facts are held out ({share})" if share != "train" else None


@dataclass
class DocumentRules:
    """What a document holds up to now. With `training` off, everything is let in."""

    rules: Rules
    training: bool = True
    names: frozenset[str] = frozenset()
    coloured: frozenset[Coloured] = frozenset()

    def admits(self, texts: Iterable[str] = (), scenes: Iterable[Scene] = ()) -> bool:
        """Take these in, if what is held out allows it."""
        found = [names_in(text) for text in texts]
        found += [(frozenset(scene.names), scene.coloured) for scene in scenes]
        names = self.names.union(*(names for names, _ in found))
        coloured = self.coloured.union(*(coloured for _, coloured in found))
        if self.training and self.rules.held_out(names, coloured):
            return False
        self.names, self.coloured = names, coloured
        return True

    def admits_name(self, name: str, colour: str | None = None) -> bool:
        """Would a name, perhaps with a colour, be let in?"""
        pairs = {(name, colour)} if colour else ()
        return not (self.training and self.rules.held_out(self.names | {name}, pairs))


def violations(texts: Iterable[str], scenes: Iterable[Scene], rules: Rules) -> list[str]:
    """Every reason why a document of these texts and scenes is not one of training."""
    scenes = list(scenes)
    whole = DocumentRules(rules, training=False)
    whole.admits(texts, scenes)
    reasons = (rules.held_out(whole.names, whole.coloured), *map(rules.forbids, scenes))
    return [reason for reason in reasons if reason]


def share_of(facts: Facts) -> str:
    """ "train", "test" or "valid", by a hash of complete facts of one thing or more."""
    if not facts.groups:
        return "train"
    at = _share("facts", facts_key(facts))
    if at < TEST_SHARE:
        return "test"
    return "valid" if at < TEST_SHARE + VALID_SHARE else "train"


def facts_key(facts: Facts) -> str:
    """Facts as one line, the same for equal facts."""
    groups = [f"{g.number}|{g.size}|{g.colour}|{g.name}" for g in sorted(facts.groups)]
    related = [f"{r.first}|{r.kind}|{r.second}" for r in sorted(facts.relations)]
    return ";".join((f"{facts.background}|{facts.pattern}", *groups, *related))


def valid_world(scene: Scene) -> str | None:
    """Why a picture like this is not part of the world, or None; splits come after."""
    groups = boxes_of(scene.things)
    most = max(map(len, groups.values()), default=0)
    if len(groups) > world.MOST_GROUPS or most > world.MOST_ALIKE:
        return "too many groups, or too many of one kind"
    if any(thing.size == "big" for thing in scene.things) and len(scene.things) > world.MOST_BIG:
        return "a big thing among many"
    if why := hidden(scene):
        return why
    if not apart([thing.box for thing in scene.things]):
        return "things too near each other or the border"
    return "a relation that is unclear" if murky(groups) else None


def hidden(scene: Scene) -> str | None:
    """Which thing does not show on the background, or None."""
    style = scene.style if scene.style in world.STYLES else "twemoji"
    for thing in scene.things:
        if thing.colour == scene.background:
            return f"a {thing.colour} shape on {thing.colour}"
        if not stands_out(thing.name, thing.colour, style, scene.background):
            return f"{thing.name} does not show on {scene.background}"
    return None


def generator(split: str, index: int, seed: int) -> np.random.Generator:
    """Randomness of picture `index` of a split; an unknown split raises `InputError`."""
    if split not in SPLITS:
        raise InputError(f"there is no split {split!r} of scenes: choose from {', '.join(SPLITS)}")
    if index < 0 or seed < 0:
        raise InputError(f"seed {seed}, picture {index}: give numbers from 0")
    place = SPLITS.index(split)
    if split in CHOOSING:
        return np.random.default_rng([0, seed, place, index])
    return np.random.default_rng([1, MEASURING_SEED, place, index])


@cache
def _share(*words: str) -> float:
    """A number from 0 to 1 that words alone decide."""
    digest = hashlib.sha256("\0".join(words).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64

"""Words as facts: a small grammar, read strictly.

A text is read whole or not at all. It may say each thing once: a group, a background or a relation
that is said twice, even in agreement, makes a text unreadable, and so does a contradiction.

    text       [[please] (draw | show me ...)] [a picture of] sentence { "." sentence } ["."]
    sentence   [there is] list [on GROUND] [asides]
             | on GROUND ("," [there is] | there is) list [asides]
             | (a GROUND with | GROUND ":") list [asides]
             | the background is ADJECTIVES
             | clause { and clause }
             | an empty GROUND  |  a GROUND with nothing on it  |  [there is] nothing [on GROUND]
    list       group { "," group } and group  |  group [RELATION group]
    asides     "," [with] the NOUN RELATION the NOUN { and [the NOUN] RELATION the NOUN }
    clause     [the NOUN is] RELATION the NOUN  |  RELATION the NOUN is the NOUN

One sentence names the things, one the background; clauses come after what they speak of. After a
request stands what can be asked for: things, or a background with things or with nothing on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from typing import TypeVar

from lavit.data.scenes.lexicon import (
    NUMBERS,
    PATTERN_WORDS,
    PLACES,
    SIZES,
    TRIMMINGS,
    Noun,
    are,
    article,
    split,
    tokens,
)
from lavit.data.scenes.world import BACKGROUNDS, COLOURS, SHAPES, Facts, Group, Relation, Side

TRIMMED = {word: pattern for pattern, word in TRIMMINGS.items()}
COUNTS = {"a": 1, "an": 1}
COUNTS |= {words[n]: n for n in range(1, 10) for words in (NUMBERS, "0123456789")}
VERBS = {"is": "is", "are": "are"}
GROUNDS = {colour: colour for colour in BACKGROUNDS}
PAINTS = {colour: colour for colour in COLOURS}
Value = TypeVar("Value")


class Unreadable(Exception):
    """A text that is not in the language."""


def parse(text: str) -> Facts | None:
    """What a text says of a scene, or None if it is not wholly in the language."""
    words = split(text)
    if not words:
        return None
    pairs = zip(words, [*words[1:], "."], strict=True)
    if any(article(after) != f"{a} {after}" for a, after in pairs if a in ("a", "an")):
        return None
    try:
        return _Reader(tokens(words)).text()
    except (Unreadable, CycleError):
        return None


def _must(so: object) -> None:
    if not so:
        raise Unreadable


class _Reader:
    """A place in a text, and what was read up to there; a value is replaced, never changed."""

    def __init__(self, found: list[str | Noun]) -> None:
        self.found = found
        self.at = 0
        self.background: str | None = None
        self.pattern: str | None = None
        self.empty = False
        self.groups: dict[str, Group] = {}
        self.relations: tuple[Relation, ...] = ()

    def peek(self, ahead: int = 0) -> str | Noun | None:
        place = self.at + ahead
        return self.found[place] if place < len(self.found) else None

    def take(self, *phrases: str) -> bool:
        """Pass over the first of some phrases that stands here."""
        for words in map(str.split, phrases):
            if self.found[self.at : self.at + len(words)] == words:
                self.at += len(words)
                return True
        return False

    def look_up(self, table: Mapping[str, Value]) -> Value | None:
        """What a table has for the word that stands here; it is passed over if there is one."""
        word = self.peek()
        found = table.get(word) if isinstance(word, str) else None
        self.at += found is not None
        return found

    def noun(self) -> Noun:
        one = self.peek()
        if not isinstance(one, Noun):
            raise Unreadable
        self.at += 1
        return one

    def text(self) -> Facts:
        please = self.take("please")
        request = self.take("draw me", "draw", "paint", "show me", "show", "make", "create")
        _must(request or not please)
        if self.take("a picture of", "a picture with") or request:
            _must(self.peek() == "nothing" or self.peek() in COUNTS)
        self.sentence()
        while self.take(".") and self.peek() is not None:
            self.sentence()
        _must(self.peek() is None and self.empty != bool(self.groups))
        pairs = {frozenset((one.first, one.second)) for one in self.relations}
        _must(len(pairs) == len(self.relations))
        for kind in ("left of", "above"):
            order = TopologicalSorter[str]()
            for one in self.relations:
                if one.kind == kind:
                    order.add(one.first, one.second)
            order.prepare()  # CycleError: something would come before itself
        groups = frozenset(self.groups.values())
        return Facts(self.background, self.pattern, groups, frozenset(self.relations))

    def sentence(self) -> None:
        """One sentence, of any kind."""
        kept = dict(vars(self))
        for kind in (self.clauses, self.painted, self.void, self.behind, self.things):
            try:
                kind()
                _must(self.peek() in (None, "."))
                return
            except Unreadable:
                vars(self).update(kept)
        raise Unreadable

    def clauses(self, *, verbs: bool = True) -> None:
        """the owl is left of the star and above the key and below the key is the heart"""
        subject: Group | None = None
        more = True
        while more:
            named = self.peek() == "the"
            if named:
                subject = self.called()
                _must(not verbs or self.take(are(subject)))
            kind, other = self.relation(), self.called()
            verb = self.look_up(VERBS) if verbs and not named else None
            first = self.called() if verb else subject
            if kind is None or first is None or (verb and verb != are(first)):
                raise Unreadable
            self.relate(kind, first.name, other.name)
            more = self.take("and", ", and")

    def called(self) -> Group:
        """the owls: a group that was named before"""
        _must(self.take("the"))
        one = self.noun()
        group = self.groups.get(one.name)
        if group is None or not (one.one if group.number == 1 else one.many):
            raise Unreadable
        return group

    def relation(self) -> str | None:
        for side in ("left of", "right of"):
            if self.take(side, f"to the {side}", f"on the {side}"):
                return side
        return self.look_up(PLACES)

    def relate(self, kind: str, first: str, second: str) -> None:
        """A relation in words as a fact: right of and below are turned round."""
        if kind in ("right of", "below"):
            first, second = second, first
        side: Side = "above" if kind in ("above", "below") else "left of"
        self.relations += (Relation(side, first, second),)

    def painted(self) -> None:
        """the background is striped and blue"""
        _must(self.background is None and self.pattern is None)
        _must(self.take("the background is") and self.adjective())
        both = self.take("and")
        _must(self.adjective(joined=both) or not both)
        self.trimmings()

    def adjective(self, *, joined: bool = False) -> bool:
        """Colour or pattern of the background, if one stands here; no colour before "plain"."""
        colour, pattern = self.look_up(GROUNDS), None
        if colour:
            _must(self.background is None)
            self.background = colour
        elif pattern := self.look_up(PATTERN_WORDS):
            _must(joined or pattern != "plain" or self.background is None)
            self.pattern_is(pattern)
        return bool(colour or pattern)

    def pattern_is(self, pattern: str) -> None:
        _must(self.pattern is None)
        self.pattern = pattern

    def trimmings(self) -> bool:
        """with stripes"""
        word = self.peek(1) if self.peek() == "with" else None
        found = TRIMMED.get(word) if isinstance(word, str) else None
        if found:
            self.pattern_is(found)
            self.at += 2
        return bool(found)

    def ground(self) -> None:
        """striped blue background, blue background with stripes"""
        _must(self.background is None and self.pattern is None)
        said = False
        while self.adjective():
            said = True
        _must(self.take("background"))
        _must(self.trimmings() or said)

    def on_ground(self) -> bool:
        """on a striped blue background"""
        found = self.take("on", "against")
        if found:
            _must(self.take("a", "an"))
            self.ground()
        return found

    def void(self) -> None:
        """an empty striped blue background, nothing on it"""
        if self.take("nothing", "there is nothing"):
            self.on_ground()
        elif self.take("an empty"):
            self.ground()
        else:
            _must(self.take("a", "an"))
            self.ground()
            _must(self.take("with nothing on it"))
        _must(not self.empty and not self.groups)
        self.empty = True

    def behind(self) -> None:
        """The background, then the things."""
        if self.on_ground():
            _must(self.take(",") or self.peek() == "there")
            self.things(ground=False)
            return
        some = self.take("a", "an")
        self.ground()
        _must(self.take("with" if some else ":"))
        self.listed()
        self.asides()

    def things(self, *, ground: bool = True) -> None:
        """there is an owl above a star, and on which background, if that may be said"""
        there = self.take("there is", "there are") and self.found[self.at - 1]
        several = self.listed()
        first = next(iter(self.groups.values()))
        _must(not there or there == are(first) or (there == "are" and several))
        if ground:
            self.on_ground()
        self.asides()

    def asides(self) -> None:
        """, the owl above the star and left of the key"""
        if self.take(", with", ","):
            _must(self.peek() == "the")
            self.clauses(verbs=False)

    def listed(self) -> bool:
        """One group, or several; are they several, joined by "and"?"""
        _must(not self.empty and not self.groups)
        first = self.group()
        if kind := self.relation():
            self.relate(kind, first, self.group())
            return False
        while self.peek() == "," and self.peek(1) in COUNTS:
            self.at += 1
            self.group()
        several = len(self.groups) > 1
        joined = self.take("and", *[", and"] * several)
        _must(joined or not several)
        if joined:
            self.group()
        return joined

    def group(self) -> str:
        """two small red stars"""
        number, size = self.look_up(COUNTS), self.look_up(SIZES)
        colour, one = self.look_up(PAINTS), self.noun()
        if number is None or not (one.one if number == 1 else one.many):
            raise Unreadable
        _must(one.name not in self.groups and (colour is None or one.name in SHAPES))
        self.groups = {**self.groups, one.name: Group(one.name, number, size, colour)}
        return one.name

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
from typing import TypeVar

from lavit.data.scenes.lexicon import (
    NUMBERS,
    OPPOSITE,
    PATTERN_WORDS,
    PLACES,
    SIZES,
    Noun,
    are,
    article,
    split,
    tokens,
)
from lavit.data.scenes.world import BACKGROUNDS, COLOURS, SHAPES, Facts, Group, Relation

TRIMMINGS = ("stripes", "dots")
ADJECTIVES = {word: pattern for word, pattern in PATTERN_WORDS.items() if word not in TRIMMINGS}
COUNTS = {"a": 1, "an": 1}
COUNTS |= {words[n]: n for n in range(1, 10) for words in (NUMBERS, "0123456789")}
VERBS = ("is", "are")
ON = ("on", "against")
Value = TypeVar("Value")


class Unreadable(Exception):
    """A text that is not in the language."""


def parse(text: str) -> Facts | None:
    """What a text says of a scene, or None if it is not wholly in the language."""
    words = split(text)
    if not words or not _articles(words):
        return None
    try:
        return _Reader(tokens(words)).text()
    except Unreadable:
        return None


def _articles(words: list[str]) -> bool:
    """Does each "a" and "an" fit the word after it?"""
    pairs = zip(words, [*words[1:], "."], strict=True)
    return all(article(after) == f"{a} {after}" for a, after in pairs if a in ("a", "an"))


def relate(kind: str, first: str, second: str) -> Relation:
    """A relation in words as a fact: right of and below are turned round."""
    if kind in ("right of", "below"):
        return Relation(OPPOSITE[kind], second, first)
    return Relation(kind, first, second)


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
        found = table.get(self.peek())
        self.at += found is not None
        return found

    def noun(self) -> Noun:
        one = self.peek()
        _must(isinstance(one, Noun))
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
        return self.facts()

    def sentence(self) -> None:
        """One sentence, of any kind."""
        kept = dict(vars(self))
        for kind in (self.clauses, self.painted, self.void, self.behind, self.before):
            try:
                kind()
                _must(self.peek() in (None, "."))
                return
            except Unreadable:
                vars(self).update(kept)
        raise Unreadable

    def clauses(self, *, verbs: bool = True) -> None:
        """the owl is left of the star and above the key and below the key is the heart"""
        subject = None
        more = True
        while more:
            named = self.peek() == "the"
            if named:
                subject = self.called()
                _must(not verbs or self.take(are(subject)))
            kind, other = self.relation(), self.called()
            _must(kind)
            if verbs and not named and self.peek() in VERBS:
                verb = self.peek()
                self.at += 1
                first = self.called()
                _must(verb == are(first))
            else:
                first = subject
            _must(first)
            self.relations += (relate(kind, first.name, other.name),)
            more = self.take("and", ", and")

    def called(self) -> Group:
        """the owls: a group that was named before"""
        _must(self.take("the"))
        one = self.noun()
        group = self.groups.get(one.name)
        _must(group and (one.one if group.number == 1 else one.many))
        return group

    def relation(self) -> str | None:
        for side in ("left of", "right of"):
            if self.take(side, f"to the {side}", f"on the {side}"):
                return side
        return self.look_up(PLACES)

    def painted(self) -> None:
        """the background is striped and blue"""
        _must(self.background is None and self.pattern is None)
        _must(self.take("the background is") and self.adjective())
        both = self.peek() == "and"
        self.at += both
        _must(self.adjective(joined=both) or not both)
        self.trimmings()

    def adjective(self, *, joined: bool = False) -> bool:
        """Colour or pattern of the background, if one stands here; no colour before "plain"."""
        colour = self.peek() if self.peek() in BACKGROUNDS else None
        pattern = ADJECTIVES.get(self.peek())
        if colour:
            _must(self.background is None)
            self.background = colour
        elif pattern:
            _must(joined or pattern != "plain" or self.background is None)
            self.pattern_is(pattern)
        self.at += bool(colour or pattern)
        return bool(colour or pattern)

    def pattern_is(self, pattern: str) -> None:
        _must(self.pattern is None)
        self.pattern = pattern

    def trimmings(self) -> bool:
        """with stripes"""
        if self.peek() != "with" or self.peek(1) not in TRIMMINGS:
            return False
        self.pattern_is(PATTERN_WORDS[self.peek(1)])
        self.at += 2
        return True

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
        found = self.take(*ON)
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
            comma, there = self.take(","), self.peek() == "there"
            _must(comma or there)
            self.things()
            return
        some = self.take("a", "an")
        self.ground()
        _must(self.take("with" if some else ":"))
        self.list()
        self.asides()

    def before(self) -> None:
        """The things, then perhaps the background."""
        self.things(ground=True)

    def things(self, *, ground: bool = False) -> None:
        """there is an owl above a star on a blue background, or without one"""
        there = self.take("there is", "there are") and self.found[self.at - 1]
        several = self.list()
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

    def list(self) -> bool:
        """One group, or several; are they several, joined by "and"?"""
        _must(not self.empty and not self.groups)
        first = self.group()
        if kind := self.relation():
            self.relations += (relate(kind, first, self.group()),)
            return False
        while self.peek() == "," and self.peek(1) in COUNTS:
            self.at += 1
            self.group()
        several = len(self.groups) > 1
        if self.take("and", *[", and"] * several):
            self.group()
            return True
        _must(not several)
        return False

    def group(self) -> str:
        """two small red stars"""
        number = self.look_up(COUNTS)
        _must(number)
        size = self.look_up(SIZES)
        colour = self.look_up({colour: colour for colour in COLOURS})
        one = self.noun()
        _must(one.one if number == 1 else one.many)
        _must(one.name not in self.groups and (colour is None or one.name in SHAPES))
        self.groups = {**self.groups, one.name: Group(one.name, number, size, colour)}
        return one.name

    def facts(self) -> Facts:
        """What was said, if it fits together."""
        pairs = [frozenset((each.first, each.second)) for each in self.relations]
        _must(len(set(pairs)) == len(pairs) and all(len(pair) == 2 for pair in pairs))
        for kind in ("left of", "above"):
            _must(not _circular({(r.first, r.second) for r in self.relations if r.kind == kind}))
        groups = frozenset(self.groups.values())
        return Facts(self.background, self.pattern, groups, frozenset(self.relations))


def _circular(pairs: set[tuple[str, str]]) -> bool:
    """Does some thing come before itself?"""
    while True:
        further = {(a, d) for a, b in pairs for c, d in pairs if b == c} - pairs
        if any(a == b for a, b in pairs | further):
            return True
        if not further:
            return False
        pairs |= further

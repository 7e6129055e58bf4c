"""Words as facts: a small grammar, read strictly.

A text is read whole or not at all. It may say each thing once: a group, a background or a relation
that is said twice, even in agreement, makes a text unreadable, and so does a contradiction.

    text       [please] [draw | show me ...] [a picture of] sentence { "." sentence } ["."]
    sentence   [there is] list [on BACKGROUND]
             | on BACKGROUND [","] [there is] list  |  BACKGROUND (with | ":") list
             | the background is ADJECTIVES  |  clause { and clause }
             | an empty BACKGROUND  |  BACKGROUND with nothing on it  |  nothing [on BACKGROUND]
    list       group { "," group } [and group] | group RELATION group
    clause     the NOUN is RELATION the NOUN
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
    split,
    tokens,
)
from lavit.data.scenes.world import BACKGROUNDS, COLOURS, SHAPES, Facts, Group, Relation

TRIMMINGS = ("stripes", "dots")
ADJECTIVES = {word: pattern for word, pattern in PATTERN_WORDS.items() if word not in TRIMMINGS}
COUNTS = {"a": 1, "an": 1}
COUNTS |= {words[n]: n for n in range(1, 10) for words in (NUMBERS, "0123456789")}
THERE = ("there is", "there are")
Value = TypeVar("Value")


class Unreadable(Exception):
    """A text that is not in the language."""


def parse(text: str) -> Facts | None:
    """What a text says of a scene, or None if it is not wholly in the language."""
    words = split(text)
    if not words:
        return None
    try:
        return _Reader(tokens(words)).text()
    except Unreadable:
        return None


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
        self.called: tuple[Noun, ...] = ()  # nouns of clauses: do they fit their groups?

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
        self.take("please")
        self.take("draw me", "draw", "paint", "show me", "show", "make", "create")
        self.take("a picture of", "a picture with")
        self.sentence()
        while self.take(".") and self.peek() is not None:
            self.sentence()
        _must(self.peek() is None)
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

    def clauses(self) -> None:
        """the owl is left of the star and the star is above the heart"""
        more = True
        while more:
            first = self.called_by()
            _must(self.take("is", "are"))
            self.relations += (relate(self.relation(), first, self.called_by()),)
            more = self.take(", and", "and", ",")

    def called_by(self) -> str:
        _must(self.take("the"))
        self.called += (self.noun(),)
        return self.called[-1].name

    def relation(self) -> str:
        for side in ("left of", "right of"):
            if self.take(side, f"to the {side}", f"on the {side}"):
                return side
        kind = self.look_up(PLACES)
        _must(kind)
        return kind

    def painted(self) -> None:
        """the background is striped and blue"""
        _must(self.take("the background is"))
        said = False
        while self.adjective():
            said = True
            if not self.take("and") and self.peek() not in (".", None, "with"):
                break
        _must(said)
        self.trimmings()

    def adjective(self) -> bool:
        """Colour or pattern of the background, if one stands here."""
        word = self.peek()
        if word in BACKGROUNDS:
            _must(self.background is None)
            self.background = word
        elif word in ADJECTIVES:
            self.pattern_is(ADJECTIVES[word])
        else:
            return False
        self.at += 1
        return True

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
        """a striped blue background, a blue background with stripes"""
        self.take("a", "an", "the")
        said = False
        while self.adjective():
            said = True
        _must(self.take("background"))
        _must(self.trimmings() or said)

    def void(self) -> None:
        """an empty striped blue background, nothing on it"""
        if self.take("nothing"):
            if self.take("on"):
                self.ground()
        elif self.take("an empty", "empty"):
            self.ground()
        else:
            self.ground()
            _must(self.take("with nothing on it"))
        _must(not self.empty)
        self.empty = True

    def behind(self) -> None:
        """The background, then the things."""
        if self.take("on"):
            self.ground()
            self.take(",")
            self.take(*THERE)
        else:
            self.ground()
            _must(self.take("with", ":"))
        self.list()

    def before(self) -> None:
        """The things, then perhaps the background."""
        self.take(*THERE)
        self.list()
        if self.take("on", ", on"):
            self.ground()

    def list(self) -> None:
        first = self.group()
        if self.peek() in ("to", "on", "left", "right", *PLACES) and not self.background_next():
            self.relations += (relate(self.relation(), first, self.group()),)
            return
        while self.peek(1) not in ("and", "on") and self.take(","):
            self.group()
        if self.take(", and", "and"):
            self.group()

    def background_next(self) -> bool:
        sides = (["the", "left"], ["the", "right"])
        return self.peek() == "on" and self.found[self.at + 1 : self.at + 3] not in sides

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
        _must(self.empty != bool(self.groups))
        for one in self.called:
            group = self.groups.get(one.name)
            _must(group and (one.one if group.number == 1 else one.many))
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

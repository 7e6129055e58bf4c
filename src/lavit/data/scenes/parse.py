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
from lavit.data.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    Facts,
    Group,
    Relation,
)


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


class _Reader:
    """A place in a text, and what was read up to there."""

    def __init__(self, found: list[str | Noun]) -> None:
        self.found = found
        self.at = 0
        self.background: str | None = None
        self.pattern: str | None = None
        self.empty = False
        self.groups: dict[str, Group] = {}
        self.relations: list[Relation] = []
        self.called: list[tuple[Noun, str]] = []  # nouns of clauses: do they fit their groups?

    def peek(self, ahead: int = 0) -> str | Noun | None:
        place = self.at + ahead
        return self.found[place] if place < len(self.found) else None

    def take(self, *words: str) -> bool:
        """Pass over these words if they stand here."""
        if self.found[self.at : self.at + len(words)] == list(words):
            self.at += len(words)
            return True
        return False

    def need(self, *words: str) -> None:
        if not self.take(*words):
            raise Unreadable

    def one_of(self, *choices: str) -> bool:
        """Pass over the first of some phrases that stands here."""
        return any(self.take(*phrase.split()) for phrase in choices)

    def text(self) -> Facts:
        self.request()
        while True:
            self.sentence()
            if not self.take("."):
                break
            if self.peek() is None:
                break
        if self.peek() is not None:
            raise Unreadable
        return self.facts()

    def request(self) -> None:
        """An opening such as "please draw a picture of"."""
        self.take("please")
        self.one_of("draw me", "draw", "paint", "show me", "show", "make", "create")
        self.one_of("a picture of", "a picture with")

    def sentence(self) -> None:
        """One sentence, of any kind."""
        start = self.at
        for kind in (self.clauses, self.painted, self.void, self.behind, self.before):
            kept = (
                self.background, self.pattern, self.empty,
                dict(self.groups), list(self.relations), list(self.called),
            )  # fmt: skip
            try:
                kind()
                if self.peek() in (None, "."):
                    return
            except Unreadable:
                pass
            self.at = start
            (
                self.background, self.pattern, self.empty,
                self.groups, self.relations, self.called,
            ) = kept  # fmt: skip
        raise Unreadable

    def clauses(self) -> None:
        """the owl is left of the star and the star is above the heart"""
        while True:
            first = self.called_by()
            if not self.one_of("is", "are"):
                raise Unreadable
            kind = self.relation()
            self.relations.append(relate(kind, first.name, self.called_by().name))
            if not self.one_of(", and", "and", ","):
                return

    def called_by(self) -> Noun:
        self.need("the")
        one = self.peek()
        if not isinstance(one, Noun):
            raise Unreadable
        self.at += 1
        self.called.append((one, one.name))
        return one

    def relation(self) -> str:
        for side in ("left", "right"):
            if self.one_of(f"{side} of", f"to the {side} of", f"on the {side} of"):
                return f"{side} of"
        word = self.peek()
        if word not in PLACES:
            raise Unreadable
        self.at += 1
        return PLACES[word]

    def painted(self) -> None:
        """the background is striped and blue"""
        self.need("the", "background", "is")
        said = self.adjectives(joined=True)
        if not said:
            raise Unreadable
        if self.peek() == "with":
            self.trimmings()

    def adjectives(self, *, joined: bool = False) -> bool:
        """Colour and pattern of the background, in either order."""
        said = False
        while True:
            word = self.peek()
            if word in BACKGROUNDS:
                self.colour_is(word)
            elif word in PATTERN_WORDS and word not in ("stripes", "dots"):
                self.pattern_is(PATTERN_WORDS[word])
            else:
                return said
            self.at += 1
            said = True
            if joined and not self.take("and") and self.peek() not in (".", None, "with"):
                return said

    def colour_is(self, colour: str) -> None:
        if self.background is not None:
            raise Unreadable
        self.background = colour

    def pattern_is(self, pattern: str) -> None:
        if self.pattern is not None:
            raise Unreadable
        self.pattern = pattern

    def trimmings(self) -> None:
        """with stripes"""
        if self.peek(1) in ("stripes", "dots"):
            self.pattern_is(PATTERN_WORDS[self.peek(1)])
            self.at += 2

    def ground(self) -> None:
        """a striped blue background, a blue background with stripes"""
        self.one_of("a", "an", "the")
        said = self.adjectives()
        self.need("background")
        if self.peek() == "with":
            before = self.at
            self.trimmings()
            said = said or self.at > before
        if not said:
            raise Unreadable

    def void(self) -> None:
        """an empty striped blue background, nothing on it"""
        if self.take("nothing"):
            if self.take("on"):
                self.ground()
        elif self.one_of("an empty", "empty"):
            self.ground()
        else:
            self.ground()
            self.need("with", "nothing", "on", "it")
        if self.empty:
            raise Unreadable
        self.empty = True

    def behind(self) -> None:
        """The background, then the things."""
        if self.take("on"):
            self.ground()
            self.take(",")
            self.one_of("there is", "there are")
        else:
            self.ground()
            if not self.one_of("with", ":"):
                raise Unreadable
        self.list()

    def before(self) -> None:
        """The things, then perhaps the background."""
        self.one_of("there is", "there are")
        self.list()
        if self.one_of("on", ", on"):
            self.ground()

    def list(self) -> None:
        first = self.group()
        if self.peek() in ("to", "on", "left", "right", *PLACES) and not self.background_next():
            kind = self.relation()
            self.relations.append(relate(kind, first, self.group()))
            return
        more = True
        while more:
            more = self.take(",") if self.peek(1) not in ("and", "on") else False
            if more:
                self.group()
        if self.one_of(", and", "and"):
            self.group()

    def background_next(self) -> bool:
        return self.peek() == "on" and self.found[self.at + 1 : self.at + 3] not in (
            ["the", "left"], ["the", "right"],
        )  # fmt: skip

    def group(self) -> str:
        """two small red stars"""
        word = self.peek()
        if word in ("a", "an"):
            number = 1
        elif word in NUMBERS[1:]:
            number = NUMBERS.index(word)
        elif isinstance(word, str) and len(word) == 1 and word in "123456789":
            number = int(word)
        else:
            raise Unreadable
        self.at += 1
        size = colour = None
        if self.peek() in SIZES:
            size = SIZES[self.peek()]
            self.at += 1
        if self.peek() in COLOURS:
            colour = self.peek()
            self.at += 1
        one = self.peek()
        if not isinstance(one, Noun) or not (one.one if number == 1 else one.many):
            raise Unreadable
        if one.name in self.groups or (colour is not None and one.name not in SHAPES):
            raise Unreadable
        self.at += 1
        self.groups[one.name] = Group(one.name, number, size, colour)
        return one.name

    def facts(self) -> Facts:
        """What was said, if it fits together."""
        if self.empty == bool(self.groups):
            raise Unreadable
        for one, name in self.called:
            group = self.groups.get(name)
            if group is None or not (one.one if group.number == 1 else one.many):
                raise Unreadable
        pairs = [frozenset((each.first, each.second)) for each in self.relations]
        if len(set(pairs)) < len(pairs) or any(len(pair) < 2 for pair in pairs):
            raise Unreadable
        for kind in ("left of", "above"):
            if _circular({(r.first, r.second) for r in self.relations if r.kind == kind}):
                raise Unreadable
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

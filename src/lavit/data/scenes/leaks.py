"""What one document of training may hold: all its scenes and every word of its texts together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from lavit.data.scenes.lexicon import names_in
from lavit.data.scenes.splits import Rules
from lavit.data.scenes.world import Scene


def contents(
    texts: Iterable[str], scenes: Iterable[Scene]
) -> tuple[frozenset[str], frozenset[tuple[str, str]]]:
    """All names of texts and scenes, and all shapes with their colours."""
    names: set[str] = set()
    coloured: set[tuple[str, str]] = set()
    for text in texts:
        some, pairs = names_in(text)
        names |= some
        coloured |= pairs
    for scene in scenes:
        names |= set(scene.names)
        coloured |= {(thing.name, thing.colour) for thing in scene.things if thing.colour}
    return frozenset(names), frozenset(coloured)


def violations(texts: Iterable[str], scenes: Iterable[Scene], rules: Rules) -> list[str]:
    """Every reason why a document of these texts and scenes is not one of training."""
    texts, scenes = list(texts), list(scenes)
    together = rules.held_out(*contents(texts, scenes))
    reasons = [together] if together else []
    return reasons + [reason for scene in scenes if (reason := rules.forbids(scene))]


@dataclass
class Document:
    """What a document holds up to now. With `training` off, everything is let in."""

    rules: Rules
    training: bool = True
    names: frozenset[str] = frozenset()
    coloured: frozenset[tuple[str, str]] = field(default_factory=frozenset)

    def admits(self, texts: Iterable[str] = (), scenes: Iterable[Scene] = ()) -> bool:
        """Take these in, if what is held out allows it."""
        names, coloured = contents(texts, scenes)
        names, coloured = names | self.names, coloured | self.coloured
        if self.training and self.rules.held_out(names, coloured):
            return False
        self.names, self.coloured = names, coloured
        return True

    def admits_name(self, name: str, colour: str | None = None) -> bool:
        """Would a name, perhaps with a colour, be let in?"""
        pairs = {(name, colour)} if colour else ()
        return not (self.training and self.rules.held_out(self.names | {name}, pairs))

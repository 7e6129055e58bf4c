"""What goes into the engine and what comes out: requests, events as they happen, completions.

A request is joint ids with optional features for its slots, and says what may be written after:

    "text"    t t t .                       ends at end of text
    "image"   S c c c E                     the engine opens the image; ends at image end
    "mixed"   t t S c c E t t .             the LM opens images by itself, and goes on after them
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lavit.config import InputError
from lavit.generate.protocols import PUBLISHED
from lavit.generate.sampling import Sampling
from lavit.sequence import Document, Image, Segment, Text
from lavit.vocabulary import Vocabulary

Mode = Literal["text", "image", "mixed"]
EventKind = Literal["text", "code", "image_start", "image_end", "finished"]
# "end": an end id, or image end; "length": max_tokens; "context": the LM's context is full
Reason = Literal["end", "length", "context"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """A prompt as joint ids, and how to go on. At true `slots` the next row of `features` enters.

    `sampling` writes the text, or in mode "image" the image: its prompt ends *before* image start.
    """

    ids: tuple[int, ...]
    sampling: Sampling
    seed: int = 0
    mode: Mode = "text"
    slots: tuple[bool, ...] = ()
    features: Float[Tensor, "slots width"] | None = None
    picture: Sampling = PUBLISHED  # inside images of mode "mixed"
    images: int = 4  # at most so many images in mode "mixed"
    stop: tuple[int, ...] = ()  # text ids that end the text, besides end of text

    @property
    def inside(self) -> Sampling:
        """How the inside of an image is written."""
        return self.sampling if self.mode == "image" else self.picture

    @property
    def guided(self) -> bool:
        """True where images are written under guidance, each by two lanes."""
        return self.mode != "text" and self.inside.guidance != 1

    @property
    def lanes(self) -> int:
        """Rows of the batch that the request takes at most."""
        return self.sampling.beams if self.sampling.beams > 1 else 1 + self.guided

    def check(self, vocabulary: Vocabulary, context: int) -> None:
        """Raise `InputError` if the LM cannot serve this request."""
        image, size = self.mode == "image", vocabulary.size
        wrong = [i for i in (*self.ids, *self.stop) if not 0 <= i < size]
        ids, slots, true = len(self.ids), len(self.slots), sum(self.slots)
        given = 0 if self.features is None else len(self.features)
        for fails, line in (
            (self.mode not in ("text", "image", "mixed"),
             f"mode {self.mode!r} is not known: use 'text', 'image' or 'mixed'"),
            (self.images < 0,
             f"images is {self.images}: give the number of images the text may hold, or 0"),
            (not self.ids and not image,
             "the prompt is empty: text needs at least one id to go on from"),
            (wrong, f"ids {wrong[:5]} are outside the joint vocabulary of {size} ids"),
            (true != given or slots not in (0, ids),
             f"a prompt of {ids} ids came with {slots} slot marks, {true} of them true, and "
             f"{given} features: each true slot takes one feature"),
            (image and self.ids[-1:] == (vocabulary.image_start,),
             "the prompt ends with image start: leave it out, the engine opens the image"),
            (self.mode != "text" and max(self.sampling.beams, self.inside.beams) > 1,
             f"beam search writes text only, not mode {self.mode!r}: set beams=1"),
            (self.mode != "text" and self.inside.min_tokens < 1,
             "an image needs at least one code: set min_tokens to 1 or more"),
            (ids + image >= context,
             f"the prompt has {ids} tokens but the language model attends to {context}: shorten "
             "it, or read images with fewer patches"),
        ):  # fmt: skip
            if fails:
                raise InputError(line)


@dataclass(frozen=True)
class Event:
    """One thing that happened to request number `request` (its place in the list)."""

    request: int
    kind: EventKind
    id: int | None = None  # joint id; None where kind is "finished"
    reason: Reason | None = None  # where kind is "finished"
    score: float | None = None  # of a finished beam: log-probability / length ** penalty
    embedding: Float[Tensor, "width"] | None = None  # a rival's (`Language.embeds`), in place of id


@dataclass(frozen=True)
class Completion:
    """What was written after a prompt: text and images in order."""

    segments: Document
    reason: Reason
    score: float | None = None
    embeddings: tuple[Float[Tensor, "width"], ...] = ()  # of all pictures, where they are no codes

    @property
    def text(self) -> tuple[int, ...]:
        """All text ids."""
        return tuple(i for part in self.segments if isinstance(part, Text) for i in part.ids)

    @property
    def images(self) -> tuple[tuple[int, ...], ...]:
        """Codes of each image."""
        return tuple(part.codes for part in self.segments if isinstance(part, Image))


class Collector:
    """What one request has written so far: text and images in order, the last of them open."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.segments: list[Segment] = []
        self.embeddings: list[Tensor] = []

    def take(self, event: Event) -> None:
        """Add what an event brings."""
        last = self.segments[-1] if self.segments else None
        if event.kind == "image_start":
            self.segments.append(Image((), read=False))
        elif event.embedding is not None:
            self.embeddings.append(event.embedding)
        elif event.kind == "code" and isinstance(last, Image):
            code = int(self.vocabulary.codes_of(torch.tensor(event.id)))
            self.segments[-1] = replace(last, codes=(*last.codes, code))
        elif event.kind == "text" and event.id is not None:
            if isinstance(last, Text):
                self.segments[-1] = Text((*last.ids, event.id))
            else:
                self.segments.append(Text((event.id,)))


def collect(events: Iterable[Event], vocabulary: Vocabulary) -> dict[int, Completion]:
    """Completions of all requests that finish in `events`, by number."""
    written: dict[int, Collector] = defaultdict(lambda: Collector(vocabulary))
    done: dict[int, Completion] = {}
    for event in events:
        collector = written[event.request]
        collector.take(event)
        if event.kind == "finished":
            assert event.reason is not None
            parts = tuple(collector.segments), event.reason, event.score
            done[event.request] = Completion(*parts, tuple(collector.embeddings))
    return done

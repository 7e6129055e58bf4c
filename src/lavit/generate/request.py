"""What goes into the engine and what comes out: requests, events as they happen, completions when all is done.

A request is joint ids with optional features for its slots, and says what may be written after them:

    "text"    t t t .                       ends at end of text
    "image"   S c c c E                     the engine opens the image; ends at image end
    "mixed"   t t S c c E t t .             the LM opens images by itself, and goes on after them
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lavit.config import InputError
from lavit.generate.sampling import Sampling, draw_published
from lavit.sequence import Document, Image, Text
from lavit.vocabulary import Vocabulary

Mode = Literal["text", "image", "mixed"]
Kind = Literal["text", "code", "image_start", "image_end", "finished"]
# "end": an end id, or image end; "length": max_tokens; "context": the LM's context is full
Reason = Literal["end", "length", "context"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """A prompt as joint ids, and how to go on. Where `slots` is true the next row of `features` enters instead.

    `sampling` writes the text, or in mode "image" the image. The prompt of an image ends *before* image start.
    """

    ids: tuple[int, ...]
    sampling: Sampling
    mode: Mode = "text"
    slots: tuple[bool, ...] = ()
    features: Float[Tensor, "slots width"] | None = None
    picture: Sampling = field(default_factory=draw_published)  # inside images of mode "mixed" (not its n and seed)
    images: int = 4  # at most so many images in mode "mixed"
    stop: tuple[int, ...] = ()  # text ids that end the text, besides end of text

    @property
    def inside(self) -> Sampling:
        """How the inside of an image is written."""
        return self.sampling if self.mode == "image" else self.picture

    @property
    def lanes(self) -> int:
        """Rows of the batch that the request takes at most."""
        if self.sampling.beams > 1:
            return self.sampling.beams
        return self.sampling.n * (2 if self.mode != "text" and self.inside.guidance != 1 else 1)

    def check(self, vocabulary: Vocabulary, context: int) -> None:
        """Raise `InputError` if the LM cannot serve this request."""
        if self.mode not in ("text", "image", "mixed"):
            raise InputError(f"mode {self.mode!r} is not known: use 'text', 'image' or 'mixed'")
        if self.images < 0:
            raise InputError(f"images is {self.images}: give the number of images the text may hold, or 0")
        if not self.ids and self.mode != "image":
            raise InputError("the prompt is empty: text needs at least one id to go on from")
        wrong = [i for i in (*self.ids, *self.stop) if not 0 <= i < vocabulary.size]
        if wrong:
            raise InputError(f"ids {wrong[:5]} are outside the joint vocabulary of {vocabulary.size} ids")
        given = 0 if self.features is None else len(self.features)
        if sum(self.slots) != given or (self.slots and len(self.slots) != len(self.ids)):
            raise InputError(
                f"a prompt of {len(self.ids)} ids came with {len(self.slots)} slot marks, {sum(self.slots)} of them "
                f"true, and {given} features: each true slot takes one feature"
            )
        if self.mode == "image" and self.ids and self.ids[-1] == vocabulary.image_start:
            raise InputError("the prompt ends with image start: leave it out, the engine opens the image")
        if self.mode != "text" and (self.sampling.beams > 1 or self.inside.beams > 1):
            raise InputError(f"beam search writes text only, not mode {self.mode!r}: set beams=1")
        if self.mode != "text" and self.inside.min_tokens < 1:
            raise InputError("an image needs at least one code: set min_tokens to 1 or more")
        needed = len(self.ids) + (self.mode == "image")
        if needed >= context:
            raise InputError(
                f"the prompt has {len(self.ids)} tokens but the language model attends to {context}: shorten it, "
                "or read images with fewer patches"
            )


@dataclass(frozen=True)
class Event:
    """One thing that happened to sample `sample` of request `request` (its place in the list)."""

    request: int
    sample: int
    kind: Kind
    id: int | None = None  # joint id; None where kind is "finished"
    reason: Reason | None = None  # where kind is "finished"
    score: float | None = None  # of a finished beam: log-probability / length ** penalty


@dataclass(frozen=True)
class Completion:
    """One finished sample: text and images in the order they were written."""

    segments: Document
    reason: Reason
    score: float | None = None

    @property
    def text(self) -> tuple[int, ...]:
        """All text ids."""
        return tuple(i for segment in self.segments if isinstance(segment, Text) for i in segment.ids)

    @property
    def images(self) -> tuple[tuple[int, ...], ...]:
        """Codes of each image."""
        return tuple(segment.codes for segment in self.segments if isinstance(segment, Image))


def collect(events: Iterable[Event], vocabulary: Vocabulary) -> dict[tuple[int, int], Completion]:
    """Completions of all samples that finish in `events`, by (request, sample)."""
    open_: dict[tuple[int, int], list[tuple[str, list[int]]]] = {}
    done: dict[tuple[int, int], Completion] = {}
    for event in events:
        parts = open_.setdefault((event.request, event.sample), [])
        if event.kind == "finished":
            assert event.reason is not None
            segments = tuple(
                Text(tuple(ids)) if kind == "text" else Image(tuple(ids), read=False) for kind, ids in parts
            )
            done[event.request, event.sample] = Completion(segments, event.reason, event.score)
        elif event.kind == "image_start":
            parts.append(("image", []))
        elif event.kind == "code":
            assert event.id is not None
            parts[-1][1].append(int(vocabulary.codes_of(torch.tensor(event.id))))
        elif event.kind == "text":
            assert event.id is not None
            if not parts or parts[-1][0] != "text":
                parts.append(("text", []))
            parts[-1][1].append(event.id)
    return done

"""Generation as it happens: the engine's events turned into text pieces and pictures.

    engine events   t t t S c c c E t .
    updates         text text   image_start code code code [preview …] image text finished

A blocking call is a loop over the same updates (`gathered`) that paints all pictures at the end.
Text that may still change is held back: half a character, blanks at the end, the beginning of what
would cut the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from lavit.generate.engine import Engine
from lavit.generate.protocols import cut_before
from lavit.generate.request import Collector, Event, Reason, Request
from lavit.sequence import Image as ImageSegment
from lavit.sequence import Text
from lavit.vocabulary import Vocabulary

Painter = Callable[..., list[Image.Image]]  # takes codes and seeds=…
Preview = Callable[..., Iterator[tuple[int | None, Image.Image]]]  # the same; `Runner.previewed`
UpdateKind = Literal["text", "image_start", "code", "preview", "image", "finished"]


@dataclass(frozen=True)
class Update:
    """One thing that happened to input number `input`; its kind says what is set:

    text: the next piece in `text`; image_start; code: all `codes` of the open image so far;
    preview: a `picture` from noise after solver `step` (0, 1, …); image: finished `picture` and
    its `codes`; finished: the `reason`, and the number of text `tokens` that were written. `image`
    numbers the images of the input.
    """

    input: int
    kind: UpdateKind
    text: str = ""
    codes: tuple[int, ...] = ()
    picture: Image.Image | None = None
    image: int = 0
    step: int | None = None
    reason: Reason | None = None
    tokens: int = 0


@dataclass(frozen=True, eq=False)
class Job:
    """A request; its text is cut before the first of the strings `ends`."""

    request: Request
    ends: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Painted:
    """A picture that was written, and the codes it was painted from."""

    picture: Image.Image
    codes: tuple[int, ...]


Made = list[str | Painted]  # what one job wrote, in order


class Running:
    """The jobs of one session of the engine. `add` and `cancel` may come between any two steps."""

    def __init__(self, engine: Engine, text: PreTrainedTokenizerBase) -> None:
        self.session = engine.session()
        self.vocabulary = engine.vocabulary
        self.text = text
        self._replies: dict[int, _Reply] = {}

    @property
    def busy(self) -> bool:
        """True while anything waits or runs."""
        return self.session.busy

    def add(self, job: Job) -> int:
        """Queue a job, or raise `InputError`; returns the `input` of its updates: 0, 1, …"""
        number = self.session.add(job.request)
        pieces = partial(StreamedText, self._decode, job.ends)
        self._replies[number] = _Reply(number, pieces, self.vocabulary)
        return number

    def cancel(self, number: int) -> None:
        """Drop a job; its updates end, and its lanes are free from the next step on."""
        self.session.cancel(number)
        self._replies.pop(number, None)

    def step(self) -> list[Update]:
        """One step of the engine; returns what happened, images unpainted."""
        found: list[Update] = []
        for event in self.session.step():
            reply = self._replies.get(event.request)
            if reply is None:  # its text was cut in this very step
                continue
            found += reply.take(event)
            if reply.done:
                self.cancel(event.request)
        return found

    def _decode(self, ids: list[int]) -> str:
        plain = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(self.text.decode(ids, **plain))


def updates(
    engine: Engine,
    text: PreTrainedTokenizerBase,
    jobs: Sequence[Job],
    *,
    paint: Painter | None = None,
    show: Preview | None = None,
) -> Iterator[Update]:
    """Run jobs; yields what happens. Closing the iterator stops everything.

    Without `paint`, images come unpainted; with `show`, previews of each solver step come before
    them. Raises `InputError` at once for a request that the LM cannot serve.
    """
    running = Running(engine, text)
    for job in jobs:
        running.add(job)

    def happening() -> Iterator[Update]:
        while running.busy:
            for update in running.step():
                if update.kind == "image" and paint is not None:
                    yield from _painted(update, jobs[update.input].request.seed, paint, show)
                else:
                    yield update

    return happening()


def gathered(happening: Iterable[Update], jobs: Sequence[Job], paint: Painter | None) -> list[Made]:
    """What each job wrote, in order: strings, and images, all painted together at the end.

    `paint` is None where jobs write text alone.
    """
    found: list[list[str | Update]] = [[] for _ in jobs]
    for update in happening:
        parts = found[update.input]
        if update.kind == "image":
            parts.append(update)
        elif update.kind == "text" and parts and isinstance(parts[-1], str):
            parts[-1] += update.text
        elif update.kind == "text":
            parts.append(update.text)
    images = [part for parts in found for part in parts if isinstance(part, Update)]
    codes = [torch.tensor(image.codes) for image in images]
    seeds = [jobs[image.input].request.seed for image in images]
    pictures = iter(paint(codes, seeds=seeds) if images and paint is not None else ())

    def finished(part: str | Update) -> str | Painted:
        return part if isinstance(part, str) else Painted(next(pictures), part.codes)

    return [[finished(part) for part in parts] for parts in found]


def _painted(image: Update, seed: int, paint: Painter, show: Preview | None) -> Iterator[Update]:
    """The update `image` with its picture; before it, with `show`, one for each solver step."""
    codes = [torch.tensor(image.codes)]
    if show is None:
        (picture,) = paint(codes, seeds=[seed])
        yield replace(image, picture=picture)
        return
    for step, picture in show(codes, seeds=[seed]):
        kind: UpdateKind = "image" if step is None else "preview"
        yield replace(image, kind=kind, picture=picture, step=step)


class _Reply:
    """What one job writes, on its way: its open text or image, and whether it is done."""

    def __init__(
        self,
        number: int,
        pieces: Callable[[], StreamedText],
        vocabulary: Vocabulary,
    ) -> None:
        self.number, self.pieces = number, pieces
        self.text, self.written = pieces(), Collector(vocabulary)
        self.images = self.tokens = 0
        self.done = False

    def take(self, event: Event) -> list[Update]:
        """What an event of the engine comes to; nothing once all is done."""
        if self.done:
            return []
        self.written.take(event)
        last = self.written.segments[-1] if self.written.segments else None
        if event.kind == "text" and isinstance(last, Text):
            self.tokens += 1
            return self._texts(self.text.add(last.ids))
        if event.kind == "code" and isinstance(last, ImageSegment):
            return [self._update("code", codes=last.codes)]
        if event.kind == "image_end" and isinstance(last, ImageSegment):
            written = self._update("image", codes=last.codes)
            self.images += 1
            self.text = self.pieces()
            return [written]
        rest = self._texts(self.text.close())
        if self.done:
            return rest
        if event.kind == "finished":
            return [*rest, self._finish(event.reason)]
        return [*rest, self._update("image_start")]

    def _texts(self, piece: str) -> list[Update]:
        found = [self._update("text", text=piece)] if piece else []
        return [*found, self._finish("end")] if self.text.cut else found

    def _finish(self, reason: Reason | None) -> Update:
        self.done = True
        return replace(self._update("finished"), reason=reason, tokens=self.tokens)

    def _update(
        self,
        kind: UpdateKind,
        text: str = "",
        codes: tuple[int, ...] = (),
    ) -> Update:
        return Update(self.number, kind, text, codes, image=self.images)


class StreamedText:
    """Ids of a text in, pieces that join to it out: stripped, cut before the first of `ends`."""

    def __init__(self, decode: Callable[[list[int]], str], ends: tuple[str, ...] = ()) -> None:
        self.decode, self.ends = decode, ends
        self.ids: tuple[int, ...] = ()
        self.shown = 0  # characters
        self.cut = False

    def add(self, ids: tuple[int, ...]) -> str:
        """Take all ids so far; returns what has become certain, often nothing."""
        self.ids = ids
        return self._next(last=False)

    def close(self) -> str:
        """The rest."""
        return "" if self.cut else self._next(last=True)

    def _next(self, *, last: bool) -> str:
        text, self.cut = cut_before(self.decode(list(self.ids)), self.ends)
        if not (last or self.cut):
            text = text.rstrip("\ufffd")  # half a character
            # what may become one of `ends`
            starts = (end[:size] for end in self.ends for size in range(1, len(end)))
            open_ = max((len(start) for start in starts if text.endswith(start)), default=0)
            text = text[: len(text) - open_]
        text = text.strip()
        piece = text[self.shown :]
        self.shown = max(self.shown, len(text))
        return piece

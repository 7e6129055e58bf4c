"""Generation as it happens: the engine's events turned into text pieces and pictures.

    engine events   t t t S c c c E t .
    updates         text text   image_start code code code [preview …] image text finished

A blocking call is a loop over the same updates (`gathered`); it only paints later, all pictures together. Text that may
still change is held back: half a character, blanks at the end, the beginning of what would cut the text.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from queue import SimpleQueue
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lavit.generate.engine import Engine
from lavit.generate.protocols import cut
from lavit.generate.request import Event, Reason, Request


@dataclass(frozen=True)
class Update:
    """One thing that happened to sample `sample` of input `input`. Which fields are set depends on the kind:

    text: the next piece in `text`; image_start; code: all `codes` of the open image so far; preview: a `picture` from
    noise after solver `step` (0, 1, …); image: the finished `picture` and its `codes`; finished: the `reason`.
    `image` numbers the images of the sample.
    """

    input: int
    sample: int
    kind: Literal["text", "image_start", "code", "preview", "image", "finished"]
    text: str = ""
    codes: tuple[int, ...] = ()
    picture: Image.Image | None = None
    image: int = 0
    step: int | None = None
    reason: Reason | None = None


@dataclass(frozen=True, eq=False)
class Job:
    """A request, the strings before the first of which its text is cut, and the seeds of its samples."""

    request: Request
    seeds: tuple[int, ...]
    ends: tuple[str, ...] = ()


# codes and seeds, and optionally what is called with each solver step's number and latents: pictures come out
Painter = Callable[..., list[Image.Image]]


@dataclass(frozen=True)
class Drawn:
    """A picture that was written, and its codes."""

    picture: Image.Image
    codes: tuple[int, ...]


def updates(
    engine: Engine,
    text: PreTrainedTokenizerBase,
    jobs: Sequence[Job],
    paint: Painter,
    *,
    together: bool = False,
    show: Callable[[Tensor], list[Image.Image]] | None = None,
) -> Iterator[Update]:
    """Run jobs; yields what happens. Closing the iterator stops everything.

    together: paint all pictures at the end, in one call. show: latents to pictures, for previews of each solver step.
    Raises `InputError` at once for a request that the LM cannot serve.
    """
    session = engine.session()
    for job in jobs:
        session.add(job.request)
    return _updates(session, text, jobs, paint, together, show)


def _updates(
    session: Any,
    text: PreTrainedTokenizerBase,
    jobs: Sequence[Job],
    paint: Painter,
    together: bool,
    show: Callable[[Tensor], list[Image.Image]] | None,
) -> Iterator[Update]:
    samples = {
        (number, sample): _Sample(number, sample, job.ends, text, session.vocabulary)
        for number, job in enumerate(jobs)
        for sample in range(job.request.sampling.n)
    }
    waiting: list[Update] = []
    while session.busy:
        for event in session.step():
            sample = samples[event.request, event.sample]
            for update in sample.take(event):
                if update.kind != "image":
                    yield update
                elif together:
                    waiting.append(update)
                else:
                    yield from _painted([update], jobs, paint, show)
            if sample.done and event.kind != "finished":
                session.cancel(event.request, event.sample)
    if waiting:
        yield from _painted(waiting, jobs, paint, show)


def _painted(
    images: list[Update], jobs: Sequence[Job], paint: Painter, show: Callable[[Tensor], list[Image.Image]] | None
) -> Iterator[Update]:
    codes = [torch.tensor(image.codes) for image in images]
    seeds = [jobs[image.input].seeds[image.sample] for image in images]
    if show is None:
        pictures = paint(codes, seeds)
    else:
        pictures = []
        for step, found in _watched(lambda watch: paint(codes, seeds, watch)):
            if step is None:
                pictures = found
                continue
            for image, picture in zip(images, show(found), strict=True):
                yield replace(image, kind="preview", picture=picture, step=step)
    for image, picture in zip(images, pictures, strict=True):
        yield replace(image, picture=picture)


class _Stopped(Exception):
    """Nobody watches any more."""


def _watched(work: Callable[[Callable[[int, Tensor], None]], Any]) -> Iterator[tuple[int | None, Any]]:
    """Run `work(watch)` in a thread; yields (step, latents) of each call of `watch`, at last (None, result)."""
    found: SimpleQueue[tuple[int | None, Any, BaseException | None]] = SimpleQueue()
    stop = threading.Event()

    def watch(step: int, latents: Tensor) -> None:
        if stop.is_set():
            raise _Stopped
        found.put((step, latents, None))

    def run() -> None:
        try:
            found.put((None, work(watch), None))
        except BaseException as error:
            found.put((None, None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            step, value, error = found.get()
            if error is not None:
                raise error
            yield step, value
            if step is None:
                return
    finally:
        stop.set()
        thread.join()


def gathered(happening: Iterable[Update], jobs: Sequence[Job]) -> list[list[list[str | Drawn]]]:
    """What each sample of each job wrote, in order: strings and pictures."""
    found: list[list[list[Any]]] = [[[] for _ in range(job.request.sampling.n)] for job in jobs]
    for update in happening:
        parts = found[update.input][update.sample]
        if update.kind == "text" and parts and isinstance(parts[-1], str):
            parts[-1] += update.text
        elif update.kind == "text":
            parts.append(update.text)
        elif update.kind == "image_start":
            parts.append(update.image)  # its place, until it is painted
        elif update.kind == "image":
            assert update.picture is not None
            parts[parts.index(update.image)] = Drawn(update.picture, update.codes)
    return found


class _Sample:
    """One sample on its way: its open text or image, and whether it is done."""

    def __init__(
        self, number: int, sample: int, ends: tuple[str, ...], text: PreTrainedTokenizerBase, vocabulary: Any
    ) -> None:
        self.base = Update(number, sample, "text")
        self.vocabulary = vocabulary
        decode = partial(text.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.fresh = partial(TextPieces, decode, ends)
        self.text = self.fresh()
        self.codes: list[int] = []
        self.images = 0
        self.done = False

    def take(self, event: Event) -> list[Update]:
        """What an event of the engine comes to; nothing once the sample is done."""
        if self.done:
            return []
        if event.kind == "text":
            assert event.id is not None
            return self._texts(self.text.add(event.id))
        if event.kind == "code":
            self.codes.append(int(self.vocabulary.codes_of(torch.tensor(event.id))))
            return [self._update("code", codes=tuple(self.codes))]
        if event.kind == "image_end":
            self.images += 1
            self.text = self.fresh()
            return [self._update("image", codes=tuple(self.codes), image=self.images - 1)]
        rest = self._texts(self.text.close())
        if event.kind == "image_start" and not self.done:
            self.codes = []
            return [*rest, self._update("image_start")]
        return rest if self.done else [*rest, self._finish(event.reason)]

    def _texts(self, piece: str) -> list[Update]:
        found = [self._update("text", text=piece)] if piece else []
        return [*found, self._finish("end")] if self.text.cut else found

    def _finish(self, reason: Reason | None) -> Update:
        self.done = True
        return self._update("finished", reason=reason)

    def _update(self, kind: Any, **fields: Any) -> Update:
        return replace(self.base, kind=kind, **({"image": self.images} | fields))


class TextPieces:
    """Ids of a text one by one, pieces of it out: stripped, cut before the first of `ends`; joined they are the text."""

    def __init__(self, decode: Callable[[list[int]], str], ends: tuple[str, ...] = ()) -> None:
        self.decode, self.ends = decode, ends
        self.ids: list[int] = []
        self.shown = 0  # characters
        self.cut = False

    def add(self, id: int) -> str:
        """Take the next id; returns what is certain by now, often nothing."""
        self.ids.append(id)
        return self._next(last=False)

    def close(self) -> str:
        """The rest."""
        return "" if self.cut else self._next(last=True)

    def _next(self, *, last: bool) -> str:
        text, self.cut = cut(self.decode(self.ids), self.ends)
        if not (last or self.cut):
            text = text.rstrip("\ufffd")  # half a character
            text = text[: len(text) - self._beginning(text)]
        text = text.strip()
        piece = text[self.shown :]
        self.shown = max(self.shown, len(text))
        return piece

    def _beginning(self, text: str) -> int:
        """Length of the longest end of `text` that may become one of `ends`."""
        sizes = (size for end in self.ends for size in range(1, len(end)) if text.endswith(end[:size]))
        return max(sizes, default=0)

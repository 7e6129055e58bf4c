"""Generation as it happens: the engine's events turned into text pieces and pictures.

    engine events   t t t S c c c E t .
    updates         text text   image_start code code code [preview …] image text finished

A blocking call is a loop over the same updates (`gathered`) that paints all pictures at the end.
Text that may still change is held back: half a character, blanks at the end, the beginning of what
would cut the text.
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
from lavit.vocabulary import Vocabulary

# takes codes, seeds=… and maybe watch=…, which is called with each solver step and its latents
Painter = Callable[..., list[Image.Image]]
Made = list[Any]  # strings, and updates of kind "image"


@dataclass(frozen=True)
class Update:
    """One thing that happened to sample `sample` of input `input`; its kind says what is set:

    text: the next piece in `text`; image_start; code: all `codes` of the open image so far;
    preview: a `picture` from noise after solver `step` (0, 1, …); image: finished `picture` and
    its `codes`; finished: the `reason`. `image` numbers the images of the sample.
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
    """A request with its seeds resolved; its text is cut before the first of the strings `ends`."""

    request: Request
    ends: tuple[str, ...] = ()


def updates(
    engine: Engine,
    text: PreTrainedTokenizerBase,
    jobs: Sequence[Job],
    *,
    paint: Painter | None = None,
    show: Callable[[Tensor], list[Image.Image]] | None = None,
) -> Iterator[Update]:
    """Run jobs; yields what happens. Closing the iterator stops everything.

    Without `paint`, images come unpainted. show: latents to pictures, for previews of each solver
    step. Raises `InputError` at once for a request that the LM cannot serve.
    """
    session = engine.session()
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    decode = partial(text.decode, **options)
    samples = {}
    for job in jobs:
        number, pieces = session.add(job.request), partial(TextPieces, decode, job.ends)
        for sample, seed in enumerate(job.request.sampling.seeds()):
            base = Update(number, sample, "text")
            samples[number, sample] = _Sample(base, seed, pieces, engine.vocabulary)

    def happening() -> Iterator[Update]:
        while session.busy:
            for event in session.step():
                sample = samples[event.request, event.sample]
                for update in sample.take(event):
                    if update.kind == "image" and paint is not None:
                        yield from _painted(update, sample.seed, paint, show)
                    else:
                        yield update
                if sample.done and event.kind != "finished":
                    session.cancel(event.request, event.sample)

    return happening()


def gathered(happening: Iterable[Update], jobs: Sequence[Job], paint: Painter) -> list[list[Made]]:
    """What each sample of each job wrote, in order: strings, and images, painted all together."""
    found: list[list[Made]] = [[[] for _ in range(job.request.sampling.n)] for job in jobs]
    images: list[Update] = []
    for update in happening:
        parts = found[update.input][update.sample]
        if update.kind == "text" and parts and isinstance(parts[-1], str):
            parts[-1] += update.text
        elif update.kind == "text":
            parts.append(update.text)
        elif update.kind == "image":
            parts.append(update)
            images.append(update)
    images.sort(key=lambda image: (image.input, image.sample, image.image))
    codes = [torch.tensor(image.codes) for image in images]
    seeds = [jobs[image.input].request.sampling.seeds()[image.sample] for image in images]
    for image, picture in zip(images, paint(codes, seeds=seeds) if images else (), strict=True):
        parts = found[image.input][image.sample]
        parts[parts.index(image)] = replace(image, picture=picture)
    return found


def _painted(image: Update, seed: int, paint: Painter, show: Callable | None) -> Iterator[Update]:
    work = partial(paint, [torch.tensor(image.codes)], seeds=[seed])
    for step, found in [(None, work())] if show is None else _watched(work):
        (picture,) = found if step is None else show(found)
        kind = "image" if step is None else "preview"
        yield replace(image, kind=kind, picture=picture, step=step)


def _watched(work: Callable[..., Any]) -> Iterator[tuple[int | None, Any]]:
    """Run `work(watch=…)` in a thread; yields what `watch` is called with, then (None, result)."""
    found: SimpleQueue[tuple[int | None, Any]] = SimpleQueue()
    stop = threading.Event()

    def watch(step: int, latents: Tensor) -> None:
        if stop.is_set():
            raise RuntimeError("nobody watches any more")
        found.put((step, latents))

    def run() -> None:
        try:
            found.put((None, work(watch=watch)))
        except BaseException as error:
            found.put((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        step: int | None = 0
        while step is not None:
            step, value = found.get()
            if isinstance(value, BaseException):
                raise value
            yield step, value
    finally:
        stop.set()
        thread.join()


class _Sample:
    """One sample on its way: its open text or image, and whether it is done."""

    def __init__(self, base: Update, seed: int, pieces: Callable, vocabulary: Vocabulary) -> None:
        self.base, self.seed, self.pieces, self.vocabulary = base, seed, pieces, vocabulary
        self.text = pieces()
        self.codes: tuple[int, ...] = ()
        self.images = 0
        self.done = False

    def take(self, event: Event) -> list[Update]:
        """What an event of the engine comes to; nothing once the sample is done."""
        if self.done:
            return []
        if event.kind == "text":
            return self._texts(self.text.add(event.id))
        if event.kind == "code":
            self.codes += (int(self.vocabulary.codes_of(torch.tensor(event.id))),)
            return [self._update("code", codes=self.codes)]
        if event.kind == "image_end":
            painted = self._update("image", codes=self.codes)
            self.images += 1
            self.text = self.pieces()
            return [painted]
        rest = self._texts(self.text.close())
        if self.done:
            return rest
        if event.kind == "finished":
            return [*rest, self._finish(event.reason)]
        self.codes = ()
        return [*rest, self._update("image_start")]

    def _texts(self, piece: str) -> list[Update]:
        found = [self._update("text", text=piece)] if piece else []
        return [*found, self._finish("end")] if self.text.cut else found

    def _finish(self, reason: Reason | None) -> Update:
        self.done = True
        return self._update("finished", reason=reason)

    def _update(self, kind: Any, **fields: Any) -> Update:
        return replace(self.base, kind=kind, image=self.images, **fields)


class TextPieces:
    """Ids of a text in, pieces that join to it out: stripped, cut before the first of `ends`."""

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
            # what may become one of `ends`
            starts = (end[:size] for end in self.ends for size in range(1, len(end)))
            open_ = max((len(start) for start in starts if text.endswith(start)), default=0)
            text = text[: len(text) - open_]
        text = text.strip()
        piece = text[self.shown :]
        self.shown = max(self.shown, len(text))
        return piece

"""What all addresses share: the worker, the border for pictures, limits, and what is checked."""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import time
from collections.abc import Awaitable, Iterable
from fractions import Fraction
from typing import TypeVar

from starlette.types import Receive

from lavit.config import InputError
from lavit.generate.options import PictureSize
from lavit.generate.pipeline import Pipeline
from lavit.images import ASPECT_SIZES
from lavit.pixels.decoder import Pixels
from lavit.serve.errors import ApiError, api_error
from lavit.serve.fetch import Fetcher
from lavit.serve.limits import Limits
from lavit.serve.metrics import ServerMetrics
from lavit.serve.pictures import SentPictures
from lavit.serve.ticket import Order, PromptSize, Ticket
from lavit.serve.worker import Worker

T = TypeVar("T")
LARGER = 4  # a picture may have so many times the pixels of the decoder's own size
STEPS = {"low": 0.5, "high": 2.0, "hd": 2.0}  # of a quality, by the decoder's own number


class Service:
    """A loaded model and what serves it; `close` it."""

    def __init__(
        self,
        pipeline: Pipeline,
        limits: Limits,
        fetch_hosts: tuple[str, ...] = (),
    ) -> None:
        pipeline.model.needs("language")
        if pipeline.model.pixels is not None:
            _ = pipeline.release  # what it misses is said before the first request
        self.pipeline, self.limits = pipeline, limits
        self.name = pipeline.model.config.name
        self.created = int(time.time())
        self.metrics = ServerMetrics()
        fetcher = Fetcher(fetch_hosts, limits.request_bytes) if fetch_hosts else None
        side = pipeline.model.config.vision.image_size
        self.pictures = SentPictures(side, limits, fetcher)
        self.worker = Worker(pipeline, limits, self.metrics)

    def close(self) -> None:
        """End all threads; requests that run end with an error."""
        self.worker.stop()
        self.worker.join()
        self.pictures.close()

    def error(self, error: Exception) -> ApiError:
        """What a client is told of an error; the model's folder is not named."""
        folder = self.pipeline.model.folder
        return api_error(error, str(folder) if folder else "")

    def check(self, model: str | None, n: int = 1) -> None:
        """Raise `ApiError` for another model, and for more choices than are made."""
        if model is not None and model != self.name:
            said = f"the model {model!r} does not exist: this server has {self.name!r}"
            raise ApiError(404, said, param="model", code="model_not_found")
        if not 1 <= n <= self.limits.choices:
            said = f"n is {n}: choose 1 to {self.limits.choices}"
            raise ApiError(400, said, param="n", code="invalid_value")

    def check_words(self, texts: Iterable[str | None], param: str) -> None:
        """Raise `ApiError` for texts that are longer than any prompt, or hold half a character.

        Tokenising takes the engine's time, and every request waits for it.
        """
        given = [text for text in texts if text]
        count, most = sum(map(len, given)), self.limits.characters
        if count > most:
            said = f"the texts have {count} characters, at most {most} are taken: shorten them"
            raise ApiError(400, said, param=param, code="string_above_max_length")
        try:
            "".join(given).encode()
        except UnicodeEncodeError as error:
            said = "a text holds half a character: a surrogate of UTF-16 without the other"
            raise ApiError(400, said, param=param, code="invalid_value") from error

    async def open(self, order: Order) -> tuple[Ticket, PromptSize]:
        """Begin a request: `Worker.open`, after what would stop its pictures at the end."""
        if order.previews and self.pipeline.release.checker is not None:
            remedy = "leave partial_images out"
            said = f"partial images would pass the safety checker unseen: {remedy}"
            raise ApiError(400, said, param="partial_images", code="unsupported_value")
        return await self.worker.open(order)

    def painting(
        self, size: str | None, quality: str | None
    ) -> tuple[int | None, PictureSize | None]:
        """Solver steps and (height, width) for what a client asks; None is the model's own."""
        if size is None and quality is None:
            return None, None
        self.pipeline.model.needs("pixels")
        pixels = self.pipeline.model.pixels
        factor = STEPS.get(quality or "auto")
        steps = None if factor is None else max(1, round(pixels.config.steps * factor))
        return steps, canvas(pixels, size)


def canvas(pixels: Pixels, size: str | None) -> PictureSize | None:
    """(height, width) of a size such as 512x384, or an aspect ratio; None is the decoder's own.

    Sizes beyond the decoder's are taken for their aspect ratio: 1024x1024 is a square of the
    decoder's own size. What is painted is said in the answer.
    """
    if size is None or size == "auto":
        return None
    if size in ASPECT_SIZES:
        return size
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", size)
    if found is None:
        raise InputError(f"size is {size!r}: give auto, WIDTHxHEIGHT or one of {_ratios()}")
    width, height = map(int, found.groups())
    own, area = pixels.config.size**2, width * height
    whole = all(side % pixels.multiple == 0 for side in (width, height))
    if whole and area <= LARGER * own:
        return height, width
    for ratio in ASPECT_SIZES if area > own else ():
        across, down = map(int, ratio.split(":"))
        if Fraction(width, height) == Fraction(across, down):
            return ratio
    sides = f"multiples of {pixels.multiple}, of at most {LARGER * own} pixels in all"
    raise InputError(f"size {size} cannot be painted: give {sides}, or a ratio of {_ratios()}")


def _ratios() -> str:
    return ", ".join(ASPECT_SIZES)


def seed_or_new(seed: int | None) -> int:
    """The seed that is given, or a new one, which the answer says."""
    return secrets.randbits(32) if seed is None else seed


async def until_gone(receive: Receive, ticket: Ticket, work: Awaitable[T]) -> T:
    """What `work` gives; a client that leaves stops it. The ticket is closed at the end."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(left(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has left")  # nobody reads it
        return task.result()
    finally:
        ticket.close()
        for each in (task, gone):
            each.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await each


async def left(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass

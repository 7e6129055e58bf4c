"""A request between the event loop and the threads that serve it.

It lives in the loop; threads hand it updates by `post`, so it needs no lock.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TypeVar

from lavit.generate.options import PictureSize
from lavit.generate.pipeline import Pipeline
from lavit.generate.runner import Work
from lavit.generate.stream import Update
from lavit.serve.errors import too_slow

T = TypeVar("T")


@dataclass(frozen=True)
class Order:
    """What a request asks for: `make` gives work of one job, which is done `n` times.

    Choice c has the seed of the job + c. `steps` and `size` say how pictures are painted, with
    `previews` of so many steps.
    """

    make: Callable[[Pipeline], Work]
    n: int = 1
    steps: int | None = None
    size: PictureSize | None = None
    previews: int = 0


@dataclass(frozen=True)
class PromptSize:
    """Tokens of a prompt by kind; the marks around pictures count as text."""

    text: int
    image: int


class Ticket:
    """A request on its way: an asynchronous iterator of updates, whose `input` is the choice.

    `left` is called when it is closed; after `seconds` it fails. An image comes twice: written,
    with its codes alone, and painted. `finished` comes behind the last picture of its choice.
    Whoever opens a ticket closes it.
    """

    def __init__(self, order: Order, seconds: float, left: Callable[[Ticket], None]) -> None:
        self.order, self.left = order, left
        self.loop = asyncio.get_running_loop()
        self.accepted: asyncio.Future[PromptSize] = self.loop.create_future()
        self.started = time.monotonic()
        self.begun = False  # a token came
        self.closed = False
        self._found: asyncio.Queue[Update | Exception] = asyncio.Queue()
        self._open = order.n
        self._unpainted: Counter[int] = Counter()
        self._last: dict[int, Update] = {}
        self._timer = self.loop.call_later(seconds, lambda: self.fail(too_slow(seconds)))

    async def __aiter__(self) -> AsyncIterator[Update]:
        while self._open:
            found = await self._found.get()
            if isinstance(found, Exception):
                raise found
            self._open -= found.kind == "finished"
            yield found

    def close(self) -> None:
        """Free what the request holds; after its end that is nothing."""
        if not self.closed:
            self.closed = True
            self._timer.cancel()
            self.accepted.cancel()
            self.left(self)

    def fail(self, error: Exception) -> None:
        """End with an error. In the event loop, as the next two."""
        if not self.accepted.done():
            self.accepted.set_exception(error)
        self._found.put_nowait(error)

    def accept(self, prompt: PromptSize) -> None:
        """The prompt is laid out and in the queue."""
        if not self.accepted.done():
            self.accepted.set_result(prompt)

    def take(self, update: Update) -> None:
        """Something happened."""
        choice = update.input
        if update.kind == "image":
            self._unpainted[choice] += 1 if update.picture is None else -1
        if update.kind == "finished" and self._unpainted[choice]:
            self._last[choice] = update
            return
        self._found.put_nowait(update)
        if choice in self._last and not self._unpainted[choice]:
            self._found.put_nowait(self._last.pop(choice))

    def post(self, method: Callable[[T], None], value: T) -> None:
        """Call one of the three above from another thread."""
        if not self.closed:
            try:
                self.loop.call_soon_threadsafe(method, value)
            except RuntimeError:  # the loop is closed
                self.closed = True

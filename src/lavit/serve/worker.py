"""One session of the engine for all requests, in a thread; pictures are painted in batches beside.

    open ── order ──▶ engine thread: lay out, add, step ── updates ──▶ tickets ──▶ answers
                         │ codes of written pictures                      ▲
                         └──▶ painter thread: batches ── pictures ────────┘

Both threads hand updates to the event loop, where tickets live, and nothing blocks it. Prompts are
laid out by the engine's thread: a text tokenizer must not be used by two at a time.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

import torch

from lavit.config import InputError
from lavit.generate.pipeline import Pipeline
from lavit.generate.request import Request
from lavit.generate.runner import reseeded
from lavit.generate.stream import Running, Update
from lavit.serve.errors import stopping
from lavit.serve.limits import Limits
from lavit.serve.metrics import ServerMetrics
from lavit.serve.painter import PainterThread, Painting
from lavit.serve.ticket import Order, PromptSize, Ticket

T = TypeVar("T")
TAKEN = 4  # prompts laid out between two steps at most, so that what runs does not stand still


class Worker:
    """The threads of a pipeline. `open`, `call` and `stop` are for the event loop."""

    def __init__(self, pipeline: Pipeline, limits: Limits, metrics: ServerMetrics) -> None:
        self.pipeline, self.limits, self.metrics = pipeline, limits, metrics
        self.running = self._session()
        self.painter = PainterThread(pipeline, metrics)
        self.tickets: set[Ticket] = set()
        self._entries: dict[int, tuple[Ticket, int, int]] = {}  # ticket, choice, seed of a number
        self._wake = threading.Condition()
        self._calls: deque[tuple[Callable[[], None], Callable[[Exception], None]]] = deque()
        self._left: list[Ticket] = []
        self._stopped = False
        metrics.watch("lanes", "rows of the batch that are taken", lambda: self.lanes)
        metrics.watch("waiting", "jobs that wait for a lane", lambda: self.waiting)
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def lanes(self) -> int:
        """Rows of the batch that are taken."""
        return self.running.session.lanes

    @property
    def waiting(self) -> int:
        """Jobs that wait for a lane."""
        return len(self._calls) + len(self.running.session.waiting)

    async def open(self, order: Order) -> tuple[Ticket, PromptSize]:
        """Begin a request; returns when its prompt is laid out, or raises what is wrong with it."""
        if self._stopped:
            raise stopping()
        ticket = Ticket(order, self.limits.seconds, self.leave)
        self.tickets.add(ticket)
        self._hand(lambda: self._begin(ticket), ticket.fail)
        try:
            return ticket, await ticket.accepted
        except BaseException:
            ticket.close()
            raise

    async def call(self, function: Callable[[Pipeline], T]) -> T:
        """What a function of the pipeline gives, called between two steps."""
        if self._stopped:
            raise stopping()
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return  # nobody waits any more
            try:
                future.set_result(function(self.pipeline))
            except Exception as error:
                future.set_exception(error)

        def fail(error: Exception) -> None:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

        self._hand(run, fail)
        return await asyncio.wrap_future(future)

    def leave(self, ticket: Ticket) -> None:
        """A ticket is closed: its lanes are free from the step after the next."""
        self.tickets.discard(ticket)
        with self._wake:
            self._left.append(ticket)
            self._wake.notify()

    def stop(self) -> None:
        """End every request with an error, and the threads."""
        for ticket in list(self.tickets):
            ticket.fail(stopping())
        with self._wake:
            self._stopped = True
            while self._calls:
                self._calls.popleft()[1](stopping())
            self._wake.notify()
        self.painter.stop()

    def join(self) -> None:
        """Wait for the threads to end."""
        self._thread.join()
        self.painter.join()

    def _session(self) -> Running:
        return Running(self.pipeline.engine, self.pipeline.model.text_tokenizer)

    def _hand(self, call: Callable[[], None], fail: Callable[[Exception], None]) -> None:
        """Let the engine's thread call; `fail` is told if it never will."""
        with self._wake:
            self._calls.append((call, fail))
            self._wake.notify()

    def _something(self) -> bool:
        return bool(self._stopped or self.running.busy or self._calls or self._left)

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(self._something)
                if self._stopped:
                    return
                left, self._left = self._left, []
                calls = [self._calls.popleft()[0] for _ in range(min(TAKEN, len(self._calls)))]
            try:
                self._turn(left, calls)
            except Exception as error:  # of the engine: nothing that runs can go on
                broken = RuntimeError(f"the engine failed: {error}")  # whatever it is, no client's
                broken.__cause__ = error
                tickets = {entry[0] for entry in self._entries.values()}
                self._entries.clear()
                self.running = self._session()  # before anybody hears of it
                for ticket in tickets:
                    ticket.post(ticket.fail, broken)

    def _turn(self, left: list[Ticket], calls: list[Callable[[], None]]) -> None:
        """Drop who left, take who came, and one step."""
        for ticket in left:
            for number in [n for n, entry in self._entries.items() if entry[0] is ticket]:
                self.running.cancel(number)
                del self._entries[number]
        for call in calls:
            call()
        for update in self.running.step() if self.running.busy else ():
            self._route(update)

    def _begin(self, ticket: Ticket) -> None:
        if ticket.closed:
            return
        order = ticket.order
        try:
            (job,) = order.make(self.pipeline).jobs
            prompt = self._counted(job.request)
            for choice in range(order.n):
                again = reseeded(job, choice)
                number = self.running.add(again)
                self._entries[number] = (ticket, choice, again.request.seed)
        except Exception as error:
            ticket.post(ticket.fail, error)
            return
        ticket.post(ticket.accept, prompt)
        self.metrics.tokens.labels("in", "text").inc(prompt.text)
        self.metrics.tokens.labels("in", "image").inc(prompt.image)

    def _counted(self, request: Request) -> PromptSize:
        total, most = len(request.ids), self.limits.prompt_tokens
        if total > most:
            raise InputError(f"the prompt has {total} tokens, at most {most} are taken: shorten it")
        read = self.running.vocabulary.is_code(torch.tensor(request.ids, dtype=torch.long))
        if request.slots:
            read |= torch.tensor(request.slots)
        image = int(read.sum())
        return PromptSize(total - image, image)

    def _route(self, update: Update) -> None:
        number = update.input
        ticket, choice, seed = self._entries[number]
        update = replace(update, input=choice)
        if not ticket.begun:
            ticket.begun = True
            self.metrics.first.observe(time.monotonic() - ticket.started)
        if update.kind == "code":  # a client sees pictures
            return
        ticket.post(ticket.take, update)
        if update.kind == "image":
            self.metrics.tokens.labels("out", "image").inc(len(update.codes))
            self.painter.add(Painting(ticket, update, seed))
        elif update.kind == "finished":
            self.metrics.tokens.labels("out", "text").inc(update.tokens)
            del self._entries[number]

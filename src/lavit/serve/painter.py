"""The painter's thread: written pictures of all requests, painted in batches."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from lavit.generate.pipeline import Pipeline
from lavit.generate.runner import TOGETHER
from lavit.generate.safety import Refused
from lavit.generate.stream import Update
from lavit.serve.metrics import ServerMetrics
from lavit.serve.ticket import Ticket


@dataclass(frozen=True, eq=False)
class Painting:
    """A picture that is written (`update`) and to be painted for a ticket."""

    ticket: Ticket
    update: Update
    seed: int

    @property
    def how(self) -> tuple[Any, Any]:
        """What must be the same in one batch."""
        return self.ticket.order.steps, self.ticket.order.size


class PainterThread:
    """Paints what is added, oldest first, together with what is painted alike."""

    def __init__(self, pipeline: Pipeline, metrics: ServerMetrics) -> None:
        self.pipeline, self.metrics = pipeline, metrics
        self._wake = threading.Condition()
        self._queue: deque[Painting] = deque()
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="painter", daemon=True)
        self._thread.start()

    def add(self, painting: Painting) -> None:
        """Queue a picture."""
        with self._wake:
            self._queue.append(painting)
            self._wake.notify()

    def stop(self) -> None:
        """End the thread after the batch that it paints."""
        with self._wake:
            self._stopped = True
            self._wake.notify()

    def join(self) -> None:
        """Wait for the thread to end."""
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stopped or bool(self._queue))
                if self._stopped:
                    return
                waiting = [each for each in self._queue if not each.ticket.closed]
                batch = [each for each in waiting if each.how == waiting[0].how][:TOGETHER]
                self._queue = deque(each for each in waiting if each not in batch)
            if batch:
                self._paint(batch)

    def _paint(self, batch: list[Painting]) -> None:
        steps, size = batch[0].how
        codes = [torch.tensor(each.update.codes) for each in batch]
        how = {"seeds": [each.seed for each in batch], "steps": steps, "size": size}
        try:
            for step, latents in enumerate(self.pipeline.denoise(codes, **how)):
                if self._stopped or all(each.ticket.closed for each in batch):
                    return
                self._show(batch, step, latents)
            pictures: list[Image | None] = [*self.pipeline.finish(latents, how["seeds"])]
        except Refused as refused:
            pictures = list(refused.pictures)
        except Exception as error:
            for each in batch:
                each.ticket.post(each.ticket.fail, error)
            return
        for each, picture in zip(batch, pictures, strict=True):
            ticket = each.ticket
            if picture is None:
                ticket.post(ticket.fail, Refused([None], [each.seed]))
                continue
            self.metrics.picture.observe(time.monotonic() - ticket.started)
            ticket.post(ticket.take, replace(each.update, picture=picture))

    def _show(self, batch: list[Painting], step: int, latents: Tensor) -> None:
        """Post what is to be seen after a solver's step."""
        steps = batch[0].how[0] or self.pipeline.model.pixels.config.steps
        for row, each in enumerate(batch):
            if step in preview_steps(each.ticket.order.previews, steps):
                (picture,) = self.pipeline.preview(latents[row : row + 1])
                seen = replace(each.update, kind="preview", picture=picture, step=step)
                each.ticket.post(each.ticket.take, seen)


def preview_steps(count: int, steps: int) -> list[int]:
    """After which of the solver's steps 0, 1, … a preview is shown: evenly, none after the last."""
    wanted = {(number + 1) * steps // (count + 1) - 1 for number in range(count)}
    return sorted(wanted & {*range(steps - 1)})

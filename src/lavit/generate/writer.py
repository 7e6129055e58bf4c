"""One sample being written: a small state machine over joint ids.

    text ──image start──▶ image ──image end──▶ text          (mode "mixed"; "text" and "image" stay where they begin)

Inside an image under guidance a writer has two lanes, the conditional and the unconditional one, and feeds both the
same id. The unconditional lane is opened empty with image start and closed with image end.
"""

from __future__ import annotations

import torch

from lavit.generate.request import Event, Kind, Reason, Request
from lavit.generate.sampling import Sampling
from lavit.vocabulary import Vocabulary


class Writer:
    """Sample `sample` of request `number`. `moves` says what its lanes read next: (old lane or -1, joint id) each."""

    def __init__(
        self,
        number: int,
        sample: int,
        request: Request,
        vocabulary: Vocabulary,
        generator: torch.Generator,
        room: int,
    ) -> None:
        self.number = number
        self.sample = sample
        self.request = request
        self.vocabulary = vocabulary
        self.generator = generator
        self.room = room  # tokens that still fit into the context
        self.inside = request.mode == "image"
        self.guided = request.mode != "text" and request.inside.guidance != 1
        self.images = int(self.inside)
        self.written = 0  # text ids
        self.codes = 0  # of the image that is open
        self.stops = {vocabulary.end, *request.stop}
        self.moves: list[tuple[int, int]] = []

    @property
    def lanes(self) -> int:
        """Lanes held at the moment."""
        return 2 if self.inside and self.guided else 1

    @property
    def sampling(self) -> Sampling:
        """How the next id is drawn."""
        return self.request.inside if self.inside else self.request.sampling

    @property
    def may_open(self) -> bool:
        """True where the next id may be image start: the mode allows it and the context has room for a shortest image."""
        open_ = self.request.mode == "mixed" and not self.inside and self.images < self.request.images
        return open_ and self.room > self.request.inside.min_tokens

    def forbidden(self) -> list[int]:
        """Joint ids that may not come next although their modality may."""
        if self.inside:
            return [self.vocabulary.image_end] if self.codes < self.sampling.min_tokens else []
        return sorted(self.stops) if self.written < self.sampling.min_tokens else []

    def forced(self) -> int | None:
        """The id that must come next, whatever the LM says."""
        return self.vocabulary.image_end if self.inside and self.codes == self.sampling.max_tokens else None

    def open(self) -> list[Event]:
        """Events before the first id."""
        return [self._event("image_start", self.vocabulary.image_start)] if self.inside else []

    def take(self, id: int) -> list[Event]:
        """Go on with joint id `id`: set `moves` (empty when finished) and return what happened."""
        self.moves = []
        if self.inside:
            return self._take_inside(id)
        if id in self.stops:
            return [self._finished("end")]
        if id == self.vocabulary.image_start:
            self.inside, self.codes = True, 0
            self.images += 1
            return [self._event("image_start", id), *self._feed(id, opening=True)]
        self.written += 1
        event = self._event("text", id)
        if self.written == self.sampling.max_tokens:
            return [event, self._finished("length")]
        return [event, *self._feed(id)]

    def _take_inside(self, id: int) -> list[Event]:
        if id == self.vocabulary.image_end:
            event = self._event("image_end", id)
            if self.request.mode == "image":
                return [event, self._finished("end")]
            self.inside = False
            return [event, *self._feed(id)]
        self.codes += 1
        event = self._event("code", id)
        if self.request.mode == "image" and self.codes == self.sampling.max_tokens:
            return [
                event,
                self._event("image_end", self.vocabulary.image_end),
                self._finished("length"),
            ]
        return [event, *self._feed(id)]

    def _feed(self, id: int, *, opening: bool = False) -> list[Event]:
        if self.room <= 0:
            end = [self._event("image_end", self.vocabulary.image_end)] if self.inside else []
            return [*end, self._finished("context")]
        self.room -= 1
        self.moves = [(0, id)]
        if self.lanes == 2:
            self.moves.append((-1 if opening else 1, id))
        return []

    def _event(self, kind: Kind, id: int) -> Event:
        return Event(self.number, self.sample, kind, id)

    def _finished(self, reason: Reason) -> Event:
        return Event(self.number, self.sample, "finished", reason=reason)

"""What is being written: one continuation in joint ids, or the beams of a text.

    text ──image start──▶ image ──image end──▶ text   (mode "mixed"; others stay as they begin)

Both have `moves`, what their lanes read next: (old lane or -1, joint id) each; none when all is
done. A guided image has two lanes that read the same ids; the unconditional one is opened empty,
with image start.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lavit.generate.request import Event, EventKind, Reason, Request
from lavit.generate.sampling import Sampling
from lavit.vocabulary import Vocabulary

UNLIKELY = -1e9  # score of the beams that stand for nothing before the first step


class Writer:
    """What follows request `number`: a small state machine; `room` tokens fit the context."""

    def __init__(self, number: int, request: Request, vocabulary: Vocabulary, room: int) -> None:
        self.number, self.request = number, request
        self.vocabulary, self.room = vocabulary, room
        self.generator = torch.Generator().manual_seed(request.seed)
        self.inside = request.mode == "image"
        self.most_lanes = 1 + request.guided
        self.images = int(self.inside)
        self.written = 0  # text ids
        self.codes = 0  # of the image that is open
        self.stops = {vocabulary.end, *request.stop}
        self.moves: list[tuple[int, int]] = []

    @property
    def lanes(self) -> int:
        """Lanes held at the moment."""
        return self.most_lanes if self.inside else 1

    @property
    def sampling(self) -> Sampling:
        """How the next id is drawn."""
        return self.request.inside if self.inside else self.request.sampling

    @property
    def may_open(self) -> bool:
        """True where the next id may be image start: the context has room for a shortest image."""
        allowed = self.request.mode == "mixed" and self.images < self.request.images
        return allowed and not self.inside and self.room > self.request.inside.min_tokens

    def forbidden(self) -> list[int]:
        """Joint ids that may not come next although their modality may."""
        if self.inside:
            return [self.vocabulary.image_end] if self.codes < self.sampling.min_tokens else []
        return sorted(self.stops) if self.written < self.sampling.min_tokens else []

    def forced(self) -> int | None:
        """The id that must come next, whatever the LM says."""
        full = self.inside and self.codes == self.sampling.max_tokens
        return self.vocabulary.image_end if full else None

    def take(self, id: int) -> list[Event]:
        """Go on with joint id `id`: set `moves` and return what happened."""
        self.moves = []
        start, end = self.vocabulary.image_start, self.vocabulary.image_end
        kind: EventKind = "code" if self.inside else "text"
        if kind == "text" and id in self.stops:
            return [self._event("finished", reason="end")]
        if id == start:
            kind, self.inside, self.codes = "image_start", True, 0
            self.images += 1
        elif id == end:
            kind, self.inside = "image_end", False
        elif self.inside:
            self.codes += 1
        else:
            self.written += 1
        events = [self._event(kind, id)]
        reason = self._reason(kind)
        if reason is None:
            self.room -= 1
            self.moves = [(0, id), (-1 if id == start else 1, id)][: self.lanes]
            return events
        if self.inside:
            events.append(self._event("image_end", end))
        return [*events, self._event("finished", reason=reason)]

    def _reason(self, kind: EventKind) -> Reason | None:
        """Why all is done after an id of this kind; None where it goes on."""
        alone = self.request.mode == "image"
        if alone and kind == "image_end":
            return "end"
        count = self.codes if alone else self.written if kind == "text" else 0
        if count == self.sampling.max_tokens:
            return "length"
        return "context" if self.room <= 0 else None

    def _event(self, kind: EventKind, id: int | None = None, reason: Reason | None = None) -> Event:
        return Event(self.number, kind, id, reason)


class Embeddings:
    """A picture of a rival that writes embeddings (`Language.embeds`): what a lane predicts is what
    it reads next, a fixed number of times.
    """

    inside = True
    lanes = most_lanes = 1

    def __init__(self, number: int, count: int, vocabulary: Vocabulary) -> None:
        self.number, self.left, self.vocabulary = number, count, vocabulary
        self.moves: list[tuple[int, Tensor]] = []

    def take(self, embedding: Float[Tensor, "width"]) -> list[Event]:
        """Go on with an embedding: set `moves` and return what happened."""
        self.left -= 1
        self.moves = [(0, embedding)] if self.left else []
        events = [Event(self.number, "code", embedding=embedding)]
        if not self.left:
            events.append(Event(self.number, "image_end", self.vocabulary.image_end))
            events.append(Event(self.number, "finished", reason="end"))
        return events


class Beams:
    """Beam search of one request, a lane a beam, as `transformers.generate(num_beams=…)` has it.

    Each step ranks the continuations of all beams by summed log-probability. Those that end, if
    they rank among the first `beams`, become answers with score log-probability / length **
    penalty (the end counts as a token); the best `beams` of those that go on are the next beams.
    The best answer is what is written.
    """

    inside = False  # text only

    def __init__(self, number: int, request: Request, vocabulary: Vocabulary, room: int) -> None:
        self.number, self.sampling = number, request.sampling
        self.lanes = self.most_lanes = request.sampling.beams
        self.limit = min(self.sampling.max_tokens, room + 1)  # the last id is not read any more
        self.cut: Reason = "length" if self.limit == self.sampling.max_tokens else "context"
        self.stops = sorted({vocabulary.end, *request.stop})
        self.scores = torch.tensor([0.0] + [UNLIKELY] * (self.lanes - 1))
        self.ids: list[tuple[int, ...]] = [()] * self.lanes
        self.answers: list[tuple[float, tuple[int, ...], Reason]] = []  # best first; without ends
        self.moves: list[tuple[int, int]] = []

    def take(self, logits: Float[Tensor, "beams text"]) -> list[Event]:
        """Extend the beams by one id: set `moves`; returns the best answer when all is done."""
        length = len(self.ids[0]) + 1
        log_p = logits.float().log_softmax(-1)
        if length <= self.sampling.min_tokens:
            log_p[:, self.stops] = -torch.inf
        total = log_p + self.scores.to(log_p.device)[:, None]
        count = min((1 + len(self.stops)) * self.lanes, total.numel())
        best, flat = (found.tolist() for found in total.flatten().topk(count))
        size = logits.shape[-1]
        ranked = [(score, at // size, at % size) for score, at in zip(best, flat, strict=True)]
        for score, parent, id in ranked[: self.lanes]:
            ends = id in self.stops
            if score >= UNLIKELY / 2 and (ends or length == self.limit):
                ids = self.ids[parent] if ends else (*self.ids[parent], id)
                score /= length**self.sampling.length_penalty
                self.answers.append((score, ids, "end" if ends else self.cut))
        self.answers = sorted(self.answers, key=lambda answer: -answer[0])[: self.lanes]
        going = [found for found in ranked if found[2] not in self.stops][: self.lanes]
        self.scores = torch.tensor([score for score, _, _ in going])
        self.ids = [(*self.ids[parent], id) for _, parent, id in going]
        self.moves = [(parent, id) for _, parent, id in going]
        if length < self.limit and not self._settled(length):
            return []
        self.moves = []
        score, ids, reason = self.answers[0]
        events = [Event(self.number, "text", id) for id in ids]
        return [*events, Event(self.number, "finished", reason=reason, score=score)]

    def _settled(self, length: int) -> bool:
        """True where no running beam changes the answers any more, by `early_stopping`.

        True: at once; False: when the best beam, scored at its present length, does not beat the
        worst answer; "never": when it could not at max_tokens either.
        """
        stopping, penalty = self.sampling.early_stopping, self.sampling.length_penalty
        if len(self.answers) < self.lanes:
            return False
        if stopping is True:
            return True
        far = stopping == "never" and penalty > 0  # a positive penalty favours length
        best = float(self.scores[0]) / (self.limit if far else length) ** penalty
        return best <= self.answers[-1][0]

"""Beam search over text, with the meaning that `transformers.generate(num_beams=…)` gives to its options.

Each step ranks the continuations of all beams by summed log-probability. Those that end, if they rank among the first
`beams`, become answers with score log-probability / length ** penalty (the end counts as a token); the best `beams` of
those that go on are the next beams. It stops at max_tokens, or with `beams` answers as `early_stopping` says:
True at once; False when the best beam, scored at its present length, does not beat the worst answer; "never" when it
could not at max_tokens either (a positive penalty favours length).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lavit.generate.request import Event, Reason, Request
from lavit.vocabulary import Vocabulary

UNLIKELY = -1e9  # score of the beams that stand for nothing before the first step


@dataclass(frozen=True)
class Answer:
    """A finished beam; `ids` without the end."""

    score: float
    ids: tuple[int, ...]
    reason: Reason


class Beams:
    """The beams of one request, one lane each. `moves` as in `Writer`."""

    inside = False  # text only

    def __init__(self, number: int, request: Request, vocabulary: Vocabulary, room: int) -> None:
        self.number = number
        self.request = request
        self.sampling = request.sampling
        self.width = request.sampling.beams
        self.limit = min(self.sampling.max_tokens, room + 1)  # the last id is not read any more
        self.cut: Reason = "length" if self.limit == self.sampling.max_tokens else "context"
        self.stops = sorted({vocabulary.end, *request.stop})
        self.scores = torch.tensor([0.0] + [UNLIKELY] * (self.width - 1))
        self.ids: list[tuple[int, ...]] = [()] * self.width
        self.answers: list[Answer] = []
        self.moves: list[tuple[int, int]] = []

    @property
    def lanes(self) -> int:
        """Lanes held at the moment."""
        return self.width

    def take(self, logits: Float[Tensor, "beams text"]) -> list[Event]:
        """Extend the beams by one id: set `moves` (empty when finished) and return the answers at the end."""
        steps = len(self.ids[0])
        log_p = logits.float().log_softmax(-1)
        if steps < self.sampling.min_tokens:
            log_p[:, self.stops] = -torch.inf
        total = log_p + self.scores.to(log_p.device)[:, None]
        count = min(max(2, 1 + len(self.stops)) * self.width, total.numel())
        best, flat = total.flatten().topk(count)
        size = logits.shape[-1]
        ranked = zip(best.tolist(), flat.tolist(), strict=True)
        candidates = [(score, index // size, index % size) for score, index in ranked]
        self._answer(candidates[: self.width], steps + 1)
        going = [c for c in candidates if c[2] not in self.stops][: self.width]
        self.scores = torch.tensor([score for score, _, _ in going])
        self.ids = [(*self.ids[parent], id) for _, parent, id in going]
        self.moves = [(parent, id) for _, parent, id in going]
        if steps + 1 == self.limit or self._settled(steps + 1):
            self.moves = []
            return self._events()
        return []

    def _answer(self, candidates: list[tuple[float, int, int]], length: int) -> None:
        for score, parent, id in candidates:
            ends = id in self.stops
            if score < UNLIKELY / 2:  # the beam stands for nothing
                continue
            if ends or length == self.limit:
                ids = self.ids[parent] if ends else (*self.ids[parent], id)
                reason: Reason = "end" if ends else self.cut
                self.answers.append(Answer(score / length**self.sampling.length_penalty, ids, reason))
        self.answers = sorted(self.answers, key=lambda answer: -answer.score)[: self.width]

    def _settled(self, length: int) -> bool:
        if len(self.answers) < self.width:
            return False
        if self.sampling.early_stopping is True:
            return True
        penalty = self.sampling.length_penalty
        final = self.limit if self.sampling.early_stopping == "never" and penalty > 0 else length
        return float(self.scores[0]) / final**penalty <= self.answers[-1].score

    def _events(self) -> list[Event]:
        events = []
        for sample, answer in enumerate(self.answers[: self.sampling.n]):
            events += [Event(self.number, sample, "text", id) for id in answer.ids]
            events.append(Event(self.number, sample, "finished", reason=answer.reason, score=answer.score))
        return events

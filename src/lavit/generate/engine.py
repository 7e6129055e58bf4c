"""The engine: many requests for text and images in one batch of lanes. Tokens only: no files, prompts or HTTP.

Each step reads one id per lane in one forward, for text lanes, image lanes and their unconditional twins alike:

    read      one forward over all lanes (`decoder.step`)
    admit     prompts that wait are read once each, in one padded batch, and their samples get lanes
    choose    logits of the modality each lane is in, guidance (paper Eq. 7), one id per sample, events

A sample draws from its own generator and its lanes attend to their own past, so its tokens do not depend on the batch
that it happens to run in (up to the rounding of the products).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lavit.generate.beam import Beams
from lavit.generate.cache import LaneCache
from lavit.generate.decoder import Decoder
from lavit.generate.packed import decoder_for
from lavit.generate.request import Completion, Event, Request, collect
from lavit.generate.sampling import choose, guide
from lavit.generate.writer import Writer
from lavit.modules.language import Language

LANES = 32  # rows of one forward at most, unless a single request needs more
STATIC_COLUMNS = 256  # static caches are multiples of this


class Engine:
    """Generation with one language model. Reads the weights when built: build a new one after training.

    `compile` names a `torch.compile` backend for the plain step (`decoder_for`). `decoder` overrides the choice.
    """

    def __init__(
        self,
        language: Language,
        *,
        lanes: int = LANES,
        compile: str | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        self.language = language
        self.vocabulary = language.vocabulary
        self.lanes = lanes
        self.decoder = decoder or decoder_for(language, compile=compile)

    def session(self) -> Session:
        """An empty batch that takes requests at any time."""
        return Session(self)

    def generate(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Yield events as they happen; closing the iterator between two steps stops everything.

        Raises `InputError` for a request that the LM cannot serve, before anything is generated.
        """
        session = self.session()
        for request in requests:
            session.add(request)
        while session.busy:
            yield from session.step()

    def complete(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """Run to the end: the n completions of each request."""
        done = collect(self.generate(requests), self.vocabulary)
        return [[done[number, i] for i in range(request.sampling.n)] for number, request in enumerate(requests)]


class Session:
    """The requests that run at the moment. `add` and `cancel` may come between any two steps."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.decoder = engine.decoder
        self.vocabulary = engine.vocabulary
        self.waiting: deque[tuple[int, Request]] = deque()
        self.streams: list[Writer | Beams] = []
        self.memory: LaneCache | None = None
        self._numbers = 0
        self._layout: list[int] = []  # lanes of each stream in the cache, in the order of streams
        visual = torch.arange(self.vocabulary.image_start, self.vocabulary.size)
        self._writing_ids = visual[self.vocabulary.writing]

    @property
    def busy(self) -> bool:
        """True while anything waits or runs."""
        return bool(self.waiting or self.streams)

    def add(self, request: Request) -> int:
        """Queue a request; returns its number, which its events carry. Raises `InputError` if it cannot be served."""
        request.check(self.vocabulary, self.decoder.context)
        self.waiting.append((self._numbers, request))
        self._numbers += 1
        return self._numbers - 1

    def cancel(self, number: int, sample: int | None = None) -> None:
        """Drop a request, or one running sample of it (beams stay together); no more events of it come."""
        if sample is None:
            self.waiting = deque(item for item in self.waiting if item[0] != number)
        for stream in self.streams:
            if stream.number == number and sample in (None, getattr(stream, "sample", None)):
                stream.moves = []

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Read, admit, choose: one id for every sample. Returns what happened."""
        hidden = self._read()
        hidden, events = self._admit(hidden)
        if hidden is not None:
            events += self._choose(hidden)
        return events

    def _read(self) -> Float[Tensor, "lanes width"] | None:
        parents, ids, at = [], [], 0
        for stream, lanes in zip(self.streams, self._layout, strict=True):
            parents += [at + lane if lane >= 0 else -1 for lane, _ in stream.moves]
            ids += [id for _, id in stream.moves]
            at += lanes
        self.streams = [stream for stream in self.streams if stream.moves]
        self._layout = [len(stream.moves) for stream in self.streams]
        if not ids:
            self.memory = None
            return None
        assert self.memory is not None
        self.memory.keep(parents)
        return self.decoder.step(torch.tensor(ids, device=self.decoder.device), self.memory)

    def _admit(
        self, hidden: Float[Tensor, "lanes width"] | None
    ) -> tuple[Float[Tensor, "more_lanes width"] | None, list[Event]]:
        """Read the prompts that there is room for, each once, and give lanes to their samples."""
        used = sum(stream.request.lanes for stream in self.streams if isinstance(stream, Beams))
        used += sum(1 + stream.guided for stream in self.streams if isinstance(stream, Writer))
        admitted: list[tuple[int, Request]] = []
        while self.waiting and (used == 0 or used + self.waiting[0][1].lanes <= self.engine.lanes):
            used += self.waiting[0][1].lanes
            admitted.append(self.waiting.popleft())
        if not admitted:
            return hidden, []
        memory, last = self._prefill([request for _, request in admitted])
        rows: list[int] = []
        events: list[Event] = []
        for row, (number, request) in enumerate(admitted):
            for stream in self._streams(number, request):
                own = [row, len(admitted)][: stream.lanes] if isinstance(stream, Writer) else [row] * stream.lanes
                rows += own
                self.streams.append(stream)
                self._layout.append(len(own))
                events += stream.open() if isinstance(stream, Writer) else []
        memory.keep(rows)
        last = last[rows]
        if self.memory is None or hidden is None:
            self.memory = memory
            return last, events
        self.memory.join(memory)
        return torch.cat([hidden, last]), events

    def _streams(self, number: int, request: Request) -> list[Writer] | list[Beams]:
        room = self.decoder.context - len(request.ids) - (request.mode == "image")
        if request.sampling.beams > 1:
            return [Beams(number, request, self.vocabulary, room)]
        return [
            Writer(number, sample, request, self.vocabulary, generator, room)
            for sample, generator in enumerate(request.sampling.generators())
        ]

    def _prefill(self, requests: list[Request]) -> tuple[LaneCache, Float[Tensor, "prompts width"]]:
        """Prompts in order; behind them the unconditional one, a bare image start, if any of them is guided."""
        start = self.vocabulary.image_start
        prompts = [(*request.ids, *([start] * (request.mode == "image"))) for request in requests]
        slots = [request.slots for request in requests]
        if any(request.mode == "image" and request.inside.guidance != 1 for request in requests):
            prompts.append((start,))
            slots.append(())
        longest = max(map(len, prompts))
        device = self.decoder.device
        ids = torch.full((len(prompts), longest), self.vocabulary.end)
        marks = torch.zeros(ids.shape, dtype=torch.bool)
        for row, (prompt, marked) in enumerate(zip(prompts, slots, strict=True)):
            ids[row, : len(prompt)] = torch.tensor(prompt)
            marks[row, : len(marked)] = torch.tensor(marked, dtype=torch.bool)
        features = [request.features for request in requests if request.features is not None]
        embeddings = self.engine.language.embed(
            ids.to(device),
            slots=marks.to(device),
            features=torch.cat(features).to(device) if features else None,
        )
        columns = longest + 1
        if self.decoder.static:  # room for all that may come, in few sizes, because each is compiled anew
            most = max(map(_most, requests))
            columns = min(-(-(longest + most) // STATIC_COLUMNS) * STATIC_COLUMNS, max(self.decoder.context, longest))
        return self.decoder.prefill(embeddings, [len(prompt) for prompt in prompts], columns)

    def _choose(self, hidden: Float[Tensor, "lanes width"]) -> list[Event]:
        """One id for every sample, and what comes of it."""
        logits = self._logits(hidden)
        chosen = self._draw(logits)
        events: list[Event] = []
        for place, stream in enumerate(self.streams):
            events += stream.take(logits[place]) if isinstance(stream, Beams) else stream.take(chosen[place])
        return events

    def _logits(self, hidden: Float[Tensor, "lanes width"]) -> dict[int, Float[Tensor, "rows allowed"]]:
        """Logits of each stream, by its place: text ids outside images, image end and codes (guided) inside."""
        found: dict[int, Tensor] = {}
        lanes = torch.arange(len(hidden)).split(self._layout)
        for inside, head in (
            (False, self.decoder.text_logits),
            (True, self.decoder.writing_logits),
        ):
            places = [place for place, stream in enumerate(self.streams) if stream.inside == inside]
            if not places:
                continue
            mine = torch.cat([lanes[place] for place in places])
            logits = head(hidden if len(mine) == len(hidden) else hidden[mine.to(hidden.device)])
            for place, own in zip(places, logits.split([self._layout[place] for place in places]), strict=True):
                stream = self.streams[place]
                if inside and len(own) == 2:
                    own = guide(own[:1], own[1:], own.new_tensor([stream.sampling.guidance]))
                elif isinstance(stream, Writer) and stream.may_open:
                    own = torch.cat([own, self.decoder.start_logits(hidden[lanes[place]])], -1)
                found[place] = own
        return found

    def _draw(self, logits: dict[int, Float[Tensor, "rows allowed"]]) -> dict[int, int]:
        """The next joint id of each writer, by its place; writers that draw alike are drawn together."""
        chosen: dict[int, int] = {}
        groups: dict[tuple, list[tuple[int, Writer]]] = {}
        for place, stream in enumerate(self.streams):
            if isinstance(stream, Writer):
                forced = stream.forced()
                if forced is None:
                    key = (stream.inside, stream.may_open, stream.sampling.drawing)
                    groups.setdefault(key, []).append((place, stream))
                else:
                    chosen[place] = forced
        for members in groups.values():
            together = torch.cat([logits[place] for place, _ in members])
            for row, (_, stream) in enumerate(members):
                if forbidden := stream.forbidden():
                    allowed = self._writing_ids if stream.inside else torch.arange(together.shape[-1])
                    hidden = torch.isin(allowed, torch.tensor(forbidden))
                    together[row, hidden.to(together.device)] = -torch.inf
            sampling, inside = members[0][1].sampling, members[0][1].inside
            index = choose(together, sampling, [stream.generator for _, stream in members]).cpu()
            ids = self._writing_ids[index] if inside else index  # a text id is its own index, and image start follows
            chosen |= {place: id for (place, _), id in zip(members, ids.tolist(), strict=True)}
        return chosen


def _most(request: Request) -> int:
    """Tokens that a request may write at most, image start and end included."""
    pictures = request.images * (request.inside.max_tokens + 2) * (request.mode == "mixed")
    return request.sampling.max_tokens + pictures

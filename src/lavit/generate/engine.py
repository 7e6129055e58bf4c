"""The engine: many requests for text and images in one batch of lanes. It speaks tokens only.

    read      one id per lane in one forward: text and image lanes, and their unconditional twins
    admit     prompts that wait are read once each, in one padded batch, and get lanes
    choose    logits of the modality each lane is in, guidance (paper Eq. 7), one id per request

A request draws from its own generator and its lanes attend to their own past, so its tokens do not
depend on the batch that it happens to run in (up to the rounding of the products).
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lavit.config import InputError
from lavit.generate.decoder import Decoder, Hidden, LaneCache
from lavit.generate.packed import decoder_for
from lavit.generate.request import Completion, Event, Request, collect
from lavit.generate.sampling import choose, guide
from lavit.generate.writer import Beams, Embeddings, Writer
from lavit.language.model import Language

LANES = 32  # rows of one forward at most, unless a single request needs more
PREFILL = 2**14  # tokens of prompts read in one forward at most, unless a single one has more
StreamLogits = dict[int, Float[Tensor, "rows allowed"]]  # of each stream, by its place
STATIC_COLUMNS = 256  # static caches are multiples of this


class Engine:
    """Generation with one language model, whose weights it may read once: to be built anew where
    they change.

    `compile` is that of `decoder_for`; `decoder` overrides its choice.
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

    def check(self, request: Request) -> None:
        """Raise `InputError` for a request that the LM cannot serve."""
        request.check(self.vocabulary, self.decoder.context)
        if self.language.embeds and (request.guided or request.mode == "mixed"):
            said = "this model writes pictures as embeddings, alone and without guidance"
            raise InputError(f"{said}: use mode 'image' and guidance=1")
        needed = len(request.ids) + self.language.embeds
        if self.language.embeds and request.mode == "image" and needed > self.decoder.context:
            said = f"the prompt and its picture have {needed} tokens"
            raise InputError(f"{said}, the language model attends to {self.decoder.context}")

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """Run to the end: the completion of each request."""
        done = collect(self.generate(requests), self.vocabulary)
        return [done[number] for number in range(len(requests))]


class Session:
    """The requests that run at the moment. `add` and `cancel` may come between any two steps."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.decoder = engine.decoder
        self.vocabulary = engine.vocabulary
        self.waiting: deque[tuple[int, Request]] = deque()
        self.streams: list[Writer | Beams | Embeddings] = []
        self.memory: LaneCache | None = None
        self._numbers = 0
        self._layout: list[int] = []  # lanes of each stream in the cache, in the order of streams
        visual = torch.arange(self.vocabulary.image_start, self.vocabulary.size)
        self._writing_ids = visual[self.vocabulary.writing]

    @property
    def busy(self) -> bool:
        """True while anything waits or runs."""
        return bool(self.waiting or self.streams)

    @property
    def lanes(self) -> int:
        """Lanes that are taken."""
        return sum(stream.most_lanes for stream in self.streams)

    def add(self, request: Request) -> int:
        """Queue a request, or raise `InputError`; returns its number, which its events carry."""
        self.engine.check(request)
        self.waiting.append((self._numbers, request))
        self._numbers += 1
        return self._numbers - 1

    def cancel(self, number: int) -> None:
        """Drop a request; its events end."""
        self.waiting = deque(item for item in self.waiting if item[0] != number)
        for stream in self.streams:
            if stream.number == number:
                stream.moves = []

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Read, admit, choose: one id for every request. Returns what happened."""
        hidden, events = self._admit(self._read())
        if hidden is not None:
            logits = self._logits(hidden)
            chosen = self._draw(logits)
            for place, stream in enumerate(self.streams):
                if isinstance(stream, Beams):
                    events += stream.take(logits[place])
                elif isinstance(stream, Embeddings):
                    lane = hidden[sum(self._layout[:place])]
                    events += stream.take(self.engine.language.next_embedding(lane[None])[0])
                else:
                    events += stream.take(chosen[place])
        return events

    def _read(self) -> Hidden | None:
        parents: list[int] = []
        ids: list[int] = []
        at = 0
        given: dict[int, Tensor] = {}  # embeddings, by lane
        for stream, lanes in zip(self.streams, self._layout, strict=True):
            parents += [at + lane if lane >= 0 else -1 for lane, _ in stream.moves]
            for _, moved in stream.moves:
                if isinstance(moved, Tensor):
                    given[len(ids)] = moved
                ids.append(self.vocabulary.end if isinstance(moved, Tensor) else moved)
            at += lanes
        self.streams = [stream for stream in self.streams if stream.moves]
        self._layout = [len(stream.moves) for stream in self.streams]
        if not ids:
            self.memory = None
            return None
        assert self.memory is not None
        self.memory.keep(parents)
        read = self.engine.language.embed(torch.tensor(ids, device=self.decoder.device)[:, None])
        for lane, embedding in given.items():
            read[lane, 0] = embedding
        return self.decoder.read(read, self.memory)

    def _admit(self, hidden: Hidden | None) -> tuple[Tensor | None, list[Event]]:
        """Read the prompts that there is room for, each once, and give them lanes."""
        used, longest = self.lanes, 0
        admitted: list[tuple[int, Request]] = []
        prompts: dict[Hashable, Request] = {}  # choices of one request share theirs
        while self.waiting and (not used or used + self.waiting[0][1].lanes <= self.engine.lanes):
            request = self.waiting[0][1]
            longest = max(longest, len(request.ids))
            if prompts and (len(prompts) + 1) * longest > PREFILL:
                break
            prompts.setdefault(_prompt(request), request)
            used += request.lanes
            admitted.append(self.waiting.popleft())
        if not admitted:
            return hidden, []
        memory, last = self._prefill([*prompts.values()])
        places = {prompt: place for place, prompt in enumerate(prompts)}
        rows: list[int] = []
        events: list[Event] = []
        for number, request in admitted:
            row = places[_prompt(request)]
            room = self.decoder.context - len(request.ids) - (request.mode == "image")
            stream = self._stream(number, request, room)
            rows += [row, len(prompts)][: stream.lanes] if stream.inside else [row] * stream.lanes
            self.streams.append(stream)
            self._layout.append(stream.lanes)
            if stream.inside:
                events.append(Event(number, "image_start", self.vocabulary.image_start))
        memory.keep(rows)
        last = last[rows]
        if self.memory is None or hidden is None:
            self.memory = memory
            return last, events
        self.memory.join(memory)
        return torch.cat([hidden, last]), events

    def _stream(self, number: int, request: Request, room: int) -> Writer | Beams | Embeddings:
        """What follows a request."""
        if (count := self.engine.language.embeds) and request.mode == "image":
            return Embeddings(number, count, self.vocabulary)
        kind: type[Beams] | type[Writer]
        kind = Beams if request.sampling.beams > 1 else Writer
        return kind(number, request, self.vocabulary, room)

    def _prefill(self, requests: list[Request]) -> tuple[LaneCache, Float[Tensor, "prompts width"]]:
        """Prompts in order; behind them a bare image start, the unconditional one, if wanted."""
        start, end = self.vocabulary.image_start, self.vocabulary.end
        prompts = [(*each.ids, *[start] * (each.mode == "image")) for each in requests]
        marks = [request.slots for request in requests]
        if any(request.mode == "image" and request.guided for request in requests):
            prompts.append((start,))
            marks.append(())
        lengths = [len(prompt) for prompt in prompts]
        longest, device = max(lengths), self.decoder.device
        ids = [[*prompt, *[end] * (longest - len(prompt))] for prompt in prompts]
        slots = [[*marked, *[False] * (longest - len(marked))] for marked in marks]
        features = [request.features for request in requests if request.features is not None]
        embeddings = self.engine.language.embed(
            torch.tensor(ids, device=device),
            slots=torch.tensor(slots, device=device),
            features=torch.cat(features).to(device) if features else None,
        )
        columns = longest + 1
        if (
            self.decoder.static
        ):  # room for all that may come, in few sizes: each is compiled by itself
            most = max(map(_most, requests))
            columns = -(-(longest + most) // STATIC_COLUMNS) * STATIC_COLUMNS
            columns = min(columns, max(self.decoder.context, longest))
        return self.decoder.prefill(embeddings, lengths, columns)

    def _logits(self, hidden: Hidden) -> StreamLogits:
        """Logits of each stream, by place: of text ids, or of image end and the (guided) codes."""
        found: dict[int, Tensor] = {}
        lanes = torch.arange(len(hidden), device=hidden.device).split(self._layout)
        heads = (self.decoder.text_logits, self.decoder.writing_logits)
        for inside, head in enumerate(heads):
            places = [
                at
                for at, stream in enumerate(self.streams)
                if stream.inside == inside and not isinstance(stream, Embeddings)
            ]
            if not places:
                continue
            logits = head(hidden[torch.cat([lanes[place] for place in places])])
            if logits.isnan().any():
                raise InputError("the model's logits are no numbers: are its weights damaged?")
            each = logits.split([self._layout[place] for place in places])
            for place, own in zip(places, each, strict=True):
                stream = self.streams[place]
                assert not isinstance(stream, Embeddings)
                if inside and len(own) == 2:
                    own = guide(own[:1], own[1:], own.new_tensor([stream.sampling.guidance]))
                elif isinstance(stream, Writer) and stream.may_open:
                    own = torch.cat([own, self.decoder.start_logits(hidden[lanes[place]])], -1)
                found[place] = own
        return found

    def _draw(self, logits: StreamLogits) -> dict[int, int]:
        """The next joint id of each writer, by place; those that draw alike are drawn together."""
        chosen: dict[int, int] = {}
        groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
        writers: dict[int, Writer] = {}
        for place, stream in enumerate(self.streams):
            if not isinstance(stream, Writer):
                continue
            if (forced := stream.forced()) is not None:
                chosen[place] = forced
                continue
            how = stream.sampling
            drawing = (how.temperature, how.top_k, how.top_p, how.min_p)
            groups[stream.inside, stream.may_open, *drawing].append(place)
            writers[place] = stream
        for (inside, *_), places in groups.items():
            together = torch.cat([logits[place] for place in places])
            members = [writers[place] for place in places]
            allowed = self._writing_ids if inside else torch.arange(together.shape[-1])
            for row, stream in enumerate(members):
                if forbidden := stream.forbidden():
                    hidden = torch.isin(allowed, torch.tensor(forbidden))
                    together[row, hidden.to(together.device)] = -torch.inf
            index = choose(together, members[0].sampling, [each.generator for each in members])
            # a text id is its own index, and image start follows
            chosen |= zip(places, allowed[index.cpu()].tolist(), strict=True)
        return chosen


def _prompt(request: Request) -> Hashable:
    """What requests have alike that are read once: all but the seed."""
    read = request.ids, request.slots, id(request.features)
    return *read, request.mode, request.sampling, request.inside


def _most(request: Request) -> int:
    """Tokens that a request may write at most, image start and end included."""
    pictures = request.images * (request.inside.max_tokens + 2) * (request.mode == "mixed")
    return request.sampling.max_tokens + pictures

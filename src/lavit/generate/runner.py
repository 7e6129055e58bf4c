"""What stands between the verbs and the engine: the jobs of a call, run at once or as a stream.

inputs (prompts.py) ── Work: jobs, and what paints their pictures ─┬─ run: what each job wrote
                                                                   └─ stream: updates
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeVar, Unpack

import torch
from PIL import Image
from torch import Tensor

from lavit.config import InputError
from lavit.conversation import Reply
from lavit.generate.engine import Engine
from lavit.generate.options import (
    ChatMessage,
    CodesOptions,
    DrawingOptions,
    ImageContent,
    Messages,
    MessagesList,
    OpenOptions,
    PictureSize,
    Scorer,
    Seed,
    TextContent,
    TextOptions,
    Written,
)
from lavit.generate.prompts import (
    Inputs,
    conversations_of,
    image_jobs,
    jobs_of,
    sampling_of_codes,
    turn_ends,
)
from lavit.generate.protocols import Protocol, protocol_of
from lavit.generate.safety import Release, release_of
from lavit.generate.sampling import Sampling
from lavit.generate.score import likelihood
from lavit.generate.stream import Job, Made, Painted, Painter, Update, gathered, updates
from lavit.images import to_image
from lavit.layout import Part, TextPart
from lavit.model import LaVIT

T = TypeVar("T")
TOGETHER = 16  # pictures that are painted in one batch
APART = 2**32  # between the seeds of the candidates of one drawing
REPLIES = {"text": TextOptions, "image": DrawingOptions, "auto": OpenOptions}


@dataclass(frozen=True)
class Work:
    """The jobs of one call; `one`: a single input was given, not a list."""

    jobs: list[Job]
    one: bool
    painting: Mapping[str, Any] | None = None  # `steps` and `size`; None: they write text alone


class Runner:
    """A loaded model, its engine, and what happens to pictures before a user sees them."""

    def __init__(
        self,
        model: LaVIT,
        *,
        protocol: str | Protocol = "default",
        safety: bool | None = None,
        watermark: str | None = None,
        compile: str | None = None,
    ) -> None:
        if watermark == "":
            raise InputError("the watermark is empty: give text to hide, or leave it out")
        self.model, self.safety, self.watermark = model, safety, watermark
        self.compile = compile
        self._engine: tuple[Any, Engine] | None = None
        if isinstance(protocol, str):
            protocol = protocol_of(protocol, model.config.visual_tokenizer.patches)
        self.protocol = protocol

    @property
    def engine(self) -> Engine:
        """The token engine over this model's language part; a new one where that has changed."""
        self.model.needs("language")
        language = self.model.language
        changes = sum(p._version for p in language.parameters() if not p.is_inference())
        now = language.rows.device, language.rows.dtype, changes
        if self._engine is None or self._engine[0] != now:
            self._engine = now, Engine(language, compile=self.compile)
        return self._engine[1]

    @cached_property
    def release(self) -> Release:
        """The safety check and the watermark."""
        return release_of(self.model, safety=self.safety, watermark=self.watermark)

    def paint(
        self,
        codes: Sequence[Tensor],
        *,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance: float | None = None,
        size: PictureSize | None = None,
    ) -> list[Image.Image]:
        """Pictures of codes through reconstructor and pixel decoder, released (or `Refused`).

        `codes` are those of each picture, `[kept]`.
        """
        self.model.needs("visual_tokenizer", "pixels")
        done: list[Image.Image] = []
        for at in range(0, len(codes), TOGETHER):
            with torch.inference_mode():
                pictures = self.model.pixels.sample(
                    self.model.decode(codes[at : at + TOGETHER]),
                    steps=steps,
                    guidance=guidance,
                    seeds=list(seeds)[at : at + TOGETHER],
                    size=size,
                )
            done += [to_image(picture) for picture in pictures]
        return self.release(done, seeds)

    def denoise(
        self, codes: Sequence[Tensor], *, seeds: Sequence[int], **how: Any
    ) -> Iterator[Tensor]:
        """Latents of pictures after each step of the solver; `how` is that of `Pixels.denoise`."""
        self.model.needs("visual_tokenizer", "pixels")
        return self.model.pixels.denoise(self.model.decode(codes), seeds=seeds, **how)

    def finish(self, latents: Tensor, seeds: Sequence[int]) -> list[Image.Image]:
        """Pictures of the last latents, released (or `Refused`)."""
        pictures = self.model.pixels.pictures(latents)
        return self.release([to_image(picture) for picture in pictures], seeds)

    def previewed(
        self, codes: Sequence[Tensor], *, seeds: Sequence[int], **how: Any
    ) -> Iterator[tuple[int | None, Image.Image]]:
        """A picture after each step of the solver, with the step's number; the last with None."""
        for step, latents in enumerate(self.denoise(codes, seeds=seeds, **how)):
            last = latents
            (picture,) = self.preview(latents)
            yield step, picture
        (picture,) = self.finish(last, seeds)
        yield None, picture

    def _ready(self, size: PictureSize | None, jobs: Sequence[Job] = ()) -> None:
        """Raise what would stop the picture at the end before work begins.

        What the language model cannot serve is refused first.
        """
        for job in jobs:
            self.engine.check(job.request)
        self.model.needs("visual_tokenizer", "pixels")
        painted = self.model.pixels.picture_size(size)
        self.model.pixels.check_size(painted)
        self.release.check_size(painted)

    def _words(
        self,
        inputs: Inputs,
        usual: Sampling,
        ends: tuple[str, ...] = (),
        *,
        stop: tuple[int, ...] = (),
        seed: Seed = 0,
        sampling: Sampling | None = None,
    ) -> Work:
        """Text behind each input, written as `usual` where no `sampling` is given."""
        how = sampling or usual
        jobs = jobs_of(self.model, inputs.parts, how, seed=seed, ends=ends, stop=stop)
        return Work(jobs, inputs.one)

    def drawings(
        self,
        inputs: Inputs,
        *,
        steps: int | None = None,
        size: PictureSize | None = None,
        **how: Unpack[CodesOptions],
    ) -> Work:
        """Work that writes a picture behind each input."""
        jobs = image_jobs(self.model, self.protocol, inputs.parts, **how)
        self._ready(size, jobs)
        return Work(jobs, inputs.one, {"steps": steps, "size": size})

    def _mixture(
        self,
        inputs: Inputs,
        ends: tuple[str, ...] = (),
        *,
        stop: tuple[int, ...] = (),
        seed: Seed = 0,
        sampling: Sampling | None = None,
        image_sampling: Sampling | None = None,
        guidance: float | None = None,
        steps: int | None = None,
        size: PictureSize | None = None,
    ) -> Work:
        """Text behind each input, in which the model opens pictures by itself."""
        # a reply that may hold pictures need not hold text
        how = sampling or replace(self.protocol.chat, min_tokens=0)
        inside = sampling_of_codes(self.model, self.protocol, image_sampling, guidance)
        options = {"stop": stop, "mode": "mixed", "picture": inside}
        jobs = jobs_of(self.model, inputs.parts, how, seed=seed, ends=ends, **options)
        self._ready(size, jobs)
        return Work(jobs, inputs.one, {"steps": steps, "size": size})

    def replies(self, messages: Messages | MessagesList, out: Reply, **how: Any) -> Work:
        """Work: the assistant's turn behind each conversation, whose text ends where it does."""
        self.model.needs("language")
        inputs = conversations_of(messages, self.model.text_tokenizer, out)
        if unused := sorted(how.keys() - REPLIES[out].__optional_keys__):
            raise InputError(f"a reply of kind {out!r} takes no {', '.join(unused)}: leave it out")
        if out == "image":
            return self.drawings(inputs, **how)
        ends, stop = turn_ends(self.model)
        if out == "auto":
            return self._mixture(inputs, ends, stop=stop, **how)
        return self._words(inputs, self.protocol.chat, ends, stop=stop, **how)

    def _run(self, work: Work) -> list[Made]:
        """What each job wrote; all pictures are painted together at the end."""
        happening = updates(self.engine, self.model.text_tokenizer, work.jobs)
        return gathered(happening, work.jobs, self._painter(work))

    def codes(self, work: Work) -> list[Tensor]:
        """The codes of the picture that each job writes, `[codes]`; none is painted."""
        happening = updates(self.engine, self.model.text_tokenizer, work.jobs)
        written = {made.input: made.codes for made in happening if made.kind == "image"}
        return [torch.tensor(written[number]) for number in range(len(work.jobs))]

    def _texts(self, work: Work) -> list[str]:
        """The text that each job wrote."""
        found = self._run(work)
        return ["".join(part for part in made if isinstance(part, str)) for made in found]

    def _best(
        self,
        inputs: Inputs,
        *,
        best_of: int | None = None,
        scorer: Scorer | None = None,
        **how: Unpack[DrawingOptions],
    ) -> Image.Image | list[Image.Image]:
        """The picture behind each input, of `best_of` candidates the one that scores most."""
        count = self.protocol.best_of or 1 if best_of is None else best_of
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InputError(f"best_of is {count!r}: give the number of candidates, 1 or more")
        if scorer is not None and count == 1:
            raise InputError("a scorer chooses among candidates: give best_of=2 or more")
        if count > 1 and scorer is None:  # the model reads its own drawings
            self.model.needs("vision", "visual_tokenizer")
        work = self.drawings(inputs, **how)
        jobs = [reseeded(job, APART * n) for job in work.jobs for n in range(count)]
        made = self._run(replace(work, jobs=jobs))
        pictures = [part.picture for parts in made for part in parts if isinstance(part, Painted)]
        if count > 1:
            score = scorer or partial(likelihood, self.model)
            groups = [pictures[at : at + count] for at in range(0, len(pictures), count)]
            pairs = zip(inputs.parts, groups, strict=True)
            pictures = [max(group, key=partial(score, spoken(parts))) for parts, group in pairs]
        return shaped(pictures, inputs.one)

    def _stream(self, work: Work, previews: bool = False) -> Iterator[Update]:
        """What jobs write, as it happens."""
        if previews and work.painting is None:
            raise InputError("a reply in words has no previews: leave previews out")
        if previews and self.release.checker is not None:
            remedy = "leave previews out, or load with safety=False"
            raise InputError(f"previews would pass the safety checker unseen: {remedy}")
        show = partial(self.previewed, **(work.painting or {})) if previews else None
        run = partial(updates, self.engine, self.model.text_tokenizer, work.jobs)
        return run(paint=self._painter(work), show=show)

    def _painter(self, work: Work) -> Painter | None:
        """What paints the pictures of some work."""
        return None if work.painting is None else partial(self.paint, **work.painting)

    @torch.inference_mode()
    def preview(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of the latents of a solver's step."""
        pixels = self.model.pixels
        dtype = next(pixels.parameters()).dtype
        return [to_image(picture) for picture in pixels.decode(latents.to(dtype))]


def shaped(found: list[T], one: bool) -> T | list[T]:
    """The results of a list of inputs, or the result of one."""
    return found[0] if one else found


def reseeded(job: Job, by: int) -> Job:
    """The same job, its seed moved."""
    return replace(job, request=replace(job.request, seed=job.request.seed + by))


def spoken(parts: Sequence[Part]) -> str:
    """The words of an input."""
    return " ".join(part.text for part in parts if isinstance(part, TextPart))


def words_and_pictures(made: Made) -> Written:
    """Words and pictures of what one job wrote."""
    return [part if isinstance(part, str) else part.picture for part in made]


def message(made: Made) -> ChatMessage:
    """What one job wrote, in the form of Hugging Face chats."""
    content: list[TextContent | ImageContent] = []
    for part in made:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            content.append({"type": "image", "image": part.picture, "codes": part.codes})
    return {"role": "assistant", "content": content or [{"type": "text", "text": ""}]}

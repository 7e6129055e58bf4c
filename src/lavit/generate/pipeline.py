"""What people call: pictures and words in, words and pictures out, one loaded model for all of it.

Prompts are laid out as in training (layout.py): a picture that is read enters as features, a picture
inside a prompt for writing enters as its codes (method, Sec. 5). All inputs of a call are one batch
of the engine. Every verb takes one input or a list of them, and gives back one result or a list.
With `stream=True` it gives an iterator of `Update`s (stream.py) instead, whose `input` and `sample`
say what they belong to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lavit.config import InputError
from lavit.generate.engine import Engine
from lavit.generate.prompts import (
    Picture,
    Seed,
    jobs_of,
    lay_prompt,
    pictures_of,
    words_of,
    writing,
)
from lavit.generate.protocols import UNANSWERABLE, Protocol, answerable, protocol_of, refuses
from lavit.generate.safety import Release, release_of
from lavit.generate.sampling import Sampling
from lavit.generate.score import Scorer, best, choices, scorer_of
from lavit.generate.stream import Job, Update, gathered, updates
from lavit.images import open_image, to_image
from lavit.layout import Reply, asking, conversation, mixed, reading
from lavit.model import LaVIT
from lavit.modules.selector import KeepPolicy
from lavit.sequence import VisualTokens

Pictures = Picture | Sequence[Picture]
Keep = str | int | float | KeepPolicy
Size = tuple[int, int] | str
TOGETHER = 16  # pictures that are painted in one batch


class Pipeline:
    """A loaded LaVIT.

    `protocol` says how verbs sample and cut where a call does not: "default", "paper", "published",
    or a `Protocol`. `safety` (default: on for published weights): a written picture that the
    checker refuses raises `Refused`; `watermark` is text to hide in them. Their `size` is (height,
    width) in pixels or an aspect ratio such as "4:3".
    """

    def __init__(
        self,
        model: LaVIT,
        *,
        protocol: str | Protocol = "default",
        safety: bool | None = None,
        watermark: str | None = None,
    ) -> None:
        self.model, self.safety, self.watermark = model, safety, watermark
        known, patches = isinstance(protocol, Protocol), model.config.visual_tokenizer.patches
        self.protocol = protocol if known else protocol_of(protocol, patches)

    @cached_property
    def engine(self) -> Engine:
        """The token engine over this model's language part."""
        self.model.needs("language")
        return Engine(self.model.language)

    @cached_property
    def release(self) -> Release:
        """The safety check and the watermark."""
        return release_of(self.model, safety=self.safety, watermark=self.watermark)

    def caption(
        self,
        images: Pictures,
        *,
        n: int | None = None,
        seed: Seed = 0,
        sampling: Sampling | None = None,
        keep: Keep = "auto",
        stream: bool = False,
    ) -> Any:
        """Say what each picture shows, up to and without what cuts captions (`Protocol`).

        With `n`, lists of n texts. `keep` is the policy under which pictures are looked at ("auto",
        "all", 64 tokens, 0.25 of the patches, …).
        """
        pictures, one = pictures_of(images)
        prompts = [reading(picture, keep=keep) for picture in pictures]
        how, ends = sampling or self.protocol.caption, self.protocol.caption_ends
        jobs = jobs_of(self.model, prompts, how, n=n, seed=seed, ends=ends)
        return self._texts(jobs, one, n, stream)

    def choose(
        self,
        images: Pictures,
        among: Sequence[str],
        *,
        n: int | None = None,
        keep: Keep = "auto",
    ) -> Any:
        """The likeliest of the texts `among` as the caption of each picture; with `n`, the n best.

        Likelihoods are of whole texts, with or without a full stop.
        """
        pictures, one = pictures_of(images)
        texts = [text.strip().removesuffix(".") for text in among]
        if not texts or not all(texts) or len(set(texts)) < len(texts):
            raise InputError("choose among one text or more, none empty and none twice")
        count = 1 if n is None else n
        if not 1 <= count <= len(texts):
            raise InputError(f"n is {n}: choose from 1 to all {len(texts)} texts")
        ranked = []
        for picture in pictures:
            seen = lay_prompt(self.model, reading(picture, keep=keep))
            ranked.append(best(texts, choices(self.model, seen, texts), count))
        return _shaped(ranked, one, n, str)

    def ask(
        self,
        images: Pictures,
        questions: str | Sequence[str],
        *,
        n: int | None = None,
        seed: Seed = 0,
        sampling: Sampling | None = None,
        keep: Keep = "auto",
        check_answerable: bool = False,
        stream: bool = False,
    ) -> Any:
        """Answer a question about each picture; lists must have the same length.

        With `n`, lists of n texts; `keep` as in `caption`. check_answerable: as for VizWiz, ask
        first whether the question can be answered, else say "unanswerable".
        """
        pictures, one = pictures_of(images)
        texts = words_of(questions, "question", pictures)[0]
        if check_answerable and (stream or n is not None):
            raise InputError("check_answerable asks twice: leave stream and n out")
        prompts = [
            asking(picture, (question, None), keep=keep) for picture, question in zip(pictures, texts, strict=True)
        ]
        how, ends = sampling or self.protocol.answer, self.protocol.answer_ends
        jobs = jobs_of(self.model, prompts, how, n=n, seed=seed, ends=ends)
        if not check_answerable:
            return self._texts(jobs, one, n, stream)
        first = [answerable(question) for question in texts]
        said = self.ask(pictures, first, seed=seed, sampling=sampling, keep=keep)
        found = self._texts(jobs, False, None, False)
        for place, answer in enumerate(said):
            if refuses(answer):
                found[place] = UNANSWERABLE
        return found[0] if one else found

    def draw(self, prompts: str | Sequence[str], **options: Any) -> Any:
        """Draw `n` pictures of each prompt (one: the list of its n); options as in `generate`."""
        texts, one = words_of(prompts, "prompt")
        inputs = [[text] for text in texts]
        return self.generate(inputs[0] if one else inputs, **options)

    def edit(self, images: Pictures, prompts: str | Sequence[str], **options: Any) -> Any:
        """Draw from pictures and an instruction for each, `n` times; options as in `generate`."""
        pictures, one = pictures_of(images)
        texts = words_of(prompts, "prompt", pictures)[0]
        inputs = [[open_image(pair[0]), pair[1]] for pair in zip(pictures, texts, strict=True)]
        return self.generate(inputs[0] if one else inputs, **options)

    def generate(
        self,
        parts: Sequence[Any],
        *,
        out: Reply = "image",
        n: int = 1,
        seed: Seed = 0,
        sampling: Sampling | None = None,
        picture: Sampling | None = None,
        guidance: float | None = None,
        steps: int | None = None,
        size: Size | None = None,
        best_of: int | None = None,
        scorer: Scorer | str | None = None,
        stream: bool = False,
        previews: bool = False,
    ) -> Any:
        """Go on from any order of words (strings) and pictures (paths, bytes, PIL images), `n`
        times; a list of such lists is many inputs.

        out: "image", "text", or "auto", where the model opens pictures by itself and a result is a
        list of strings and pictures. Returns the n results of one input, or a list of them for each
        input. `sampling` writes the pictures ("image") or the text; `picture` the pictures of
        "auto"; `guidance` is theirs (Eq. 7), `steps` and `size` the pixel decoder's. best_of: draw
        so many candidates and keep the n that `scorer` likes most: "likelihood" of the prompt when
        the model reads its own picture, or a function (prompt, picture) -> float. `previews` adds,
        to a stream, the picture as it comes out of the noise.
        """
        many = bool(parts) and all(isinstance(item, list | tuple) for item in parts)
        inputs = [list(item) for item in parts] if many else [list(parts)]
        prompts = [mixed(item, read=out == "text") for item in inputs]
        count, score = self._ranking(out, n, best_of, scorer, stream)
        jobs = writing(
            self.model, self.protocol, prompts, out=out, n=count, seed=seed,
            sampling=sampling, picture=picture, guidance=guidance,
        )  # fmt: skip
        found = self._run(jobs, out, stream, previews, steps=steps, size=size)
        if score is not None:
            words = [" ".join(part for part in item if isinstance(part, str)) for item in inputs]
            found = [
                best(made, [score(prompt, sample[0].picture) for sample in made], n)
                for prompt, made in zip(words, found, strict=True)
            ]
        return _shaped(found, not many, n, partial(_result, out=out))

    def chat(
        self,
        messages: Sequence[Any],
        *,
        out: Reply = "text",
        n: int | None = None,
        seed: Seed = 0,
        sampling: Sampling | None = None,
        picture: Sampling | None = None,
        guidance: float | None = None,
        steps: int | None = None,
        size: Size | None = None,
        stream: bool = False,
        previews: bool = False,
    ) -> Any:
        """Answer a conversation (the messages of Hugging Face chats, layout.py), or a list.

        Returns the assistant's message, to be appended to the messages; its pictures carry their
        codes. With `n`, lists of n messages. The other options are those of `generate`.
        """
        many = bool(messages) and not isinstance(messages[0], Mapping)
        talks = messages if many else [messages]
        self.model.needs("language")
        text = self.model.text_tokenizer
        prompts = [conversation(talk, text, reply=out) for talk in talks]
        jobs = writing(
            self.model, self.protocol, prompts, out=out, n=n, seed=seed, chat=True,
            sampling=sampling, picture=picture, guidance=guidance,
        )  # fmt: skip
        found = self._run(jobs, out, stream, previews, steps=steps, size=size)
        return _shaped(found, not many, n, _message)

    def paint(
        self,
        codes: Sequence[Tensor],
        *,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance: float | None = None,
        size: Size | None = None,
        watch: Callable[[int, Tensor], None] | None = None,
    ) -> list[Image.Image]:
        """Pictures of codes through reconstructor and pixel decoder, released (or `Refused`).

        `watch` is called with the step's number and the latents after each step.
        """
        self.model.needs("visual_tokenizer", "pixels")
        release, done = self.release, []
        for at in range(0, len(codes), TOGETHER):
            with torch.inference_mode():
                pictures = self.model.pixels.sample(
                    self.model.decode(codes[at : at + TOGETHER]),
                    steps=steps,
                    guidance=guidance,
                    seeds=list(seeds)[at : at + TOGETHER],
                    size=size,
                    callback=watch,
                )
            done += [to_image(picture) for picture in pictures]
        return release(done, seeds)

    def tokenize(self, images: Pictures, *, keep: Keep = "auto", seed: int = 0) -> VisualTokens:
        """Visual tokens under a keep policy ("auto", 64 tokens, 0.25 of the patches)."""
        pictures = [open_image(picture) for picture in pictures_of(images)[0]]
        generator = torch.Generator().manual_seed(seed)
        policy = KeepPolicy.parse(keep)
        return self.model.encode_images(pictures, policy, generator=generator)

    def reconstruct(
        self,
        image: Picture,
        *,
        keep: Keep = "auto",
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        size: Size | None = None,
    ) -> Image.Image:
        """A picture through its visual tokens and back, without the language model."""
        self._ready(size)
        codes = [self.tokenize(image, keep=keep, seed=seed).codes]
        return self.paint(codes, seeds=[seed], steps=steps, guidance=guidance, size=size)[0]

    def _ready(self, size: Size | None) -> None:
        """Raise what would stop the picture at the end before work begins."""
        self.model.needs("visual_tokenizer", "pixels")
        self.model.pixels.check_size(self.model.pixels.picture_size(size))
        _ = self.release

    def _ranking(self, out: str, n: int, best_of: Any, scorer: Any, stream: bool) -> tuple:
        """The number of pictures to draw for n, and the scorer where the best of them are kept."""
        usual, finished = self.protocol.best_of or 0, out == "image" and not stream
        if best_of is None and scorer is None and not (finished and usual > n):
            return n, None
        if not finished:
            remedy = "leave it out with stream=True, or where text comes out"
            raise InputError(f"best_of ranks finished pictures: {remedy}")
        count = usual if best_of is None else best_of
        if isinstance(count, bool) or not isinstance(count, int) or count < max(n, 1):
            remedy = "give the number of candidates to choose from, n or more"
            raise InputError(f"best_of is {count!r} for n={n}: {remedy}")
        score = scorer_of(self.model, scorer or "likelihood")
        return count, score if best_of is not None or count > n else None

    def _texts(self, jobs: list[Job], one: bool, n: int | None, stream: bool) -> Any:
        """What jobs say about pictures that are read, or a stream of it."""
        how = jobs[0].request.sampling
        if how.n > 1 and how.temperature == 0 and how.beams == 1:
            remedy = "give sampling=Sampling(temperature=1.0)"
            raise InputError(f"n={n} samples at temperature 0 are all alike: {remedy}")
        return _shaped(self._run(jobs, "text", stream), one, n, "".join)

    def _run(
        self,
        jobs: list[Job],
        out: str,
        stream: bool,
        previews: bool = False,
        **painting: Any,
    ) -> Any:
        """Updates of jobs as they happen, or what all of them wrote."""
        if previews and (out == "text" or not stream):
            remedy = "give stream=True, out='image' or 'auto'"
            raise InputError(f"previews are part of a stream that holds pictures: {remedy}")
        if out != "text":
            self._ready(painting["size"])
        if previews and self.release.checker is not None:
            remedy = "leave previews out, or load with safety=False"
            raise InputError(f"previews would pass the safety checker unseen: {remedy}")

        paint = partial(self.paint, **painting)
        run = partial(updates, self.engine, self.model.text_tokenizer, jobs)
        if stream:
            return run(paint=paint, show=self._preview if previews else None)
        return gathered(run(), jobs, paint)

    @torch.inference_mode()
    def _preview(self, latents: Tensor) -> list[Image.Image]:
        pixels = self.model.pixels
        return [to_image(picture) for picture in pixels.decode(latents.to(pixels.unet.dtype))]


def _shaped(found: Any, one: bool, n: int | None, form: Callable[[Any], Any]) -> Any:
    """A stream as it is, else results: n of each input (without an n, one), or those of one input.

    `form` makes a result of a sample.
    """
    if isinstance(found, Iterator):
        return found
    results = [[form(sample) for sample in samples] for samples in found]
    results = [samples[0] for samples in results] if n is None else results
    return results[0] if one else results


def _result(sample: list[str | Update], out: str) -> Any:
    """What one sample wrote: a string, a picture, or ("auto") a list of both."""
    parts = [part if isinstance(part, str) else part.picture for part in sample]
    return "".join(parts) if out == "text" else parts if out == "auto" else parts[0]


def _message(sample: list[str | Update]) -> dict[str, Any]:
    """The assistant's message, in the form of Hugging Face chats; pictures carry their codes."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part.picture, "codes": part.codes}
        for part in sample
    ]
    return {"role": "assistant", "content": content or [{"type": "text", "text": ""}]}

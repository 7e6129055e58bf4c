"""What people call: pictures and words in, words and pictures out, one loaded model for all of it.

Prompts are laid out as in training (data/): a picture that is read enters as features, a picture inside a prompt
for writing enters as its codes (method, Sec. 5). The engine below speaks tokens only; this file turns files, pictures
and words into its requests, all inputs of a call into one batch, and what it writes into words and pictures.

Every verb takes one input or a list of them, and gives back one result or a list. With `stream=True` it gives an
iterator of `Update`s (stream.py) instead, whose `input` and `sample` say what they belong to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lavit.config import InputError
from lavit.data.chat import ChatPicture, ChatText, Reply, render_chat
from lavit.data.documents import question_text
from lavit.generate.engine import Engine
from lavit.generate.jobs import Parts, Seed, message, reading, result, writing
from lavit.generate.prompts import Picture, lay_prompt, pictures_of, words_of, written_from
from lavit.generate.protocols import UNANSWERABLE, Protocol, answerable, asked, protocol_of, refuses
from lavit.generate.safety import Release, release_of
from lavit.generate.sampling import Sampling
from lavit.generate.score import Scorer, best, choices, scorer_of
from lavit.generate.stream import Job, Update, gathered, updates
from lavit.images import open_image, to_image
from lavit.model import LaVIT
from lavit.modules.selector import KeepPolicy
from lavit.sequence import VisualTokens

Size = tuple[int, int] | str
TOGETHER = 16  # pictures that are painted in one batch


class Pipeline:
    """A loaded LaVIT.

    `protocol` says how verbs sample and cut where a call does not: "default", "paper", "published", or a `Protocol`.
    Written pictures pass `release`: with `safety` (default: on for published weights) the checker's refusal raises
    `Refused`; `watermark` is text to hide in them. Their `size` is (height, width) in pixels or an aspect ratio such as "4:3".
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
        known = isinstance(protocol, Protocol)
        self.protocol = protocol if known else protocol_of(protocol, model.config.tokenizer.patches)

    @cached_property
    def engine(self) -> Engine:
        """The token engine over this model's language part."""
        return Engine(self.model.language)

    @cached_property
    def release(self) -> Release:
        """The safety check and the watermark."""
        return release_of(self.model, safety=self.safety, watermark=self.watermark)

    def caption(
        self,
        images: Picture | Sequence[Picture],
        *,
        n: int | None = None,
        seed: Seed = 0,
        sampling: Sampling | None = None,
        keep: str | int | float | KeepPolicy = "auto",
        stream: bool = False,
    ) -> Any:
        """Say what each picture shows: the text up to and without the first full stop. With `n`, lists of n texts.

        `keep` is the policy under which pictures are looked at ("auto", "all", 64 tokens, 0.25 of the patches, …).
        """
        pictures, one = pictures_of(images)
        prompts = [[ChatPicture(open_image(picture), read=True, keep=keep)] for picture in pictures]
        how = self.protocol.caption if sampling is None else sampling
        jobs = reading(self.model, prompts, how, 1 if n is None else n, seed, self.protocol.caption_ends)
        return self._texts(jobs, one, n, stream)

    def choose(
        self,
        images: Picture | Sequence[Picture],
        among: Sequence[str],
        *,
        n: int | None = None,
        keep: str | int | float | KeepPolicy = "auto",
    ) -> Any:
        """The likeliest of the texts `among` as the caption of each picture; with `n`, the list of the n best.

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
            seen = lay_prompt(self.model, [ChatPicture(open_image(picture), read=True, keep=keep)])
            ranked.append(best(texts, choices(self.model, seen, texts), count))
        results = ranked if n is not None else [texts[0] for texts in ranked]
        return results[0] if one else results

    def ask(
        self,
        images: Picture | Sequence[Picture],
        questions: str | Sequence[str],
        *,
        n: int | None = None,
        seed: Seed = 0,
        sampling: Sampling | None = None,
        keep: str | int | float | KeepPolicy = "auto",
        check_answerable: bool = False,
        stream: bool = False,
    ) -> Any:
        """Answer a question about each picture; lists must have the same length. With `n`, lists of n texts; `keep` as above.

        check_answerable: as for VizWiz, ask first whether the question can be answered, else say "unanswerable".
        """
        pictures, one = pictures_of(images)
        texts, _ = words_of(questions, "question")
        _same_length(pictures, texts, "questions")
        prompts: list[Parts] = [
            [ChatPicture(open_image(picture), read=True, keep=keep), ChatText(question_text(asked(question)))]
            for picture, question in zip(pictures, texts, strict=True)
        ]
        how = self.protocol.answer if sampling is None else sampling
        jobs = reading(self.model, prompts, how, 1 if n is None else n, seed, self.protocol.answer_ends)
        if not check_answerable:
            return self._texts(jobs, one, n, stream)
        if stream or n is not None:
            raise InputError("check_answerable asks twice: leave stream and n out")
        asking = {"seed": seed, "sampling": sampling, "keep": keep}
        first = self.ask(pictures, [answerable(question) for question in texts], **asking)
        answers = self._texts(jobs, False, None, False)
        found = [UNANSWERABLE if refuses(said) else answer for said, answer in zip(first, answers, strict=True)]
        return found[0] if one else found

    def draw(self, prompts: str | Sequence[str], **options: Any) -> Any:
        """Draw `n` pictures of each prompt; the options are those of `generate`. One prompt gives the list of its n."""
        texts, one = words_of(prompts, "prompt")
        inputs = [[text] for text in texts]
        return self.generate(inputs[0] if one else inputs, **options)

    def edit(self, images: Picture | Sequence[Picture], prompts: str | Sequence[str], **options: Any) -> Any:
        """Draw from pictures and an instruction for each, `n` times; the options are those of `generate`."""
        pictures, one = pictures_of(images)
        texts, _ = words_of(prompts, "prompt")
        _same_length(pictures, texts, "prompts")
        inputs = [[open_image(picture), text] for picture, text in zip(pictures, texts, strict=True)]
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
        """Go on from any order of words (strings) and pictures (paths, bytes, PIL images), `n` times; a list of such
        lists is many inputs.

        out: "image", "text", or "auto", where the model opens pictures by itself and a result is a list of strings and
        pictures. Returns the n results of one input, or a list of them for each input. `sampling` writes the pictures
        ("image") or the text; `picture` the pictures of "auto"; `guidance` is theirs (Eq. 7), `steps` and `size` the
        pixel decoder's. best_of: draw so many candidates and keep the n that `scorer` likes most: "likelihood" of the
        prompt when the model reads its own picture, or a function (prompt, picture) -> float. `previews` adds, to a
        stream, the picture as it comes out of the noise.
        """
        many = bool(parts) and all(isinstance(item, list | tuple) for item in parts)
        inputs = [list(item) for item in parts] if many else [list(parts)]
        prompts = [written_from(item, read=out != "image") for item in inputs]
        count = self._candidates(out, n, best_of, scorer, stream)
        jobs = writing(
            self.model, self.protocol, prompts,
            out=out, n=count, seed=seed, sampling=sampling, picture=picture, guidance=guidance,
        )  # fmt: skip
        found = self._run(jobs, out, stream, steps=steps, size=size, previews=previews)
        if stream:
            return found
        results = [[result(sample, out) for sample in samples] for samples in found]
        if best_of is not None or count > n:
            score = scorer_of(self.model, scorer or "likelihood")
            words = [" ".join(part for part in item if isinstance(part, str)) for item in inputs]
            results = [
                best(made, [score(prompt, each) for each in made], n)
                for prompt, made in zip(words, results, strict=True)
            ]
        return results if many else results[0]

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
        """Answer a conversation (the messages of Hugging Face chats, data/chat.py), or a list of conversations.

        Returns the assistant's message, to be appended to the messages; its pictures carry their codes. With `n`, lists
        of n messages. The other options are those of `generate`.
        """
        many = bool(messages) and not isinstance(messages[0], Mapping)
        talks = list(messages) if many else [messages]
        prompts = [render_chat(talk, self.model.text, reply=out) for talk in talks]
        jobs = writing(
            self.model, self.protocol, prompts, chat=True,
            out=out, n=1 if n is None else n, seed=seed, sampling=sampling, picture=picture, guidance=guidance,
        )  # fmt: skip
        found = self._run(jobs, out, stream, steps=steps, size=size, previews=previews)
        if stream:
            return found
        replies = [[message(sample) for sample in samples] for samples in found]
        results = replies if n is not None else [samples[0] for samples in replies]
        return results if many else results[0]

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
        """Pictures of codes through reconstructor and pixel decoder, released (`Refused` if the checker says so).

        `watch` is called with the step's number and the latents after each step.
        """
        release, config = self.release, self.model.config.pixels
        done: list[Image.Image] = []
        for at in range(0, len(codes), TOGETHER):
            with torch.inference_mode():
                pictures = self.model.pixels.sample(
                    self.model.features(codes[at : at + TOGETHER]),
                    steps=config.steps if steps is None else steps,
                    guidance=config.guidance if guidance is None else guidance,
                    seeds=list(seeds)[at : at + TOGETHER],
                    size=size,
                    callback=watch,
                )
            done += [to_image(picture) for picture in pictures]
        return release(done, seeds)

    def tokenize(
        self,
        images: Picture | Sequence[Picture],
        *,
        keep: str | int | float | KeepPolicy = "auto",
        seed: int = 0,
    ) -> VisualTokens:
        """Visual tokens of pictures under a keep policy ("auto", 64 tokens, 0.25 of the patches, …)."""
        pictures, _ = pictures_of(images)
        generator = torch.Generator().manual_seed(seed)
        policy = KeepPolicy.parse(keep)
        return self.model.encode([open_image(picture) for picture in pictures], policy, generator=generator)

    def reconstruct(
        self,
        image: Picture,
        *,
        keep: str | int | float | KeepPolicy = "auto",
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        size: Size | None = None,
    ) -> Image.Image:
        """A picture through its visual tokens and back, without the language model."""
        self._ready(size)
        tokens = self.tokenize(image, keep=keep, seed=seed)
        return self.paint([tokens.codes], seeds=[seed], steps=steps, guidance=guidance, size=size)[0]

    def _ready(self, size: Size | None) -> None:
        """Raise what would stop the picture at the end before work begins."""
        self.model.pixels.check_size(self.model.pixels.picture_size(size))
        _ = self.release

    def _candidates(self, out: str, n: int, best_of: int | None, scorer: Any, stream: bool) -> int:
        """The number of pictures to draw for n, after a request for the best of them has been checked."""
        usual = self.protocol.best_of or 0
        if best_of is None and scorer is None:
            return usual if usual > n and out == "image" and not stream else n
        if out != "image" or stream:
            raise InputError("best_of ranks finished pictures: leave it out with stream=True, or where text comes out")
        count = usual if best_of is None else best_of
        if isinstance(count, bool) or not isinstance(count, int) or count < max(n, 1):
            raise InputError(f"best_of is {count!r} for n={n}: give the number of candidates to choose from, n or more")
        scorer_of(self.model, scorer or "likelihood")
        return count

    def _texts(self, jobs: list[Job], one: bool, n: int | None, stream: bool) -> Any:
        """What jobs that write text say: strings, or with `n` lists of them; or a stream."""
        found = self._run(jobs, "text", stream)
        if stream:
            return found
        said = [[result(sample, "text") for sample in samples] for samples in found]
        results = said if n is not None else [samples[0] for samples in said]
        return results[0] if one else results

    def _run(
        self,
        jobs: list[Job],
        out: str,
        stream: bool,
        *,
        steps: int | None = None,
        size: Size | None = None,
        previews: bool = False,
    ) -> Any:
        """Updates of jobs as they happen, or what all of them wrote."""
        if previews and (out == "text" or not stream):
            raise InputError(
                "previews are part of a stream that holds pictures: give stream=True, out='image' or 'auto'"
            )
        if out != "text":
            self._ready(size)
        if previews and self.release.checker is not None:
            raise InputError(
                "previews would pass the safety checker unseen: leave previews out, or load with safety=False"
            )

        def paint(codes: Sequence[Tensor], seeds: Sequence[int], watch: Any = None) -> list[Image.Image]:
            return self.paint(codes, seeds=seeds, steps=steps, size=size, watch=watch)

        show = self._preview if previews else None
        happening: Iterator[Update] = updates(self.engine, self.model.text, jobs, paint, together=not stream, show=show)
        return happening if stream else gathered(happening, jobs)

    @torch.inference_mode()
    def _preview(self, latents: Tensor) -> list[Image.Image]:
        pixels = self.model.pixels
        return [to_image(picture) for picture in pixels.decode(latents.to(pixels.unet.dtype)).clamp(-1, 1)]


def _same_length(pictures: Sequence[Any], texts: Sequence[str], what: str) -> None:
    if len(pictures) != len(texts):
        raise InputError(f"{len(pictures)} pictures but {len(texts)} {what}: give one of the {what} a picture")

"""What people call: pictures and words in, words and pictures out, one loaded model for all of it.

Prompts are laid out as in training (sequence.py): a picture that is read enters as features, a picture inside a prompt
for writing enters as its codes (method, Sec. 5). The engine below speaks tokens only; this file turns files, pictures
and words into its requests, and codes into pictures.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lavit.config import InputError
from lavit.data.documents import question_text
from lavit.generate.engine import Engine
from lavit.generate.request import Completion, Request
from lavit.generate.sampling import Sampling
from lavit.images import open_image, to_image
from lavit.model import LaVIT
from lavit.modules.selector import KeepPolicy
from lavit.sequence import VisualTokens

Picture = str | Path | bytes | Image.Image
UNWANTED = re.compile(r'[.!"()*#:;~]')  # removed from questions (method, Sec. 5)
QUESTION_WORDS = 50


class Pipeline:
    """A loaded LaVIT. Each verb takes one input or a list, and gives back the like.

    `caption_sampling`, `answer_sampling` and `drawing_sampling` are the defaults of the verbs.
    """

    def __init__(
        self,
        model: LaVIT,
        *,
        caption_sampling: Sampling | None = None,
        answer_sampling: Sampling | None = None,
        drawing_sampling: Sampling | None = None,
    ) -> None:
        self.model = model
        patches = model.config.tokenizer.patches
        self.caption_sampling = caption_sampling or Sampling(temperature=0.0, max_tokens=36)
        self.answer_sampling = answer_sampling or Sampling(temperature=0.0, max_tokens=16)
        self.drawing_sampling = drawing_sampling or Sampling(
            temperature=1.0, top_k=50, guidance=3.0, min_tokens=1, max_tokens=patches
        )

    @cached_property
    def engine(self) -> Engine:
        """The token engine over this model's language part."""
        return Engine(self.model.language)

    def caption(self, images: Picture | Sequence[Picture], *, sampling: Sampling | None = None) -> str | list[str]:
        """Say what each picture shows: the text up to and without the first full stop."""
        pictures, one = _many(images)
        requests = [self._reading(open_image(picture), sampling or self.caption_sampling) for picture in pictures]
        said = [_until(text, (".", "\n")) for text in self._texts(requests)]
        return said[0] if one else said

    def ask(
        self,
        images: Picture | Sequence[Picture],
        questions: str | Sequence[str],
        *,
        sampling: Sampling | None = None,
    ) -> str | list[str]:
        """Answer a question about each picture; lists must have the same length."""
        pictures, one = _many(images)
        asked = [questions] if isinstance(questions, str) else list(questions)
        if len(asked) != len(pictures):
            raise InputError(f"{len(pictures)} pictures but {len(asked)} questions: give one question a picture")
        chosen = sampling or self.answer_sampling
        requests = []
        for picture, question in zip(pictures, asked, strict=True):
            prompt = question_text(_question(question))
            requests.append(self._reading(open_image(picture), chosen, then=prompt))
        answers = [_until(text, ("\n", "question:", ",", ".")) for text in self._texts(requests)]
        return answers[0] if one else answers

    def draw(
        self,
        prompt: str,
        *,
        n: int = 1,
        seed: int = 0,
        guidance: float | None = None,
        steps: int | None = None,
        sampling: Sampling | None = None,
    ) -> list[Image.Image]:
        """Draw `n` pictures of a prompt, with seeds seed, seed + 1, …; `steps` are the pixel decoder's."""
        return self.generate(
            [_words(prompt, "prompt")],
            n=n,
            seed=seed,
            guidance=guidance,
            steps=steps,
            sampling=sampling,
        )

    def edit(
        self,
        image: Picture,
        prompt: str,
        *,
        n: int = 1,
        seed: int = 0,
        guidance: float | None = None,
        steps: int | None = None,
        sampling: Sampling | None = None,
    ) -> list[Image.Image]:
        """Draw from a picture and an instruction."""
        parts = [open_image(image), _words(prompt, "prompt")]
        return self.generate(parts, n=n, seed=seed, guidance=guidance, steps=steps, sampling=sampling)

    def generate(
        self,
        parts: Sequence[Picture | str],
        *,
        n: int = 1,
        seed: int = 0,
        guidance: float | None = None,
        steps: int | None = None,
        sampling: Sampling | None = None,
    ) -> list[Image.Image]:
        """Draw from any order of pictures (PIL images) and words."""
        if not parts:
            raise InputError("give at least one picture or word to draw from")
        chosen = replace(sampling or self.drawing_sampling, n=n, seed=seed)
        if guidance is not None:
            chosen = replace(chosen, guidance=guidance)
        vocabulary = self.model.language.vocabulary
        ids: list[int] = []
        for part in parts:
            if isinstance(part, str):
                ids += self._ids(part)
            else:
                codes = self.model.encode([open_image(part)]).codes
                ids += [
                    vocabulary.image_start,
                    *vocabulary.ids(codes).tolist(),
                    vocabulary.image_end,
                ]
        done = self.engine.complete([Request(ids=tuple(ids), mode="image", sampling=chosen)])[0]
        return self.paint(
            [torch.tensor(sample.images[0]) for sample in done],
            seeds=[seed + i for i in range(n)],
            steps=steps,
        )

    def paint(
        self,
        codes: Sequence[Tensor],
        *,
        seeds: Sequence[int],
        steps: int | None = None,
        guidance: float | None = None,
    ) -> list[Image.Image]:
        """Pictures of codes through reconstructor and pixel decoder."""
        features = self.model.features(codes)
        config = self.model.config.pixels
        with torch.inference_mode():
            pictures = self.model.pixels.sample(
                features,
                steps=steps or config.steps,
                guidance=config.guidance if guidance is None else guidance,
                seeds=list(seeds),
            )
        return [to_image(picture) for picture in pictures]

    def tokenize(
        self,
        images: Picture | Sequence[Picture],
        *,
        keep: str | int | float | KeepPolicy = "auto",
        seed: int = 0,
    ) -> VisualTokens:
        """Visual tokens of pictures under a keep policy ("auto", 64 tokens, 0.25 of the patches, …)."""
        pictures, _ = _many(images)
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
    ) -> Image.Image:
        """A picture through its visual tokens and back, without the language model."""
        tokens = self.tokenize(image, keep=keep, seed=seed)
        return self.paint([tokens.codes], seeds=[seed], steps=steps, guidance=guidance)[0]

    def _ids(self, text: str) -> list[int]:
        return self.model.text(text, add_special_tokens=False)["input_ids"]

    @torch.inference_mode()
    def _reading(self, image: Image.Image, sampling: Sampling, *, then: str = "") -> Request:
        """Start, features, end of a picture, and what follows it."""
        model, vocabulary = self.model, self.model.language.vocabulary
        patches = model.patches([image])
        keep = model.tokenizer.select(patches)
        features = model.language.read(model.tokenizer.prepare(patches), keep)
        text = self._ids(then) if then else []
        # the slots' ids are never looked at: features stand there
        ids = (
            vocabulary.image_start,
            *[vocabulary.image_end] * len(features),
            vocabulary.image_end,
            *text,
        )
        slots = (False, *[True] * len(features), False, *[False] * len(text))
        return Request(ids=ids, slots=slots, features=features, mode="text", sampling=sampling)

    def _texts(self, requests: Sequence[Request]) -> list[str]:
        done: list[list[Completion]] = self.engine.complete(requests)
        return [self.model.text.decode(list(samples[0].text), skip_special_tokens=True) for samples in done]


def _many(items: Picture | Sequence[Picture]) -> tuple[list[Picture], bool]:
    if isinstance(items, str | Path | bytes | Image.Image):
        return [items], True
    if not items:
        raise InputError("give at least one picture")
    return list(items), False


def _words(text: str, what: str) -> str:
    if not text.strip():
        raise InputError(f"the {what} is empty: say in words what is wanted")
    return text.strip()


def _question(question: str) -> str:
    """Lower case, without the characters the paper removes, at most 50 words."""
    words = UNWANTED.sub("", _words(question, "question").lower()).split()
    if not any(character.isalnum() for word in words for character in word):
        raise InputError(f"the question {question!r} has no words: ask about the picture")
    return " ".join(words[:QUESTION_WORDS])


def _until(text: str, ends: Sequence[str]) -> str:
    """The text before the first of these."""
    for end in ends:
        text = text.split(end)[0]
    return text.strip()

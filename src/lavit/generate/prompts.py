"""Words and pictures to prompts as the LM reads them, and to jobs that go on from them.

A picture that is read enters as features of its merged patches, others as codes (method, Sec. 5);
each is encoded alone, so that a prompt does not depend on its batch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lavit.config import InputError
from lavit.conversation import Reply, conversation, turn_end
from lavit.generate.options import KeepLike, Messages, Pieces, Seed
from lavit.generate.protocols import Protocol, fitted
from lavit.generate.request import Request
from lavit.generate.sampling import Sampling
from lavit.generate.stream import Job
from lavit.images import ImageInput, open_image
from lavit.layout import (
    QUESTION_WORDS,
    ImagePart,
    Part,
    asking,
    drawing,
    editing,
    ids_of,
    mixed,
    reading,
    segments,
)
from lavit.model import LaVIT
from lavit.sequence import lay_out
from lavit.visual_tokenizer.layers import Patches
from lavit.visual_tokenizer.selector import KeepPolicy

log = logging.getLogger(__name__)

Parts = Sequence[Part]


@dataclass(frozen=True)
class Inputs:
    """The inputs of one call, laid out; `one`: a single input was given, not a list."""

    parts: list[list[Part]]
    one: bool


@dataclass(frozen=True, eq=False)
class Prompt:
    """Joint ids; where `slots` is true the next row of `features` enters instead."""

    ids: tuple[int, ...]
    slots: tuple[bool, ...]
    features: Float[Tensor, "slots width"] | None


@torch.inference_mode()
def lay_prompt(model: LaVIT, parts: Parts) -> Prompt:
    """Ids, slots and features of words and pictures in order."""
    model.needs("language")
    vocabulary = model.language.vocabulary
    features: list[Tensor] = []

    def codes(part: ImagePart) -> tuple[int, ...]:
        if not part.read:
            return tuple(_codes(model, part).tolist())
        model.needs("vision", "visual_tokenizer")
        patches = model.patches([open_image(part.image)])
        features.append(looked_at(model, patches, KeepPolicy.parse(part.keep)))
        return (0,) * len(features[-1])  # ids of slots are never looked at

    ids, read_as = partial(ids_of, model.text_tokenizer), model.config.language.read_as
    document = segments(parts, ids, codes, vocabulary.end, read_as=read_as)
    laid = lay_out(document, vocabulary)
    if not features:
        return Prompt(laid.ids, (), None)
    return Prompt(laid.ids, laid.slots, torch.cat(features))


def looked_at(model: LaVIT, patches: Patches, policy: KeepPolicy) -> Float[Tensor, "kept width"]:
    """What the language model reads of a picture's encoder features, under a keep policy."""
    keep = model.visual_tokenizer.select(patches, policy)
    prepared = model.visual_tokenizer.prepare(patches).to(model.language.rows.dtype)
    return model.language.read(prepared, keep)


def _codes(model: LaVIT, part: ImagePart) -> Tensor:
    """Codes of a picture: those it came with, else those of encoding it."""
    if part.codes is None:
        policy = KeepPolicy.parse(part.keep)
        return model.encode_images([open_image(part.image)], policy).codes
    config = model.config.visual_tokenizer
    wrong = [code for code in part.codes if not 0 <= code < config.codes]
    if wrong or not 1 <= len(part.codes) <= config.patches:
        among = f", among them {wrong[0]}" if wrong else ""
        raise InputError(
            f"a picture came with {len(part.codes)} codes{among}: this model's pictures have 1 to "
            f"{config.patches} codes of 0..{config.codes - 1}; leave 'codes' out to encode it again"
        )
    return torch.tensor(part.codes)


def pictures_of(images: ImageInput | Sequence[ImageInput]) -> list[ImageInput]:
    """One picture or several as a list; raises `InputError` for none."""
    pictures = [images] if isinstance(images, ImageInput) else list(images)
    if not pictures:
        raise InputError("give at least one picture")
    return pictures


def words_of(texts: str | Sequence[str], what: str) -> list[str]:
    """One text or several as a list; `what` they are is named where one is empty, or none is there.

    Raises `InputError` then.
    """
    words = [text.strip() for text in ([texts] if isinstance(texts, str) else texts)]
    if not words:
        raise InputError(f"give at least one {what}")
    if not all(words):
        raise InputError(f"the {what} is empty: say in words what is wanted")
    return words


def pairs_of(
    images: ImageInput | Sequence[ImageInput],
    texts: str | Sequence[str],
    what: str,
) -> list[tuple[ImageInput, str]]:
    """Each picture with its text; raises `InputError` where there are not as many of both."""
    pictures, words = pictures_of(images), words_of(texts, what)
    if len(pictures) != len(words):
        counts = f"{len(pictures)} pictures but {len(words)} {what}s"
        raise InputError(f"{counts}: give each picture its {what}")
    return list(zip(pictures, words, strict=True))


def captions_of(images: ImageInput | Sequence[ImageInput], keep: KeepLike) -> Inputs:
    """Pictures that are to be described."""
    parts = [reading(picture, keep=keep) for picture in pictures_of(images)]
    return Inputs(parts, isinstance(images, ImageInput))


def answers_of(
    images: ImageInput | Sequence[ImageInput],
    questions: str | Sequence[str],
    keep: KeepLike,
) -> Inputs:
    """Pictures, and a question about each; raises `InputError` for one without words."""
    pairs = pairs_of(images, questions, "question")
    for _, question in pairs:
        if not any(map(str.isalnum, question)):
            said = f"the question {question!r} has no words"
            raise InputError(f"{said}: ask about the picture")
        if (count := len(question.split())) > QUESTION_WORDS:
            said = f"a question has {count} words, of which the first {QUESTION_WORDS} are read"
            log.warning("%s: shorten it, or chat", said)
    parts = [asking(picture, (question, None), keep=keep) for picture, question in pairs]
    return Inputs(parts, isinstance(images, ImageInput))


def drawings_of(prompts: str | Sequence[str]) -> Inputs:
    """Prompts of pictures."""
    parts = [drawing(prompt) for prompt in words_of(prompts, "prompt")]
    return Inputs(parts, isinstance(prompts, str))


def edits_of(
    images: ImageInput | Sequence[ImageInput],
    instructions: str | Sequence[str],
) -> Inputs:
    """Pictures, and what is to be made of each."""
    pairs = pairs_of(images, instructions, "instruction")
    parts = [editing([picture], instruction) for picture, instruction in pairs]
    return Inputs(parts, isinstance(images, ImageInput))


def mixtures_of(pieces: Pieces | Sequence[Pieces], *, read: bool) -> Inputs:
    """Words and pictures in any order; pictures are `read`, or enter as codes."""
    if isinstance(pieces, ImageInput):  # one word or picture by itself
        pieces = [pieces]
    several = bool(pieces) and all(isinstance(item, list | tuple) for item in pieces)
    items: list[Any] = list(pieces) if several else [pieces]
    return Inputs([mixed(item, read=read) for item in items], not several)


def conversations_of(
    messages: Messages | Sequence[Messages],
    text: PreTrainedTokenizerBase,
    reply: Reply,
) -> Inputs:
    """Conversations up to where the assistant's reply begins."""
    several = not isinstance(messages, Mapping | str) and bool(messages)
    several = several and not isinstance(messages[0], Mapping)
    talks: list[Any] = list(messages) if several else [messages]
    return Inputs([conversation(talk, text, reply=reply) for talk in talks], not several)


def seeds_of(seed: Seed, count: int) -> list[int]:
    """A seed for each of `count` inputs: seed + i, or entry i of a list.

    Raises `InputError` for an invalid seed, and for a list of another length.
    """
    given = list(seed) if isinstance(seed, Sequence) else [seed]
    for one in given:
        if isinstance(one, bool) or not isinstance(one, int) or not -(2**63) <= one < 2**63:
            usable = "give a whole number below 2**63, or a list of one for each input"
            raise InputError(f"seed {one!r} is not a seed: {usable}")
    if isinstance(seed, int):
        return [seed + number for number in range(count)]
    if len(given) != count:
        remedy = "give one for each, or a single number"
        raise InputError(f"{len(given)} seeds for {count} inputs: {remedy}")
    return given


def jobs_of(
    model: LaVIT,
    prompts: Sequence[Parts],
    sampling: Sampling,
    *,
    seed: Seed = 0,
    ends: tuple[str, ...] = (),
    **options: Any,
) -> list[Job]:
    """A job for each prompt, its text cut before one of `ends`; options as in `Request`."""
    seeds = seeds_of(seed, len(prompts))
    jobs = []
    for parts, own in zip(prompts, seeds, strict=True):
        prompt = vars(lay_prompt(model, parts))
        jobs.append(Job(Request(sampling=sampling, seed=own, **prompt, **options), ends))
    return jobs


def image_jobs(
    model: LaVIT,
    protocol: Protocol,
    prompts: Sequence[Parts],
    *,
    seed: Seed = 0,
    sampling: Sampling | None = None,
    guidance: float | None = None,
) -> list[Job]:
    """Jobs that go on with one picture each; options as in `CodesOptions`."""
    how = sampling_of_codes(model, protocol, sampling, guidance)
    return jobs_of(model, prompts, how, seed=seed, mode="image")


def sampling_of_codes(
    model: LaVIT,
    protocol: Protocol,
    sampling: Sampling | None,
    guidance: float | None,
) -> Sampling:
    """How codes are written; raises `InputError` for more than this model's pictures have."""
    patches = model.config.visual_tokenizer.patches
    how = sampling or fitted(protocol.drawing, patches)
    if how.max_tokens > patches:
        raise InputError(
            f"max_tokens is {how.max_tokens}, but pictures of this model have at most {patches} "
            f"codes: set max_tokens={patches} or fewer"
        )
    return how if guidance is None else replace(how, guidance=guidance)


def turn_ends(model: LaVIT) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """How an assistant's turn ends: strings that cut its text, ids that stop it."""
    text = model.text_tokenizer
    closing = turn_end(text)
    if not closing:
        return (), ()
    known, ids = text.added_tokens_decoder, ids_of(text, closing, controls=True)
    stop = next((id for id in ids if id in known and known[id].special), None)
    if stop is not None:
        return (), (stop,)
    return (closing.strip() or closing,), ()

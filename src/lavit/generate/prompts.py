"""Words and pictures to prompts as the LM reads them, and to jobs that go on from them.

A picture that is read enters as features of its merged patches, others as codes (method, Sec. 5);
each is encoded alone, so that a prompt does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from lavit.config import InputError
from lavit.generate.protocols import Protocol, fitted
from lavit.generate.request import Request
from lavit.generate.sampling import Sampling
from lavit.generate.stream import Job
from lavit.images import open_image
from lavit.layout import ImagePart, Part, Reply, ids_of, segments, turn_end
from lavit.model import LaVIT
from lavit.modules.selector import KeepPolicy
from lavit.sequence import lay_out

Picture = str | Path | bytes | Image.Image
Parts = Sequence[Part]
# sample i of every input takes seed + i, or entry i of a tuple; a list has one of these for each
# input; None: fresh ones
Seed = int | tuple[int, ...] | list[Any] | None
MODES = {"text": "text", "image": "image", "auto": "mixed"}


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
    language, vocabulary = model.language, model.language.vocabulary
    features: list[Tensor] = []

    def codes(part: ImagePart) -> tuple[int, ...]:
        if not part.read:
            return tuple(_codes(model, part).tolist())
        patches = model.patches([open_image(part.image)])
        model.needs("visual_tokenizer")
        keep = model.visual_tokenizer.select(patches, KeepPolicy.parse(part.keep))
        prepared = model.visual_tokenizer.prepare(patches).to(language.rows.dtype)
        features.append(language.read(prepared, keep))
        return (0,) * len(features[-1])  # ids of slots are never looked at

    ids, read_as = partial(ids_of, model.text_tokenizer), model.config.language.read_as
    document = segments(parts, ids, codes, vocabulary.end, read_as=read_as)
    laid = lay_out(document, vocabulary)
    if not features:
        return Prompt(laid.ids, (), None)
    return Prompt(laid.ids, laid.slots, torch.cat(features))


def _codes(model: LaVIT, part: ImagePart) -> Tensor:
    """Codes of a picture: those it came with, else those of a look at it."""
    if part.codes is None:
        policy = KeepPolicy.parse(part.keep)
        return model.encode_images([open_image(part.image)], policy).codes
    config = model.config.visual_tokenizer
    wrong = [code for code in part.codes if not 0 <= code < config.codes]
    if wrong or not 1 <= len(part.codes) <= config.patches:
        among = f", among them {wrong[0]}" if wrong else ""
        raise InputError(
            f"a picture came with {len(part.codes)} codes{among}: this model's pictures have 1 to "
            f"{config.patches} codes of 0..{config.codes - 1}; leave 'codes' out to look at it anew"
        )
    return torch.tensor(part.codes)


def pictures_of(items: Picture | Sequence[Picture]) -> tuple[list[Picture], bool]:
    """A list of pictures, and whether it was one that was given."""
    if isinstance(items, str | Path | bytes | Image.Image):
        return [items], True
    if not items:
        raise InputError("give at least one picture")
    return list(items), False


def words_of(
    items: str | Sequence[str], what: str, pictures: Sequence[Picture] | None = None
) -> tuple[list[str], bool]:
    """A list of texts, none empty, as many as `pictures` (if given); and whether it was one."""
    one = isinstance(items, str)
    texts = [text.strip() for text in ([items] if one else items)]
    if not texts:
        raise InputError(f"give at least one {what}")
    if not all(texts):
        raise InputError(f"the {what} is empty: say in words what is wanted")
    if pictures is not None and len(texts) != len(pictures):
        counts = f"{len(pictures)} pictures but {len(texts)} {what}s"
        raise InputError(f"{counts}: give one of the {what}s a picture")
    return texts, one


def jobs_of(
    model: LaVIT,
    prompts: Sequence[Parts],
    sampling: Sampling,
    *,
    n: int | None,
    seed: Seed,
    ends: tuple[str, ...] = (),
    **options: Any,
) -> list[Job]:
    """A job of n samples (None: one) for each prompt, seeds resolved; options as in `Request`."""
    if isinstance(seed, list) and len(seed) != len(prompts):
        counts = f"{len(seed)} seeds for {len(prompts)} inputs"
        raise InputError(f"{counts}: a list has one entry for each input")
    seeds = seed if isinstance(seed, list) else [seed] * len(prompts)
    samplings = [replace(sampling, n=1 if n is None else n, seed=own) for own in seeds]
    jobs = []
    for parts, how in zip(prompts, samplings, strict=True):
        how, prompt = replace(how, seed=how.seeds()), lay_prompt(model, parts)
        jobs.append(Job(Request(sampling=how, **vars(prompt), **options), ends))
    return jobs


def writing(
    model: LaVIT,
    protocol: Protocol,
    prompts: Sequence[Parts],
    *,
    out: Reply,
    n: int | None = None,
    seed: Seed = 0,
    sampling: Sampling | None = None,
    picture: Sampling | None = None,
    guidance: float | None = None,
    chat: bool = False,
) -> list[Job]:
    """Jobs that go on with text, a picture, or both. In a chat text ends where the turn does."""
    if out not in MODES:
        raise InputError(f"out {out!r} is not known: use 'text', 'image' or 'auto'")
    patches = model.config.visual_tokenizer.patches
    inside = (sampling if out == "image" else picture) or fitted(protocol.drawing, patches)
    if guidance is not None:
        inside = replace(inside, guidance=guidance)
    if out != "text" and inside.max_tokens > patches:
        raise InputError(
            f"max_tokens is {inside.max_tokens}, but pictures of this model have at most {patches} "
            f"codes: set max_tokens={patches} or fewer"
        )
    how = inside if out == "image" else sampling
    if how is None:  # a reply that may hold pictures need not hold text
        how = replace(protocol.chat, min_tokens=0) if out == "auto" else protocol.chat
    ends, stop = _turn_end(model) if chat and out != "image" else ((), ())
    options = {"mode": MODES[out], "picture": inside, "stop": stop}
    return jobs_of(model, prompts, how, n=n, seed=seed, ends=ends, **options)


def _turn_end(model: LaVIT) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """How an assistant's turn ends: strings that cut its text, ids that stop it."""
    text = model.text_tokenizer
    closing = turn_end(text)
    if not closing:
        return (), ()
    ids = text(closing, add_special_tokens=False)["input_ids"]
    if ids and not text.decode(ids[:1], skip_special_tokens=True):  # a special token
        return (), (ids[0],)
    return (closing.strip() or closing,), ()

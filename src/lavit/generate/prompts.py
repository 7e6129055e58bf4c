"""Prompts as the LM reads them: words and pictures to ids, slots and features.

A picture that is read enters as features of its merged patches, others as codes (method, Sec. 5). Each picture is
encoded alone, so that a prompt does not depend on its batch. The words of training and of use are laid out in data/.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from lavit.config import InputError
from lavit.data.chat import ChatPicture, ChatText
from lavit.images import open_image
from lavit.model import LaVIT
from lavit.modules.selector import KeepPolicy

Picture = str | Path | bytes | Image.Image


@dataclass(frozen=True, eq=False)
class Prompt:
    """Joint ids; where `slots` is true the next row of `features` enters instead."""

    ids: tuple[int, ...]
    slots: tuple[bool, ...]
    features: Float[Tensor, "slots width"] | None


@torch.inference_mode()
def lay_prompt(model: LaVIT, parts: Sequence[ChatText | ChatPicture]) -> Prompt:
    """Ids, slots and features of words and pictures in order; each part of text is tokenised on its own."""
    vocabulary = model.language.vocabulary
    ids: list[int] = []
    slots: list[bool] = []
    features: list[Tensor] = []
    for part in parts:
        if isinstance(part, ChatText):
            piece = model.text(part.text, add_special_tokens=False)["input_ids"]
            slot = [False] * len(piece)
        elif part.read and model.config.language.read_as == "features":
            rows = read(model, open_image(part.picture), KeepPolicy.parse(part.keep))
            # the slots' ids are never looked at: features stand there
            piece = [vocabulary.image_start, *[vocabulary.image_end] * len(rows), vocabulary.image_end]
            slot = [False, *[True] * len(rows), False]
            features.append(rows)
        else:
            codes = codes_of(model, part)
            piece = [vocabulary.image_start, *vocabulary.ids(codes).tolist(), vocabulary.image_end]
            slot = [False] * len(piece)
        ids += piece
        slots += slot
    return Prompt(tuple(ids), tuple(slots) if features else (), torch.cat(features) if features else None)


def read(model: LaVIT, image: Image.Image, policy: KeepPolicy) -> Float[Tensor, "kept width"]:
    """Continuous features of a picture, as the LM reads them."""
    patches = model.patches([image])
    keep = model.tokenizer.select(patches, policy)
    return model.language.read(model.tokenizer.prepare(patches).to(model.language.rows.dtype), keep)


def codes_of(model: LaVIT, part: ChatPicture) -> Tensor:
    """Codes of a picture: those it came with, else those of a look at it."""
    if part.codes is None:
        return model.encode([open_image(part.picture)], KeepPolicy.parse(part.keep)).codes
    config = model.config.tokenizer
    wrong = [code for code in part.codes if not 0 <= code < config.codes]
    if wrong or not 1 <= len(part.codes) <= config.patches:
        raise InputError(
            f"a picture came with {len(part.codes)} codes{f', among them {wrong[0]}' if wrong else ''}: this model's "
            f"pictures have 1 to {config.patches} codes of 0..{config.codes - 1}; leave 'codes' out to look at it anew"
        )
    return torch.tensor(part.codes)


def pictures_of(items: Picture | Sequence[Picture]) -> tuple[list[Picture], bool]:
    """A list of pictures, and whether it was one that was given."""
    if isinstance(items, str | Path | bytes | Image.Image):
        return [items], True
    if not items:
        raise InputError("give at least one picture")
    return list(items), False


def words_of(items: str | Sequence[str], what: str) -> tuple[list[str], bool]:
    """A list of texts, and whether it was one that was given; empty ones raise `InputError`."""
    texts, one = ([items], True) if isinstance(items, str) else (list(items), False)
    if not texts:
        raise InputError(f"give at least one {what}")
    for text in texts:
        if not text.strip():
            raise InputError(f"the {what} is empty: say in words what is wanted")
    return [text.strip() for text in texts], one


def written_from(parts: Sequence[Any], *, read: bool) -> list[ChatText | ChatPicture]:
    """Words (strings) and pictures (anything else) of a prompt, as parts."""
    if not parts:
        raise InputError("give at least one picture or word to draw from")
    return [ChatText(part) if isinstance(part, str) else ChatPicture(open_image(part), read=read) for part in parts]

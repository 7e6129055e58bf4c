"""Rows of joint ids that are given from outside, checked before anything is computed."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from lavit.config import InputError
from lavit.vocabulary import Vocabulary


def check_rows(ids: Tensor, mask: Tensor, known: Vocabulary, values: Tensor | None) -> None:
    """Raise `InputError` unless rows of ids, their mask and their pictures go together.

    ids, mask: [rows tokens] of whole numbers; values: [images 3 size size], one for each image
    start that image end follows at once.
    """
    _check_ids("input_ids", ids, known)
    if mask.shape != ids.shape:
        said = f"attention_mask is {list(mask.shape)}, input_ids are {list(ids.shape)}"
        raise InputError(f"{said}: give one of the same shape, or none")
    pictures, markers = 0, (known.image_start, known.image_end)
    for number, (row, kept) in enumerate(zip(ids, mask.bool(), strict=True)):
        shown = row[kept].tolist()
        if not shown:
            raise InputError(f"row {number} has no token: give words or a picture")
        found = [id for id in shown if id in markers]
        if found != [*markers] * (len(found) // 2):
            raise InputError(f"row {number}: an image start or an image end is without the other")
        pictures += sum(pair == markers for pair in pairwise(shown))
    given = 0 if values is None else len(values)
    if given != pictures:
        said = f"pixel_values are of {given} pictures, input_ids have places for {pictures}"
        raise InputError(f"{said}: give what the processor gave, both of one call")
    if values is not None and not torch.isfinite(values).all():
        raise InputError("pixel_values hold values that are not finite")


def check_written(ids: Tensor, known: Vocabulary) -> None:
    """Raise `InputError` unless each row [rows tokens] holds codes of a picture."""
    _check_ids("image_tokens", ids, known)
    for number, codes in enumerate(known.is_code(ids).sum(1).tolist()):
        if not codes:
            cure = 'give what generate wrote with generation_mode="image"'
            raise InputError(f"row {number} holds no code of a picture: {cure}")


def _check_ids(name: str, ids: Tensor, known: Vocabulary) -> None:
    if ids.ndim != 2 or not len(ids) or (ids.numel() and ids.is_floating_point()):
        form = f"{name} are {list(ids.shape)} of {ids.dtype}"
        raise InputError(f"{form}: give [rows, tokens] of whole numbers, one row at least")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < known.size:
        said = f"{name} are of {int(ids.min())}..{int(ids.max())}"
        raise InputError(f"{said}: this model's are 0..{known.size - 1}")

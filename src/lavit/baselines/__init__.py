"""Rivals of LaVIT in its own frame: same encoder, LM, data and steps, one thing swapped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lavit.baselines.readers import LinearReader, QFormer, Resampler
from lavit.config import InputError
from lavit.language.reader import Reader

READERS = {kind.__name__: kind for kind in (LinearReader, Resampler, QFormer)}


def baseline_reader(sizes: Mapping[str, Any], dim: int, width: int) -> Reader:
    """The reader that `LanguageConfig.reader` names, from `dim` channels to the LM's `width`.

    Raises `InputError` for an unknown name or size.
    """
    name = sizes.get("_class_name")
    if name not in READERS:
        raise InputError(f"there is no reader {name!r}: choose from {', '.join(READERS)}")
    rest = {key: value for key, value in sizes.items() if key != "_class_name"}
    try:
        return READERS[name](dim, width, **rest)
    except TypeError as error:
        raise InputError(f"language.reader {dict(sizes)}: {error}") from error

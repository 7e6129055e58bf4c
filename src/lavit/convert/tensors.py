"""Tensor files larger than memory: pickles read without running them, and written.

Tensors come mapped from disk (the kernel loads and drops their pages) and are written from there,
so converting a 7B model needs memory for one tensor, not for one file.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lavit.config import InputError
from lavit.files import more_than_tensors

log = logging.getLogger(__name__)
BARE = ""  # name of the tensor in a pickle that holds a single tensor instead of a dictionary


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Tensors of a PyTorch file, mapped; code in it is never run.

    A file that holds anything but tensors by name (or one tensor, named "") raises `InputError`.
    Files in PyTorch's format of before 1.6 cannot be mapped and are read whole.
    """
    try:
        data = _load(path, mapped=True)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: is the published folder fully downloaded?") from error
    except pickle.UnpicklingError as error:
        raise more_than_tensors(path, error) from error
    except (RuntimeError, ValueError, EOFError, OSError) as error:
        reason = " ".join(str(error).split())[:200] or "it is empty"
        raise InputError(f"{path} is not a readable PyTorch file: {reason}") from error
    data = {BARE: data} if isinstance(data, Tensor) else data
    if not isinstance(data, Mapping) or not all(isinstance(part, Tensor) for part in data.values()):
        raise InputError(f"{path} holds no plain dictionary of tensors")
    return {str(name): tensor.detach() for name, tensor in data.items()}


def _load(path: Path, *, mapped: bool) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except RuntimeError as error:
        if not mapped or "mmap" not in str(error):
            raise
        log.warning("%s is in PyTorch's old format: read as a whole", path.name)
        return _load(path, mapped=False)


def write_pickle(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `read_pickle`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensors[BARE] if list(tensors) == [BARE] else dict(tensors), path)

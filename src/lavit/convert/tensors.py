"""Tensor files larger than memory: pickles read without running them, safetensors in and out.

Tensors come mapped from disk (the kernel loads and drops their pages), so converting a 7B model
needs memory for one tensor, not for one file. The safetensors format is eight bytes of header
length, a JSON header, and the raw data.
"""

from __future__ import annotations

import json
import logging
import math
import mmap
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lavit.config import InputError

log = logging.getLogger(__name__)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
BARE = ""  # name of the tensor in a pickle that holds a single tensor instead of a dictionary


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Tensors of a PyTorch file, mapped; code in it is never run.

    A file that holds anything but tensors by name (or one tensor, named "") raises `InputError`.
    Files in PyTorch's format of before 1.6 cannot be mapped and are read whole.
    """
    try:
        data = _load(path, mapped=True)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: is this the published folder, fully downloaded?") from error
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} holds more than tensors and is not opened: {str(error).splitlines()[0]}") from error
    except (RuntimeError, ValueError, EOFError, OSError) as error:
        raise InputError(f"{path} is not a readable PyTorch file: {str(error).splitlines()[0]}") from error
    if isinstance(data, Tensor):
        data = {BARE: data}
    if not isinstance(data, Mapping) or not all(isinstance(value, Tensor) for value in data.values()):
        raise InputError(f"{path} holds no plain dictionary of tensors")
    return {str(name): value.detach() for name, value in data.items()}


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


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors one after the other, wide types first so that every one is aligned."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in NAMES:
            raise InputError(f"{name} has type {tensor.dtype}, which safetensors files cannot hold here")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            if tensors[name].numel():
                file.write(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, mapped; writing to them changes no file.

    Inverse of `write_safetensors`.
    """
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        header.pop("__metadata__", None)
        return {name: _view(data, 8 + size, entry) for name, entry in header.items()}
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: is this folder a complete model?") from error
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}") from error


def _view(data: mmap.mmap, start: int, entry: Mapping[str, object]) -> Tensor:
    shape, dtype = entry["shape"], DTYPES[entry["dtype"]]
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    offset = start + entry["data_offsets"][0]
    return torch.frombuffer(data, dtype=dtype, count=count, offset=offset).reshape(shape)

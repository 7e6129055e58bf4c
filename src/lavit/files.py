"""Files of a model: folders whole or not at all, tensors as safetensors, strict loading.

Text and JSON, whole or not at all too, are written by config.py.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from lavit.config import InputError

if TYPE_CHECKING:  # processes that draw scenes need folders, and no torch: seconds of import each
    from torch import Tensor, nn

CODES = {  # of torch's number types in safetensors
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
    "bool": "BOOL",
}


@contextmanager
def naming(name: str | Path) -> Iterator[None]:
    """Put the name of what is wrong in front of what an `InputError` says."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `folder` at the end, if anything lies in it then."""
    if not folder.name:  # "." or ".."
        raise InputError(f"cannot write to {folder}: name a folder inside it")
    new, old = (folder.with_name(f".{folder.name}.{age}") for age in ("new", "old"))
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from error
    try:
        yield new
        if not any(new.iterdir()):
            return
        if not folder.exists():
            os.replace(new, folder)
        elif not _exchange(new, folder):  # a kill in between would leave none
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
            os.replace(new, folder)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step, where the system can (Linux's renameat2)."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2
    if swap is None:
        return False
    done: int = swap(here, os.fsencode(one), here, os.fsencode(other), exchange)
    return done == 0


class Busy(InputError):
    """Another process writes there."""


@contextmanager
def alone(folder: Path, file: str = "", *, wait: bool = False) -> Iterator[None]:
    """Be the only process that writes into a folder, or a file of it; the lock dies with it.

    Where another one is at it, `wait` for its end, or raise `Busy`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f".{file}.lock" if file else folder / ".lock").open("a")
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            said = f"another process is writing to {folder / file}"
            raise Busy(f"{said}: wait for its end, or name another place") from error
        yield


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors, creating the folder."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    save_file(plain, path, {"format": "pt"})  # transformers looks for it


def write_tensors(tensors: Mapping[str, Tensor], values: Iterable[Tensor], path: Path) -> None:
    """Write safetensors in the memory of one tensor: `values` gives each when its turn comes.

    `tensors` says names, shapes and number types, in the order of `values`.
    """
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        about = {
            "dtype": CODES[str(tensor.dtype).removeprefix("torch.")],
            "shape": list(tensor.shape),
        }
        header[name] = {**about, "data_offsets": [begin, end]}
    said = json.dumps(header).encode()
    said += b" " * (-len(said) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(said).to_bytes(8, "little") + said)
        for value in values:
            plain = value.detach().cpu().contiguous().reshape(-1)
            file.write(plain.view(torch.uint8).numpy().data)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, mapped; a missing or broken one raises `InputError`."""
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError as error:
        said = f"{path} is missing: this model folder is incomplete (did its training end?)"
        raise InputError(said) from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}") from error


def load_strictly(module: nn.Module, tensors: dict[str, Tensor], where: Path) -> None:
    """Load every tensor into the module; names or shapes that differ raise `InputError`."""
    expected = module.state_dict()
    missing, unknown = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or unknown:
        said = f"missing {missing[:3]}, not expected {unknown[:3]}"
        raise InputError(f"{where} does not fit this configuration: {said}")
    for name, tensor in tensors.items():
        wanted = list(expected[name].shape)
        if list(tensor.shape) != wanted:
            said = f"{name} is {list(tensor.shape)}, this configuration expects {wanted}"
            raise InputError(f"{where}: {said}")
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise InputError(f"{where}: {name} is of {tensor.dtype}, not {expected[name].dtype}")
    module.load_state_dict(tensors)


class WrongWeights(ValueError):
    """Weights (`names`, three of them at most) are not those that a configuration has."""

    def __init__(self, names: str, what: str = "missing or of another size") -> None:
        super().__init__(f"weights are {what}: {names}")
        self.names = names


def pretrained(
    kind: Any,
    where: str | Path,
    *,
    whole: bool = True,
    strict: bool = False,
    **options: Any,
) -> Any:
    """A model of a transformers or diffusers folder or hub id.

    Raises `WrongWeights` for weights that are of other sizes, if it is to be `whole` missing (they
    would be drawn at random, and named in a table), or if `strict` unknown or integers; other
    errors are those of `kind.from_pretrained`, which takes the `options`.
    """
    log = logging.getLogger("transformers.modeling_utils")
    log.addFilter(_is_error)
    try:
        model, info = kind.from_pretrained(where, output_loading_info=True, **options)
    except pickle.UnpicklingError as error:
        raise more_than_tensors(where, error) from error
    finally:
        log.removeFilter(_is_error)
    kinds = ["mismatched_keys", *["missing_keys"] * whole]
    if wrong := sorted(str(key) for kind in kinds for key in info[kind]):
        raise WrongWeights(", ".join(wrong[:3]))
    unknown = {str(key) for key in info["unexpected_keys"]}
    if strict and (wrong := [*_strays(model, unknown, Path(where))] or sorted(unknown)):
        raise WrongWeights(", ".join(wrong[:3]), "unknown or integers")
    return model


def _strays(model: nn.Module, unknown: set[str], folder: Path) -> Iterator[str]:
    """Tensors of a folder, each behind its file, that are unknown, or integers in a float's place:
    libraries pass over the ones and round the others.
    """
    floats = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as found:
            for name in found.keys():  # noqa: SIM118  # no dictionary
                number = found.get_slice(name).get_dtype()
                if name in unknown or (name in floats and number.startswith(("I", "U", "BOOL"))):
                    yield f"{file.name}: {name} ({number})"


def more_than_tensors(where: str | Path, error: pickle.UnpicklingError) -> InputError:
    """Of a pickle that is not opened. What torch says advises to open it all the same."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    what = f" ({named[1]})" if named else ""
    said = f"{where} holds more than tensors{what}, which may run code, and is not opened"
    cure = "in an environment that you trust, with torch.load(weights_only=True)"
    return InputError(f"{said}: convert it to safetensors {cure}")


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def load_whole(kind: Any, folder: Path, **options: Any) -> Any:
    """A transformers or diffusers model of a class `kind`, with every weight from its folder.

    `options` are those of its `from_pretrained`. Raises `InputError` where the folder cannot be
    read, or its weights are not exactly those of its configuration.
    """
    options |= {"use_safetensors": True, "local_files_only": True}
    try:
        return pretrained(kind, folder, strict=True, **options)
    except WrongWeights as error:
        raise InputError(f"{folder} does not fit its own configuration: {error.names}") from error
    except Exception as error:  # configurations and weights fail in ways of their own
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder} cannot be read: {reason}") from error


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

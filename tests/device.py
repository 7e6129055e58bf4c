"""A second device without hardware: its tensors compute on the CPU and refuse to be mixed with it.

    DEVICE            torch.device("pretend", 0), in place of a GPU
    waits()           where the host waited for the device inside: (file, line) of src/lavit

What mixes devices raises as on CUDA, and `.numpy()` does; a CPU scalar and a CPU index may enter.
Autocast casts as CUDA's does: products to bf16, norms, softmax and losses to fp32. Random numbers
are the CPU's of the same seed, so that what is computed can be compared bit by bit.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration as registration
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretend"
SOURCES = str(Path(__file__).parents[1] / "src" / "lavit")
MAY_MIX = {"aten::copy_", "aten::_to_copy", "aten::to"}  # what moves tensors between devices
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2"}
CAST_DOWN = (
    *(
        "linear",
        "matmul",
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "conv1d",
        "conv2d",
        "conv_transpose2d.input",
    ),
    "scaled_dot_product_attention",
)
CAST_UP = (
    *("layer_norm", "group_norm", "softmax.int", "log_softmax.int", "cross_entropy_loss"),
    *("cosine_similarity", "mse_loss", "exp", "log", "pow.Tensor_Scalar", "sum", "sum.dim_IntList"),
    *("norm.ScalarOpt_dim", "prod", "cumsum"),
)


class _Backend(registration._DummyBackendModule):
    """What torch asks of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
DEVICE = torch.device(NAME, 0)
_waited: list[set[tuple[str, int]]] = []


class DeviceTensor(torch.Tensor):
    """A tensor on the device; `inner` holds its values on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> DeviceTensor:
        how = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        with torch.inference_mode(False):  # else views of weights have no version
            new = torch.Tensor._make_wrapper_subclass(
                cls, inner.size(), dtype=inner.dtype, device=DEVICE, **how
            )
        new.inner = inner
        return new

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self) -> str:
        return f"DeviceTensor({self.inner})"

    def __getitem__(self, key: Any) -> Any:
        """Lists of numbers become tensors here: torch makes them where no Python runs."""
        return super().__getitem__(torch.tensor(key) if isinstance(key, list) else key)

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor here, of this one's type."""
        return torch.tensor(data, dtype=dtype or self.dtype).to(DEVICE)

    def tolist(self) -> Any:
        """The values; the host waits for them."""
        return self.cpu().tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        """That of the values: libraries look at it to find tied weights."""
        return self.inner.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, *args, **(kwargs or {}))


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation of the device: on the CPU, if all of its tensors are of the device."""
    name = op._overloadpacket._qualified_op_name
    indexes = name.startswith("aten::index") and isinstance(args[0], DeviceTensor)
    leaves = tree_leaves((args[:1] + args[2:] if indexes else args, kwargs))
    strange = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, DeviceTensor)]
    for tensor in strange if name not in MAY_MIX else ():
        if tensor.dim():
            shape = tuple(tensor.shape)
            raise RuntimeError(f"{name}: expected all on {DEVICE}, found {shape} on the CPU")
    named = [x.type for x in tree_leaves((args, kwargs)) if isinstance(x, torch.device)]
    leaves_device = name in ("aten::to", "aten::_to_copy") and "cpu" in named
    _note(name, leaves_device, args)
    out = op(*tree_map(_inside, args), **tree_map(_inside, kwargs))
    if leaves_device or (name == "aten::copy_" and not isinstance(args[0], DeviceTensor)):
        return args[0] if name == "aten::copy_" else out
    out = tree_map(lambda x: DeviceTensor(x) if isinstance(x, Tensor) else x, out)
    return return_and_correct_aliasing(op, args, kwargs, out)


def _inside(value: Any) -> Any:
    if isinstance(value, DeviceTensor):
        return value.inner
    return torch.device("cpu") if value == DEVICE or value == torch.device(NAME) else value


def _note(name: str, leaves_device: bool, args: Any) -> None:
    """Remember the line of the package that makes the host wait."""
    masks = name.startswith("aten::index") and any(
        isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1:])
    )
    if not _waited or not (leaves_device or name in WAITS or masks):
        return
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(SOURCES):
            _waited[-1].add((path[len(SOURCES) + 1 :], frame.f_lineno))
            return
        frame = frame.f_back  # type: ignore[assignment]


@contextlib.contextmanager
def waits() -> Iterator[set[tuple[str, int]]]:
    """Lines of the package at which the host waits for the device."""
    _waited.append(set())
    try:
        yield _waited[-1]
    finally:
        _waited.pop()


def _casting(op: Any, dtype: torch.dtype | None) -> Any:
    """An operation under autocast; dtype None is autocast's own."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == torch.float64:
            return x
        return x.to(dtype or torch.get_autocast_dtype(NAME))

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*tree_map(cast, args), **tree_map(cast, kwargs))

    return call


_all = torch.library.Library("_", "IMPL")
_all.fallback(_run, "PrivateUse1")
_all.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
_aten = torch.library.Library("aten", "IMPL")
for _names, _dtype in ((CAST_DOWN, None), (CAST_UP, torch.float32)):
    for _name in _names:
        _packet, _, _overload = _name.partition(".")
        _op = getattr(getattr(torch.ops.aten, _packet), _overload or "default")
        _aten.impl(_name, _casting(_op, _dtype), "AutocastPrivateUse1")


def _making(make: Any) -> Any:
    """torch.tensor and its like build values where no Python runs: build them here, then move."""

    def call(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if device is None or torch.device(device).type != NAME:
            return make(*args, **({} if device is None else {"device": device}), **kwargs)
        return make(*args, **kwargs).to(device)

    return call


# torch must know both as they are, or `with torch.device("meta")` misses them: transformers then
# takes rotary frequencies, which are in no checkpoint, for made, and leaves them uninitialised
_device_constructors()
torch.tensor, torch.as_tensor = _making(torch.tensor), _making(torch.as_tensor)

"""Fit and place: device and number type, how coarse the LM's weights are, and where its layers lie.

The language model alone may be rounded, by transformers' own quantisers, after LoRA is merged: int8
(LLM.int8() of bitsandbytes, or torchao's weights) or nf4 (bitsandbytes). `device_map` spreads it
over devices through accelerate; layers without memory go to "disk", into a temporary folder. The
rows, the reader and the other parts stay as they are, on `device`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin as Quantizer

from lavit.config import InputError
from lavit.language.lora import merge_lora
from lavit.language.model import Language

log = logging.getLogger(__name__)
Places = str | Mapping[str, int | str]  # "auto", or a map of modules to devices

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@cache
def share_cores() -> None:
    """Let threads that wait soon give their core away, or processes spin in each other's way.

    libgomp, the OpenMP of torch on Linux, lets them spin 300,000 times, but 100 times while it has
    more threads than there are cores: so a thread that sleeps gets some too. What the environment
    asks for stays as it is.
    """
    if os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        return

    def hold() -> None:
        torch.ones(2**20).add_(1)  # a parallel sum, whose threads belong to this one
        threading.Event().wait()

    threading.Thread(target=hold, name="lavit-cores", daemon=True).start()


def place(
    device: str | torch.device = "auto", dtype: str | torch.dtype | None = None
) -> tuple[torch.device, torch.dtype]:
    """Device and dtype: what is asked for, or by capability; logs one line.

    "auto" is CUDA where there is a GPU, else the CPU. dtype None is bf16 on GPUs that have it, fp16
    on older ones, and fp32 elsewhere: bf16 products crawl on CPUs without AMX, and the CPU's fast
    step is made for fp32.
    """
    share_cores()
    cuda = torch.cuda.is_available()
    if str(device) == "auto":
        device = "cuda" if cuda else "cpu"
    try:
        where = torch.device(device)
    except RuntimeError as error:
        known = "use 'auto', 'cpu', 'cuda' or 'cuda:1'"
        raise InputError(f"device {device!r} is not known: {known}") from error
    if where.type == "cuda" and not cuda:
        remedy = "leave the device on 'auto', or install a torch built for CUDA"
        raise InputError(f"no CUDA GPU can be used here: {remedy}")
    if where.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("no Apple GPU can be used here: leave the device on 'auto'")
    kind = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if kind is None and dtype is not None:
        raise InputError(f"dtype {dtype!r} is not known: use one of {', '.join(DTYPES)}")
    if kind is None:
        half = where.type == "cuda"
        bf16 = half and torch.cuda.is_bf16_supported(including_emulation=False)
        kind = torch.bfloat16 if bf16 else torch.float16 if half else torch.float32
    log.info("running on %s in %s", where, str(kind).removeprefix("torch."))
    return where, kind


def placer(
    device: torch.device,
    dtype: torch.dtype,
    quantization: str | None,
    device_map: Places | None = None,
) -> Callable[[Language], Language]:
    """What brings a loaded `Language` to its place: quantised, spread, or just moved.

    Raises `InputError` at once where the platform has no such quantiser.
    """
    if quantization not in (None, "int8", "nf4"):
        raise InputError(f"quantization {quantization!r} is not known: use 'int8', 'nf4' or None")
    if quantization is not None:
        config = quantizer(quantization, device, dtype)
        name = type(config).__name__.removesuffix("Config")
        log.info("the language model's weights are %s through %s", quantization, name)
        where = {"": str(device)} if device_map is None else device_map
        return lambda language: quantized(language, config, device, dtype, where)
    if device_map is None:
        return lambda language: language.to(device, dtype)
    return lambda language: dispatched(language, device, dtype, device_map)


def quantizer(quantization: str, device: torch.device, dtype: torch.dtype) -> Quantizer:
    """What configures transformers' quantiser here; raises `InputError` where there is none."""
    if device.type not in ("cpu", "cuda"):
        where = f"this runs on {device.type}: leave quantization out"
        raise InputError(f"{quantization} weights need CUDA or the CPU, {where}")
    if importlib.util.find_spec("bitsandbytes"):
        from transformers import BitsAndBytesConfig

        if quantization == "int8":  # it would warn at each product that it casts to fp16
            logging.getLogger("bitsandbytes.autograd").setLevel(logging.ERROR)
            return BitsAndBytesConfig(load_in_8bit=True)
        options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        return BitsAndBytesConfig(load_in_4bit=True, **options)
    if quantization == "int8" and importlib.util.find_spec("torchao"):
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    others = " (or torchao)" if quantization == "int8" else ""
    need = f"the package bitsandbytes{others}: pip install bitsandbytes"
    raise InputError(f"{quantization} weights need {need}")


def quantized(
    language: Language,
    config: Quantizer | None,
    device: torch.device,
    dtype: torch.dtype,
    device_map: Places,
) -> Language:
    """The same `Language` around a rounded LM; its own rows and reader are moved and stay exact."""
    merge_lora(language.lm)
    lm = _apart(language, device, dtype)
    options = {"quantization_config": config, "device_map": device_map, "dtype": dtype}
    weights = lm.state_dict()
    rounded = type(lm).from_pretrained(None, config=lm.config, state_dict=weights, **options)
    language.lm = rounded.eval()
    return language


def dispatched(
    language: Language,
    device: torch.device,
    dtype: torch.dtype,
    to: Places,
) -> Language:
    """The same `Language`, its LM spread by accelerate: "auto", or a map of modules to devices."""
    from accelerate import dispatch_model, infer_auto_device_map

    lm = _apart(language, device, dtype).to(dtype)
    whole = {"no_split_module_classes": lm._no_split_modules}
    places = infer_auto_device_map(lm, **whole) if isinstance(to, str) else dict(to)
    folder = None
    if "disk" in places.values():
        folder = tempfile.mkdtemp(prefix="lavit-")
        weakref.finalize(language, shutil.rmtree, folder, ignore_errors=True)
    language.lm = dispatch_model(lm, places, main_device=device, offload_dir=folder)
    log.info("the language model lies on %s", ", ".join(sorted(set(map(str, places.values())))))
    return language


def _apart(language: Language, device: torch.device, dtype: torch.dtype) -> Any:
    """Move all but the LM, which is taken out and returned."""
    lm = language.lm
    language.lm = nn.Identity()  # type: ignore[assignment]  # for a while
    language.to(device, dtype)
    return lm

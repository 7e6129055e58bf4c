"""Fit and place: which device and number type, how coarse the language model's weights, and over which devices they lie.

int8   LLM.int8() of bitsandbytes, or torchao's weights, on CUDA
nf4    4-bit weights of bitsandbytes, on CUDA

The language model alone is rounded, by transformers' own quantisers; the rows, the reader and the other parts stay as they
are. LoRA is merged first. `device_map` spreads the language model over devices through accelerate; the rows, the
reader and the other parts are on `device`. Layers for which there is no memory go to "disk", into a temporary folder.
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
import tempfile
import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from lavit.config import InputError
from lavit.modules.language import Language
from lavit.storage import merge_lora

log = logging.getLogger(__name__)

Quantization = Literal["int8", "nf4"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def place(
    device: str | torch.device = "auto", dtype: str | torch.dtype | None = None
) -> tuple[torch.device, torch.dtype]:
    """Device and dtype: what is asked for, or by capability; logs one line.

    "auto" is CUDA where there is a GPU, else the CPU. dtype None is bf16 on GPUs that have it, fp16 on older ones, and
    fp32 elsewhere: bf16 products crawl on CPUs without AMX, and the CPU's fast step is made for fp32.
    """
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device {device!r} is not known: use 'auto', 'cpu', 'cuda' or 'cuda:1'") from error
    if where.type == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA GPU can be used here: leave the device on 'auto', or install a torch built for CUDA")
    if where.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("no Apple GPU can be used here: leave the device on 'auto'")
    if dtype is None:
        fast = (torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16) if where.type == "cuda" else None
        kind = fast or torch.float32
    else:
        found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
        if found is None:
            raise InputError(f"dtype {dtype!r} is not known: use one of {', '.join(DTYPES)}")
        kind = found
    log.info("running on %s in %s", where, str(kind).removeprefix("torch."))
    return where, kind


def placer(
    device: torch.device, dtype: torch.dtype, quantization: str | None, device_map: Any = None
) -> Callable[[Language], Language] | None:
    """What brings a loaded `Language` to its place; None where it just moves to the device.

    Raises `InputError` at once where the platform has no such quantiser.
    """
    if quantization not in (None, "int8", "nf4"):
        raise InputError(f"quantization {quantization!r} is not known: use 'int8', 'nf4' or None")
    if quantization is None:
        return None if device_map is None else lambda language: dispatched(language, device, dtype, device_map)
    config = quantizer(quantization, device, dtype)
    log.info(
        "the language model's weights are %s through %s", quantization, type(config).__name__.removesuffix("Config")
    )
    where = {"": str(device)} if device_map is None else device_map
    return lambda language: quantized(language, config, device, dtype, where)


def quantizer(quantization: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The configuration of transformers' quantiser for this platform; raises `InputError` where there is none."""
    if device.type != "cuda":
        raise InputError(f"{quantization} weights need a CUDA GPU, this runs on {device.type}: leave quantization out")
    if importlib.util.find_spec("bitsandbytes"):
        return bitsandbytes(quantization, dtype)
    if quantization == "int8" and importlib.util.find_spec("torchao"):
        return torchao()
    others = " (or torchao)" if quantization == "int8" else ""
    raise InputError(f"{quantization} weights need the package bitsandbytes{others}: pip install bitsandbytes")


def bitsandbytes(quantization: str, dtype: torch.dtype) -> Any:
    """LLM.int8(), or NF4 with products in `dtype`."""
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def torchao() -> Any:
    """int8 weights, products in the LM's own type."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def quantized(language: Language, config: Any, device: torch.device, dtype: torch.dtype, device_map: Any) -> Language:
    """The same `Language` around a rounded LM; its own rows and reader are moved and stay exact."""
    if any(hasattr(module, "get_base_layer") for module in language.lm.modules()):
        merge_lora(language)
    lm = language.lm
    language.lm = nn.Identity()  # so that the rest moves without it
    language.to(device, dtype)
    language.lm = (
        type(lm)
        .from_pretrained(
            None,
            config=lm.config,
            state_dict=lm.state_dict(),
            quantization_config=config,
            device_map=device_map,
            dtype=dtype,
        )
        .eval()
    )
    return language


def dispatched(language: Language, device: torch.device, dtype: torch.dtype, device_map: Any) -> Language:
    """The same `Language`, its LM spread over devices by accelerate: "auto", or a map of modules to devices."""
    from accelerate import dispatch_model, infer_auto_device_map

    lm = language.lm.to(dtype)
    language.lm = nn.Identity()
    language.to(device, dtype)
    if device_map == "auto":
        device_map = infer_auto_device_map(lm, no_split_module_classes=lm._no_split_modules)
    folder = None
    if "disk" in device_map.values():
        folder = tempfile.mkdtemp(prefix="lavit-")
        weakref.finalize(language, shutil.rmtree, folder, ignore_errors=True)
    language.lm = dispatch_model(lm, device_map, main_device=device, offload_dir=folder)
    log.info("the language model lies on %s", ", ".join(sorted({str(where) for where in device_map.values()})))
    return language

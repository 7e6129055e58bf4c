"""LaVIT: images as a foreign language for any causal LM (arXiv 2309.04669).

import lavit
lv = lavit.load("nano")
lv.caption("cat.png"); lv.ask("cat.png", "what is this?"); lv.draw("a red bicycle", seed=0)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lavit.config import PARTS

if TYPE_CHECKING:
    import torch

    from lavit.generate.pipeline import Pipeline
    from lavit.generate.protocols import Protocol
    from lavit.generate.sampling import Sampling
    from lavit.model import LaVIT
    from lavit.processing import LaVITProcessor

__all__ = ["LaVIT", "LaVITProcessor", "Pipeline", "Protocol", "Sampling", "load"]
__version__ = "0.1.0"


def load(
    model: str | Path = "nano",
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    quantization: str | None = None,
    device_map: str | Mapping[str, int | str] | None = None,
    parts: Sequence[str] = PARTS,
    protocol: str | Protocol = "default",
    safety: bool | None = None,
    watermark: str | None = None,
    base: str | None = None,
) -> Pipeline:
    """Open a model: a folder, a training run, the model of this package ("nano") or a hub's name.

    device: "auto" is a CUDA GPU where there is one, else the CPU; dtype: bf16 there, fp32 here, or
    "float32", "bfloat16", "float16". One line is logged. quantization: "int8" or "nf4" weights for
    the language model, and device_map ("auto" or a map) spreads it over devices (placement.py).
    `parts` are loaded at once, others are left out: a caption needs no "pixels". protocol: how
    verbs sample where a call does not say: "default", "paper", "published", or a `Protocol`.
    `safety` switches the check of written pictures on or off (default: on for published weights);
    `watermark` is text to hide in them. `base` is another language model, a path or hub id, under
    the adapter of a model that has one: its figures do not apply then, which is logged.

    What is opened with more options (`LaVIT.from_pretrained`) becomes a `Pipeline(model)`. Raises
    `InputError` if there is no such model, or the platform cannot do what is asked.
    """
    from lavit.generate.pipeline import Pipeline
    from lavit.model import LaVIT

    where, kind = place(device, dtype)
    loaded = LaVIT.from_pretrained(
        model,
        device=where,
        dtype=kind,
        quantization=quantization,
        device_map=device_map,
        base=base,
        parts=parts,
    )
    return Pipeline(loaded, protocol=protocol, safety=safety, watermark=watermark)


def place(
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
) -> tuple[torch.device, torch.dtype]:
    """Device and dtype: what is asked for, or by capability (placement.py)."""
    from lavit import placement

    return placement.place(device, dtype)


def __getattr__(name: str) -> object:
    """The public classes, imported at first use so that `import lavit` stays quick."""
    places = {
        "LaVIT": "lavit.model",
        "LaVITProcessor": "lavit.processing",
        "Pipeline": "lavit.generate.pipeline",
        "Protocol": "lavit.generate.protocols",
        "Sampling": "lavit.generate.sampling",
    }
    if name not in places:
        raise AttributeError(f"module 'lavit' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(places[name]), name)

"""LaVIT: images as a foreign language for any causal LM (arXiv 2309.04669), trained, used, measured and served.

import lavit
lv = lavit.load("runs/nano")
lv.caption("cat.png"); lv.ask("cat.png", "what is this?"); lv.draw("a red bicycle", seed=0)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lavit.generate.pipeline import Pipeline
    from lavit.generate.sampling import Sampling
    from lavit.model import LaVIT

__all__ = ["LaVIT", "Pipeline", "Sampling", "load"]
__version__ = "0.1.0"


def load(model: str | Path) -> Pipeline:
    """Open a model folder or training run; parts are read when they are first used.

    Runs on a CUDA GPU in bf16 where there is one, else on the CPU in fp32, and logs which. Raises `InputError` if the
    folder is no model.
    """
    from lavit.generate.pipeline import Pipeline
    from lavit.model import LaVIT

    device, dtype = place()
    return Pipeline(LaVIT.from_pretrained(model, device=device, dtype=dtype))


def place() -> tuple[Any, Any]:
    """Device and dtype by capability: CUDA with bf16 where there is a GPU, else CPU with fp32."""
    import logging

    import torch

    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    logging.getLogger(__name__).info("running on %s in %s", device, str(dtype).removeprefix("torch."))
    return torch.device(device), dtype


def __getattr__(name: str) -> Any:
    """The public classes, imported at first use so that `import lavit` stays quick."""
    places = {
        "LaVIT": "lavit.model",
        "Pipeline": "lavit.generate.pipeline",
        "Sampling": "lavit.generate.sampling",
    }
    if name not in places:
        raise AttributeError(f"module 'lavit' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(places[name]), name)

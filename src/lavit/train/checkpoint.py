"""Checkpoints of a training stage: module, optimiser and the stage's own state, written atomically.

    <folder>/<step>/module.safetensors  state.safetensors  optimizer.pt  step.json

A checkpoint appears under its name only when it is complete; the older one goes afterwards. Random numbers need no
saving: every draw is a function of (seed, step).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lavit.config import InputError
from lavit.storage import load_strictly, load_tensors, replacing, save_tensors

if TYPE_CHECKING:
    from lavit.train.loop import Stage


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step, if there is one."""
    if not folder.is_dir():
        return None
    complete = [path for path in folder.iterdir() if path.name.isdigit() and (path / "step.json").is_file()]
    return max(complete, key=lambda path: int(path.name), default=None)


def save_checkpoint(folder: Path, step: int, module: nn.Module, optimizer: Any, stage: Stage, *, keep: int = 1) -> None:
    """Write `folder/<step>` and drop all but the newest `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / str(step)) as new:
        save_tensors(_trained(module), new / "module.safetensors")
        save_tensors(stage.state(), new / "state.safetensors")
        torch.save(optimizer.state_dict(), new / "optimizer.pt")
        (new / "step.json").write_text(json.dumps({"step": step, "stage": stage.name}))
    older = sorted((path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))[:-keep]
    for path in older:
        shutil.rmtree(path)


def load_checkpoint(path: Path, module: nn.Module, optimizer: Any, stage: Stage) -> int:
    """Read a checkpoint back; returns the step to go on with."""
    trained, tensors = _trained(module), load_tensors(path / "module.safetensors")
    if set(trained) != set(tensors):
        raise InputError(f"{path} is of a training with another configuration: give another --out, or delete it")
    load_strictly(module, {**module.state_dict(), **tensors}, path)
    optimizer.load_state_dict(torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True))
    stage.load_state(load_tensors(path / "state.safetensors"))
    return json.loads((path / "step.json").read_text())["step"]


def _trained(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters that train, and all buffers: frozen weights are somewhere else already."""
    frozen = {
        name for name, parameter in module.named_parameters(remove_duplicate=False) if not parameter.requires_grad
    }
    tensors = {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}
    seen: dict[int, str] = {}  # tied weights are stored once
    return {name: t for name, t in tensors.items() if seen.setdefault(t.data_ptr(), name) == name or t.numel() == 0}

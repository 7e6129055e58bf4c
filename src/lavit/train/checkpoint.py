"""Checkpoints of a stage: all that a resumed run needs to go on as if nothing had happened.

    <folder>/<step>/   module.safetensors      weights that train, and buffers (the codebook)
                       optimizer.safetensors   moments, by the names of the weights
                       state.safetensors       the stage's own: use of codes, averaged weights, …
                       random.safetensors      random states of every rank
                       step.json               stage, step, and which tensors there are

Tensors are whole whatever the layout, so a run may go on under another one (FSDP2, DDP, one
process). A checkpoint appears under its name only when it is complete, and older ones go then: a
crash while saving loses nothing. What else lies in the folder is left alone, and named.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lavit.config import InputError, read_json, write_json
from lavit.files import load_tensors, replacing, save_tensors, write_tensors
from lavit.train.spread import assign, whole

if TYPE_CHECKING:
    from lavit.train.loop import Stage


FILES = ("module", "optimizer", "state", "random")
STEP = re.compile(r"0|[1-9][0-9]*")
LEFT = re.compile(r"\.[0-9]+\.(new|old)")  # what a crash leaves of saving or of removing one


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step, if there is one."""
    return max(_complete(folder), key=lambda path: int(path.name), default=None)


def _complete(folder: Path) -> list[Path]:
    return [path.parent for path in folder.glob("*/step.json") if STEP.fullmatch(path.parent.name)]


def save_checkpoint(
    folder: Path,
    step: int,
    module: nn.Module,
    optimizer: Any,
    stage: Stage,
    *,
    accelerator: Accelerator,
    keep: int = 2,
) -> None:
    """Write `folder/<step>`, drop all but the newest `keep`. Every rank calls, the first writes."""
    main = accelerator.is_main_process
    random, state = _random_states(accelerator), stage.state()
    trained, moments = _trained(module), _moments(module, optimizer)
    with replacing(folder / str(step)) if main else nullcontext() as new:
        _save_whole(trained, new and new / "module.safetensors")
        _save_whole(moments, new and new / "optimizer.safetensors")
        if new is None:
            return
        save_tensors(state, new / "state.safetensors")
        save_tensors(random, new / "random.safetensors")
        hashes = dict(zip(FILES, map(_kinds, (trained, moments, state, random)), strict=True))
        write_json(new / "step.json", {"step": step, "stage": stage.name, "tensors": hashes})
    drop_all_but(folder, keep)


def drop_all_but(folder: Path, keep: int) -> list[Path]:
    """Remove older complete checkpoints and what a crash left; returns what is none of ours."""
    for path in folder.iterdir():
        if LEFT.fullmatch(path.name) and path.is_dir():
            shutil.rmtree(path)
    for path in sorted(_complete(folder), key=lambda path: int(path.name))[:-keep]:
        old = path.with_name(f".{path.name}.old")
        path.rename(old)  # first: half removed, it must not pass for whole
        shutil.rmtree(old)
    return sorted(set(folder.iterdir()).difference(_complete(folder)))


def load_checkpoint(
    path: Path,
    module: nn.Module,
    optimizer: Any,
    stage: Stage,
    *,
    accelerator: Accelerator,
) -> int:
    """Read a checkpoint back; returns the step to go on with."""
    try:
        found = {name: load_tensors(path / f"{name}.safetensors") for name in FILES}
        step = _checked_step(path, stage, found)
    except InputError as error:
        raise _unlike(path, str(error)) from error
    try:
        load_weights(path, module)
        _load_moments(module, optimizer, found["optimizer"])
        stage.load_state(found["state"])
        _set_random_states(found["random"], accelerator)
        return step
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise _unlike(path, " ".join(str(error).split())[:200]) from error


def _checked_step(path: Path, stage: Stage, found: Mapping[str, Mapping[str, Tensor]]) -> int:
    """The step of a checkpoint; what is not as it was saved raises `InputError`."""
    said, step = read_json(path / "step.json"), int(path.name)
    if (said.get("step"), said.get("stage")) != (step, stage.name) or step > stage.steps:
        has = f"step {said.get('step')!r} of {said.get('stage')!r}"
        wanted = f"{step} of {stage.name!r}, which has {stage.steps}"
        raise InputError(f"step.json says {has}, expected {wanted}")
    hashes = said.get("tensors", {})  # older checkpoints have none
    for file, tensors in found.items():
        if isinstance(hashes, dict) and hashes.get(file, _kinds(tensors)) != _kinds(tensors):
            raise InputError(f"{file}.safetensors holds other tensors than were saved")
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise InputError(f"{file}.safetensors: {name} holds what is no number")
    return step


def _kinds(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, number types and shapes."""
    kinds = sorted((name, str(one.dtype), tuple(one.shape)) for name, one in tensors.items())
    return hashlib.sha256(repr(kinds).encode()).hexdigest()[:16]


def load_weights(path: Path, module: nn.Module) -> None:
    """The weights of a checkpoint alone, into a module under any layout."""
    trained, tensors = _trained(module), load_tensors(path / "module.safetensors")
    for name in sorted(trained.keys() | tensors.keys()):
        wanted, found = (
            list(one[name].shape) if name in one else "none" for one in (trained, tensors)
        )
        if found != wanted:
            raise _unlike(path, f"{name} is {found}, expected {wanted}")
    for name, tensor in tensors.items():
        assign(trained[name], tensor)


def _unlike(path: Path, why: str) -> InputError:
    said = f"{path} is of another configuration, or damaged ({why})"
    return InputError(
        f"{said}: delete it to go on from the checkpoint before, or give another --out"
    )


def _trained(module: nn.Module) -> dict[str, Tensor]:
    """Parameters that train, tied ones once, and all buffers: frozen weights are elsewhere."""
    others = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    others -= {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in others}


def _save_whole(tensors: dict[str, Tensor], path: Path | None) -> None:
    """Gather tensors one at a time; the rank that has a path writes each at once."""
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())  # stays aligned
    tensors = {name: tensors[name] for name in names}
    gathered = (whole(tensor.detach()) for tensor in tensors.values())
    if path is not None:
        write_tensors(tensors, gathered, path)
    for _ in gathered:  # of the other ranks: all must gather
        pass


def _moments(module: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    state = optimizer.state
    named = [(name, state[p]) for name, p in module.named_parameters() if p in state]
    return {f"{key}/{name}": value for name, one in named for key, value in one.items()}


def _load_moments(module: nn.Module, optimizer: Any, tensors: dict[str, Tensor]) -> None:
    """Moments by weight's name; the optimiser's kind decides which there are."""
    parameters = dict(module.named_parameters())
    for key_name, tensor in tensors.items():
        key, name = key_name.split("/", 1)
        parameter = parameters[name]
        if tensor.shape not in (parameter.shape, ()):
            shapes = f"{list(tensor.shape)}, expected {list(parameter.shape)}"
            raise ValueError(f"the moment {key_name} is {shapes}")
        if tensor.shape == parameter.shape:
            moment = torch.zeros_like(parameter, dtype=tensor.dtype)
            assign(moment, tensor)
        else:  # the count of steps
            moment = tensor.to(parameter.device)
        optimizer.state[parameter][key] = moment


def _random_states(accelerator: Accelerator) -> dict[str, Tensor]:
    """[ranks bytes] each."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    device = accelerator.device
    return {name: accelerator.gather(state.to(device)[None]) for name, state in states.items()}


def _set_random_states(states: dict[str, Tensor], accelerator: Accelerator) -> None:
    """Each rank its own; ranks that the saved run did not have share those of others."""
    rank = accelerator.process_index  # clones, since torch crashes on views
    mine = {name: state[rank % len(state)].clone() for name, state in states.items()}
    torch.set_rng_state(mine["cpu"])
    if "cuda" in mine and torch.cuda.is_available():
        torch.cuda.set_rng_state(mine["cuda"])

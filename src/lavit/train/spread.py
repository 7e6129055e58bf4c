"""Where a training runs and how its model is spread; the model is written for one device.

    one process         python, or lavit train …
    DDP                 torchrun --nproc-per-node 8 -m lavit train …     (or accelerate launch)
    FSDP2               the same with --fsdp, or accelerate launch --use_fsdp --fsdp_version 2

FSDP2 (torch's `fully_shard`, arXiv 2304.11277) shards weights, gradients and moments; each block of
`_no_split_modules` is a unit. Accelerate 1.15 leaves its FSDP plugin out on CPUs and takes DDP;
three lines give it back, so that the path of GPUs is tested on two gloo ranks. Only the first rank
loads a model that is to be sharded (`from_first`, `shard`): a 7B in fp32 is 27 GB, on eight ranks
216 GB of a host.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import deepcopy
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs as DDPKwargs
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    broadcast_object_list,
    fsdp2_prepare_model,
)
from accelerate.utils import InitProcessGroupKwargs as Patience
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from lavit.config import InputError
from lavit.placement import share_cores

Precision = Literal["auto", "fp32", "bf16"]
M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")
WAIT = timedelta(hours=4)  # for other ranks: a first one may encode or save for longer than NCCL's


def make_accelerator(precision: Precision = "auto", *, fsdp: bool = False) -> Accelerator:
    """Accelerate's object for this process; `fsdp` or `accelerate launch --use_fsdp` shards."""
    share_cores()
    fsdp = fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    plugin = None
    if fsdp:
        if os.environ.get("FSDP_VERSION", "2") != "2":
            said = "accelerate launch --use_fsdp --fsdp_version 2"
            raise InputError(f"FSDP version 1 is not supported: {said}")
        if not several:
            said = "start with torchrun --nproc-per-node N"
            raise InputError(f"FSDP2 shards over processes and there is one: {said}")
        wrap = "transformer_based_wrap"
        # whole: else transformers gives the encoders of other ranks no weights, and nobody does
        how: dict[str, Any] = {"auto_wrap_policy": wrap, "cpu_ram_efficient_loading": False}
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **how)
    gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if plugin is not None:
        plugin.mixed_precision_policy = sharded_precision(
            "bf16" if gpu and precision != "fp32" else "fp32"
        )
    if precision == "bf16" and not gpu:
        said = "precision bf16 needs a GPU that has it (a CPU's bf16 products are far slower)"
        raise InputError(f"{said}: use fp32")
    accelerator = Accelerator(
        cpu=several and not torch.accelerator.is_available(),  # else each process trains alone
        mixed_precision="bf16" if gpu and precision != "fp32" else "no",
        fsdp_plugin=plugin,
        kwargs_handlers=[DDPKwargs(find_unused_parameters=True), Patience(timeout=WAIT)],
    )
    if plugin is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        for state in (PartialState(), accelerator.state):  # the first is copied into the second
            state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    return accelerator


def sharded_precision(precision: str) -> MixedPrecisionPolicy:
    """FSDP2's number types: products in bf16 on GPUs; gradients are summed, losses given in fp32.

    Accelerate's own policy rounds both to bf16: gradients over many passes, and figures.
    """
    products = torch.bfloat16 if precision == "bf16" else None
    return MixedPrecisionPolicy(products, torch.float32, torch.float32)


def from_first(make: Callable[[], tuple[M, T]], accelerator: Accelerator) -> tuple[M, T]:
    """A module and what goes with it, made by the first rank alone; every rank must call.

    The others get it with its parameters on the meta device, to be given their values by `shard`.
    """
    if not accelerator.is_main_process:
        found: list[Any] = broadcast_object_list([None])
        made: tuple[M, T] = found[0]
        return made
    module, rest = make()
    empty = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in module.parameters()}
    broadcast_object_list([(deepcopy(module, empty), rest)])
    return module, rest


@torch.no_grad()
def shard(module: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Spread a module of `from_first` by FSDP2; the others never hold more than a tensor of it."""
    main, device = accelerator.is_main_process, accelerator.device
    values = {name: p.detach() for name, p in module.named_parameters()} if main else {}
    module = fsdp2_prepare_model(accelerator, module)
    module._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
    for name, p in module.named_parameters():
        full = values.pop(name) if main else torch.empty(p.shape)
        full = full.to(device, p.dtype)
        dist.broadcast(full, 0)
        assign(p, full)
    return module


def halve_frozen(module: nn.Module) -> None:
    """Frozen weights in bf16: under LoRA the base never moves, and half of its memory is enough."""
    for parameter in module.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded; every rank must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_as(target: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor that every rank has, laid out as `target` is."""
    tensor = tensor.to(target.device, target.dtype)
    if not isinstance(target, DTensor):
        return tensor
    mesh, placements = target.device_mesh, target.placements
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


@torch.no_grad()
def assign(target: Tensor, tensor: Tensor) -> None:
    """Give `target`, sharded or not, the values of a whole tensor that every rank has."""
    target.copy_(spread_as(target, tensor))

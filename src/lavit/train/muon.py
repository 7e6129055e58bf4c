"""Muon (Jordan et al. 2024): matrices move by orthogonal steps, all else as AdamW moves it.

    m = momentum of the gradient           u = Nesterov's look ahead of it
    U Vᵀ of u = U S Vᵀ                     by Newton-Schulz, without the decomposition
    w = (1 - lr * decay) w - lr * 0.4 * sqrt(max(rows, columns)) * U Vᵀ

The factor gives a step the size that AdamW's have (0.2 to 0.4 times the rate, arXiv 2502.16982), so
both take the same rates.
torch has a Muon of its own; its products are bf16, which CPUs without bf16 take hundreds of times
longer for. This one computes in the parameters' own type, and whole matrices under FSDP2.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from lavit.train.spread import spread_as, whole

MOMENTUM = 0.95
ROUNDS = 5  # of Newton-Schulz
A, B, C = 3.4445, -4.7750, 2.0315  # its quintic, which brings singular values near one fast
SIZE = 0.4  # root mean square of a step, as a multiple of the rate


class Muon(torch.optim.AdamW):
    """AdamW; a parameter group with `muon` true holds matrices, which move by orthogonal steps."""

    def __init__(self, params: Iterable[dict[str, Any]], **options: Any) -> None:
        super().__init__([{"muon": False, **group} for group in params], **options)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # torch overloads it
        """One step; gradients of matrices are consumed."""
        moving = [
            (parameter, group["lr"], group["weight_decay"])
            for group in self.param_groups
            if group["muon"]
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        turned = _shared([self._ahead(parameter) for parameter, _, _ in moving])
        for (parameter, rate, decay), matrix in zip(moving, turned, strict=True):
            size = SIZE * max(matrix.shape) ** 0.5
            turn = spread_as(parameter, matrix.view(parameter.shape))
            parameter.mul_(1 - rate * decay).add_(turn, alpha=-rate * size)
            parameter.grad = None  # AdamW passes it over
        super().step(closure)

    def _ahead(self, parameter: nn.Parameter) -> Tensor:
        """Nesterov's look ahead, whole; a kernel as a matrix with a row for each output."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
            state["step"] = torch.zeros(())  # AdamW looks for one in each state
        momentum = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        return whole(gradient.lerp(momentum, MOMENTUM)).flatten(1)


def _shared(matrices: list[Tensor]) -> list[Tensor]:
    """`orthogonal` of matrices that all processes have; each computes its part of them."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks == 1 or not matrices:
        return [orthogonal(matrix) for matrix in matrices]
    parts = [torch.zeros_like(matrix) for matrix in matrices]
    for number in range(dist.get_rank(), len(matrices), ranks):
        parts[number] = orthogonal(matrices[number])
    flat = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(flat)
    found = flat.split([part.numel() for part in parts])
    return [part.view_as(matrix) for part, matrix in zip(found, matrices, strict=True)]


def orthogonal(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """The nearest matrix whose singular values are all about one (0.7 to 1.2)."""
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(ROUNDS):
        square = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(square, square, square, beta=B, alpha=C), wide, beta=A)
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


def matrices(module: nn.Module, *, but: Iterable[Tensor] = ()) -> list[Tensor]:
    """Weights of linear and convolutional layers, which `Muon` moves by orthogonal steps.

    Embeddings, heads tied to them, and the tensors in `but` are left out.
    """
    kept = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    kept |= {id(tensor) for tensor in but}
    kinds = (nn.Linear, nn.Conv2d)
    found = {id(part.weight): part.weight for part in module.modules() if isinstance(part, kinds)}
    return [weight for number, weight in found.items() if number not in kept]


def matrices_apart(
    groups: Iterable[dict[str, Any]], module: nn.Module, *, but: Iterable[Tensor] = ()
) -> list[dict[str, Any]]:
    """Parameter groups with the `matrices` of a module apart, for `Muon`."""
    linear = {id(weight) for weight in matrices(module, but=but)}
    found = []
    for group in groups:
        rest = [parameter for parameter in group["params"] if id(parameter) not in linear]
        turning = [parameter for parameter in group["params"] if id(parameter) in linear]
        found += [{**group, "params": rest}] * bool(rest)
        found += [{**group, "params": turning, "muon": True}] * bool(turning)
    return found

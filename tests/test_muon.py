"""Muon: what is no matrix moves as AdamW moves it, matrices move by orthogonal steps."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lavit.train.muon import SIZE, Muon, matrices_apart, orthogonal


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(7, 8), nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 7, bias=False)
    )


def backward(module: nn.Module) -> torch.Tensor:
    ids = torch.arange(7)
    loss = nn.functional.cross_entropy(module(ids), ids.roll(1))
    loss.backward()
    return loss.detach()


def test_without_matrices_it_is_adamw() -> None:
    ours, theirs = net(), net()
    options = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    one = Muon([{"params": list(ours.parameters())}], fused=True, **options)
    other = torch.optim.AdamW(theirs.parameters(), fused=True, **options)
    for _ in range(3):
        for module, optimizer in ((ours, one), (theirs, other)):
            optimizer.zero_grad()
            backward(module)
            optimizer.step()
    for mine, their in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, their)


def test_matrices_are_linear_weights_and_no_tied_head() -> None:
    module = net()
    module[3] = nn.Linear(8, 7, bias=False)
    module[3].weight = module[0].weight
    groups = matrices_apart([{"params": list(module.parameters()), "lr": 1.0}], module)
    assert [group.get("muon", False) for group in groups] == [False, True]
    assert [id(p) for p in groups[1]["params"]] == [id(module[1].weight)]
    assert sum(len(group["params"]) for group in groups) == len(list(module.parameters()))


def test_singular_values_come_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((30, 50), (50, 30), (40, 40)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
        assert float(values.min()) > 0.5 and float(values.max()) < 1.3, shape
    left, _, right = torch.linalg.svd(torch.randn(6, 20), full_matrices=False)
    matrix = left @ torch.diag(torch.linspace(1, 2, 6)) @ right
    cosine = (orthogonal(matrix) * (left @ right)).sum() / orthogonal(matrix).norm() / 6**0.5
    assert float(cosine) > 0.98


def test_a_step_has_the_size_of_adamws_and_decays() -> None:
    module = net()
    before = copy.deepcopy(module[1].weight.detach())
    groups = matrices_apart([{"params": list(module.parameters())}], module)
    backward(module)
    Muon(groups, lr=0.01, weight_decay=0.0).step()
    moved = (module[1].weight - before).detach()
    assert abs(float(moved.square().mean().sqrt()) / (0.01 * SIZE) - 1) < 0.5
    assert module[1].weight.grad is None


def test_kernels_move_as_matrices_with_a_row_for_each_output() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 8, 3)
    before = layer.weight.detach().clone()
    layer(torch.randn(2, 3, 6, 6)).square().mean().backward()
    gradient = layer.weight.grad.flatten(1).clone()
    Muon(
        matrices_apart([{"params": list(layer.parameters())}], layer), lr=0.01, weight_decay=0.0
    ).step()
    moved = (before - layer.weight.detach()).flatten(1)
    expected = 0.01 * SIZE * 27**0.5 * orthogonal(gradient)
    assert torch.allclose(moved, expected, atol=1e-6)

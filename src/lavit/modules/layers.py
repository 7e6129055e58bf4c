"""Small parts that selector, merger and reconstructor share: ragged rows, attention, MLP, place codes.

Attention has one extra: a *weight* per key that multiplies exp(logit), so that a straight-through mask of zeros and
ones can act on attention and receive a gradient (DynamicViT's way, arXiv 2106.02034; method: "How it learns").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class Ragged:
    """Rows of several images, packed one after the other without padding."""

    lengths: Int[Tensor, "images"]

    @cached_property
    def valid(self) -> Bool[Tensor, "images longest"]:
        """Which places of the padded form hold a row."""
        longest = int(self.lengths.max())
        return torch.arange(longest, device=self.lengths.device) < self.lengths[:, None]

    @cached_property
    def even(self) -> bool:
        """True if all images have the same number of rows: then padding is a view."""
        return bool((self.lengths == self.lengths[0]).all())

    def pad(self, rows: Float[Tensor, "total dim"]) -> Float[Tensor, "images longest dim"]:
        """Padded form, zeros behind the last row of each image; inverse of `pack`."""
        if self.even:
            return rows.unflatten(0, (len(self.lengths), -1))
        valid = self.valid
        padded = rows.new_zeros(*valid.shape, rows.shape[-1])
        padded[valid] = rows
        return padded

    def pack(self, padded: Float[Tensor, "images longest dim"]) -> Float[Tensor, "total dim"]:
        """Packed form of padded rows."""
        return padded.flatten(0, 1) if self.even else padded[self.valid]


def split_heads(x: Float[Tensor, "images rows dim"], heads: int) -> Float[Tensor, "images heads rows head_dim"]:
    """Split the channels into heads."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Float[Tensor, "images heads rows head_dim"]) -> Float[Tensor, "images rows dim"]:
    """Inverse of `split_heads`."""
    return x.transpose(1, 2).flatten(2)


def weighted_attention(
    query: Float[Tensor, "images heads rows head_dim"],
    key: Float[Tensor, "images heads keys head_dim"],
    value: Float[Tensor, "images heads keys head_dim"],
    weight: Float[Tensor, "images #rows keys"],
    *,
    smoothing: float = 0.0,
) -> Float[Tensor, "images heads rows head_dim"]:
    """Attention whose exp(logits) are multiplied by `weight`; a zero weight still passes a gradient to the weight.

    `smoothing` is the published modules' eps: (exp(a - max) w + eps / keys) / (sum + eps). A row whose weights are
    all zero attends uniformly, which is what the published form tends to there.
    """
    logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if smoothing == 0.0:  # the largest *allowed* logit: a dropped key cannot underflow the kept ones
        top = logits.masked_fill(weight.detach()[:, None] <= 0, -torch.inf).amax(-1, keepdim=True)
        top = top.nan_to_num(neginf=0.0)
        terms = (logits - top.detach()).clamp(max=30.0).exp() * weight[:, None]
        total = terms.sum(-1, keepdim=True)
        empty = total <= 0
        attention = torch.where(empty, 1.0 / key.shape[2], terms / total.masked_fill(empty, 1.0))
    else:
        terms = (logits - logits.amax(-1, keepdim=True).detach()).exp() * weight[:, None]
        attention = (terms + smoothing / key.shape[2]) / (terms.sum(-1, keepdim=True) + smoothing)
    return attention @ value


class Mlp(nn.Sequential):
    """Linear, exact GELU, Linear; hidden width int(ratio · dim)."""

    def __init__(self, dim: int, ratio: float) -> None:
        hidden = int(ratio * dim)
        super().__init__(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class SelfAttention(nn.Module):
    """Projections of a self-attention: fused qkv, biases everywhere."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(
        self,
        x: Float[Tensor, "images rows dim"],
        *,
        causal: bool = False,
        weight: Float[Tensor, "images rows rows"] | None = None,
        smoothing: float = 0.0,
    ) -> Float[Tensor, "images rows dim"]:
        """Attend within each image; `weight` (which then holds the causal mask too) takes the differentiable path."""
        query, key, value = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, -1))
        if weight is None:
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        else:
            mixed = weighted_attention(query, key, value, weight, smoothing=smoothing)
        return self.out(join_heads(mixed))


class CrossAttention(nn.Module):
    """Projections of a cross-attention: separate q, k, v, biases everywhere; `context_dim` may differ from `dim`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)


def place_code(grid: int, dim: int) -> Float[Tensor, "patches dim"]:
    """Fixed 2-D sine-cosine code of a square grid in raster order: half of the channels for y, half for x.

    `dim` must be a multiple of 4. Frequencies fall from 1 to 1/100 geometrically, in units of patches.
    """
    quarter = dim // 4
    frequency = 100.0 ** (-torch.arange(quarter) / quarter)
    y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    angles = torch.cat([axis.flatten()[:, None] * frequency for axis in (y, x)], -1)
    return torch.cat([angles.sin(), angles.cos()], -1)


def initialise(module: nn.Module) -> None:
    """Truncated-normal weights of all Linear layers below `module`, biases zero.

    The standard deviation is 0.75 / sqrt(fan-in): 0.02, the usual choice, at the paper's width of 1408. A plain 0.02 at
    width 320 makes every layer's signal several times too small, and training stalls for hundreds of steps (LOG.md).
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.75 / math.sqrt(part.in_features))
            if part.bias is not None:
                nn.init.zeros_(part.bias)

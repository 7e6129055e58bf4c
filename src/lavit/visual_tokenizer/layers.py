"""Parts that selector, merger and reconstructor share: ragged rows, attention, blocks, place codes.

Attention has one extra: a *weight* per key that multiplies exp(logit), so that a straight-through
mask of zeros and ones can act on attention and receive a gradient (DynamicViT's way, arXiv
2106.02034; method: "How it learns").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

Patches = Float[Tensor, "images patches dim"]  # features of the encoder, in raster order
Keep = Bool[Tensor, "images patches"]  # which of them get a token
RowTensor = Float[Tensor, "images rows dim"]
Keys = Float[Tensor, "images keys dim"]


@dataclass(frozen=True)
class Ragged:
    """Rows of several images, packed one after the other without padding."""

    lengths: Int[Tensor, "images"]

    @cached_property
    def valid(self) -> Bool[Tensor, "images longest"]:
        """Which places of the padded form hold a row."""
        longest = int(self.lengths.max())  # the host waits: a shape
        return torch.arange(longest, device=self.lengths.device) < self.lengths[:, None]

    @cached_property
    def even(self) -> bool:
        """True if all images have the same number of rows: then padding is a view."""
        return bool((self.lengths == self.lengths[0]).all())  # the host waits: which way to go

    def pad(self, rows: Float[Tensor, "total dim"]) -> Float[Tensor, "images longest dim"]:
        """Padded form, zeros behind the last row of each image; inverse of `pack`."""
        if self.even:
            return rows.unflatten(0, (len(self.lengths), -1))
        valid = self.valid  # the host waits below: ragged rows are gathered by a mask
        padded = rows.new_zeros(*valid.shape, rows.shape[-1])
        padded[valid] = rows
        return padded

    def pack(self, padded: Float[Tensor, "images longest dim"]) -> Float[Tensor, "total dim"]:
        """Packed form of padded rows."""
        return padded.flatten(0, 1) if self.even else padded[self.valid]


def attend(
    query: RowTensor,
    key: Keys,
    value: Keys,
    heads: int,
    weight: Shaped[Tensor, "images #rows keys"] | None = None,
    *,
    causal: bool = False,
    smoothing: float = 0.0,
) -> RowTensor:
    """Attention in `heads` heads; `weight` is a boolean mask, or a float weight with a gradient."""
    query, key, value = (_split(part, heads) for part in (query, key, value))
    if weight is not None and weight.dtype != torch.bool:
        mixed = _softmax(query, key, weight, smoothing) @ value
    else:
        mask = None if weight is None else weight[:, None]
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
    return mixed.transpose(1, 2).flatten(2)


def attention_shares(
    query: RowTensor,
    key: Keys,
    heads: int,
    weight: Float[Tensor, "images #rows keys"],
) -> Float[Tensor, "images rows keys"]:
    """What `attend` multiplies the values with, mean over heads."""
    return _softmax(_split(query, heads), _split(key, heads), weight, 0.0).mean(1)


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _softmax(query: Tensor, key: Tensor, weight: Tensor, smoothing: float) -> Tensor:
    """Softmax whose exp(logits) are multiplied by `weight`; a zero weight still gets a gradient.

    `smoothing` is the published modules' eps: (exp(a - max) w + eps / keys) / (sum + eps). A row
    whose weights are all zero is uniform, which is what the published form tends to there.
    """
    logits = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if smoothing != 0.0:
        terms = (logits - logits.amax(-1, keepdim=True).detach()).exp() * weight[:, None]
        return (terms + smoothing / key.shape[2]) / (terms.sum(-1, keepdim=True) + smoothing)
    # the largest *allowed* logit: a dropped key cannot underflow the kept ones
    top = logits.masked_fill(weight.detach()[:, None] <= 0, -torch.inf).amax(-1, keepdim=True)
    top = top.nan_to_num(neginf=0.0)
    terms = (logits - top.detach()).clamp(max=30.0).exp() * weight[:, None]
    total = terms.sum(-1, keepdim=True)
    empty = total <= 0
    return torch.where(empty, 1.0 / key.shape[2], terms / total.masked_fill(empty, 1.0))


class Mlp(nn.Sequential):
    """Linear, exact GELU, Linear; hidden width int(ratio · dim)."""

    def __init__(self, dim: int, ratio: float) -> None:
        hidden = int(ratio * dim)
        super().__init__(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class SelfAttention(nn.Module):
    """Self-attention within each image: fused qkv, biases everywhere."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: RowTensor, weight: Tensor | None = None, **how: Any) -> RowTensor:
        """Options are those of `attend`; a weight holds the causal mask too."""
        query, key, value = self.qkv(x).chunk(3, -1)
        return self.out(attend(query, key, value, self.heads, weight, **how))


class CrossAttention(nn.Module):
    """Cross-attention: separate q, k, v, biases everywhere."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: RowTensor, context: Keys, weight: Tensor, **how: Any) -> RowTensor:
        """Rows attend to the context of their image; options are those of `attend`."""
        parts = self.query(x), self.key(context), self.value(context)
        return self.out(attend(*parts, self.heads, weight, **how))


class CrossBlock(nn.Module):
    """Self-attention, cross-attention, MLP, pre-norm: the block of merger and reconstructor."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(dim, eps=1e-5)
        self.self_attention = SelfAttention(dim, heads)
        self.norm_cross = nn.LayerNorm(dim, eps=1e-5)
        self.cross_attention = CrossAttention(dim, heads)
        self.norm_mlp = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = Mlp(dim, mlp_ratio)

    def padded(
        self,
        x: RowTensor,
        context: Keys,
        weight: Shaped[Tensor, "images 1 keys"],
        self_weight: Shaped[Tensor, "images rows rows"] | None = None,
        smoothing: float = 0.0,
    ) -> RowTensor:
        """The block on padded rows; weights as in `attend`."""
        x = x + self.self_attention(self.norm_self(x), self_weight, smoothing=smoothing)
        x = x + self.cross_attention(self.norm_cross(x), context, weight, smoothing=smoothing)
        return x + self.mlp(self.norm_mlp(x))


def place_code(grid: int, dim: int) -> Float[Tensor, "patches dim"]:
    """Fixed 2-D sine-cosine code of a square grid in raster order: half of it for y, half for x.

    `dim` must be a multiple of 4. Frequencies fall geometrically from 1 to 1/100 a patch.
    """
    quarter = dim // 4
    frequency = 100.0 ** (-torch.arange(quarter) / quarter)
    y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    angles = torch.cat([axis.flatten()[:, None] * frequency for axis in (y, x)], -1)
    return torch.cat([angles.sin(), angles.cos()], -1)


def initialise(module: nn.Module) -> None:
    """Truncated-normal weights of all Linear layers below `module`, biases zero.

    The deviation is 0.75 / sqrt(fan-in): the usual 0.02 at the paper's width of 1408. A plain 0.02
    at width 320 makes every layer's signal several times too small, and training stalls (LOG.md).
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.75 / math.sqrt(part.in_features))
            if part.bias is not None:
                nn.init.zeros_(part.bias)

"""Merger: kept patches gather what the dropped ones say (paper Sec. 3.1, Eq. 2).

Block, pre-norm, over the kept rows in raster order:

    x = x + causal self-attention(LN x)                           among kept rows
    x = x + cross-attention(LN x, x0 of the dropped patches)      x0 = LayerNorm(raw features)
    x = x + MLP(LN x)

Two forms that agree. `forward` gathers the kept rows first and computes only those, images packed
without padding: about 0.39 of the dense work at 36 % kept. `masked` takes a straight-through mask
and lets the loss reach the selector, either over kept rows (`dense=False`) or over all rows, so
that dropped rows carry a gradient too. With every patch kept there is nothing to attend to: the
published softmax becomes uniform over all patches, and so does ours.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import partial
from typing import Literal, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lavit.visual_tokenizer.layers import (
    CrossBlock,
    Keep,
    Patches,
    Ragged,
    attend,
    attention_shares,
    initialise,
)

Gathers = Literal["attend", "mean", "drop"]
# parts of the cross-attention that give zeros: equal logits are a mean of the dropped patches
SILENT: dict[Gathers, tuple[str, ...]] = {
    "attend": (),
    "mean": ("query",),
    "drop": ("query", "key", "value", "out"),
}


class Zeros(nn.Module):
    """Zeros in the shape of what comes in."""

    def forward(self, x: Float[Tensor, "*shape dim"]) -> Float[Tensor, "*shape dim"]:
        """As many zeros."""
        return torch.zeros_like(x)


class MergerBlock(CrossBlock):
    """One block of the merger; see the file's header. `gathers` as in `TokenizerConfig`."""

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float,
        gathers: Gathers,
        causal: bool,
    ) -> None:
        super().__init__(dim, heads, mlp_ratio)
        self.causal = causal
        for name in SILENT[gathers]:
            setattr(self.cross_attention, name, Zeros())

    def forward(
        self,
        x: Float[Tensor, "kept dim"],
        dropped: Float[Tensor, "dropped dim"],
        kept: Ragged,
        rest: Ragged,
        attends: Bool[Tensor, "images"],
    ) -> Float[Tensor, "kept dim"]:
        """Packed kept rows in and out; `attends` is False where an image dropped nothing."""
        # behind a causal mask no padding is seen
        mask = None if self.causal or kept.even else kept.valid[:, None]
        seen = self.self_attention(kept.pad(self.norm_self(x)), mask, causal=self.causal)
        x = x + kept.pack(seen)
        x = x + self._cross(self.norm_cross(x), dropped, kept, rest, attends)
        return x + self.mlp(self.norm_mlp(x))

    def _cross(self, x: Tensor, seen: Tensor, kept: Ragged, rest: Ragged, some: Tensor) -> Tensor:
        """Cross-attention to what is `seen`; `some` is False where an image dropped nothing."""
        cross = self.cross_attention
        query = kept.pad(cross.query(x)) * some[:, None, None]  # zero logits: uniform
        key, value = rest.pad(cross.key(seen)), rest.pad(cross.value(seen))
        mask = None if rest.even else rest.valid[:, None]
        return cross.out(kept.pack(attend(query, key, value, cross.heads, mask)))

    def attention(
        self,
        x: Patches,
        context: Patches,
        weight: Float[Tensor, "images 1 patches"],
        self_weight: Float[Tensor, "images patches patches"],
    ) -> Float[Tensor, "images patches patches"]:
        """The cross-attention that `padded` computes with these inputs, mean over heads."""
        x = x + self.self_attention(self.norm_self(x), self_weight)
        cross = self.cross_attention
        query, key = cross.query(self.norm_cross(x)), cross.key(context)
        return attention_shares(query, key, cross.heads, weight)


class BaseMerger(nn.Module, ABC):
    """What makes a row of each kept patch: LaVIT's merger, or a rival's; `dim` as the encoder's."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.recompute = False  # activation checkpointing of the blocks

    @abstractmethod
    def forward(self, patches: Patches, keep: Keep) -> Float[Tensor, "kept dim"]:
        """Rows of the kept patches, packed image after image; each keeps at least one."""


class Merger(BaseMerger):
    """A stack of merger blocks with one LayerNorm behind it."""

    def __init__(
        self,
        dim: int,
        heads: int,
        depth: int,
        mlp_ratio: float,
        *,
        gathers: Gathers = "attend",
        causal: bool = True,
    ) -> None:
        super().__init__(dim)
        self.causal = causal
        self.norm_patches = nn.LayerNorm(dim, eps=1e-5)
        block = (dim, heads, mlp_ratio, gathers, causal)
        self.blocks = nn.ModuleList(MergerBlock(*block) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        initialise(self)

    @property
    def _blocks(self) -> Iterable[MergerBlock]:
        return cast("Iterable[MergerBlock]", self.blocks)

    def forward(self, patches: Patches, keep: Keep) -> Float[Tensor, "kept dim"]:
        """Merged rows of the kept patches, packed image after image; each keeps at least one."""
        attends = ~keep.all(1)
        context = ~keep | ~attends[:, None]  # where nothing was dropped: all, uniformly
        rows = Ragged(keep.sum(1)), Ragged(context.sum(1)), attends
        # the host waits twice: how many rows stay is data, and only they are computed
        dropped = self.norm_patches(patches[context])
        x = patches[keep]
        again = self.recompute and torch.is_grad_enabled()
        for block in self.blocks:
            run = partial(checkpoint, block, use_reentrant=False) if again else block
            x = run(x, dropped, *rows)
        return self.norm(x)

    def masked(
        self,
        patches: Patches,
        mask: Float[Tensor, "images patches"],
        *,
        dense: bool,
        smoothing: float = 0.0,
    ) -> tuple[Float[Tensor, "images rows dim"], Float[Tensor, "images rows"]]:
        """Merged rows under a straight-through mask of zeros and ones, and each row's weight.

        dense: every patch is a row (rows = patches); else only kept ones, padded to the longest
        image (weight 0). Rows are not yet multiplied by their weight.
        """
        x, weight = patches, mask
        if not dense:
            keep = mask.detach() > 0.5
            rows = Ragged(keep.sum(1))  # the host waits below: only kept rows are computed
            x, weight = rows.pad(patches[keep]), rows.pad(mask[keep][:, None])[..., 0]
        self_weight = self._self_weight(weight)
        context = self.norm_patches(patches)
        again = self.recompute and torch.is_grad_enabled()
        for block in self._blocks:
            run = partial(checkpoint, block.padded, use_reentrant=False) if again else block.padded
            x = run(x, context, (1 - mask)[:, None], self_weight, smoothing)
        return self.norm(x), weight

    @torch.no_grad()
    def flow(self, patches: Patches, keep: Keep) -> Float[Tensor, "images patches patches"]:
        """How much of each patch every kept one takes: cross-attention, mean over heads and blocks.

        Entry [i, k, d] is the share of patch d in what kept patch k reads; rows of kept patches sum
        to one, others are zero. A picture that dropped nothing reads all patches alike.
        """
        x, mask = patches, keep.to(patches.dtype)
        inputs = self.norm_patches(patches), (1 - mask)[:, None], self._self_weight(mask)
        taken = torch.zeros_like(inputs[-1])
        for block in self._blocks:
            taken += block.attention(x, *inputs)
            x = block.padded(x, *inputs)
        return taken / len(self.blocks) * mask[..., None]

    def _self_weight(
        self, weight: Float[Tensor, "images rows"]
    ) -> Float[Tensor, "images rows rows"]:
        """What a row sees, times the key's weight; itself always."""
        rows = weight.shape[1]
        itself = torch.eye(rows, dtype=weight.dtype, device=weight.device)
        seen = torch.ones_like(itself).tril(-1) if self.causal else 1 - itself
        return seen * weight[:, None, :] + itself

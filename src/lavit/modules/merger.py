"""Merger: kept patches gather what the dropped ones say (paper Sec. 3.1, Eq. 2).

Block, pre-norm, over the kept rows in raster order:

    x = x + causal self-attention(LN x)                           among kept rows
    x = x + cross-attention(LN x, x0 of the dropped patches)      x0 = LayerNorm(raw features), computed once
    x = x + MLP(LN x)

Three forms that agree. `forward` gathers the kept rows first and computes only those, images packed without padding:
about 0.39 of the dense work at 36 % kept. `masked` takes a straight-through mask and lets the loss reach the selector,
either over kept rows (`dense=False`) or over all rows, so that dropped rows carry a gradient too. With every patch kept
there is nothing to attend to: the published softmax becomes uniform over all patches, and so does ours.
`flow` says where the dropped patches went: the cross-attention itself, which the fast path never holds.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lavit.modules.layers import (
    CrossAttention,
    Mlp,
    Ragged,
    SelfAttention,
    initialise,
    join_heads,
    split_heads,
    weighted_attention,
)


class MergerBlock(nn.Module):
    """One block of the merger; see the file's header."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(dim, eps=1e-5)
        self.self_attention = SelfAttention(dim, heads)
        self.norm_cross = nn.LayerNorm(dim, eps=1e-5)
        self.cross_attention = CrossAttention(dim, heads)
        self.norm_mlp = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = Mlp(dim, mlp_ratio)

    def forward(
        self,
        x: Float[Tensor, "kept dim"],
        dropped: Float[Tensor, "dropped dim"],
        kept_rows: Ragged,
        dropped_rows: Ragged,
        attends: Bool[Tensor, "images"],
    ) -> Float[Tensor, "kept dim"]:
        """Packed kept rows in, packed kept rows out; `attends` is False where an image dropped nothing."""
        x = self._among_kept(x, kept_rows)
        x = x + self._cross(self.norm_cross(x), dropped, kept_rows, dropped_rows, attends)
        return x + self.mlp(self.norm_mlp(x))

    def attention(
        self,
        x: Float[Tensor, "kept dim"],
        dropped: Float[Tensor, "dropped dim"],
        kept_rows: Ragged,
        dropped_rows: Ragged,
        attends: Bool[Tensor, "images"],
    ) -> Float[Tensor, "images most_kept most_dropped"]:
        """Cross-attention of a block with the inputs of `forward`, mean over heads; rows sum to one, zero at padding."""
        cross = self.cross_attention
        x = self.norm_cross(self._among_kept(x, kept_rows))
        query = kept_rows.pad(cross.query(x)) * attends[:, None, None]
        query, key = (split_heads(part, cross.heads) for part in (query, dropped_rows.pad(cross.key(dropped))))
        logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        weights = logits.masked_fill(~dropped_rows.valid[:, None, None], -torch.inf).softmax(-1)
        return weights.mean(1) * kept_rows.valid[..., None]

    def _among_kept(self, x: Tensor, kept_rows: Ragged) -> Tensor:
        return x + kept_rows.pack(self.self_attention(kept_rows.pad(self.norm_self(x)), causal=True))

    def _cross(self, x: Tensor, dropped: Tensor, kept_rows: Ragged, dropped_rows: Ragged, attends: Tensor) -> Tensor:
        cross = self.cross_attention
        query = kept_rows.pad(cross.query(x)) * attends[:, None, None]  # zero logits: uniform over all patches
        key, value = dropped_rows.pad(cross.key(dropped)), dropped_rows.pad(cross.value(dropped))
        mask = None if dropped_rows.even else dropped_rows.valid[:, None, None]
        query, key, value = (split_heads(part, cross.heads) for part in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return cross.out(kept_rows.pack(join_heads(mixed)))

    def masked(
        self,
        x: Float[Tensor, "images rows dim"],
        patches: Float[Tensor, "images patches dim"],
        self_weight: Float[Tensor, "images rows rows"],
        cross_weight: Float[Tensor, "images 1 patches"],
        smoothing: float,
    ) -> Float[Tensor, "images rows dim"]:
        """The same block under differentiable weights."""
        x = x + self.self_attention(self.norm_self(x), weight=self_weight, smoothing=smoothing)
        cross = self.cross_attention
        parts = cross.query(self.norm_cross(x)), cross.key(patches), cross.value(patches)
        query, key, value = (split_heads(part, cross.heads) for part in parts)
        mixed = weighted_attention(query, key, value, cross_weight, smoothing=smoothing)
        x = x + cross.out(join_heads(mixed))
        return x + self.mlp(self.norm_mlp(x))


class Merger(nn.Module):
    """A stack of merger blocks with one LayerNorm behind it; `dim` as the encoder's."""

    def __init__(self, dim: int, heads: int, depth: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm_patches = nn.LayerNorm(dim, eps=1e-5)
        self.blocks = nn.ModuleList(MergerBlock(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.recompute = False  # activation checkpointing of the blocks
        initialise(self)

    def forward(
        self, patches: Float[Tensor, "images patches dim"], keep: Bool[Tensor, "images patches"]
    ) -> Float[Tensor, "kept dim"]:
        """Merged rows of the kept patches, packed image after image; every image must keep at least one patch."""
        context, attends = self._context(keep)
        kept_rows, dropped_rows = Ragged(keep.sum(1)), Ragged(context.sum(1))
        dropped = self.norm_patches(patches[context])
        x = patches[keep]
        for block in self.blocks:
            parts = (x, dropped, kept_rows, dropped_rows, attends)
            again = self.recompute and torch.is_grad_enabled()
            x = checkpoint(block, *parts, use_reentrant=False) if again else block(*parts)
        return self.norm(x)

    @torch.no_grad()
    def flow(
        self, patches: Float[Tensor, "images patches dim"], keep: Bool[Tensor, "images patches"]
    ) -> Float[Tensor, "images patches patches"]:
        """How much of each patch every kept one takes: cross-attention, mean over heads and blocks.

        Entry [i, k, d] is the share of patch d in what kept patch k reads; rows of kept patches sum to one, others are
        zero. A picture that dropped nothing reads all patches alike.
        """
        context, attends = self._context(keep)
        kept_rows, dropped_rows = Ragged(keep.sum(1)), Ragged(context.sum(1))
        dropped = self.norm_patches(patches[context])
        x, taken = patches[keep], []
        for block in self.blocks:
            taken.append(block.attention(x, dropped, kept_rows, dropped_rows, attends))
            x = block(x, dropped, kept_rows, dropped_rows, attends)
        found = torch.stack(taken).mean(0)
        grid = found.new_zeros(*keep.shape, keep.shape[1])
        here = kept_rows.valid[:, :, None] & dropped_rows.valid[:, None]
        grid[keep[:, :, None] & context[:, None]] = found[here]  # both in raster order
        return grid

    @staticmethod
    def _context(keep: Bool[Tensor, "images patches"]) -> tuple[Bool[Tensor, "images patches"], Bool[Tensor, "images"]]:
        """Which patches are attended to, and which images dropped any: where none was, all, uniformly."""
        drop = ~keep
        attends = drop.any(1)
        return torch.where(attends[:, None], drop, True), attends

    def masked(
        self,
        patches: Float[Tensor, "images patches dim"],
        mask: Float[Tensor, "images patches"],
        *,
        dense: bool,
        smoothing: float = 0.0,
    ) -> tuple[Float[Tensor, "images rows dim"], Float[Tensor, "images rows"]]:
        """Merged rows under a straight-through mask of zeros and ones, and each row's weight (0 at padding).

        dense: every patch is a row (rows = patches); else only kept ones, padded to the longest image. Rows are not
        yet multiplied by their weight.
        """
        keep = mask.detach() > 0.5
        if dense:
            x, weight = patches, mask
        else:
            rows = Ragged(keep.sum(1))
            x, weight = rows.pad(patches[keep]), rows.pad(mask[keep][:, None])[..., 0]
        self_weight = self._self_weight(weight)
        context = self.norm_patches(patches)
        for block in self.blocks:
            x = block.masked(x, context, self_weight, (1 - mask)[:, None], smoothing)
        return self.norm(x), weight

    @staticmethod
    def _self_weight(weight: Float[Tensor, "images rows"]) -> Float[Tensor, "images rows rows"]:
        """Causal, times the key's weight; a row always sees itself."""
        rows = weight.shape[1]
        causal = torch.ones(rows, rows, dtype=weight.dtype, device=weight.device).tril(-1)
        itself = torch.eye(rows, dtype=weight.dtype, device=weight.device)
        return causal * weight[:, None, :] + itself

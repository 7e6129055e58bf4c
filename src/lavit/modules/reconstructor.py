"""Reconstructor: from codes back to the encoder's full grid of features (paper Sec. 3.1, "semantic decoder").

    codes ─ Linear + position in the kept sequence ─┐ keys, values
    N learned queries ─ [self-attention, cross-attention, MLP] × depth ─ LayerNorm ─ Linear ─ tanh ─ Linear ─ features

The position is the *index* of a code among the kept ones, as published: at generation time nobody knows its place in the
picture. `places` (config `spatial_positions`) adds the 2-D place where it is known: ours, to be measured.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lavit.modules.layers import (
    CrossAttention,
    Mlp,
    SelfAttention,
    initialise,
    join_heads,
    split_heads,
    weighted_attention,
)


class ReconstructorBlock(nn.Module):
    """Bidirectional self-attention over the queries, cross-attention to the codes, MLP."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(dim, eps=1e-5)
        self.self_attention = SelfAttention(dim, heads)
        self.norm_cross = nn.LayerNorm(dim, eps=1e-5)
        self.cross_attention = CrossAttention(dim, heads)
        self.norm_mlp = nn.LayerNorm(dim, eps=1e-5)
        self.mlp = Mlp(dim, mlp_ratio)

    def forward(self, x: Tensor, codes: Tensor, valid: Tensor) -> Tensor:
        """`valid` is a boolean mask over the codes, or a float weight that takes a gradient."""
        x = x + self.self_attention(self.norm_self(x))
        cross = self.cross_attention
        parts = cross.query(self.norm_cross(x)), cross.key(codes), cross.value(codes)
        query, key, value = (split_heads(part, cross.heads) for part in parts)
        if valid.dtype == torch.bool:
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=valid[:, None, None])
        else:
            mixed = weighted_attention(query, key, value, valid[:, None])
        x = x + cross.out(join_heads(mixed))
        return x + self.mlp(self.norm_mlp(x))


class Reconstructor(nn.Module):
    """Codes of `code_dim` in, `patches` features of `dim` out."""

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        depth: int,
        mlp_ratio: float,
        patches: int,
        code_dim: int,
        spatial_positions: bool = False,
    ) -> None:
        super().__init__()
        self.from_code = nn.Linear(code_dim, dim)
        self.positions = nn.Parameter(torch.empty(patches, dim))
        self.places = nn.Parameter(torch.empty(patches, dim)) if spatial_positions else None
        self.queries = nn.Parameter(torch.empty(patches, dim))
        self.blocks = nn.ModuleList(ReconstructorBlock(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.to_features = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, dim))
        initialise(self)
        nn.init.trunc_normal_(self.from_code.weight, std=1.0)  # codes are unit vectors: rows of size one
        for table in (self.positions, self.queries, self.places):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)

    @torch.no_grad()
    def start_from(self, mean: Float[Tensor, "dim"]) -> None:
        """Let a fresh reconstructor answer the data's mean feature: the first hundreds of steps would learn just that."""
        self.to_features[-1].bias.copy_(mean)

    def forward(
        self,
        codes: Float[Tensor, "images rows code_dim"],
        valid: Bool[Tensor, "images rows"] | Float[Tensor, "images rows"],
        *,
        index: Int[Tensor, "images rows"] | None = None,
        places: Int[Tensor, "images rows"] | None = None,
    ) -> Float[Tensor, "images patches dim"]:
        """Reconstructed features of each image.

        codes: padded vectors; valid: which are real, or a float weight per code (training, with gradient);
        index: place of each code in the kept sequence (default 0, 1, 2 …); places: raster number of each code's patch,
        required if and only if the module was built with `spatial_positions`.
        """
        return self.to_features(self.normed(codes, valid, index=index, places=places))

    def normed(
        self,
        codes: Float[Tensor, "images rows code_dim"],
        valid: Bool[Tensor, "images rows"] | Float[Tensor, "images rows"],
        *,
        index: Int[Tensor, "images rows"] | None = None,
        places: Int[Tensor, "images rows"] | None = None,
    ) -> Float[Tensor, "images patches dim"]:
        """The queries after the final norm, before the task layer."""
        if (places is None) != (self.places is None):
            raise ValueError("places are needed exactly where the reconstructor was built with spatial_positions")
        rows = self.from_code(codes)
        rows = rows + (self.positions[: rows.shape[1]] if index is None else self.positions[index])
        if places is not None:
            rows = rows + self.places[places]
        x = self.queries.expand(len(codes), -1, -1)
        for block in self.blocks:
            x = block(x, rows, valid)
        return self.norm(x)

"""Reconstructor: codes back to the encoder's full grid (paper Sec. 3.1, "semantic decoder").

    codes ─ Linear + position in the kept sequence ─┐ keys, values
    N learned queries ─ [self-, cross-attention, MLP] × depth ─ LayerNorm ─ Linear ─ tanh ─ Linear

The position is the *index* of a code among the kept ones, as published: at generation time
its place in the picture. `places` (config `spatial_positions`) adds the 2-D place where it is
known: ours, to be measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lavit.config import InputError, TokenizerConfig
from lavit.visual_tokenizer.layers import CrossBlock, Patches, initialise


class Reconstructor(nn.Module):
    """Codes of `code_dim` in, `patches` features of `dim` out."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        dim, shape = config.dim, (config.patches, config.dim)
        block = (dim, config.heads, config.mlp_ratio)
        self.from_code = nn.Linear(config.code_dim, dim)
        self.positions = nn.Parameter(torch.empty(shape))
        self.places = nn.Parameter(torch.empty(shape)) if config.spatial_positions else None
        self.queries = nn.Parameter(torch.empty(shape))
        self.blocks = nn.ModuleList(CrossBlock(*block) for _ in range(config.reconstructor_depth))
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        self.to_features = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, dim))
        self.recompute = False  # activation checkpointing of the blocks
        initialise(self)
        nn.init.trunc_normal_(self.from_code.weight, std=1.0)  # codes are unit vectors
        for table in (self.positions, self.queries, self.places):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02)

    @torch.no_grad()
    def start_from(self, mean: Float[Tensor, "dim"]) -> None:
        """Begin with the data's mean feature: the first hundreds of steps would learn just that."""
        last = self.to_features[-1]
        assert isinstance(last, nn.Linear)
        last.bias.copy_(mean)

    def forward(
        self,
        codes: Float[Tensor, "images rows code_dim"],
        valid: Bool[Tensor, "images rows"] | Float[Tensor, "images rows"],
        *,
        index: Int[Tensor, "images rows"] | None = None,
        places: Int[Tensor, "images rows"] | None = None,
    ) -> Patches:
        """Reconstructed features of each image.

        codes: padded vectors; valid: which are real, or a float weight per code (training, with
        gradient); index: place of each code in the kept sequence (default 0, 1, 2 …); places:
        raster number of each code's patch, exactly where built with `spatial_positions`.
        """
        table = self.places
        if (places is None) != (table is None):
            said = "a tokenizer with spatial_positions rebuilds pictures whose places are known"
            raise InputError(f"{said}: codes alone are painted without it")
        rows = self.from_code(codes)
        rows = rows + (self.positions[: rows.shape[1]] if index is None else self.positions[index])
        if places is not None and table is not None:
            rows = rows + table[places]
        x = self.queries.expand(len(codes), -1, -1)
        again = self.recompute and torch.is_grad_enabled()
        for block in cast("Iterable[CrossBlock]", self.blocks):
            run = partial(checkpoint, block.padded, use_reentrant=False) if again else block.padded
            x = run(x, rows, valid[:, None])
        return self.to_features(self.norm(x))

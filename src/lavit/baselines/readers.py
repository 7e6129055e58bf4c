"""Readers of the paper's Fig. 1a: adapters between a frozen encoder and a language model.

linear      one Linear on every patch                        LLaVA, MiniGPT-4
resampler   latents that attend to patches and themselves    Flamingo (arXiv 2204.14198)
Q-Former    queries of a BERT that attends to patches        BLIP-2 (arXiv 2301.12597)

All take every patch, whatever the keep mask says. Their LM's words give them a loss, and codes do
for the few pictures that have as many of them as the reader makes rows (up to 2 % of scenes).
Different from the papers: Flamingo's resampler feeds cross-attention with gates inside the LM, here
its rows stand before the words; BLIP-2's first stage (contrast, matching and captions by the
Q-Former alone) is left out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from lavit.language.reader import Reader, projection
from lavit.visual_tokenizer.layers import Keep, Patches, initialise


class LinearReader(Reader):
    """A row for each of `patches` patches."""

    def __init__(self, dim: int, width: int, *, patches: int) -> None:
        super().__init__()
        self.patches = patches
        self.to_language = projection(dim, width)

    def rows(self, kept: int) -> int:
        """All patches."""
        return self.patches

    def forward(self, patches: Patches, keep: Keep) -> Float[Tensor, "total width"]:
        """Every patch, projected."""
        return self.to_language(patches).flatten(0, 1)


class ResamplerLayer(nn.Module):
    """Latents attend to patches and to themselves, then an MLP; no biases in linears.

    q = Wq LN(latents); k, v = Wk, Wv [LN(patches); LN(latents)]
    """

    def __init__(self, dim: int, heads: int, head_dim: int, ratio: int) -> None:
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.norm_patches, self.norm_latents = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query = nn.Linear(dim, inner, bias=False)
        self.key_value = nn.Linear(dim, 2 * inner, bias=False)
        self.out = nn.Linear(inner, dim, bias=False)
        hidden = ratio * dim
        wide, narrow = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), wide, nn.GELU(), narrow)

    def forward(
        self, latents: Float[Tensor, "images latents dim"], patches: Patches
    ) -> Float[Tensor, "images latents dim"]:
        """Latents after this layer."""
        own = self.norm_latents(latents)
        query = self.query(own)
        key, value = self.key_value(torch.cat([self.norm_patches(patches), own], 1)).chunk(2, -1)
        parts = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, key, value))
        mixed = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        latents = latents + self.out(mixed)
        return latents + self.mlp(latents)


class Resampler(Reader):
    """`latents` learned rows for every picture."""

    def __init__(
        self,
        dim: int,
        width: int,
        *,
        latents: int = 64,
        depth: int = 6,
        heads: int = 8,
        head_dim: int = 64,
        ratio: int = 4,
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, dim) * 0.02)
        sizes = dim, heads, head_dim, ratio
        self.layers = nn.ModuleList(ResamplerLayer(*sizes) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        initialise(self)
        self.to_language = projection(dim, width)

    def rows(self, kept: int) -> int:
        """As many as latents."""
        return len(self.latents)

    def forward(self, patches: Patches, keep: Keep) -> Float[Tensor, "total width"]:
        """The latents of each picture, projected."""
        latents = self.latents.expand(len(patches), -1, -1)
        for layer in self.layers:
            latents = layer(latents, patches)
        return self.to_language(self.norm(latents)).flatten(0, 1)


class QFormer(Reader):
    """`queries` learned rows for every picture: transformers' Q-Former, without its text side."""

    def __init__(
        self,
        dim: int,
        width: int,
        *,
        queries: int = 32,
        hidden: int = 768,
        depth: int = 12,
        heads: int = 12,
        ratio: int = 4,
        every: int = 2,
    ) -> None:
        super().__init__()
        self.qformer = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=hidden,
                num_hidden_layers=depth,
                num_attention_heads=heads,
                intermediate_size=ratio * hidden,
                encoder_hidden_size=dim,
                cross_attention_frequency=every,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )
        self.queries = nn.Parameter(torch.randn(queries, hidden) * 0.02)
        self.to_language = projection(hidden, width)

    def rows(self, kept: int) -> int:
        """As many as queries."""
        return len(self.queries)

    def forward(self, patches: Patches, keep: Keep) -> Float[Tensor, "total width"]:
        """The queries of each picture, projected."""
        queries = self.queries.expand(len(patches), -1, -1)
        found = self.qformer(query_embeds=queries, encoder_hidden_states=patches)
        return self.to_language(found.last_hidden_state).flatten(0, 1)

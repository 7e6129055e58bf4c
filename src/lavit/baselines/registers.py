"""Registers whose first ones matter most, and a rule of how many a picture needs.

    patches ─ N learnt queries that attend to them ─ the first L rows ─ codebook ─ reconstructor

Nested dropout (arXiv 1402.0915) drops the tail of a row of tokens in training, so that early ones
carry most: One-D-Piece (arXiv 2501.10064) and KARL (arXiv 2507.07995) tokenise pictures so. From
them: tail dropping, evenly over all lengths, and that a picture gets the least number that is
enough. Different here: features of LaVIT's encoder go in and come out, enough is `slack` more of
the distance that all registers reach (KARL asks for a given error and learns to halt), and the
length of a picture in training is a function of its features.

A mask says how many registers there are: its first L places are kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lavit.baselines.selectors import Everything
from lavit.config import TokenizerConfig
from lavit.visual_tokenizer.layers import CrossBlock, Keep, Patches, initialise
from lavit.visual_tokenizer.merger import BaseMerger
from lavit.visual_tokenizer.selector import KeepPolicy, seeded_by
from lavit.visual_tokenizer.tokenizer import VisualTokenizer, cosine_distance

SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of the registers, that are tried before all of them


class RegisterRows(BaseMerger):
    """Learnt queries that attend to patches, in place of kept patches that do."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__(config.dim)
        self.queries = nn.Parameter(torch.randn(config.patches, config.dim) * 0.02)
        self.norm_patches = nn.LayerNorm(config.dim)
        sizes = config.dim, config.heads, config.mlp_ratio
        self.blocks = nn.ModuleList(CrossBlock(*sizes) for _ in range(config.merger_depth))
        self.norm = nn.LayerNorm(config.dim)
        initialise(self)

    def forward(self, patches: Patches, keep: Keep) -> Float[Tensor, "kept dim"]:
        """The rows that are kept, packed image after image."""
        x, context = self.queries.expand(len(patches), -1, -1), self.norm_patches(patches)
        all_ = torch.ones_like(keep)[:, None]
        for block in cast("Iterable[CrossBlock]", self.blocks):
            x = block.padded(x, context, all_)
        return self.norm(x)[keep]


class Registers(VisualTokenizer):
    """LaVIT's tokenizer with registers in place of patches (keep="auto": the rule)."""

    def __init__(self, config: TokenizerConfig, *, slack: float = 0.1) -> None:
        super().__init__(config)
        self.slack = slack
        self.selector: Any = Everything()
        self.merger: Any = RegisterRows(config)

    @torch.no_grad()
    def select(
        self,
        patches: Patches,
        policy: KeepPolicy | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Keep:
        """The first registers: as many as are enough, or as another policy than `auto` says."""
        if policy is not None and policy.kind != "auto":  # of equal patches the first are kept
            return super().select(patches, policy, generator=generator)
        wanted, total = self.standard(patches), self.config.patches
        counts = sorted({max(1, round(share * total)) for share in SHARES} | {total})
        far = [
            cosine_distance(self.reconstruct(patches, keep, quantise=False), wanted)
            for keep in (self._first(patches, [count] * len(patches)) for count in counts)
        ]
        enough = torch.stack(far, 1) <= (1 + self.slack) * far[-1][:, None]
        least = torch.tensor(counts, device=patches.device)[enough.float().argmax(1)]
        return self._first(patches, least.tolist())

    def _first(self, patches: Patches, counts: list[int]) -> Keep:
        """A mask of the first places of each picture."""
        places = torch.arange(self.config.patches, device=patches.device)
        return places < torch.tensor(counts, device=patches.device)[:, None]

    def _mask(
        self, patches: Tensor, log_probs: Tensor, noise: Tensor | None, temperature: float
    ) -> Tensor:
        """In training any number, else the rule's."""
        if not self.training:
            return self.select(patches).float()
        most = self.config.patches
        drawn = (torch.randint(1, most + 1, (), generator=seeded_by(one)) for one in patches)
        return self._first(patches, [int(count) for count in drawn]).float()

"""Which patches get a token, in other ways than by the learnt selector, in LaVIT's own tokenizer.

Attended   patches that attention looks at. An encoder with attention gives its class token's; a
           convolutional one has none, so this stands in for it: what a patch receives in
           self-attention without weights, softmax(x xᵀ / √d), x the features without their mean.
Clusters   greedy clustering by a threshold of cosine, the idea of DiVT (one token a cluster, more
           of them where a picture is varied): in raster order, a patch that is like no leader so
           far becomes one; a cluster's row is the mean of its members, in place of the merger.
           Different here: the threshold is set on training pictures, so that clusters are as many
           as `rate` says on average; rows go to LaVIT's codebook and reconstructor.
           `pooled=False` keeps LaVIT's merger: leaders are the kept patches.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lavit.config import TokenizerConfig
from lavit.visual_tokenizer.layers import Keep, Patches
from lavit.visual_tokenizer.merger import BaseMerger
from lavit.visual_tokenizer.tokenizer import VisualTokenizer

SURE = 20.0  # logit of a choice that is made
ROUNDS = 20  # of the search for a threshold


def log_probs_of(logits: Float[Tensor, "images patches"]) -> Float[Tensor, "images patches 2"]:
    """Log-probabilities of keeping and dropping, as a selector gives them."""
    return torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)], -1)


class Everything(nn.Module):
    """A selector to which all patches are alike: of these, policies keep the first."""

    def forward(self, patches: Patches) -> Float[Tensor, "images patches 2"]:
        """Log-probabilities of 1 and 0."""
        return log_probs_of(patches.new_full(patches.shape[:2], SURE))


class ReceivedAttention(nn.Module):
    """What patches receive from all others, relative to its mean."""

    places: Tensor

    def __init__(self, places: Tensor) -> None:
        super().__init__()
        self.register_buffer("places", places, persistent=False)

    def forward(self, patches: Patches) -> Float[Tensor, "images patches 2"]:
        """Log-probabilities; above a half where a patch receives more than the average."""
        x = patches.float() - self.places
        x = x - x.mean(1, keepdim=True)
        shares = (x @ x.transpose(1, 2) / x.shape[-1] ** 0.5).softmax(-1)
        return log_probs_of((shares.mean(1) * x.shape[1]).clamp(min=1e-9).log())


class Attended(VisualTokenizer):
    """LaVIT's tokenizer, which keeps what receives most attention (keep="rate:0.25")."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__(config)
        self.selector: Any = ReceivedAttention(self.place_code)


class Leaders(nn.Module):
    """Greedy leaders: patches whose cosine with every leader before them is below a threshold."""

    places: Tensor
    threshold: Tensor

    def __init__(self, places: Tensor) -> None:
        super().__init__()
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("threshold", torch.tensor(0.5))

    def leads(self, patches: Patches, threshold: float) -> Keep:
        """Which patches lead a cluster; the first always does."""
        x = F.normalize(patches.float() - self.places, dim=-1)
        near = x @ x.transpose(1, 2) >= threshold
        leads = torch.zeros(near.shape[:2], dtype=torch.bool, device=x.device)
        covered = leads.clone()
        for patch in range(x.shape[1]):
            leads[:, patch] = ~covered[:, patch]
            covered |= near[:, patch] & leads[:, patch, None]
        return leads

    def measure(self, patches: Patches, wanted: float) -> None:
        """Set the threshold so that pictures have `wanted` clusters on average (bisection)."""
        low, high = -1.0, 1.0
        for _ in range(ROUNDS):
            middle = (low + high) / 2
            found = float(self.leads(patches, middle).sum(1).float().mean())
            low, high = (middle, high) if found < wanted else (low, middle)
        self.threshold.fill_((low + high) / 2)

    def forward(self, patches: Patches) -> Float[Tensor, "images patches 2"]:
        """Log-probabilities of a choice that is made already."""
        leads = self.leads(patches, float(self.threshold))
        return log_probs_of(torch.where(leads, SURE, -SURE))


class ClusterMeans(BaseMerger):
    """Each kept patch's row is the mean of the patches that are nearest to it, itself among them.

    It has no weights.
    """

    places: Tensor

    def __init__(self, dim: int, places: Tensor) -> None:
        super().__init__(dim)
        self.register_buffer("places", places, persistent=False)

    def forward(self, patches: Patches, keep: Keep) -> Float[Tensor, "kept dim"]:
        """Means of clusters, packed image after image."""
        x = F.normalize(patches - self.places, dim=-1)
        near = (x @ x.transpose(1, 2)).masked_fill(~keep[:, None], -torch.inf)
        itself = torch.eye(keep.shape[1], dtype=torch.bool, device=keep.device)
        near = near.masked_fill(itself & keep[:, None], torch.inf)
        member = F.one_hot(near.argmax(-1), keep.shape[1]).to(patches.dtype)
        means = (member.transpose(1, 2) @ patches) / member.sum(1).clamp(min=1)[..., None]
        return means[keep]


class Clusters(VisualTokenizer):
    """LaVIT's tokenizer with greedy leaders for a selector and means of clusters for a merger."""

    def __init__(self, config: TokenizerConfig, *, rate: float = 0.25, pooled: bool = True) -> None:
        super().__init__(config)
        self.rate = rate
        self.selector: Any = Leaders(self.place_code)
        if pooled:
            self.merger: Any = ClusterMeans(config.dim, self.place_code)

    def measure(self, patches: Patches) -> None:
        """Statistics of channels, and the threshold."""
        super().measure(patches)
        self.selector.measure(self.prepare(patches), self.rate * self.config.patches)

"""Condition heads of the pixel decoder: from features to its conditioning (paper Eq. 5).

CrossCondition    Linear D → C: a context of N tokens (512-px decoder). Null: learned, zeros, or the
                  stored null-text embedding, zero-padded to the context's length and masked
PooledCondition   two Linears side by side make SDXL's wide context; an attention pool makes its
                  pooled vector. Null: zeros or learned
GridCondition     Linear D → C for each latent on a patch, laid out as a map, concatenated. Not in
                  the paper: place comes for free. Null: learned or zeros
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lavit.config import InputError, PixelsConfig
from lavit.visual_tokenizer.layers import Patches, attend


@dataclass(frozen=True)
class Condition:
    """What the denoiser is conditioned on; parts that a head does not make are None."""

    context: Float[Tensor, "images tokens width"] | None = None
    valid: Bool[Tensor, "images tokens"] | None = None  # which tokens of the context are real
    pooled: Float[Tensor, "images pooled"] | None = None
    grid: Float[Tensor, "images channels rows columns"] | None = None

    def followed_by(self, other: Condition) -> Condition:
        """Both in one batch: our pictures, then the other's."""
        return self._joined(other, lambda ours, theirs: torch.cat([ours, theirs]))

    def replaced(self, where: Bool[Tensor, "images"], other: Condition) -> Condition:
        """The other's parts for the pictures in `where`, ours for the rest."""

        def choose(ours: Tensor, theirs: Tensor) -> Tensor:
            return torch.where(where.view(-1, *[1] * (ours.dim() - 1)), theirs, ours)

        return self._joined(other, choose)

    def _joined(self, other: Condition, join: Callable[[Tensor, Tensor], Tensor]) -> Condition:
        parts = {name: part for name, part in vars(self).items() if part is not None}
        return Condition(**{name: join(part, vars(other)[name]) for name, part in parts.items()})


class AttentionPool(nn.Module):
    """One vector per picture: the mean asks, the mean and all tokens answer."""

    def __init__(self, dim: int, out_dim: int, *, tokens: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise InputError(f"the attention pool cannot split {dim} channels into {heads} heads")
        self.heads = heads
        self.positions = nn.Parameter(torch.randn(tokens + 1, dim) / dim**0.5)
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.out = nn.Linear(dim, out_dim)

    def forward(self, x: Float[Tensor, "images tokens dim"]) -> Float[Tensor, "images out"]:
        """The pooled vector."""
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1) + self.positions
        parts = self.query(x[:, :1]), self.key(x), self.value(x)
        return self.out(attend(*parts, self.heads)[:, 0])


class Head(nn.Module, ABC):
    """What every head has; it makes a `Condition` of features for latents of (height, width)."""

    def __init__(self, config: PixelsConfig) -> None:
        super().__init__()
        kind, null = config.condition, config.unconditional
        if null == "text" and kind != "cross":
            raise InputError(f'a "{kind}" condition has no null text: use "learned" or "zeros"')
        self.learned = null == "learned"

    @abstractmethod
    def null(self, images: int, size: tuple[int, int]) -> Condition:
        """The null condition of `images` pictures, for latents of `size`."""


class CrossCondition(Head):
    """A context of N tokens, padded and masked with the null text, which may be longer."""

    def __init__(self, config: PixelsConfig) -> None:
        super().__init__(config)
        width = config.condition_dim
        self.to_context = nn.Linear(config.features_dim, width)
        self.text, self.tokens = config.unconditional == "text", config.patches
        if self.text:
            self.register_buffer("null_context", torch.zeros(config.null_tokens, width))
            self.tokens = max(self.tokens, config.null_tokens)
        elif self.learned:
            self.null_context = nn.Parameter(torch.randn(config.patches, width) * 0.02)

    def forward(self, features: Patches, size: tuple[int, int]) -> Condition:
        """Condition on features; `size` is not used."""
        return self._padded(self.to_context(features))

    def null(self, images: int, size: tuple[int, int]) -> Condition:
        """The null condition of `images` pictures."""
        weight = self.to_context.weight
        if not (self.text or self.learned):
            return self._padded(weight.new_zeros(images, self.tokens, len(weight)))
        return self._padded(self.null_context.to(weight.dtype).expand(images, -1, -1))

    def take_null(self, null: Float[Tensor, "tokens width"]) -> None:
        """Store the null-text embedding that training begins with."""
        given, expected = list(null.shape), list(self.null_context.shape)
        if given != expected:
            raise InputError(f"the null text is {given}, this configuration expects {expected}")
        self.null_context.copy_(null)

    def _padded(self, context: Tensor) -> Condition:
        if not self.text:
            return Condition(context=context)
        images, rows, _ = context.shape
        valid = torch.arange(self.tokens, device=context.device).expand(images, -1) < rows
        return Condition(context=F.pad(context, (0, 0, 0, self.tokens - rows)), valid=valid)


class PooledCondition(Head):
    """SDXL's two inputs: a context as wide as its two text encoders together, a pooled vector."""

    def __init__(self, config: PixelsConfig) -> None:
        super().__init__(config)
        dim, narrow, wide = config.features_dim, config.condition_dim, config.pooled_dim
        self.to_narrow, self.to_wide = nn.Linear(dim, narrow), nn.Linear(dim, wide)
        self.pool = AttentionPool(dim, wide, tokens=config.patches, heads=config.pool_heads)
        self.tokens = config.patches
        if self.learned:
            self.null_context = nn.Parameter(torch.randn(config.patches, narrow + wide) * 0.02)
            self.null_pooled = nn.Parameter(torch.randn(wide) * 0.02)

    def forward(self, features: Patches, size: tuple[int, int]) -> Condition:
        """Condition on features; `size` is not used."""
        context = torch.cat([self.to_narrow(features), self.to_wide(features)], dim=-1)
        return Condition(context=context, pooled=self.pool(features))

    def null(self, images: int, size: tuple[int, int]) -> Condition:
        """The null condition of `images` pictures."""
        if self.learned:
            context = self.null_context.expand(images, -1, -1)
            return Condition(context=context, pooled=self.null_pooled.expand(images, -1))
        narrow, wide = self.to_narrow.weight, self.to_wide.weight
        context = narrow.new_zeros(images, self.tokens, len(narrow) + len(wide))
        return Condition(context=context, pooled=wide.new_zeros(images, len(wide)))


class GridCondition(Head):
    """The features as a map, laid out in raster order, resized to the latents.

    Where k x k latents lie on a patch, each has a projection of its own, as a convolution after
    them cannot tell which of the k x k it stands on.
    """

    def __init__(self, config: PixelsConfig) -> None:
        super().__init__(config)
        patches, width = config.patches, config.condition_dim
        self.side = round(patches**0.5)
        if self.side**2 != patches:
            raise InputError(f'"grid" needs a square number of patches, not {patches}')
        latents = self.side if config.vae else config.size // config.patch
        self.within = 1 if latents % self.side else latents // self.side
        self.to_map = nn.Linear(config.features_dim, width * self.within**2)
        if self.learned:
            self.null_map = nn.Parameter(torch.zeros(width))
        self.width = width

    def forward(self, features: Patches, size: tuple[int, int]) -> Condition:
        """Condition on features."""
        grid = self.to_map(features).transpose(1, 2).unflatten(2, (self.side, self.side))
        grid = F.pixel_shuffle(grid, self.within)
        return Condition(grid=F.interpolate(grid, size, mode="bilinear", align_corners=False))

    def null(self, images: int, size: tuple[int, int]) -> Condition:
        """The null condition of `images` pictures."""
        vector = self.null_map if self.learned else self.to_map.weight.new_zeros(self.width)
        return Condition(grid=vector[:, None, None].expand(images, -1, *size))


HEADS: dict[str, Callable[[PixelsConfig], Head]] = {
    "cross": CrossCondition,
    "pooled": PooledCondition,
    "grid": GridCondition,
}

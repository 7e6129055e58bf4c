"""The dynamic visual tokenizer: selector → merger → codebook, and the reconstructor back (paper Sec. 3.1).

`encode` turns encoder features into `VisualTokens`; `decode` turns codes into the encoder's full feature grid. Both work
on ragged batches. `forward` is the training form of stage 1: one straight-through mask that acts on attention, on
the rows and on the reconstructor, so that the reconstruction loss reaches the selector (method: "How it learns").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lavit.config import InputError, TokenizerConfig
from lavit.modules.codebook import Codebook, Quantised
from lavit.modules.layers import Ragged, place_code
from lavit.modules.merger import Merger
from lavit.modules.reconstructor import Reconstructor
from lavit.modules.selector import KeepPolicy, Selector, select, straight_through
from lavit.sequence import VisualTokens


@dataclass(frozen=True)
class TokenizerOutput:
    """What a training step of stage 1 needs: reconstruction, mask, probabilities, and the kept vectors."""

    features: Float[Tensor, "images patches dim"]
    mask: Float[Tensor, "images patches"]
    keep_probability: Float[Tensor, "images patches"]
    vectors: Float[Tensor, "kept code_dim"]  # unit vectors before the look-up
    quantised: Quantised | None
    norm: Float[Tensor, ""]  # mean length of the vectors before they were made unit vectors, for health


class VisualTokenizer(nn.Module):
    """Selector, merger, codebook and reconstructor over the features of a frozen encoder."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.selector = Selector(config.dim)
        self.merger = Merger(config.dim, config.heads, config.merger_depth, config.mlp_ratio)
        self.codebook = Codebook(config.dim, config.codes, config.code_dim)
        self.reconstructor = Reconstructor(
            dim=config.dim,
            heads=config.heads,
            depth=config.reconstructor_depth,
            mlp_ratio=config.mlp_ratio,
            patches=config.patches,
            code_dim=config.code_dim,
            spatial_positions=config.spatial_positions,
        )
        grid = round(config.patches**0.5)
        places = place_code(grid, config.dim) if config.position_code else torch.zeros(config.patches, 1)
        self.register_buffer("place_code", places, persistent=False)
        if config.standardise:
            self.register_buffer("mean", torch.zeros(config.dim))
            self.register_buffer("deviation", torch.ones(config.dim))

    @torch.no_grad()
    def measure(self, patches: Float[Tensor, "images patches dim"]) -> None:
        """Take mean and deviation of each channel from features of training pictures."""
        if self.config.standardise:
            rows = patches.double().flatten(0, 1)
            self.mean.copy_(rows.mean(0))
            self.deviation.copy_(rows.std(0).clamp(min=1e-6))

    def standard(self, patches: Float[Tensor, "images patches dim"]) -> Float[Tensor, "images patches dim"]:
        """Features as the tokenizer reconstructs them and the decoder sees them.

        With `standardise` each channel has mean 0 and deviation 1; else they are the encoder's.
        """
        return (patches - self.mean) / self.deviation if self.config.standardise else patches

    def prepare(self, patches: Float[Tensor, "images patches dim"]) -> Float[Tensor, "images patches dim"]:
        """Input of selector and merger: standard features, plus a place code where the encoder has none."""
        if patches.shape[1:] != (self.config.patches, self.config.dim):
            raise InputError(
                f"the tokenizer takes {self.config.patches} patches of {self.config.dim} channels, "
                f"not {patches.shape[1]} of {patches.shape[2]}"
            )
        return self.standard(patches) + self.place_code

    @torch.no_grad()
    def select(
        self,
        patches: Float[Tensor, "images patches dim"],
        policy: KeepPolicy | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Bool[Tensor, "images patches"]:
        """Keep mask of each image under a policy (default: auto)."""
        inputs = self.prepare(patches)
        policy = policy or KeepPolicy()
        return select(self.selector(inputs), policy, patches=patches, generator=generator)

    @torch.no_grad()
    def encode(
        self,
        patches: Float[Tensor, "images patches dim"],
        policy: KeepPolicy | None = None,
        *,
        generator: torch.Generator | None = None,
        keep: Bool[Tensor, "images patches"] | None = None,
    ) -> VisualTokens:
        """Visual tokens of encoder features; `keep` gives the mask instead of the policy."""
        if keep is None:
            keep = self.select(patches, policy, generator=generator)
        rows = self.merger(self.prepare(patches), keep)
        return VisualTokens(self.codebook.index(self.codebook.project(rows)), keep.sum(1), keep)

    def decode(
        self,
        codes: Int[Tensor, "total"],
        lengths: Int[Tensor, "images"],
        *,
        keep: Bool[Tensor, "images patches"] | None = None,
    ) -> Float[Tensor, "images patches dim"]:
        """Features of images given as codes; `keep` is needed only by a model with spatial positions."""
        if int(lengths.max()) > self.config.patches or int(lengths.min()) < 1:
            raise InputError(f"an image has 1 to {self.config.patches} codes, not {lengths.tolist()}")
        rows = Ragged(lengths)
        places = None if keep is None else self._places(keep)
        return self.reconstructor(rows.pad(self.codebook.vector(codes)), rows.valid, places=places)

    def reconstruct(self, patches: Float[Tensor, "images patches dim"], keep: Tensor, *, quantise: bool) -> Tensor:
        """Features through merger and reconstructor under a fixed mask, with or without the look-up."""
        vectors = self.codebook.project(self.merger(self.prepare(patches), keep))
        rows = Ragged(keep.sum(1))
        if quantise:
            return self.decode(self.codebook.index(vectors), rows.lengths, keep=keep)
        places = self._places(keep)
        return self.reconstructor(rows.pad(vectors), rows.valid, places=places)

    def flow(
        self, patches: Float[Tensor, "images patches dim"], keep: Bool[Tensor, "images patches"]
    ) -> Float[Tensor, "images patches patches"]:
        """How much of each patch every kept one takes in the merger; see `Merger.flow`."""
        return self.merger.flow(self.prepare(patches), keep)

    def _places(self, keep: Tensor) -> Tensor | None:
        """Raster numbers of the kept patches, padded; None where the reconstructor does not use them."""
        if not self.config.spatial_positions:
            return None
        return Ragged(keep.sum(1)).pad(keep.nonzero()[:, 1:].float())[..., 0].long()

    def forward(
        self,
        patches: Float[Tensor, "images patches dim"],
        noise: Float[Tensor, "images patches 2"] | None,
        *,
        quantise: bool,
        dense: bool,
        temperature: float = 1.0,
        train_selector: bool = True,
    ) -> TokenizerOutput:
        """One training forward. `noise` is standard Gumbel, or None for the deterministic `auto` mask.

        dense: every row is computed, so that dropped ones carry a gradient to the selector too. With a frozen selector
        the mask has no gradient and only kept rows are computed.
        """
        inputs = self.prepare(patches)
        with torch.set_grad_enabled(torch.is_grad_enabled() and train_selector):
            log_probs = self.selector(inputs)  # frozen, it is no part of the graph: DDP would wait for it
            mask = self._mask(log_probs, noise, temperature)
        keep = mask.detach() > 0.5
        probability = log_probs[..., 0].exp()
        if not train_selector or not torch.is_grad_enabled():
            features, vectors, quantised, norm = self._kept_forward(inputs, keep, quantise=quantise)
        else:
            found = self._masked_forward(inputs, mask, keep, quantise=quantise, dense=dense)
            features, vectors, quantised, norm = found
        return TokenizerOutput(features, mask, probability, vectors, quantised, norm)

    @staticmethod
    def _mask(log_probs: Tensor, noise: Tensor | None, temperature: float) -> Tensor:
        if noise is None:
            return select(log_probs, KeepPolicy()).float()
        return straight_through(log_probs, noise, temperature=temperature)

    @torch.no_grad()
    def kept(
        self,
        patches: Float[Tensor, "images patches dim"],
        noise: Float[Tensor, "images patches 2"] | None,
        *,
        temperature: float = 1.0,
    ) -> Int[Tensor, "images"]:
        """Number of patches that `forward` with the same noise will keep of each image; the selector alone is computed."""
        mask = self._mask(self.selector(self.prepare(patches)), noise, temperature)
        return (mask > 0.5).sum(1)

    def _kept_forward(
        self, inputs: Tensor, keep: Tensor, *, quantise: bool
    ) -> tuple[Tensor, Tensor, Quantised | None, Tensor]:
        raw = self.codebook.embed(self.merger(inputs, keep))
        vectors = F.normalize(raw, dim=-1)
        quantised = self.codebook.quantise(vectors) if quantise else None
        rows = Ragged(keep.sum(1))
        codes = rows.pad(quantised.vectors if quantised else vectors)
        places = self._places(keep)
        features = self.reconstructor(codes, rows.valid, places=places)
        return features, vectors, quantised, raw.detach().norm(dim=-1).mean()

    def _masked_forward(
        self, inputs: Tensor, mask: Tensor, keep: Tensor, *, quantise: bool, dense: bool
    ) -> tuple[Tensor, Tensor, Quantised | None, Tensor]:
        rows, weight = self.merger.masked(inputs, mask, dense=dense)
        here = weight.detach() > 0.5
        # the row's own weight: kept rows are multiplied by one, with a gradient
        raw = self.codebook.embed(rows * torch.where(here, weight, 1.0)[..., None])
        vectors = F.normalize(raw, dim=-1)
        packed = vectors[here]
        quantised = self.codebook.quantise(packed) if quantise else None
        codes = vectors
        if quantised is not None:
            codes = vectors.masked_scatter(here[..., None], quantised.vectors)
        index = (here.long().cumsum(1) - 1).clamp(min=0)
        places = None
        if self.config.spatial_positions:
            raster = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
            places = raster if dense else self._places(keep)
        features = self.reconstructor(codes, weight, index=index, places=places)
        return features, packed, quantised, raw.detach()[here].norm(dim=-1).mean()


def cosine_distance(
    features: Float[Tensor, "images patches dim"],
    target: Float[Tensor, "images patches dim"],
    weights: Float[Tensor, "images patches"] | None = None,
) -> Float[Tensor, "images"]:
    """Mean over patches of 1 - cos (Eq. 4, first term), per image; weighted, where there are weights."""
    distance = 1 - F.cosine_similarity(features.float(), target.float(), dim=-1)
    return (distance if weights is None else distance * weights).mean(1)


def foreground_weights(
    target: Float[Tensor, "images patches dim"], foreground: float
) -> Float[Tensor, "images patches"]:
    """Weights of mean 1 in each picture: as far as patches lie from the median one, and evenly."""
    far = (target - target.median(dim=1, keepdim=True).values).norm(dim=-1)
    return 1 - foreground + foreground * far / far.mean(dim=1, keepdim=True).clamp(min=1e-6)

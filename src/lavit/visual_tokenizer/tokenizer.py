"""The dynamic visual tokenizer: selector → merger → codebook → reconstructor (paper Sec. 3.1).

`encode` turns encoder features into `VisualTokens`; `decode` turns codes into the encoder's full
feature grid. Both work on ragged batches. `forward` is the training form of stage 1: one
straight-through mask that acts on attention, on the rows and on the reconstructor, so that the
reconstruction loss reaches the selector (method: "How it learns").
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lavit.config import InputError, TokenizerConfig
from lavit.sequence import VisualTokens
from lavit.visual_tokenizer.codebook import Codebook, Quantised
from lavit.visual_tokenizer.layers import Keep, Patches, Ragged, place_code
from lavit.visual_tokenizer.merger import Merger
from lavit.visual_tokenizer.reconstructor import Reconstructor
from lavit.visual_tokenizer.selector import KeepPolicy, Selector, select, straight_through

LENGTHS = 512  # of training pictures, that some keep policies deal out


@dataclass(frozen=True)
class TokenizerOutput:
    """What a training step of stage 1 needs."""

    features: Patches
    mask: Float[Tensor, "images patches"]
    keep_probability: Float[Tensor, "images patches"]
    vectors: Float[Tensor, "kept code_dim"]  # unit vectors before the look-up
    quantised: Quantised | None
    norm: Float[Tensor, ""]  # mean length of the vectors before they were made unit ones


class VisualTokenizer(nn.Module):
    """Selector, merger, codebook and reconstructor over the features of a frozen encoder."""

    stage: ClassVar[Any] = None  # class of a rival's stage 1

    place_code: Tensor
    mean: Tensor
    deviation: Tensor
    lengths: Tensor | None  # sorted, of `measure_lengths`

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config, self.keep = config, KeepPolicy.parse(config.keep)
        if self.keep.kind in ("sample", "random"):
            said = f"keep={self.keep.kind!r} draws other patches each time"
            raise InputError(f"{said}: give a tokenizer a rule (auto, scattered, …)")
        self.selector = Selector(config.dim)
        self.merger = merger_of(config)
        self.codebook = Codebook(config.dim, config.codes, config.code_dim)
        self.reconstructor = Reconstructor(config)
        grid = round(config.patches**0.5)
        nowhere = torch.zeros(config.patches, 1)
        places = place_code(grid, config.dim) if config.position_code else nowhere
        self.register_buffer("place_code", places, persistent=False)
        if config.standardise:
            self.register_buffer("mean", torch.zeros(config.dim))
            self.register_buffer("deviation", torch.ones(config.dim))
        self.register_buffer(
            "lengths", torch.ones(LENGTHS, dtype=torch.long) if self.keep.of_lengths else None
        )

    def recompute(self, on: bool) -> None:
        """Drop activations of merger and reconstructor in training and compute them again."""
        self.merger.recompute = self.reconstructor.recompute = on

    @torch.no_grad()
    def measure(self, patches: Patches) -> None:
        """Take mean and deviation of each channel from features of training pictures."""
        if self.config.standardise:
            rows = patches.double().flatten(0, 1)
            self.mean.copy_(rows.mean(0))
            self.deviation.copy_(rows.std(0).clamp(min=1e-6))

    @torch.no_grad()
    def measure_lengths(self, patches: Patches) -> None:
        """Take what the selector keeps of training pictures, for policies that deal it out."""
        if self.lengths is not None:
            found = select(self.selector(self.prepare(patches)), KeepPolicy()).sum(1)
            places = torch.arange(len(self.lengths)) * len(found) // len(self.lengths)
            self.lengths.copy_(found.sort().values[places])

    def standard(self, patches: Patches) -> Patches:
        """Features as they are reconstructed; with `standardise` of mean 0 and deviation 1."""
        return (patches - self.mean) / self.deviation if self.config.standardise else patches

    def prepare(self, patches: Patches) -> Patches:
        """Input of selector and merger: standard features, plus a place code if configured."""
        if patches.shape[1:] != (self.config.patches, self.config.dim):
            wanted = f"{self.config.patches} patches of {self.config.dim} channels"
            given = f"{patches.shape[1]} of {patches.shape[2]}"
            raise InputError(f"the tokenizer takes {wanted}, not {given}")
        return self.standard(patches) + self.place_code

    @torch.no_grad()
    def select(
        self,
        patches: Patches,
        policy: KeepPolicy | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Keep:
        """Keep mask of each image under a policy; `auto` (default) is the configuration's."""
        given = policy or KeepPolicy()
        if given.kind == "auto":
            given = replace(given, kind=self.keep.kind, value=self.keep.value)
        how: dict[str, Any] = {"generator": generator, "lengths": self.lengths}
        return select(self.selector(self.prepare(patches)), given, patches=patches, **how)

    @torch.no_grad()
    def encode(
        self,
        patches: Patches,
        policy: KeepPolicy | None = None,
        *,
        generator: torch.Generator | None = None,
        keep: Keep | None = None,
    ) -> VisualTokens:
        """Visual tokens of encoder features; `keep` gives the mask instead of the policy.

        Each picture is encoded alone: in a batch, the lengths of the others change its last bits,
        and now and then a code.
        """
        alone = patches.split(1)
        if keep is None:
            keep = torch.cat([self.select(one, policy, generator=generator) for one in alone])
        pairs = zip(alone, keep.split(1), strict=True)
        rows = (self.merger(self.prepare(one), mask) for one, mask in pairs)
        codes = [self.codebook.index(self.codebook.project(merged)) for merged in rows]
        return VisualTokens(torch.cat(codes), keep.sum(1), keep)

    def decode(
        self,
        codes: Int[Tensor, "total"],
        lengths: Int[Tensor, "images"],
        *,
        keep: Keep | None = None,
    ) -> Patches:
        """Features of images given as codes; only spatial positions need `keep`."""
        most = self.config.patches
        # the host waits: positions behind the last one would be another picture's
        if int(lengths.max()) > most or int(lengths.min()) < 1:
            raise InputError(f"an image has 1 to {most} codes, not {lengths.tolist()}")
        return self._rebuild(self.codebook.vector(codes), lengths, keep)

    def reconstruct(self, patches: Patches, keep: Tensor, *, quantise: bool) -> Tensor:
        """Features through merger and reconstructor under a mask, with or without the look-up."""
        vectors = self.codebook.project(self.merger(self.prepare(patches), keep))
        if quantise:
            vectors = self.codebook.vector(self.codebook.index(vectors))
        return self._rebuild(vectors, keep.sum(1), keep)

    def _rebuild(self, vectors: Tensor, lengths: Tensor, keep: Tensor | None) -> Tensor:
        """Features of packed code vectors."""
        rows, places = Ragged(lengths), None if keep is None else self._places(keep)
        return self.reconstructor(rows.pad(vectors), rows.valid, places=places)

    def _places(self, keep: Tensor) -> Tensor | None:
        """Raster numbers of the kept patches, padded; None without spatial positions."""
        if not self.config.spatial_positions:
            return None
        return Ragged(keep.sum(1)).pad(keep.nonzero()[:, 1:].float())[..., 0].long()

    def flow(self, patches: Patches, keep: Keep) -> Float[Tensor, "images patches patches"]:
        """How much of each patch every kept one takes in the merger; see `Merger.flow`."""
        return self.merger.flow(self.prepare(patches), keep)

    def forward(
        self,
        patches: Patches,
        noise: Float[Tensor, "images patches 2"] | None,
        *,
        quantise: bool,
        dense: bool,
        temperature: float = 1.0,
        train_selector: bool = True,
    ) -> TokenizerOutput:
        """One training forward. `noise` is standard Gumbel, or None for the mask of use.

        dense: every row is computed, so that dropped ones carry a gradient to the selector too.
        With a frozen selector the mask has no gradient and only kept rows are computed.
        """
        inputs = self.prepare(patches)
        with torch.set_grad_enabled(torch.is_grad_enabled() and train_selector):
            log_probs = self.selector(inputs)  # frozen, it is no part of the graph: DDP would wait
            mask = self._mask(patches, log_probs, noise, temperature)
        keep = mask.detach() > 0.5
        learns = train_selector and torch.is_grad_enabled()
        if learns:
            rows, weight = self.merger.masked(inputs, mask, dense=dense)
            here = weight.detach() > 0.5
            # the row's own weight: kept rows are multiplied by one, with a gradient
            rows = rows * torch.where(here, weight, 1.0)[..., None]
        else:
            rows = self.merger(inputs, keep)
            here = rows.new_ones(len(rows), dtype=torch.bool)
        raw = self.codebook.embed(rows)  # the host waits below: kept rows alone have codes
        norm = raw.detach()[here].norm(dim=-1).mean()
        codes = F.normalize(raw, dim=-1)
        vectors = codes[here]  # the host waits
        quantised = self.codebook.quantise(vectors) if quantise else None
        if quantised is not None:
            codes = codes.masked_scatter(here[..., None], quantised.vectors)
        if learns:
            index = (here.long().cumsum(1) - 1).clamp(min=0)
            places = self._places(torch.ones_like(keep) if dense else keep)
            features = self.reconstructor(codes, weight, index=index, places=places)
        else:
            features = self._rebuild(codes, keep.sum(1), keep)
        probability = log_probs[..., 0].exp()
        return TokenizerOutput(features, mask, probability, vectors, quantised, norm)

    def _mask(
        self, patches: Tensor, log_probs: Tensor, noise: Tensor | None, temperature: float
    ) -> Tensor:
        if noise is None:
            return select(log_probs, self.keep, patches=patches, lengths=self.lengths).float()
        return straight_through(log_probs, noise, temperature=temperature)

    @torch.no_grad()
    def kept(
        self,
        patches: Patches,
        noise: Float[Tensor, "images patches 2"] | None,
        *,
        temperature: float = 1.0,
    ) -> Int[Tensor, "images"]:
        """Number of patches that `forward` with the same noise keeps of each image."""
        mask = self._mask(patches, self.selector(self.prepare(patches)), noise, temperature)
        return (mask > 0.5).sum(1)


def merger_of(config: TokenizerConfig) -> Merger:
    """A new merger: stage 1's, or the one that pictures are read with."""
    size = config.dim, config.heads, config.merger_depth, config.mlp_ratio
    return Merger(*size, gathers=config.gathers, causal=config.causal)


def cosine_distance(
    features: Patches,
    target: Patches,
    weights: Float[Tensor, "images patches"] | None = None,
) -> Float[Tensor, "images"]:
    """Mean over patches of 1 - cos (Eq. 4, first term), per image; weighted if so asked."""
    distance = 1 - F.cosine_similarity(features.float(), target.float(), dim=-1)
    return (distance if weights is None else distance * weights).mean(1)


def foreground_weights(target: Patches, foreground: float) -> Float[Tensor, "images patches"]:
    """Weights of mean 1 in each picture: as far as patches lie from the median one, and evenly."""
    far = (target - target.median(dim=1, keepdim=True).values).norm(dim=-1)
    return 1 - foreground + foreground * far / far.mean(dim=1, keepdim=True).clamp(min=1e-6)

"""The three stages of the paper as objects for one loop: what trains, on what batch, with which loss.

    TokenizerStage   Eq. 4: mean 1 - cos + λ (ρ - mean M)², phase a without the look-up, phase b with it
    LanguageStage    Eq. 6: next-token cross-entropy over text and codes, both orders
    PixelsStage      Eq. 5: ε-prediction on the reconstructed features; AutoencoderStage before it, where there is one

Batches are functions of (seed, step), and noise is one of (seed, step, place in the global batch), so that one rank and
two see the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lavit.config import InputError, PixelsTraining, TokenizerTraining
from lavit.data.features import Features, Pictures
from lavit.modules.codebook import gather_rows
from lavit.modules.perceptual import Perceptual
from lavit.modules.pixels import Pixels
from lavit.modules.selector import gumbel
from lavit.modules.tokenizer import TokenizerOutput, VisualTokenizer, cosine_distance, foreground_weights
from lavit.modules.vision import Vision
from lavit.sequence import VisualTokens
from lavit.train.health import CodeUse, check_codes, check_features, check_finite, check_selector, selector_figures
from lavit.train.loop import Shard
from lavit.train.muon import matrices_apart

WINDOW = 100  # steps over which live codes are counted


def seeded(*numbers: int) -> torch.Generator:
    """A generator whose stream depends on all the numbers."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def draw_pictures(count: int, batch: int, *, seed: int, step: int) -> Int[Tensor, "batch"]:
    """Pictures of a step: epoch after epoch in new orders, each picture once an epoch."""
    at = torch.arange(step * batch, (step + 1) * batch)
    orders = {int(e): torch.randperm(count, generator=seeded(seed, 1, int(e))) for e in (at // count).unique()}
    return torch.stack([orders[int(i) // count][int(i) % count] for i in at])


@dataclass(frozen=True)
class FeatureBatch:
    """Features of this rank's pictures, and their places in the global batch."""

    patches: Float[Tensor, "images patches dim"]
    places: Int[Tensor, "images"]


class TokenizerStage:
    """Stage 1 in its two phases."""

    name = "tokenizer"

    def __init__(
        self,
        tokenizer: VisualTokenizer,
        features: Features,
        config: TokenizerTraining,
        *,
        seed: int,
    ) -> None:
        self.module, self.features, self.config, self.seed = tokenizer, features, config, seed
        self.steps, self.accumulate = config.steps, config.accumulate
        some = draw_pictures(len(features), min(len(features), 512), seed=seed, step=0)
        patches = features.rows(some)
        tokenizer.measure(patches)
        tokenizer.reconstructor.start_from(tokenizer.standard(patches).mean((0, 1)))
        self.use = CodeUse(tokenizer.codebook.size, WINDOW)
        # of the last step: vectors and codes of its parts, its loss, patches kept of each of its pictures on all ranks
        self.step, self.vectors, self.codes = -1, [], []
        self.loss, self.kept = torch.zeros(()), torch.zeros(0, dtype=torch.long)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The selector apart, for its own rate."""
        config = self.config
        selector = list(self.module.selector.parameters())
        rest = [p for name, p in self.module.named_parameters() if not name.startswith("selector.")]
        common = {"weight_decay": config.weight_decay}
        found = [
            {"params": rest, "lr": config.learning_rate, **common},
            {"params": selector, "lr": config.learning_rate * config.selector_rate, **common},
        ]
        return found if config.optimizer == "adamw" else matrices_apart(found, self.module, but=selector)

    def batch(self, step: int, shard: Shard) -> FeatureBatch:
        """Pictures of a step."""
        batch = self.config.batch
        if batch % shard.ranks:
            raise InputError(
                f"a batch of {batch} pictures cannot be shared by {shard.ranks} ranks (or parts of a step): give a multiple"
            )
        pictures = draw_pictures(len(self.features), batch, seed=self.seed, step=step)
        mine = shard.of(torch.arange(batch))
        return FeatureBatch(self.features.rows(pictures[mine]), mine)

    def temperature(self, step: int) -> float:
        """Geometric from `temperature` to `final_temperature` over phase a."""
        done = min(1.0, step / max(1, self.config.steps_a))
        first, final = self.config.temperature, self.config.final_temperature
        return first * (final / first) ** done

    def losses(self, module: nn.Module, batch: FeatureBatch, step: int, accelerator: Accelerator) -> dict[str, Tensor]:
        """Eq. 4 plus commitment; figures of selector health."""
        config, device = self.config, accelerator.device
        quantise = step >= config.steps_a
        if step == config.steps_a and config.k_means:
            self._start_codes(accelerator)
        train_selector = not quantise or config.train_selector
        patches = batch.patches.to(device)
        check_features(patches, step)
        noise = self._noise(batch, step, accelerator) if train_selector else None
        out: TokenizerOutput = module(
            patches,
            noise,
            quantise=quantise,
            dense=config.selector_gradient == "dense",
            temperature=self.temperature(step),
            train_selector=train_selector,
        )
        if step != self.step:
            self.step, self.vectors, self.codes, self.loss = step, [], [], torch.zeros((), device=device)
            mine = (out.mask.detach() > 0.5).sum(1) if self.accumulate == 1 else self._kept(step, accelerator)
            self.kept = gather_rows(mine[:, None].float())[:, 0].long()
        self.vectors.append(out.vectors.detach())
        target = self.module.standard(patches)
        reconstruction = cosine_distance(out.features, target).mean()
        loss = reconstruction
        if config.foreground:
            weights = foreground_weights(target, config.foreground)
            loss = cosine_distance(out.features, target, weights).mean()
        if train_selector:
            loss = loss + config.rate_weight * self._rate_loss(out.mask)
            undecided = (out.keep_probability * (1 - out.keep_probability)).mean()
            late = max(0.0, min(1.0, 2 * step / max(1, config.steps_a) - 1))
            loss = loss + config.decided_weight * late * undecided
        # the part's share of all tokens of the step, times the number of parts and ranks over which losses are meant
        share = len(out.vectors) * accelerator.num_processes * self.accumulate / int(self.kept.sum())
        figures = {"reconstruction": reconstruction, "vector_norm": out.norm * share}
        if out.quantised is not None:
            self.codes.append(out.quantised.codes)
            figures["commitment"] = out.quantised.commitment * share
            loss = loss + config.commitment * figures["commitment"]
        loss = loss / self.accumulate
        self.loss = self.loss + loss.detach()
        return {"loss": loss, **figures, **selector_figures(out.keep_probability.detach(), self.kept)}

    def _noise(self, batch: FeatureBatch, step: int, accelerator: Accelerator) -> Float[Tensor, "images patches 2"]:
        shape = (batch.patches.shape[1], 2)
        noise = [gumbel(shape, seeded(self.seed, 3, step, int(place))) for place in batch.places]
        return torch.stack(noise).to(accelerator.device)

    def _kept(self, step: int, accelerator: Accelerator) -> Int[Tensor, "images"]:
        """Patches kept of this rank's pictures of all parts of a step, before the parts go through the model one by one."""
        shard = Shard(accelerator.process_index, accelerator.num_processes)
        kept = []
        for number in range(self.accumulate):
            batch = self.batch(step, shard.part(number, self.accumulate))
            train_selector = step < self.config.steps_a or self.config.train_selector
            noise = self._noise(batch, step, accelerator) if train_selector else None
            patches = batch.patches.to(accelerator.device)
            kept.append(self.module.kept(patches, noise, temperature=self.temperature(step)))
        return torch.cat(kept)

    def _rate_loss(self, mask: Tensor) -> Tensor:
        """(ρ - mean M)², the mean per picture or over the pictures of the step, on all ranks and in all parts."""
        rates = mask.mean(1)
        if self.config.rate_over == "image":
            return (self.config.rate - rates).square().mean()
        mean, everywhere = rates.mean(), self.kept.float().mean() / mask.shape[1]
        return (self.config.rate - (mean + (everywhere - mean).detach())).square()

    @torch.no_grad()
    def _start_codes(self, accelerator: Accelerator) -> None:
        """k-means on vectors of pictures drawn from the training set, the same ones in the same order on any ranks."""
        tokenizer, wanted = self.module, self.config.k_means_vectors
        shard = Shard(accelerator.process_index, accelerator.num_processes)
        rows: list[Tensor] = []
        for number in range(wanted):
            batch = self.batch(self.steps + number, shard).patches.to(accelerator.device)
            keep = tokenizer.select(batch)
            rows.append(gather_rows(tokenizer.codebook.project(tokenizer.merger(tokenizer.prepare(batch), keep))))
            if sum(map(len, rows)) >= wanted:
                break
        vectors = shard.of(torch.cat(rows))  # k-means gathers them again
        tokenizer.codebook.k_means(vectors, rounds=self.config.k_means, generator=seeded(self.seed, 4))

    def after_step(self, step: int) -> dict[str, float]:
        """Move the codes; count their use; raise `Alarm` if loss, selector or codebook is failing."""
        config, patches = self.config, self.module.config.patches
        check_finite(self.loss, self.module.parameters(), step)
        check_selector(float(self.kept.float().mean()) / patches, step, patches=patches)
        if not self.codes:
            return {}
        codes = torch.cat(self.codes)
        revived = self.module.codebook.update(
            torch.cat(self.vectors),
            codes,
            decay=config.decay,
            patience=config.patience,
            generator=seeded(self.seed, 5, step),
        )
        self.use.add(gather_rows(codes[:, None].float())[:, 0].long(), revived=revived)
        figures = self.use.figures()
        window = {"window": WINDOW, "reachable": self.use.reachable}
        check_codes(figures["live_codes"], step, steps_with_codes=step - config.steps_a, **window)
        return figures

    def state(self) -> dict[str, Tensor]:
        """The window of code use."""
        return self.use.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take the window back."""
        self.use.load_state(state)


@dataclass(frozen=True)
class PictureBatch:
    """Pictures of this rank, and their places in the global batch, which seed their noise."""

    pictures: Int[Tensor, "images"]
    places: Int[Tensor, "images"]


def _share(pictures: Int[Tensor, "batch"], shard: Shard) -> PictureBatch:
    if len(pictures) % shard.ranks:
        raise InputError(
            f"a batch of {len(pictures)} pictures cannot be shared by {shard.ranks} ranks: give a multiple"
        )
    return PictureBatch(shard.of(pictures), shard.of(torch.arange(len(pictures))))


class PixelsStage:
    """Stage 3: the denoiser, on features reconstructed from the codes of each picture."""

    name = "pixels"

    def __init__(
        self,
        pixels: Pixels,
        tokenizer: VisualTokenizer,
        pictures: Pictures,
        tokens: VisualTokens,
        config: PixelsTraining,
        *,
        seed: int,
        vision: Vision | None = None,
    ) -> None:
        """`pictures` and `tokens` are in one order; `vision` is needed where the loss has a perceptual part."""
        self.perceptual = Perceptual(vision) if vision is not None and config.perceptual_weight else None
        self.module, self.config, self.seed = pixels, config, seed
        self.steps = config.steps
        self.tokenizer, self.codes = tokenizer.eval(), tokens.split()
        if pixels.vae is not None:
            pixels.vae.requires_grad_(False)
        self.pictures = pictures
        self.averaged = AveragedModel(pixels, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=False)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One group, or kernels and matrices apart."""
        params = [p for p in self.module.parameters() if p.requires_grad]
        rates = {"lr": self.config.learning_rate, "weight_decay": self.config.weight_decay}
        found = [{"params": params, **rates}]
        return found if self.config.optimizer == "adamw" else matrices_apart(found, self.module)

    def batch(self, step: int, shard: Shard) -> PictureBatch:
        """Pictures of a step."""
        return _share(draw_pictures(len(self.pictures), self.config.batch, seed=self.seed, step=step), shard)

    def losses(self, module: nn.Module, batch: PictureBatch, step: int, accelerator: Accelerator) -> dict[str, Tensor]:
        """Mean squared error of the predicted noise."""
        device = accelerator.device
        drawn = zip(batch.places, batch.pictures, strict=True)
        codes = [self._erring(place, picture, step).to(device) for place, picture in drawn]
        with torch.no_grad():
            lengths = torch.tensor([len(c) for c in codes], device=device)
            features = self.tokenizer.decode(torch.cat(codes), lengths)
            latents = self.module.encode(self.pictures.rows(batch.pictures).to(device))
        generators = [seeded(self.seed, 6, step, int(place)) for place in batch.places]
        loss = module(
            latents,
            features,
            generator=generators,
            perceptual=self.perceptual,
            perceptual_weight=self.config.perceptual_weight,
        )
        return {"loss": loss}

    def _erring(self, place: Tensor, picture: Tensor, step: int) -> Int[Tensor, "kept"]:
        """Codes of a picture, a random share of them from another one, as a LM errs."""
        codes = self.codes[int(picture)]
        if not self.config.code_noise:
            return codes
        generator = seeded(self.seed, 11, step, int(place))
        other = self.codes[int(torch.randint(len(self.codes), (), generator=generator))]
        drawn = other[torch.randint(len(other), codes.shape, generator=generator)]
        share = self.config.code_noise * torch.rand((), generator=generator)
        return torch.where(torch.rand(codes.shape, generator=generator) < share, drawn, codes)

    def after_step(self, step: int) -> dict[str, float]:
        """Move the averaged weights."""
        self.averaged.update_parameters(self.module)
        return {}

    def state(self) -> dict[str, Tensor]:
        """The averaged weights."""
        return dict(self.averaged.state_dict())

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take the averaged weights back."""
        self.averaged.load_state_dict(state)


class AutoencoderLoss(nn.Module):
    """The autoencoder's loss as a module, so that DDP sees its forward and adds up its gradients."""

    def __init__(self, pixels: Pixels) -> None:
        super().__init__()
        self.vae, self._loss = pixels.vae, pixels.autoencoder_loss

    def forward(self, pictures: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Pictures [images 3 size size] in -1..1 to a scalar."""
        return self._loss(pictures, generator=generators)


class AutoencoderStage:
    """The small autoencoder whose latents stage 3 denoises."""

    name = "autoencoder"

    def __init__(
        self,
        pixels: Pixels,
        pictures: Pictures,
        config: PixelsTraining,
        *,
        seed: int,
    ) -> None:
        self.module, self.pictures, self.config, self.seed = AutoencoderLoss(pixels), pictures, config, seed
        self.steps = config.autoencoder_steps

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One group."""
        return [
            {
                "params": list(self.module.parameters()),
                "lr": self.config.autoencoder_rate,
                "weight_decay": 0.0,
            }
        ]

    def batch(self, step: int, shard: Shard) -> PictureBatch:
        """Pictures of a step."""
        return _share(draw_pictures(len(self.pictures), self.config.batch, seed=self.seed, step=step), shard)

    def losses(self, module: nn.Module, batch: PictureBatch, step: int, accelerator: Accelerator) -> dict[str, Tensor]:
        """Reconstruction plus a little KL."""
        generators = [seeded(self.seed, 7, step, int(place)) for place in batch.places]
        return {"loss": module(self.pictures.rows(batch.pictures).to(accelerator.device), generators)}

    def after_step(self, step: int) -> dict[str, float]:
        """Nothing follows."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Nothing beyond the module."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Nothing beyond the module."""

"""Stage 1: mean 1 - cos + λ (ρ - mean M)² (paper Eq. 4), phase a without the look-up, b with it.

Noise is a function of (seed, step, place in the global batch): one rank and two see the same.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lavit.config import InputError, TokenizerTraining
from lavit.train import health
from lavit.train.batches import Randomness, Shard, seeded, to_device
from lavit.train.feeds import FeatureBatch, FeatureFeed
from lavit.train.loop import Metric, Stage
from lavit.train.muon import matrices_apart
from lavit.visual_tokenizer.codebook import gather_rows
from lavit.visual_tokenizer.selector import gumbel
from lavit.visual_tokenizer.tokenizer import VisualTokenizer, cosine_distance, foreground_weights

WINDOW = 100  # steps over which live codes are counted
SOME = 512  # pictures whose features are measured before the first step


class TokenizerStage(Stage):
    """Stage 1 in its two phases."""

    name = "tokenizer"
    module: VisualTokenizer
    config: TokenizerTraining

    def __init__(
        self,
        tokenizer: VisualTokenizer,
        feed: FeatureFeed,
        config: TokenizerTraining,
        *,
        seed: int,
    ) -> None:
        self.module, self.feed, self.config, self.seed = tokenizer, feed, config, seed
        self.steps, self.accumulate = config.steps, config.accumulate
        self.prepared = config.steps_a if config.k_means else -1
        tokenizer.recompute(config.recompute)
        patches = feed.some(SOME)
        tokenizer.measure(patches)
        if config.given_selector:
            tokenizer.measure_lengths(patches)
        elif tokenizer.keep.of_lengths:
            said = f"keep={tokenizer.keep.kind!r} deals out what another run's selector keeps"
            raise InputError(f"{said}: set given_selector")
        tokenizer.reconstructor.start_from(tokenizer.standard(patches).mean((0, 1)))
        self.use = health.CodeUse(tokenizer.codebook.size, WINDOW)
        # of the last step: vectors and codes of its parts, its loss, patches kept of its pictures
        self.step = -1
        self.vectors: list[Tensor] = []
        self.codes: list[Tensor] = []
        self.loss, self.kept = torch.zeros(()), torch.zeros(0, dtype=torch.long)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The selector apart, for its own rate."""
        config = self.config
        selector = list(self.module.selector.parameters())
        named = self.module.named_parameters()
        rest = [p for name, p in named if not name.startswith("selector.")]
        selector_rate, decay = config.learning_rate * config.selector_rate, config.weight_decay
        groups = [
            {"params": rest, "lr": config.learning_rate, "weight_decay": decay},
            {"params": selector, "lr": selector_rate, "weight_decay": decay},
        ]
        groups = [group for group in groups if group["params"]]
        if config.optimizer == "adamw":
            return groups
        return matrices_apart(groups, self.module, but=selector)

    def batch(self, step: int, shard: Shard) -> FeatureBatch:
        """Pictures of a step."""
        return self.feed.batch(step, shard)

    def trains_selector(self, step: int) -> bool:
        """Whether the selector learns in a step: in phase a, in phase b only if so configured.

        One that is given never does, nor one without weights or that the keep policy does not ask.
        """
        has = any(True for _ in self.module.selector.parameters())
        learns = has and self.module.keep.learnt and not self.config.given_selector
        return learns and (step < self.config.steps_a or self.config.train_selector)

    def temperature(self, step: int) -> float:
        """Geometric from `temperature` to `final_temperature` over phase a."""
        done = min(1.0, step / max(1, self.config.steps_a))
        first, final = self.config.temperature, self.config.final_temperature
        return first * (final / first) ** done

    def losses(self, module: nn.Module, batch: FeatureBatch, step: int) -> dict[str, Metric]:
        """Eq. 4 plus commitment; figures of selector health."""
        config = self.config
        patches, noise = self._inputs(batch, step)
        health.check_features(patches, step)
        out = module(
            patches,
            noise,
            quantise=step >= config.steps_a,
            dense=config.selector_gradient == "dense",
            temperature=self.temperature(step),
            train_selector=noise is not None,
        )
        if step != self.step:
            self._begin(step, out.mask)
        self.vectors.append(out.vectors.detach())
        target = self.module.standard(patches)
        loss = reconstruction = cosine_distance(out.features, target).mean()
        if config.foreground:
            weights = foreground_weights(target, config.foreground)
            loss = cosine_distance(out.features, target, weights).mean()
        if noise is not None:
            loss = loss + config.rate_weight * self._rate_loss(out.mask)
            undecided = (out.keep_probability * (1 - out.keep_probability)).mean()
            surer = min(1.0, step / max(1, config.steps_a))
            loss = loss + config.decided_weight * surer * undecided
        # the part's share of the step's tokens, times the parts that losses are meant over
        parts = self.accelerator.num_processes * self.accumulate
        share = len(out.vectors) * parts / int(self.kept.sum())  # the host waits: one number
        figures = {"reconstruction": reconstruction, "vector_norm": out.norm * share}
        if out.quantised is not None:
            self.codes.append(out.quantised.codes)
            figures["commitment"] = out.quantised.commitment * share
            loss = loss + config.commitment * figures["commitment"]
        loss = loss / self.accumulate
        self.loss = self.loss + loss.detach()
        selector = health.selector_figures(out.keep_probability.detach(), self.kept)
        return {"loss": loss, **figures, **selector}

    def _inputs(
        self, batch: FeatureBatch, step: int
    ) -> tuple[Float[Tensor, "images patches dim"], Float[Tensor, "images patches 2"] | None]:
        """Features of pictures, and the selector's noise while it trains."""
        patches = to_device(batch.patches, self.accelerator.device).float()
        if not self.trains_selector(step):
            return patches, None
        places, kind = batch.places.tolist(), Randomness.SELECTOR
        generators = [seeded(self.seed, kind, step, place) for place in places]
        noise = torch.stack([gumbel((patches.shape[1], 2), generator) for generator in generators])
        return patches, to_device(noise, self.accelerator.device)

    def _begin(self, step: int, mask: Tensor) -> None:
        """Count the patches kept of all pictures of a step, whose first part has this mask."""
        self.step, self.vectors, self.codes = step, [], []
        self.loss = torch.zeros((), device=self.accelerator.device)
        kept = (mask.detach() > 0.5).sum(1)
        if self.accumulate > 1:  # the parts go through the model one by one, and each needs the sum
            parts = (self.shard.part(number, self.accumulate) for number in range(self.accumulate))
            inputs = (self._inputs(self.batch(step, part), step) for part in parts)
            temperature = self.temperature(step)
            kept = torch.cat([self.module.kept(*one, temperature=temperature) for one in inputs])
        self.kept = gather_rows(kept[:, None].float())[:, 0].long()

    def _rate_loss(self, mask: Tensor) -> Tensor:
        """(ρ - mean M)², the mean per picture or over all pictures of the step."""
        rates = mask.mean(1)
        if self.config.rate_over == "image":
            return (self.config.rate - rates).square().mean()
        mean, everywhere = rates.mean(), self.kept.float().mean() / mask.shape[1]
        return (self.config.rate - (mean + (everywhere - mean).detach())).square()

    @torch.no_grad()
    def prepare(self) -> None:
        """Start the codes: k-means on vectors of training pictures, the same ones on any ranks."""
        tokenizer, wanted = self.module, self.config.k_means_vectors
        rows: list[Tensor] = []
        for number in range(wanted):
            for part in range(self.accumulate):
                shard = self.shard.part(part, self.accumulate)
                patches = self.feed.batch(self.steps + number, shard).patches
                patches = to_device(patches, self.accelerator.device).float()
                merged = tokenizer.merger(tokenizer.prepare(patches), tokenizer.select(patches))
                rows.append(gather_rows(tokenizer.codebook.project(merged)))
            if sum(map(len, rows)) >= wanted:
                break
        vectors = self.shard.of(torch.cat(rows))  # k-means gathers them again
        generator = seeded(self.seed, Randomness.K_MEANS)
        tokenizer.codebook.k_means(vectors, rounds=self.config.k_means, generator=generator)

    def after_step(self, step: int) -> dict[str, float]:
        """Move the codes and count their use; `Alarm` if loss, selector or codebook is failing."""
        config, patches = self.config, self.module.config.patches
        # the host waits: an alarm must come before the step is saved
        health.check_finite(self.loss, self.module.parameters(), step)
        if self.trains_selector(step):
            health.check_selector(float(self.kept.float().mean()) / patches, step, patches=patches)
        if not self.codes:
            return {}
        codes = torch.cat(self.codes)
        revived = self.module.codebook.update(
            torch.cat(self.vectors),
            codes,
            decay=config.decay,
            patience=config.patience,
            generator=seeded(self.seed, Randomness.REVIVAL, step),
        )
        self.use.add(gather_rows(codes[:, None].float())[:, 0].long(), revived=revived)
        figures = self.use.figures()
        health.check_codes(
            figures["live_codes"],
            step,
            steps_with_codes=step - config.steps_a,
            window=WINDOW,
            reachable=self.use.reachable,
        )
        return figures

    def state(self) -> dict[str, Tensor]:
        """The window of code use, and the place of the feed."""
        return {**self.use.state(), **self.feed.state()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take both back."""
        own = self.use.state()
        self.use.load_state({name: state[name] for name in own})
        self.feed.load_state({name: state[name] for name in state.keys() - own})

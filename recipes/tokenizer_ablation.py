"""What each piece of the tokenizer's training is worth: one thing changed at a time, on held-out pictures.

Command   python recipes/tokenizer_ablation.py DATA RUN [--steps 300] [--seeds 0 1 2] [--variants all]
          (RUN: a run of nano on DATA; its cached encoder features are used, nothing in it is changed)
Data      lavit data starter --out DATA --families 400 --tones dark
Cost      about 3 minutes a row and seed at 300 steps on two idle CPU cores
Score     LOG.md has the table

A variant that an alarm of the training stops is a row with the alarm's words. A finished row is kept in
RUN/ablation.jsonl and not computed again, so an interrupted table goes on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

from lavit.config import TokenizerTraining
from lavit.data.corpus import load_corpus
from lavit.data.features import Features, compute_features
from lavit.evaluate.tokenizer import code_use, encode_all, lengths, reconstruction
from lavit.modules.tokenizer import VisualTokenizer
from lavit.modules.vision import load_vision
from lavit.presets import nano
from lavit.train.health import Alarm
from lavit.train.loop import train
from lavit.train.stages import TokenizerStage

VARIANTS: dict[str, dict[str, Any]] = {
    "as nano": {},
    "quantised from the start": {"steps_a": 0, "train_selector": True},
    "no k-means": {"k_means": 0},
    "no revival": {"patience": 0},
    "commitment 1": {"commitment": 1.0},
    "rate per image": {"rate_over": "image"},
    "selector trained in phase b": {"train_selector": True},
    "undecided selector": {"decided_weight": 0.0},
    "dense gradient": {"selector_gradient": "dense"},
    "selector untrained": {"rate_weight": 0.0, "decided_weight": 0.0, "selector_rate": 0.0},
}
FIGURES = ("1 - cos", "unquantised", "live", "kept", "spread", "correlation")


@dataclass(frozen=True)
class Measured:
    """Features of the training pictures, and held-out features and pictures."""

    features: Features
    held_out: torch.Tensor
    images: list[Any]


def settings(steps: int, changes: dict[str, Any]) -> TokenizerTraining:
    """Nano's training of stage 1 in `steps` steps, half of them without the look-up, with changes."""
    config = replace(nano().training.tokenizer, steps_a=steps // 2, steps_b=steps - steps // 2)
    if changes.get("steps_a") == 0:
        config = replace(config, steps_b=steps)
    return replace(config, **changes)


def measure(data: Measured, config: TokenizerTraining, seed: int, folder: Path) -> dict[str, float]:
    """Train one tokenizer and measure it."""
    torch.manual_seed(seed)
    tokenizer = VisualTokenizer(nano().model.tokenizer)
    stage = TokenizerStage(tokenizer, data.features, config, seed=seed)
    train(stage, folder, accelerator=Accelerator(), clip=1.0, warmup=config.warmup, checkpoint_every=config.steps)
    tokenizer.eval()
    plain = data.features.rows(torch.arange(len(data.features)))
    tokens = encode_all(tokenizer, data.held_out)
    coded = reconstruction(tokenizer, data.held_out, plain.mean(0), where="held out")
    live = code_use(encode_all(tokenizer, plain), tokenizer.config.codes, where="train")[0]
    kept, spread, follows = lengths(tokens, data.images, where="held out")
    values = (coded.value, coded.ceiling[1], live.value, kept.value, spread.value, follows.value)
    return dict(zip(FIGURES, values, strict=True))


def prepare(data: str, run: Path) -> Measured:
    """Cached features of the training split; features of the held-out one."""
    preset = nano()
    vision = load_vision(preset.model.vision, run / "vision")
    records = [picture.record for picture in load_corpus(data).pictures]
    cache = run / "cache"
    features = compute_features(records, vision, cache, views=preset.training.views)
    held = [picture.record for picture in load_corpus(data, ("other_hand",)).pictures]
    held_out = compute_features(held, vision, cache)
    return Measured(features, held_out.rows(torch.arange(len(held))), [record.open() for record in held])


def main(
    data: str,
    run: Path,
    /,
    steps: int = 300,
    seeds: tuple[int, ...] = (0,),
    variants: tuple[str, ...] = tuple(VARIANTS),
) -> None:
    """Train every variant with every seed and print the table."""
    measured = prepare(data, run)
    path = run / "ablation.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    table = Table("variant", "seed", *FIGURES, title=f"{steps} steps of 16 pictures, {len(measured.images)} held out")
    for name in variants:
        for seed in seeds:
            mine = {"variant": name, "seed": seed, "steps": steps}
            found = next((row for row in rows if mine.items() <= row.items()), None)
            if found is None:
                folder = run / "ablation" / f"{name.replace(' ', '-')}-{steps}-{seed}"
                try:
                    found = mine | measure(measured, settings(steps, VARIANTS[name]), seed, folder)
                except Alarm as alarm:
                    found = mine | {"alarm": str(alarm)}
                with path.open("a") as file:
                    file.write(json.dumps(found) + "\n")
            figures = [found["alarm"]] if "alarm" in found else [f"{found[figure]:.3f}" for figure in FIGURES]
            table.add_row(name, str(seed), *figures)
    Console().print(table)


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.PositionalRequiredArgs,))

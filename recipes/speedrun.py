"""Speedrun: how soon does nano read, with the patches that it chose, with random ones, with all?

Command   make speedrun                       (three seeds; each arm with the best of three rates)
          python recipes/speedrun.py OUT [--steps 6000] [--seeds 3] [--rates 1e-3 2e-3 4e-3]
Data      scenes, made on the spot, the same for every arm
Cost      about an hour of two idle cores for each arm and seed, three times that for the rates
Score     LOG.md has the table

The paper claims that a language model learns in 40 % less time on its dynamic tokens than on all
patches (Sec. 4.4). Arms differ in one thing, which patches the visual tokenizer keeps:

    learned   what the selector keeps
    random    as many as that selector keeps of each picture, anywhere
    all       every patch

Each arm has a visual tokenizer of its own, with nano's settings of stage 1, and a language model
with nano's documents, templates and losses. Arms of a seed take turns, so that they meet the same
machine. The clock starts at the first rendered picture; evaluation is not counted. A learning rate
is chosen on the first seed, by what is read of `valid_pairs` at a quarter of the steps. An arm
stops where it reads TARGET of `valid_pairs`, and says what it reads of `pairs` then.
A stopped race goes on with the same command.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from accelerate import Accelerator
from PIL.Image import Image
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedTokenizerBase

from lavit.config import write_json
from lavit.data.corpus import Corpus, load_corpus
from lavit.data.documents import Documents
from lavit.data.features import Features, compute_features, tokenize_features
from lavit.data.scenes.dataset import write_pool
from lavit.data.scenes.render import render
from lavit.data.scenes.sample import scene_at
from lavit.data.scenes.world import Facts, facts
from lavit.evaluate.reading import exact
from lavit.files import load_tensors, replacing, save_tensors
from lavit.generate.pipeline import Pipeline
from lavit.model import LaVIT
from lavit.presets import Preset, nano
from lavit.storage import build_language, load_base
from lavit.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from lavit.train.feeds import CorpusFeatures
from lavit.train.language import LanguageStage, train_text_tokenizer
from lavit.train.loop import Stage, schedule, step_once
from lavit.train.muon import Muon
from lavit.train.tokenizer import TokenizerStage
from lavit.vision.encoder import Vision, load_vision
from lavit.visual_tokenizer.tokenizer import VisualTokenizer

TARGET = 0.9  # of captions that state all facts
KEEP = {"learned": "auto", "random": "scattered", "all": "all"}  # of arms
ARMS = tuple(KEEP)


@dataclass
class World:
    """What all arms share, and the seconds that it took."""

    folder: Path
    preset: Preset
    corpus: Corpus
    vision: Vision
    features: Features
    text: PreTrainedTokenizerBase
    seconds: float


@dataclass
class Training:
    """A stage on its way, of `steps`."""

    stage: Stage
    steps: int
    betas: tuple[float, float]
    at: int = 0  # steps done

    def __post_init__(self) -> None:
        self.stage.accelerator = Accelerator()
        optimizer = Muon(self.stage.parameter_groups(), betas=self.betas, eps=1e-6, fused=True)
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.module, self.optimizer = self.stage.accelerator.prepare(self.stage.module, optimizer)

    def go_to(self, step: int) -> None:
        """Train until so many steps are done."""
        while self.at < step:
            if self.at == self.stage.prepared:
                self.stage.prepare()
            share = schedule(self.at, self.steps, self.stage.config.warmup)
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * share
            step_once(self.stage, self.module, self.optimizer, self.at, clip=1.0)
            self.at += 1


@dataclass
class Racer:
    """One language model on its way, in a folder where it goes on after a stop."""

    folder: Path
    arm: str
    rate: float
    seed: int
    tokenizer: VisualTokenizer
    training: Training
    before: float  # seconds until its first step
    seconds: float = 0.0  # in its steps
    curve: list[tuple[int, float, float]] = field(default_factory=list)  # step, seconds, reading

    def __post_init__(self) -> None:
        if (path := latest_checkpoint(self.folder / "checkpoints")) is not None:
            t = self.training
            how = {"accelerator": t.stage.accelerator}
            t.at = load_checkpoint(path, t.module, t.optimizer, t.stage, **how)
            kept = json.loads((self.folder / "clock.json").read_text())
            self.before = kept["before"]
            self.curve = [tuple(point) for point in kept["curve"] if point[0] <= t.at]
            self.seconds = self.curve[-1][1]

    @property
    def done(self) -> bool:
        """Whether it reads what it should."""
        return bool(self.curve) and self.curve[-1][2] >= TARGET

    def save(self) -> None:
        """Write where it is: its clock, then its weights."""
        t = self.training
        checkpoints = self.folder / "checkpoints"
        checkpoints.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "clock.json", {"before": self.before, "curve": self.curve})
        how = {"accelerator": t.stage.accelerator, "keep": 1}
        save_checkpoint(checkpoints, t.at, t.module, t.optimizer, t.stage, **how)


def prepared(folder: Path, pictures: int) -> World:
    """Scenes and their features."""
    started = time.perf_counter()
    preset, data = nano(), folder / "data"
    write_pool(data, pictures=pictures, processes=2)
    corpus = load_corpus(data)
    vision = load_vision(preset.model.vision)
    records = [picture.record for picture in corpus.pictures]
    features = compute_features(records, vision, folder / "cache")
    text = train_text_tokenizer(corpus, preset.training.text_vocabulary)
    kept = folder / "seconds.json"  # what is there already took its time when it was made
    if not kept.exists():
        kept.write_text(json.dumps(time.perf_counter() - started))
    return World(folder, preset, corpus, vision, features, text, json.loads(kept.read_text()))


def tokenizer_of(
    arm: str,
    world: World,
    seed: int,
    learned: VisualTokenizer | None,
) -> tuple[VisualTokenizer, float]:
    """An arm's visual tokenizer after stage 1, and the seconds that took; made once."""
    torch.manual_seed(seed)
    started = time.perf_counter()
    tokenizer = VisualTokenizer(replace(world.preset.model.visual_tokenizer, keep=KEEP[arm]))
    made = world.folder / "tokenizers" / f"{arm}-{seed}"
    if not made.exists():
        config = replace(world.preset.training.tokenizer, given_selector=learned is not None)
        if learned is not None:
            tokenizer.selector.load_state_dict(learned.selector.state_dict())
        feed = CorpusFeatures(world.features, batch=config.batch, seed=seed)
        stage = TokenizerStage(tokenizer, feed, config, seed=seed)
        Training(stage, config.steps, betas=(0.9, 0.99)).go_to(config.steps)
        with replacing(made) as new:
            save_tensors(tokenizer.state_dict(), new / "model.safetensors")
            (new / "seconds.json").write_text(json.dumps(time.perf_counter() - started))
    tokenizer.load_state_dict(load_tensors(made / "model.safetensors"))
    return tokenizer.eval(), json.loads((made / "seconds.json").read_text())


def racer(
    arm: str,
    rate: float,
    world: World,
    seed: int,
    steps: int,
    tokenizer: VisualTokenizer,
    before: float,
    *,
    tried: bool = False,
) -> Racer:
    """A language model behind a visual tokenizer: a new one, or where it stopped."""
    torch.manual_seed(seed)
    started = time.perf_counter()
    tokens = tokenize_features(tokenizer, world.features)
    rates = {"learning_rate": rate, "rows_rate": rate, "reader_rate": rate}
    config = replace(world.preset.training.language, steps=steps, **rates)
    sizes = {"vocab_size": len(world.text), "eos_token_id": world.text.eos_token_id}
    base = world.preset.model.language
    base = replace(base, architecture=base.architecture | sizes | {"bos_token_id": None})
    model = replace(world.preset.model, language=base)
    language = build_language(load_base(base, None)[0], tokenizer.merger, model, world.text)
    language.begin_codes(tokenizer.codebook.vectors)
    codes = tuple(tuple(part.tolist()) for part in tokens.split())
    vocabulary = language.vocabulary
    made: dict[str, Any] = {"config": config, "text": world.text, "seed": seed}
    documents = Documents(world.corpus, codes, vocabulary=vocabulary, **made)
    stage = LanguageStage(language, tokenizer, documents, world.features, tokens, config)
    before += time.perf_counter() - started
    training = Training(stage, steps, betas=(0.9, 0.95))
    folder = world.folder / "racers" / f"{arm}-{rate:g}-{seed}{'-tried' * tried}"
    return Racer(folder, arm, rate, seed, tokenizer, training, before)


def reads(racer: Racer, world: World, pictures: list[Image], said: list[Facts]) -> float:
    """Share of free captions that state all facts of their picture and nothing else."""
    parts: dict[str, nn.Module] = {"vision": world.vision, "visual_tokenizer": racer.tokenizer}
    language = racer.training.stage.module
    model = LaVIT(world.preset.model, language=language.eval(), text_tokenizer=world.text, **parts)
    right = exact(Pipeline(model).caption(pictures), said)
    language.train()
    return sum(right) / len(right)


def race(
    racers: list[Racer],
    world: World,
    *,
    until: int,
    every: int,
    count: int,
) -> None:
    """Let racers take turns of `every` steps until each reads enough or has made `until` steps."""
    scenes = [scene_at("valid_pairs", item) for item in range(count)]
    pictures = [render(scene, world.preset.model.vision.image_size) for scene in scenes]
    said = [facts(scene) for scene in scenes]
    for done in range(every, until + 1, every):
        for one in racers:
            if one.done or one.training.at >= done:
                continue
            started = time.perf_counter()
            one.training.go_to(done)
            one.seconds += time.perf_counter() - started
            one.curve.append((done, one.seconds, reads(one, world, pictures, said)))
            one.save()
            share, clock = one.curve[-1][2], f"{one.seconds:.0f} s"
            print(f"seed {one.seed} {one.arm} {one.rate:g}: step {done}, {clock}: {share:.1%}")


def result(one: Racer, world: World, count: int) -> dict[str, Any]:
    """A finished racer in numbers."""
    scenes = [scene_at("pairs", item) for item in range(count)]
    pictures = [render(scene, world.preset.model.vision.image_size) for scene in scenes]
    found = {"arm": one.arm, "rate": one.rate, "seed": one.seed, "curve": one.curve}
    found["language_seconds"] = one.seconds if one.done else None
    found["whole_seconds"] = one.seconds + one.before + world.seconds if one.done else None
    found["pairs"] = reads(one, world, pictures, [facts(scene) for scene in scenes])
    return found


def main(
    out: Path,
    /,
    pictures: int = 30_000,
    steps: int = 6000,
    every: int = 250,
    count: int = 200,
    seeds: int = 3,
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3),
) -> None:
    """Race, and print the median and range of every arm; what is done is kept."""
    world = prepared(out, pictures)
    path = out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {"rates": {}, "racers": []}
    for seed in range(seeds):
        if any(found["seed"] == seed for found in results["racers"]):
            continue
        learned, seconds = tokenizer_of("learned", world, seed, None)
        tokenizers = {"learned": (learned, seconds)}
        tokenizers |= {arm: tokenizer_of(arm, world, seed, learned) for arm in ARMS[1:]}
        if not results["rates"]:
            share = {"until": steps // 4, "every": steps // 4, "count": count}
            tries = [
                racer(arm, rate, world, seed, steps, *tokenizers[arm], tried=True)
                for arm in ARMS
                for rate in rates
            ]
            race(tries, world, **share)
            for arm in ARMS:
                own = [one for one in tries if one.arm == arm]
                results["rates"][arm] = max(own, key=lambda one: one.curve[-1][2]).rate
        racers = [
            racer(arm, results["rates"][arm], world, seed, steps, *tokenizers[arm]) for arm in ARMS
        ]
        race(racers, world, until=steps, every=every, count=count)
        results["racers"] += [result(one, world, count) for one in racers]
        path.write_text(json.dumps(results, indent=1) + "\n")
    show(results)


def show(results: dict[str, Any]) -> None:
    """Print a row for each arm."""
    title = f"seconds until {TARGET:.0%} of valid_pairs are read: median (range)"
    table = Table("patches", "rate", "language model", "whole run", "pairs then", title=title)
    for arm in ARMS:
        own = [found for found in results["racers"] if found["arm"] == arm]
        clocks = [spread([found[clock] for found in own]) for clock in CLOCKS]
        pairs = f"{median(found['pairs'] for found in own):.1%}"
        table.add_row(arm, f"{results['rates'][arm]:g}", *clocks, pairs)
    Console().print(table)


CLOCKS = ("language_seconds", "whole_seconds")


def spread(values: list[float | None]) -> str:
    """Median and range; those that never got there are counted."""
    there = [value for value in values if value is not None]
    if not there:
        return f"not reached by {len(values)}"
    said = f"{median(there):.0f} ({min(there):.0f} to {max(there):.0f})"
    return said if len(there) == len(values) else f"{said}, {len(values) - len(there)} not reached"


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.PositionalRequiredArgs,))

"""A whole training run: data → features → tokenizer → language → pixels, each saved when done.

The run folder *is* a model folder (`lavit caption --model RUN …`) with more in it: training.json,
metrics.jsonl, samples.jsonl, README.md (the model card), tensorboard/, checkpoints/, cache/. The
same command on the same folder goes on where it was; other settings of a stage that has begun are
refused. `base/`, `decoder/` and `selector/` there are what a configuration without a source of its
own starts from: a language model, a diffusers folder and a selector that is given.

    run = open_run(folder, data, model, training)
    train_stages(run)

What a stage learns from is made in encoded.py and passed to it; fine-tuning (finetune.py) goes the
same road.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase as TextTokenizer

from lavit.config import (
    TO_SEE,
    InputError,
    LoopConfig,
    ModelConfig,
    TrainConfig,
    read_config,
    read_json,
    to_json,
    write_config,
    write_json,
)
from lavit.data.corpus import origin_of, with_more
from lavit.data.documents import Documents
from lavit.files import alone
from lavit.language.model import Language
from lavit.model import LaVIT
from lavit.pixels.decoder import Pixels
from lavit.storage import model_folder
from lavit.train.card import write_card
from lavit.train.checkpoint import latest_checkpoint, load_weights
from lavit.train.encoded import Encoded, feature_feed, language_stage, pixel_feed
from lavit.train.feeds import FeatureFeed, PixelFeed
from lavit.train.first import (
    begun_language,
    check_first,
    first_language,
    first_pixels,
    first_tokenizer,
)
from lavit.train.health import parameter_lines
from lavit.train.language import LanguageStage
from lavit.train.loop import Report, Stage, train
from lavit.train.metrics import check_trackers
from lavit.train.pixels import PixelsStage
from lavit.train.samples import Samples
from lavit.train.settings import PART_OF, STAGES, Settings, same_run, with_free, with_stage
from lavit.train.spread import halve_frozen, make_accelerator
from lavit.train.tokenizer import TokenizerStage
from lavit.vision.encoder import Vision
from lavit.visual_tokenizer.tokenizer import VisualTokenizer

log = logging.getLogger(__name__)
T = TypeVar("T", bound=LoopConfig)  # the settings: of all stages, or of a fine-tuning


@dataclass
class Run(Generic[T]):
    """A training's folder and settings, and where it runs.

    `watch` is called with the loop's `Report`s, `prepare` with (what, done, of all) while features
    are computed. `start` is a model to go on from.
    """

    folder: Path
    data: str
    training: T
    config: ModelConfig  # of the folder; parts that are saved change it
    accelerator: Accelerator
    trackers: tuple[str, ...] = ("tensorboard",)
    watch: Callable[[Report], None] | None = None
    prepare: Callable[[str, int, int], None] | None = None
    start: Path | None = None
    settings: Settings = field(default_factory=dict)  # what it was asked to be, for training.json

    @property
    def main(self) -> bool:
        """Is this the process that writes?"""
        return self.accelerator.is_main_process

    @property
    def sharing(self) -> dict[str, int]:
        """Which of how many processes this is."""
        accelerator = self.accelerator
        return {"rank": accelerator.process_index, "ranks": accelerator.num_processes}

    def has_done(self, stage: str) -> bool:
        """Is a stage trained and saved?"""
        return (self.folder / PART_OF[stage] / "done").exists()

    def has_begun(self, stage: str) -> bool:
        """Has a stage left a checkpoint, or more?"""
        return (self.folder / "checkpoints" / stage).exists() or self.has_done(stage)


def open_run(
    folder: Path,
    data: str | Path,
    model: ModelConfig,
    training: TrainConfig,
    *,
    watch: Callable[[Report], None] | None = None,
    prepare: Callable[[str, int, int], None] | None = None,
    trackers: Sequence[str] = ("tensorboard",),
    fsdp: bool = False,
    start: str | Path | None = None,
) -> Run[TrainConfig]:
    """Begin a run in a folder, or take up the one that is there.

    `fsdp` spreads stage 2 over processes by FSDP2; `trackers` are written beside the JSON lines.
    `start` is a model to go on from, whose configuration `model` is: its tokenizer is taken as it
    is, since language and pixels know its codes, and those two train on. Raises `InputError` where
    the folder holds another run.
    """
    check_trackers(trackers)
    folder, start = Path(folder), None if start is None else model_folder(start)
    mine = {"data": str(data), "model": to_json(model), "training": to_json(training)}
    origin = origin_of(str(data))  # how the data were made: no setting of the run
    if start:
        mine["start"] = start.name
        origin = with_more(start, data)
    if origin:
        mine["origin"] = origin
    accelerator = make_accelerator(training.precision, fsdp=fsdp)
    run = Run(
        folder,
        str(data),
        training,
        model,
        accelerator,
        trackers=tuple(trackers),
        watch=watch,
        prepare=prepare,
        start=start,
        settings=mine,
    )
    accelerator.wait_for_everyone()
    known = (folder / "training.json").exists() and (folder / "config.json").exists()
    found = read_config(folder) if known else model
    _agree(run, ())
    coming = [PART_OF[stage] for stage in STAGES if not run.has_done(stage)]
    run.config = replace(found, **{part: getattr(model, part) for part in coming})
    return run


def _agree(run: Run[TrainConfig], stages: Sequence[str]) -> None:
    """Write what this run is, or check that the folder is of the same one.

    Compared are the settings of those of `stages` that have begun, and what is of no stage.
    """
    path = run.folder / "training.json"
    run.accelerator.wait_for_everyone()
    saved = read_json(path) if path.exists() else run.settings
    begun = [stage for stage in stages if run.has_begun(stage)]
    if not same_run(saved, run.settings, begun):
        said = f"{run.folder} holds a run with other settings"
        raise InputError(f"{said}: give another --out, or delete it to start anew")
    saved = with_free(run.settings | saved, run.settings)
    for stage in set(stages).difference(begun):
        saved = with_stage(saved, stage, run.settings)
    run.accelerator.wait_for_everyone()
    if run.main:
        write_json(path, saved)


def take_tokenizer(run: Run[TrainConfig], start: Path) -> None:
    """Copy stage 1 of another model, once, under this run's own configuration."""
    done = run.has_done("tokenizer")
    run.accelerator.wait_for_everyone()
    if not done:
        model = LaVIT.from_pretrained(start, parts=TO_SEE)
        model.config = run.config
        save_parts(run, model, *TO_SEE)


def train_stages(
    run: Run[TrainConfig], stages: Sequence[str] = STAGES, encoded: Encoded | None = None
) -> Encoded:
    """Train stages in order; one that is finished is not touched again. What was encoded for them
    is returned; it may be given, by a run on the same data with the same tokenizer.
    """
    for stage in stages:
        if stage not in STAGES:
            known = ", ".join(STAGES)
            raise InputError(f"there is no stage {stage!r}: choose from {known}, all")
    encoded = encoded or Encoded(run)
    with alone(run.folder) if run.main else nullcontext():
        _agree(run, stages)
        check_first(run, [stage for stage in stages if not run.has_done(stage)], encoded)
        if run.start:
            take_tokenizer(run, run.start)
        for stage in stages:
            if run.has_done(stage):
                log.info("%s is trained already", stage)
                continue
            torch.manual_seed(run.training.seed)
            if stage == "tokenizer":
                tokenizer = first_tokenizer(run)
                train_tokenizer(run, tokenizer, feature_feed(run, encoded), encoded.vision)
            elif stage == "language":
                language, text = first_language(run, encoded)
                train_language(run, language_stage(run, encoded, language, text), text)
            else:
                pixels, feed = first_pixels(run), pixel_feed(run, encoded)
                train_pixels(run, pixels, encoded.tokenizer, feed)
    return encoded


def train_tokenizer(
    run: Run[TrainConfig], tokenizer: VisualTokenizer, feed: FeatureFeed, vision: Vision
) -> None:
    """Stage 1; the encoder is saved beside what was trained on its features."""
    config = run.training.tokenizer
    kind = tokenizer.stage or TokenizerStage
    stage = kind(tokenizer, feed, config, seed=run.training.seed)
    train_loop(run, stage, warmup=config.warmup)
    save_parts(run, LaVIT(run.config, vision=vision, visual_tokenizer=tokenizer), *TO_SEE)


def train_language(run: Run[TrainConfig], stage: LanguageStage, text: TextTokenizer) -> None:
    """Stage 2, whose documents know the text tokenizer."""
    language = stage.module
    config, base = run.training.language, run.config.language
    sharded = run.accelerator.is_fsdp2
    if base.lora_rank and not sharded and run.accelerator.mixed_precision == "bf16":
        halve_frozen(language.lm)
    origins = {"reader.merger.": "copied from the tokenizer"}
    if base.source != "random":
        origins["lm."] = f"loaded from {base.source}"
    if run.start:
        origins = {"": f"loaded from {run.start.name}"}
    options: dict[str, Any] = {"warmup": config.warmup, "betas": (0.9, 0.95)}
    documents = stage.documents
    whole = not sharded and not config.token_corpus and not language.embeds
    if isinstance(documents, Documents) and whole:
        options["sample"] = Samples(stage, documents.corpus, text)
        options["sample_every"] = run.training.sample_every
    elif run.training.sample_every:
        said = "no samples are written: they need codes, encoded pictures and whole weights"
        log.info(said)
    train_loop(run, stage, origins, **options)
    if sharded and run.main:
        language = whole_language(run, language, text)  # a shard cannot be saved
    save_parts(run, LaVIT(run.config, language=language, text_tokenizer=text), "language")


def whole_language(run: Run[TrainConfig], sharded: Language, text: TextTokenizer) -> Language:
    """The language part that is spread over the ranks, whole, from the run's last checkpoint."""
    language, _ = begun_language(run, Encoded(run), text)
    trains = {name: each.requires_grad for name, each in sharded.named_parameters()}
    for name, parameter in language.named_parameters():
        parameter.requires_grad_(trains[name])  # a checkpoint holds what trains
    last = latest_checkpoint(run.folder / "checkpoints" / "language")
    assert last is not None  # the loop ends with one
    load_weights(last, language)
    return language


def train_pixels(
    run: Run[TrainConfig],
    pixels: Pixels,
    tokenizer: VisualTokenizer,
    feed: PixelFeed,
) -> None:
    """Stage 3; the averaged weights are saved."""
    config, device = run.training.pixels, run.accelerator.device
    pixels.to(device)  # the averaged weights are copies, and belong where the others are
    seed, tokenizer = run.training.seed, tokenizer.to(device)
    stage = PixelsStage(pixels, tokenizer, feed, config, seed=seed)
    train_loop(run, stage, warmup=config.warmup)
    pixels.load_state_dict(pixels.state_dict() | stage.averaged)
    save_parts(run, LaVIT(run.config, pixels=pixels), "pixels")


def train_loop(
    run: Run[Any], stage: Stage, origins: dict[str, str] | None = None, **options: Any
) -> None:
    """Train a stage; `options` are the loop's, `origins` those of `parameter_lines`."""
    training = run.training
    for line in parameter_lines(stage, origins or {}) if run.main else ():
        log.info(line)
    train(
        stage,
        run.folder,
        accelerator=run.accelerator,
        clip=training.clip,
        checkpoint_every=training.checkpoint_every,
        keep_last=training.keep_last,
        log_every=training.log_every,
        trackers=run.trackers,
        watch=run.watch if run.main else None,
        **options,
    )


def save_parts(run: Run[TrainConfig], model: LaVIT, *parts: str) -> None:
    """Write parts of the run, and mark the last one as finished."""
    run.accelerator.wait_for_everyone()
    if run.main:
        write_config(run.folder, run.config)  # parts to come may have other settings by now
        model.save_pretrained(run.folder, parts=parts)
        write_card(run.folder)
        (run.folder / parts[-1] / "done").touch()
    run.accelerator.wait_for_everyone()
    run.config = read_config(run.folder)

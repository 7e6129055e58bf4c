"""A whole training run: data → features → tokenizer → language → pixels, each stage saved as a usable part.

The run folder *is* a model folder (`lavit caption --model RUN …`) with more beside it: training.json, metrics.jsonl,
samples.jsonl, README.md (the model card), tensorboard/, checkpoints/, cache/. The same command on the same folder goes on
where it was; other settings on the same folder are refused.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL.Image import Image
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lavit.config import InputError, LanguageConfig, ModelConfig, TrainConfig, from_json, read_json, to_json
from lavit.data.bulk import corpus_codes, tokenizer_hash
from lavit.data.corpus import Corpus, load_corpus, origin_of
from lavit.data.documents import Documents
from lavit.data.features import Features, Pictures, compute_features, nothing_read, tokenize_features
from lavit.data.stream import StreamingDocuments, stream_texts
from lavit.images import pixels as to_pixels
from lavit.model import LaVIT
from lavit.modules.language import Language
from lavit.modules.pixels import Pixels
from lavit.modules.tokenizer import VisualTokenizer
from lavit.modules.vision import Vision, load_vision
from lavit.sequence import VisualTokens
from lavit.storage import build_language, load_base, load_language, model_folder
from lavit.train.card import write_card
from lavit.train.checkpoint import latest_checkpoint, load_weights
from lavit.train.health import parameter_lines
from lavit.train.language import LanguageStage, train_text_tokenizer
from lavit.train.loop import Report, Stage, train
from lavit.train.metrics import check_trackers
from lavit.train.samples import Samples
from lavit.train.spread import first_alone, halve_frozen, make_accelerator
from lavit.train.stages import AutoencoderStage, PixelsStage, TokenizerStage

log = logging.getLogger(__name__)
STAGES = ("tokenizer", "language", "pixels")


class Run:
    """One training run in a folder. `prepare` hears of progress while features are computed, (what, done, of all), and
    `watch` of the loop's `Report`s. `fsdp` spreads stage 2 over processes by FSDP2; `trackers` are written beside the JSON
    lines (train/metrics.py). `start` is a model to go on from, whose configuration `model` is: its tokenizer is taken as
    it is, since its codes are what its language and pixels know, and those two train on from its weights.
    """

    def __init__(
        self,
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
    ) -> None:
        self.start = None if start is None else model_folder(start)
        self.folder, self.data, self.training = Path(folder), str(data), training
        self.watch, self.prepare, self.trackers = watch, prepare, tuple(trackers)
        check_trackers(self.trackers)
        self.accelerator = make_accelerator(training.precision, fsdp=fsdp)
        self.config = self._settle(model)
        if self.start:
            self._take_tokenizer(self.start)

    def _settle(self, model: ModelConfig) -> ModelConfig:
        """Write what this run is, or check that the folder is of the same run; returns the model's configuration."""
        mine = {"data": self.data, "model": to_json(model), "training": to_json(self.training)}
        if self.start:
            mine["start"] = self.start.name
        origin = origin_of(self.data)
        if origin:  # how the data were made: kept beside the settings, no setting of the run
            mine["origin"] = origin
        path = self.folder / "training.json"
        self.accelerator.wait_for_everyone()
        if path.exists():
            saved = read_json(path)
            if not _same_run(saved, mine):
                raise InputError(
                    f"{self.folder} holds a run with other settings: give another --out, or delete it to start anew"
                )
            if origin and "origin" not in saved and self.accelerator.is_main_process:
                new = path.with_suffix(".new")
                new.write_text(json.dumps(saved | {"origin": origin}, indent=1) + "\n")
                new.replace(path)
            if (self.folder / "config.json").exists():
                return from_json(ModelConfig, read_json(self.folder / "config.json"))
            return model
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return model
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(mine, indent=1) + "\n")
        except OSError as error:
            raise InputError(f"cannot write to {self.folder}: {error.strerror}") from error
        return model

    def _take_tokenizer(self, start: Path) -> None:
        """Copy stage 1 of another model, once, under this run's own configuration; every rank takes part in `_save`."""
        done = (self.folder / "tokenizer" / "done").exists()
        self.accelerator.wait_for_everyone()
        if not done:
            model = LaVIT.from_pretrained(start)
            model.config = self.config
            self._save(model, "vision", "tokenizer")

    @cached_property
    def corpus(self) -> Corpus:
        """The training split."""
        return load_corpus(self.data)

    @cached_property
    def vision(self) -> Vision:
        """The frozen encoder."""
        return load_vision(self.config.vision, self.folder / "vision").to(self.accelerator.device)

    @cached_property
    def features(self) -> Features:
        """Encoder features of every picture, computed once; other ranks wait for the first."""
        with first_alone(self.accelerator):
            return compute_features(
                [picture.record for picture in self.corpus.pictures],
                self.vision,
                self.folder / "cache",
                progress=self._progress("encoder features"),
            )

    @cached_property
    def tokens(self) -> VisualTokens:
        """Stage-1 tokens of every picture."""
        return tokenize_features(self.tokenizer, self.features)

    @cached_property
    def tokenizer(self) -> VisualTokenizer:
        """The trained tokenizer of this run."""
        return self._model().tokenizer

    @cached_property
    def pictures(self) -> Pictures:
        """Pictures at the pixel decoder's size."""
        return Pictures([one.record for one in self.corpus.pictures], self.config.pixels.size)

    def train(self, stages: Sequence[str] = STAGES) -> None:
        """Train stages in order; one that is finished is not touched again."""
        for stage in stages:
            if stage not in STAGES:
                raise InputError(f"there is no stage {stage!r}: choose from {', '.join(STAGES)}, all")
            if (self.folder / stage / "done").exists():
                log.info("%s is trained already", stage)
                continue
            torch.manual_seed(self.training.seed)
            getattr(self, f"_train_{stage}")()

    def _model(self) -> LaVIT:
        return LaVIT(self.config, folder=self.folder, device=self.accelerator.device)

    def _progress(self, what: str) -> Callable[[int, int], None] | None:
        if self.prepare is None or not self.accelerator.is_main_process:
            return None
        return lambda done, count: self.prepare(what, done, count)

    def _loop(
        self,
        stage: Stage,
        *,
        warmup: float,
        betas: tuple[float, float] = (0.9, 0.99),
        origins: dict[str, str] | None = None,
        sample: Samples | None = None,
    ) -> None:
        for line in parameter_lines(stage, origins or {}) if self.accelerator.is_main_process else ():
            log.info(line)
        train(
            stage,
            self.folder,
            accelerator=self.accelerator,
            clip=self.training.clip,
            warmup=warmup,
            betas=betas,
            checkpoint_every=self.training.checkpoint_every,
            keep_last=self.training.keep_last,
            log_every=self.training.log_every,
            trackers=self.trackers,
            sample=sample,
            sample_every=self.training.sample_every,
            watch=self.watch if self.accelerator.is_main_process else None,
        )

    def _save(self, model: LaVIT, *parts: str) -> None:
        """Write parts of the run, and mark the last one as finished."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            model.save_pretrained(self.folder, parts=parts)
            (self.folder / parts[-1] / "done").touch()
            write_card(self.folder)
        self.config = model.config
        self.accelerator.wait_for_everyone()

    def _train_tokenizer(self) -> None:
        config = self.training.tokenizer
        tokenizer = VisualTokenizer(self.config.tokenizer)
        stage = TokenizerStage(tokenizer, self.features, config, seed=self.training.seed)
        self._loop(stage, warmup=config.warmup)
        model = LaVIT(self.config, {"vision": self.vision, "tokenizer": tokenizer}, folder=self.folder)
        self._save(model, "vision", "tokenizer")

    def _train_language(self) -> None:
        config = self.training.language
        language, text, base = self._first_language()
        model_config = replace(self.config, language=base)
        stage = self._language_stage(language, text)
        if base.lora_rank and not self.accelerator.is_fsdp2 and self.accelerator.mixed_precision == "bf16":
            halve_frozen(language)
        origins = {"merger.": "copied from the tokenizer", "lm.": f"loaded from {base.source}"}
        if base.source == "random":
            del origins["lm."]
        if self.start:
            origins = {"": f"loaded from {self.start.name}"}
        encoded = not config.stream and not config.token_corpus
        sample = Samples(stage, self.corpus, text) if encoded and not self.accelerator.is_fsdp2 else None
        if sample is None and self.training.sample_every:
            log.info("no samples are written: they need whole weights on a rank (no FSDP2), and encoded pictures")
        self._loop(stage, warmup=config.warmup, betas=(0.9, 0.95), origins=origins, sample=sample)
        if self.accelerator.is_fsdp2 and self.accelerator.is_main_process:  # a shard cannot be saved: take all weights
            if self.start:  # not `_first_language`: other ranks would have to take part
                language = load_language(self.config, self.start)[0]
            else:
                language = build_language(
                    load_base(base, self.folder / "base")[0], self.tokenizer.merger, model_config, text
                )
            load_weights(latest_checkpoint(self.folder / "checkpoints" / "language"), language)
        model = LaVIT(model_config, {"language": language}, text=text, folder=self.folder)
        self._save(model, "language")

    def _first_language(self) -> tuple[Language, PreTrainedTokenizerBase, LanguageConfig]:
        """The language part before its first step: around its base LM, or as `start` left it."""
        base = self.config.language
        if self.start:
            return *load_language(self.config, self.start), base
        if base.source == "random" and base.lora_rank:
            raise InputError("LoRA adapts a trained language model, and this preset's is random: leave --lora out")
        if base.source == "random":
            text = self._new_text_tokenizer()
            end = {"bos_token_id": None, "eos_token_id": text.eos_token_id}
            base = replace(base, architecture={**base.architecture, "vocab_size": len(text), **end})
        lm, found = load_base(base, self.folder / "base")
        text = found or text
        language = build_language(lm, self.tokenizer.merger, replace(self.config, language=base), text)
        language.check_head()
        return language, text, base

    def _language_stage(self, language: Language, text: PreTrainedTokenizerBase) -> LanguageStage:
        """Stage 2 on the corpus; on codes made beforehand; or on a stream."""
        config, device = self.training.language, self.accelerator.device
        make = {"text": text, "vocabulary": language.vocabulary, "config": config, "seed": self.training.seed}
        vision = self.config.vision
        if config.stream:
            place = {"rank": self.accelerator.process_index, "ranks": self.accelerator.num_processes}
            self.tokenizer.to(device)
            streams = StreamingDocuments(self.data, self._encode, sizes=(vision.patches, vision.dim), **place, **make)
            return LanguageStage(language, self.tokenizer, streams, None, None, config)
        if config.token_corpus:
            hashed = tokenizer_hash(LaVIT(self.config, folder=self.folder))
            codes = corpus_codes(config.token_corpus, self.corpus, self.data, tokenizer=hashed)
            make["config"] = replace(config, mixture=(0.0, config.mixture[1], 0.0, *config.mixture[3:]))
            documents = Documents(self.corpus, codes, **make)
            features, tokens = nothing_read(vision)
        else:
            codes = tuple(tuple(part.tolist()) for part in self.tokens.split())
            documents = Documents(self.corpus, codes, **make)
            features, tokens = self.features, self.tokens
        self.__dict__.pop("vision", None)  # features and tokens are made: nothing of stage 1 need stay on a GPU
        self.tokenizer.cpu()
        return LanguageStage(language, self.tokenizer, documents, features, tokens, config)

    @torch.no_grad()
    def _encode(self, images: list[Image]) -> tuple[Float[Tensor, "images patches dim"], VisualTokens]:
        """Features and tokens of pictures of a stream."""
        vision, device = self.config.vision, self.accelerator.device
        patches = self.vision(to_pixels(images, vision.image_size, vision.mean, vision.std).to(device)).float()
        return patches, self.tokenizer.encode(patches)

    def _new_text_tokenizer(self) -> PreTrainedTokenizerBase:
        """A text tokenizer trained on the corpus, kept in the cache so that a resumed run has the same."""
        folder = self.folder / "cache" / "text"
        with self.accelerator.main_process_first():
            if not (folder / "tokenizer.json").exists():
                corpus = stream_texts(self.data) if self.training.language.stream else self.corpus
                train_text_tokenizer(corpus, self.training.text_vocabulary).save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)

    def _train_pixels(self) -> None:
        config, seed = self.training.pixels, self.training.seed
        started = self.start and (self.start / "pixels").is_dir()
        pixels = Pixels.load(self.start / "pixels", self.config.pixels) if started else Pixels.build(self.config.pixels)
        if config.autoencoder_steps:
            self._loop(AutoencoderStage(pixels, self.pictures, config, seed=seed), warmup=config.warmup)
            pixels.calibrate(self.pictures.rows(torch.arange(min(512, len(self.pictures)))))
        self.tokenizer.to(self.accelerator.device)
        stage = PixelsStage(
            pixels,
            self.tokenizer,
            self.pictures,
            self.tokens,
            config,
            seed=seed,
            vision=self.vision if config.perceptual_weight else None,
        )
        self._loop(stage, warmup=config.warmup)
        pixels.load_state_dict(stage.averaged.module.state_dict())
        self._save(LaVIT(self.config, {"pixels": pixels}, folder=self.folder), "pixels")


def _same_run(saved: dict[str, Any], mine: dict[str, Any]) -> bool:
    """Whether two descriptions of a run agree; a setting that the older one lacks stands at its default."""
    if any(saved.get(name) != mine.get(name) for name in ("data", "start")):
        return False
    try:
        kinds = {"model": ModelConfig, "training": TrainConfig}
        return all(from_json(kind, saved[name]) == from_json(kind, mine[name]) for name, kind in kinds.items())
    except (InputError, KeyError):
        return False

"""A whole training run: data → features → tokenizer → language → pixels, each saved when done.

The run folder *is* a model folder (`lavit caption --model RUN …`) with more in it: training.json,
metrics.jsonl, samples.jsonl, README.md (the model card), tensorboard/, checkpoints/, cache/. The
same command on the same folder goes on where it was; other settings of a stage that has begun are
refused. `base/` and `decoder/` there are what a configuration without a source of its own starts
from: a language model and a diffusers folder.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from PIL.Image import Image
from torch import Tensor
from transformers import AutoTokenizer
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
from lavit.data.bulk import corpus_codes, tokenizer_hash
from lavit.data.corpus import Corpus, load_corpus, origin_of
from lavit.data.documents import Documents
from lavit.data.features import (
    Features,
    Pictures,
    compute_features,
    nothing_read,
    tokenize_features,
)
from lavit.data.sources import Record
from lavit.data.stream import StreamingDocuments, stream_texts
from lavit.files import alone, replacing
from lavit.language.model import Language
from lavit.model import LaVIT
from lavit.pixels.decoder import Pixels
from lavit.sequence import VisualTokens
from lavit.storage import (
    build_language,
    load_base,
    load_language,
    load_visual_tokenizer,
    model_folder,
)
from lavit.train.card import write_card
from lavit.train.checkpoint import latest_checkpoint, load_weights
from lavit.train.health import parameter_lines
from lavit.train.language import LanguageStage, train_text_tokenizer
from lavit.train.loop import Report, Stage, train
from lavit.train.metrics import check_trackers
from lavit.train.pixels import PixelsStage
from lavit.train.samples import Samples
from lavit.train.settings import PART_OF, STAGES, same_run, with_stage
from lavit.train.spread import first_alone, halve_frozen, make_accelerator
from lavit.train.tokenizer import TokenizerStage
from lavit.vision.encoder import Vision, load_vision
from lavit.visual_tokenizer.tokenizer import VisualTokenizer

log = logging.getLogger(__name__)


class Run:
    """One training run in a folder.

    `prepare` is called with (what, done, of all) while features are computed, `watch` with the
    loop's `Report`s. `fsdp` spreads stage 2 over processes by FSDP2; `trackers` are written beside
    the JSON lines. `start` is a model to go on from, whose configuration `model` is: its tokenizer
    is taken as it is, since language and pixels know its codes, and those two train on.
    """

    training: TrainConfig

    def __init__(
        self,
        folder: Path,
        data: str | Path,
        model: ModelConfig,
        training: LoopConfig,
        *,
        watch: Callable[[Report], None] | None = None,
        prepare: Callable[[str, int, int], None] | None = None,
        trackers: Sequence[str] = ("tensorboard",),
        fsdp: bool = False,
        start: str | Path | None = None,
    ) -> None:
        self.start = None if start is None else model_folder(start)
        self.folder, self.data = Path(folder), str(data)
        self.training = cast(TrainConfig, training)  # `Finetune` has its own
        self.watch, self.prepare, self.trackers = watch, prepare, tuple(trackers)
        check_trackers(self.trackers)
        self.accelerator = make_accelerator(training.precision, fsdp=fsdp)
        self.config = self._settle(model)

    def _settle(self, model: ModelConfig) -> ModelConfig:
        """Read what the folder's run is, if it holds one; the model's settings."""
        mine = {"data": self.data, "model": to_json(model), "training": to_json(self.training)}
        if self.start:
            mine["start"] = self.start.name
        if origin := origin_of(self.data):  # how the data were made: no setting of the run
            mine["origin"] = origin
        path, config = self.folder / "training.json", self.folder / "config.json"
        self.accelerator.wait_for_everyone()
        saved = read_json(path) if path.exists() else {}
        found = read_config(self.folder) if saved and config.exists() else model
        self._mine, self._saved = mine, saved or mine
        self._agree(())
        coming = [PART_OF[stage] for stage in STAGES if not self._done(stage)]
        return replace(found, **{part: getattr(model, part) for part in coming})

    def _done(self, stage: str) -> bool:
        return (self.folder / PART_OF[stage] / "done").exists()

    def _begun(self, stage: str) -> bool:
        return (self.folder / "checkpoints" / stage).exists() or self._done(stage)

    def _agree(self, stages: Sequence[str]) -> None:
        """Write what this run is, or check that the folder is of the same one.

        Compared are the settings of those of `stages` that have begun, and what is of no stage.
        """
        begun = [stage for stage in stages if self._begun(stage)]
        if not same_run(self._saved, self._mine, begun):
            said = f"{self.folder} holds a run with other settings"
            raise InputError(f"{said}: give another --out, or delete it to start anew")
        self._saved = self._mine | self._saved
        for stage in set(stages).difference(begun):
            self._saved = with_stage(self._saved, stage, self._mine)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_json(self.folder / "training.json", self._saved)

    def _take_tokenizer(self, start: Path) -> None:
        """Copy stage 1 of another model, once, under this run's own configuration."""
        done = self._done("tokenizer")
        self.accelerator.wait_for_everyone()
        if not done:
            model = LaVIT.from_pretrained(start, parts=TO_SEE)
            model.config = self.config
            self._save(model, *TO_SEE)

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
        """Encoder features of every picture."""
        return self._features([picture.record for picture in self.corpus.pictures], self.vision)

    @cached_property
    def tokens(self) -> VisualTokens:
        """Stage-1 tokens of every picture."""
        return self._tokens(self.tokenizer, self.features)

    @cached_property
    def tokenizer(self) -> VisualTokenizer:
        """The trained tokenizer of this run."""
        found = load_visual_tokenizer(self.config, self.folder)
        return found.to(self.accelerator.device).eval()

    @cached_property
    def pictures(self) -> Pictures:
        """Pictures at the pixel decoder's size."""
        openers = [picture.record.open for picture in self.corpus.pictures]
        return Pictures(openers, self.config.pixels.size)

    def train(self, stages: Sequence[str] = STAGES) -> None:
        """Train stages in order; one that is finished is not touched again."""
        for stage in stages:
            if stage not in STAGES:
                known = ", ".join(STAGES)
                raise InputError(f"there is no stage {stage!r}: choose from {known}, all")
        with alone(self.folder) if self.accelerator.is_main_process else nullcontext():
            self._agree(stages)
            if self.start:
                self._take_tokenizer(self.start)
            for stage in stages:
                if self._done(stage):
                    log.info("%s is trained already", stage)
                    continue
                torch.manual_seed(self.training.seed)
                getattr(self, f"_train_{stage}")()

    def _features(self, records: Sequence[Record], vision: Vision) -> Features:
        """Encoder features, computed once; other ranks wait for the first."""
        progress = None
        if self.prepare is not None and self.accelerator.is_main_process:
            progress = partial(self.prepare, "encoder features")
        with first_alone(self.accelerator):
            return compute_features(records, vision, self.folder / "cache", progress=progress)

    def _tokens(self, tokenizer: VisualTokenizer, features: Features) -> VisualTokens:
        """Visual tokens of cached features; each process makes a share of them."""
        accelerator = self.accelerator
        shares = torch.arange(len(features)).tensor_split(accelerator.num_processes)
        share = shares[accelerator.process_index]
        _, mine = nothing_read(self.config.vision)
        if len(share):
            mine = tokenize_features(tokenizer, features, share)
        return VisualTokens.joined(gather_object([mine]))

    def _loop(self, stage: Stage, origins: dict[str, str] | None = None, **options: Any) -> None:
        """Train a stage; `options` are the loop's, `origins` those of `parameter_lines`."""
        main, training = self.accelerator.is_main_process, self.training
        for line in parameter_lines(stage, origins or {}) if main else ():
            log.info(line)
        train(
            stage,
            self.folder,
            accelerator=self.accelerator,
            clip=training.clip,
            checkpoint_every=training.checkpoint_every,
            keep_last=training.keep_last,
            log_every=training.log_every,
            trackers=self.trackers,
            watch=self.watch if main else None,
            **options,
        )

    def _save(self, model: LaVIT, *parts: str) -> None:
        """Write parts of the run, and mark the last one as finished."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            write_config(self.folder, self.config)  # parts to come may have other settings by now
            model.save_pretrained(self.folder, parts=parts)
            write_card(self.folder)
            (self.folder / parts[-1] / "done").touch()
        self.accelerator.wait_for_everyone()
        self.config = read_config(self.folder)

    def _train_tokenizer(self) -> None:
        config = self.training.tokenizer
        tokenizer = VisualTokenizer(self.config.visual_tokenizer)
        stage = TokenizerStage(tokenizer, self.features, config, seed=self.training.seed)
        self._loop(stage, warmup=config.warmup)
        model = LaVIT(self.config, vision=self.vision, visual_tokenizer=tokenizer)
        self._save(model, *TO_SEE)

    def _train_language(self) -> None:
        language, text = self._first_language()
        stage = self._language_stage(language, text)
        config, base = self.training.language, self.config.language
        sharded = self.accelerator.is_fsdp2
        if base.lora_rank and not sharded and self.accelerator.mixed_precision == "bf16":
            halve_frozen(language)
        origins = {"merger.": "copied from the tokenizer"}
        if base.source != "random":
            origins["lm."] = f"loaded from {base.source}"
        if self.start:
            origins = {"": f"loaded from {self.start.name}"}
        options = {"warmup": config.warmup, "betas": (0.9, 0.95)}
        if not sharded and not config.stream and not config.token_corpus:
            options["sample"] = Samples(stage, self.corpus, text)
            options["sample_every"] = self.training.sample_every
        elif self.training.sample_every:
            log.info("no samples are written: they need encoded pictures and whole weights")
        self._loop(stage, origins, **options)
        if sharded and self.accelerator.is_main_process:
            language, _ = self._load_language(text)  # a shard cannot be saved
            last = latest_checkpoint(self.folder / "checkpoints" / "language")
            assert last is not None  # the loop ends with one
            load_weights(last, language)
        self._save(LaVIT(self.config, language=language, text_tokenizer=text), "language")

    def _first_language(self) -> tuple[Language, TextTokenizer]:
        """The language part before its first step; a random LM gets its text tokenizer's sizes."""
        base, text = self.config.language, None
        if base.source == "random":
            if base.lora_rank:
                said = "LoRA adapts a trained language model, and this preset's is random"
                raise InputError(f"{said}: leave --lora out")
            text = self._new_text_tokenizer()
            sizes = {"vocab_size": len(text), "eos_token_id": text.eos_token_id}
            base = replace(base, architecture=base.architecture | sizes | {"bos_token_id": None})
            self.config = replace(self.config, language=base)
        language, text = self._load_language(text)
        if not self.start:
            language.check_head()
        return language, text

    def _load_language(self, text: TextTokenizer | None) -> tuple[Language, TextTokenizer]:
        """A language part around its base LM, or as `start` left it."""
        if self.start:
            language, text = load_language(self.config, self.start)
        else:
            lm, found = load_base(self.config.language, self.folder / "base")
            text = found or text
            assert text is not None  # a random LM comes with a new one
            language = build_language(lm, self.tokenizer.merger, self.config, text)
        return language.float(), text  # small steps are lost on weights of half precision

    def _language_stage(self, language: Language, text: TextTokenizer) -> LanguageStage:
        """Stage 2 on the corpus; on codes made beforehand; or on a stream."""
        config, vision = self.training.language, self.config.vision
        make: dict[str, Any] = {"text": text, "vocabulary": language.vocabulary}
        make["seed"] = self.training.seed
        if config.stream:
            make["sizes"] = (vision.patches, vision.dim)
            make["rank"] = self.accelerator.process_index
            make["ranks"] = self.accelerator.num_processes
            self.tokenizer.to(self.accelerator.device)
            streams = StreamingDocuments(self.data, self._encode, config=config, **make)
            return LanguageStage(language, self.tokenizer, streams, None, None, config)
        mixture = config.mixture
        if config.token_corpus:
            hashed = tokenizer_hash(LaVIT(self.config, folder=self.folder))
            codes = corpus_codes(config.token_corpus, self.corpus, tokenizer=hashed)
            features, tokens = nothing_read(vision)
            mixture = replace(mixture, reading=0.0, question=0.0)
        else:
            codes = tuple(tuple(part.tolist()) for part in self.tokens.split())
            features, tokens = self.features, self.tokens
        documents = Documents(self.corpus, codes, config=replace(config, mixture=mixture), **make)
        self.__dict__.pop("vision", None)  # nothing of stage 1 need stay on a GPU
        self.tokenizer.cpu()
        return LanguageStage(language, self.tokenizer, documents, features, tokens, config)

    @torch.no_grad()
    def _encode(self, images: list[Image]) -> tuple[Tensor, VisualTokens]:
        """Features [images patches dim] and tokens of pictures of a stream."""
        patches = self.vision.encode(images)
        return patches, self.tokenizer.encode(patches)

    def _new_text_tokenizer(self) -> TextTokenizer:
        """A text tokenizer trained on the corpus, kept in the cache for a resumed run."""
        folder = self.folder / "cache" / "text"
        with self.accelerator.main_process_first():
            if not (folder / "tokenizer.json").exists():
                corpus = stream_texts(self.data) if self.training.language.stream else self.corpus
                text = train_text_tokenizer(corpus, self.training.text_vocabulary)
                with replacing(folder) as new:
                    text.save_pretrained(new)
        return AutoTokenizer.from_pretrained(folder)

    def _first_pixels(self) -> Pixels:
        """The decoder before its first step; without sizes of its own it starts from `decoder/`."""
        config = self.config.pixels
        if self.start and (self.start / "pixels").is_dir():
            return Pixels.load(self.start / "pixels", config)
        if not config.unet and not config.start_from:
            folder = self.folder / "decoder"
            if not (folder / "unet").is_dir():
                said = f"{folder} holds no diffusion model to start from"
                raise InputError(f"{said}: put a diffusers folder there (Stable Diffusion 1.5)")
            config = replace(config, start_from=str(folder))
        if config.vae and not config.start_from:
            said = "the pixels' configuration names an autoencoder, and none is trained here"
            raise InputError(f"{said}: give start_from, a diffusers folder that has one")
        return Pixels.build(config)

    def _train_pixels(self) -> None:
        config, seed = self.training.pixels, self.training.seed
        pixels = self._first_pixels()
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
        self._save(LaVIT(self.config, pixels=pixels), "pixels")

"""What a run's stages learn from: its corpus, encoded once and kept, or streams encoded on the fly.

stage 1   `feature_feed`     features of pictures
stage 2   `language_stage`   documents, with features and masks of the pictures that are read
stage 3   `pixel_feed`       pictures at the decoder's size, and their codes
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from jaxtyping import Int, UInt8
from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase as TextTokenizer

from lavit.config import InputError, TrainConfig
from lavit.data.bulk import corpus_codes, tokenizer_hash
from lavit.data.corpus import Corpus, load_corpus
from lavit.data.documents import Documents
from lavit.data.features import (
    Features,
    Pictures,
    compute_features,
    nothing_read,
    tokenize_features,
)
from lavit.data.sources import Record
from lavit.data.stream_documents import StreamingDocuments
from lavit.files import load_tensors, write_tensors
from lavit.images import levels
from lavit.language.model import Language
from lavit.model import LaVIT
from lavit.sequence import VisualTokens
from lavit.storage import load_visual_tokenizer
from lavit.train.feeds import (
    CorpusFeatures,
    CorpusPixels,
    FeatureFeed,
    PixelFeed,
    StreamedFeatures,
    StreamedPixels,
)
from lavit.train.language import LanguageStage
from lavit.vision.encoder import Vision, load_vision
from lavit.visual_tokenizer.tokenizer import VisualTokenizer

if TYPE_CHECKING:
    from lavit.train.run import Run

log = logging.getLogger(__name__)


class Encoded:
    """A run's corpus and what encoder and tokenizer make of it, each made once, when asked for."""

    def __init__(self, run: Run[TrainConfig]) -> None:
        self.run = run

    @cached_property
    def corpus(self) -> Corpus:
        """The training split, with conversations where the mixture has them."""
        config = self.run.training.language
        talks = config.mixture.conversation > 0 and not config.token_corpus
        return load_corpus(self.run.data, talks=talks)

    @cached_property
    def vision(self) -> Vision:
        """The frozen encoder."""
        run = self.run
        return load_vision(run.config.vision, run.folder / "vision").to(run.accelerator.device)

    @cached_property
    def tokenizer(self) -> VisualTokenizer:
        """The trained tokenizer of this run."""
        found = load_visual_tokenizer(self.run.config, self.run.folder)
        return found.to(self.run.accelerator.device).eval()

    @cached_property
    def features(self) -> Features:
        """Encoder features of every picture."""
        records = [picture.record for picture in self.corpus.pictures]
        return features_of(self.run, records, self.vision)

    @cached_property
    def tokens(self) -> VisualTokens:
        """Stage-1 tokens of every picture."""
        return tokens_of(self.run, self.tokenizer, self.features)

    @torch.no_grad()
    def encode(self, images: list[Image]) -> tuple[Tensor, VisualTokens]:
        """Features [images patches dim] and tokens of pictures of a stream."""
        patches = self.vision.encode(images)
        return patches, self.tokenizer.encode(patches)

    def leave_device(self) -> None:
        """Stage 2 on encoded pictures: nothing of stage 1 need stay on a GPU."""
        self.__dict__.pop("vision", None)
        self.tokenizer.cpu()


def features_of(run: Run[Any], records: Sequence[Record], vision: Vision) -> Features:
    """Encoder features, computed once; each process makes a share of them."""
    progress = partial(run.prepare, "encoder features") if run.prepare and run.main else None
    shared = {"wait": run.accelerator.wait_for_everyone, **run.sharing}
    return compute_features(records, vision, run.folder / "cache", progress=progress, **shared)


def tokens_of(run: Run[Any], tokenizer: VisualTokenizer, features: Features) -> VisualTokens:
    """Visual tokens of cached features, made once; each process makes a share of them."""
    rank, ranks = run.sharing["rank"], run.sharing["ranks"]
    share = torch.arange(len(features)).tensor_split(ranks)[rank]
    _, mine = nothing_read(run.config.vision)
    if len(share):
        name = f"tokens-{_key(tokenizer, features)}-{rank}-of-{ranks}.safetensors"
        mine = _tokens_in(run.folder / "cache" / name, tokenizer, features, share)
    return VisualTokens.joined(gather_object([mine]))


def _tokens_in(
    path: Path, tokenizer: VisualTokenizer, features: Features, pictures: Int[Tensor, "images"]
) -> VisualTokens:
    """Tokens of these pictures from a file, which is written where it is not there."""
    if path.exists():
        try:
            found = VisualTokens(**load_tensors(path))
            if len(found.lengths) == len(pictures):
                return found
            log.warning("%s is of other pictures: its tokens are made anew", path)
        except (InputError, TypeError) as error:
            log.warning("%s is damaged (%s): its tokens are made anew", path, error)
    made = tokenize_features(tokenizer, features, pictures)
    new = path.with_name(f".{path.name}")
    write_tensors(vars(made), vars(made).values(), new)
    new.replace(path)  # whole, or not there
    return made


def _key(tokenizer: VisualTokenizer, features: Features) -> str:
    """What decides over tokens of cached features: their file, and the tokenizer's weights."""
    digest = hashlib.sha256(Path(getattr(features.array, "filename", "")).name.encode())
    for name, tensor in tokenizer.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def feature_feed(run: Run[TrainConfig], encoded: Encoded) -> FeatureFeed:
    """Features for stage 1."""
    config, vision = run.training.tokenizer, encoded.vision
    how = {"batch": config.batch, "seed": run.training.seed}
    if not config.stream:
        return CorpusFeatures(encoded.features, **how)

    def encode(images: list[Image]) -> list[Tensor]:
        # the host waits on the stream's thread: a batch ahead takes nothing of the device
        return list(vision.encode(images).to("cpu", torch.half))

    return StreamedFeatures(run.data, encode, **how, **run.sharing)


def pixel_feed(run: Run[TrainConfig], encoded: Encoded) -> PixelFeed:
    """Pictures and their codes for stage 3."""
    config, size = run.training.pixels, run.config.pixels.size
    how = {"batch": config.batch, "seed": run.training.seed}
    if not config.stream:
        openers = [picture.record.open for picture in encoded.corpus.pictures]
        return CorpusPixels(Pictures(openers, size), encoded.tokens.split(), **how)

    def make(images: list[Image]) -> list[tuple[UInt8[Tensor, "3 size size"], Tensor]]:
        # the host waits on the stream's thread, once for all of them
        codes = encoded.encode(images)[1].cpu().split()
        return list(zip(levels(images, size), codes, strict=True))

    return StreamedPixels(run.data, make, **how, **run.sharing)


def check_reader(language: Language) -> None:
    """Raise `InputError` for a rival's reader that learns from documents of its own."""
    reader = language.reader
    if reader.stage or reader.documents:
        said = f"{type(reader).__name__} learns from encoded pictures alone"
        raise InputError(f"{said}: train it without streaming or conversations")


def language_stage(
    run: Run[TrainConfig], encoded: Encoded, language: Language, text: TextTokenizer
) -> LanguageStage:
    """Stage 2 on the corpus; on codes made beforehand; or on a stream."""
    config, vision = run.training.language, run.config.vision
    make: dict[str, Any] = {"text": text, "vocabulary": language.vocabulary}
    make |= {"seed": run.training.seed, "rows": language.reader.rows}
    if config.stream:
        check_reader(language)
        make |= {"sizes": (vision.patches, vision.dim), **run.sharing}
        encoded.tokenizer.to(run.accelerator.device)
        streams = StreamingDocuments(run.data, encoded.encode, config=config, **make)
        return LanguageStage(language, encoded.tokenizer, streams, None, None, config)
    mixture = config.mixture
    if config.token_corpus:
        model = LaVIT(run.config, folder=run.folder)
        hashed = tokenizer_hash(model, run.accelerator.device)
        codes = corpus_codes(config.token_corpus, encoded.corpus, tokenizer=hashed)
        features, tokens = nothing_read(vision)
        mixture = replace(mixture, reading=0.0, question=0.0, conversation=0.0)
    else:
        codes = tuple(tuple(part.tolist()) for part in encoded.tokens.split())
        features, tokens = encoded.features, encoded.tokens
    kinds = language.reader.documents or Documents, language.reader.stage or LanguageStage
    documents = kinds[0](encoded.corpus, codes, config=replace(config, mixture=mixture), **make)
    encoded.leave_device()
    stage: LanguageStage = kinds[1](
        language, encoded.tokenizer, documents, features, tokens, config
    )
    return stage

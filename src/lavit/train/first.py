"""What stages begin with: a tokenizer, a language model, a decoder; random, given or trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from transformers import AutoTokenizer
from transformers import PreTrainedTokenizerBase as TextTokenizer

from lavit.config import InputError, PixelsConfig, TrainConfig
from lavit.data.documents import Source
from lavit.data.stream import stream_texts
from lavit.files import load_strictly, load_tensors, replacing
from lavit.language.model import Language
from lavit.pixels.decoder import Pixels
from lavit.storage import (
    build_language,
    build_tokenizer,
    check_base,
    load_base,
    load_language,
)
from lavit.train.encoded import Encoded
from lavit.train.language import train_text_tokenizer
from lavit.train.spread import from_first
from lavit.visual_tokenizer.tokenizer import VisualTokenizer

if TYPE_CHECKING:
    from lavit.train.run import Run


def check_first(run: Run[TrainConfig], stages: Sequence[str], encoded: Encoded) -> None:
    """Raise `InputError` for what a later stage will miss, before an earlier one is trained."""
    config = run.training.language
    if "language" in stages and not run.start:
        check_base(run.config.language, run.folder / "base")
    if "pixels" in stages and run.config.visual_tokenizer.spatial_positions:
        said = "a decoder learns from codes alone, and spatial_positions wants their places"
        raise InputError(f"{said}: leave it out, or train without pixels")
    if "pixels" in stages and not run.start:
        _begun_pixels(run)
    if "language" in stages and not config.stream and not config.token_corpus:
        for part in encoded.corpus.parts:
            Source(part, encoded.corpus, config.mixture)


def first_tokenizer(run: Run[TrainConfig]) -> VisualTokenizer:
    """A new visual tokenizer; a selector that is given comes from RUN/selector/."""
    tokenizer = build_tokenizer(run.config.visual_tokenizer)
    if run.training.tokenizer.given_selector:
        where = run.folder / "selector" / "model.safetensors"
        load_strictly(tokenizer.selector, load_tensors(where), where)
    return tokenizer


def first_language(run: Run[TrainConfig], encoded: Encoded) -> tuple[Language, TextTokenizer]:
    """The language part before its first step; a random LM gets its text tokenizer's sizes."""
    base, text = run.config.language, None
    if base.source == "random":
        text = _new_text_tokenizer(run, encoded)
        sizes = {"vocab_size": len(text), "eos_token_id": text.eos_token_id}
        base = replace(base, architecture=base.architecture | sizes | {"bos_token_id": None})
        run.config = replace(run.config, language=base)

    def begin() -> tuple[Language, TextTokenizer]:
        language, found = begun_language(run, encoded, text)
        if not run.start:
            language.eval().check_lm()
        return language, found

    return from_first(begin, run.accelerator) if run.accelerator.is_fsdp2 else begin()


def begun_language(
    run: Run[TrainConfig], encoded: Encoded, text: TextTokenizer | None
) -> tuple[Language, TextTokenizer]:
    """A language part around its base LM, or as `start` left it."""
    if run.start:
        language, text = load_language(run.config, run.start)
    else:
        lm, found = load_base(run.config.language, run.folder / "base")
        text = found or text
        assert text is not None  # a random LM comes with a new one
        language = build_language(lm, encoded.tokenizer.merger, run.config, text)
        language.begin_codes(encoded.tokenizer.codebook.vectors)
    return language.float(), text  # small steps are lost on weights of half precision


def _new_text_tokenizer(run: Run[TrainConfig], encoded: Encoded) -> TextTokenizer:
    """A text tokenizer trained on the run's texts, kept in the cache for a resumed run."""
    folder = run.folder / "cache" / "text"
    with run.accelerator.main_process_first():
        if not (folder / "tokenizer.json").exists():
            streams = run.training.language.stream
            corpus = stream_texts(run.data) if streams else encoded.corpus
            text = train_text_tokenizer(corpus, run.training.text_vocabulary)
            with replacing(folder) as new:
                text.save_pretrained(new)
    return AutoTokenizer.from_pretrained(folder)


def first_pixels(run: Run[TrainConfig]) -> Pixels:
    """The decoder before its first step."""
    if run.start and (run.start / "pixels").is_dir():
        return Pixels.load(run.start / "pixels", run.config.pixels)
    return Pixels.build(_begun_pixels(run))


def _begun_pixels(run: Run[TrainConfig]) -> PixelsConfig:
    """The decoder's configuration; without sizes of its own it starts from `decoder/`."""
    config = run.config.pixels
    if not config.unet and not config.start_from:
        folder = run.folder / "decoder"
        if not (folder / "unet").is_dir():
            said = f"{folder} holds no diffusion model to start from"
            raise InputError(f"{said}: put a diffusers folder there (Stable Diffusion 1.5)")
        config = replace(config, start_from=str(folder))
    if config.vae and not config.start_from:
        said = "the pixels' configuration names an autoencoder, and none is trained here"
        raise InputError(f"{said}: give start_from, a diffusers folder that has one")
    return config

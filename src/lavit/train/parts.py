"""Parts of a model on the meta device: their parameters are counted before there is memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lavit.config import InputError, ModelConfig, PixelsConfig, TrainConfig
from lavit.language.lora import inject_lora
from lavit.language.model import Language, table_and_head
from lavit.language.reader import MergerReader
from lavit.language.smollm2 import SMOLLM2, smollm2_config, smollm2_file
from lavit.pixels.diffusion import options
from lavit.vision.encoder import EFFICIENTNET, load_vision
from lavit.visual_tokenizer.tokenizer import merger_of

PARTS = {
    "lm": "language model",
    "rows": "visual rows",
    "head_rows": "visual head",
    "reader.merger": "reader: merger copy",
    "reader.to_language": "reader: projection",
}
STABLE_DIFFUSION_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


@dataclass(frozen=True)
class PartCount:
    """Parameters of one part."""

    name: str
    trains: int
    frozen: int


def architecture_of(model: ModelConfig, training: TrainConfig) -> Any:
    """The base LM's configuration, without the visual rows."""
    source = model.language.source
    if source == SMOLLM2:
        return smollm2_config(smollm2_file())
    options = {"vocab_size": training.text_vocabulary, **model.language.architecture}
    if not model.language.architecture:
        try:
            return AutoConfig.from_pretrained(source)
        except OSError as error:
            why = str(error).splitlines()[0]
            raise InputError(f"no language model at {source}: {why}") from error
    if source == "folder":  # a saved language model has the joint vocabulary
        options["vocab_size"] -= 2 + model.visual_tokenizer.codes
    return AutoConfig.for_model(**options)


def language_of(model: ModelConfig, config: Any) -> Language:
    """The model of stage 2 on the meta device."""
    tokenizer = model.visual_tokenizer
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
        reader = MergerReader(merger_of(tokenizer), table_and_head(lm)[0].shape[1])
        language = Language(lm, reader, codes=tokenizer.codes, end=0)
        if model.language.lora_rank:
            inject_lora(language.lm, model.language)
    return language


def encoder_of(model: ModelConfig) -> nn.Module:
    """The frozen encoder, on the meta device where a library can build it there."""
    config = model.vision
    if config.source == EFFICIENTNET or not config.architecture:
        return load_vision(config)
    with torch.device("meta"):
        return load_vision(replace(config, source="random"))


def count_parts(language: Language) -> tuple[PartCount, ...]:
    """Parameters of the parts of stage 2."""
    counts: dict[str, list[int]] = {}
    for name, parameter in language.named_parameters():
        first, second, *_ = f"{name}.".split(".")
        part = PARTS[f"reader.{second}" if first == "reader" else first]
        part = "LoRA" if ".lora_" in name else part
        counts.setdefault(part, [0, 0])[0 if parameter.requires_grad else 1] += parameter.numel()
    return tuple(PartCount(name, *pair) for name, pair in counts.items())


def numel(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def autoencoder_of(config: PixelsConfig) -> nn.Module:
    """The autoencoder; Stable Diffusion's where a folder has it, nothing where there is none."""
    if not config.vae:
        return nn.Identity()
    with torch.device("meta"):
        made: nn.Module = AutoencoderKL.from_config(options(config.vae) or STABLE_DIFFUSION_VAE)
    return made

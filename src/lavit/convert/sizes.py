"""The configuration of a published folder, read from its tensors' shapes.

What shapes cannot tell (heads, normalisation, samplers) comes from the preset `lavit_7b`. The
result is held against our modules, built on the meta device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lavit.config import InputError, ModelConfig, PixelsConfig, TokenizerConfig, VisionConfig
from lavit.convert import names
from lavit.presets import lavit_7b

Shapes = Mapping[str, Tensor]  # tensors of one published file; only shapes are read, so they may be on `meta`


def vision_config(eva: Shapes, *, heads: int) -> tuple[VisionConfig, dict[str, Any]]:
    """Encoder configuration, and the transformers architecture that goes beside its weights."""
    dim, _, patch, _ = eva["patch_embed.proj.weight"].shape
    grid = round((eva["pos_embed"].shape[1] - 1) ** 0.5)
    architecture = names.vision_architecture(
        dim=dim,
        hidden=len(eva["blocks.0.mlp.fc1.bias"]),
        depth=names.depth_of(eva),
        heads=heads,
        image_size=grid * patch,
        patch_size=patch,
    )
    preset = lavit_7b().model.vision
    config = replace(preset, source="folder", image_size=grid * patch, grid=grid, dim=dim, architecture={})
    return config, architecture


def tokenizer_config(encoder: Shapes, decoder: Shapes, *, heads: int) -> TokenizerConfig:
    """Selector, merger, codebook and reconstructor."""
    preset = lavit_7b().model.tokenizer
    codes, code_dim = encoder["quantize.embedding.weight"].shape
    hidden, dim = encoder["causal_encoder.blocks.0.mlp.fc1.weight"].shape
    ratio = preset.mlp_ratio if int(preset.mlp_ratio * dim) == hidden else (hidden + 0.5) / dim
    return TokenizerConfig(
        dim=dim,
        patches=decoder["query_embed"].shape[1],
        heads=heads,
        merger_depth=names.depth_of(encoder, "causal_encoder."),
        reconstructor_depth=names.depth_of(decoder),
        mlp_ratio=ratio,
        codes=codes,
        code_dim=code_dim,
    )


def pixels_config(decoder: Shapes, null: Shapes | None) -> PixelsConfig:
    """The 512-px decoder with its stored null text, or the 1024-px one."""
    preset = lavit_7b().model.pixels
    common = {
        "features_dim": decoder["norm.weight"].shape[0],
        "patches": decoder["query_embed"].shape[1],
    }
    if null is not None:
        rows = next(iter(null.values())).shape[-2]
        return replace(preset, condition_dim=len(decoder["unet_proj.bias"]), null_tokens=rows, **common)
    return replace(
        preset,
        size=1024,
        condition="pooled",
        condition_dim=len(decoder["unet_proj_1.bias"]),
        pooled_dim=len(decoder["unet_proj_2.bias"]),
        unconditional="zeros",
        steps=25,
        guidance=7.0,
        **common,
    )


def model_config(files: Mapping[str, Shapes], decoder: Shapes, null: Shapes | None, *, heads: int) -> ModelConfig:
    """The whole model around one of the decoders; `files` has the keys "vision" and "encoder"."""
    try:
        vision, _ = vision_config(files["vision"], heads=heads)
        return replace(
            lavit_7b().model,
            vision=vision,
            tokenizer=tokenizer_config(files["encoder"], decoder, heads=heads),
            language=replace(lavit_7b().model.language, source="folder", architecture={}),
            pixels=replace(pixels_config(decoder, null), pool_heads=heads),
        )
    except KeyError as error:
        raise InputError(f"the published files lack {error}: their sizes cannot be read") from error


def check_shapes(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], *, where: str) -> None:
    """Raise `InputError` unless names and shapes agree."""
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unknown:
        raise InputError(f"{where}: missing {missing[:3]}, not expected {unknown[:3]}")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise InputError(f"{where}: {name} is {list(tensor.shape)}, expected {list(expected[name].shape)}")


def check_parts(
    config: ModelConfig,
    tensors: Mapping[str, Mapping[str, Tensor]],
    *,
    architecture: dict[str, Any],
) -> None:
    """Hold the tensors of "vision", "tokenizer", "reader" and "condition" against our modules."""
    from transformers import AutoConfig, Blip2VisionModel

    from lavit.modules.condition import HEADS
    from lavit.modules.merger import Merger
    from lavit.modules.tokenizer import VisualTokenizer

    options = dict(architecture)
    tokenizer = config.tokenizer
    with torch.device("meta"):
        encoder = Blip2VisionModel._from_config(AutoConfig.for_model(options.pop("model_type"), **options))
        merger = Merger(tokenizer.dim, tokenizer.heads, tokenizer.merger_depth, tokenizer.mlp_ratio)
        width = tensors["reader"]["to_language.weight"].shape[0]
        reader = torch.nn.ModuleDict({"merger": merger, "to_language": torch.nn.Linear(tokenizer.dim, width)})
        parts = {
            "vision": encoder,
            "tokenizer": VisualTokenizer(tokenizer),
            "reader": reader,
            "condition": HEADS[config.pixels.condition](config.pixels),
        }
    for name, module in parts.items():
        check_shapes(module.state_dict(), tensors[name], where=name)

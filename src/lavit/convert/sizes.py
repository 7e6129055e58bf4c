"""The configuration of a published folder, read from its tensors' shapes.

What shapes cannot tell (heads, normalisation, samplers) comes from the preset `lavit_7b`. The
result is held against our modules, built on the meta device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lavit.config import InputError, ModelConfig, PixelsConfig, TokenizerConfig, VisionConfig
from lavit.convert import names
from lavit.pixels.condition import HEADS
from lavit.presets import lavit_7b
from lavit.vision.encoder import load_vision
from lavit.visual_tokenizer.tokenizer import VisualTokenizer

Shapes = Mapping[str, Tensor]  # by name; only shapes are read


def vision_config(eva: Shapes) -> VisionConfig:
    """Encoder; its architecture is that of transformers."""
    preset = lavit_7b().model.vision
    dim, _, patch, _ = eva["patch_embed.proj.weight"].shape
    grid = round((eva["pos_embed"].shape[1] - 1) ** 0.5)
    architecture = preset.architecture | {
        "hidden_size": dim,
        "intermediate_size": len(eva["blocks.0.mlp.fc1.bias"]),
        "num_hidden_layers": names.depth_of(eva),
        "image_size": grid * patch,
        "patch_size": patch,
    }
    return replace(
        preset,
        image_size=grid * patch,
        grid=grid,
        dim=dim,
        architecture=architecture,
    )


def tokenizer_config(encoder: Shapes, decoder: Shapes) -> TokenizerConfig:
    """Selector, merger, codebook and reconstructor."""
    preset = lavit_7b().model.visual_tokenizer
    codes, code_dim = encoder["quantize.embedding.weight"].shape
    hidden, dim = encoder["causal_encoder.blocks.0.mlp.fc1.weight"].shape
    same = int(preset.mlp_ratio * dim) == hidden
    return replace(
        preset,
        dim=dim,
        patches=decoder["query_embed"].shape[1],
        merger_depth=names.depth_of(encoder, "causal_encoder."),
        reconstructor_depth=names.depth_of(decoder),
        mlp_ratio=preset.mlp_ratio if same else (hidden + 0.5) / dim,
        codes=codes,
        code_dim=code_dim,
    )


def pixels_config(decoder: Shapes, null: Shapes | None) -> PixelsConfig:
    """The 512-px decoder with its stored null text, or the 1024-px one."""
    preset = replace(
        lavit_7b().model.pixels,
        features_dim=decoder["norm.weight"].shape[0],
        patches=decoder["query_embed"].shape[1],
    )
    if null is not None:
        rows = next(iter(null.values())).shape[-2]
        return replace(preset, condition_dim=len(decoder["unet_proj.bias"]), null_tokens=rows)
    return replace(
        preset,
        size=1024,
        condition="pooled",
        condition_dim=len(decoder["unet_proj_1.bias"]),
        pooled_dim=len(decoder["unet_proj_2.bias"]),
        unconditional="zeros",
        steps=25,
        guidance=7.0,
    )


def model_config(
    vision: Shapes,
    encoder: Shapes,
    decoder: Shapes,
    null: Shapes | None,
) -> ModelConfig:
    """The whole model around one of the decoders."""
    preset = lavit_7b().model
    try:
        return replace(
            preset,
            vision=vision_config(vision),
            visual_tokenizer=tokenizer_config(encoder, decoder),
            language=replace(preset.language, architecture={}),
            pixels=pixels_config(decoder, null),
        )
    except KeyError as error:
        raise InputError(f"the published files lack {error}: their sizes cannot be read") from error


def check_shapes(expected: Shapes, found: Shapes, *, where: str) -> None:
    """Raise `InputError` unless names and shapes agree, and what is of whole numbers."""
    names.check_names(found, expected, where=where)
    for name, tensor in found.items():
        given, wanted = list(tensor.shape), list(expected[name].shape)
        if given != wanted:
            raise InputError(f"{where}: {name} is {given}, expected {wanted}")
        if tensor.is_floating_point() != expected[name].is_floating_point():
            kinds = f"{tensor.dtype}, expected {expected[name].dtype}"
            raise InputError(f"{where}: {name} is of {kinds}")


def check_parts(config: ModelConfig, tensors: Mapping[str, Shapes]) -> None:
    """Hold the tensors of each part of the model against our modules."""
    width, dim = tensors["reader"]["to_language.weight"].shape[0], config.visual_tokenizer.dim
    with torch.device("meta"):
        tokenizer = VisualTokenizer(config.visual_tokenizer)
        reader = {"merger": tokenizer.merger, "to_language": nn.Linear(dim, width)}
        parts = {
            "vision": load_vision(replace(config.vision, source="random")).encoder,
            "visual_tokenizer": tokenizer,
            "reader": nn.ModuleDict(reader),
            "condition": HEADS[config.pixels.condition](config.pixels),
        }
    for name, module in parts.items():
        check_shapes(module.state_dict(), tensors[name], where=name)

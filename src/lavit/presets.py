"""Named sizes: the only file that holds numbers of particular models and their trainings.

A preset is a function that returns a `Preset`; a variant calls one and replaces what differs.
Each says how many minutes its own numbers take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lavit.config import (
    InputError,
    LanguageConfig,
    LanguageTraining,
    Mixture,
    ModelConfig,
    PixelsConfig,
    PixelsTraining,
    TokenizerConfig,
    TokenizerTraining,
    TrainConfig,
    VisionConfig,
)


@dataclass(frozen=True)
class Preset:
    """A model and the training that makes it, which takes `minutes` on two idle CPU cores."""

    model: ModelConfig
    training: TrainConfig
    minutes: float


def efficientnet_lite0(*, image_size: int) -> VisionConfig:
    """EfficientNet-Lite0 up to block 10: one patch per 16 pixels, 112 channels."""
    return VisionConfig(
        source="efficientnet-lite0",
        image_size=image_size,
        grid=image_size // 16,
        dim=112,
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
        layer=10,
    )


def folded_pixels(vision: VisionConfig, *, patch: int, width: int, depth: int) -> PixelsConfig:
    """8 px for each patch of features, folded `patch` x `patch` to one; the picture is predicted.

    Predicting ε leaves its error as grain until training is long, and weighting as Eq. 5 does gives
    the noisiest levels, which alone need the features, next to no weight: here all count alike.
    """
    folded = 3 * patch**2
    return PixelsConfig(
        size=vision.grid * 8,
        features_dim=vision.dim,
        patches=vision.patches,
        condition="grid",
        condition_dim=width,
        direction=True,
        sees="estimate",
        patch=patch,
        steps=2,  # more make shapes up that the features do not ask for (LOG.md)
        guidance=1.0,
        scheduler={
            "_class_name": "DDIMScheduler",
            "beta_schedule": "linear",
            "beta_start": 0.0001,
            "beta_end": 0.02,
            "clip_sample": True,
            "set_alpha_to_one": True,
            "steps_offset": 0,
            "timestep_spacing": "trailing",
            "prediction_type": "sample",
        },
        unet={
            "_class_name": "GridDenoiser",
            "in_channels": folded + width,
            "out_channels": folded,
            "width": width,
            "depth": depth,
        },
    )


def nano() -> Preset:
    """From scratch in half an hour of two CPU cores, a process each: frozen EfficientNet-Lite0, a
    small Qwen3, 80 px.
    """
    vision = efficientnet_lite0(image_size=160)
    model = ModelConfig(
        name="nano",
        vision=vision,
        visual_tokenizer=TokenizerConfig(
            dim=vision.dim,
            patches=vision.patches,
            heads=7,
            merger_depth=2,
            reconstructor_depth=3,
            mlp_ratio=2.0,
            codes=4096,
            position_code=True,
            standardise=True,
        ),
        language=LanguageConfig(
            source="random",
            architecture={
                "model_type": "qwen3",  # normed queries and keys: names come sooner than in a Llama
                "hidden_size": 224,
                "intermediate_size": 512,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "head_dim": 56,
                "max_position_embeddings": 2048,
                "tie_word_embeddings": True,
            },
        ),
        # a fold of 8 px has 192 channels, more than the stream holds, and draws half as much right
        pixels=folded_pixels(vision, patch=4, width=96, depth=4),
    )
    training = TrainConfig(
        tokenizer=TokenizerTraining(
            steps_a=500,
            steps_b=450,
            batch=32,
            learning_rate=2e-3,
            foreground=1.0,
            rate=0.25,  # a scene has two things as a rule, which cover a sixth of it
            rate_weight=16.0,  # eight times the other, or what decides empties pictures instead
            selector_gradient="ragged",
            selector_rate=0.5,  # at 1 chance orders the patches when it decides
            decided_weight=2.0,
            k_means_vectors=41_000,
            optimizer="muon",
        ),
        language=LanguageTraining(
            steps=2000,
            rows=4,
            tokens=512,
            learning_rate=2e-3,
            rows_rate=2e-3,
            reader_rate=2e-3,
            weight_decay=0.01,
            optimizer="muon",
            read_share=0.1,
            # documents of questions are twice as long
            mixture=Mixture(reading=6.0, writing=1.0, question=0.6, edit=0.4),
        ),
        pixels=PixelsTraining(
            steps=2000,
            batch=8,
            learning_rate=2e-3,
            ema=0.998,
            optimizer="muon",
            perceptual_weight=0.1,  # a blur is the best guess by squared error (LOG.md)
        ),
    )
    return Preset(model, training, minutes=30)


def pico() -> Preset:
    """For studies: nano on a plain world of 24 objects, with a quarter of the codes.

    Its language model says names right and half of the descriptions not yet, so that there is room
    for what is better and what is worse.
    """
    small = nano()
    t = small.training
    model = replace(
        small.model,
        name="pico",
        visual_tokenizer=replace(small.model.visual_tokenizer, codes=1024),
    )
    training = replace(
        t,
        text_vocabulary=512,
        sample_every=0,
        tokenizer=replace(t.tokenizer, steps_a=300, steps_b=200, k_means_vectors=20_000),
        language=replace(t.language, steps=300, rows=2, mixture=Mixture(reading=3.0, writing=1.0)),
        pixels=replace(t.pixels, steps=1500),
    )
    return Preset(model, training, minutes=7)


def mini() -> Preset:
    """Scenes in English: LoRA on SmolLM2-135M, 160 px; 20 hours of two CPU cores.

    SmolLM2 is most of the cost, 170 tokens a second on two cores, so tokenizer and decoder may be
    deeper than nano's: they have 10 and 12 MB of half precision, the language part 12 MB.
    """
    small = nano()
    vision, t = small.model.vision, small.training
    tokenizer = replace(
        small.model.visual_tokenizer, merger_depth=3, reconstructor_depth=6, mlp_ratio=4.0
    )
    model = replace(
        small.model,
        name="mini",
        visual_tokenizer=tokenizer,
        language=LanguageConfig(source="smollm2-135m", lora_rank=8),
        # wider than the 192 channels of 8 x 8 pixels, or its stream cannot hold the picture; 2 x 2
        # latents on a patch
        pixels=replace(folded_pixels(vision, patch=8, width=224, depth=4), size=160),
    )
    training = TrainConfig(
        tokenizer=replace(t.tokenizer, steps_a=3000, steps_b=5000, k_means_vectors=60_000),
        language=replace(
            t.language,
            steps=9000,
            rows=2,
            learning_rate=1e-3,
            rows_rate=2e-3,
            reader_rate=1e-3,
            optimizer="adamw",
            # English is known, codes are not: writing first
            mixture=Mixture(reading=2.0, writing=3.0, question=2.0, edit=1.0, conversation=0.7),
        ),
        pixels=replace(t.pixels, steps=9000, batch=16, ema=0.999),
    )
    return Preset(model, training, minutes=1200)


def lavit_7b() -> Preset:
    """The paper's model (`lavit convert published`): EVA ViT-g/14, LLaMA-7B, Stable Diffusion 1.5.

    The training is the paper's where it says so (steps, batches) and the authors' or the sibling's
    elsewhere; it needs GPUs and the encoder, LM and UNet to start from.
    """
    vision = VisionConfig(
        source="folder",
        image_size=224,
        grid=16,
        dim=1408,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        architecture={
            "model_type": "blip_2_vision_model",
            "hidden_size": 1408,
            "intermediate_size": 6144,
            "num_hidden_layers": 40,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 14,
            "layer_norm_eps": 1e-6,
            "qkv_bias": True,
        },
    )
    model = ModelConfig(
        name="lavit_7b",
        vision=vision,
        visual_tokenizer=TokenizerConfig(
            dim=vision.dim,
            patches=vision.patches,
            heads=16,
            merger_depth=12,
            reconstructor_depth=12,
            mlp_ratio=4.3637,
        ),
        language=LanguageConfig(
            source="folder",
            architecture={
                "model_type": "llama",
                "hidden_size": 4096,
                "intermediate_size": 11008,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "vocab_size": 48386,
            },
        ),
        pixels=PixelsConfig(
            size=512,
            features_dim=vision.dim,
            patches=vision.patches,
            unconditional="text",
            vae={"_class_name": "AutoencoderKL"},
            sampler="ddim",
            steps=50,
            guidance=5.0,
        ),
    )
    common: dict[str, Any] = {"batch": 2048, "learning_rate": 1e-4}
    training = TrainConfig(
        tokenizer=TokenizerTraining(steps_a=25_000, steps_b=25_000, decay=0.995, **common),
        language=LanguageTraining(
            steps=30_000,
            rows=2048,
            tokens=2048,
            learning_rate=1e-5,
            rows_rate=1e-4,
            reader_rate=1e-4,
        ),
        pixels=PixelsTraining(steps=20_000, **common),
    )
    return Preset(model, training, minutes=float("inf"))


PRESETS: dict[str, Callable[[], Preset]] = {
    "pico": pico,
    "nano": nano,
    "mini": mini,
    "lavit_7b": lavit_7b,
}


def preset(name: str) -> Preset:
    """The preset of a name; unknown names raise `InputError` listing the known ones."""
    if name not in PRESETS:
        raise InputError(f"there is no preset {name!r}: choose from {', '.join(PRESETS)}")
    return PRESETS[name]()


def with_lm(chosen: Preset, source: str) -> Preset:
    """The preset around a trained causal LM: a transformers folder or a hub name.

    Its own text tokenizer is used. Where the preset's own LM is new, this one learns at a tenth of
    its rate, so that it keeps what it knows; visual rows and reader are new and keep theirs.
    """
    if Path(source).is_dir():
        source = str(Path(source).resolve())  # a run goes on from any directory
    language = replace(chosen.model.language, source=source, architecture={})
    new = chosen.model.language.source == "random"
    rate = chosen.training.language.learning_rate / (10 if new else 1)
    training = replace(
        chosen.training, language=replace(chosen.training.language, learning_rate=rate)
    )
    return replace(chosen, model=replace(chosen.model, language=language), training=training)


def with_encoder(chosen: Preset, vision: VisionConfig) -> Preset:
    """The preset on another vision encoder (`vision.encoder.encoder_at`), sizes as its features'.

    Only presets with a decoder on the grid of features (nano and its like) can change their
    encoder so; others raise `InputError`.
    """
    model = chosen.model
    if model.pixels.condition != "grid":
        said = "its decoder does not paint on a grid of features"
        raise InputError(f"preset {model.name} cannot change its encoder: {said}; use nano")
    heads = max(n for n in range(1, max(1, vision.dim // 64) + 1) if vision.dim % n == 0)
    seeing = replace(model.visual_tokenizer, heads=heads, dim=vision.dim, patches=vision.patches)
    unet, side = model.pixels.unet, model.pixels.size // model.vision.grid  # of a patch
    sizes = {"patch": model.pixels.patch, "width": unet["width"], "depth": unet["depth"]}
    pixels = replace(folded_pixels(vision, **sizes), size=vision.grid * side)
    model = replace(model, vision=vision, visual_tokenizer=seeing, pixels=pixels)
    return replace(chosen, model=model)


def scaled(training: TrainConfig, factor: float) -> TrainConfig:
    """The same training with `factor` times the steps of every stage."""
    if not 0 < factor < float("inf"):
        raise InputError(f"a training needs a positive time, not a factor of {factor}")

    def times(stage: Any, *names: str) -> Any:
        steps = {name: getattr(stage, name) for name in names if getattr(stage, name)}
        return replace(stage, **{name: max(1, round(factor * steps[name])) for name in steps})

    return replace(
        training,
        tokenizer=times(training.tokenizer, "steps_a", "steps_b"),
        language=times(training.language, "steps"),
        pixels=times(training.pixels, "steps"),
    )

"""Named sizes: the only file that holds numbers of particular models and their trainings.

A preset is a function that returns a `Preset`; a variant calls one and replaces what differs. `minutes` scales the steps
of a training: the numbers below are those of a 15-minute run on two CPU cores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from lavit.config import (
    InputError,
    LanguageConfig,
    LanguageTraining,
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
    """A model and the training that makes it; `minutes` is what the training takes on two idle CPU cores."""

    model: ModelConfig
    training: TrainConfig
    minutes: float


def efficientnet_lite0(*, image_size: int) -> VisionConfig:
    """EfficientNet-Lite0, last block before the head: one patch per 32 pixels, 320 channels."""
    return VisionConfig(
        source="efficientnet-lite0",
        image_size=image_size,
        grid=image_size // 32,
        dim=320,
        mean=(127 / 255,) * 3,
        std=(128 / 255,) * 3,
        layer=-1,
        absolute_positions=False,
    )


def nano() -> Preset:
    """All three stages from scratch on two CPU cores in minutes: frozen EfficientNet-Lite0, a small Llama, 64 px."""
    vision = efficientnet_lite0(image_size=320)
    model = ModelConfig(
        name="nano",
        vision=vision,
        tokenizer=TokenizerConfig(
            dim=vision.dim,
            patches=vision.patches,
            heads=5,
            merger_depth=2,
            reconstructor_depth=2,
            mlp_ratio=2.0,
            codes=1024,
            position_code=True,
            feature_scale=2.0,
        ),
        language=LanguageConfig(
            source="random",
            architecture={
                "model_type": "llama",
                "hidden_size": 256,
                "intermediate_size": 768,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "max_position_embeddings": 2048,
                "tie_word_embeddings": True,
            },
        ),
        pixels=PixelsConfig(size=64, features_dim=vision.dim, patches=vision.patches),
    )
    training = TrainConfig(
        views=2,
        tokenizer=TokenizerTraining(steps_a=200, steps_b=200, batch=32, learning_rate=1e-3, selector_gradient="ragged"),
        language=LanguageTraining(
            steps=400, rows=4, tokens=512, learning_rate=1e-3, rows_rate=1e-3, reader_rate=1e-3, weight_decay=0.01
        ),
        pixels=PixelsTraining(autoencoder_steps=200, autoencoder_rate=1e-3, steps=400, batch=32, learning_rate=1e-3),
    )
    return Preset(model, training, minutes=15)


PRESETS: dict[str, Callable[[], Preset]] = {"nano": nano}


def preset(name: str) -> Preset:
    """The preset of a name; unknown names raise `InputError` listing the known ones."""
    if name not in PRESETS:
        raise InputError(f"there is no preset {name!r}: choose from {', '.join(PRESETS)}")
    return PRESETS[name]()


def scaled(training: TrainConfig, factor: float) -> TrainConfig:
    """The same training with `factor` times the steps of every stage."""
    if factor <= 0:
        raise InputError(f"a training needs a positive time, not a factor of {factor}")

    def times(steps: int) -> int:
        return max(1, round(steps * factor)) if steps else 0

    tokenizer, language, pixels = training.tokenizer, training.language, training.pixels
    return replace(
        training,
        tokenizer=replace(tokenizer, steps_a=times(tokenizer.steps_a), steps_b=times(tokenizer.steps_b)),
        language=replace(language, steps=times(language.steps)),
        pixels=replace(pixels, autoencoder_steps=times(pixels.autoencoder_steps), steps=times(pixels.steps)),
    )

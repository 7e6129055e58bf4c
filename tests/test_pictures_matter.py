"""What a model says depends on the picture, with every family of encoder and LM, saved and opened.

A picture that is read but changes nothing is the fault that no loss shows at once.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import lavit
from conftest import NAMES, toy_config, toy_picture
from lavit.config import VisionConfig
from lavit.generate.score import likelihood
from lavit.model import LaVIT
from lavit.presets import efficientnet_lite0
from lavit.storage import build_language
from lavit.train.finetune import finetune
from lavit.vision.encoder import load_vision
from lavit.visual_tokenizer.tokenizer import VisualTokenizer
from test_conversations import write
from test_finetune import settings
from test_language import FAMILIES

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.02,  # blip_2 begins at 1e-10: all pictures are alike
}
ENCODERS = (
    "siglip_vision_model",
    "clip_vision_model",
    "blip_2_vision_model",
    "vit",
    "efficientnet-lite0",
)


def vision_config(encoder: str) -> VisionConfig:
    if encoder == "efficientnet-lite0":
        return efficientnet_lite0(image_size=64)
    return replace(toy_config().vision, architecture={"model_type": encoder, **SMALL})


def untrained(toy_run: Path, encoder: str, family: dict[str, Any]) -> LaVIT:
    """A LaVIT of these two families that was never trained."""
    config, vision = toy_config(), vision_config(encoder)
    seeing = replace(config.visual_tokenizer, dim=vision.dim, heads=2)
    pixels = replace(config.pixels, features_dim=vision.dim)
    config = replace(config, vision=vision, visual_tokenizer=seeing, pixels=pixels)
    text = LaVIT.from_pretrained(toy_run, parts=("language",)).text_tokenizer
    torch.manual_seed(0)
    options = {"vocab_size": len(text), "bos_token_id": None, "eos_token_id": text.eos_token_id}
    architecture = AutoConfig.for_model(**{**family, **options})
    lm = AutoModelForCausalLM.from_config(architecture)
    tokenizer = VisualTokenizer(config.visual_tokenizer)
    return LaVIT(
        config,
        vision=load_vision(vision),
        visual_tokenizer=tokenizer,
        language=build_language(lm, tokenizer.merger, config, text),
        text_tokenizer=text,
    ).eval()


@pytest.mark.parametrize(
    ("encoder", "family"),
    [("dinov2", name) for name in FAMILIES] + [(name, "llama tied") for name in ENCODERS],
)
def test_another_picture_gives_other_logits(
    encoder: str, family: str, toy_run: Path, tmp_path: Path
) -> None:
    model = untrained(toy_run, encoder, FAMILIES[family])
    model.save_pretrained(tmp_path / "model")
    opened = LaVIT.from_pretrained(tmp_path / "model")
    for read_as in ("features", "codes"):
        said = []
        for each in (model, opened):
            each.config = replace(
                each.config, language=replace(each.config.language, read_as=read_as)
            )
            said.append([likelihood(each, "a dot", toy_picture(name)) for name in NAMES[:3]])
        assert said[0] == said[1]
        assert len({round(value, 4) for value in said[1]}) == 3


def test_the_fifth_picture_is_answered_as_the_first_is(toy_run: Path, tmp_path: Path) -> None:
    """Orders of pictures that training never showed."""
    orders = list(itertools.product(NAMES[:2], repeat=5))
    random.Random(0).shuffle(orders)

    def turns(order: Sequence[str], count: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for name in order[:count]:
            picture = {"type": "image", "image": f"{name}.png"}
            asked = [picture, {"type": "text", "text": "what is it?"}]
            found += [{"role": "user", "content": asked}, {"role": "assistant", "content": name}]
        return found

    data = write(tmp_path, [turns(order, 5) for order in orders[8:]])
    training = settings(toy_run, steps=150)
    rates = dict.fromkeys(("learning_rate", "rows_rate", "reader_rate"), 4e-3)
    language = replace(training.language, rows=4, tokens=256, **rates)
    finetune(tmp_path / "new", data, toy_run, replace(training, language=language))
    model = lavit.load(tmp_path / "new")
    right = [0, 0]
    for order in orders[:8]:
        for place, count in enumerate((1, 5)):
            messages = turns(order, count)[:-1]
            for message in messages[::2]:
                message["content"][0]["image"] = tmp_path / message["content"][0]["image"]
            right[place] += model.chat(messages)["content"][0]["text"] == order[count - 1]
    assert right == [8, 8]

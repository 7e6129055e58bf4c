"""A language model and an encoder of one's own, by the command line: toy folders of real kinds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import lavit
from conftest import NAMES, toy_config, toy_picture, toy_training
from lavit.cli import main
from lavit.config import InputError
from lavit.model import LaVIT
from lavit.presets import PRESETS, Preset, lavit_7b, mini, nano, with_encoder, with_lm
from lavit.train.run import open_run, train_stages
from lavit.vision.encoder import encoder_at

WIDE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SEEN = WIDE | {"intermediate_size": 64, "image_size": 32, "patch_size": 8}
LAYOUTS = {  # what preprocessor_config.json says of the size
    "dinov2": {"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 40}},
    "siglip": {"size": {"height": 32, "width": 32}},
}


def encoder_folder(kind: str, folder: Path) -> Path:
    torch.manual_seed(0)
    parts = {"vision_config": SEEN, "text_config": {**WIDE, "intermediate_size": 64}}
    config = AutoConfig.for_model(kind, **(parts if kind == "siglip" else SEEN))
    AutoModel.from_config(config).save_pretrained(folder)
    how = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], **LAYOUTS[kind]}
    (folder / "preprocessor_config.json").write_text(json.dumps(how))
    return folder


def lm_folder(kind: str, toy_run: Path, folder: Path) -> Path:
    text = LaVIT.from_pretrained(toy_run, parts=("language",)).text_tokenizer
    torch.manual_seed(0)
    sizes = {"vocab_size": len(text), "bos_token_id": None, "eos_token_id": text.eos_token_id}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 64}
    config = AutoConfig.for_model(kind, **WIDE, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    text.save_pretrained(folder)
    return folder


def small_nano() -> Preset:
    """nano, which learns its first codes from few vectors and reads short rows."""
    preset = nano()
    training = preset.training
    tokenizer = replace(training.tokenizer, batch=8, k_means_vectors=200)
    language = replace(training.language, rows=1, tokens=256)
    return replace(preset, training=replace(training, tokenizer=tokenizer, language=language))


@pytest.mark.parametrize(("lm", "encoder"), [("qwen2", "siglip"), ("llama", "dinov2")])
def test_an_lm_and_an_encoder_of_ones_own_are_trained_and_used(
    lm: str,
    encoder: str,
    toy_run: Path,
    toy_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(PRESETS, "nano", small_nano)
    own = str(lm_folder(lm, toy_run, tmp_path / "lm"))
    eyes = str(encoder_folder(encoder, tmp_path / "encoder"))
    run = str(tmp_path / "run")
    options = ["--data", str(toy_data), "--out", run, "--minutes", "0.001"]
    main(["train", "all", "--lm", own, "--encoder", eyes, *options])
    model = lavit.load(run)
    assert isinstance(model.caption(toy_picture(NAMES[0])), str)
    assert model.draw("a dot").size == (32, 32)
    config = model.model.config
    assert (config.vision.grid, config.vision.dim, config.vision.std[0]) == (4, 64, 0.25)
    assert type(model.model.language.lm).__name__.lower().startswith(lm)


def test_what_is_no_encoder_is_said(tmp_path: Path, toy_run: Path) -> None:
    with pytest.raises(InputError, match=r"no vision encoder at .*preprocessor_config.json"):
        encoder_at(str(lm_folder("llama", toy_run, tmp_path / "lm")))
    eyes = encoder_at(str(encoder_folder("dinov2", tmp_path / "encoder")))
    with pytest.raises(InputError, match="lavit_7b cannot change its encoder"):
        with_encoder(lavit_7b(), eyes)
    for chosen in (nano(), mini()):  # as many pixels for each patch of features as before
        side = chosen.model.pixels.size // chosen.model.vision.grid
        assert with_encoder(chosen, eyes).model.pixels.size == side * eyes.grid


def test_what_is_missing_is_said_before_anything_is_trained(
    toy_run: Path, toy_data: Path, tmp_path: Path
) -> None:
    endless = lm_folder("llama", toy_run, tmp_path / "lm")
    said = json.loads((endless / "tokenizer_config.json").read_text())
    del said["eos_token"]
    (endless / "tokenizer_config.json").write_text(json.dumps(said))
    model = toy_config()
    for language, expected in (
        ({"source": str(encoder_folder("dinov2", tmp_path / "eyes"))}, "dinov2 is no causal LM"),
        ({"source": str(endless)}, "its tokenizer has no end token"),
        ({"source": "base"}, "no language model at .*run/base"),
        ({"lora_rank": 2}, "LoRA adapts a trained language model"),
    ):
        asked = replace(model, language=replace(model.language, **language))
        run = open_run(tmp_path / "run", toy_data, asked, toy_training(1))
        with pytest.raises(InputError, match=expected):
            train_stages(run, ("tokenizer", "language"))
        assert not (run.folder / "cache").exists()
    asked = replace(model, pixels=replace(model.pixels, unet={}))
    run = open_run(tmp_path / "run", toy_data, asked, toy_training(1))
    with pytest.raises(InputError, match="run/decoder holds no diffusion model"):
        train_stages(run)
    assert not (run.folder / "cache").exists()


def test_lora_without_a_layer_to_adapt_is_said_before_anything_is_trained(
    toy_run: Path, toy_data: Path, tmp_path: Path
) -> None:
    """GPT-NeoX names its layers otherwise."""
    own = lm_folder("gpt_neox", toy_run, tmp_path / "lm")
    model = toy_config()
    asked = replace(model, language=replace(model.language, source=str(own), lora_rank=2))
    run = open_run(tmp_path / "run", toy_data, asked, toy_training(1))
    with pytest.raises(InputError, match=r"LoRA finds none of the layers q_proj, .*GPTNeoX"):
        train_stages(run, ("tokenizer", "language"))
    assert not (run.folder / "cache").exists()


def test_a_trained_lm_learns_slowly() -> None:
    own, other = mini(), with_lm(mini(), "some/name")  # a trained LM for a trained one
    assert other.training.language.learning_rate == own.training.language.learning_rate
    before, after = nano(), with_lm(nano(), "some/name")
    expected = before.training.language.learning_rate / 10
    assert after.training.language == replace(before.training.language, learning_rate=expected)
    assert isinstance(after, Preset)
    assert after.model.language.source == "some/name"

"""The decoder with diffusers' own parts: schedulers, sizes, folders, number types."""

import json
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from lavit.config import InputError, PixelsConfig
from lavit.images import ASPECT_SIZES
from lavit.pixels.decoder import Pixels
from test_pixels import (
    built,
    grid_config,
    one_thread,  # noqa: F401
    sd15_config,
    sdxl_config,
    some_features,
)


@pytest.fixture(params=[grid_config, sd15_config, sdxl_config])
def pixels(request: pytest.FixtureRequest) -> Pixels:
    return built(request.param())


def test_another_scheduler_takes_over(pixels: Pixels):
    features, own = some_features(1), pixels.sample(some_features(1), seeds=[1], steps=4)
    for kind in (
        diffusers.EulerDiscreteScheduler,
        diffusers.HeunDiscreteScheduler,
        diffusers.UniPCMultistepScheduler,
    ):
        scheduler = kind.from_config(pixels.scheduler.config)
        found = pixels.sample(features, seeds=[1], steps=4, sampler=scheduler)
        assert found.isfinite().all() and not torch.equal(found, own)


def test_solvers_agree_where_steps_are_many():
    pixels, features = built(grid_config()), some_features(1)
    ddim = pixels.sample(features, seeds=[0], steps=60, guidance=1.0, sampler="ddim")
    dpm = pixels.sample(features, seeds=[0], steps=30, guidance=1.0, sampler="dpm")
    assert (dpm - ddim).abs().mean() < 0.04


def test_bad_requests_are_one_line():
    pixels = built(grid_config())
    for options, says in (
        ({"steps": 0}, "steps is 0"),
        ({"seeds": [1, 2]}, "2 seeds for 1 pictures"),
        ({"size": "5:4"}, "'5:4' is not known: choose one of 1:1, 4:3"),
    ):
        with pytest.raises(InputError, match=says):
            pixels.sample(some_features(1), **{"seeds": [0], **options})


@pytest.mark.parametrize("ratio", ASPECT_SIZES)
def test_ratios_are_the_1024_table_scaled_to_the_decoder(ratio: str):
    height, width = ASPECT_SIZES[ratio]
    config: PixelsConfig = sdxl_config()
    assert built(config).picture_size(ratio) == (height // 16, width // 16)
    object.__setattr__(config, "size", 1024)
    pixels = built(config)
    assert pixels.picture_size(ratio) == (height, width)
    assert pixels.picture_size((30, 50)) == (30, 50) and pixels.picture_size() == (1024, 1024)
    small = built(grid_config(size=64))  # multiples of 4 only
    found = small.picture_size(ratio)
    assert all(side % small.multiple == 0 for side in found)
    assert found[0] / found[1] == pytest.approx(height / width, rel=0.08)
    assert small.sample(some_features(1), seeds=[0], steps=1, size=ratio).shape == (1, 3, *found)


def stable_diffusion_folder(folder: Path, pixels: Pixels, *, tokens: int = 5) -> torch.Tensor:
    """A toy Stable Diffusion: UNet, autoencoder, tokenizer, text encoder; returns its null text."""
    pixels.unet.save_pretrained(folder / "unet")
    pixels.vae.save_pretrained(folder / "vae")
    torch.manual_seed(5)
    width = pixels.config.condition_dim
    sizes = {"vocab_size": 3, "hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    encoder = CLIPTextModel(
        CLIPTextConfig(**sizes, **ids, num_attention_heads=2, max_position_embeddings=tokens)
    ).eval()
    encoder.save_pretrained(folder / "text_encoder")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text(
        '{"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}'
    )
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": tokens,
                "pad_token": "<|endoftext|>",
            }
        )
    )
    with torch.no_grad():
        return encoder(torch.tensor([[0] + [1] * (tokens - 1)])).last_hidden_state[0]


def test_training_begins_with_the_weights_of_a_diffusers_folder(tmp_path: Path):
    given = built(sd15_config())
    null = stable_diffusion_folder(tmp_path, given)
    config = sd15_config(start_from=str(tmp_path), unet={}, vae={"_class_name": "AutoencoderKL"})
    started = Pixels.build(config)
    for part in ("unet", "vae"):
        theirs = getattr(given, part).state_dict()
        assert all(
            torch.equal(tensor, theirs[name])
            for name, tensor in getattr(started, part).state_dict().items()
        )
    torch.testing.assert_close(started.condition.null_context, null)
    loss = started(
        torch.randn(2, 4, 8, 8), some_features(2), generator=torch.Generator().manual_seed(0)
    )
    loss.backward()
    assert started.condition.to_context.weight.grad.any()
    with pytest.raises(
        InputError, match=r"null text is \[5, 10\], this configuration expects \[6, 10\]"
    ):
        Pixels.build(replace(config, null_tokens=6))
    (tmp_path / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no tokenizer/ and text_encoder/"):
        Pixels.build(config)
    assert Pixels.build(replace(config, unconditional="learned")).unet is not None
    with pytest.raises(InputError, match="is missing"):
        Pixels.build(replace(config, start_from=str(tmp_path / "nowhere")))


def test_our_clipping_is_diffusers_thresholding_at_one():
    noise = {"_class_name": "DDIMScheduler", "prediction_type": "sample", "clip_sample": True}
    pixels = built(grid_config(scheduler=noise))
    with torch.no_grad():
        pixels.unet.conv_out.weight.mul_(20)  # far over the bound
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(pixels.solver().config)
    ours, expected = (
        pixels.sample(some_features(1), seeds=[0], sampler=s) for s in ("dpm", theirs)
    )
    assert torch.equal(ours, expected) and float((ours.abs() == 1).float().mean()) > 0.1


def test_mixed_precision_trains(pixels: Pixels):
    side = pixels.latent_channels
    latents = torch.randn(2, side, 8, 8, generator=torch.Generator().manual_seed(0))

    def loss() -> torch.Tensor:
        return pixels.train()(latents, some_features(2), generator=torch.Generator().manual_seed(1))

    full = loss()
    with torch.autocast("cpu", torch.bfloat16):
        half = loss()
    half.backward()
    assert half.dtype == torch.float32 and half.item() == pytest.approx(full.item(), rel=0.05)
    assert all(
        p.grad is None or (p.dtype == torch.float32 and p.grad.isfinite().all())
        for p in pixels.parameters()
    )

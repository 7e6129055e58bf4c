"""The decoder as a diffusers pipeline: same pictures, callbacks, schedulers, offload, folders."""

import json
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from lavit.config import InputError, PixelsConfig
from lavit.generate.diffusion import PixelsPipeline
from lavit.images import ASPECT_SIZES, to_image
from lavit.modules.pixels import Pixels
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


def quiet(pixels: Pixels) -> PixelsPipeline:
    pipe = PixelsPipeline.of(pixels)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_pipeline_paints_the_pictures_of_sample(pixels: Pixels):
    features = some_features(2)
    expected = pixels.sample(features, seeds=[3, 4])
    pipe = quiet(pixels)
    assert torch.equal(pipe(features, seeds=[3, 4], output_type="pt").images, expected / 2 + 0.5)
    images = pipe(features, seeds=[3, 4]).images
    assert [image.tobytes() for image in images] == [
        to_image(picture).tobytes() for picture in expected
    ]
    size = (32, 24)
    other = pipe(
        features[:1], num_inference_steps=1, guidance_scale=1.0, size=size, output_type="pt"
    ).images
    expected = pixels.sample(features[:1], seeds=[0], steps=1, guidance=1.0, size=size)
    assert torch.equal(other, expected / 2 + 0.5)


def test_another_scheduler_takes_over(pixels: Pixels):
    features, pipe = some_features(1), quiet(pixels)
    assert isinstance(pipe.scheduler, type(pixels.solver()))
    for kind in (
        diffusers.EulerDiscreteScheduler,
        diffusers.HeunDiscreteScheduler,
        diffusers.UniPCMultistepScheduler,
    ):
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
        found = pipe(features, seeds=[1], num_inference_steps=2, output_type="pt").images
        expected = pixels.sample(features, seeds=[1], steps=2, sampler=pipe.scheduler)
        assert torch.equal(found, expected / 2 + 0.5) and found.isfinite().all()


def test_solvers_agree_where_steps_are_many():
    pixels, features = built(grid_config()), some_features(1)
    pipe = quiet(pixels)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    ddim = pipe(features, num_inference_steps=60, guidance_scale=1.0, output_type="pt").images
    pipe.scheduler = pixels.solver("dpm")
    dpm = pipe(features, num_inference_steps=30, guidance_scale=1.0, output_type="pt").images
    assert (dpm - ddim).abs().mean() < 0.02


def test_callback_sees_every_step_and_may_change_the_latents():
    pixels, features, seen = built(grid_config()), some_features(1), []
    pipe = quiet(pixels)

    def look(pipeline, step, time, given):
        seen.append((pipeline is pipe, step, int(time), tuple(given["latents"].shape)))
        return {}

    def blank(pipeline, step, time, given):
        return {"latents": torch.zeros_like(given["latents"])}

    pipe(features, callback_on_step_end=look)
    times = pixels.solver().timesteps.tolist()
    assert seen == [(True, step, time, (1, 12, 8, 8)) for step, time in enumerate(times)]
    assert not (pipe(features, callback_on_step_end=blank, output_type="pt").images - 0.5).any()


def test_progress_bar_counts_the_steps(capsys: pytest.CaptureFixture[str]):
    pipe = PixelsPipeline.of(built(grid_config()))
    pipe(some_features(1), num_inference_steps=5)
    assert "5/5" in capsys.readouterr().err


def test_offload_moves_parts_in_and_out(pixels: Pixels):
    """The hooks run without a GPU too: parts go to the execution device one after the other."""
    features, pipe, order = some_features(1), quiet(pixels), []
    expected = pixels.sample(features, seeds=[0])
    pipe.enable_model_cpu_offload(device="cpu")
    for name in ("unet", "vae"):
        part = getattr(pipe, name)
        if part is not None:
            hook, name_ = part._hf_hook, name
            before = hook.pre_forward

            def note(*args, name_=name_, before=before, **options):
                order.append(name_)
                return before(*args, **options)

            hook.pre_forward = note
    assert torch.equal(pipe(features, seeds=[0], output_type="pt").images, expected / 2 + 0.5)
    assert order[0] == "unet" and ("vae" in order) == (pixels.vae is not None)


def test_saved_folder_opens_in_diffusers_and_as_a_pipeline(pixels: Pixels, tmp_path: Path):
    pipe, features = quiet(pixels), some_features(1)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    saved = type(pixels.unet).from_pretrained(tmp_path / "unet").config
    assert saved.out_channels == pixels.unet.config.out_channels
    if pixels.vae is not None:
        assert diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae").config.latent_channels == 4
    back = PixelsPipeline.from_pretrained(tmp_path, config=pixels.config)
    back.set_progress_bar_config(disable=True)
    expected = pixels.sample(features, seeds=[0])
    assert torch.equal(back(features, output_type="pt").images, expected / 2 + 0.5)


def test_bad_requests_are_one_line():
    pipe = quiet(built(grid_config()))
    for options, says in (
        ({"output_type": "np"}, "output_type is 'np'"),
        ({"num_inference_steps": 0}, "steps is 0"),
        ({"seeds": [1, 2]}, "2 seeds for 1 pictures"),
        ({"size": "5:4"}, "'5:4' is not known: choose one of 1:1, 4:3"),
    ):
        with pytest.raises(InputError, match=says):
            pipe(some_features(1), **options)


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

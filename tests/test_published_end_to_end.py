"""Toy SD 1.5 and SDXL folders in the form of the real ones: converted, loaded, drawn with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image

import lavit
from conftest import toy_picture
from lavit.cli import main
from lavit.generate.pipeline import Pipeline
from lavit.generate.safety import FOLDER
from lavit.images import ASPECT_SIZES
from lavit.pixels.diffusion import STABLE_DIFFUSION_NOISE, options
from test_convert import folder as toy_published  # noqa: F401 (a fixture)
from test_pixels import one_thread  # noqa: F401 (a fixture)
from test_safety import forbid, toy_checker

SCALE = 4  # pictures of the toy are so many times smaller
# the UNets' real configurations with a twentieth of their channels
SD15 = {
    "sample_size": 64,
    "block_out_channels": (16, 32, 64, 64),
    "down_block_types": (
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    ),
    "up_block_types": (
        "UpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
    ),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (16, 32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2048,
    "attention_head_dim": (2, 4, 8),
    "transformer_layers_per_block": (1, 2, 3),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "norm_num_groups": 8,
}


def write_decoder(folder: Path, unet: dict, *, scaling: float, upcast: bool) -> None:
    """unet/ (a pickle), vae/ and scheduler/ in place of what is there."""
    for part in ("unet", "vae", "scheduler"):
        shutil.rmtree(folder / part)
    torch.manual_seed(2)
    UNet2DConditionModel(layers_per_block=2, **unet).save_pretrained(
        folder / "unet", safe_serialization=False
    )
    AutoencoderKL(
        block_out_channels=(8, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
        scaling_factor=scaling,
        force_upcast=upcast,
    ).save_pretrained(folder / "vae")
    DDIMScheduler(**options(STABLE_DIFFUSION_NOISE)).save_pretrained(folder / "scheduler")


@pytest.fixture(scope="module")
def published(toy_published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A published folder with both decoders and the safety checker, as a pickle."""
    folder = tmp_path_factory.mktemp("folder") / "published"
    shutil.copytree(toy_published, folder)
    write_decoder(folder / "pixel_decoding", SD15, scaling=0.18215, upcast=False)
    write_decoder(folder / "highres_pixel_decoding", SDXL, scaling=0.13025, upcast=True)
    checker = toy_checker()
    (folder / "pixel_decoding" / FOLDER).mkdir()
    checker.config.save_pretrained(folder / "pixel_decoding" / FOLDER)
    torch.save(checker.state_dict(), folder / "pixel_decoding" / FOLDER / "pytorch_model.bin")
    return folder


def shrink(folder: Path) -> None:
    """Smaller pictures and two steps: all that is set by hand here."""
    config = json.loads((folder / "config.json").read_text())
    config["pixels"] |= {"size": config["pixels"]["size"] // SCALE, "steps": 2}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def converted(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "lavit"
    main(["convert", "published", str(published), "--out", str(out)])
    for place in (out, out / "highres"):
        assert json.loads((place / "config.json").read_text())["pixels"]["safety"] is True
        shrink(place)
    return out


@pytest.fixture(scope="module")
def low(converted: Path) -> Pipeline:
    return lavit.load(converted)


@pytest.fixture(scope="module")
def high(converted: Path) -> Pipeline:
    return lavit.load(converted / "highres")


def test_sd15_reconstructs_and_draws_through_the_checker(low: Pipeline):
    assert low.model.pixels.config.unconditional == "text" and low.model.pixels.factor == 8
    picture = toy_picture("red square")
    back = low.reconstruct(picture, seed=3)
    assert back.size == (128, 128) and low.release.checker is not None
    assert back.tobytes() == low.reconstruct(picture, seed=3).tobytes()
    assert back.tobytes() != low.reconstruct(picture, seed=4).tobytes()
    drawn = low.draw(["w1 w2"] * 2, seed=1)
    assert [image.size for image in drawn] == [(128, 128)] * 2


@pytest.mark.parametrize("ratio", ASPECT_SIZES)
def test_sdxl_reconstructs_at_all_six_aspect_ratios(high: Pipeline, ratio: str):
    ids = []
    hook = high.model.pixels.unet.register_forward_pre_hook(
        lambda module, args, kwargs: ids.append(
            kwargs["added_cond_kwargs"]["time_ids"][0].tolist()
        ),
        with_kwargs=True,
    )
    back = high.reconstruct(toy_picture("blue dot"), size=ratio)
    hook.remove()
    height, width = (side // SCALE for side in ASPECT_SIZES[ratio])
    assert back.size == (width, height)
    assert ids == [[height, width, 0, 0, height, width]] * 2
    assert (
        back.tobytes() == high.reconstruct(toy_picture("blue dot"), size=(height, width)).tobytes()
    )


def test_the_command_line_draws_in_a_ratio(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model, out = str(converted / "highres"), tmp_path / "drawn.png"
    main(["draw", "w3 w4", "--out", str(out), "--model", model, "--size", "4:3"])
    with Image.open(out) as drawn:
        assert drawn.size == (1152 // SCALE, 896 // SCALE)
    toy_picture("red bar").save(tmp_path / "in.png")
    for verb in (
        ["reconstruct", str(tmp_path / "in.png")],
        ["edit", str(tmp_path / "in.png"), "w5"],
    ):
        main([*verb, "--out", str(out), "--model", str(converted), "--size", "16:9"])
        with Image.open(out) as drawn:
            assert drawn.size == (168, 96)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["draw", "w3", "--out", str(out), "--model", model, "--size", "5:4"])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.splitlines()[-1].startswith(
        "lavit: aspect ratio '5:4' is not known: choose one of 1:1, 4:3, 3:2"
    )


def test_a_refused_drawing_is_reported_and_the_others_are_kept(
    converted: Path, low: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "model"
    shutil.copytree(converted, folder, symlinks=True)
    drawn = low.draw(["w1 w2"] * 2, seed=5)
    free = [picture.tobytes() for picture in drawn]
    checker = toy_checker()
    forbid(checker, drawn[1], drawn[0])
    shutil.rmtree(folder / FOLDER)
    checker.save_pretrained(folder / FOLDER)
    command = [
        "draw",
        "w1 w2",
        "--n",
        "2",
        "--seed",
        "5",
        "--out",
        str(tmp_path / "d.png"),
        "--model",
        str(folder),
    ]
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2 and "refused 1 of 2 pictures (seed 6)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("*.png")] == ["d-0.png"]
    with Image.open(tmp_path / "d-0.png") as kept:
        assert kept.tobytes() == free[0]
    main([*command, "--no-safety"])
    with Image.open(tmp_path / "d-1.png") as switched_off:
        assert switched_off.tobytes() == free[1]


def test_published_weights_without_their_checker_stop_before_they_draw(
    converted: Path, tmp_path: Path
):
    folder = tmp_path / "model"
    shutil.copytree(converted, folder, symlinks=True)
    shutil.rmtree(folder / FOLDER)
    with pytest.raises(lavit.config.InputError, match="hf download"):
        lavit.load(folder).draw("w1")
    assert lavit.load(folder, safety=False).draw("w1").size == (128, 128)
    # reading needs no checker
    assert lavit.load(folder).caption(toy_picture("red dot")) is not None

"""The safety checker judges by (toy) weights; refusals, missing folders, switches are reported."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from conftest import toy_config, toy_picture
from lavit.config import InputError
from lavit.generate.pipeline import Pipeline
from lavit.generate.safety import FOLDER, Refused, Release, SafetyChecker, release_of, watermarked
from lavit.images import pixels
from lavit.model import LaVIT

SIDE = 32


def toy_checker(*, threshold: float = 2.0) -> StableDiffusionSafetyChecker:
    """Random weights; refused where the cosine to any concept is over `threshold` (2: never)."""
    torch.manual_seed(0)
    common = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
    }
    vision = common | {"image_size": SIDE, "patch_size": 8, "projection_dim": 6}
    text = common | {"vocab_size": 8, "bos_token_id": 0, "eos_token_id": 1}
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(vision_config=vision, text_config=text, projection_dim=6)
    )
    # so that pictures lie apart
    checker.vision_model.embeddings.patch_embedding.weight.data.mul_(20)
    for tensor in (checker.concept_embeds, checker.special_care_embeds):
        tensor.data.normal_()
    checker.concept_embeds_weights.data.fill_(threshold)
    checker.special_care_embeds_weights.data.fill_(2.0)
    return checker.eval()


def forbid(checker: StableDiffusionSafetyChecker, bad: Image.Image, good: Image.Image) -> None:
    """Make what `bad` has and `good` has not the unwanted concept."""
    squares = [picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for picture in (bad, good)]
    with torch.no_grad():
        inside = checker.vision_model(pixels(squares, SIDE, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))[1]
        wrong, right = torch.nn.functional.normalize(
            checker.visual_projection(inside), dim=-1
        ).double()
        apart = wrong - (wrong @ right) * right
    assert apart.norm() > 0.01  # the checker rounds cosines to 0.001
    checker.concept_embeds.data[3] = apart / apart.norm()
    checker.concept_embeds_weights.data[3] = float(apart.norm()) / 2


def old_names(folder: Path) -> None:
    """Rewrite a saved checker under the names of the published files."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    renamed = {
        f"vision_model.{n}" if n.startswith("vision_model.") else n: t for n, t in tensors.items()
    }
    renamed["vision_model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(renamed, path, metadata={"format": "pt"})


def test_the_forbidden_picture_alone_is_refused_and_not_painted_black():
    checker = toy_checker()
    good, bad = toy_picture("green bar"), toy_picture("red dot")
    forbid(checker, bad, good)
    ours = SafetyChecker(checker)
    assert ours.refused([good, bad, good]) == [False, True, False]
    with pytest.raises(Refused, match=r"refused 1 of 3 pictures \(seed 8\)") as refusal:
        Release(ours)([good, bad, good], [7, 8, 9])
    assert [None if p is None else p.tobytes() for p in refusal.value.pictures] == [
        good.tobytes(),
        None,
        good.tobytes(),
    ]
    passed = Release(ours)([good], [7])
    assert passed[0].tobytes() == good.tobytes()
    assert Release()([bad], [1])[0].tobytes() == bad.tobytes()


def test_pictures_enter_as_clips_processor_has_them():
    checker, seen = toy_checker(), []
    checker.vision_model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    picture = toy_picture("red square", 64)
    SafetyChecker(checker).refused([picture, picture.crop((0, 8, 64, 56))])
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    expected = processor(picture, return_tensors="pt").pixel_values
    torch.testing.assert_close(seen[0][:1], expected, atol=1e-5, rtol=1e-5)
    assert seen[0].shape == (2, 3, SIDE, SIDE)


@pytest.mark.parametrize("published", [False, True])
def test_saved_checkers_load_under_todays_names_and_the_published_ones(
    tmp_path: Path, published: bool
):
    checker = toy_checker()
    checker.save_pretrained(tmp_path)
    if published:
        old_names(tmp_path)
    loaded = SafetyChecker.load(tmp_path).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in checker.state_dict().items())


def model_in(folder: Path, *, safety: bool) -> LaVIT:
    config = toy_config()
    return LaVIT(replace(config, pixels=replace(config.pixels, safety=safety)), folder=folder)


def test_a_missing_checker_says_how_to_get_it_and_how_to_do_without(tmp_path: Path):
    with pytest.raises(InputError) as error:
        release_of(model_in(tmp_path, safety=True))
    for words in (
        str(tmp_path / FOLDER),
        "hf download",
        f"--local-dir {tmp_path}`",
        "safety=False",
        "--no-safety",
    ):
        assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert release_of(model_in(tmp_path, safety=True), safety=False).checker is None
    assert release_of(model_in(tmp_path, safety=False)).checker is None
    with pytest.raises(InputError, match="hf download"):
        release_of(model_in(tmp_path, safety=False), safety=True)
    with pytest.raises(InputError, match="without a folder"):
        release_of(LaVIT(model_in(tmp_path, safety=True).config))
    toy_checker().save_pretrained(tmp_path / FOLDER)
    assert release_of(model_in(tmp_path, safety=True)).checker is not None


def test_an_empty_watermark_is_refused(tmp_path: Path) -> None:
    """A shell's variable that is not set: who asks for a mark must not get pictures without."""
    with pytest.raises(InputError, match="the watermark is empty"):
        Pipeline(model_in(tmp_path, safety=False), watermark="")


def test_a_damaged_checker_is_never_skipped(tmp_path: Path):
    toy_checker().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file(
        {n: t for n, t in tensors.items() if n != "concept_embeds"}, path, metadata={"format": "pt"}
    )
    with pytest.raises(InputError, match="does not fit its own configuration: concept_embeds"):
        SafetyChecker.load(tmp_path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match="cannot be read"):
        SafetyChecker.load(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        SafetyChecker.load(tmp_path)


def test_a_watermark_without_its_package_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "imwatermark", None)
    with pytest.raises(InputError, match=r"lavit\[watermark\]"):
        watermarked(toy_picture("red dot"), "made by LaVIT")
    with pytest.raises(InputError, match=r"lavit\[watermark\]"):
        Release(watermark="made by LaVIT")([toy_picture("red dot")], [0])

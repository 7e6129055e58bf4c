"""What people call, on a toy run: every verb, one or many inputs, the same tokens alone and in a batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

import lavit
from conftest import NAMES, toy_picture
from lavit.config import InputError
from lavit.generate.pipeline import Pipeline
from lavit.visualize import kept_over, sheet


@pytest.fixture(scope="module")
def pipeline(toy_run: Path) -> Pipeline:
    return lavit.load(toy_run)


def test_tokens_are_the_same_twice_alone_and_in_a_batch(pipeline: Pipeline) -> None:
    images = [toy_picture(name) for name in NAMES]
    together = pipeline.tokenize(images)
    for image, codes, keep in zip(images, together.split(), together.keep, strict=True):
        for alone in (pipeline.tokenize(image), pipeline.tokenize(image)):
            assert alone.codes.equal(codes) and alone.keep[0].equal(keep)


@pytest.mark.parametrize(("keep", "length"), [(5, 5), (0.5, 8), ("all", 16), ("top_k:3", 3), ("random:0.25", 4)])
def test_keep_sets_the_number_of_tokens(pipeline: Pipeline, keep: str | int | float, length: int) -> None:
    assert pipeline.tokenize(toy_picture("red dot"), keep=keep).lengths.tolist() == [length]


def test_captions_of_one_and_of_many_agree(pipeline: Pipeline) -> None:
    images = [toy_picture(name) for name in NAMES[:3]]
    assert pipeline.caption(images) == [pipeline.caption(image) for image in images]


def test_a_loaded_caption_needs_no_pixel_decoder(toy_run: Path) -> None:
    fresh = lavit.load(toy_run)
    fresh.caption(toy_picture("red bar"))
    assert "pixels" not in fresh.model.parts


def test_questions_are_answered_one_by_one(pipeline: Pipeline) -> None:
    image = toy_picture("red bar")
    assert pipeline.ask([image, image], ["What is it?", "Is it red?"]) == [
        pipeline.ask(image, "what is it?"),
        pipeline.ask(image, "is it red?"),
    ]
    with pytest.raises(InputError, match="2 pictures but 1 questions"):
        pipeline.ask([image, image], "what is it?")


def test_drawing_is_a_function_of_the_seed(pipeline: Pipeline) -> None:
    four = pipeline.draw("red square", n=4, seed=3, steps=2)
    again = [pipeline.draw("red square", seed=3 + i, steps=2)[0] for i in range(4)]
    assert [image.tobytes() for image in four] == [image.tobytes() for image in again]
    assert four[0].size == (16, 16)
    assert len({image.tobytes() for image in four}) > 1


def test_pictures_and_words_may_be_mixed(pipeline: Pipeline) -> None:
    source = toy_picture("blue dot")
    edited = pipeline.edit(source, "as a bar", steps=2)[0]
    mixed = pipeline.generate([source, "and", toy_picture("red bar"), "together"], steps=2)[0]
    assert edited.size == mixed.size == (16, 16)


def test_reconstruction_needs_no_language_model(toy_run: Path) -> None:
    fresh = lavit.load(toy_run)
    assert fresh.reconstruct(toy_picture("red bar"), steps=2).size == (16, 16)
    assert "language" not in fresh.model.parts


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.draw(" "), "prompt is empty"),
        (lambda p: p.ask(toy_picture("red dot"), "?!"), "question"),
        (lambda p: p.draw("red", n=0), "n is 0"),
        (lambda p: p.draw("red", guidance=-1.0), "guidance"),
        (lambda p: p.caption([]), "at least one picture"),
        (lambda p: p.caption("nowhere.png"), "nowhere.png"),
        (lambda p: p.draw("red", steps=-2), "steps"),
        (lambda p: p.tokenize(toy_picture("red dot"), keep="most"), "keep"),
        (lambda p: p.draw("red " * 300), "shorten"),
    ],
)
def test_bad_input_says_what_was_wrong(pipeline: Pipeline, call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(pipeline)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, toy_run: Path) -> None:
    with pytest.raises(InputError, match="no model"):
        lavit.load(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"config\.json"):
        lavit.load(tmp_path)
    (tmp_path / "config.json").write_text((toy_run / "config.json").read_text())
    with pytest.raises(InputError, match="incomplete"):
        lavit.load(tmp_path).tokenize(toy_picture("red dot"))


def test_pictures_about_pictures() -> None:
    keep = torch.zeros(16, dtype=torch.bool)
    keep[5] = True
    shown = kept_over(Image.new("RGB", (40, 30), (10, 200, 10)), keep, size=64)
    assert shown.size == (64, 64)
    assert shown.getpixel((24, 24)) == (10, 200, 10)
    assert shown.getpixel((40, 40)) != (10, 200, 10)
    assert sheet([[shown, "a text"], [shown]], cell=32).size == (2 * 38 + 6, 2 * 38 + 6)

"""The loop and its three stages: learning, resuming, refusing, and what stops a failing run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import NAMES, toy_config, toy_training
from lavit.config import InputError
from lavit.data.corpus import load_corpus
from lavit.data.documents import Documents
from lavit.data.features import compute_features
from lavit.images import pixels
from lavit.model import LaVIT
from lavit.modules.tokenizer import cosine_distance
from lavit.modules.vision import Vision
from lavit.train.batches import draw_pictures
from lavit.train.health import Alarm, CodeUse, check_codes, check_selector
from lavit.train.language import train_text_tokenizer
from lavit.train.loop import Report, schedule
from lavit.train.run import Run
from lavit.vocabulary import Vocabulary


def losses(run: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["stage"], line["step"], line["loss"], line["gradient_norm"]) for line in lines]


def test_a_run_is_a_model_folder(toy_run: Path, toy_data: Path) -> None:
    model = LaVIT.from_pretrained(toy_run)
    pictures = load_corpus(toy_data).pictures
    codes = model.encode_images([picture.record.open() for picture in pictures])
    assert model.pixels.config == toy_config().pixels
    assert int(codes.lengths.min()) >= 1


def test_a_killed_run_goes_on_to_the_same_losses(toy_data: Path, toy_run: Path, tmp_path: Path) -> None:
    """Killed once in each stage, at a step that has no checkpoint."""
    killed: set[str] = set()

    def kill(report: Report) -> None:
        if report.step == 6 and report.stage not in killed:
            killed.add(report.stage)
            raise KeyboardInterrupt

    training = replace(toy_training(), checkpoint_every=4)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            Run(tmp_path / "run", toy_data, toy_config(), training, watch=kill).train()
    Run(tmp_path / "run", toy_data, toy_config(), training).train()
    assert killed == {"tokenizer", "language", "pixels"}
    assert losses(tmp_path / "run")[-1] == losses(toy_run)[-1]
    for part in ("visual_tokenizer", "language", "reader"):
        a, b = ((folder / part / "model.safetensors").read_bytes() for folder in (tmp_path / "run", toy_run))
        assert a == b, part


def test_a_run_goes_on_from_a_model(toy_run: Path, toy_data: Path, tmp_path: Path) -> None:
    """Its tokens stay what they are; language and pixels begin where the other's ended."""
    config = LaVIT.from_pretrained(toy_run).config
    Run(tmp_path / "run", toy_data, config, toy_training(), start=toy_run).train()
    stages = ("language", "pixels")
    for part in ("visual_tokenizer", "language"):
        a, b = ((folder / part / "model.safetensors").read_bytes() for folder in (tmp_path / "run", toy_run))
        assert (a == b) is (part == "visual_tokenizer")
    for stage in stages:
        before, after = (
            [loss for one, _, loss, _ in losses(run) if one == stage] for run in (toy_run, tmp_path / "run")
        )
        assert after[0] < before[0] and len(after) == len(before)
    with pytest.raises(InputError, match="other settings"):
        Run(tmp_path / "run", toy_data, config, toy_training())


def test_other_settings_on_the_same_folder_are_refused(toy_run: Path, toy_data: Path) -> None:
    with pytest.raises(InputError, match="other settings"):
        Run(toy_run, toy_data, toy_config(), toy_training(7))


def test_stage_one_learns_and_its_codes_live(toy_data: Path, tmp_path: Path) -> None:
    training = toy_training()
    stage = replace(training.tokenizer, steps_a=60, steps_b=60)
    run = Run(tmp_path, toy_data, toy_config(), replace(training, tokenizer=stage))
    run.train(("tokenizer",))
    patches = run.features.rows(torch.arange(len(NAMES)))
    keep = run.tokenizer.select(patches)
    distance = cosine_distance(run.tokenizer.reconstruct(patches, keep, quantise=True), patches).mean()
    constant = cosine_distance(patches.mean(0).expand_as(patches), patches).mean()
    assert distance < 0.6 * constant
    assert len(run.tokens.codes.unique()) > 8


def test_stage_two_overfits_both_directions(toy_data: Path, tmp_path: Path) -> None:
    training = toy_training()
    stage = replace(training.language, steps=150, unconditional_fraction=0.0, mixture=(1, 1, 0, 0, 0))
    run = Run(tmp_path, toy_data, toy_config(), replace(training, language=stage))
    run.train(("tokenizer", "language"))
    last = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][-10:]
    mean = {name: sum(line[name] for line in last) / len(last) for name in ("text_accuracy", "code_accuracy")}
    assert mean["text_accuracy"] > 0.75  # nobody can know the first word of a prompt
    assert mean["code_accuracy"] > 0.8


def test_documents_fill_their_rows_and_are_functions_of_the_step(toy_data: Path) -> None:
    corpus = load_corpus(toy_data)
    codes = tuple(tuple(range(1 + n % 5)) for n in range(len(corpus)))
    text = train_text_tokenizer(corpus, 300)
    config = replace(toy_training().language, rows=4, tokens=256)
    vocabulary = Vocabulary(text_size=len(text), codes=32, end=text.eos_token_id)
    make = {"text": text, "vocabulary": vocabulary, "config": config}
    first, second = (Documents(corpus, codes, seed=3, **make) for _ in range(2))
    assert first.batch(5).useful >= 0.98
    assert first.batch(5).ids.equal(second.batch(5).ids)
    assert not first.batch(5).ids.equal(first.batch(6).ids)


def test_every_picture_comes_once_an_epoch() -> None:
    drawn = torch.cat([draw_pictures(10, 4, seed=1, step=step) for step in range(5)])
    assert drawn[:10].sort().values.tolist() == drawn[10:].sort().values.tolist() == list(range(10))


def test_features_are_computed_once(toy_run: Path, toy_data: Path, tmp_path: Path) -> None:
    vision = LaVIT.from_pretrained(toy_run).vision
    records = [picture.record for picture in load_corpus(toy_data).pictures]
    first = compute_features(records, vision, tmp_path)
    config = vision.config
    images = [record.open() for record in records]
    expected = vision(pixels(images, config.image_size, config.mean, config.std))
    assert torch.allclose(first.rows(torch.arange(8)), expected, atol=1e-2)
    pinned = Vision(replace(config, sha256="0"), vision.encoder)  # the same file once its hash is known
    assert compute_features(records, pinned, tmp_path).array.filename == first.array.filename
    assert compute_features(records[1:], vision, tmp_path).array.filename != first.array.filename


def test_schedule_warms_up_and_ends_at_nothing() -> None:
    rates = [schedule(step, 100, 0.1) for step in range(100)]
    assert rates[0] == 0.1 and max(rates) == 1.0 and rates[-1] < 0.01


def test_alarms_say_what_to_change() -> None:
    use = CodeUse(100, window=3)
    use.add(torch.zeros(50, dtype=torch.long))
    assert use.figures()["live_codes"] == 0.01
    with pytest.raises(Alarm, match="k-means"):
        check_codes(use.figures()["live_codes"], 10, steps_with_codes=6, window=3)
    with pytest.raises(Alarm, match="rate weight"):
        check_selector(0.999, 100)


def test_a_broken_picture_is_left_out_and_named(toy_data: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(toy_data, tmp_path / "data")
    (tmp_path / "data" / "train" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    corpus = load_corpus(tmp_path / "data")
    assert len(corpus) == len(NAMES) - 1
    assert len(corpus.broken) == 1 and "3.png" in corpus.broken[0][0]

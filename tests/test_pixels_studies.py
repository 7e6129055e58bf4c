"""The studies of the pixel decoder: the kernel distance by hand, and both verbs on a small random model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import toy_config
from lavit.cli import main
from lavit.config import InputError
from lavit.evaluate.pixels import SOLVERS, HeldOut, cosines, kernel_distances
from lavit.model import LaVIT
from lavit.modules.pixels import Pixels
from lavit.modules.tokenizer import VisualTokenizer
from lavit.modules.vision import load_vision
from test_pixels import one_thread  # noqa: F401 (a fixture)


def by_hand(written: Tensor, real: Tensor) -> float:
    """The unbiased squared distance, pair by pair."""

    def kernel(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    n = len(written)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    inside = sum(kernel(written[i], written[j]) + kernel(real[i], real[j]) for i, j in pairs)
    across = sum(kernel(written[i], real[j]) for i, j in pairs)
    return (inside - 2 * across) / len(pairs)


def test_kernel_distance_is_the_one_by_hand_and_its_values_are_the_jackknifes():
    generator = torch.Generator().manual_seed(0)
    written, real = torch.randn(2, 7, 5, generator=generator)
    values = kernel_distances(written, real)
    assert float(values.mean()) == pytest.approx(by_hand(written, real), rel=1e-4)
    for out in range(7):
        rest = [i for i in range(7) if i != out]
        expected = 7 * by_hand(written, real) - 6 * by_hand(written[rest], real[rest])
        assert float(values[out]) == pytest.approx(expected, rel=1e-4)
    assert float(kernel_distances(real, real).abs().max()) < 1e-6
    with pytest.raises(InputError, match="3 pictures or more"):
        kernel_distances(written[:2], real[:2])


def test_kernel_distance_tells_a_shift_from_chance():
    generator = torch.Generator().manual_seed(1)
    found = {}
    for shift in (0.0, 0.5):
        trials = []
        for _ in range(40):
            written, real = torch.randn(2, 60, 8, generator=generator)
            values = kernel_distances(written + shift, real)
            trials.append((float(values.mean()), float(values.std()) / 60**0.5))
        found[shift] = torch.tensor(trials)
    chance, moved = found[0.0], found[0.5]
    assert abs(float(chance[:, 0].mean())) < 4 * float(chance[:, 0].std()) / 40**0.5  # unbiased
    assert float(moved[:, 0].min()) > float(chance[:, 0].max())
    # the jackknife's error is the one that trials show
    assert float(moved[:, 1].mean()) == pytest.approx(float(moved[:, 0].std()), rel=0.35)


def test_cosine_is_one_on_itself_and_another_picture_has_another_name():
    rows = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(cosines(rows, 3 * rows), torch.ones(4))
    names = ("a", "a", "b", "b")
    held = HeldOut(names, rows, (), rows)
    assert all(names[i] != names[j] for i, j in enumerate(held.elsewhere))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random LaVIT without a language model: enough for pictures → codes → pictures."""
    torch.manual_seed(0)
    config = toy_config()
    tokenizer = VisualTokenizer(config.tokenizer)
    parts = {"vision": load_vision(config.vision), "tokenizer": tokenizer, "pixels": Pixels.build(config.pixels)}
    folder = tmp_path_factory.mktemp("model") / "toy"
    LaVIT(config, parts).eval().save_pretrained(folder, parts=tuple(parts))
    return folder


@pytest.fixture(scope="module")
def data(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same eight pictures as training, held-out and unseen ones."""
    folder = tmp_path_factory.mktemp("splits")
    for split in ("train", "other_hand", "unseen"):
        shutil.copytree(toy_data / "train", folder / split)
    return folder


def study(name: str, model: Path, data: Path, capsys: pytest.CaptureFixture[str], limit: int) -> dict[str, dict]:
    main(["eval", str(model), "--data", str(data), "--study", name, "--limit", str(limit), "--json"])
    return {line["name"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}


def test_steps_study_gives_every_solver_three_figures(model: Path, data: Path, capsys: pytest.CaptureFixture[str]):
    found = study("steps", model, data, capsys, 5)
    assert len(found) == 3 * len(SOLVERS) + 2 * (len(SOLVERS) - 1)
    cosine = found["DPM-Solver++, 12 steps: cosine"]
    assert cosine["count"] == 5 and cosine["low"] <= cosine["value"] <= cosine["high"]
    assert cosine["floor"][0] == "another real picture" and cosine["ceiling"][1] <= 1
    distance = found["DPM-Solver++, 12 steps: KID, encoder of toy"]
    many = found["DDIM, 50 steps: KID, encoder of toy"]
    difference = found["DPM-Solver++, 12 steps minus DDIM, 50 steps: KID, encoder of toy"]
    assert difference["value"] == pytest.approx(distance["value"] - many["value"], abs=1e-3)
    assert found["DDIM, 50 steps: seconds a picture"]["value"] > 0
    assert not any("FID" in name for name in found)


def test_attribution_study_has_four_conditions(model: Path, data: Path, capsys: pytest.CaptureFixture[str]):
    found = study("attribution", model, data, capsys, 4)
    conditions = ("true codes", "another picture's codes", "own codes permuted", "null condition")
    for condition in conditions:
        for metric in ("nearest real picture, top-1", "nearest real picture, top-5", "cosine"):
            assert found[f"{condition}: {metric}"]["count"] == 4
        assert f"{condition}: KID, encoder of toy" in found
    assert len(found) == 4 * 4 + 3 * 2
    assert found["another picture's codes: cosine"]["value"] != found["true codes: cosine"]["value"]
    assert found["null condition: cosine"]["value"] != found["true codes: cosine"]["value"]


def test_an_unknown_study_and_too_few_pictures_are_one_line(model: Path, data: Path):
    for words, code in ((["--study", "speed"], 2), (["--study", "steps", "--limit", "2"], 2)):
        with pytest.raises(SystemExit) as stop:
            main(["eval", str(model), "--data", str(data), *words])
        assert stop.value.code == code

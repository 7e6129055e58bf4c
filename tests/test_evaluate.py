"""Figures are what their definitions by hand say."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lavit
from conftest import NAMES, toy_picture
from lavit.config import InputError
from lavit.evaluate.image import Gallery, cosines, embed, hits, kernel_distances, pooled, shrink
from lavit.evaluate.text import WINDOW, perplexity
from lavit.evaluate.tokenizer import code_use, encode_all, lengths, reconstruction

TEXTS = ["the red square is beside the green bar.", "a blue dot and a red bar are on the paper. " * 30, "x"]


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


def test_cosine_is_one_on_itself() -> None:
    rows = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(cosines(rows, 3 * rows), torch.ones(4))


def test_the_nearest_picture_of_a_picture_is_itself(toy_run: Path) -> None:
    model = lavit.load(toy_run).model
    images = [toy_picture(name) for name in NAMES]
    gallery = Gallery(embed(model, images), NAMES)
    assert hits(gallery.nearest(embed(model, images)), NAMES) == [True] * len(NAMES)
    others = gallery.nearest(gallery.features, exclude=range(len(NAMES)))
    assert not any(hits(others, NAMES)) and all(hits(others, NAMES, top=len(NAMES)))
    assert shrink(images[0], 16).size == (16, 16)
    assert torch.allclose(pooled(model.patches(images)), gallery.features, atol=1e-5)


def test_figures_of_a_tokenizer(toy_run: Path) -> None:
    model = lavit.load(toy_run).model
    images = [toy_picture(name) for name in NAMES]
    patches = model.patches(images)
    tokens = encode_all(model.tokenizer, patches)
    assert torch.equal(tokens.codes, model.encode(images).codes)
    found = reconstruction(model.tokenizer, patches, patches.mean(0), where="here")
    constant = (1 - F.cosine_similarity(patches.mean(0).expand_as(patches), patches, dim=-1)).mean()
    assert found.count == len(NAMES) and found.floor[1] == pytest.approx(float(constant), rel=1e-4)
    live, _ = code_use(tokens, model.config.tokenizer.codes, where="here")
    assert live.value == pytest.approx(len(tokens.codes.unique()) / model.config.tokenizer.codes)
    kept, _, follows = lengths(tokens, images, where="here")
    assert kept.value == pytest.approx(float(tokens.keep.float().mean())) and -1 <= follows.value <= 1


@torch.no_grad()
def test_perplexity_is_the_one_by_hand(toy_run: Path) -> None:
    model = lavit.load(toy_run).model
    found = perplexity(TEXTS, model.text, model.language, model.language.lm, where="here")
    sums = {"joint": [0.0, 0], "base": [0.0, 0]}
    for passage in TEXTS[:2]:
        ids = model.text(passage, add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids), WINDOW):
            row = torch.tensor([ids[start : start + WINDOW]])
            hidden = model.language.body(input_ids=row).last_hidden_state[0, :-1]
            text = model.language.text_logits(hidden)
            both = torch.cat([text, model.language.visual_logits(hidden)], -1)
            for name, logits in (("joint", both), ("base", text)):
                sums[name][0] += float(F.cross_entropy(logits, row[0, 1:], reduction="sum"))
                sums[name][1] += row.shape[1] - 1
    assert found.value == pytest.approx(math.exp(sums["joint"][0] / sums["joint"][1]), rel=1e-4)
    assert found.floor is not None
    assert found.floor[1] == pytest.approx(math.exp(sums["base"][0] / sums["base"][1]), rel=1e-4)
    assert found.value > found.floor[1] and found.count == 2  # probability that goes to codes is lost to text

"""Figures of the evaluation are what their definitions by hand say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lavit.data.scenes.parse import parse
from lavit.data.scenes.world import Box, Facts, Group
from lavit.evaluate.allocation import PERMUTATIONS, dealt, gains, mean_length
from lavit.evaluate.copies import is_copy, pixel_distance
from lavit.evaluate.drawing import packed, unpacked
from lavit.evaluate.figures import (
    bootstrapped,
    mean,
    nothing,
    ranks,
    ratio,
    share,
    spearman,
    turned,
)
from lavit.evaluate.kept import Kept
from lavit.evaluate.ladder import above, edge_energy, other_lengths, shuffled_patches
from lavit.evaluate.own import covers
from lavit.evaluate.probes import fit, found_names, patches_in


def test_ranks_and_their_correlation_are_those_by_hand() -> None:
    assert ranks([10, 30, 20, 30]).tolist() == [1, 3.5, 2, 3.5]
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 3, 4, 5], [1, 3, 2, 5, 4]) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert spearman([1, 2, 3], [7, 7, 7]) == 0


def test_a_correlation_that_another_thing_explains_is_gone_when_that_is_held() -> None:
    rng = np.random.default_rng(0)
    area = np.arange(400.0)
    things, tokens = area + rng.normal(0, 40, 400), area + rng.normal(0, 40, 400)
    assert spearman(things, tokens) > 0.9
    assert abs(spearman(things, tokens, area)) < 0.12
    assert spearman(things, things + rng.normal(0, 5, 400), area) > 0.9


def test_a_ratio_has_the_bootstraps_interval_and_never_another() -> None:
    over, under = [1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]
    figure = ratio(over, under)
    assert figure.value == 1 and figure.low < 1 < figure.high and figure.count == 4
    assert figure == ratio(over, under)
    assert ratio([1.0], [0.0]).value == 0
    steady = bootstrapped(lambda at: 3.0, 5)
    assert (steady.low, steady.value, steady.high) == (3, 3, 3)


def test_an_entry_says_numbers_and_what_they_are() -> None:
    entry = share([True, False], floor=("chance", 0.1), details={"x": 1 / 3}).entry()
    assert entry["value"] == 0.5 and entry["floor"] == 0.1 and entry["floor_is"] == "chance"
    assert entry["ceiling"] is None and entry["details"] == {"x": 0.3333333}
    assert nothing("no font").entry()["reason"] == "no font"
    assert nothing("no font").entry()["value"] is None
    assert mean([0.0, 0.0, 1.0], within=(0.0, 1.0)).low == 0
    assert math.isfinite(mean([5.0, 7.0]).high)


def by_hand(length: int, need: int) -> float:
    """A picture loses a tenth for each token that it lacks."""
    return 0.1 + 0.1 * max(0, need - length)


def test_allocation_gains_nothing_where_all_lengths_are_equal() -> None:
    lengths = [5] * 8
    lost, middle = gains(lambda i, length: by_hand(length, i), lengths, dealt(lengths))
    assert lost == [0.0] * 8
    assert ratio(lost, middle).value == ratio(lost, middle).high == 0


def test_allocation_gain_of_two_pictures_by_hand() -> None:
    needs, lengths = [2, 6], [2, 6]
    orders = np.array([[6, 2], [2, 6]])  # exchanged, and as they are
    lost, middle = gains(lambda i, length: by_hand(length, needs[i]), lengths, orders)
    assert lost == pytest.approx([0.0, 0.2])  # the second lacks four tokens in one order of two
    assert mean_length(lengths) == 4 and middle == pytest.approx([0.1, 0.3])
    assert ratio(lost, middle).value == pytest.approx(0.1 / 0.2)
    wrong, _ = gains(lambda i, length: by_hand(length, needs[i]), [6, 2], orders)
    assert sum(wrong) < 0  # lengths dealt out the wrong way round are worse than chance


def test_lengths_are_dealt_out_inside_groups() -> None:
    lengths, groups = [1, 2, 3, 10, 20, 30], [0, 0, 0, 1, 1, 1]
    orders = dealt(lengths, groups)
    assert orders.shape == (PERMUTATIONS, 6)
    assert all(sorted(row[:3]) == [1, 2, 3] and sorted(row[3:]) == [10, 20, 30] for row in orders)
    everywhere = dealt(lengths)
    assert all(sorted(row) == sorted(lengths) for row in everywhere)
    assert any(set(row[:3]) != {1, 2, 3} for row in everywhere)
    assert (everywhere == dealt(lengths)).all()


def test_patches_of_a_box_are_those_whose_centres_it_holds() -> None:
    assert patches_in(Box(0.25, 0.25, 0.5), 4) == [0, 1, 4, 5]
    assert patches_in(Box(0.9, 0.1, 0.02), 4) == [3]  # none inside: the nearest


def test_a_probe_learns_what_can_be_told_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    rows = torch.eye(3)[labels] * 5 + torch.randn(90, 3, generator=generator) * 0.3
    probe = fit(rows, labels, 3)
    assert all(probe.right(rows, labels))
    assert torch.equal(probe.weight, fit(rows, labels, 3).weight)


def test_names_are_found_wherever_they_are_written() -> None:
    names = ("owl", "pear", "star")
    corners = torch.eye(4)
    probe = fit(corners.repeat(20, 1) * 6, torch.arange(4).repeat(20), 4)  # the last is nothing
    features = corners[3].repeat(81, 1) * 6
    features[:27] = corners[1] * 6  # a pear in the upper third
    wanted = Facts(
        "white", "plain", frozenset({Group("pear", 1, "small"), Group("owl", 1, "small")})
    )
    only = Facts("white", "plain", frozenset({Group("pear", 1, "small")}))
    features[54:] = corners[0] * 6  # an owl in the lower
    assert found_names(probe, features, wanted, names, 9) == 1
    features[54:] = corners[3] * 6
    assert found_names(probe, features, wanted, names, 9) in (0.5, 1)
    assert found_names(probe, features, only, names, 9) == 1
    stars = Facts("white", "plain", frozenset({Group("star", 2, "small")}))
    assert found_names(probe, features, stars, names, 9) == 0


def test_a_copy_is_nearer_than_renders_are() -> None:
    def grey(level: int) -> Image.Image:
        return Image.new("RGB", (8, 8), (level,) * 3)

    assert pixel_distance(grey(10), grey(13)) == 3
    training, renders = [grey(100)], [grey(100 + n) for n in range(10, 50)]
    assert is_copy(grey(101), training, renders)
    assert not is_copy(grey(130), training, renders)
    assert is_copy(grey(130), [grey(100), grey(130)], renders)


def test_selections_that_know_nothing_keep_as_many_patches() -> None:
    values = np.array([[9.0, 8, 1, 1], [1, 1, 1, 7]])
    assert above(values, 1.5).tolist() == [2, 1]
    picture = Image.new("RGB", (40, 40), "white")
    picture.paste("black", (0, 0, 15, 15))
    energy = edge_energy(picture, 2)
    assert energy[0] > 0 and energy[3] == 0
    lengths = other_lengths(torch.randn(6, 4, 3), [picture] * 6, 2, 2.0)
    assert set(lengths["strided"]) == {2.0} and lengths["feature_norm"].sum() == pytest.approx(
        12, abs=1
    )


def test_shuffling_moves_patches_and_loses_none() -> None:
    pixels = np.arange(48 * 48 * 3, dtype=np.int64).reshape(48, 48, 3) % 251
    picture = Image.fromarray(pixels.astype(np.uint8))
    mixed = shuffled_patches(picture, 4, np.random.default_rng(0))
    assert sorted(np.asarray(mixed).ravel()) == sorted(np.asarray(picture).ravel())
    assert mixed.tobytes() != picture.tobytes()
    again = unpacked(packed(picture))
    assert again.tobytes() == picture.tobytes()


def test_items_stand_in_anothers_place() -> None:
    assert turned([1, 2, 3, 4, 5, 6]) == [5, 6, 1, 2, 3, 4]
    assert turned([1, 2, 3, 4]) == [2, 3, 4, 1]  # four places on would be itself


def test_a_caption_covers_facts_that_say_less() -> None:
    wanted = parse("a small owl")
    assert wanted is not None
    assert covers("a small owl on a plain blue background.", wanted)
    assert not covers("a big owl on a plain blue background.", wanted)
    assert not covers("two small owls on a plain blue background.", wanted)
    assert not covers("a small owl and a small red star.", wanted)
    assert not covers("an owl or so", wanted)


def test_what_was_kept_is_not_made_again(tmp_path: Path) -> None:
    path, calls = tmp_path / "predictions.jsonl", []

    def make(items: list[int]) -> list[dict]:
        calls.append(items)
        return [{"square": item**2} for item in items]

    whole = Kept(path, "key").made("task", range(7), make, together=3)
    assert calls == [[0, 1, 2], [3, 4, 5], [6]] and whole[4] == {"square": 16}
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:4]) + "\n" + lines[4][:10])  # stopped while it wrote
    calls.clear()
    kept = Kept(path, "key")
    assert kept.made("task", range(7), make, together=3) == whole
    assert calls == [[3, 4, 5], [6]]
    calls.clear()
    assert Kept(path, "key").made("task", range(7), make, together=3) == whole and not calls
    rows = [line for line in path.read_text().splitlines() if line.endswith("}")]
    assert all(json.loads(line)["key"] == "key" for line in rows)
    Kept(path, "another").made("task", range(3), make, together=3)
    Kept(path, "key").made("task", range(2), make, together=3)  # other borders of a chunk
    assert calls == [[0, 1, 2], [0, 1]]


def test_a_prediction_that_was_changed_is_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "predictions.jsonl"
    Kept(path, "key").made("task", [0], lambda items: ["an owl"])
    path.write_text(path.read_text().replace("an owl", "a star"))
    assert Kept(path, "key").made("task", [0], lambda items: ["an owl"]) == ["an owl"]
    assert "1 predictions of" in caplog.text

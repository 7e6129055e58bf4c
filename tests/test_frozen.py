"""The test sets have a hash over what is asked and shown; another world has another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lavit.data.scenes import frozen
from lavit.data.scenes.splits import CHOOSING, SPLITS, Rules


def test_the_hash_is_over_scenes_and_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    first = frozen.split_hash("binding", Rules(), count=2)
    assert first == frozen.split_hash("binding", Rules(), count=2)
    assert first != frozen.split_hash("binding", Rules(), count=3)
    assert first != frozen.split_hash("pairs", Rules(), count=2)
    monkeypatch.setattr(frozen, "SIZE", 64)
    assert first != frozen.split_hash("binding", Rules(), count=2)


def test_all_splits_that_measure_are_frozen_but_the_users_font() -> None:
    assert set(frozen.MEASURING) == set(SPLITS) - set(CHOOSING) - {"noto"}
    hashes = dict.fromkeys(frozen.MEASURING, "a")
    assert frozen.joint_hash(hashes) != frozen.joint_hash({**hashes, "test": "b"})


def test_renewing_freezes_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "frozen.json"
    monkeypatch.setattr(frozen, "PATH", path)
    assert frozen.frozen(Rules()) is None
    monkeypatch.setattr(frozen, "split_hash", lambda split, rules: f"{split} {rules.objects}")
    said: list[str] = []
    frozen.renew(said.append)
    assert frozen.frozen(Rules())["test"] == "test 48"
    assert frozen.frozen(Rules(objects=160))["test"] == "test 160"
    assert frozen.frozen(Rules(held_out_pairs=0.2)) is None
    assert json.loads(path.read_text())["packages"] == frozen.versions()
    assert len(said) == 2 * len(frozen.MEASURING)

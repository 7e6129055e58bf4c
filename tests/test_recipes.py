"""Recipes import on what there is, and what they collect is what they say."""

from __future__ import annotations

import importlib
import json
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

RECIPES = Path(__file__).parent.parent / "recipes"
sys.path.insert(0, str(RECIPES))
import prose


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.py")))
def test_recipes_import(name: str) -> None:
    assert importlib.import_module(name).__doc__.count("Command   ") == 1


def test_prose_keeps_english_sentences_and_takes_markup_out() -> None:
    text = """# Title

    This is code, and it is not for the reader of this text.

[![badge](https://a.b/c.svg)](https://a.b) ![](x.png)

The [merger](https://a.b/c) of the **package** is a part of `the model`, and it reads
what the selector keeps for it.

short one.

Dies ist kein englischer Satz, er hat aber viele Worte und endet mit einem Punkt.
"""
    seen: set[str] = set()
    kept = "The merger of the package is a part of the model, and it reads what the selector keeps for it."
    assert prose.prose(text, seen) == kept
    assert prose.prose(text, seen) == ""  # once is enough


def test_prose_is_split_by_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [
        distribution(name) for name in ("attrs", "efficientnet-lite-pytorch", "peft", "accelerate", "tqdm", "rich")
    ]
    monkeypatch.setattr(prose, "distributions", lambda: iter(chosen))
    counts = prose.build_prose(tmp_path / "prose.jsonl")
    packages = json.loads((tmp_path / "prose.packages.json").read_text())
    assert {"attrs", "efficientnet-lite-pytorch"} <= set(packages["held out"]) and "peft" in packages["train"]
    for split, file in (("train", "prose.jsonl"), ("held out", "prose.held_out.jsonl")):
        lines = [json.loads(line) for line in (tmp_path / file).read_text().splitlines()]
        assert len(lines) == counts[f"{split} texts"] > 0
        assert {line["package"] for line in lines} == set(packages[split])
    assert packages["train"]["peft"]["licence"].startswith("Apache")

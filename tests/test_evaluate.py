"""Figures are what their definitions by hand say."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import lavit
from lavit.evaluate.text import WINDOW, perplexity

TEXTS = [
    "the red square is beside the green bar.",
    "a blue dot and a red bar are on the paper. " * 30,
    "x",
]


@torch.no_grad()
def test_perplexity_is_the_one_by_hand(toy_run: Path) -> None:
    model = lavit.load(toy_run).model
    found = perplexity(TEXTS, model.text_tokenizer, model.language, model.language.lm, where="here")
    sums = {"joint": [0.0, 0], "base": [0.0, 0]}
    for passage in TEXTS[:2]:
        ids = model.text_tokenizer(passage, add_special_tokens=False)["input_ids"]
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
    # probability that goes to codes is lost to text
    assert found.value > found.floor[1] and found.count == 2

"""Golden curves: the first losses of `nano` on thirty drawn pictures.

A change that moves them must say why in LOG.md. To renew them after such a change: delete
tests/golden/nano.json and run this file, which writes it anew.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lavit.presets import nano
from lavit.train.run import open_run, train_stages

GOLDEN = Path(__file__).parent / "golden" / "nano.json"


@pytest.mark.usefixtures("whole_windows")
def test_first_losses_of_nano(shapes_data: Path, tmp_path: Path) -> None:
    preset = nano()
    t = preset.training
    training = replace(
        t,
        log_every=1,
        sample_every=0,
        tokenizer=replace(t.tokenizer, steps_a=3, steps_b=2, batch=8, k_means_vectors=300),
        language=replace(t.language, steps=3, rows=1),
        pixels=replace(t.pixels, steps=3, batch=8),
    )
    train_stages(open_run(tmp_path / "run", shapes_data, preset.model, training))
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    found = [[line["stage"], line["step"], round(line["loss"], 5)] for line in lines]
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps(found, indent=0) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert [line[:2] for line in found] == [line[:2] for line in golden]
    # another machine rounds otherwise, and the tokens of three young steps may flip with it: curves
    # agree to some percent
    assert [line[2] for line in found] == pytest.approx([line[2] for line in golden], rel=3e-2)

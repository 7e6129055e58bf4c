"""The benchmark of GPUs in small: it runs here, and counts FLOPs as the step spends them."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lavit.pixels.decoder import Pixels

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import gpu


def test_it_runs_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, small = tmp_path / "figures.json", gpu.size_of
    less = {"pictures": 2, "rows": 1, "product": 256, "copied": 2**20}
    monkeypatch.setattr(gpu, "size_of", lambda *how: replace(small(*how), **less))
    arguments = ["gpu.py", "--size", "small", "--rounds", "1", "--tokens", "3", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", arguments)
    gpu.main()
    figures = json.loads(path.read_text())["figures"]
    assert len(figures) == 9
    assert all(math.isfinite(value) and value > 0 for value in figures.values()), figures


def test_a_step_does_not_wait_to_group_its_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are grouped from the CPU, as in stage 2; the model would ask the device."""
    size = replace(gpu.size_of("small", torch.device("cpu")), rows=1, product=64)
    monkeypatch.setattr("lavit.language.model.group_documents", None)
    assert gpu.train(size, 1)[1]["train_mfu"] > 0


def test_flops_by_the_configuration_are_those_of_the_step() -> None:
    """The counter sees squares of documents, of which the causal half is needed."""
    size = gpu.size_of("small", torch.device("cpu"))
    size = replace(size, rows=1, document=16)
    language = gpu.language_of(size)
    batch = gpu.packed_rows(language, size)
    in_place = {torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        language(batch).total.backward()
    wanted = gpu.step_flops(language.lm.config, size.tokenizer.codes, size)
    assert counter.get_total_flops() == pytest.approx(wanted, rel=0.03)


def test_the_large_size_is_what_it_says() -> None:
    size = gpu.size_of("large", torch.device("meta"))
    language = gpu.language_of(size)
    with torch.device("meta"):
        pixels = Pixels.build(size.pixels)
    table = language.lm.get_input_embeddings().weight
    count = sum(weight.numel() for weight in language.lm.parameters() if weight is not table)
    assert count == pytest.approx(1.1e9, rel=0.1)
    assert sum(weight.numel() for weight in pixels.unet.parameters()) > 8e8

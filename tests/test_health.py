"""Health of stage 1: logs, alarms, and that the last checkpoint is of a healthy step."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from conftest import toy_config
from lavit.config import TokenizerTraining
from lavit.data.features import Features
from lavit.files import load_tensors
from lavit.train.batches import PictureBatch, Shard
from lavit.train.feeds import CorpusFeatures
from lavit.train.health import (
    Alarm,
    CodeUse,
    check_codes,
    check_finite,
    check_selector,
    selector_figures,
)
from lavit.train.loop import train
from lavit.train.tokenizer import TokenizerStage
from lavit.visual_tokenizer.tokenizer import VisualTokenizer

CONFIG = TokenizerTraining(steps_a=70, steps_b=230, batch=4, learning_rate=1e-3, k_means_vectors=64)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stage(config: TokenizerTraining = CONFIG) -> TokenizerStage:
    torch.manual_seed(0)
    features = Features(torch.randn(12, 16, 32, generator=seeded(0)).numpy())
    feed = CorpusFeatures(features, batch=config.batch, seed=0)
    return TokenizerStage(VisualTokenizer(toy_config().visual_tokenizer), feed, config, seed=0)


def go(failing: TokenizerStage, run: Path, **options: int) -> list[dict]:
    """Train and return what was logged, also of a run that an alarm stopped."""
    try:
        train(failing, run, accelerator=Accelerator(cpu=True), clip=1.0, warmup=0.05, **options)
    finally:
        path = run / "metrics.jsonl"
        lines = (
            [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        )
    return lines


def checkpoints(run: Path) -> list[int]:
    return sorted(
        int(p.name) for p in (run / "checkpoints" / "tokenizer").iterdir() if p.name.isdigit()
    )


def last_weights(run: Path) -> Path:
    return run / "checkpoints" / "tokenizer" / str(checkpoints(run)[-1]) / "module.safetensors"


def test_a_window_forgets_and_comes_back_from_its_state() -> None:
    use = CodeUse(10, window=3)
    for step in range(5):
        use.add(torch.tensor([step, step]), revived=step)
    figures = use.figures()
    assert figures["live_codes"] == 0.3 and figures["revived"] == 2 + 3 + 4
    assert figures["perplexity"] == pytest.approx(3.0)
    assert use.reachable == pytest.approx(1 - math.exp(-0.6))
    again = CodeUse(10, window=3)
    again.add(torch.tensor([9]))
    again.load_state(use.state())
    assert again.figures() == figures
    assert CodeUse(10, window=3).figures() == {}


def test_selector_figures_by_hand() -> None:
    probability = torch.tensor([[0.95, 0.05, 0.5, 0.5], [0.99, 0.5, 0.5, 0.2]])
    figures = selector_figures(probability, torch.tensor([1, 3, 4, 4]))
    assert float(figures["decided"]) == pytest.approx(3 / 8)
    assert float(figures["kept"]) == pytest.approx(0.75)
    assert float(figures["length_spread"]) == pytest.approx(math.sqrt(1.5) / 3)
    histogram = {
        name: float(value) for name, value in figures.items() if name.startswith("kept_histogram/")
    }
    assert histogram == {
        f"kept_histogram/{t / 10:.1f}": {2: 0.25, 7: 0.25, 9: 0.5}.get(t, 0.0) for t in range(10)
    }


def test_every_figure_of_health_is_logged(tmp_path: Path) -> None:
    lines = go(stage(replace(CONFIG, steps_a=2, steps_b=2)), tmp_path, log_every=1)
    always = {
        "loss",
        "reconstruction",
        "kept",
        "decided",
        "length_spread",
        "vector_norm",
        "gradient_norm",
    }
    assert always <= set(lines[0]) and "live_codes" not in lines[0]
    assert always | {
        "commitment",
        "live_codes",
        "perplexity",
        "revived",
        "kept_histogram/0.3",
    } <= set(lines[-1])
    assert sum(
        value for name, value in lines[-1].items() if name.startswith("kept_histogram/")
    ) == pytest.approx(1)
    assert lines[-1]["vector_norm"] > 0


def test_vector_norm_is_that_of_the_projection_before_it_is_normalised() -> None:
    training = stage()
    patches = training.feed.features.rows(torch.arange(3))
    for quantise, train_selector in ((False, True), (True, False)):
        out = training.module(
            patches, None, quantise=quantise, dense=False, train_selector=train_selector
        )
        rows = training.module.merger(training.module.prepare(patches), out.mask > 0.5)
        expected = training.module.codebook.to_code(rows).norm(dim=-1).mean()
        torch.testing.assert_close(out.norm, expected.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("what", "match"),
    [
        ("features", r"features at step 5.*float16"),
        ("loss", r"loss is nan at step 5.*lower the learning rate"),
        ("gradient", r"loss is \d\.\d+ at step 5.*lower the learning rate"),
    ],
)
def test_a_run_that_goes_nan_stops_before_its_next_checkpoint(
    tmp_path: Path, what: str, match: str
) -> None:
    """Checkpoints every 2 steps, a report every 10: the alarm must not wait for the report."""
    failing = stage()
    weight, healthy = next(failing.module.reconstructor.parameters()), failing.batch

    def batch(step: int, shard: Shard) -> PictureBatch:
        if step == 5 and what == "features":
            failing.feed.features.array[:] = math.inf
        if step == 5 and what == "loss":
            weight.data.fill_(math.nan)
        # the loss of this step is a number, the weights after it are not
        if step == 5 and what == "gradient":
            weight.register_hook(lambda gradient: gradient * math.nan)
        return healthy(step, shard)

    failing.batch = batch
    with pytest.raises(Alarm, match=match):
        go(failing, tmp_path, checkpoint_every=2, log_every=10)
    assert checkpoints(tmp_path)[-1] == 4
    assert all(
        torch.isfinite(tensor).all() for tensor in load_tensors(last_weights(tmp_path)).values()
    )


@pytest.mark.parametrize(
    ("bias", "match"), [(12.0, "all of them: raise the rate weight"), (-12.0, "next to none")]
)
def test_a_selector_that_keeps_all_or_nothing_stops_the_run(
    tmp_path: Path, bias: float, match: str
) -> None:
    failing = stage(replace(CONFIG, rate_weight=0.0, selector_rate=0.0))
    failing.module.selector.head[-1].bias.data = torch.tensor([bias, -bias])
    with pytest.raises(Alarm, match=match):
        go(failing, tmp_path, checkpoint_every=20)
    assert checkpoints(tmp_path)[-1] == 40  # the alarm listens from step 50 on


def test_a_collapsed_codebook_stops_the_run(tmp_path: Path) -> None:
    """All codes but one far away from every vector, nothing revived: one of 32 is used."""
    failing = stage(replace(CONFIG, steps_a=1, k_means=0, patience=0, decay=1.0))
    codebook = failing.module.codebook
    torch.nn.init.zeros_(codebook.to_code[2].weight)
    codebook.to_code[2].bias.data = codebook.vectors[0].clone()
    failing.parameter_groups = lambda: [
        {"params": list(failing.module.reconstructor.parameters()), "lr": 1e-4, "weight_decay": 0.0}
    ]
    with pytest.raises(Alarm, match=r"collapsed: only 3.1%.*k-means.*commitment.*patience"):
        go(failing, tmp_path, checkpoint_every=50)
    assert checkpoints(tmp_path)[-1] == 200


def test_alarms_know_what_is_possible() -> None:
    # few tokens cannot use many codes
    check_codes(0.05, 900, steps_with_codes=800, window=100, reachable=0.06)
    with pytest.raises(Alarm, match="collapsed"):
        check_codes(0.05, 900, steps_with_codes=800, window=100, reachable=0.9)
    check_codes(0.0, 150, steps_with_codes=150, window=100)  # too early to tell
    check_selector(1.0, 10)
    check_selector(0.07, 100, patches=100)
    with pytest.raises(Alarm, match="next to none"):
        check_selector(1 / 16, 100, patches=16)
    check_finite(torch.tensor(1.0), [torch.ones(3)], 4)
    for loss, weight in ((math.nan, 1.0), (math.inf, 1.0), (1.0, math.inf)):
        with pytest.raises(Alarm, match="step 4"):
            check_finite(torch.tensor(loss), [torch.ones(3), torch.tensor([weight])], 4)

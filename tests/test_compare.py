"""Studies: every arm runs from the one command at toy size, budgets hold, seeds alone differ."""

from __future__ import annotations

import json
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import toy_config, toy_training
from lavit.config import InputError, Mixture
from lavit.evaluate import measure, pace
from lavit.evaluate.bench import Bench
from lavit.evaluate.budget import Cost, _on_cpu
from lavit.evaluate.compare import COLUMNS, compare
from lavit.evaluate.differences import paired_difference
from lavit.evaluate.results import section, write_results
from lavit.evaluate.study import Arm, Comparison, Study, in_model, load_study
from lavit.evaluate.study_data import made_at
from lavit.presets import Preset
from lavit.train.health import Alarm

pytestmark = pytest.mark.usefixtures("few_rows")
STUDIES = sorted((Path(__file__).parent.parent / "recipes" / "studies").glob("*.py"))


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets are counted in as many rows as are filled together."""
    monkeypatch.setattr("lavit.evaluate.budget.WINDOW", 8)


def toy_preset() -> Preset:
    model, training = toy_config(), toy_training(3)
    language = replace(
        training.language, tokens=192, mixture=Mixture(reading=3.0, writing=1.0), read_share=0.1
    )
    return Preset(model, replace(training, language=language, text_vocabulary=400), minutes=1)


def small(study: Study) -> Study:
    """The same arms with toys, two items and few scenes."""
    rates = study.rates[:1]
    return replace(study, preset=toy_preset, pictures=24, count=2, rates=rates)


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=[pytest.mark.slow] * (p.stem != "input"), id=p.stem) for p in STUDIES],
)
def test_every_arm_of_a_study_runs(path: Path, tmp_path: Path) -> None:
    study = small(load_study(path))
    found = compare(Bench(study, tmp_path / "out"), 1)
    page = write_results(study, found, tmp_path / "docs", f"lavit compare {path}")
    text = page.read_text()
    measured = [name for name, arm in study.arms.items() if arm.measured]
    assert [*found["tokens"]] == measured and all(f"| {name} |" in text for name in measured)
    first = found["tokens"][measured[0]][0]["cost"]
    budget = first["steps"] * first["targets_per_step"]
    for name in measured:
        cost, share = found["tokens"][name][0]["cost"], study.arms[name].share
        if cost["steps"]:  # to half a step
            tokens = cost["steps"] * cost["targets_per_step"]
            assert abs(tokens - share * budget) <= max(1, cost["targets_per_step"]) * 0.51
        other = found["flops"][name][0] if "flops" in found else None  # of tokenizers alone
        if other is not None:
            spent = other["cost"]["steps"] * cost["flops_per_step"]
            wanted = share * first["steps"] * first["flops_per_step"]
            assert other["cost"]["steps"] == 1 or abs(spent - wanted) <= cost["flops_per_step"] / 2
    assert "| |" not in text  # no empty cell


TWO = Study(
    name="two",
    claim="none",
    at_scale="nothing",
    arms={
        "features": Arm(),
        "codes": Arm(lambda preset: in_model(preset, "language", read_as="codes")),
    },
    figures=("kept_share", "noto"),
    comparisons=(),
)


def test_finished_parts_are_not_made_again_and_seeds_differ_by_seed_alone(tmp_path: Path) -> None:
    study = small(replace(TWO, figures=("kept_share",)))
    found = compare(Bench(study, tmp_path), 2)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "rows").rename(elsewhere / "rows")
    assert compare(Bench(study, tmp_path), 2) == found
    assert compare(Bench(study, elsewhere), 2) == found  # from what was found alone
    assert {path.name for path in elsewhere.iterdir()} == {"rows", "locks"}
    keys = {
        Bench(one, tmp_path).row_key("codes", "tokens")
        for one in (study, replace(study, count=3), replace(study, pictures=30))
    }
    assert len(keys) == 3
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len([*(tmp_path / "tokenizers").iterdir()]) == 2  # shared by both arms, one a seed
    for name in study.arms:
        said = [
            json.loads((tmp_path / one["run"] / "training.json").read_text())
            for one in found["tokens"][name]
        ]
        seeds = [one["training"].pop("seed") for one in said]
        steps = [one["training"]["language"].pop("steps") for one in said]  # by the same budget
        assert seeds == [0, 1] and said[0] == said[1] and min(steps) > 0


def test_a_stopped_arm_goes_on_however_the_folder_is_spelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    study = small(replace(TWO, figures=("kept_share",), arms={"features": Arm()}))
    found = compare(Bench(study, Path("out")), 1)
    shutil.rmtree(Path("out") / found["tokens"]["features"][0]["run"] / "language")
    shutil.rmtree(Path("out", "rows"))  # as if the training had been killed before its end
    again = compare(Bench(study, tmp_path / "out"), 1)
    assert again["tokens"]["features"][0]["figures"] == found["tokens"]["features"][0]["figures"]


@pytest.mark.parametrize("changed", ["JUDGE", "FROZEN"])
def test_rows_of_another_judge_or_world_are_made_anew(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(TWO, tmp_path)
    before = bench.row_key("codes", "tokens")
    own, other = getattr(measure, changed), tmp_path / "other"
    shutil.copytree(own, other) if own.is_dir() else shutil.copy(own, other)
    with (other / "judge.json" if own.is_dir() else other).open("a") as file:
        file.write(" ")
    monkeypatch.setattr(measure, changed, other)
    assert bench.row_key("codes", "tokens") != before


class Nothing(Bench):
    """Trains nothing, so that every row is there at once."""

    def model(self, name: str, seed: int, column: str = "tokens") -> None:
        return None


def test_processes_share_the_arms(tmp_path: Path) -> None:
    bench, rows = Nothing(replace(TWO, figures=("kept_share",)), tmp_path), tmp_path / "rows"
    held = rows / f"{bench.row_key('features', 'tokens')}-0.json"
    with ThreadPoolExecutor() as threads:
        with made_at(tmp_path, held):
            other = threads.submit(compare, bench, 1)
            while len(names := {path.name for path in rows.glob("*.json")}) < 3:
                assert not other.done()
                time.sleep(0.01)
            time.sleep(0.1)
            assert not other.done() and held.name not in names  # it waits for what another makes
            held.write_text('{"row": {"seed": "of another process"}}')
        assert other.result()["tokens"]["features"] == [{"seed": "of another process"}]


def test_arms_that_differ_in_what_others_lack_share_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another decoder on the same language model; another share of the LM that it begins with."""
    seen: list[str] = []
    cost = Cost(targets_per_step=10.0, flops_per_step=1.0)
    monkeypatch.setattr(Bench, "_counted", lambda *_: cost)
    monkeypatch.setattr(Bench, "_start", lambda *_: None)
    monkeypatch.setattr(Bench, "_train", lambda *given: seen.append(given[3].name))
    other = partial(in_model, part="pixels", guidance=7.0)
    arms = {"base": Arm(), "own": Arm(lm_of="base"), "painted": Arm(other, lm_of="base")}
    for share in (1.0, 0.5):
        study = replace(TWO, arms=arms | {"base": Arm(share=share)})
        bench = Bench(study, tmp_path)
        for name in ("own", "painted"):
            bench._language(name, 0, 1.0, share=1.0)
    assert len({*seen}) == 4


def test_arms_of_fewer_targets_a_row_have_more_rows_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that all make about as many steps: of orthogonal ones, the number is what counts."""
    counted = {"features": Cost(600.0, 5.0), "codes": Cost(200.0, 4.0)}
    monkeypatch.setattr(Bench, "_counted", lambda _, name, seed: counted[name])
    bench = Bench(TWO, tmp_path)
    rows = {name: bench._preset(name, 1.0, 9).training.language.rows for name in TWO.arms}
    assert rows == {"features": 2, "codes": 6}
    assert bench._cost("codes", 0) == Cost(600.0, 12.0)
    assert bench._cost("features", 0) == counted["features"]


def test_products_that_are_added_in_place_count() -> None:
    with FlopCounterMode(display=False, custom_mapping=_on_cpu()) as counter:
        torch.zeros(2, 5).addmm_(torch.ones(2, 3), torch.ones(3, 5))
    assert counter.get_total_flops() == 2 * 2 * 3 * 5


def test_a_study_is_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no figure 'noto'"):
        compare(Bench(TWO, tmp_path), 1)
    with pytest.raises(InputError, match="takes from 'none'"):
        replace(TWO, arms={"one": Arm(lm_of="none")})
    with pytest.raises(InputError, match="compares what it does not measure"):
        replace(TWO, comparisons=(Comparison("features", "codes", "live_codes"),))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(InputError, match="defines no STUDY"):
        load_study(tmp_path / "empty.py")


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_rows_of_a_study_have_names_of_their_own(path: Path, tmp_path: Path) -> None:
    study = load_study(path)
    bench, measured = Bench(study, tmp_path), [n for n, arm in study.arms.items() if arm.measured]
    keys = {bench.row_key(name, column) for name in measured for column in COLUMNS}
    assert len(keys) == len(measured) * len(COLUMNS)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_plan_counts_runs(path: Path) -> None:
    study = load_study(path)
    usual = pace.Pace(0.01, 1.0, 1.0, 1.0, 0.1, targets=100.0)
    lines = pace.plan_study(study, 3, {"": usual})
    counts = {line.what: line.count for line in lines}
    trained = [arm for arm in study.arms.values() if not arm.tokenizer_alone]
    assert counts["language models, equal tokens"] == 3 * len(trained)
    assert 0 < counts["tokenizers"] <= 3 * len(study.arms)
    first = next(iter(study.arms))  # with half the target tokens a step, twice the steps
    more = pace.plan_study(study, 3, {"": usual, first: replace(usual, targets=50.0)})
    longer = {line.what: line.total for line in more}["language models, equal tokens"]
    usually = {line.what: line.total for line in lines}["language models, equal tokens"]
    share = study.arms[first].share * (study.arms[first] in trained)
    steps = study.preset_of(first).training.language.steps
    assert longer - usually == pytest.approx(3 * share * steps / 60)


def test_the_seeds_whose_budgets_are_equal_already_are_marked() -> None:
    def row(value: float) -> dict[str, Any]:
        figure = {"value": value, "items": None}
        cost = {"steps": 1, "targets_per_step": 1.0, "flops_per_step": 1.0, "seconds": 1.0}
        return {"figures": {"f": figure}, "cost": cost, "rate": 1.0}

    arms = {"all": Arm(), "some": Arm(), "none": Arm()}
    study = Study("toy", "a claim", "more", arms, ("f",), (), seeds=2)
    tokens = {name: [row(0.25), row(0.5)] for name in arms}
    flops = {"all": [None, None], "some": [row(0.75), None], "none": [row(0.125), row(0.125)]}
    page = section(study, {"tokens": tokens, "flops": flops}, "lavit compare toy.py")
    equal = page[page.index("### Equal FLOPs") :]
    assert "| all* | **0.375** (0.250, 0.500) |" in equal
    assert "| some (of seed 1: *) | **0.625** (0.750, 0.500) |" in equal
    assert "| none | **0.125** (0.125, 0.125) |" in equal


def entry(values: list[float] | None, *, floor: float = 0.1, wide: float = 0.04) -> dict[str, Any]:
    """A figure of a row."""
    if values is None:
        return {"value": None, "items": [], "reason": "it has no decoder"}
    value = float(np.mean(values))
    ends = {"low": value - wide / 2, "high": value + wide / 2}
    return {"value": value, "items": values, "floor": floor, **ends}


def found_of(**arms: list[dict[str, Any]]) -> dict[str, Any]:
    """An outcome of equal tokens whose rows have one figure."""
    cost = {"steps": 1, "targets_per_step": 1.0, "flops_per_step": 1.0, "seconds": 1.0}
    rest = {"cost": cost, "rate": 0.5, "tried": {"0.5": -1.25, "1": None}}
    return {"tokens": {a: [{"figures": {"f": e}, **rest} for e in es] for a, es in arms.items()}}


def test_a_page_says_what_is_missing_and_what_is_at_its_floor() -> None:
    study = Study(
        "toy", "a claim", "more", {"a": Arm(), "b": Arm()}, ("f",), (Comparison("a", "b", "f", 1),)
    )
    low = [entry([0.12, 0.10]), entry([0.11, 0.10])]
    page = section(study, found_of(a=low, b=[entry([0.09, 0.09])] * 2), "lavit compare toy.py")
    assert "both at the floor" in page and "(0.110, 0.105; floor 0.100)" in page
    assert "Rates of a, by read_pairs_likelihood on validation: 0.5: -1.250, 1: failed." in page
    assert "\n- both at the floor: a against b (f)\n" in page
    high = [entry([0.5, 0.52]), entry([0.5, 0.54])]
    found = found_of(a=high, b=low)
    page = section(study, found, "lavit compare toy.py")
    assert "\n- as claimed: a against b (f)\n" in page and "both at" not in page
    equal = {"flops": {"a": [None, None], "b": found_of(b=high)["tokens"]["b"]}}
    page = section(study, found | equal, "lavit compare toy.py")
    assert "- at equal FLOPs: the same, but for these\n  - not settled: a against b (f)\n" in page
    equal["flops"]["b"] = [None, None]
    page = section(study, found | equal, "lavit compare toy.py")
    assert "- at equal FLOPs: the same\n" in page
    gone = [entry([0.1, 0.2]), entry(None)]  # of the second seed alone
    page = section(study, found_of(a=gone, b=low), "lavit compare toy.py")
    assert "none (1)" in page and "(1) it has no decoder." in page
    longer = [entry([0.5, 0.5, 0.5])] * 2
    page = section(study, found_of(a=longer, b=low), "lavit compare toy.py")
    assert "or it is of other items" in page


class Tried(Bench):
    """Knows what its arms reach with each rate; one of them fails."""

    reached: dict[float, float | None]

    def tried(self, name: str) -> dict[float, float | None]:
        return self.reached


def test_a_rate_is_the_best_of_those_that_train(tmp_path: Path) -> None:
    study = replace(TWO, arms={"features": Arm(rates=True)}, rates=(0.5, 1.0, 2.0))
    bench = Tried(study, tmp_path)
    for reached, best in (
        ({0.5: -2.0, 1.0: -2.0, 2.0: -2.0}, 1.0),  # of equals the preset's own
        ({0.5: -2.0, 1.0: -3.0, 2.0: None}, 0.5),
        ({0.5: -2.0, 1.0: -1.5, 2.0: -1.0}, 2.0),
    ):
        bench.reached = reached
        assert bench.rate("features") == best
    bench.reached = dict.fromkeys(study.rates)
    with pytest.raises(InputError, match="trains with none of its rates"):
        bench.rate("features")


def test_a_rate_that_diverges_is_no_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = small(
        replace(TWO, figures=("kept_share",), arms={"features": Arm(rates=True)}, rates=(0.5, 1.0))
    )
    bench, trained = Bench(replace(study, rates=(0.5, 1.0)), tmp_path), Bench._language

    def language(self: Bench, name: str, seed: int, rate: float, **how: Any) -> Any:
        if rate == 1.0:
            raise Alarm("the loss is no number")
        return trained(self, name, seed, rate, **how)

    monkeypatch.setattr(Bench, "_language", language)
    tried = bench.tried("features")
    assert tried[1.0] is None and isinstance(tried[0.5], float) and tried[0.5] < 0
    assert bench.rate("features") == 0.5


def test_an_arm_that_others_begin_with_has_one_run(tmp_path: Path) -> None:
    """Its language model is theirs in both columns; one that goes on does so in its own column."""
    study = small(
        replace(
            TWO,
            figures=("kept_share",),
            arms={
                "codes": TWO.arms["codes"],
                "base": Arm(),
                "from base": Arm(lm_of="base"),
                "first part": Arm(share=0.5, measured=False),
                "last part": Arm(goes_on="first part", share=0.5),
            },
        )
    )
    found = compare(Bench(study, tmp_path), 1)
    assert found["flops"]["base"] == [None] and found["flops"]["last part"][0] is not None
    runs = [tmp_path / found[column]["last part"][0]["run"] for column in COLUMNS]
    starts = [json.loads((run / "training.json").read_text())["start"] for run in runs]
    assert starts[0] != starts[1]


def test_held_out_prose_is_not_in_the_prose_that_is_mixed_in() -> None:
    replay = load_study(STUDIES[0].with_name("replay.py"))
    module = sys.modules[replay.own["text_nats"].__module__]
    seen = {part for text in replay.texts() for part in module.paragraphs(text)}
    unseen = [part for text in module.held_out() for part in module.paragraphs(text)]
    assert len(seen) > 1000 and len(unseen) > 100 and not seen & set(unseen)


def test_two_levels_of_chance_have_the_width_that_they_should() -> None:
    """Seeds of deviation 1 and items of deviation 2 give a variance of 1 / seeds + 4 / items."""
    rng, seeds, items, covered, widths = np.random.default_rng(0), 12, 60, 0, []
    expected = 2 * 1.96 * np.sqrt(1 / seeds + 4 / items)
    for _ in range(100):
        of_seeds, of_items = rng.normal(0, 1, (seeds, 1)), rng.normal(0, 2, (1, items))
        found = paired_difference(0.5 + of_seeds + of_items, np.zeros((seeds, items)))
        covered += found.low <= 0.5 <= found.high
        widths.append(found.high - found.low)
    assert 86 <= covered <= 99
    assert np.mean(widths) == pytest.approx(expected, rel=0.1)


def test_a_claim_needs_all_seeds_and_the_interval() -> None:
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 0.1, (3, 200))
    better = paired_difference(noise + 0.5, np.zeros((3, 200)))
    assert better.settled and better.verdict(1) == "as claimed"
    assert better.verdict(-1) == "against the claim" and better.verdict(0) == "more"
    torn = paired_difference(noise + np.array([[0.9], [0.9], [-0.1]]), np.zeros((3, 200)))
    assert not torn.settled and torn.verdict(1) == "not settled" and torn.seeds[2] < 0
    alone = paired_difference(noise[:1] + 0.5, np.zeros((1, 200)))
    assert not alone.settled  # one seed settles nothing
    same = paired_difference(noise, noise)
    assert (same.low, same.high) == (0, 0) and not same.settled


@pytest.mark.slow
def test_arms_of_other_parts_have_a_pace_of_their_own() -> None:
    study = small(load_study(STUDIES[0].with_name("emu.py")))
    paces = pace.paces_of(study)
    assert set(paces) == {"", "Emu"}
    lines = {line.what: line for line in pace.plan_study(study, 3, paces)}
    steps = toy_preset().training.language.steps
    # with as many target tokens, of which the arms have not as many a step
    usual = paces[""].targets
    mean = sum(one.language * usual / one.targets for one in paces.values()) / 2
    language = lines["language models, equal tokens"]
    assert language.minutes == pytest.approx(steps * mean / 60)

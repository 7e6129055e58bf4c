"""Trainings in legs: a packed state goes on elsewhere as if nothing had happened, and is small."""

from __future__ import annotations

import os
import signal
import sys
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import short_streams, toy_config, toy_training
from lavit.config import InputError, Terminated, write_json
from lavit.pixels.decoder import Pixels
from lavit.presets import preset
from lavit.train.loop import Report
from lavit.train.plan import plan_stage
from lavit.train.run import open_run, train_stages
from lavit.train.settings import STAGES
from lavit.visual_tokenizer.tokenizer import VisualTokenizer
from test_train import losses

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
import leg


def test_a_training_in_legs_is_one_in_a_piece(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stage is stopped on its way by the loop's own SIGTERM, packed, and the run deleted."""
    short_streams(monkeypatch)
    monkeypatch.setattr(leg, "PIECE", 2**19)
    training = replace(toy_training(3), log_every=1)
    training = replace(
        training, **{one: replace(getattr(training, one), stream=True) for one in STAGES}
    )
    whole, state, stops = tmp_path / "whole", tmp_path / "state", []
    train_stages(open_run(whole, toy_data, toy_config(), training, trackers=()))

    def stop(report: Report) -> None:
        if report.step == 2 and report.stage not in stops:
            stops.append(report.stage)
            os.kill(os.getpid(), signal.SIGTERM)

    for number in range(len(STAGES) + 1):
        run = tmp_path / f"leg-{number}"
        leg.unpack(state, run)
        opened = open_run(run, toy_data, toy_config(), training, trackers=(), watch=stop)
        if number < len(STAGES):
            with pytest.raises(Terminated):
                train_stages(opened)
        else:
            train_stages(opened)
        assert leg.pack(run, state) == len(list(state.iterdir())) <= leg.PIECES
        assert all(path.stat().st_size <= leg.PIECE for path in state.iterdir())
    assert stops == list(STAGES)
    assert losses(run) == losses(whole)


@pytest.mark.parametrize("name", ["nano", "mini"])
def test_states_of_the_small_presets_fit(name: str) -> None:
    """The largest of them, uncompressed: stage 2's, beside the parts that are done."""
    found = preset(name)
    with torch.device("meta"):
        tokenizer = VisualTokenizer(found.model.visual_tokenizer)
        pixels = Pixels.build(found.model.pixels)
    plan = plan_stage("language", found.model, found.training, precision="fp32")
    trains = sum(part.trains for part in plan.parts)
    frozen = sum(part.frozen for part in plan.parts)
    before = sum(t.nbytes for t in tokenizer.state_dict().values())
    assert frozen > 1e8 if name == "mini" else frozen == 0  # a frozen base is never packed
    language = 4 * 3 * trains + before
    decoder = before + 4 * trains + 5 * sum(p.nbytes for p in pixels.parameters())
    assert max(language, decoder) < leg.PIECE * leg.PIECES


@pytest.mark.parametrize(("listens", "seconds"), [(True, 600.0), (False, 600.0), (True, 22.0)])
def test_a_leg_passes_sigterm_on_and_packs(tmp_path: Path, listens: bool, seconds: float) -> None:
    """To a training that saves its step, or has not begun to listen; or its minutes are over."""
    run, state = run_at(tmp_path / "run", 10), tmp_path / "state"
    done = run / "checkpoints" / "tokenizer" / "11"
    words = [
        "import signal, sys, time, pathlib",
        f"done = pathlib.Path({str(done)!r})",
        "def save(*_): done.mkdir(); (done / 'step.json').write_text('{}'); sys.exit(143)",
        "listens and signal.signal(signal.SIGTERM, save)".replace("listens", str(listens)),
        f"pathlib.Path({str(tmp_path / 'begun')!r}).touch()",
        "time.sleep(600)",
    ]

    def stop() -> None:
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before, stopper = signal.getsignal(signal.SIGTERM), threading.Thread(target=stop)
    try:
        if seconds > 60:
            stopper.start()
        assert leg.leg([sys.executable, "-c", "\n".join(words)], seconds) == 143
        os.kill(os.getpid(), signal.SIGTERM)  # the packing goes on
        leg.pack(run, state)
    finally:
        signal.signal(signal.SIGTERM, before)
    leg.unpack(state, tmp_path / "next")
    assert leg.reached(tmp_path / "next") == (0, 11 if listens else 10)


def test_what_is_no_state_is_said(tmp_path: Path) -> None:
    run, state = tmp_path / "run", tmp_path / "state"
    run.mkdir()
    with pytest.raises(InputError, match="no training yet"):
        leg.pack(run, state)
    (run / "training.json").write_text("{}")
    leg.pack(run, state)
    (state / "0-of-1").rename(state / "0-of-2")
    with pytest.raises(InputError, match="1 files of 2"):
        leg.unpack(state, tmp_path / "next")
    with pytest.raises(InputError, match="write -- train"):
        leg.main(state, run, ("eval", "nano"))
    (state / "0-of-2").rename(state / "0-of-1")
    (state / "0-of-1").write_bytes((state / "0-of-1").read_bytes()[:50])
    with pytest.raises(InputError, match="damaged"):
        leg.unpack(state, tmp_path / "next")
    assert not (tmp_path / "next").exists()


def run_at(run: Path, step: int, data: str = "scenes") -> Path:
    """A run with a checkpoint of its first stage."""
    checkpoint = run / "checkpoints" / "tokenizer" / str(step)
    checkpoint.mkdir(parents=True)
    write_json(checkpoint / "step.json", {"step": step})
    write_json(run / "training.json", {"data": data})
    return run


def test_the_farther_of_state_and_run_goes_on(tmp_path: Path) -> None:
    """An old run of a machine that is lent again does not win; a newer or an equal one stays."""
    state, old, new = tmp_path / "state", tmp_path / "old", tmp_path / "new"
    leg.pack(run_at(new, 500), state)
    run_at(old, 10)
    for _ in range(2):
        leg.unpack(state, old)
        assert leg.reached(old) == (0, 500)
    run_at(old, 510)
    leg.unpack(state, old)
    assert leg.reached(old) == (0, 510)
    (new / "visual_tokenizer").mkdir()
    (new / "visual_tokenizer" / "done").touch()
    leg.pack(new, state)
    leg.unpack(state, old)
    assert leg.reached(old) == (1, 0)
    with pytest.raises(InputError, match="two trainings"):
        leg.unpack(state, run_at(tmp_path / "other", 1000, "pairs"))


def test_an_empty_or_half_unpacked_run_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, run = tmp_path / "state", tmp_path / "run"
    leg.pack(run_at(tmp_path / "first", 10), state)

    def cut(tar: tarfile.TarFile, path: Path, **options: object) -> None:
        tar.extract(tar.getmembers()[0], path, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extractall", cut)
        with pytest.raises(KeyboardInterrupt):
            leg.unpack(state, run)
    assert not run.exists()
    run.mkdir()
    leg.unpack(state, run)
    assert leg.reached(run) == (0, 10)


def test_a_state_survives_a_stop_before_the_next_is_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, second = tmp_path / "state", run_at(tmp_path / "second", 20)
    leg.pack(run_at(tmp_path / "first", 10), state)
    replace_once, calls = os.replace, []

    def stopped(*paths: Path) -> None:
        calls.append(paths)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace_once(*paths)

    with monkeypatch.context() as patch:
        patch.setattr("lavit.files._exchange", lambda *folders: False)  # as where systems cannot
        patch.setattr(os, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            leg.pack(second, state)
    assert not state.exists()
    leg.unpack(state, tmp_path / "third")
    assert leg.reached(tmp_path / "third") == (0, 10)


def test_folders_of_something_else_are_neither_state_nor_run(tmp_path: Path) -> None:
    """Swapped arguments among them; nothing is removed."""
    run, state, own = run_at(tmp_path / "run", 10), tmp_path / "state", tmp_path / "own"
    leg.pack(run, state)
    own.mkdir()
    (own / "thesis.tex").write_text("x")
    for pair in ((run, state), (own, run), (own / "thesis.tex", run), (state, own), (run, run)):
        with pytest.raises(InputError, match=r"holds|lie in each other"):
            leg.unpack(*pair)
    for folder in (run, own):
        with pytest.raises(InputError, match="is no state of a training"):
            leg.pack(run, folder)
    assert leg.reached(run) == (0, 10) and (own / "thesis.tex").exists() and leg.packed(state)


def test_a_fine_tuning_goes_in_legs_too(tmp_path: Path) -> None:
    """Until its end it has no training.json; a stop before its settings leaves its cache alone."""
    run, state, following = tmp_path / "run", tmp_path / "state", tmp_path / "next"
    (run / "cache").mkdir(parents=True)
    (run / ".training.json.new").touch()  # a kill left it
    leg.unpack(state, run)
    checkpoint = run / "checkpoints" / "finetune" / "4"
    write_json(checkpoint / "step.json", {"step": 4})
    write_json(run / "finetune.json", {"data": "talks"})
    leg.pack(run, state)
    leg.unpack(state, following)
    assert leg.reached(following) == (0, 4)
    write_json(run / "finetune.json", {"data": "others"})
    with pytest.raises(InputError, match="two trainings"):
        leg.unpack(state, run)


def test_what_a_kill_left_is_not_packed(tmp_path: Path) -> None:
    run = run_at(tmp_path / "run", 10)
    for name in (".language.new", "checkpoints/tokenizer/.11.new"):
        write_json(run / name / "half.json", {})
    assert not [name for name in leg.kept(run) if "half" in name.name]


def test_a_leg_counts_imports_and_packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, given = tmp_path / "run", []

    def train(command: list[str], seconds: float) -> int:
        given.append(seconds)
        run_at(run, 10)
        return 143

    monkeypatch.setattr(leg, "leg", train)
    monkeypatch.setattr(leg, "running", lambda: 33.0)
    leg.main(tmp_path / "state", run, ("train", "all"), minutes=9)
    assert given == [540 - 33 - leg.PACKING]

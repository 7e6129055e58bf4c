"""What must not be lost or taken silently: signals, full disks, second processes, broken files."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import sys
import tarfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import toy_config, toy_training
from lavit.cli import VERBS, main
from lavit.config import InputError, Terminated, from_json, read_config, to_json
from lavit.data.corpus import load_corpus
from lavit.data.features import Features, compute_features
from lavit.data.sources import open_source
from lavit.data.stream import Stream
from lavit.evaluate.kept import Kept
from lavit.files import alone
from lavit.model import LaVIT
from lavit.presets import PRESETS
from lavit.train.encoded import _tokens_in
from lavit.train.loop import Report, _sigterms
from lavit.train.metrics import Metrics, read_lines
from lavit.train.run import open_run, train_stages
from test_train import begun_run, losses

RECIPES = Path(__file__).parent.parent / "recipes"
sys.path.insert(0, str(RECIPES))
import faults
import fuzz


# Python 3.12 on forks of a process with threads
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_kills_and_full_disks_change_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("toy", "toy-short"):  # the recipe's own
        monkeypatch.delitem(PRESETS, name, raising=False)
    faults.main(kills=2, only="language")
    assert "3 lines, 3 of them end in yes" in capsys.readouterr().out


def test_broken_inputs_are_named(toy_run: Path, tmp_path: Path) -> None:
    table, wrong = fuzz.fuzz(tmp_path / "inputs", toy_run, 60, seed=0)
    assert table.row_count == 13 and not wrong, "\n".join(wrong)


def test_sigterm_ends_a_training_with_its_step_saved(
    toy_run: Path, toy_data: Path, tmp_path: Path
) -> None:
    folder, before = begun_run(toy_run, tmp_path / "run"), signal.getsignal(signal.SIGTERM)

    def end(report: Report) -> None:
        if report.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    run = open_run(folder, toy_data, toy_config(), toy_training(), watch=end)
    with pytest.raises(Terminated, match="language is saved at step 2"):
        train_stages(run, ("language",))
    assert signal.getsignal(signal.SIGTERM) is before
    train_stages(open_run(folder, toy_data, toy_config(), toy_training()), ("language",))
    wanted = [line for line in losses(toy_run) if line[0] == "language"]
    assert losses(folder) == wanted


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (Terminated("stopped by SIGTERM, pixels is saved at step 3"), 143, "saved at step 3"),
        (OSError(28, "No space left on device"), 1, "make room on the disk"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: reset"), 1, "another process"),
        (RuntimeError("I/O error: File too large (os error 27)"), 1, "make room on the disk"),
    ],
)
def test_what_ends_a_command_is_one_line(
    error: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def verb() -> None:
        raise error

    monkeypatch.setitem(VERBS, "demo", verb)
    with pytest.raises(SystemExit) as end:
        main(["demo"])
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == code and len(lines) == 1 and said in lines[0]


def test_a_sigterm_that_a_library_makes_an_error_of_is_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """safetensors says of it: could not determine the shape of UntypedStorage."""

    def swallow(error: Exception) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Terminated:
            raise error from None

    for error in (ValueError("could not determine the shape"), InputError("no encoder")):
        monkeypatch.setitem(VERBS, "demo", partial(swallow, error=error))
        with pytest.raises(SystemExit) as end:
            main(["demo"])
        assert end.value.code == 143 and "stopped by SIGTERM" in capsys.readouterr().err
    with pytest.raises(Terminated, match="all is saved"), _sigterms("all is saved"):
        swallow(ValueError("could not determine the shape"))


def test_a_second_process_is_refused(toy_run: Path, toy_data: Path, tmp_path: Path) -> None:
    folder = begun_run(toy_run, tmp_path / "run")
    with alone(folder), pytest.raises(InputError, match="another process is writing"):
        train_stages(open_run(folder, toy_data, toy_config(), toy_training()), ("language",))
    with alone(folder):  # free again
        assert not (folder / "checkpoints").exists()


def test_two_evaluations_share_a_folder_and_not_a_file(
    toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["eval", str(toy_run), "--count", "1", "--figures", "kept_share", "--json", "b.json"]
    with alone(tmp_path, "a.predictions.jsonl"):
        main(asked)
    assert (tmp_path / "b.json").exists()
    with alone(tmp_path, "b.predictions.jsonl"), pytest.raises(SystemExit):
        main(asked)
    assert "another process is writing to b.predictions.jsonl" in capsys.readouterr().err


def test_checkpoints_with_other_moments_are_refused(
    toy_run: Path, toy_data: Path, tmp_path: Path
) -> None:
    """A tensor renamed or resized; without that checkpoint the training goes on from the last."""
    for number, change in enumerate((lambda t: t[:-1].clone(), None)):
        folder = begun_run(toy_run, tmp_path / str(number))
        shutil.copytree(toy_run / "checkpoints" / "language", folder / "checkpoints" / "language")
        file = folder / "checkpoints" / "language" / "6" / "optimizer.safetensors"
        tensors = load_file(file)
        name = max(tensors, key=lambda one: tensors[one].numel())
        tensor = tensors.pop(name)
        tensors[name if change else f"{name}_"] = change(tensor) if change else tensor
        save_file(tensors, file)
        run = open_run(folder, toy_data, toy_config(), toy_training())
        with pytest.raises(InputError, match="language/6 is of another configuration, or damaged"):
            train_stages(run, ("language",))
        shutil.rmtree(file.parent)
    train_stages(run, ("language",))
    assert losses(folder)[-1] in losses(toy_run)


def test_what_is_no_checkpoint_is_named(
    toy_run: Path, toy_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = begun_run(toy_run, tmp_path / "run")
    kept = folder / "checkpoints" / "language"
    shutil.copytree(toy_run / "checkpoints" / "language", kept)
    (kept / ".DS_Store").touch()
    train_stages(open_run(folder, toy_data, toy_config(), toy_training()), ("language",))
    assert f"{kept / '.DS_Store'} is no checkpoint and is left alone" in caplog.text


def test_a_kill_leaves_no_file_of_another_name_in_the_cache(
    toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rust writes a file through one of a random name, which nobody would remove."""
    config = toy_config()
    tokenizer = LaVIT.from_pretrained(toy_run, parts=("visual_tokenizer",)).visual_tokenizer
    features = Features(np.zeros((3, config.vision.patches, config.vision.dim), np.float16))
    monkeypatch.setattr("safetensors.torch.serialize_file", None)
    path = tmp_path / "tokens.safetensors"
    made = _tokens_in(path, tokenizer, features, torch.arange(3))
    assert _tokens_in(path, tokenizer, features, torch.arange(3)).codes.equal(made.codes)
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_features_that_were_cut_short_are_computed_anew(
    toy_run: Path, toy_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    vision = LaVIT.from_pretrained(toy_run, parts=("vision",)).vision
    records = [picture.record for picture in load_corpus(toy_data).pictures]
    first = compute_features(records, vision, tmp_path)
    rows, file = first.rows(torch.arange(8)), Path(first.array.filename)
    os.truncate(file, file.stat().st_size // 2)
    assert compute_features(records, vision, tmp_path).rows(torch.arange(8)).equal(rows)
    assert "computed anew" in caplog.text


def test_a_stopped_evaluation_ends_in_the_same_file(tmp_path: Path) -> None:
    """Whole and torn lines of a chunk that was being written are cut off."""
    path = tmp_path / "predictions.jsonl"

    def make(items: list[int]) -> list[int]:
        return [item**2 for item in items]

    def all_made() -> bytes:
        Kept(path, "key").made("task", range(7), make, together=3)
        return path.read_bytes()

    whole = all_made()
    for at in range(0, len(whole), 97):
        path.write_bytes(whole[:at])
        assert all_made() == whole, at


def test_lines_with_unusual_line_breaks_are_kept(tmp_path: Path) -> None:
    """U+2028 is a line's end to Python's `splitlines`, and a letter to JSON."""
    with Metrics(tmp_path, "language", 0, trackers=(), enabled=True) as metrics:
        metrics.append("samples.jsonl", 2, {"caption": "a\u2028b\x85c"})
    before = (tmp_path / "samples.jsonl").read_bytes()
    Metrics(tmp_path, "pixels", 0, trackers=(), enabled=True)
    assert (tmp_path / "samples.jsonl").read_bytes() == before
    assert next(read_lines(tmp_path / "samples.jsonl"))["caption"] == "a\u2028b\x85c"


def test_a_shard_cut_between_members_is_named(tmp_path: Path) -> None:
    """It reads as a shorter one: only its end is missing."""
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(4):
            info = tarfile.TarInfo(f"{number}.txt")
            info.size = 512
            tar.addfile(info, io.BytesIO(b"owl " * 128))
    assert len(open_source(path)) == 4
    os.truncate(path, 2 * 1024)
    for open_it in (open_source, Stream):
        with pytest.raises(InputError, match=r"0\.tar is cut short"):
            open_it(str(path))


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("train/metadata.jsonl", "{", "metadata.jsonl, line 9 is not valid JSON"),
        ("questions.jsonl", "[1]", "questions.jsonl, line 1 is no JSON object"),
        ("questions.jsonl", '{"image": "train/0.png"}', "line 1: question is 'None'"),
        ("edits.jsonl", '{"sources": [[]]}', r"line 1: sources is '\[\[\]\]', expected a list"),
    ],
)
def test_broken_lines_beside_pictures_are_named(
    toy_data: Path, tmp_path: Path, name: str, line: str, said: str
) -> None:
    shutil.copytree(toy_data, tmp_path / "data")
    with (tmp_path / "data" / name).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match=said):
        load_corpus(tmp_path / "data")


def test_weights_that_are_missing_are_not_drawn_at_random(toy_run: Path, tmp_path: Path) -> None:
    for part in ("vision", "language"):
        folder = tmp_path / part
        shutil.copytree(toy_run, folder, ignore=shutil.ignore_patterns("checkpoints", "cache"))
        file = folder / part / "model.safetensors"
        tensors = load_file(file)
        tensors.pop(next(name for name in tensors if name.endswith("weight")))
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(InputError, match="weights are missing or of another size"):
            LaVIT.from_pretrained(folder, parts=(part,))


@pytest.mark.parametrize("part", ["vision", "language", "pixels/unet"])
def test_weights_that_are_too_many_or_integers_are_named(
    toy_run: Path, tmp_path: Path, part: str
) -> None:
    """transformers and diffusers pass over the ones and round the others."""
    folder = tmp_path / "model"
    shutil.copytree(toy_run, folder, ignore=shutil.ignore_patterns("checkpoints", "cache"))
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("weight"))
    spoiled = {"more.weight": torch.ones(2)}, {name: tensors[name].long()}
    for change, wrong in zip(spoiled, ("more.weight (F32)", f"{name} (I64)"), strict=True):
        save_file(tensors | change, file, {"format": "pt"})
        with pytest.raises(InputError, match=re.escape(f"{file.name}: {wrong}")) as error:
            LaVIT.from_pretrained(folder, parts=(part.split("/")[0],))
        assert str(folder / part) in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("codes", 10**30, "TokenizerConfig.codes"),
        ("merger_depth", 10**6, "visual_tokenizer.merger_depth is 1000000, expected 1 to 1000"),
        ("dim", "32", "TokenizerConfig.dim is '32', expected int"),
        ("position_code", 1, "TokenizerConfig.position_code is '1', expected bool"),
        ("mlp_ratio", [2.0], "TokenizerConfig.mlp_ratio"),
    ],
)
def test_settings_of_another_kind_are_refused(
    toy_run: Path, tmp_path: Path, name: str, value: object, said: str
) -> None:
    data = json.loads((toy_run / "config.json").read_text())
    data["visual_tokenizer"][name] = value
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=said) as error:
        read_config(tmp_path)
    assert "config.json: " in str(error.value)


def test_settings_come_back_from_json() -> None:
    training = replace(toy_training(), sample_every=3)
    assert from_json(type(training), to_json(training)) == training

"""What `lavit eval --task` is given that is wrong, was changed meanwhile, or lies elsewhere."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lavit
from conftest import toy_picture
from lavit.cli import main
from lavit.cli.eval import _print_figures
from lavit.config import InputError, read_config, write_config
from lavit.evaluate import examinee
from lavit.evaluate.benchmarks import image_metrics, making, run, scores
from lavit.evaluate.benchmarks.layouts import load_examples
from lavit.evaluate.benchmarks.run import Row, RowSettings
from lavit.evaluate.benchmarks.scores import distance_figures
from lavit.evaluate.examinee import predictions_path, weights_hash
from lavit.files import alone
from lavit.storage import hash_of_base, load_base
from test_benchmarks import PICTURES, atoms_line, clip, inception, make, write  # noqa: F401


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def changed(path: Path, change: Callable[[Any], Any]) -> None:
    """Change what a JSON file holds."""
    data = json.loads(path.read_text())
    write(path, change(data) or data)


def row(model: Path, name: str, folder: Path, **settings: Any) -> Row:
    """A row of a toy copy below a folder, which is made where it is not there."""
    if not (folder / "data").exists():
        make(name, folder / "data")
    return Row(model, name, folder / "data", RowSettings(**settings), folder / "k.jsonl")


def test_drawings_are_known_by_their_bytes(
    toy_run: Path,
    tmp_path: Path,
    inception: Path,  # noqa: F811
) -> None:
    def measured(seed: int = 0, **how: Any) -> dict[str, Any]:
        made = row(toy_run, "coco_image", tmp_path, inception=inception, seed=seed, **how)
        return made.run()["figures"]  # type: ignore[index]

    drawn = tmp_path / "k.pictures"
    first = measured()
    files = {path.name: path.read_bytes() for path in drawn.iterdir()}
    assert measured(seed=1) != first and (drawn / "1.png").read_bytes() != files["1.png"]
    assert measured() == first
    assert {path.name: path.read_bytes() for path in drawn.iterdir()} == files
    (drawn / "2.png").unlink()
    assert measured() == first and (drawn / "2.png").read_bytes() == files["2.png"]
    assert measured(out=tmp_path / "other") == first
    assert (tmp_path / "other" / "3.png").read_bytes() == files["3.png"]
    with alone(tmp_path, "other"), pytest.raises(InputError, match="another process is writing"):
        measured(out=tmp_path / "other")
    (tmp_path / "a file").write_text("")
    with pytest.raises(InputError, match="cannot write to"):
        measured(out=tmp_path / "a file")


def test_an_export_that_was_deleted_is_made_again(
    toy_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def exported(out: str) -> list[Path]:
        row(toy_run, "geneval", tmp_path, out=tmp_path / out, count=1).run()
        return [path for path in sorted((tmp_path / out).rglob("*")) if path.is_file()]

    before = {path: path.read_bytes() for path in exported("samples")}
    assert len(before) == 5
    shutil.rmtree(tmp_path / "samples")
    assert {path: path.read_bytes() for path in exported("samples")} == before
    assert "is gone or was changed: it is drawn again" in caplog.text
    assert len(exported("other")) == 5


def test_another_picture_under_the_same_name_is_read(toy_run: Path, tmp_path: Path) -> None:
    row(toy_run, "coco_caption", tmp_path).run()
    lines = rows_of(tmp_path / "k.jsonl")
    assert [line["name"] for line in lines] == [
        "COCO_val2014_000000000042.jpg", "COCO_val2014_000000000073.jpg",
    ]  # fmt: skip
    file = tmp_path / "data" / "val2014" / "COCO_val2014_000000000042.jpg"
    toy_picture(PICTURES[2]).save(file)
    found = row(toy_run, "coco_caption", tmp_path)
    found.run()
    again = rows_of(tmp_path / "k.jsonl")
    assert len(again) == 4 and again[2]["key"] == found.key != lines[0]["key"]


def test_a_picture_that_cannot_be_read_counts_as_wrong(toy_run: Path, tmp_path: Path) -> None:
    make("vqav2", tmp_path / "data")
    broken = tmp_path / "data" / "val2014" / "COCO_val2014_000000000042.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    found = row(toy_run, "vqav2", tmp_path).run()
    assert found is not None
    assert found["figures"]["vqa_accuracy"]["details"]["yes/no"] == 0
    assert found["notes"] == ["pictures that cannot be read, counted as wrong: 1 (420)"]
    made = [line["made"] for line in rows_of(tmp_path / "k.jsonl")]
    assert "damaged" in made[0]["unread"] and isinstance(made[1], str)
    # an answer of nothing would be right where people say "the"
    example = load_examples("vqav2", tmp_path / "data")[0][0]
    figures = scores.answer_figures([example], [made[0]])
    assert figures["vqa_accuracy"].value == 0
    assert scores.caption_figures([example], [made[0]])["bleu_1"].value == 0


def test_a_bad_network_is_refused_before_anything_is_drawn(
    toy_run: Path,
    tmp_path: Path,
    clip: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Scalar(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.float().mean()

    monkeypatch.setattr(making.Maker, "pictures", None)  # nothing is drawn
    (tmp_path / "bad.pt").write_bytes(b"no network")
    with pytest.raises(InputError, match="not a TorchScript file"):
        row(toy_run, "coco_image", tmp_path, inception=tmp_path / "bad.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(Scalar()), str(tmp_path / "one.pt"))
    with pytest.raises(InputError, match=r"one\.pt gives "):
        row(toy_run, "coco_image", tmp_path, inception=tmp_path / "one.pt")
    shutil.copytree(clip, tmp_path / "clip")
    (tmp_path / "clip" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="CLIP"):
        row(toy_run, "coco_image", tmp_path, clip=tmp_path / "clip")
    with pytest.raises(InputError, match="2 examples or more"):
        row(toy_run, "coco_image", tmp_path, inception=tmp_path / "one.pt", count=1)


def test_figures_of_few_pictures_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for module in (scores, image_metrics):
        monkeypatch.setattr(module, "SUBSET", 40)
    few = distance_figures(rng.random((20, 4)), rng.random((20, 4)))
    assert "20 pictures" in few["fid"].note
    assert few["kid"].low is None and few["fid"].low is None
    monkeypatch.setattr(scores, "FEW", 50)
    many = distance_figures(rng.random((50, 4)), rng.random((50, 4)))
    assert many["kid"].low < many["kid"].value < many["kid"].high and not many["fid"].note


def test_small_figures_have_digits(capsys: pytest.CaptureFixture[str]) -> None:
    _print_figures({"kid": {"value": 0.00213, "low": None, "high": None, "count": 9,
                            "floor": None, "ceiling": None}})  # fmt: skip
    assert capsys.readouterr().out.splitlines()[1].split() == ["kid", "0.00213", "9"]


def test_the_best_of_four_says_who_chose(
    toy_run: Path,
    tmp_path: Path,
    clip: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    make("coco_image", tmp_path / "data")
    words = ["--task", "coco_image", "--data", str(tmp_path / "data"), "--clip", str(clip)]
    out = tmp_path / "k.json"
    main(["eval", str(toy_run), *words, "--json", str(out), "--count", "2"])
    figures = json.loads(out.read_text())["figures"]
    assert "best of 4 by this same CLIP" in figures["clip_score"]["note"]
    assert "best of 4 by this same CLIP" in capsys.readouterr().out
    pipe = lavit.load(toy_run, protocol="paper")
    first = pipe.draw([PICTURES[0], PICTURES[1]], seed=[0, 1], best_of=1)
    wanted = run.Clip(clip, torch.device("cpu")).scores(PICTURES[:2], first)
    assert figures["clip_score_first"]["value"] == pytest.approx(np.mean(wanted), abs=1e-3)
    assert figures["clip_score"]["value"] >= figures["clip_score_first"]["value"]
    main(["eval", str(toy_run), *words, "--json", str(out), "--protocol", "default"])
    found = json.loads(out.read_text())
    assert found["protocol"]["candidates"] == 1 and "clip_score_first" not in found["figures"]


def test_the_whole_folder_of_a_clip_is_hashed(tmp_path: Path) -> None:
    before = set()
    for name in ("config.json", "pytorch_model.bin", "merges.txt", "model.safetensors"):
        (tmp_path / name).write_bytes(b"0")
        before.add(run._hashed(tmp_path))
    assert len(before) == 4


def test_the_protocol_is_chosen_and_written(
    toy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make("vizwiz", tmp_path / "data")
    words = ["eval", str(toy_run), "--task", "vizwiz", "--data", str(tmp_path / "data")]
    protocols = []
    for name in ("paper", "default"):
        main([*words, "--protocol", name, "--json", str(tmp_path / "k.json")])
        protocols.append(json.loads((tmp_path / "k.json").read_text())["protocol"])
        assert f"protocol: {name}" in capsys.readouterr().out
    assert [one["sampling"]["beams"] for one in protocols] == [5, 1]
    assert [one["asks_first"] for one in protocols] == [True, False]
    assert len({line["key"] for line in rows_of(tmp_path / "k.predictions.jsonl")}) == 2


@pytest.mark.parametrize(
    ("task", "option"),
    [
        ("gqa", ["--valid"]),
        ("gqa", ["--figures", "cider"]),
        ("gqa", ["--items", "x.jsonl"]),
        ("gqa", ["--objects", "3"]),
        ("gqa", ["--held-out-pairs", "0.1"]),
        ("gqa", ["--pictures", "out"]),
        ("", ["--batch", "4"]),
        ("", ["--protocol", "paper"]),
    ],
)
def test_options_without_meaning_are_refused(
    task: str,
    option: list[str],
    toy_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--task", task, "--data", str(tmp_path)] if task else []
    with pytest.raises(SystemExit) as stop:
        main(["eval", str(toy_run), *words, *option])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    assert said.startswith(f"lavit: {option[0]} ") and "leave it out" in said


QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
ANSWERS = "v2_mscoco_val2014_annotations.json"
GQA = "testdev_balanced_questions.json"
LINES, LINES2 = "evaluation_metadata.jsonl", "geneval2_data.jsonl"
COCO = "annotations/captions_val2014.json"


def every(rows: str, **fields: Any) -> Callable[[Any], None]:
    """Give all objects of a list these fields."""
    return lambda data: [one.update(fields) for one in data[rows]] and None


def twice(rows: str) -> Callable[[Any], Any]:
    """All objects of a list twice."""
    return lambda data: {**data, rows: data[rows] * 2}


@pytest.mark.parametrize(
    ("name", "file", "change", "said"),
    [
        ("vqav2", QUESTIONS, every("questions", image_id="42"), "is '42', expected a whole number"),
        ("vqav2", QUESTIONS, every("questions", question=None), "is None, expected a text"),
        ("vqav2", QUESTIONS, every("questions", question="?!"), "asks '.!', which has no words"),
        ("vqav2", QUESTIONS, twice("questions"), "more than once .420, 730"),
        ("vqav2", ANSWERS, twice("annotations"), "question 730 twice"),
        ("vqav2", ANSWERS, every("annotations", answers=[{"answer": 2}]), "answer is 2"),
        ("vqav2", ANSWERS, every("annotations", answers="yes"), "is 'yes', expected a list"),
        ("vqav2", ANSWERS, every("annotations", answer_type=3), "answer_type is 3"),
        ("gqa", GQA, lambda d: d["201"].update(answer=3), "answer is 3"),
        ("gqa", GQA, lambda d: d["201"].update(answer=None), "answer is None"),
        ("gqa", GQA, lambda d: d["201"].update(imageId="../n1"), "expected the name of a file"),
        ("coco_caption", "dataset_coco.json", every("images", sentences=[{"raw": None}]), "raw is"),
        ("nocaps", "nocaps_val_4500_captions.json", every("images", domain=None), "domain is None"),
        ("coco_image", COCO, every("images", id="../../out"), "id is '../../out'"),
        ("coco_image", COCO, twice("images"), "twice"),
        ("geneval", LINES, lambda d: {"tag": "a", "prompt": 3}, "prompt is 3"),
        ("geneval", LINES, lambda d: {"tag": "a", "prompt": "\ud800"}, "halves of characters"),
        ("geneval2", LINES2, lambda d: {**d, "vqa_list": [["Are there?", 1]]}, "is 1"),
        ("geneval2", LINES2, lambda d: {**d, "skills": [None]}, "is None"),
    ],
)  # fmt: skip
def test_fields_are_checked_as_they_are_loaded(
    name: str, file: str, change: Callable[[Any], Any], said: str, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    if name.startswith("geneval"):
        write(data / file, atoms_line("an owl", ("Are there any owls?", "Yes", "object")))
    else:
        make(name, data)
    changed(data / file, change)
    with pytest.raises(InputError, match=said):
        load_examples(name, data)


def test_json_that_is_nested_too_deep_is_refused(tmp_path: Path) -> None:
    make("vqav2", tmp_path / "data")
    (tmp_path / "data" / QUESTIONS).write_text("[" * 100_000)
    with pytest.raises(InputError, match="is not JSON"):
        load_examples("vqav2", tmp_path / "data")


@pytest.mark.parametrize(("rank", "ranks"), [("abc", "2"), ("2", "2"), ("-1", "2"), ("0", "0")])
def test_a_place_that_is_none_is_refused(
    rank: str, ranks: str, toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", ranks)
    with pytest.raises(InputError, match=f"RANK={rank} WORLD_SIZE={ranks}"):
        row(toy_run, "gqa", tmp_path)


def test_who_is_waited_for_is_said(
    toy_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Stop(Exception):
        pass

    def stop(_: float) -> None:
        raise Stop

    caplog.set_level("INFO")
    monkeypatch.setattr(run.time, "sleep", stop)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(Stop):
        row(toy_run, "gqa", tmp_path, batch=1).run()
    assert "waiting for RANK 1, 2 of WORLD_SIZE 3" in caplog.text


def test_a_shipped_model_is_measured_elsewhere(
    toy_run: Path,
    toy_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shipped = tmp_path / "weights" / "toy"
    ignored = shutil.ignore_patterns("checkpoints", "cache", "tensorboard", "evaluation")
    shutil.copytree(toy_run, shipped, ignore=ignored)
    for module in ("lavit.storage", "lavit.evaluate.examinee"):
        monkeypatch.setattr(f"{module}.WEIGHTS", shipped.parent)
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in shipped.rglob("*")}
    make("gqa", tmp_path / "data")
    main(["eval", "toy", "--task", "gqa", "--data", "data"])
    assert "kept in evaluation/toy/gqa.jsonl" in capsys.readouterr().out
    main(["eval", "toy", "--data", str(toy_data), "--count", "2"])
    assert {path: path.stat().st_mtime_ns for path in shipped.rglob("*")} == before
    kept = {path.name for path in (tmp_path / "evaluation" / "toy").iterdir()}
    assert {"gqa.jsonl", "predictions.jsonl"} <= kept
    main(["eval", str(shipped), "--count", "2"])  # as recipes do, on what it was trained on
    assert (shipped / "eval.jsonl").is_file() and not (shipped / "evaluation").exists()
    assert predictions_path(toy_run, None) == toy_run / "evaluation" / "predictions.jsonl"
    assert examinee.is_shipped(shipped) and not examinee.is_shipped(toy_run)


def test_the_base_of_an_adapter_is_part_of_its_weights(toy_run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "kept"
    shutil.copytree(toy_run / "language", folder / "base")
    shutil.copytree(toy_run / "reader", folder / "reader")
    config = read_config(toy_run)
    language = config.language
    write_config(folder, config)
    before = weights_hash(folder)
    found = hash_of_base(folder / "base")
    adapted = replace(language, source="base", architecture={}, lora_rank=4, sha256=found)
    load_base(adapted, folder / "language")
    path = folder / "base" / "model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name] + 1}, path, {"format": "pt"})
    assert weights_hash(folder) != before
    with pytest.raises(InputError, match="not those that the adapter"):
        load_base(adapted, folder / "language")


def test_predictions_of_another_number_type_are_not_taken(
    toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = lavit.load
    keys = []
    for dtype in ("float32", "bfloat16"):
        monkeypatch.setattr(lavit, "load", lambda *at, d=dtype, **how: load(*at, dtype=d, **how))
        keys.append(row(toy_run, "gqa", tmp_path).key)
    assert keys[0] != keys[1]

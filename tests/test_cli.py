"""The command line on a toy run: every verb, its JSON, bad input with one line and exit code 2."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import toy_picture
from lavit.cli import main
from lavit.files import load_tensors, save_tensors


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "picture.png"
    toy_picture("red square").save(path)
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    main(words)
    return capsys.readouterr().out.splitlines()


def test_a_full_disk_leaves_the_picture_of_before(
    toy_run: Path,
    picture: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(path: Path, data: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    before = Path(picture).read_bytes()
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SystemExit) as ended:
        main(["draw", "red", "--out", picture, "--steps", "1", "--model", str(toy_run)])
    assert ended.value.code == 1
    assert "No space left on device: make room" in capsys.readouterr().err
    assert Path(picture).read_bytes() == before


def test_caption_json_has_one_object_a_line(
    toy_run: Path, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        json.loads(line)
        for line in run(capsys, "caption", picture, picture, "--model", str(toy_run), "--json")
    ]
    assert [set(line) for line in lines] == [{"image", "caption", "tokens", "seconds"}] * 2
    assert lines[0]["caption"] == lines[1]["caption"] and 1 <= lines[0]["tokens"] <= 16


def test_tokenize_json_is_reproducible(
    toy_run: Path, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (
        run(capsys, "tokenize", picture, "--model", str(toy_run), "--json") for _ in range(2)
    )
    assert first == second
    line = json.loads(first[0])
    assert set(line) == {"image", "codes", "kept", "length"}
    assert line["length"] == len(line["codes"]) == len(line["kept"])


def test_verbs_that_write_pictures(
    toy_run: Path, picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ("--model", str(toy_run))
    out = tmp_path / "new" / "folder"
    run(
        capsys,
        "draw",
        "red dot",
        "--out",
        str(out / "draw.png"),
        "--n",
        "2",
        "--steps",
        "2",
        *model,
    )
    run(capsys, "edit", picture, "as a dot", "--out", str(out / "edit.png"), "--steps", "2", *model)
    run(capsys, "reconstruct", picture, "--out", str(out / "back.png"), "--steps", "2", *model)
    run(capsys, "inspect", picture, "--out", str(out / "kept.png"), *model)
    names = sorted(path.name for path in out.iterdir())
    assert names == ["back.png", "draw-0.png", "draw-1.png", "edit.png", "kept.png"]
    with Image.open(out / "back.png") as back:
        assert back.size == (16, 16)


def test_draw_takes_several_prompts_and_keeps_the_best(
    toy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ("--model", str(toy_run), "--steps", "2")
    run(
        capsys,
        "draw",
        "red dot",
        "blue bar",
        "--n",
        "2",
        "--out",
        str(tmp_path / "two.png"),
        *model,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"two-{i}.png" for i in range(4)]
    one = ("--n", "2", "--seed", "2", "--out", str(tmp_path / "one.png"))
    run(capsys, "draw", "blue bar", *one, *model)
    for own, other in ((0, 2), (1, 3)):
        with (
            Image.open(tmp_path / f"one-{own}.png") as one,
            Image.open(tmp_path / f"two-{other}.png") as two,
        ):
            assert abs(np.asarray(one, float) - np.asarray(two, float)).mean() < 1
    run(capsys, "draw", "blue bar", "--best-of", "2", "--out", str(tmp_path / "best.png"), *model)
    import lavit

    best = lavit.load(toy_run).draw("blue bar", best_of=2, steps=2)
    with Image.open(tmp_path / "best.png") as kept:
        assert kept.tobytes() == best.tobytes()


def test_the_papers_protocol_is_a_flag(
    toy_run: Path, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import lavit

    said = run(capsys, "caption", picture, "--protocol", "paper", "--model", str(toy_run))
    assert said == lavit.load(toy_run, protocol="paper").caption([picture])


@pytest.mark.parametrize("option", [("--gpus", "8"), ("--memory", "24")])
def test_options_of_a_plan_start_no_training(
    option: tuple[str, str], toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "all", "--data", str(toy_data), "--out", str(tmp_path / "run"), *option])
    assert stopped.value.code == 2 and not (tmp_path / "run").exists()
    assert "--gpus and --memory are of --plan" in capsys.readouterr().err


def test_chat_reads_lines(
    toy_run: Path,
    picture: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = ["/image nowhere.png", f"/image {picture}", "/draw as a bar", "/draw again"]
    monkeypatch.setattr("sys.stdin", lines)
    main(["chat", "--model", str(toy_run), "--out", str(tmp_path / "new.png"), "--steps", "2"])
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [str(tmp_path / "new.png"), str(tmp_path / "new-1.png")]
    assert "nowhere.png" in shown.err
    import lavit

    edited = lavit.load(toy_run).edit(picture, "as a bar", steps=2)
    with Image.open(tmp_path / "new.png") as written:
        assert written.tobytes() == edited.tobytes()


def test_help_brings_no_torch() -> None:
    """Help and typing errors come at once: nothing heavy is imported for them."""
    code = (
        "import sys, lavit.cli\n"
        "try: lavit.cli.main(['--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "caption" in found.stdout and found.stdout.splitlines()[-1] == "False"


def test_a_reader_that_leaves_ends_the_command_quietly() -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-m", "lavit", "--help"], **pipes) as told:
        told.stdout.close()
        assert told.stderr.read() == b"" and told.wait() == 141


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is the OpenMP of torch on Linux")
@pytest.mark.parametrize(("asked", "spins"), [("", 1000), ("passive", 0)])
def test_waiting_threads_soon_give_their_core_away_unless_asked_otherwise(
    asked: str, spins: int
) -> None:
    settings = {
        name: value
        for name, value in os.environ.items()
        if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    settings |= {"OMP_DISPLAY_ENV": "verbose"} | ({"OMP_WAIT_POLICY": asked} if asked else {})
    maps = Path("/proc/self/maps").read_text().split()
    openmp = next(word for word in maps if "libgomp" in word and "torch" in word)
    code = "import ctypes, lavit.cli\ntry: lavit.cli.main(['--help'])\n"
    code += f"except SystemExit: ctypes.CDLL({openmp!r})"  # as torch does, after seconds of import
    said = subprocess.run(
        [sys.executable, "-c", code], env=settings, capture_output=True, text=True
    )
    assert int(re.findall(r"GOMP_SPINCOUNT *= *'(\w+)'", said.stderr)[-1]) == spins


def test_choose_ranks_texts(
    toy_run: Path, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import lavit

    texts = ["a red bar", "a blue dot", "nothing"]
    said = run(capsys, "choose", picture, *texts, "--n", "3", "--model", str(toy_run))
    assert said == lavit.load(toy_run).rank(picture, texts) and sorted(said) == sorted(texts)


def test_ask_answers(toy_run: Path, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(run(capsys, "ask", picture, "what is it?", "--model", str(toy_run))) == 1


@pytest.mark.parametrize(
    "words",
    [
        ("caption", "nowhere.png"),
        ("caption", "FOLDER"),
        ("caption", "TEXT"),
        ("caption", "CUT"),
        ("caption", "BOMB"),
        ("caption",),
        ("ask", "PICTURE", " "),
        ("choose", "PICTURE", "red", "red"),
        ("choose", "PICTURE"),
        ("choose", "PICTURE", "red", "--n", "2"),
        ("draw", " ", "--out", "x.png"),
        ("draw", "\udcff", "--out", "x.png"),
        ("ask", "PICTURE", "which \ud800?"),
        ("draw", "red", "--out", "x.png", "--n", "0"),
        ("draw", "red", "--out", "TEXT/x.png", "--steps", "1"),
        ("draw", "red", "--out", "x.xyz"),
        ("train", "all", "--data", "EMPTY", "--out", "RUN"),
        ("train", "all", "--data", "EMPTY", "--out", "RUN", "--preset", "huge"),
        ("train", "tokenizer", "--data", "EMPTY", "--out", "RUN", "--minutes", "nan"),
        ("train", "tokenizer", "--data", "EMPTY", "--out", "RUN", "--minutes", "inf"),
        ("train", "tokenizer", "--data", "scenes", "--out", "RUN", "--stream", "--seed", "-1"),
        ("chat", "--out", "x.xyz"),
        ("inspect", "PICTURE", "--out", "x.xyz"),
        ("train", "language", "--plan", "--lora", "-3"),
        ("train", "language", "--plan", "--memory", "nan"),
        ("train", "language", "--plan", "--fsdp"),
        ("train", "tokenizer", "--plan", "--fsdp", "--gpus", "8"),
        ("train", "all", "--data", "EMPTY", "--out", "RUN", "--fsdp"),
    ],
    ids=lambda words: " ".join(words),
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: tuple[str, ...],
    toy_run: Path,
    picture: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "cut.png").write_bytes(Path(picture).read_bytes()[:60])
    (tmp_path / "bomb.png").write_bytes(_bomb())
    (tmp_path / "empty").mkdir()
    places = {
        "FOLDER": tmp_path,
        "TEXT": tmp_path / "text.png",
        "CUT": tmp_path / "cut.png",
        "BOMB": tmp_path / "bomb.png",
        "PICTURE": Path(picture),
        "EMPTY": tmp_path / "empty",
        "RUN": tmp_path / "run",
    }
    given = [
        str(places[w.split("/")[0]]) + w[len(w.split("/")[0]) :] if w.split("/")[0] in places else w
        for w in words
    ]
    if words[0] != "train":
        given += ["--model", str(toy_run)]
    with pytest.raises(SystemExit) as stop:
        main(given)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("lavit: "), error


def test_a_run_of_other_sizes_is_one_line(
    toy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    shutil.copytree(toy_run, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["visual_tokenizer"]["codes"] = 64
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    toy_picture("red dot").save(tmp_path / "p.png")
    with pytest.raises(SystemExit) as stop:
        main(["tokenize", str(tmp_path / "p.png"), "--model", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert "this configuration expects [64" in capsys.readouterr().err


def _bomb() -> bytes:
    """A PNG of a few bytes that says it has 40,000 x 40,000 pixels."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def test_convert_check_prints_errors_and_exit_codes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixture = Path(__file__).parent / "data" / "parity.safetensors"
    lines = [json.loads(line) for line in run(capsys, "convert", "check", str(fixture), "--json")]
    assert len(lines) == 10 and all(line["ok"] and line["error"] < 1e-4 for line in lines)
    with pytest.raises(SystemExit) as stop:
        main(["convert", "check", str(tmp_path / "nothing.safetensors")])
    assert stop.value.code == 2


def test_data_check_counts_and_names(toy_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(run(capsys, "data", "check", str(toy_data), "--json")[0])
    assert report["records"] == 8 and report["broken"] == []
    said = [line.split(maxsplit=1) for line in run(capsys, "data", "check", str(toy_data))]
    assert ["broken", "none"] in said and ["sizes", "48x48: 8"] in said


def test_the_package_is_the_command_line() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "lavit", "data", "--help"], capture_output=True, text=True
    )
    assert found.returncode == 0 and "scenes" in found.stdout


def test_a_long_question_is_said_to_be_cut(
    toy_run: Path, picture: str, caplog: pytest.LogCaptureFixture
) -> None:
    for count, said in ((50, []), (51, ["51 words"])):
        caplog.clear()
        main(["ask", picture, "red " * count, "--model", str(toy_run)])
        assert [each in caplog.text for each in said] == [True] * len(said)
        assert ("are read" in caplog.text) == bool(said)


def test_a_model_with_too_long_a_name_is_not_there(
    picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["caption", picture, "--model", "x" * 3000])
    assert stop.value.code == 2
    assert "there is no model" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["language/model", "vision/model", "pixels/condition/model"])
def test_weights_that_are_no_numbers_are_said_to_be_damaged(
    file: str, toy_run: Path, picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(toy_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    path = tmp_path / "run" / f"{file}.safetensors"
    tensors = {name: tensor * float("nan") for name, tensor in load_tensors(path).items()}
    save_tensors(tensors, path)
    words = ["caption", picture]
    if "pixels" in file:
        words = ["draw", "red", "--out", str(tmp_path / "x.png")]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--model", str(tmp_path / "run")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "damaged?" in error or "diverge?" in error

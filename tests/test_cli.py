"""The command line end to end on a toy run: every verb, its JSON, and bad input with one line and exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from conftest import toy_picture
from lavit.cli import main


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "picture.png"
    toy_picture("red square").save(path)
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    main(words)
    return capsys.readouterr().out.splitlines()


def test_caption_json_has_one_object_a_line(toy_run: Path, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.loads(line) for line in run(capsys, "caption", picture, picture, "--model", str(toy_run), "--json")]
    assert [set(line) for line in lines] == [{"image", "caption", "tokens", "seconds"}] * 2
    assert lines[0]["caption"] == lines[1]["caption"] and 1 <= lines[0]["tokens"] <= 16


def test_tokenize_json_is_reproducible(toy_run: Path, picture: str, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (run(capsys, "tokenize", picture, "--model", str(toy_run), "--json") for _ in range(2))
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
        ("draw", " ", "--out", "x.png"),
        ("draw", "red", "--out", "x.png", "--n", "0"),
        ("draw", "red", "--out", "TEXT/x.png", "--steps", "1"),
        ("train", "all", "--data", "EMPTY", "--out", "RUN"),
        ("train", "all", "--data", "EMPTY", "--out", "RUN", "--preset", "huge"),
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
        str(places[w.split("/")[0]]) + w[len(w.split("/")[0]) :] if w.split("/")[0] in places else w for w in words
    ]
    if words[0] != "train":
        given += ["--model", str(toy_run)]
    with pytest.raises(SystemExit) as stop:
        main(given)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("lavit: "), error


def test_a_run_of_other_sizes_is_one_line(toy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    shutil.copytree(toy_run, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["tokenizer"]["codes"] = 64
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
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_convert_check_prints_errors_and_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fixture = Path(__file__).parent / "data" / "parity.safetensors"
    lines = [json.loads(line) for line in run(capsys, "convert", "check", str(fixture), "--json")]
    assert len(lines) == 10 and all(line["ok"] and line["error"] < 1e-4 for line in lines)
    with pytest.raises(SystemExit) as stop:
        main(["convert", "check", str(tmp_path / "nothing.safetensors")])
    assert stop.value.code == 2


def test_data_check_counts_and_names(toy_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(run(capsys, "data", "check", str(toy_data), "--json")[0])
    assert report["records"] == 8 and report["broken"] == []

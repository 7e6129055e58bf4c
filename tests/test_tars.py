"""WebDataset tars as people make them: every sample that can be used is, the others are named."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import NAMES, short_streams, toy_config, toy_picture, toy_training
from lavit.cli import main
from lavit.data.sources import Streamed, load_records, open_source, readable, stream_source
from lavit.data.text import Texts
from lavit.train.run import open_run, train_stages
from lavit.train.settings import STAGES
from test_streaming import nothing_is_held_out  # noqa: F401 (fixture)

KINDS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF"}


def write_tar(path: Path, names: str) -> Path:
    """Files of these names: pictures and texts "of KEY"; "!" leads one that is broken."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(names.split()):
            broken, name = name.startswith("!"), name.removeprefix("!")
            key, ending = name.split(".")
            data = "of é".encode("latin-1") if broken else f"of {key}".encode()
            if kind := KINDS.get(ending.lower()):
                stream = io.BytesIO()
                toy_picture(NAMES[number % len(NAMES)]).save(stream, kind)
                data = stream.getvalue()[: 60 if broken else None]
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


SIX = " ".join(f"{number}.jpg {number}.txt" for number in range(6))
# files, texts of the samples that are used, keys of those left out
CASES = {
    "endings": ("a.jpg a.txt b.png b.txt c.webp c.txt d.JPG d.txt e.gif e.txt", "abcde", ""),
    "late": (f"{SIX} b.png b.txt", "012345b", ""),
    "twice": ("a.jpg a.txt a.jpg a.txt b.jpg b.txt a.png a.txt", "aaba", ""),
    "repeated": ("a.jpg a.jpg a.txt", "-a", ""),
    "no text": ("a.jpg b.jpg b.txt", "-b", ""),
    "late text": (f"{SIX.replace('.txt', '.cls')} a.jpg a.txt", "------a", ""),
    "no picture": ("a.txt b.jpg b.txt", "b", "a"),
    "late without": (f"{SIX} a.txt b.jpg b.txt", "012345b", "a"),
    "apart": ("a.jpg b.jpg a.txt b.txt", "--", "ab"),
    "broken": ("a.jpg !a.txt !b.jpg b.txt a.json c.jpg c.txt !c.json", "-c", "ba"),
    "two": ("a.png a.jpg a.mask b.jpg b.txt", "-b", ""),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_every_sample_is_used_or_named(tmp_path: Path, name: str, stream: bool) -> None:
    names, texts, left_out = CASES[name]
    folder = write_tar(tmp_path / "tars" / "0.tar", names).parent
    if stream:
        source: Streamed = stream_source(folder)
        records = [source.record(row, place) for place, row in enumerate(source.rows)]
    else:
        records = list(load_records(folder))
    good, bad = readable(records)
    assert "".join(record.texts[0][3:] if record.texts else "-" for record in good) == texts
    assert "".join(name.split("] ")[1][0] for name, _ in bad) == left_out
    assert all("it holds no picture" in why or "is damaged" in why for _, why in bad)


def test_a_text_that_is_no_text_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = stream_source(write_tar(tmp_path / "0.tar", "a.jpg !a.txt b.jpg b.txt"))
    for _ in range(2):
        assert [row["text"] for row in source.rows] == [None, "of b"]
    (said,) = caplog.messages
    assert said == f"left out the text a.txt of {tmp_path / '0.tar'}: it is not UTF-8"


@pytest.mark.parametrize("stream", [False, True])
def test_a_caption_may_stand_in_the_json_of_a_sample(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    """As img2dataset writes it; a text beside it is taken first."""
    write_tar(tmp_path / "tars" / "0.tar", "a.jpg b.jpg b.txt c.jpg d.jpg")
    said = {"a": '{"key": 1, "caption": "of é"}', "c": '{"key": 1}', "d": "[", "e": "[]"}
    with tarfile.open(tmp_path / "tars" / "1.tar", "w") as tar:
        for key, text in said.items():
            add(tar, f"{key}.jpg", jpeg())
            add(tar, f"{key}.json", text.encode())
        add(tar, "f.json", b'{"caption": "no"}')
        add(tar, "f.txt", b"of f")
        add(tar, "f.jpg", jpeg())
    if stream:
        source: Streamed = stream_source(tmp_path / "tars")
        records = [source.record(row, place) for place, row in enumerate(source.rows)]
    else:
        records = list(load_records(tmp_path / "tars"))
    texts = [record.texts for record in records]
    assert texts[4:] == [("of é",), (), (), (), ("of f",)] and texts[1] == ("of b",)
    assert len(caplog.messages) == 2
    assert all("it is no JSON object" in message for message in caplog.messages)


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def jpeg() -> bytes:
    stream = io.BytesIO()
    toy_picture(NAMES[0]).save(stream, "JPEG")
    return stream.getvalue()


def test_tars_of_text_are_texts_and_the_first_of_more_may_be(tmp_path: Path) -> None:
    """A source of pictures whose first shard has none stays one."""
    first = write_tar(tmp_path / "tars" / "0.tar", "a.txt b.txt")
    assert list(open_source(first)) == ["of a", "of b"]
    assert stream_source(first).image is None
    write_tar(tmp_path / "tars" / "1.tar", "c.jpg c.txt")
    found = open_source(first.parent)
    assert not isinstance(found, Texts) and len(readable(found)[0]) == 1


def test_a_card_that_lists_tars_is_read_like_them(tmp_path: Path) -> None:
    write_tar(tmp_path / "more" / "0.tar", "a.jpg b.png b.txt")
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    (tmp_path / "README.md").write_text(f'{card}  - split: train\n    path: "more/*.tar"\n---\n')
    assert len(readable(load_records(tmp_path))[0]) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_all_stages_train_on_them(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    stream: bool,
) -> None:
    """And `lavit data check` counts what they leave out."""
    short_streams(monkeypatch)
    data = write_tar(tmp_path / "tars" / "0.tar", CASES["broken"][0]).parent
    for number, name in enumerate(("no picture", "endings", "late", "twice", "apart")):
        write_tar(data / f"{number + 1}.tar", CASES[name][0])
    training = toy_training(3)
    changed = {one: replace(getattr(training, one), stream=stream) for one in STAGES}
    run = open_run(tmp_path / "run", data, toy_config(), replace(training, **changed), trackers=())
    with caplog.at_level(logging.WARNING):
        train_stages(run)
    named = {line.split(": ")[0] for line in caplog.messages if line.startswith("left out /")}
    assert sorted(name.split("] ")[1] for name in named) == ["a", "a", "a", "b", "b.jpg"]
    main(["data", "check", str(data), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (report["records"], len(report["broken"]), report["without_text"]) == (26, 5, 4)

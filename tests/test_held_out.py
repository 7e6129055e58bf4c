"""What training leaves out of a user's own pictures, and `lavit eval` measures on."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from lavit.cli import main
from lavit.config import InputError
from lavit.data.corpus import load_corpus
from lavit.data.held_out import divides
from lavit.data.inspect import check
from lavit.data.sources import load_records, open_source, stream_source

COUNT = 80


def grey(number: int) -> Image.Image:
    return Image.new("RGB", (6, 6), (number,) * 3)


def write(folder: Path, count: int = COUNT, *, inside: str = "") -> Path:
    """A folder of small pictures with texts."""
    (folder / inside).mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        grey(number).save(folder / inside / f"{number:03d}.png")
        rows.append(json.dumps({"file_name": f"{number:03d}.png", "text": f"grey {number}."}))
    (folder / inside / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def texts(data: Path, split: str) -> set[str]:
    return {record.texts[0] for record in load_records(data, split)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "pics")


def test_training_and_what_is_held_out_are_all_and_apart(folder: Path) -> None:
    train, held = texts(folder, "train"), texts(folder, "held_out")
    assert not train & held and len(train | held) == COUNT
    assert 1 <= len(held) <= 0.15 * COUNT
    corpus = load_corpus(folder)
    assert {picture.captions[0] for picture in corpus.pictures} == train
    assert check(folder)["records"] == COUNT
    with pytest.raises(InputError, match="no split 'test': it has train and held_out"):
        load_records(folder, "test")


def test_more_pictures_move_none(folder: Path, tmp_path: Path) -> None:
    more = write(tmp_path / "more", 120)
    assert texts(folder, "held_out") == {
        text for text in texts(more, "held_out") if number(text) < COUNT
    }


def number(text: str) -> int:
    return int(text.split()[1].rstrip("."))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tar"])
def test_the_same_files_in_another_form_are_divided_alike(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    """Else a model that was trained on a folder would be measured on its own pictures as tars."""
    again = tmp_path / "named otherwise"
    again.mkdir()
    if kind == "tar":
        with tarfile.open(again / "0.tar", "w") as tar:
            for number in range(COUNT):
                for ending, data in (("png", png(number)), ("txt", f"grey {number}.".encode())):
                    info = tarfile.TarInfo(f"one{number}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    else:
        again = table(folder, tmp_path, kind)
    assert texts(again, "held_out") == texts(folder, "held_out")


def test_copies_of_a_picture_are_on_one_side(folder: Path) -> None:
    rows = (folder / "metadata.jsonl").read_text().splitlines()
    for number in range(COUNT):
        shutil.copy(folder / f"{number:03d}.png", folder / f"copy{number}.png")
        rows.append(json.dumps({"file_name": f"copy{number}.png", "text": f"grey {number}."}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    assert texts(folder, "held_out") and not texts(folder, "held_out") & texts(folder, "train")


def test_few_pictures_are_all_training(tmp_path: Path) -> None:
    few = write(tmp_path / "few", 39)
    assert len(texts(few, "train")) == 39
    with pytest.raises(InputError, match="of fewer than 40 pictures"):
        load_records(few, "held_out")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_one_table_serves_no_training_record_under_another_name(
    folder: Path, tmp_path: Path, kind: str
) -> None:
    path = table(folder, tmp_path, kind)
    train, held = texts(path, "train"), texts(path, "held_out")
    assert held and not train & held and len(train | held) == COUNT
    with pytest.raises(InputError, match="no split 'other_hand': it has train and held_out"):
        load_records(path, "other_hand")


def table(folder: Path, tmp_path: Path, kind: str) -> Path:
    """The pictures of a folder as one table."""
    path = tmp_path / f"pics.{kind}"
    names = sorted(file.name for file in folder.glob("*.png"))
    if kind == "jsonl":
        rows = [{"image": f"pics/{name}", "text": f"grey {int(name[:3])}."} for name in names]
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    elif kind == "csv":
        lines = [f"pics/{name},grey {int(name[:3])}." for name in names]
        path.write_text("image,text\n" + "\n".join(lines) + "\n")
    else:
        import datasets

        images = [{"bytes": png(int(name[:3])), "path": None} for name in names]
        words = [f"grey {int(name[:3])}." for name in names]
        kinds = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        rows = datasets.Dataset.from_dict({"image": images, "text": words}, features=kinds)
        rows.to_parquet(str(path))
    return path


def png(number: int) -> bytes:
    stream = io.BytesIO()
    grey(number).save(stream, "PNG")
    return stream.getvalue()


def test_a_stream_leaves_out_the_same(folder: Path, tmp_path: Path) -> None:
    path = table(folder, tmp_path, "parquet")
    for split in ("train", "held_out"):
        streamed = stream_source(path, split)
        found = {streamed.record(row, "").texts[0] for row in streamed.rows}
        assert found == texts(path, split)


def test_a_source_with_splits_of_its_own_keeps_them(tmp_path: Path) -> None:
    both = write(tmp_path / "both", inside="train")
    assert divides(both) and len(texts(both, "held_out")) > 0
    write(both, 3, inside="test")
    assert not divides(both) and len(texts(both, "train")) == COUNT
    assert len(texts(both, "test")) == 3
    with pytest.raises(InputError, match="no split 'held_out'"):
        load_records(both, "held_out")
    card = write(tmp_path / "card")
    (card / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n"
        "  data_files:\n  - split: train\n    path: '*.png'\n---\n"
    )
    assert not divides(card)


def test_a_test_folder_without_a_train_folder_is_no_training_data(folder: Path) -> None:
    write(folder, 5, inside="test")
    with pytest.raises(InputError, match="has test/, and no train/: put what is to be learnt"):
        load_records(folder, "train")
    assert len(load_records(folder, "test")) == 5


def test_a_picture_s_own_name_says_nothing_of_splits(folder: Path) -> None:
    before = texts(folder, "held_out")
    for name in ("unit test", "val-isere", "dev"):
        grey(255).save(folder / f"{name}.png")
    assert divides(folder) and before <= texts(folder, "held_out")
    assert divides(folder.rename(folder.with_name("dev")))  # nor does the source's


def test_shards_named_by_any_sign_are_splits(tmp_path: Path) -> None:
    for split, sign in (("test", "_"), ("validation", "-"), ("held_out", ".")):
        shards = tmp_path / f"shards of {len(split)}"
        shards.mkdir()
        for name in ("train", split):
            (shards / f"{name}{sign}000.parquet").touch()
        assert not divides(shards), split


def test_texts_alone_are_not_divided(tmp_path: Path) -> None:
    path = tmp_path / "prose.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"line {n}"}) for n in range(COUNT)) + "\n")
    assert len(open_source(path)) == COUNT
    with pytest.raises(InputError, match="texts alone"):
        open_source(path, "held_out")


def test_a_model_is_measured_on_what_is_held_out(
    toy_run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(toy_run, run, ignore=shutil.ignore_patterns("cache", "checkpoints"))
    out = tmp_path / "figures.json"
    main(["eval", str(run), "--data", str(folder), "--json", str(out)])
    found = json.loads(out.read_text())
    held = len(texts(folder, "held_out"))
    assert found["held_out"] == f"held out by hash: 5 % of {folder}, {held} pictures"
    assert found["held_out"] in capsys.readouterr().out
    assert list(found["figures"]) == [
        "tokenizer_distance", "live_codes", "kept_share", "tokens_mean", "tokens_spread",
        "tokens_spearman_bytes", "caption_loss", "caption_exact",
        "drawing_loss", "text_loss",
    ]  # fmt: skip
    assert all(figure["count"] == held for figure in found["figures"].values())
    assert found["figures"]["caption_loss"]["value"] > 0
    assert "caption_loss" not in (run / "README.md").read_text()  # it was trained on others
    first = out.read_bytes()
    main(["eval", str(run), "--data", str(folder), "--json", str(out)])
    assert out.read_bytes() == first
    with pytest.raises(SystemExit) as stopped:
        main(["eval", str(run), "--data", str(folder), "--figures", "read_test_exact"])
    assert stopped.value.code == 2
    assert "there is no figure 'read_test_exact'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["eval", str(run), "--data", str(folder), "--valid"])
    assert "--valid is of scenes, and has no meaning on" in capsys.readouterr().err
    scenes = write(tmp_path / "scenes", 3)
    (scenes / "origin.json").write_text('{"scenes": {"objects": 160}}')
    with pytest.raises(SystemExit):
        main(["eval", str(run), "--data", str(scenes)])
    assert "holds scenes, which are drawn and not read" in capsys.readouterr().err


def test_a_model_whose_own_pictures_are_gone_is_not_measured_on_scenes(
    toy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(toy_run, run, ignore=shutil.ignore_patterns("cache", "checkpoints"))
    said = json.loads((run / "training.json").read_text())
    (run / "training.json").write_text(json.dumps(said | {"data": "gone/pics", "origin": None}))
    with pytest.raises(SystemExit) as stopped:
        main(["eval", str(run)])
    assert stopped.value.code == 2
    assert "was trained on gone/pics, which is not here" in capsys.readouterr().err


def test_few_pictures_are_measured_and_it_is_said(
    toy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = write(tmp_path / "few", 5)
    words = ["--json", str(tmp_path / "f.json"), "--figures", "kept_share"]
    main(["eval", str(toy_run), "--data", str(few), *words])
    assert "NOT held out: all 5 pictures" in capsys.readouterr().out

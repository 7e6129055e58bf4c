"""The reader's warm-up: what is said of pictures, learning it, and one step shared by two ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from conftest import toy_config, toy_training
from lavit.config import InputError, TrainConfig
from lavit.data.corpus import Corpus, Picture, Question
from lavit.data.sources import Record
from lavit.train import reader as train_reader
from lavit.train.loop import Shard
from lavit.train.reader import ReadBatch, ReaderStage, said_of
from lavit.train.run import Run


def training(steps: int) -> TrainConfig:
    toy = toy_training(2)
    return replace(toy, language=replace(toy.language, reader_steps=steps, reader_batch=8, reader_rate=1e-2))


@pytest.fixture(scope="module")
def run(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A toy run with a tokenizer, whose language stage is not trained yet."""
    run = Run(tmp_path_factory.mktemp("reader") / "run", toy_data, toy_config(), training(100), trackers=())
    run.train(("tokenizer",))
    return run


@pytest.fixture
def reader(run: Run) -> ReaderStage:
    language, text, _ = run._first_language()
    return ReaderStage(run._language_stage(language, text), text, run.corpus, seed=0)


def test_half_a_batch_on_each_of_two_ranks_is_one(reader: ReaderStage) -> None:
    def loss(shard: Shard) -> torch.Tensor:
        return reader.losses(reader.module, reader.batch(3, shard), 3, Accelerator())["loss"]

    halves = [loss(Shard(rank, 2)) for rank in (0, 1)]
    assert torch.allclose(sum(halves) / 2, loss(Shard()), rtol=1e-5)
    assert not torch.equal(halves[0], halves[1])


def test_the_lesson_goes_on_beside_the_lm(run: Run) -> None:
    """Two ranks, or two parts of a step, give the loss of one: the LM's and the reader's."""
    language, text, _ = run._first_language()
    stage = run._language_stage(language, text)

    def loss(shard: Shard) -> tuple[torch.Tensor, torch.Tensor]:
        batch = stage.batch(2, shard)
        found = stage.losses(language, batch, 2, Accelerator())
        return found["loss"], found.get("word_loss", torch.zeros(())) + found.get("caption_loss", torch.zeros(()))

    alone, _ = loss(Shard())
    stage.config = replace(stage.config, reader_weight=0.5)
    stage.lesson = ReaderStage(stage, text, run.corpus, seed=0)
    both, lesson = loss(Shard())
    assert torch.allclose(both - alone, 0.5 * lesson) and lesson > 0

    stage.accumulate = 2
    parts = [loss(Shard(number, 2))[0] for number in (0, 1)]
    assert torch.allclose(sum(parts), both, rtol=1e-5)
    both.backward()
    assert language.to_language.weight.grad.abs().sum() > 0


def test_many_captions_are_told_from_some_of_them(reader: ReaderStage, monkeypatch: pytest.MonkeyPatch) -> None:
    def wanted(batch: ReadBatch) -> list[list[int]]:
        captions = [part.tolist() for part in batch.candidates.split(batch.lengths.tolist())]
        return [captions[number] for number in batch.captions]

    few, all_ = 4, reader.batch(0, Shard())
    assert len(all_.lengths) == len(reader.captions) > few
    monkeypatch.setattr(train_reader, "CAPTIONS", few)
    reader.config = replace(reader.config, reader_batch=2)
    some = reader.batch(0, Shard())
    assert len(some.lengths) <= few and wanted(some) == wanted(all_)[:2]


def test_the_reader_learns_what_is_said_before_the_language_model_reads(run: Run) -> None:
    """Two steps of the LM follow."""
    cold = run._first_language()[0].to_language.weight.clone()
    run.train(("language",))
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    figures = [line for line in lines if line["stage"] == "reader"]
    assert figures[-1]["captions_found"] > 0.8 and figures[-1]["loss"] < 0.5 * figures[0]["loss"]
    assert [line["stage"] for line in lines][-2:] == ["reader", "language"]
    assert not torch.allclose(run._model().language.to_language.weight, cold, atol=1e-2)


def test_the_most_telling_is_said_first_and_yes_and_no_say_nothing() -> None:
    pictures = (
        Picture(Record("a", ("cat.",), "a", {"keywords": ("feline", "cat")}), ("cat.",), ()),
        Picture(Record("b", (), "b"), (), ()),
    )
    questions = (Question(1, "which color?", "blue"), Question(1, "is it red?", "no"), Question(1, "what?", "blue"))
    assert said_of(Corpus(pictures, questions)) == [["cat", "feline"], ["blue"]]


def test_what_is_not_read_cannot_be_warmed_up(run: Run, toy_data: Path, tmp_path: Path) -> None:
    streamed = replace(training(4), language=replace(training(4).language, stream=True))
    with pytest.raises(InputError, match="reader_steps and reader_weight need pictures"):
        Run(tmp_path / "run", toy_data, toy_config(), streamed, trackers=()).train(("tokenizer", "language"))

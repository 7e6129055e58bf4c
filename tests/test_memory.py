"""The memory: what it discounts, what it never tells, and that use lays a prompt out as training did."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lavit
from conftest import NAMES, toy_config, toy_picture, toy_training
from lavit.cli import main
from lavit.config import InputError, LanguageConfig, ModelConfig
from lavit.data import features
from lavit.data.chat import ChatPicture, last_turn, render_chat
from lavit.data.conversations import load_conversations
from lavit.data.corpus import Corpus, Picture, Question, load_corpus
from lavit.data.features import Features
from lavit.data.sources import Record
from lavit.generate.jobs import writing
from lavit.generate.prompts import lay_prompt
from lavit.generate.remember import recalled, shown
from lavit.model import LaVIT
from lavit.modules.memory import Memory, describe
from lavit.modules.vision import Vision, load_vision
from lavit.presets import efficientnet_lite0
from lavit.sequence import IGNORE, Text, VisualTokens, lay_out
from lavit.train.finetune import Finetune
from lavit.train.memory import remember, remembered_texts
from lavit.train.run import Run
from test_chat import user
from test_conversations import read, write
from test_finetune import settings

TOLD, SHOWN = 3, 2


def config() -> ModelConfig:
    toy = toy_config()
    vision, language = replace(toy.vision, described=(0,)), replace(toy.language, recall=TOLD, shown=SHOWN)
    wider = toy.pixels.unet | {"in_channels": toy.pixels.unet["in_channels"] + 12, "out_channels": 12 + 1}
    noise = {"_class_name": "DDIMScheduler", "prediction_type": "sample"}
    pixels = replace(toy.pixels, shown=True, unet=wider, scheduler=noise)
    return replace(toy, vision=vision, language=language, pixels=pixels)


@pytest.fixture(scope="module")
def run(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A toy run: three texts are told of a picture read, two pictures shown before one drawn, and one to the decoder."""
    run = Run(tmp_path_factory.mktemp("memory") / "run", toy_data, config(), toy_training(), trackers=())
    run.train()
    return run


def test_what_varies_within_a_text_is_discounted() -> None:
    """Each thing in two hands: the hands differ more than the things do."""
    torch.manual_seed(0)
    things, hands = torch.randn(40, 24), 6 * torch.randn(2, 24)
    texts = [str(number) for number in range(40)]
    known = torch.cat([things + hands[0], things[:30] + hands[1]]) + 0.3 * torch.randn(70, 24)
    memory = Memory.of(known, texts + texts[:30], torch.zeros(0, 24))
    asked = things[30:] + hands[1] + 0.3 * torch.randn(10, 24)
    assert [found for (found,) in memory.nearest(memory.likeness(asked), 1)] == texts[30:]
    plain = torch.nn.functional.normalize(asked, dim=1) @ torch.nn.functional.normalize(known, dim=1).T
    assert [found for (found,) in memory.nearest(plain, 1)] != texts[30:]


def test_differences_of_views_are_discounted() -> None:
    torch.manual_seed(0)
    known, loud = torch.randn(20, 8), torch.eye(8)[0] * 20
    views = torch.randn(100, 1) * loud
    texts = [str(number) for number in range(20)]
    asked = known + torch.randn(20, 1) * loud
    memory = Memory.of(known, texts, views)
    assert [found for (found,) in memory.nearest(memory.likeness(asked), 1)] == texts
    naive = Memory.of(known, texts, torch.zeros(0, 8))
    assert [found for (found,) in naive.nearest(naive.likeness(asked), 1)] != texts


def test_a_description_is_of_the_whole_and_its_quarters() -> None:
    patches = torch.zeros(1, 16, 2)
    patches[0, 15, 1] = 16.0  # the lower right corner
    found = describe([patches]).view(5, 2)
    assert found[:, 0].abs().sum() == 0 and found[:, 1].tolist() == [1.0, 0.0, 0.0, 0.0, 4.0]
    assert describe([torch.rand(2, 25, 3)]).shape == (2, 15)  # quarters of odd grids share their middle
    early = torch.rand(1, 64, 3)
    assert describe([early, patches]).equal(torch.cat([describe([early]), describe([patches])], 1))
    with pytest.raises(InputError, match="no square grid"):
        describe([torch.rand(1, 15, 2)])


def test_looks_are_the_layers_that_are_named() -> None:
    encoder = efficientnet_lite0(image_size=64)
    for config_, layers in ((encoder, (7, 10, 14)), (config().vision, (0,))):
        torch.manual_seed(0)
        vision = load_vision(replace(config_, described=layers))
        seen = torch.randn(2, 3, config_.image_size, config_.image_size)
        looks = vision.looks(seen)
        assert len(looks) == len(layers) + 1 and looks[-1].equal(vision(seen))
        for layer, look in zip(layers, looks, strict=False):
            assert look.equal(Vision(replace(config_, described=(), layer=layer), vision.encoder)._hidden(seen)[-1])
    looks = load_vision(replace(encoder, described=(7, 14))).looks(torch.zeros(1, 3, 64, 64))
    assert [tuple(look.shape[1:]) for look in looks] == [(16, 80), (4, 192), (4, 320)]
    for wrong in ((3, 3), (4, 2), (-1,)):
        with pytest.raises(InputError, match="in their order"):
            replace(encoder, described=wrong)
    for late in ((7, 15), (16,)):  # the layer that is read, and one that is not there
        with pytest.raises(InputError, match="before the one that is read"):
            load_vision(replace(encoder, described=late))


def test_descriptions_go_on_where_they_stopped(toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "BLOCK", 3)
    records = [picture.record for picture in load_corpus(toy_data).pictures]
    torch.manual_seed(0)
    vision = load_vision(config().vision)
    whole = features.compute_features(records, vision, tmp_path / "whole", views=2)

    def stop(done: int, of: int) -> None:
        if done > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        features.compute_features(records, vision, tmp_path / "parts", views=2, progress=stop)
    begun = []
    rest = features.compute_features(
        records, vision, tmp_path / "parts", views=2, progress=lambda *at: begun.append(at)
    )
    assert (
        begun == [(8, 8)]
        and np.array_equal(rest.array, whole.array)
        and np.array_equal(rest.described, whole.described)
    )


def test_of_two_pictures_equally_like_it_the_one_in_another_manner_is_told() -> None:
    """Two hands: what was drawn in the hand of the picture being read, and is not that picture, shows another thing."""
    torch.manual_seed(0)
    things, hand = F.normalize(torch.randn(60, 16), dim=1), torch.eye(16)[0] * 5
    texts = [str(number) for number in range(60)]
    memory = Memory.of(torch.cat([things + hand, things[:40]]), texts + texts[:40], torch.zeros(0, 16))
    asked = (things[50] + things[51]) / 2 + hand  # in the hand of both
    memory.add((things[51] + 1e-4 * torch.randn(16))[None], ["in the other hand"])
    keys, manners = memory.keys_of(asked[None])
    alike = (keys @ memory.keys.T)[0]
    assert abs(float(alike[50] - alike[51])) < 0.1 and abs(float(memory.manners[50] - manners)) < 0.2
    assert memory.recall(asked[None], 1) == [["in the other hand"]]
    assert memory.recall((things[51] + hand)[None], 1) == [["51"]]  # the picture itself, for all that
    assert memory.recall((things[51] + hand + 0.3 * things[50])[None], 1) == [["in the other hand"]]
    alone = Memory.of(things[:1], ["alone"], torch.zeros(0, 16))
    assert alone.recall(asked[None], 4) == [["alone"]]
    one_each = Memory.of(things, texts, torch.zeros(0, 16))
    assert one_each.manner.abs().sum() == 0  # no text has two pictures: nothing is known of manners
    keys, _ = one_each.keys_of(asked[None])
    assert one_each.likeness(asked[None]).equal(keys @ one_each.keys.T)


def test_a_text_that_the_manner_has_drawn_once_is_passed_over_in_the_other_manner_too() -> None:
    """The hand has drawn fifty things, the other one forty of them and ten more."""
    *things, hand = torch.eye(61)
    things, numbers = torch.stack(things), [*range(50), *range(40), *range(50, 60)]
    known = things[numbers] + hand * (torch.arange(100) < 50)[:, None]
    memory = Memory.of(known, [str(number) for number in numbers], torch.zeros(0, 61))
    asked = 0.6 * things[:10] + 0.4 * things[50:] + hand  # what is seen once weighs more
    drawn, new = [[str(number)] for number in range(10)], [[str(number)] for number in range(50, 60)]
    others = memory.emptied()
    others.add(things[numbers[50:]], [str(number) for number in numbers[50:]])
    assert others.recall(asked, 1) == drawn  # likest in the other hand; but
    assert memory.recall(asked, 1) == new
    memory.add(things[:10] + hand, [text for (text,) in drawn])  # what it has drawn twice may come a third time
    assert memory.recall(asked, 1) == drawn


def test_a_picture_of_training_recalls_itself_first(run: Run) -> None:
    memory, told = run.remembered
    assert memory.texts == tuple(sorted(NAMES)) and len(told) == len(NAMES)
    for name, texts in zip(NAMES, told, strict=True):  # each name has one picture
        assert len(set(texts)) == TOLD and texts[0] == name


def test_other_views_recall_their_picture_under_a_metric_without_their_text() -> None:
    array = np.random.default_rng(0).normal(size=(10, 1, 16, 3)).repeat(3, axis=1)
    array[:, 1:] += 0.01 * np.random.default_rng(1).normal(size=(10, 2, 16, 3))
    rows = array.reshape(30, 16, 3)
    pictures = tuple(Picture(Record("a", (), "a"), (f"thing {number}.",), ()) for number in range(10))
    described = describe([torch.from_numpy(rows)]).numpy()
    codes = VisualTokens(torch.arange(30), torch.ones(30, dtype=torch.long), torch.zeros(30, 16, dtype=torch.bool))
    memory, told = remember(Corpus(pictures), Features(rows, 3, described), codes, 2)
    assert [memory.codes_of(number) for number in range(10)] == [
        (3 * number,) for number in range(10)
    ]  # of plain views
    for number in range(10):
        assert [texts[0] for texts in told[3 * number : 3 * number + 3]] == [f"thing {number}"] * 3
    spread = torch.from_numpy(described).view(10, 3, -1)[::2].float()  # what is told of the odd texts: fold 1
    views = (spread[:, 1:] - spread[:, :1]).flatten(0, 1)
    judge = Memory.of(spread[:, 0], [f"thing {number}" for number in range(0, 10, 2)], views).emptied()
    judge.add(torch.from_numpy(described)[::3].float(), [f"thing {number}" for number in range(10)])
    odd = torch.from_numpy(described).view(10, 3, -1)[1::2].flatten(0, 1).float()
    assert [texts for n in range(1, 10, 2) for texts in told[3 * n : 3 * n + 3]] == judge.recall(odd, 2)


def test_in_use_it_is_told(run: Run, toy_data: Path) -> None:
    memory, _ = run.remembered
    described = torch.from_numpy(run.features.described.astype("float32"))
    assert described.shape == (len(NAMES), 5 * (32 + 32))  # of the layer that is named and the one that is read
    assert described[:, -160:].allclose(describe([run.features.rows(torch.arange(len(NAMES)))]), atol=1e-2)
    assert [texts[0] for texts in memory.recall(described, 1)] == list(NAMES)
    assert len(memory.recall(described[:1], 100)[0]) == len(NAMES)


def test_a_prompt_is_laid_out_as_training_did(run: Run) -> None:
    model = LaVIT.from_pretrained(run.folder)
    documents = run._language_stage(model.language, model.text).documents
    for number, name in enumerate(NAMES):
        picture = run.corpus.pictures[number].record.open()
        prompt = lay_prompt(model, [ChatPicture(picture, read=True)])
        documents.told[number] = recalled(model, [picture])[0]
        assert documents.told[number][0] == name
        image, words = documents._read(number, np.random.default_rng(0))
        sequence = lay_out((image, words, Text((5,), closes=False)), model.language.vocabulary)
        assert sequence.slots == (*prompt.slots, False)
        laid = [i for i, slot in zip(sequence.ids, sequence.slots, strict=True) if not slot]
        assert laid == [*(i for i, slot in zip(prompt.ids, prompt.slots, strict=True) if not slot), 5]
        told = range(len(image.codes) + 2, len(prompt.ids))
        assert told and all(sequence.labels[place - 1] == IGNORE for place in told)  # what is told gives no loss


def test_a_model_folder_keeps_its_memory(run: Run, toy_data: Path, tmp_path: Path) -> None:
    model = LaVIT.from_pretrained(run.folder)
    model.save_pretrained(tmp_path / "copy", parts=("vision", "tokenizer", "memory", "language"))
    copy = LaVIT.from_pretrained(tmp_path / "copy").memory
    assert copy.texts == model.memory.texts
    assert all(copy.state_dict()[name].equal(tensor) for name, tensor in model.memory.state_dict().items())
    older = {name: tensor for name, tensor in copy.state_dict().items() if "manner" not in name}
    with pytest.raises(InputError, match="train its language stage again"):
        Memory(copy.texts, older)
    shutil.rmtree(tmp_path / "copy" / "memory")
    with pytest.raises(InputError, match=r"model\.safetensors is missing"):
        lavit.load(tmp_path / "copy").caption(toy_data / "train" / "0.png")


def test_fine_tuning_goes_on_with_the_memory(run: Run, tmp_path: Path) -> None:
    data = write(tmp_path, [read(name) for name in NAMES[:4]])
    Finetune(tmp_path / "new", data, run.folder, settings(run.folder, steps=2)).train()
    new = LaVIT.from_pretrained(tmp_path / "new")
    assert new.config.language.recall == TOLD and new.memory.texts == run.remembered[0].texts
    conversations = load_conversations(data)
    tuning = Finetune(tmp_path / "other", data, run.folder, settings(run.folder, steps=2))
    documents = tuning._stage(new, new.language, new.text, conversations).documents
    _, words, *_ = documents.document(conversations.items[0])
    assert new.text.decode(words.ids).split("\n")[0] == NAMES[0] and not words.target


@pytest.mark.parametrize("asked", [("blue bar",), (Path("red bar.png"), "in blue")])
def test_a_drawing_asked_for_in_a_chat_is_laid_out_as_fine_tuning_did(run: Run, tmp_path: Path, asked: tuple) -> None:
    """What the last turn asks for is shown before the conversation."""
    parts = [part if isinstance(part, str) else {"type": "image", "image": str(tmp_path / part)} for part in asked]
    talk = [user("hello"), {"role": "assistant", "content": "hello."}, user(*parts)]
    reply = {"role": "assistant", "content": [{"type": "image", "image": "blue bar.png"}]}
    data = write(tmp_path, [[*talk, reply]])
    tuning = Finetune(tmp_path / "new", data, run.folder, settings(run.folder, steps=2))
    lv, conversations = lavit.load(run.folder), load_conversations(data)
    model, vocabulary = lv.model, lv.model.language.vocabulary
    documents = tuning._stage(model, model.language, model.text, conversations).documents
    ids = lay_out(documents.document(conversations.items[0]), vocabulary).ids
    (job,) = writing(
        model, lv.protocol, [render_chat(talk, model.text, reply="image")], asked=[last_turn(talk)],
        out="image", n=1, seed=0, sampling=None, picture=None, guidance=None,
    )  # fmt: skip
    assert ids[: len(job.request.ids)] == job.request.ids
    (first, *_) = shown(model, last_turn(talk))
    codes = torch.tensor(model.memory.codes_of(first))
    assert model.memory.text_of(first) == "blue bar"
    assert ids[1 : 1 + len(codes)] == tuple(vocabulary.ids(codes).tolist())


def test_a_run_that_begins_with_another_model_has_its_own_memory(toy_run: Path, toy_data: Path, tmp_path: Path) -> None:
    started = LaVIT.from_pretrained(toy_run).config
    described = replace(started.vision, described=(0,))
    config_ = replace(started, vision=described, language=replace(started.language, recall=TOLD))
    run = Run(tmp_path / "run", toy_data, config_, toy_training(2), trackers=(), start=toy_run)
    run.train(("language",))
    assert started.language.recall == 0
    model = LaVIT.from_pretrained(tmp_path / "run")
    assert model.config.language.recall == TOLD and model.config.vision.described == (0,)
    assert model.memory.texts == tuple(sorted(NAMES)) and len(model.memory.mean) == 5 * (32 + 32)


def test_a_picture_is_remembered_without_training(
    run: Run, toy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shown").mkdir()
    picture = toy_picture("red bar").rotate(90)
    picture.save(tmp_path / "shown" / "0.png")
    (tmp_path / "shown" / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "red pole."}')
    main(("remember", str(tmp_path / "shown"), "--model", str(run.folder), "--out", str(tmp_path / "new")))
    assert capsys.readouterr().out.endswith("1 more pictures, 9 texts in all\n")
    new = lavit.load(tmp_path / "new")
    described = describe(new.model.looks([picture]))
    assert new.model.memory.recall(described, 1) == [["red pole"]]
    assert LaVIT.from_pretrained(run.folder).memory.recall(described, 9)[0].count("red pole") == 0
    assert isinstance(new.caption(picture), str)
    assert len(new.recall(picture)) == TOLD and new.recall([picture])[0][0] == "red pole"
    assert lavit.load(toy_run).recall(picture) == []
    new.remember(toy_picture("red bar"), "red pole")  # a text may have several pictures
    assert len(new.model.memory.texts) == 9 and len(new.model.memory.keys) == 10
    with pytest.raises(InputError, match="one text a picture"):
        new.remember([picture], ["a", "b"])
    with pytest.raises(InputError, match="has no memory"):
        lavit.load(toy_run).remember(picture, "red pole")
    for model, out, said in ((toy_run, "other", "has no memory"), (run.folder, "new", "exists already")):
        with pytest.raises(SystemExit, match="2"):
            main(("remember", str(tmp_path / "shown"), "--model", str(model), "--out", str(tmp_path / out)))
        assert said in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_what_is_remembered_of_a_picture() -> None:
    pictures = tuple(Picture(Record("a", (), "a"), captions, ()) for captions in (("A cat.",), (), ()))
    questions = (Question(0, "?", "cat"), Question(1, "?", "red"), Question(1, "?", "bar"), Question(2, "?", "yes"))
    assert remembered_texts(Corpus(pictures, questions)) == ["A cat", "bar, red", ""]


def test_what_cannot_be_recalled_is_one_clear_line(toy_data: Path, tmp_path: Path) -> None:
    training = toy_training()
    training = replace(training, language=replace(training.language, stream=True))
    with pytest.raises(InputError, match="recall needs pictures encoded beforehand"):
        Run(tmp_path / "run", toy_data, config(), training, trackers=()).train(("tokenizer", "language"))
    with pytest.raises(InputError, match="read features"):
        LanguageConfig(source="random", recall=1, read_as="codes")
    with pytest.raises(InputError, match="memory would be empty"):
        Memory.of(torch.zeros(0, 4), (), torch.zeros(0, 4))

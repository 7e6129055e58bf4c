"""The model as a torch user expects it: whole when opened, moved whole, saved without a change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from torch import nn
from transformers import AutoModel

import lavit
from conftest import NAMES, tensors_equal, toy_config, toy_picture
from lavit.cli import main
from lavit.config import PARTS, TO_READ, TO_SEE, InputError, read_config
from lavit.layout import drawing, reading
from lavit.model import LaVIT
from lavit.processing import LaVITProcessor
from lavit.sequence import Image, Text, lay_out, pack
from lavit.storage import model_folder
from lavit.visual_tokenizer.tokenizer import VisualTokenizer

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def model(toy_run: Path) -> LaVIT:
    return LaVIT.from_pretrained(toy_run)


@pytest.fixture
def hub(toy_run: Path, tmp_path: Path) -> Path:
    """A cache of huggingface_hub that holds the toy model as org/toy, main and v1, offline."""
    repository = tmp_path / "hub" / "models--org--toy"
    wanted = shutil.ignore_patterns("cache", "checkpoints", "tensorboard")
    shutil.copytree(toy_run, repository / "snapshots" / SHA, ignore=wanted)
    (repository / "refs").mkdir()
    for name in ("main", "v1"):
        (repository / "refs" / name).write_text(SHA)
    return tmp_path / "hub"


def test_a_model_is_whole_when_it_is_opened(toy_run: Path, model: LaVIT) -> None:
    assert [name for name, _ in model.named_children()] == list(PARTS)
    before = [name for name, _ in model.named_parameters()]
    model.encode_images([toy_picture("red dot")])
    assert [name for name, _ in model.named_parameters()] == before
    assert {name.split(".")[0] for name in model.state_dict()} == set(PARTS)
    assert model.text_tokenizer("red")["input_ids"] and not model.training
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert tensors_equal(model, LaVIT.from_pretrained(str(toy_run)))


def what_sees(model: LaVIT) -> nn.ModuleDict:
    return nn.ModuleDict({part: getattr(model, part) for part in TO_SEE})


def number_types(part: nn.Module) -> set[torch.dtype]:
    tensors = (*part.parameters(), *part.buffers())
    return {tensor.dtype for tensor in tensors if tensor.is_floating_point()}


def test_every_part_moves_but_what_sees_stays_exact(model: LaVIT) -> None:
    exact = {name: tensor.clone() for name, tensor in what_sees(model).state_dict().items()}
    for moved in (model.half(), model.to(torch.bfloat16), model.to("cpu", torch.float16)):
        assert moved is model and model.dtype in (torch.float16, torch.bfloat16)
        for name, part in model.named_children():
            wanted = torch.float32 if name in TO_SEE else model.dtype
            assert number_types(part) == {wanted}, name
    found = what_sees(model).state_dict()
    assert all(tensor.equal(found[name]) for name, tensor in exact.items())
    model.to("meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.device.type == "meta"


def test_opened_in_half_precision_is_moved_to_it(toy_run: Path, model: LaVIT) -> None:
    opened = LaVIT.from_pretrained(toy_run, dtype=torch.bfloat16)
    assert tensors_equal(opened, model.to(torch.bfloat16))


def test_an_encoder_kept_in_half_precision_sees_in_full(toy_run: Path, tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("checkpoints", "cache")
    folder = shutil.copytree(toy_run, tmp_path / "half", ignore=ignored)
    AutoModel.from_pretrained(folder / "vision").half().save_pretrained(folder / "vision")
    opened = LaVIT.from_pretrained(folder, dtype=torch.bfloat16, parts=("vision",))
    assert number_types(opened.vision) == {torch.float32}


def test_parts_are_left_out_by_name(toy_run: Path) -> None:
    seeing = LaVIT.from_pretrained(toy_run, parts=TO_SEE)
    assert seeing.language is None and seeing.pixels is None and seeing.text_tokenizer is None
    tokens = seeing.encode_images([toy_picture("red dot")])
    whole = LaVIT.from_pretrained(toy_run)
    assert tokens.codes.equal(whole.encode_images([toy_picture("red dot")]).codes)
    batch = pack([[lay_out((Text((1, 2)),), whole.language.vocabulary)]], whole.language.vocabulary)
    empty = LaVIT.from_pretrained(toy_run, parts=())
    for use, part in (
        (lambda: seeing(batch), "language"),
        (lambda: empty.decode([tokens.codes]), "visual_tokenizer"),
        (lambda: empty.patches([toy_picture("red dot")]), "vision"),
        (lambda: seeing.save_pretrained(toy_run, parts=("pixels",)), "pixels"),
    ):
        with pytest.raises(InputError, match=f"the part '{part}' was left out .*: name it among"):
            use()
    with pytest.raises(InputError, match="no part 'pixel': use vision, visual_tokenizer"):
        LaVIT.from_pretrained(toy_run, parts=("pixel",))


def test_what_is_not_trained_yet_is_none(toy_tokenizer: Path) -> None:
    model = LaVIT.from_pretrained(toy_tokenizer)
    assert model.language is None and model.pixels is None
    with pytest.raises(InputError, match=r"no pixels yet: .* lavit train pixels --out"):
        model.needs("vision", "pixels")
    assert LaVIT(toy_config()).device.type == "cpu" and LaVIT(toy_config()).dtype == torch.float32


def test_saving_changes_nothing_and_comes_back(toy_run: Path, tmp_path: Path) -> None:
    config = toy_config()  # encoder and language model are "random" in it, "folder" on disk
    trained = LaVIT.from_pretrained(toy_run)
    model = LaVIT(
        config,
        **{part: getattr(trained, part) for part in PARTS},
        text_tokenizer=trained.text_tokenizer,
    )
    model.save_pretrained(tmp_path / "whole")
    assert model.config == config
    assert tensors_equal(LaVIT.from_pretrained(tmp_path / "whole"), model)
    for part in PARTS:
        model.save_pretrained(tmp_path / "parts", parts=(part,))
    assert read_config(tmp_path / "parts") == read_config(tmp_path / "whole")
    assert read_config(tmp_path / "whole").vision.source == "folder"
    assert tensors_equal(LaVIT.from_pretrained(tmp_path / "parts"), model)


@pytest.mark.parametrize("found", [None, 1, 3])
def test_another_format_is_refused(
    found: int | None, toy_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(toy_tokenizer, tmp_path / "old")
    said = json.loads((tmp_path / "old" / "config.json").read_text())
    assert said.pop("format") == 2
    said |= {} if found is None else {"format": found}
    (tmp_path / "old" / "config.json").write_text(json.dumps(said))
    toy_picture("red dot").save(tmp_path / "picture.png")
    with pytest.raises(SystemExit) as stop:
        main(["tokenize", str(tmp_path / "picture.png"), "--model", str(tmp_path / "old")])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and lines[-1].startswith("lavit: ")
    assert "reads format 2: train or convert the model again" in lines[-1]


def test_a_name_of_the_hub_opens_from_its_cache(hub: Path, toy_run: Path) -> None:
    expected = LaVIT.from_pretrained(toy_run)
    for revision in (None, "v1", SHA):
        found = LaVIT.from_pretrained("org/toy", revision=revision, cache_dir=hub, token=False)
        assert tensors_equal(found, expected)
    assert found.folder == hub / "models--org--toy" / "snapshots" / SHA
    assert LaVITProcessor.from_pretrained("org/toy", cache_dir=hub).vocabulary.codes == 32
    shutil.rmtree(found.folder / "pixels")  # as where it was never downloaded
    reader = LaVIT.from_pretrained("org/toy", cache_dir=hub, parts=TO_READ)
    with pytest.raises(InputError, match="the part 'pixels' was left out"):
        reader.needs("pixels")
    for name, revision in (("org/toy", "v2"), ("org/other", None)):
        with pytest.raises(InputError, match=f"no model at {name}, and the hub does not") as error:
            LaVIT.from_pretrained(name, revision=revision, cache_dir=hub)
        assert "\n" not in str(error.value)


def test_parts_that_are_left_out_are_not_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    take = lambda name, **options: asked.append((name, options)) or "/nowhere"  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "snapshot_download", take)
    model_folder("org/toy", parts=("vision", "visual_tokenizer"), revision="v1", token="secret")
    ((name, options),) = asked
    assert name == "org/toy" and options["revision"] == "v1" and options["token"] == "secret"
    assert options["ignore_patterns"] == ["language/*", "pixels/*", "reader/*"]


def test_a_shipped_name_opens() -> None:
    model = LaVIT.from_pretrained("nano", parts=("visual_tokenizer",))
    assert model.config.name == "nano" and isinstance(model.visual_tokenizer, VisualTokenizer)


def test_forward_is_the_loss_of_a_batch(toy_run: Path, model: LaVIT) -> None:
    """Equation 6, through the processor, as the language part computes it; and it goes backward."""
    processor = LaVITProcessor.from_pretrained(toy_run)
    assert processor.vocabulary == model.language.vocabulary
    images = [toy_picture(name) for name in NAMES[:3]]
    inputs = processor(text=list(NAMES[:3]), images=images)
    patches = model.vision.encode_pixels(inputs["pixel_values"])
    assert patches.equal(model.patches(images))
    tokens = model.visual_tokenizer.encode(patches)
    assert tokens.codes.equal(model.encode_images(images).codes)
    batch = processor.pack(inputs["parts"], tokens)
    loss = model(batch, patches[batch.images], tokens.keep[batch.images])
    prepared = model.visual_tokenizer.prepare(patches)
    expected = model.language(batch, prepared, tokens.keep)
    targets = expected.text_tokens + expected.visual_tokens
    assert loss.equal(expected.total / targets) and loss.shape == ()
    loss.backward()
    assert model.language.rows.grad is not None
    assert model.language.reader.merger.norm.weight.grad is not None
    with torch.no_grad():
        assert not model(batch).isclose(loss)  # read pictures as codes
        assert model.to(torch.bfloat16)(batch, patches, tokens.keep).isclose(loss, rtol=0.05)


def test_the_processor_lays_out_and_takes_apart(toy_run: Path, model: LaVIT) -> None:
    processor = LaVITProcessor.from_pretrained(toy_run)
    images = [toy_picture(name) for name in NAMES[:2]]
    assert processor(images=images[0])["pixel_values"].shape == (1, 3, 32, 32)
    tokens = model.encode_images(images)
    first, second = tokens.split()
    batch = processor.pack([reading(0, "red square."), drawing("green square", 1)], tokens)
    assert batch.images.tolist() == [0] and batch.slots[0].sum() == len(first)
    assert processor.batch_decode(batch.ids) == ["red square.", "green square"]
    (read,), (drawn,) = processor.batch_codes(batch.ids)
    assert read.equal(first) and drawn.equal(second)
    assert model.decode([drawn]).shape == (1, 16, 32)
    words = tuple(model.text_tokenizer("red square.", add_special_tokens=False)["input_ids"])
    end, vocabulary = model.language.vocabulary.end, model.language.vocabulary
    document = (Image(tuple(first.tolist()), read=True, index=0), Text((*words, end)))
    alone = pack([[lay_out(document, vocabulary)]], vocabulary)
    packed = processor.pack(processor(text="red square.", images=images[0])["parts"], tokens)
    assert packed.ids.equal(alone.ids) and packed.labels.equal(alone.labels)
    text = processor.pack(processor(text=["red", "blue"])["parts"])
    assert processor.batch_decode(text.ids) == ["red", "blue"]
    assert processor.batch_codes(text.ids) == [[], []]
    with pytest.raises(InputError, match="2 pictures but 1 texts"):
        processor(text="red", images=images)
    with pytest.raises(InputError, match="has no codes"):
        processor.pack([reading(0, "red")])


def test_a_processor_needs_a_trained_language_part(toy_tokenizer: Path) -> None:
    with pytest.raises(InputError, match="no language part that can be read"):
        LaVITProcessor.from_pretrained(toy_tokenizer)


def test_the_package_names_its_classes() -> None:
    assert lavit.LaVIT is LaVIT and lavit.LaVITProcessor is LaVITProcessor

"""What a run leaves for others: the card, and the LM as a plain folder, adapter merged or not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import toy_config, toy_training
from lavit.cli import main
from lavit.config import InputError, TrainConfig, from_json, read_config, read_json, to_json
from lavit.model import LaVIT
from lavit.storage import WEIGHTS, export_language
from lavit.train.card import record_figures, write_card
from lavit.train.run import open_run, train_stages


def test_a_finished_run_has_a_card(toy_run: Path, toy_data: Path) -> None:
    card = (toy_run / "README.md").read_text()
    assert card.startswith("---\n") and "library_name: lavit" in card
    assert str(toy_data) in card
    for stage, steps in (("tokenizer", 12), ("language", 6), ("pixels", 6)):
        assert f"| {stage} | {steps} of {steps} | loss" in card
    for of in ("code", "weights trained here", "data", "base language model", "encoder"):
        assert f"\n| {of} | " in card
    assert "Not evaluated yet" in card


def test_the_card_takes_figures_and_licences_in(
    toy_run: Path, toy_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(
        toy_run, run, ignore=shutil.ignore_patterns("checkpoints", "cache", "tensorboard")
    )
    data = tmp_path / "data"
    shutil.copytree(toy_data, data)
    lines = [
        json.loads(line) for line in (data / "train" / "metadata.jsonl").read_text().splitlines()
    ]
    told = [
        {**line, "license": "CC-BY-4.0" if number else "MIT"} for number, line in enumerate(lines)
    ]
    (data / "train" / "metadata.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in told)
    )
    (data / "ATTRIBUTION.md").write_text("drawn by hand")
    said = read_json(run / "training.json")
    (run / "training.json").write_text(json.dumps({**said, "data": str(data)}))
    figure = {
        "name": "exact | name",
        "value": 0.5,
        "low": 0.4,
        "high": 0.6,
        "count": 8,
        "floor": ["constant", 0.1],
    }
    record_figures(run, [figure])
    card = (run / "README.md").read_text()
    assert "| exact \\| name | 0.500 [0.400, 0.600] | 8 | 0.100 (constant) |" in card
    assert "CC-BY-4.0 (7 records), MIT (1 records), see its ATTRIBUTION.md" in card


def test_a_readme_of_ones_own_is_left_alone(
    toy_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(
        toy_run, run, ignore=shutil.ignore_patterns("checkpoints", "cache", "tensorboard")
    )
    (run / "README.md").write_text("mine")
    write_card(run)
    assert (run / "README.md").read_text() == "mine" and "was left as it is" in caplog.text


@pytest.fixture(scope="module")
def adapted(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that adapts a trained (here: random, but saved) language model by LoRA."""
    out = tmp_path_factory.mktemp("lora") / "run"
    first = open_run(out.with_name("first"), toy_data, toy_config(), toy_training(2))
    train_stages(first, ("tokenizer", "language"))
    base = out.with_name("base")
    model = LaVIT.from_pretrained(first.folder)
    language = model.language
    language.lm.save_pretrained(base)
    model.text_tokenizer.save_pretrained(base)
    config = toy_config()
    config = replace(
        config, language=replace(config.language, source=str(base), architecture={}, lora_rank=4)
    )
    training = toy_training(4)
    training = replace(training, language=replace(training.language, learning_rate=0.05))
    train_stages(open_run(out, toy_data, config, training), ("tokenizer", "language"))
    return out


def test_a_merged_adapter_is_the_unmerged_one(adapted: Path, tmp_path: Path) -> None:
    language = LaVIT.from_pretrained(adapted).language
    ids = torch.tensor([[1, 5, language.vocabulary.image_start, language.vocabulary.size - 1, 2]])
    with torch.no_grad():
        hidden = language.body(inputs_embeds=language.embed(ids)).last_hidden_state
        expected = torch.cat([language.text_logits(hidden), language.visual_logits(hidden)], -1)
        main(["export", str(adapted), "--out", str(tmp_path / "plain"), "--merge"])
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
        found = plain(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(adapted.with_name("base"))(
            input_ids=ids[:, :2]
        ).logits
    assert torch.allclose(found, expected, atol=1e-5)
    # the adapter does something
    assert not torch.allclose(found[:, :2, : base.shape[-1]], base, atol=1e-3)


def test_only_the_adapter_rows_and_reader_train(adapted: Path) -> None:
    first = LaVIT.from_pretrained(adapted.with_name("first")).language.lm.state_dict()
    language = LaVIT.from_pretrained(adapted).language
    for name, tensor in language.lm.state_dict().items():
        if "lora_" not in name:
            assert tensor.equal(first[name.replace(".base_layer", "")]), name


def test_an_adapter_is_written_alike_by_every_process(adapted: Path) -> None:
    targets = read_json(adapted / "language" / "adapter_config.json")["target_modules"]
    assert targets == sorted(targets) and len(targets) == 7


def test_an_adapter_is_not_exported_by_halves(adapted: Path, toy_run: Path, tmp_path: Path) -> None:
    config = read_config(adapted)
    with pytest.raises(InputError, match="--merge"):
        export_language(config, adapted, tmp_path / "out")
    with pytest.raises(InputError, match="exists already"):
        export_language(config, adapted, tmp_path, merge=True)
    main(["export", str(toy_run), "--out", str(tmp_path / "whole")])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "whole").config.vocab_size > 32


def test_shipped_models_say_how_they_were_trained() -> None:
    for path in WEIGHTS.glob("*/training.json"):
        training = read_json(path)["training"]
        assert to_json(from_json(TrainConfig, training)) == training
        training["language"]["mixture"] = [1.0, 1.0, 0.0, 0.0, 0.0]
        with pytest.raises(InputError, match="expected an object of reading, writing"):
            from_json(TrainConfig, training)


def test_settings_of_another_version_are_named_in_one_line(toy_run: Path, tmp_path: Path) -> None:
    for name in ("config.json", "training.json"):
        shutil.copy(toy_run / name, tmp_path / name)
    said = read_json(tmp_path / "training.json")
    said["training"]["pixels"] |= {"autoencoder_steps": 0, "autoencoder_rate": 1e-3}
    (tmp_path / "training.json").write_text(json.dumps(said))
    with pytest.raises(InputError) as error:
        write_card(tmp_path)
    assert "autoencoder_rate, autoencoder_steps" in str(error.value)
    assert "\n" not in str(error.value)

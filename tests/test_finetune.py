"""Fine-tuning on conversations: both sides are learnt, resumed = whole, LoRA merged = unmerged."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lavit
from conftest import NAMES
from lavit.cli import main
from lavit.config import FinetuneTraining, InputError, read_config
from lavit.evaluate.forgetting import changes
from lavit.generate.score import text_likelihood
from lavit.language.lora import merge_lora
from lavit.model import LaVIT
from lavit.processing import LaVITProcessor
from lavit.sequence import Text, lay_out, pack
from lavit.train import finetune as finetune_room
from lavit.train.finetune import finetune, finetune_training, prepare_lora
from lavit.train.loop import Report
from test_conversations import drawn, read, write


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four questions about pictures and four pictures as answers."""
    return write(tmp_path, [read(name) for name in NAMES[:4]] + [drawn(name) for name in NAMES[4:]])


def settings(run: Path, *, lora: int | None = None, steps: int = 6) -> FinetuneTraining:
    training = finetune_training(run, lora_rank=lora, steps=steps)
    return replace(training, checkpoint_every=4, log_every=1)


def losses(folder: Path) -> list[float]:
    return [
        json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def logits(language: torch.nn.Module) -> torch.Tensor:
    batch = pack([[lay_out((Text((5, 6, 7, 8)),), language.vocabulary)]], language.vocabulary)
    with torch.no_grad():
        embeddings = language.embed(batch.ids)
        hidden = language.hidden(embeddings, documents=batch.documents, positions=batch.positions)
        return torch.cat([language.text_logits(hidden), language.visual_logits(hidden)], -1)


def test_eight_conversations_are_overfitted(toy_run: Path, data: Path, tmp_path: Path) -> None:
    training = settings(toy_run, steps=120)
    rates = {
        "learning_rate": 4e-3,
        "rows_rate": 4e-3,
        "reader_rate": 4e-3,
        "rows": 4,
        "tokens": 128,
    }
    training = replace(training, language=replace(training.language, **rates))
    finetune(tmp_path / "new", data, toy_run, training)
    last = json.loads((tmp_path / "new" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["text_accuracy"] > 0.95 and last["code_accuracy"] > 0.9
    model = lavit.load(tmp_path / "new")
    assert [model.ask(data.parent / f"{name}.png", "what is it?") for name in NAMES[:4]] == list(
        NAMES[:4]
    )
    assert model.draw("draw red dot", steps=1).size == (16, 16)
    assert isinstance(model.caption(data.parent / "red dot.png"), str)


@pytest.mark.parametrize("lora", [None, 4])
def test_a_killed_fine_tuning_goes_on_to_the_same_losses(
    lora: int | None, toy_run: Path, data: Path, tmp_path: Path
) -> None:
    def kill(report: Report) -> None:
        if report.step == 6:
            raise KeyboardInterrupt

    training = settings(toy_run, lora=lora, steps=8)
    with pytest.raises(KeyboardInterrupt):
        finetune(tmp_path / "killed", data, toy_run, training, watch=kill)
    finetune(tmp_path / "killed", data, toy_run, training)
    finetune(tmp_path / "whole", data, toy_run, training)
    assert (
        losses(tmp_path / "killed") == losses(tmp_path / "whole")
        and len(losses(tmp_path / "whole")) == 8
    )
    for part in ("language", "reader"):
        one, other = (
            (tmp_path / run / part / "model.safetensors").read_bytes()
            for run in ("killed", "whole")
        )
        assert one == other


def test_lora_trains_little_and_is_merged_in_the_saved_model(
    toy_run: Path, data: Path, tmp_path: Path
) -> None:
    before = LaVIT.from_pretrained(toy_run).language
    finetune(tmp_path / "new", data, toy_run, settings(toy_run, lora=4))
    config = read_config(tmp_path / "new")
    assert config.language.lora_rank == 0 and config.language.source == "folder"
    after = LaVIT.from_pretrained(tmp_path / "new").language
    table = [language.lm.get_input_embeddings().weight for language in (before, after)]
    assert table[0].equal(table[1])  # the LM's own embedding was frozen
    projection = [
        language.lm.model.layers[0].self_attn.q_proj.weight for language in (before, after)
    ]
    assert not projection[0].equal(projection[1])
    assert torch.linalg.matrix_rank((projection[1] - projection[0]).double(), rtol=1e-4) <= 4


def test_merged_lora_gives_the_logits_of_unmerged(toy_run: Path) -> None:
    model = LaVIT.from_pretrained(toy_run)
    language = model.language.eval()
    plain = logits(language)
    assert prepare_lora(language, model.config, 4) is False
    trained = [
        name for name, parameter in language.lm.named_parameters() if parameter.requires_grad
    ]
    assert trained and all("lora_" in name for name in trained)
    with torch.no_grad():
        for name, parameter in language.lm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    unmerged = logits(language)
    merge_lora(language.lm)
    assert not any("lora_" in name for name, _ in language.lm.named_parameters())
    assert torch.allclose(logits(language), unmerged, atol=1e-5)
    assert not torch.allclose(plain, unmerged, atol=1e-3)


def test_bad_input_is_one_clear_line(toy_run: Path, data: Path, tmp_path: Path) -> None:
    training = settings(toy_run)
    with pytest.raises(InputError, match="another --out"):
        finetune(toy_run, data, toy_run, training)
    with pytest.raises(InputError, match="no model at"):
        finetune(tmp_path / "new", data, tmp_path / "nowhere", training)
    shutil.copytree(toy_run, tmp_path / "other")
    with pytest.raises(InputError, match="holds a model or another training"):
        finetune(tmp_path / "other", data, toy_run, training)
    with pytest.raises(InputError, match="positive time"):
        finetune(tmp_path / "new", data, toy_run, training, minutes=0)
    finetune(
        tmp_path / "new",
        data,
        toy_run,
        replace(training, language=replace(training.language, steps=1)),
    )
    with pytest.raises(InputError, match="other settings"):
        finetune(tmp_path / "new", data, toy_run, training)
    short = replace(training, language=replace(training.language, steps=1), checkpoint_every=9)
    finetune(tmp_path / "new", data, toy_run, short)  # which changes no figure


def test_minutes_become_steps_that_stay(
    toy_run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is measured are whole steps, the optimiser's too, and they move nothing."""
    measured: list[bool] = []
    plain = finetune_room.step_once

    def watched(stage: Any, module: Any, optimizer: Any, step: int, **options: Any) -> Any:
        before = [p.detach().clone() for p in module.parameters()]
        done = plain(stage, module, optimizer, step, **options)
        assert optimizer.state  # it has made its moments
        measured.append(all(map(torch.equal, before, module.parameters())))
        return done

    monkeypatch.setattr(finetune_room, "step_once", watched)
    run = finetune(tmp_path / "new", data, toy_run, settings(toy_run), minutes=0.005)
    assert measured == [True] * (finetune_room.MEASURED + 1)
    steps = run.training.language.steps
    assert steps >= 1 and len(losses(tmp_path / "new")) == steps
    again = finetune(tmp_path / "new", data, toy_run, settings(toy_run), minutes=0.005)
    assert again.training.language.steps == steps


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
def test_a_kept_adapter_is_a_peft_folder_beside_its_base(
    toy_run: Path, data: Path, tmp_path: Path
) -> None:
    """It is the merged model, unmerged; peft opens it, and export merges it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lavit.storage import export_language, hash_of_base

    training = settings(toy_run, lora=4, steps=2)
    finetune(tmp_path / "merged", data, toy_run, training)
    checked = tmp_path / "checked"  # a model with a safety checker
    shutil.copytree(toy_run, checked, ignore=shutil.ignore_patterns("checkpoints", "cache"))
    (checked / "safety_checker").mkdir()
    (checked / "safety_checker" / "config.json").write_text("{}")
    finetune(tmp_path / "kept", data, checked, replace(training, keep_adapter=True))
    merged, kept = (LaVIT.from_pretrained(tmp_path / name) for name in ("merged", "kept"))
    assert read_config(tmp_path / "kept").language.source == "base"
    sha256 = read_config(tmp_path / "kept").language.sha256
    assert sha256 is not None and sha256 == hash_of_base(tmp_path / "kept" / "base")
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(logits(kept.language), logits(merged.language), **close)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "kept" / "base")
    own = PeftModel.from_pretrained(base, tmp_path / "kept" / "language").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        texts = own(ids).logits[0]
    torch.testing.assert_close(texts, logits(merged.language)[0][:, : texts.shape[1]], **close)
    export_language(kept.config, tmp_path / "kept", tmp_path / "plain", merge=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    with torch.no_grad():
        assert plain(ids).logits.shape[-1] == kept.language.vocabulary.size
    main(["export", str(tmp_path / "kept"), "--merge", "--whole", "--out", str(tmp_path / "whole")])
    known = LaVITProcessor.from_pretrained(tmp_path / "kept").vocabulary
    assert known == kept.language.vocabulary
    assert (tmp_path / "whole" / "safety_checker" / "config.json").is_file()
    whole = LaVIT.from_pretrained(tmp_path / "whole")
    assert (whole.config.language.source, whole.config.language.lora_rank) == ("folder", 0)
    torch.testing.assert_close(logits(whole.language), logits(kept.language), **close)
    assert whole.pixels is not None and not (tmp_path / "whole" / "base").exists()
    kept.save_pretrained(tmp_path / "again")
    again = LaVIT.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again.language), logits(kept.language))
    said = json.loads((tmp_path / "kept" / "language" / "adapter_config.json").read_text())
    for wrong in ({"r": 64}, {"target_modules": ["nonsense"]}):
        path = tmp_path / "again" / "language" / "adapter_config.json"
        path.write_text(json.dumps(said | wrong))
        with pytest.raises(InputError, match=r"adapter_config.json: r .* config.json says rank 4"):
            LaVIT.from_pretrained(tmp_path / "again", parts=("language",))
    with pytest.raises(InputError, match="give its rank"):
        finetune_training(toy_run, keep_adapter=True)


def test_a_share_of_the_rows_replays_texts(toy_run: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text("a heron stands in the reeds. " * 40)
    training = finetune_training(toy_run, steps=4, replay=f"{tmp_path / 'prose.txt'}:0.5")
    training = replace(training, log_every=1, language=replace(training.language, rows=4))
    plain = replace(training, replay="", language=replace(training.language, rows=2))
    for name, how in (("replayed", training), ("plain", plain)):
        finetune(tmp_path / name, data, toy_run, how)
    lines = (tmp_path / "replayed" / "metrics.jsonl").read_text().splitlines()
    model = LaVIT.from_pretrained(tmp_path / "replayed", parts=("language",))
    before = LaVIT.from_pretrained(toy_run, parts=("language",))
    text = "a heron stands in the reeds."
    assert text_likelihood(model, text) > text_likelihood(before, text)
    without = LaVIT.from_pretrained(tmp_path / "plain", parts=("language",))
    assert text_likelihood(model, text) > text_likelihood(without, text)
    assert len(lines) == 4
    for wrong, match in ((":1.5", "share of rows"), (":0.5,b:0.5", "share of rows")):
        how = replace(training, replay=f"{tmp_path / 'prose.txt'}{wrong}")
        with pytest.raises(InputError, match=match):
            finetune(tmp_path / f"wrong{wrong[1]}{len(wrong)}", data, toy_run, how)


def test_what_a_fine_tuning_forgets_is_said(
    toy_run: Path, toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One false answer at a high rate: captions get worse, and the command says so."""
    path = write(tmp_path, [read(NAMES[0])])
    path.write_text(path.read_text().replace(f'"{NAMES[0]}"', '"nothing at all"'))
    training = finetune_training(toy_run, steps=30)
    rates = dict.fromkeys(("learning_rate", "rows_rate", "reader_rate"), 2e-2)
    training = replace(training, language=replace(training.language, **rates))
    finetune(tmp_path / "new", path, toy_run, training)
    found, said = changes(toy_run, tmp_path / "new", str(toy_data))
    assert [change.what for change in found] == ["captions", "drawings", "texts"]
    assert found[0].forgotten and found[0].after > found[0].before and str(toy_data) in said
    same, _ = changes(toy_run, toy_run, str(toy_data))
    assert not any(change.forgotten or change.low or change.high for change in same)
    words = ["train", "finetune", "--data", str(path), "--model", str(toy_run), "--steps", "2"]
    main([*words, "--out", str(tmp_path / "cli"), "--check", str(toy_data)])
    assert "loss a token before and after" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--out", str(tmp_path / "bad"), "--check", str(tmp_path / "missing")])
    assert stopped.value.code == 2 and not (tmp_path / "bad").exists()


def test_changed_data_are_no_way_to_go_on(toy_run: Path, data: Path, tmp_path: Path) -> None:
    """Conversations and texts to be replayed are held by what they say, not by their names."""
    prose = tmp_path / "prose.txt"
    prose.write_text("a heron stands in the reeds. " * 40)
    training = finetune_training(toy_run, steps=1, replay=f"{prose}:0.5")
    training = replace(training, language=replace(training.language, rows=2))
    finetune(tmp_path / "new", data, toy_run, training)
    finetune(tmp_path / "new", data, toy_run, training)
    for path in (data, prose):
        before = path.read_text()
        path.write_text(before.replace("r", "s"))
        with pytest.raises(InputError, match=rf"{path.name} has changed since.*another --out"):
            finetune(tmp_path / "new", data, toy_run, training)
        path.write_text(before)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lora", "-3"], "is no rank"),
        (["--steps", "0"], "at least 1 step"),
        (["--images", "nothere"], "nothere is no folder"),
        (["--replay", "nothere.txt:0.5"], "nothere.txt"),
        (["--replay", "prose.txt"], "share of rows"),
        (["--replay", "blank.txt:0.5"], "no text in it"),
    ],
)
def test_a_refused_fine_tuning_leaves_nothing(
    words: list[str], said: str, toy_run: Path, data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prose.txt").write_text("a heron")
    (tmp_path / "blank.txt").write_text(" \n")
    given = ["train", "finetune", "--data", str(data), "--model", str(toy_run), "--out", "new"]
    with pytest.raises(SystemExit) as stopped:
        main([*given, *words])
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("lavit:")]
    assert stopped.value.code == 2 and said in line and not Path("new").exists()


def test_rank_0_trains_all_weights_and_says_so(
    toy_run: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    finetune(tmp_path / "new", data, toy_run, settings(toy_run, lora=0, steps=1))
    assert "all weights of the language model train" in caplog.text

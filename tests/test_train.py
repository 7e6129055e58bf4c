"""The loop and its three stages: learning, resuming, refusing, and what stops a failing run."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from conftest import NAMES, toy_config, toy_picture, toy_training
from lavit.config import (
    InputError,
    LanguageConfig,
    Mixture,
    read_json,
    write_json,
)
from lavit.data.bulk import CorpusJob, tokenize_corpus
from lavit.data.corpus import load_corpus
from lavit.data.documents import Documents
from lavit.data.features import compute_features, tokenize_features
from lavit.data.sources import Record
from lavit.files import load_tensors
from lavit.images import pixels
from lavit.model import LaVIT
from lavit.presets import lavit_7b
from lavit.sequence import VisualTokens
from lavit.train import encoded
from lavit.train.batches import draw_pictures
from lavit.train.encoded import Encoded, language_stage
from lavit.train.first import first_language
from lavit.train.health import Alarm, CodeUse, check_codes, check_selector
from lavit.train.language import train_text_tokenizer
from lavit.train.loop import Report, schedule
from lavit.train.run import open_run, train_language, train_stages, whole_language
from lavit.vision.encoder import Vision, load_vision
from lavit.visual_tokenizer.tokenizer import cosine_distance
from lavit.vocabulary import Vocabulary


def losses(run: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["stage"], line["step"], line["loss"], line["gradient_norm"]) for line in lines]


def test_a_run_is_a_model_folder(toy_run: Path, toy_data: Path) -> None:
    model = LaVIT.from_pretrained(toy_run)
    pictures = load_corpus(toy_data).pictures
    codes = model.encode_images([picture.record.open() for picture in pictures])
    assert model.pixels.config == toy_config().pixels
    assert int(codes.lengths.min()) >= 1


def test_a_killed_run_goes_on_to_the_same_losses(
    toy_data: Path, toy_run: Path, tmp_path: Path
) -> None:
    """Killed once in each stage, at a step that has no checkpoint."""
    killed: set[str] = set()

    def kill(report: Report) -> None:
        if report.step == 6 and report.stage not in killed:
            killed.add(report.stage)
            raise KeyboardInterrupt

    training = replace(toy_training(), checkpoint_every=4)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            train_stages(open_run(tmp_path / "run", toy_data, toy_config(), training, watch=kill))
    train_stages(open_run(tmp_path / "run", toy_data, toy_config(), training))
    assert killed == {"tokenizer", "language", "pixels"}
    assert losses(tmp_path / "run")[-1] == losses(toy_run)[-1]
    for part in ("visual_tokenizer", "language", "reader"):
        a, b = (
            (folder / part / "model.safetensors").read_bytes()
            for folder in (tmp_path / "run", toy_run)
        )
        assert a == b, part


def test_a_run_goes_on_from_a_model(toy_run: Path, toy_data: Path, tmp_path: Path) -> None:
    """Its tokens stay what they are; language and pixels begin where the other's ended."""
    config = LaVIT.from_pretrained(toy_run).config
    train_stages(open_run(tmp_path / "run", toy_data, config, toy_training(), start=toy_run))
    stages = ("language", "pixels")
    for part in ("visual_tokenizer", "language"):
        a, b = (
            (folder / part / "model.safetensors").read_bytes()
            for folder in (tmp_path / "run", toy_run)
        )
        assert (a == b) is (part == "visual_tokenizer")
    for stage in stages:
        before, after = (
            [loss for one, _, loss, _ in losses(run) if one == stage]
            for run in (toy_run, tmp_path / "run")
        )
        assert after[0] < before[0] and len(after) == len(before)
    with pytest.raises(InputError, match="other settings"):
        open_run(tmp_path / "run", toy_data, config, toy_training())


def test_other_settings_on_the_same_folder_are_refused(toy_run: Path, toy_data: Path) -> None:
    with pytest.raises(InputError, match="other settings"):
        train_stages(open_run(toy_run, toy_data, toy_config(), toy_training(7)))
    with pytest.raises(InputError, match="other settings"):
        open_run(toy_run, toy_data, toy_config(), replace(toy_training(), seed=1))


def test_settings_that_were_spoiled_are_other_settings(
    toy_run: Path, toy_data: Path, tmp_path: Path
) -> None:
    folder = begun_run(toy_run, tmp_path / "run")
    said = read_json(folder / "training.json")
    for part in ("training", "model"):
        write_json(folder / "training.json", said | {part: None})
        with pytest.raises(InputError, match="other settings"):
            open_run(folder, toy_data, toy_config(), toy_training())


def test_settings_that_change_no_figure_may_change(
    toy_run: Path, toy_data: Path, tmp_path: Path
) -> None:
    """How often a run saves and says something; the last ones are written down."""
    folder = begun_run(toy_run, tmp_path / "run")
    (folder / "visual_tokenizer" / "done").touch()
    free = {"checkpoint_every": 7, "keep_last": 5, "log_every": 3}
    run = open_run(folder, toy_data, toy_config(), replace(toy_training(), **free))
    train_stages(run, ("tokenizer",))
    saved = json.loads((folder / "training.json").read_text())["training"]
    assert {name: saved[name] for name in free} == free
    for other in ({"clip": 2.0}, {"sample_every": 4}):
        with pytest.raises(InputError, match="other settings"):
            open_run(folder, toy_data, toy_config(), replace(toy_training(), **other))


def begun_run(toy_run: Path, folder: Path) -> Path:
    """A run whose first stage is that of the toy run."""
    for part in ("vision", "visual_tokenizer"):
        shutil.copytree(toy_run / part, folder / part)
    for name in ("config.json", "training.json"):
        shutil.copy(toy_run / name, folder / name)
    return folder


def test_settings_of_a_stage_count_from_its_beginning(
    toy_run: Path,
    toy_data: Path,
    tmp_path: Path,
) -> None:
    """Codes made by stage 1 are named at stage 2, for the first time, and no longer at stage 3."""
    folder, codes = begun_run(toy_run, tmp_path / "run"), str(tmp_path / "tokens")
    tokenize_corpus(CorpusJob(data=toy_data, out=codes, model=folder), workers=0)
    training, config = toy_training(), toy_config()
    fed = replace(training, language=replace(training.language, steps=1, token_corpus=codes))
    shape = config.language.architecture | {"num_hidden_layers": 1}
    small = replace(config, language=replace(config.language, architecture=shape))
    train_stages(open_run(folder, toy_data, small, fed), ("language",))
    assert len(LaVIT.from_pretrained(folder).language.body.layers) == 1
    with pytest.raises(InputError, match="other settings"):
        train_stages(open_run(folder, toy_data, config, fed), ("language",))
    with pytest.raises(InputError, match="other settings"):
        train_stages(open_run(folder, toy_data, config, training))
    short = replace(training, pixels=replace(training.pixels, steps=1))
    train_stages(open_run(folder, toy_data, config, short), ("pixels",))
    assert len(LaVIT.from_pretrained(folder).language.body.layers) == 1
    saved = json.loads((folder / "training.json").read_text())
    assert saved["training"]["language"]["token_corpus"] == codes


def test_settings_of_a_stage_to_come_outlive_the_stages_before(
    toy_run: Path,
    toy_data: Path,
    tmp_path: Path,
) -> None:
    """config.json still has pixels as they were first asked for, when language is saved."""
    folder, config, training = begun_run(toy_run, tmp_path / "run"), toy_config(), toy_training()
    training = replace(
        training,
        language=replace(training.language, steps=1),
        pixels=replace(training.pixels, steps=1),
    )
    other = replace(config, pixels=replace(config.pixels, guidance=3.0))
    train_stages(open_run(folder, toy_data, other, training), ("language", "pixels"))
    assert LaVIT.from_pretrained(folder).config.pixels.guidance == 3.0
    assert LaVIT.from_pretrained(toy_run).config.pixels.guidance != 3.0


@pytest.mark.parametrize("begin", ["base", "start"])
def test_weights_kept_in_half_precision_train_in_full(
    toy_run: Path, toy_data: Path, tmp_path: Path, begin: str
) -> None:
    folder, half = tmp_path / "run", tmp_path / "half"
    shutil.copytree(toy_run, half, ignore=shutil.ignore_patterns("checkpoints", "cache"))
    for part, kind in (("vision", AutoModel), ("language", AutoModelForCausalLM)):
        kind.from_pretrained(half / part).half().save_pretrained(half / part)
    training, config = toy_training(), LaVIT.from_pretrained(half).config
    options = {"start": half}
    if begin == "base":
        config = replace(config, language=LanguageConfig(source=str(half / "language")))
        options = {}
        for part in ("vision", "visual_tokenizer"):
            shutil.copytree(half / part, folder / part)
    training = replace(training, language=replace(training.language, steps=1))
    train_stages(open_run(folder, toy_data, config, training, **options), ("language",))
    kept = [load_tensors(folder / part / "model.safetensors") for part in ("language", "reader")]
    assert {tensor.dtype for tensors in kept for tensor in tensors.values()} == {torch.float32}


def test_a_decoder_without_sizes_starts_from_a_folder_of_the_run(
    toy_run: Path,
    toy_data: Path,
    tmp_path: Path,
) -> None:
    """As lavit_7b, whose UNet is Stable Diffusion's."""
    assert not lavit_7b().model.pixels.unet and not lavit_7b().model.pixels.start_from
    folder, config, training = begun_run(toy_run, tmp_path / "run"), toy_config(), toy_training()
    still = replace(training.pixels, steps=1, learning_rate=1e-9, ema=0.0)
    config = replace(config, pixels=replace(config.pixels, unet={}))
    run = open_run(folder, toy_data, config, replace(training, pixels=still))
    with pytest.raises(InputError, match="run/decoder holds no diffusion model"):
        train_stages(run, ("pixels",))
    shutil.copytree(toy_run / "pixels", folder / "decoder")
    train_stages(run, ("pixels",))
    file = "unet/diffusion_pytorch_model.safetensors"
    found, began = load_tensors(folder / "pixels" / file), load_tensors(folder / "decoder" / file)
    assert all(torch.allclose(found[name], began[name], atol=1e-6) for name in began)


def test_pictures_may_be_read_as_codes_in_training_too(
    toy_run: Path,
    toy_data: Path,
    tmp_path: Path,
) -> None:
    """The reader stays as stage 1 made it; samples are read the same way."""
    folder, config = begun_run(toy_run, tmp_path / "run"), toy_config()
    training = toy_training()
    training = replace(training, language=replace(training.language, steps=1), sample_every=1)
    begun = read_json(folder / "training.json")
    begun["training"]["sample_every"] = 1
    write_json(folder / "training.json", begun)
    config = replace(config, language=replace(config.language, read_as="codes"))
    train_stages(open_run(folder, toy_data, config, training), ("language",))
    names = ("visual_tokenizer", "reader")
    parts = (load_tensors(folder / part / "model.safetensors") for part in names)
    first, second = ({n: t for n, t in part.items() if n.startswith("merger.")} for part in parts)
    assert second and all(second[name].equal(first[name]) for name in second)
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 4


def test_what_stays_frozen_is_whole_again_after_sharding(
    toy_run: Path, toy_data: Path, tmp_path: Path
) -> None:
    folder, training = begun_run(toy_run, tmp_path / "run"), toy_training()
    frozen = replace(training.language, steps=1, train_merger=False)
    training = replace(training, language=frozen)
    run = open_run(folder, toy_data, toy_config(), training)
    encoded = Encoded(run)
    language, text = first_language(run, encoded)
    begun = run.config
    train_language(run, language_stage(run, encoded, language, text), text)
    run.config = begun
    whole = whole_language(run, language, text)  # of a checkpoint that holds what trains
    assert all(there.equal(whole.state_dict()[n]) for n, there in language.state_dict().items())
    assert not any(p.requires_grad for p in whole.reader.merger.parameters())


@pytest.mark.parametrize("name", ["checkpoint_every", "keep_last", "log_every"])
def test_counts_of_the_loop_are_checked(
    name: str, toy_run: Path, toy_data: Path, tmp_path: Path
) -> None:
    wrong = replace(toy_training(), **{name: 0})
    with pytest.raises(InputError, match=f"{name} is 0"):
        train_stages(open_run(tmp_path / "run", toy_data, toy_config(), wrong), ("tokenizer",))


def test_a_tokenizer_keeps_by_a_rule(toy_data: Path, tmp_path: Path) -> None:
    config = toy_config()
    for changes, stages, said in (
        ({"keep": "sample"}, ("tokenizer",), "draws other patches each time"),
        ({"keep": "top_k:inf"}, ("tokenizer",), "is not understood"),
        ({"spatial_positions": True}, ("tokenizer", "pixels"), "spatial_positions wants their"),
    ):
        wrong = replace(config, visual_tokenizer=replace(config.visual_tokenizer, **changes))
        with pytest.raises(InputError, match=said):
            train_stages(open_run(tmp_path / said[:4], toy_data, wrong, toy_training()), stages)


def test_pictures_without_texts_serve_stages_that_need_none(toy_data: Path, tmp_path: Path) -> None:
    shutil.copytree(toy_data, tmp_path / "some")
    lines = (tmp_path / "some" / "train" / "metadata.jsonl").read_text().replace("red bar.", "")
    (tmp_path / "some" / "train" / "metadata.jsonl").write_text(lines)
    pictures = load_corpus(tmp_path / "some").pictures
    assert [len(picture.captions) for picture in pictures].count(0) == 1
    shutil.copytree(toy_data, tmp_path / "none", ignore=shutil.ignore_patterns("*.jsonl"))
    run = open_run(tmp_path / "run", tmp_path / "none", toy_config(), toy_training(1))
    with pytest.raises(InputError, match=r"gives no document of .*: 0 of its 8 pictures"):
        train_stages(run)
    assert not (run.folder / "cache").exists()  # said before anything is trained
    train_stages(run, ("tokenizer", "pixels"))


def test_stage_one_learns_and_its_codes_live(toy_data: Path, tmp_path: Path) -> None:
    training = toy_training()
    stage = replace(training.tokenizer, steps_a=60, steps_b=60)
    run = open_run(tmp_path, toy_data, toy_config(), replace(training, tokenizer=stage))
    encoded = train_stages(run, ("tokenizer",))
    patches = encoded.features.rows(torch.arange(len(NAMES)))
    keep = encoded.tokenizer.select(patches)
    distance = cosine_distance(
        encoded.tokenizer.reconstruct(patches, keep, quantise=True), patches
    ).mean()
    constant = cosine_distance(patches.mean(0).expand_as(patches), patches).mean()
    assert distance < 0.6 * constant
    assert len(encoded.tokens.codes.unique()) > 8


def test_stage_two_overfits_both_directions(toy_data: Path, tmp_path: Path) -> None:
    training = toy_training()
    stage = replace(
        training.language,
        steps=150,
        unconditional_fraction=0.0,
        mixture=Mixture(reading=1.0, writing=1.0),
    )
    run = open_run(tmp_path, toy_data, toy_config(), replace(training, language=stage))
    train_stages(run, ("tokenizer", "language"))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    last = [json.loads(line) for line in lines[-10:]]
    mean = {
        name: sum(line[name] for line in last) / len(last)
        for name in ("text_accuracy", "code_accuracy")
    }
    assert mean["text_accuracy"] > 0.75  # nobody can know the first word of a prompt
    assert mean["code_accuracy"] > 0.8


def test_documents_fill_their_rows_and_are_functions_of_the_step(toy_data: Path) -> None:
    corpus = load_corpus(toy_data)
    codes = tuple(tuple(range(1 + n % 5)) for n in range(len(corpus)))
    text = train_text_tokenizer(corpus, 300)
    config = replace(toy_training().language, rows=4, tokens=256)
    vocabulary = Vocabulary(text_size=len(text), codes=32, end=text.eos_token_id)
    make = {"text": text, "vocabulary": vocabulary, "config": config}
    first, second = (Documents(corpus, codes, seed=3, **make) for _ in range(2))
    assert first.batch(5).useful >= 0.98
    assert first.batch(5).ids.equal(second.batch(5).ids)
    assert not first.batch(5).ids.equal(first.batch(6).ids)


def test_every_picture_comes_once_an_epoch() -> None:
    drawn = torch.cat([draw_pictures(10, 4, seed=1, step=step) for step in range(5)])
    assert drawn[:10].sort().values.tolist() == drawn[10:].sort().values.tolist() == list(range(10))


def test_an_order_is_made_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    made, permute = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda *a, **k: (made.append(a), permute(*a, **k))[1])
    for step in range(10):
        draw_pictures(103, 20, seed=7, step=step)
    assert len(made) == 2


def test_features_are_computed_once(toy_run: Path, toy_data: Path, tmp_path: Path) -> None:
    vision = LaVIT.from_pretrained(toy_run).vision
    records = [picture.record for picture in load_corpus(toy_data).pictures]
    first = compute_features(records, vision, tmp_path)
    config = vision.config
    images = [record.open() for record in records]
    expected = vision(pixels(images, config.image_size, config.mean, config.std))
    assert torch.allclose(first.rows(torch.arange(8)), expected, atol=1e-2)
    # the same file once its hash is known
    pinned = Vision(replace(config, sha256="0"), vision.encoder)
    assert compute_features(records, pinned, tmp_path).array.filename == first.array.filename
    assert compute_features(records[1:], vision, tmp_path).array.filename != first.array.filename
    other = tmp_path / "other.png"  # a picture made anew under its name
    records = [replace(records[0], image=str(other))]
    found = []
    for name in ("red bar", "blue dot"):
        toy_picture(name).resize((40, 40) if found else (32, 32)).save(other)
        found.append(compute_features(records, vision, tmp_path).rows(torch.arange(1)))
    assert not torch.equal(*found)


def test_features_are_shared_by_chunks_and_taken_up_by_any_number_of_processes(
    toy_run: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two is killed in its second chunk; three others do what is missing, and no more."""
    monkeypatch.setattr("lavit.data.features.CHUNK", 2)
    vision = LaVIT.from_pretrained(toy_run).vision
    records = [picture.record for picture in load_corpus(toy_data).pictures] * 2
    whole = compute_features(records, vision, tmp_path / "whole")
    encoded: list[int] = []
    encode = vision.encode

    def counted(images: list) -> torch.Tensor:
        encoded.append(len(images))
        if sum(encoded) > 10:
            raise KeyboardInterrupt
        return encode(images)

    make = {"folder": tmp_path / "shared", "records": records, "vision": vision}
    monkeypatch.setattr(vision, "encode", counted)
    compute_features(**make, rank=0, ranks=2)  # every other one of eight chunks
    with pytest.raises(KeyboardInterrupt):
        compute_features(**make, rank=1, ranks=2)
    assert sum(encoded) == 12
    encoded.clear()
    together = Barrier(3)
    with ThreadPoolExecutor(3) as threads:
        share = partial(compute_features, **make, ranks=3, wait=together.wait)
        found = [one.result() for one in [threads.submit(share, rank=rank) for rank in range(3)]]
    assert sum(encoded) == 6
    everything = torch.arange(16)
    assert all(one.rows(everything).equal(whole.rows(everything)) for one in found)


def test_tokens_are_made_once_for_a_tokenizer(
    toy_run: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on takes them up; another tokenizer, or a damaged file, makes them anew."""
    shutil.copytree(toy_run, tmp_path / "run", ignore=shutil.ignore_patterns("tokens-*"))
    made: list[int] = []

    def counted(*given: Any) -> VisualTokens:
        made.append(1)
        return tokenize_features(*given)

    monkeypatch.setattr(encoded, "tokenize_features", counted)

    def tokens(change: float = 0.0) -> VisualTokens:
        run = open_run(tmp_path / "run", toy_data, toy_config(), toy_training())
        found = encoded.Encoded(run)
        found.tokenizer.codebook.vectors.data[0] += change
        return found.tokens

    first = tokens()
    assert tokens().codes.equal(first.codes) and len(made) == 1
    tokens(change=1.0)
    assert len(made) == 2
    for path in (tmp_path / "run" / "cache").glob("tokens-*"):
        path.write_bytes(path.read_bytes()[:-1])
    assert tokens().codes.equal(first.codes) and len(made) == 3


def test_tokens_are_the_same_in_training_and_in_use(toy_run: Path, tmp_path: Path) -> None:
    model = LaVIT.from_pretrained(toy_run)
    images = [toy_picture(NAMES[number % 8]).rotate(5 * number) for number in range(64)]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    records = [Record(str(tmp_path / f"{number}.png"), (), str(number)) for number in range(64)]
    cached = compute_features(records, model.vision, tmp_path / "cache")
    trained = tokenize_features(model.visual_tokenizer, cached)
    everything = torch.arange(64)
    for size in (1, 7, 64):
        batches = [images[at : at + size] for at in range(0, 64, size)]
        assert torch.cat([model.patches(batch) for batch in batches]).equal(cached.rows(everything))
        used = [model.encode_images(batch) for batch in batches]
        assert torch.cat([tokens.codes for tokens in used]).equal(trained.codes)
        assert torch.cat([tokens.keep for tokens in used]).equal(trained.keep)


def test_threads_that_share_an_encoder_see_their_own_pictures(toy_run: Path) -> None:
    vision = LaVIT.from_pretrained(toy_run, parts=("vision",)).vision
    images = [toy_picture(NAMES[number % 8]).rotate(9 * number) for number in range(16)]
    alone = [vision.encode([image]) for image in images]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(10):
            together = threads.map(lambda image: vision.encode([image]), images)
            assert all(a.equal(b) for a, b in zip(together, alone, strict=True))


def test_an_encoder_that_packs_pictures_is_refused() -> None:
    config = toy_config().vision
    pixtral = {**config.architecture, "model_type": "pixtral", "intermediate_size": 64}
    vision = load_vision(replace(config, architecture=pixtral))
    pictures = torch.zeros(2, 3, 32, 32)
    with pytest.raises(InputError, match="gives 1 x 16 patches of 32 channels"):
        vision(pictures)


def test_schedule_warms_up_and_ends_at_nothing() -> None:
    rates = [schedule(step, 100, 0.1) for step in range(100)]
    assert rates[0] == 0.1 and max(rates) == 1.0 and rates[-1] < 0.01


def test_alarms_say_what_to_change() -> None:
    use = CodeUse(100, window=3)
    use.add(torch.zeros(50, dtype=torch.long))
    assert use.figures()["live_codes"] == 0.01
    with pytest.raises(Alarm, match="k-means"):
        check_codes(use.figures()["live_codes"], 10, steps_with_codes=6, window=3)
    with pytest.raises(Alarm, match="rate weight"):
        check_selector(0.999, 100)


def test_a_broken_picture_is_left_out_and_named(toy_data: Path, tmp_path: Path) -> None:
    shutil.copytree(toy_data, tmp_path / "data")
    (tmp_path / "data" / "train" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    corpus = load_corpus(tmp_path / "data")
    assert len(corpus) == len(NAMES) - 1
    assert len(corpus.broken) == 1 and "3.png" in corpus.broken[0][0]

"""Whole data sets as tokens: the same as picture by picture, resumed, broken pictures named."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lavit.cli import main
from lavit.config import InputError
from lavit.data import bulk
from lavit.data.bulk import CorpusJob, TokenCorpus, load_tokens, tokenize_corpus, tokenizer_hash
from lavit.data.sources import load_records
from lavit.files import load_tensors, save_tensors
from lavit.images import open_image
from lavit.model import LaVIT


@pytest.fixture
def damaged(toy_data: Path, tmp_path: Path) -> Path:
    """The toy data with its fourth picture cut short."""
    shutil.copytree(toy_data, tmp_path / "data")
    path = tmp_path / "data" / "train" / "3.png"
    path.write_bytes(path.read_bytes()[:50])
    return tmp_path / "data"


def other_tokenizer(run: Path, folder: Path) -> Path:
    """A copy of a run with one weight of its tokenizer changed."""
    shutil.copytree(run, folder)
    path = folder / "visual_tokenizer" / "model.safetensors"
    tensors = load_tensors(path)
    tensors["merger.norm.bias"] = tensors["merger.norm.bias"] + 1e-3
    save_tensors(tensors, path)
    return folder


def assert_one_by_one(corpus: TokenCorpus, run: Path, data: Path) -> None:
    """Every row is what the model says of that picture alone."""
    model, records = LaVIT.from_pretrained(run), load_records(data)
    codes = corpus.tokens.split()
    for row, record in enumerate(corpus.records.tolist()):
        alone = model.encode_images([open_image(records[record].image)])
        assert torch.equal(codes[row], alone.codes)
        assert torch.equal(corpus.tokens.keep[row], alone.keep[0])
        assert Path(records[record].name).resolve() == (data / corpus.names[row]).resolve()


def test_shards_hold_the_tokens_of_each_picture_alone(
    toy_data: Path, toy_tokenizer: Path, tmp_path: Path
) -> None:
    heard: list[tuple[int, int]] = []
    job = CorpusJob(data=toy_data, out=tmp_path / "out", model=toy_tokenizer, shard_size=3)
    manifest = tokenize_corpus(job, workers=0, progress=lambda done, of: heard.append((done, of)))
    assert heard == [(3, 8), (6, 8), (8, 8)]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        ".lock",
        "manifest.json",
        *(f"shard-0000{n}.parquet" for n in range(3)),
    ]
    corpus = load_tokens(
        tmp_path / "out", tokenizer=tokenizer_hash(LaVIT.from_pretrained(toy_tokenizer))
    )
    assert len(corpus) == manifest["pictures"] == 8
    assert manifest["tokens"] == len(corpus.tokens.codes) and manifest["broken"] == []
    assert_one_by_one(corpus, toy_tokenizer, toy_data)


def test_the_hash_knows_the_encoders_number_type(toy_tokenizer: Path) -> None:
    """On CUDA the encoder's products are fp16, in training and in use: some codes are others."""
    model = LaVIT.from_pretrained(toy_tokenizer)
    assert tokenizer_hash(model) == tokenizer_hash(model, torch.device("cpu"))
    assert tokenizer_hash(model, "cuda") == tokenizer_hash(model, torch.device("cuda", 1))
    assert tokenizer_hash(model, "cuda") != tokenizer_hash(model, "cpu")


@pytest.mark.filterwarnings("ignore:::ray")  # its own deprecations
def test_ray_workers_write_what_one_process_writes(
    toy_data: Path,
    damaged: Path,
    toy_tokenizer: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Two workers, through the command line: quiet, shut down at the end, broken picture named."""
    import ray

    words = ("tokenize-corpus", str(damaged), "--model", str(toy_tokenizer), "--shard-size", "2")
    main([*words, "--out", str(tmp_path / "many"), "--workers", "2", "--json"])
    assert not ray.is_initialized()
    said = capfd.readouterr()
    manifest = json.loads(said.out)
    assert manifest["pictures"] == 7 and [line["name"] for line in manifest["broken"]] == [
        "train/3.png"
    ]
    assert "cut short" in manifest["broken"][0]["reason"]
    assert not [
        line for line in said.err.splitlines() if "ray" in line.lower() or "actor" in line.lower()
    ], said.err
    main([*words, "--out", str(tmp_path / "one"), "--workers", "0"])
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "many" / path.name).read_bytes(), path.name
    assert_one_by_one(load_tokens(tmp_path / "many"), toy_tokenizer, damaged)


def test_a_killed_run_goes_on_with_the_missing_shards(
    toy_data: Path, toy_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = CorpusJob(data=toy_data, out=tmp_path / "out", model=toy_tokenizer, shard_size=2)
    tokenize_corpus(replace(job, out=tmp_path / "whole"), workers=0)

    def kill(done: int, of: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus(job, workers=0, progress=kill)
    (out / ".shard-00002.parquet.part").write_bytes(b"half")
    with pytest.raises(InputError, match="not finished"):
        load_tokens(out)
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*")}
    assert len(times) == 2
    written: list[int] = []
    write = bulk.ShardWriter.__call__
    monkeypatch.setattr(
        bulk.ShardWriter, "__call__", lambda self, n: written.append(n) or write(self, n)
    )
    tokenize_corpus(job, workers=0)
    assert written == [2, 3]
    assert all((out / name).stat().st_mtime_ns == time for name, time in times.items())
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name
    tokenize_corpus(job, workers=0)
    assert written == [2, 3]


def test_other_tokenizers_settings_and_damage_are_refused(
    toy_data: Path, toy_tokenizer: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    job = CorpusJob(data=toy_data, out=out, model=toy_tokenizer, shard_size=4)
    tokenize_corpus(job, workers=0)
    other = other_tokenizer(toy_tokenizer, tmp_path / "other")
    with pytest.raises(InputError, match="another tokenizer"):
        tokenize_corpus(replace(job, model=other), workers=0)
    with pytest.raises(InputError, match="not of this model's"):
        load_tokens(out, tokenizer=tokenizer_hash(LaVIT.from_pretrained(other)))
    with pytest.raises(InputError, match="another keep"):
        tokenize_corpus(replace(job, keep="4"), workers=0)
    with pytest.raises(InputError, match="another seed"):
        tokenize_corpus(replace(job, seed=2), workers=0)
    with pytest.raises(InputError, match="workers must be"):
        tokenize_corpus(job, workers=-1)
    with pytest.raises(SystemExit) as stop:
        main(
            [
                "tokenize-corpus",
                str(toy_data),
                "--out",
                str(out),
                "--model",
                str(other),
                "--workers",
                "0",
            ]
        )
    assert stop.value.code == 2
    shard = out / "shard-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(InputError, match=r"shard-00001.*delete it"):
        load_tokens(out)
    shard.unlink()
    with pytest.raises(InputError, match="missing"):
        load_tokens(out)


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("shards", -1, "shards is -1, expected a int above 0"),
        ("patches", 0, "patches is 0, expected a int above 0"),
        ("patches", 7, "do not agree"),
        ("patches", 10**11, "do not agree"),
    ],
)
def test_a_manifest_with_other_numbers_is_refused(
    toy_data: Path, toy_tokenizer: Path, tmp_path: Path, name: str, value: int, line: str
) -> None:
    out = tmp_path / "out"
    tokenize_corpus(CorpusJob(data=toy_data, out=out, model=toy_tokenizer), workers=0)
    said = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(said | {name: value}))
    with pytest.raises(InputError, match=line):
        load_tokens(out)


def test_a_corpus_of_broken_pictures_is_refused_and_named(
    damaged: Path, toy_tokenizer: Path, tmp_path: Path
) -> None:
    for path in (damaged / "train").glob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(InputError, match="none of the 8 pictures"):
        tokenize_corpus(
            CorpusJob(data=damaged, out=tmp_path / "out", model=toy_tokenizer), workers=0
        )
    assert len(json.loads((tmp_path / "out" / "manifest.json").read_text())["broken"]) == 8

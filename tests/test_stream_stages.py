"""Stages on streams: the cache's tokens, a killed run = a whole one, memory whatever the data."""

from __future__ import annotations

import gc
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import NAMES, short_streams, toy_config, toy_training
from lavit.config import InputError, TrainConfig
from lavit.data.corpus import load_corpus
from lavit.data.features import Pictures, compute_features, tokenize_features
from lavit.data.sources import Record
from lavit.data.stream import Stream, StreamedPictures
from lavit.train.batches import Shard
from lavit.train.encoded import Encoded, feature_feed, pixel_feed
from lavit.train.loop import Report
from lavit.train.run import Run, open_run, train_stages
from test_streaming import EACH, SHARDS, nothing_is_held_out, shards  # noqa: F401 (fixtures)

PICTURES = SHARDS * EACH


def streaming(steps: int = 6) -> TrainConfig:
    """Every stage on a stream."""
    training = toy_training(steps)
    stages = ("tokenizer", "language", "pixels")
    return replace(
        training, **{stage: replace(getattr(training, stage), stream=True) for stage in stages}
    )


def losses(run: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["stage"], line["step"], line["loss"], line["gradient_norm"]) for line in lines]


def test_a_killed_run_on_streams_is_an_uninterrupted_one(
    shards: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed once in each stage, at a step that has no checkpoint; in parts, which share a step."""
    short_streams(monkeypatch)
    killed: set[str] = set()

    def kill(report: Report) -> None:
        if report.step == 6 and report.stage not in killed:
            killed.add(report.stage)
            raise KeyboardInterrupt

    training = streaming()
    training = replace(training, pixels=replace(training.pixels, accumulate=2, code_noise=0.5))
    training = replace(training, tokenizer=replace(training.tokenizer, accumulate=2))
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            train_stages(open_run(tmp_path / "run", shards, toy_config(), training, watch=kill))
    train_stages(open_run(tmp_path / "run", shards, toy_config(), training))
    train_stages(open_run(tmp_path / "whole", shards, toy_config(), training))
    assert killed == {"tokenizer", "language", "pixels"}
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    for part in ("visual_tokenizer", "language", "reader"):
        one, other = (
            (tmp_path / run / part / "model.safetensors").read_bytes() for run in ("run", "whole")
        )
        assert one == other, part
    assert not list((tmp_path / "run" / "cache").glob("features*"))


@pytest.fixture
def run(toy_run: Path, toy_data: Path, tmp_path: Path) -> Run:
    """A run on the folder of toy pictures, whose stage 1 is that of the toy run."""
    for part in ("vision", "visual_tokenizer"):
        shutil.copytree(toy_run / part, tmp_path / "run" / part)
    for name in ("config.json", "training.json"):
        shutil.copy(toy_run / name, tmp_path / "run" / name)
    return open_run(tmp_path / "run", toy_data, toy_config(), streaming())


def test_a_stream_gives_the_features_codes_and_pictures_of_the_cache(
    run: Run, toy_data: Path, tmp_path: Path
) -> None:
    """An epoch of eight pictures, bit by bit, whatever the order."""
    encoded = Encoded(run)
    records = [picture.record for picture in load_corpus(toy_data).pictures]
    features = compute_features(records, encoded.vision, tmp_path)
    everything = torch.arange(len(NAMES))
    wanted = features.rows(everything)
    shown = Pictures([record.open for record in records], run.config.pixels.size).rows(everything)
    codes = tokenize_features(encoded.tokenizer, features).split()
    found = feature_feed(run, encoded).batch(0, Shard()).patches.float()
    order = [next(n for n in range(8) if row.equal(wanted[n])) for row in found]
    assert sorted(order) == everything.tolist()
    batch = pixel_feed(run, encoded).batch(0, Shard())
    order = [next(n for n in range(8) if row.equal(shown[n])) for row in batch.pictures]
    assert sorted(order) == everything.tolist()
    assert all(a.equal(codes[n]) for a, n in zip(batch.codes, order, strict=True))


def test_parts_of_a_step_are_the_step(run: Run) -> None:
    encoded = Encoded(run)
    whole, parts = (feature_feed(run, encoded) for _ in range(2))
    for step in range(3):
        expected = whole.batch(step, Shard())
        found = [parts.batch(step, Shard().part(number, 4)) for number in range(4)]
        assert torch.cat([part.patches for part in found]).equal(expected.patches)
        assert torch.cat([part.places for part in found]).equal(expected.places)
    with pytest.raises(InputError, match="8 pictures cannot be shared by 3 ranks"):
        parts.batch(4, Shard(0, 3))


def test_a_stage_goes_on_as_it_began(run: Run) -> None:
    streamed, state = feature_feed(run, Encoded(run)), {}
    state = streamed.state()
    run.training = toy_training()
    with pytest.raises(InputError, match="on a stream: go on with --stream"):
        feature_feed(run, Encoded(run)).load_state(state)
    with pytest.raises(InputError, match="without a stream: leave --stream out"):
        streamed.load_state({})


def grey(image: Image.Image) -> int:
    return image.getpixel((0, 0))[0] // 5


def greys(images: list[Image.Image]) -> list[int]:
    return [grey(image) for image in images]


def test_epochs_come_in_other_orders_and_hold_each_picture_once(
    shards: Path,  # noqa: F811
) -> None:
    pictures = StreamedPictures(str(shards), greys, count=PICTURES)
    epochs = [pictures.ahead.take() for _ in range(3)]
    assert all(sorted(epoch) == list(range(PICTURES)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3 and sorted(epochs[0]) not in epochs
    shards_of = [tuple(number // EACH for number in epoch) for epoch in epochs]
    assert all(len(set(epoch[:EACH])) > 1 for epoch in shards_of)
    other = StreamedPictures(str(shards), greys, count=PICTURES, seed=1)
    assert other.read() != epochs[0]


def test_processes_share_a_folder_of_pictures(tmp_path: Path) -> None:
    """One shard for `datasets`; its files are passed over unread."""
    for number in range(9):
        Image.new("RGB", (4, 4), (5 * number,) * 3).save(tmp_path / f"{number}.png")
    seen = []
    for rank in range(2):
        found = StreamedPictures(str(tmp_path), greys, count=4, rank=rank, ranks=2)
        seen.append(found.read())
    assert not set(seen[0]) & set(seen[1]) and len({*seen[0], *seen[1]}) == 8


def table(path: Path, count: int, broken: tuple[int, ...] = ()) -> Path:
    """A parquet file of pictures and nothing else; broken ones are cut off."""
    import datasets

    rows = []
    for number in range(count):
        image = Image.new("RGB", (4, 4), (5 * (number % 50),) * 3)
        image.save(path.with_suffix(".png"))
        data = path.with_suffix(".png").read_bytes()
        rows.append({"bytes": data[: 30 if number in broken else None], "path": None})
    kinds = datasets.Features(image=datasets.Image(decode=False))
    datasets.Dataset.from_dict({"image": rows}, features=kinds).to_parquet(str(path))
    return path


def test_broken_pictures_are_named_once_however_often_they_come(tmp_path: Path) -> None:
    pictures = StreamedPictures(
        str(table(tmp_path / "a.parquet", 8, broken=(2, 5))), greys, count=6
    )
    counts = Counter(number for _ in range(4) for number in pictures.read())
    assert counts == dict.fromkeys((0, 1, 3, 4, 6, 7), 4)
    left_out = pictures.streams.left_out
    assert sorted(name[-12:] for name in left_out) == ["[streamed 3]", "[streamed 6]"]
    assert left_out.count == 2
    nothing = StreamedPictures(str(table(tmp_path / "b.parquet", 3, (0, 1, 2))), greys, count=1)
    with pytest.raises(InputError, match=r"512 records in a row give nothing to train on: .*dam"):
        nothing.ahead.take()


def test_sources_without_pictures_are_no_part_of_it(
    shards: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    (tmp_path / "prose.jsonl").write_text('{"text": "only words"}\n')
    both = StreamedPictures(f"{shards},{tmp_path / 'prose.jsonl'}:3", greys, count=8)
    assert len(both.read()) == 8
    with pytest.raises(InputError, match="texts alone: add a source of pictures"):
        StreamedPictures(str(tmp_path / "prose.jsonl"), greys, count=8)


def living_records() -> int:
    return sum(type(one) is Record for one in gc.get_objects())


def test_as_many_records_live_whatever_the_size_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lavit.data.stream.BUFFER", 32)
    before, most = living_records(), []
    for count in (80, 400):
        pictures = StreamedPictures(
            str(table(tmp_path / f"{count}.parquet", count)), greys, count=8
        )
        alive = []
        for batch in range(count // 8):
            pictures.ahead.take()
            if batch % 9 == 0:  # looking at all objects takes a while
                alive.append(living_records() - before)
        most.append(max(alive))
    assert most[0] <= 64 and most[1] <= 64


def test_a_buffer_is_read_again_from_where_it_began(
    shards: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Buffers smaller than an epoch, and places inside them."""
    monkeypatch.setattr("lavit.data.stream.BUFFER", 10)
    for place in range(0, PICTURES + 12, 3):
        first, second = (Stream(str(shards), seed=3) for _ in range(2))
        for _ in range(place):
            first.take()
        second.load_state(json.loads(json.dumps(first.state())))
        following = [[one.take().texts for _ in range(20)] for one in (first, second)]
        assert following[0] == following[1]

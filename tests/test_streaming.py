"""Streams: processes read disjoint records that make the stream; a resumed run reads the same."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import short_streams, toy_config, toy_picture, toy_training
from lavit.config import InputError, Mixture, write_config
from lavit.data.bulk import CorpusJob, corpus_codes, tokenize_corpus, tokenizer_hash
from lavit.data.corpus import Corpus, Picture, load_corpus
from lavit.data.sources import Record
from lavit.data.stream import Stream
from lavit.data.stream_documents import StreamingDocuments
from lavit.model import LaVIT
from lavit.sequence import Batch, VisualTokens, unpack
from lavit.train.language import train_text_tokenizer
from lavit.train.loop import Report
from lavit.train.run import open_run, train_stages
from lavit.vocabulary import Vocabulary

SHARDS, EACH = 4, 8


@pytest.fixture(autouse=True)
def nothing_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every record is served, so that counts say what is missing."""
    monkeypatch.setattr("lavit.data.held_out.SHARE", 0.0)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """WebDataset shards of pictures whose grey says which record they are."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for number in range(shard * EACH, (shard + 1) * EACH):
                stream = io.BytesIO()
                Image.new("RGB", (4, 4), (5 * number,) * 3).save(stream, "PNG")
                for suffix, data in (
                    ("png", stream.getvalue()),
                    ("txt", f"grey {number}".encode()),
                ):
                    entry = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return folder


def encode(images: list[Image.Image]) -> tuple[torch.Tensor, VisualTokens]:
    """Features that say which picture it is, and two or three codes."""
    numbers = torch.tensor([image.getpixel((0, 0))[0] // 5 for image in images])
    patches = numbers[:, None, None].float().expand(-1, 4, 8).clone()
    keep = torch.tensor([[True, True, bool(n % 2), False] for n in numbers.tolist()])
    codes = torch.cat(
        [torch.full((int(k.sum()),), int(n) % 32) for n, k in zip(numbers, keep, strict=True)]
    )
    return patches, VisualTokens(codes, keep.sum(1), keep)


def documents_of(data: str, rank: int = 0, ranks: int = 1, **changes) -> StreamingDocuments:
    text = train_text_tokenizer(
        Corpus((Picture(Record("a", (), "a"), ("grey 0123456789",), ("grey",)),)), 300
    )
    vocabulary = Vocabulary(text_size=len(text), codes=32, end=text.eos_token_id)
    config = replace(
        toy_training().language,
        **{"rows": 2, "tokens": 48, "unconditional_fraction": 0.0, **changes},
    )
    make = {"text": text, "vocabulary": vocabulary, "config": config, "seed": 0, "sizes": (4, 8)}
    return StreamingDocuments(data, encode, rank=rank, ranks=ranks, **make)


def records(documents: StreamingDocuments, batch: Batch) -> list[int]:
    """Which records the documents of a batch are of, by their codes."""
    vocabulary = documents.vocabulary
    found = []
    for row in unpack(batch, vocabulary):
        for sequence in row:
            ids = torch.tensor(sequence.ids)
            found.append(int(vocabulary.codes_of(ids[vocabulary.is_code(ids)])[0]))
    return found


def test_two_processes_read_disjoint_records_whose_union_is_the_stream(shards: Path) -> None:
    seen = []
    for rank in range(2):
        stream = Stream(str(shards), rank=rank, ranks=2)
        seen.append([stream.take().texts[0] for _ in range(SHARDS * EACH // 2)])
    assert not set(seen[0]) & set(seen[1])
    assert sorted(seen[0] + seen[1]) == sorted(f"grey {number}" for number in range(SHARDS * EACH))


def test_a_stream_asks_as_a_data_set_does(tmp_path: Path) -> None:
    """By the column `prompts`; without it, by captions that end with no full stop."""
    import datasets

    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (9, 9, 9)).save(stream, "PNG")
    picture = {"bytes": stream.getvalue(), "path": None}
    asked = []
    for column in ({"prompts": [["grey 1"]]}, {}):
        rows = {"image": [picture], "text": ["grey 0."], **column}
        table = datasets.Dataset.from_dict(rows)
        table = table.cast_column("image", datasets.Image(decode=False))
        place = tmp_path / f"{len(column)}.parquet"
        table.to_parquet(str(place))
        documents = documents_of(str(place), mixture=Mixture(writing=1.0))
        first = unpack(documents.batch(0), documents.vocabulary)[0][0]
        words = [id for id in first.ids if id < documents.vocabulary.image_start]
        asked.append(documents.tokenizer.decode(words))
    assert "grey 1" in asked[0] and "grey 0" in asked[1]
    assert "." not in asked[1]


def test_a_stream_begins_again_and_can_be_taken_up_anywhere(shards: Path) -> None:
    stream = Stream(str(shards))
    texts = [stream.take().texts[0] for _ in range(2 * SHARDS * EACH)]
    assert Counter(texts) == {f"grey {number}": 2 for number in range(SHARDS * EACH)}
    for place in (0, 5, SHARDS * EACH, SHARDS * EACH + 11):
        first, second = Stream(str(shards)), Stream(str(shards))
        for _ in range(place):
            first.take()
        second.load_state(json.loads(json.dumps(first.state())))
        following = [second.take().texts[0] for _ in range(SHARDS * EACH)]
        assert following == [first.take().texts[0] for _ in range(SHARDS * EACH)]
        assert following[: len(texts) - place] == texts[place : place + SHARDS * EACH]


def test_a_stream_stopped_twice_within_a_buffer_serves_each_record_once(
    shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its second buffer, whose place must outlive the first of both restarts."""
    monkeypatch.setattr("lavit.data.stream.BUFFER", 12)
    total, stream, served = SHARDS * EACH, Stream(str(shards)), []
    for count in (14, 0, 1, 1, total - 16):
        served += [stream.take().texts[0] for _ in range(count)]
        place = json.loads(json.dumps(stream.state()))
        stream = Stream(str(shards))
        stream.load_state(place)
    assert Counter(served) == {f"grey {number}": 1 for number in range(total)}


def test_a_stream_whose_shards_have_changed_says_so(
    shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stream = Stream(str(shards))
    stream.take()
    place = stream.state()
    Stream(str(shards)).load_state(place)
    assert not caplog.messages
    shutil.copy(shards / "000.tar", shards / "more.tar")
    Stream(str(shards)).load_state(place)
    assert "has 5 shards, and had 4 when its place was saved" in caplog.messages[-1]


def test_a_table_without_rows_among_others_is_none(tmp_path: Path) -> None:
    import datasets
    import pyarrow.parquet as pq

    rows = datasets.Dataset.from_dict({"text": [f"grey {number}" for number in range(200)]})
    rows.to_parquet(str(tmp_path / "a.parquet"))
    pq.write_table(pq.read_table(tmp_path / "a.parquet").slice(0, 0), tmp_path / "b.parquet")
    stream = Stream(str(tmp_path))
    assert len({stream.take().texts[0] for _ in range(200)}) == 200
    assert stream.epoch == 0


def test_of_a_table_a_few_rows_are_in_memory_whatever_its_row_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a stream stopped within the group goes on with the same rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr("lavit.data.stream.BUFFER", 16)
    rng, count = np.random.default_rng(0), 768
    table = pa.table({"text": [f"{number} {rng.bytes(8000).hex()}" for number in range(count)]})
    path = tmp_path / "one.parquet"
    pq.write_table(table, path, row_group_size=count, write_batch_size=16)  # at most in a page
    assert pq.ParquetFile(path).num_row_groups == 1  # of 12 MB
    stream = Stream(str(path))
    before, peak = pa.total_allocated_bytes(), 0
    tracemalloc.start()  # of what is read from files, which is no memory of pyarrow's
    first = []
    for _ in range(150):
        first.append(stream.take().texts[0][:9])
        peak = max(peak, pa.total_allocated_bytes() - before + tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert peak < 6 * 2**20, f"{peak / 2**20:.0f} MB"
    resumed = Stream(str(path))
    resumed.load_state(json.loads(json.dumps(stream.state())))
    rest = [resumed.take().texts[0][:9] for _ in range(count - 150)]
    assert rest[:50] == [stream.take().texts[0][:9] for _ in range(50)]
    assert len({*first, *rest}) == count


def test_fewer_shards_than_processes_are_refused(shards: Path) -> None:
    with pytest.raises(InputError, match="4 shards for 5 processes"):
        Stream(str(shards), rank=0, ranks=5)
    with pytest.raises(InputError, match="cannot be shared evenly"):
        documents_of(str(shards), ranks=2, rows=3)


@pytest.mark.usefixtures("whole_windows")
def test_no_record_is_lost_or_told_twice(shards: Path) -> None:
    documents = documents_of(str(shards))
    batches = [documents.batch(step) for step in range(64)]
    counts = Counter(number for batch in batches for number in records(documents, batch))
    assert max(counts.values()) - min(counts.values()) <= 2  # the last window stops somewhere
    assert set(counts) == set(range(32))
    assert sum(batch.useful for batch in batches) / len(batches) > 0.95


def test_pictures_that_are_read_bring_their_own_features(shards: Path) -> None:
    documents = documents_of(str(shards), mixture=Mixture(reading=1.0))
    batch = documents.batch(0)
    patches, keep = documents.pictures(batch.images)
    assert len(patches) == len(batch.images) == len(keep) > 0
    assert int(keep.sum()) == int(batch.slots.sum())
    numbers = [int(picture[0, 0]) % 32 for picture in patches]
    assert numbers == records(documents, batch)


@pytest.mark.parametrize("stop", [1, 3, 4, 6, 13])
def test_a_resumed_stream_gives_the_batches_of_an_uninterrupted_one(
    stop: int, shards: Path
) -> None:
    """Four steps are a window."""
    whole, killed = documents_of(str(shards)), documents_of(str(shards))
    expected = [whole.batch(step) for step in range(stop + 10)]
    for step in range(stop):
        killed.batch(step)
    resumed = documents_of(str(shards))
    resumed.load_state(killed.state())
    for step in range(stop, stop + 10):
        batch = resumed.batch(step)
        assert batch.ids.equal(expected[step].ids) and batch.images.equal(expected[step].images)
    with pytest.raises(InputError, match="with 1 processes"):
        documents_of(str(shards), rank=1, ranks=2).load_state(killed.state())


def test_texts_and_pictures_mix_by_weight(shards: Path, tmp_path: Path) -> None:
    path = tmp_path / "prose.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"only words, number {n}"}) + "\n" for n in range(50))
    )
    documents = documents_of(f"{shards},{path}:1")
    kinds: Counter[bool] = Counter()
    for step in range(20):
        for row in unpack(documents.batch(step), documents.vocabulary):
            kinds.update(max(sequence.ids) >= documents.vocabulary.text_size for sequence in row)
    assert 0.3 < kinds[True] / kinds.total() < 0.7


def test_a_broken_picture_of_a_stream_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as tar:
        for number in range(6):
            stream = io.BytesIO()
            Image.new("RGB", (4, 4), (5 * number,) * 3).save(stream, "PNG")
            data = stream.getvalue()[: 30 if number == 3 else None]
            for suffix, part in (("png", data), ("txt", f"grey {number}".encode())):
                entry = tarfile.TarInfo(f"{number:04d}.{suffix}")
                entry.size = len(part)
                tar.addfile(entry, io.BytesIO(part))
    documents = documents_of(str(tmp_path / "shards"))
    assert 3 not in records(documents, documents.batch(0))
    assert len(documents.left_out) == 1 and "0003" in next(iter(documents.left_out))


def test_what_a_table_streams_is_named_one_by_one(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Broken pictures, and documents longer than a row; a resumed stream gives the same names."""
    import datasets

    rows: dict[str, list] = {"image": [], "text": []}
    for number in range(8):
        stream = io.BytesIO()
        Image.new("RGB", (4, 4), (5 * number,) * 3).save(stream, "PNG")
        data = stream.getvalue()[: 30 if number in (2, 5) else None]
        rows["image"].append({"bytes": data, "path": None})
        rows["text"].append(f"grey {number} " * (40 if number == 6 else 1))
    kinds = {"image": datasets.Image(decode=False), "text": datasets.Value("string")}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    table.to_parquet(str(tmp_path / "a.parquet"))
    documents = documents_of(str(tmp_path / "a.parquet"))
    assert not {2, 5, 6} & set(records(documents, documents.batch(0)))
    names = [f"[streamed {place}]" for place in (3, 6, 7)]
    resumed = documents_of(str(tmp_path / "a.parquet"))
    resumed.load_state(documents.state())
    for found in (documents, resumed):
        assert sorted(name[-12:] for name in found.left_out) == names
    reasons = dict(sorted(documents.left_out.items())).values()
    assert ["damaged" in reason for reason in reasons] == [True, True, False]
    left = [said for said in caplog.messages if said.startswith("left out")]
    assert len(left) == 6 and "(3 so far)" in left[-1]
    kinds = "a stream gives no documents of the kinds question, edit, text"
    assert caplog.messages.count(kinds) == 2  # once for each


def stage_two(toy_run: Path, out: Path, data: str, *, watch=None, **changes) -> list[dict]:
    """Stage 2 anew on another feed, with the tokenizer of the toy run; returns its metrics."""
    model = replace(toy_config(), vision=LaVIT.from_pretrained(toy_run).config.vision)
    if not out.exists():
        for part in ("vision", "visual_tokenizer"):
            shutil.copytree(toy_run / part, out / part)
        write_config(out, model)
    training = replace(toy_training(8), checkpoint_every=4, log_every=1)
    training = replace(training, language=replace(training.language, **changes))
    train_stages(open_run(out, data, model, training, watch=watch), ("language",))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_stage_two_on_a_stream_resumes_to_the_same_losses(
    shards: Path, toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_streams(monkeypatch)

    def kill(report: Report) -> None:
        if report.step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage_two(toy_run, tmp_path / "killed", str(shards), stream=True, watch=kill)
    killed = stage_two(toy_run, tmp_path / "killed", str(shards), stream=True)
    whole = stage_two(toy_run, tmp_path / "whole", str(shards), stream=True)
    assert [line["loss"] for line in killed] == [line["loss"] for line in whole] and len(whole) == 8
    assert (
        whole[-1]["loss"] < whole[0]["loss"]
        and whole[-1]["text_loss"] > 0
        and whole[-1]["code_loss"] > 0
    )


def test_stage_two_on_tokens_made_beforehand(toy_data: Path, toy_run: Path, tmp_path: Path) -> None:
    tokenize_corpus(CorpusJob(data=toy_data, out=tmp_path / "tokens", model=toy_run), workers=0)
    lines = stage_two(
        toy_run, tmp_path / "run", str(toy_data), token_corpus=str(tmp_path / "tokens")
    )
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["code_loss"] > 0
    corpus = load_corpus(toy_data)
    hashed = tokenizer_hash(LaVIT.from_pretrained(toy_run))
    codes = corpus_codes(tmp_path / "tokens", corpus, tokenizer=hashed)
    model = LaVIT.from_pretrained(toy_run)
    alone = (model.encode_images([picture.record.open()]).codes for picture in corpus.pictures)
    assert codes == tuple(tuple(found.tolist()) for found in alone)
    with pytest.raises(InputError, match="of tokenizer"):
        corpus_codes(tmp_path / "tokens", corpus, tokenizer="0" * 64)
    (tmp_path / "prose.jsonl").write_text(json.dumps({"text": "only words"}))
    mixed = load_corpus(f"{toy_data},{tmp_path / 'prose.jsonl'}:0.5")
    assert corpus_codes(tmp_path / "tokens", mixed, tokenizer=hashed) == codes
    with pytest.raises(InputError, match="the codes of one source of pictures, and there are 2"):
        corpus_codes(tmp_path / "tokens", load_corpus(f"{toy_data},{toy_data}:2"), tokenizer=hashed)
    toy_picture("red dot").save(tmp_path / "other.png")
    more = replace(
        corpus, pictures=(*corpus.pictures, Picture(Record("", (), "other.png"), (), ()))
    )
    with pytest.raises(InputError, match=r"no tokens of 1 of 9 pictures.*other\.png"):
        corpus_codes(tmp_path / "tokens", more, tokenizer=hashed)

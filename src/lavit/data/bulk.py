"""A whole data set as visual tokens on disk: parquet shards written by Ray Data workers.

    DIR/manifest.json         what was tokenised, by which tokenizer (a hash), counts, broken ones
    DIR/shard-00000.parquet   a row a picture: index, name, codes, keep, length

Every picture is encoded alone, as `lavit tokenize` does, so the tokens are the same to the last
code; a worker runs on one thread. A shard appears under its name when it is complete, so a killed
run goes on with the shards that are missing; another tokenizer, data set or policy in the same
folder is refused. Broken pictures are left out, counted and named.

`corpus_codes` gives such codes to a training of stage 2 on data too large to encode there. Codes
are all that writing needs; reading needs features, which are not kept, so such a training has
[text, image], edits and text alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from lavit.config import TO_SEE, InputError, read_json, require, to_json, write_json, write_whole
from lavit.data.corpus import Broken, Corpus
from lavit.data.sources import Records, below, load_records
from lavit.files import alone, sha256
from lavit.model import LaVIT
from lavit.sequence import VisualTokens
from lavit.storage import model_folder
from lavit.vision.encoder import product_type
from lavit.visual_tokenizer.selector import KeepPolicy

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
KEY = b"lavit"  # of our JSON in a shard's schema


@dataclass(frozen=True)
class TokenCorpus:
    """Tokens read back: row r is record `records[r]` of the source, which `names[r]` names."""

    tokens: VisualTokens
    names: tuple[str, ...]
    records: Int[Tensor, "rows"]

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, kw_only=True)
class CorpusJob:
    """What is tokenised, by which model, into which folder; plain data, sent to the workers."""

    data: str | Path  # any source of data/sources.py
    out: str | Path
    model: str | Path  # what `LaVIT.from_pretrained` opens
    split: str = "train"
    keep: str = "auto"
    seed: int = 0  # of policies that draw
    shard_size: int = 256  # records
    device: str = "cpu"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise InputError(f"shard_size must be at least 1, not {self.shard_size}")
        KeepPolicy.parse(self.keep)

    def absolute(self) -> CorpusJob:
        """The same with absolute paths: workers stand in folders of their own."""
        data = Path(self.data).resolve() if Path(self.data).exists() else self.data
        out, model = Path(self.out).resolve(), model_folder(self.model, parts=TO_SEE).resolve()
        return replace(self, data=str(data), out=str(out), model=str(model))

    def records(self, shard: int, count: int) -> range:
        """Numbers of a shard's records, of `count` in all."""
        return range(shard * self.shard_size, min(count, (shard + 1) * self.shard_size))


def tokenizer_hash(model: LaVIT, device: torch.device | str = "cpu") -> str:
    """SHA-256 of what decides over tokens: weights and sizes of tokenizer and encoder (one that is
    only referenced enters by its configuration), number type of its products on a device.
    """
    folder, config = model.folder, model.config
    if folder is None:
        lacks = "this model lies in no folder"
        raise InputError(f"{lacks}: save it before a corpus is tokenised with it")
    weights = [folder / "visual_tokenizer" / "model.safetensors"]
    if not weights[0].is_file():
        lacks = f"{folder} holds no trained tokenizer"
        raise InputError(f"{lacks}: lavit train tokenizer --out {folder}")
    if config.vision.source == "folder":
        weights += sorted((folder / "vision").glob("*.safetensors"))
    numbers = str(product_type(torch.device(device)))
    said = [to_json(config.vision), to_json(config.visual_tokenizer), numbers]
    said += map(sha256, weights)
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def tokenize_corpus(
    job: CorpusJob,
    *,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Tokenise a split of a source; returns the manifest. The same job goes on when interrupted.

    `workers` are processes of Ray Data; 0 works in this one, without Ray. `progress` is called with
    (records done, of all). Raises `InputError` for a source that cannot be opened, a folder that
    holds tokens of another tokenizer or job, and where every picture is broken.
    """
    if workers < 0:
        raise InputError(f"workers must be at least 0, not {workers}")
    require("pyarrow", extra="ray")
    job = job.absolute()
    with alone(Path(job.out)):
        return _tokenized(job, workers, progress)


def _tokenized(
    job: CorpusJob, workers: int, progress: Callable[[int, int], None] | None
) -> dict[str, Any]:
    records = load_records(job.data, job.split)
    settings = _settle(job, records, LaVIT.from_pretrained(job.model, parts=()))
    missing = [n for n in range(settings["shards"]) if not _shard(job.out, n).exists()]
    done = len(records) - sum(len(job.records(shard, len(records))) for shard in missing)
    for shard in _on_ray(job, missing, workers) if workers else map(ShardWriter(job), missing):
        done += len(job.records(shard, len(records)))
        if progress:
            progress(done, len(records))
    return _finish(Path(job.out), settings)


class ShardWriter:
    """One worker: holds encoder and tokenizer, turns numbers of shards into files."""

    def __init__(self, job: CorpusJob) -> None:
        self.job = job
        self.records = load_records(job.data, job.split)
        where = {"device": job.device, "dtype": getattr(torch, job.dtype)}
        self.model = LaVIT.from_pretrained(job.model, **where, parts=TO_SEE)
        self.policy, self.tokenizer = (
            KeepPolicy.parse(job.keep),
            tokenizer_hash(self.model, job.device),
        )

    def __call__(self, shard: int) -> int:
        """Write a shard, atomically; returns its number."""
        job = self.job
        rows: list[dict[str, Any]] = []
        broken: Broken = []
        for index in job.records(shard, len(self.records)):
            record = self.records[index]
            name = below(record.name, job.data)
            try:
                image = record.open()
            except InputError as error:
                broken.append((name, str(error)))
                continue
            generator = torch.Generator().manual_seed(job.seed)
            tokens = self.model.encode_images([image], self.policy, generator=generator)
            codes, keep = tokens.codes.tolist(), tokens.keep[0].tolist()
            row = {"record": index, "name": name, "codes": codes, "keep": keep}
            rows.append({**row, "length": int(tokens.lengths[0])})
        _write(_shard(job.out, shard), rows, broken, tokenizer=self.tokenizer)
        return shard


def load_tokens(folder: str | Path, *, tokenizer: str | None = None) -> TokenCorpus:
    """Read what `tokenize_corpus` wrote, in the order of the source.

    Give the `tokenizer_hash` of the model that is to be trained on them, to be sure that they are
    its own. An unfinished folder, a missing or damaged shard and tokens of another tokenizer raise
    `InputError`.
    """
    folder = Path(folder)
    manifest = read_json(folder / MANIFEST)
    kinds = {"complete": bool, "tokenizer": str, "shards": int, "patches": int}
    for name, kind in kinds.items():
        if type(found := manifest.get(name)) is not kind or (type(found) is int and found < 1):
            wanted = f"a {kind.__name__}{' above 0' * (kind is int)}"
            said = f"{folder / MANIFEST}: {name} is {found!r}, expected {wanted}"
            raise InputError(f"{said}; tokenise again")
    if not manifest["complete"]:
        raise InputError(f"{folder} is not finished: run the same lavit tokenize-corpus again")
    if tokenizer is not None and tokenizer != manifest["tokenizer"]:
        raise InputError(
            f"{folder} holds tokens of tokenizer {manifest['tokenizer'][:12]}, "
            f"not of this model's {tokenizer[:12]}: tokenise the corpus with this model"
        )
    shards = [_shard(folder, number) for number in range(manifest["shards"])]
    tables = [_read(shard, manifest["tokenizer"])[0] for shard in shards]
    table = require("pyarrow", extra="ray").concat_tables(tables).combine_chunks()
    if len(table) == 0:
        raise InputError(f"{folder} holds no tokens: every picture was broken")
    masks = table["keep"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    keep = torch.from_numpy(masks.copy())
    codes = torch.from_numpy(table["codes"].combine_chunks().flatten().to_numpy().astype(np.int64))
    lengths = torch.from_numpy(table["length"].to_numpy().astype(np.int64))
    agree = len(keep) == len(table) * manifest["patches"] and len(codes) == int(lengths.sum())
    if not agree or not torch.equal(keep.view(len(table), -1).sum(1), lengths):
        lacks = f"{folder}: codes, masks and lengths do not agree"
        raise InputError(f"{lacks}; delete the folder and tokenise again")
    tokens = VisualTokens(codes, lengths, keep.view(len(table), -1))
    records = torch.from_numpy(table["record"].to_numpy().copy())
    return TokenCorpus(tokens, tuple(table["name"].to_pylist()), records)


def corpus_codes(
    folder: str | Path, corpus: Corpus, *, tokenizer: str
) -> tuple[tuple[int, ...], ...]:
    """Codes of every picture of a corpus, in its order, from tokens of its source of pictures.

    `tokenizer` is the `tokenizer_hash` of the run. Tokens of another tokenizer, pictures that have
    none, and several sources of pictures, whose names may be the same, raise `InputError`.
    """
    sources = [part.name for part in corpus.parts if len(part.pictures)]
    if len(sources) > 1:
        said = f"{folder} holds the codes of one source of pictures, and there are {len(sources)}"
        raise InputError(f"{said}: give one of {', '.join(sources)}, and sources of text")
    data = sources[0]
    found = load_tokens(folder, tokenizer=tokenizer)
    codes = dict(zip(found.names, found.tokens.split(), strict=True))
    names = [below(picture.record.name, data) for picture in corpus.pictures]
    missing = [name for name in names if name not in codes]
    if missing:
        lacks = f"no tokens of {len(missing)} of {len(names)} pictures of {data} ({missing[0]})"
        cure = f"tokenise that source, lavit tokenize-corpus {data} --out {folder}"
        raise InputError(f"{folder} has {lacks}: {cure}")
    return tuple(tuple(codes[name].tolist()) for name in names)


def _settle(job: CorpusJob, records: Records, lavit: LaVIT) -> dict[str, Any]:
    """Write what this folder is to hold, or check that it holds the like."""
    path = Path(job.out) / MANIFEST
    edges = sorted({*range(0, len(records), job.shard_size), len(records) - 1})
    names = json.dumps([below(records[index].name, job.data) for index in edges])
    settings = {
        "tokenizer": tokenizer_hash(lavit, job.device),
        "dtype": job.dtype,
        "keep": job.keep,
        "seed": job.seed,
        "split": job.split,
        "records": len(records),
        "order": hashlib.sha256(names.encode()).hexdigest()[:16],
        "shard_size": job.shard_size,
        "shards": math.ceil(len(records) / job.shard_size),
        "patches": lavit.config.visual_tokenizer.patches,
        "codes": lavit.config.visual_tokenizer.codes,
    }
    if path.exists():
        found = read_json(path)
        others = [name for name, value in settings.items() if found.get(name) != value]
        if others:
            made = f"{job.out} holds tokens made with another {', '.join(others)}"
            raise InputError(f"{made}: give another --out, or delete it")
        return settings
    write_json(path, {**settings, "complete": False})
    return settings


def _finish(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Count what the shards say of themselves and close the manifest."""
    shards = [_shard(folder, number) for number in range(settings["shards"])]
    said = [_read(shard, settings["tokenizer"], columns=[])[1] for shard in shards]
    broken = [line for one in said for line in one["broken"]]
    manifest = {
        **settings,
        "complete": True,
        "pictures": sum(one["rows"] for one in said),
        "tokens": sum(one["tokens"] for one in said),
        "broken": [{"name": name, "reason": reason} for name, reason in broken],
    }
    write_json(folder / MANIFEST, manifest)
    for name, reason in broken:
        log.warning("left out %s: %s", name, reason)
    if not manifest["pictures"]:
        none = f"none of the {settings['records']} pictures can be read"
        raise InputError(f"{none}: lavit data check says why")
    return manifest


def _on_ray(job: CorpusJob, shards: Sequence[int], workers: int) -> Iterator[int]:
    """Numbers of shards as they are finished. A Ray that runs already is used and left running."""
    if not shards:
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray starts: no telemetry,
    os.environ.setdefault("RAY_worker_niceness", "0")  # and workers as important as this process
    ray = require("ray", extra="ray")
    from ray.data import ActorPoolStrategy, DataContext, from_items

    gpus = torch.cuda.device_count() if job.device.startswith("cuda") else 0
    workers = min(workers, len(shards))
    mine = not ray.is_initialized()
    if mine:
        logging.getLogger("ray").setLevel(logging.ERROR)
        quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
        ray.init(num_cpus=workers + 1, num_gpus=gpus, **quiet)
    context = DataContext.get_current()
    before = context.enable_progress_bars
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():  # of `max_restarts`, which has no other name yet
            warnings.simplefilter("ignore", DeprecationWarning)
            # half a slot each: actors that hold every slot leave none for the tasks that feed them,
            # and all wait for ever; no restarts: a worker that dies (of memory) would be started
            # for ever, where the same call can go on
            waiting = from_items([{"shard": n} for n in shards], override_num_blocks=len(shards))
            finished = waiting.map(
                _RayWorker,
                fn_constructor_kwargs={"job": job},
                compute=ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
                num_cpus=0.5,
                num_gpus=min(1, gpus / workers) if gpus else None,
                max_restarts=0,
            )
        for row in finished.iter_rows():
            yield int(row["shard"])
    except Exception as error:
        raise _cause(error) from None
    finally:
        context.enable_progress_bars = before
        if mine:
            ray.shutdown()


class _RayWorker:
    """A `ShardWriter` as Ray Data wants it: rows in, rows out; on one thread."""

    def __init__(self, job: CorpusJob) -> None:
        torch.set_num_threads(1)
        self.write = ShardWriter(job)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"shard": self.write(int(row["shard"]))}


def _cause(error: BaseException) -> BaseException:
    """The `InputError` that a worker raised, out of Ray's wrappers; else the error itself."""
    seen: BaseException | None = error
    while seen and not isinstance(seen, InputError):
        seen = getattr(seen, "cause", None) or seen.__cause__
    return InputError(str(seen).strip().splitlines()[-1]) if seen else error


def _shard(folder: str | Path, number: int) -> Path:
    return Path(folder) / f"shard-{number:05d}.parquet"


def _write(path: Path, rows: list[dict[str, Any]], broken: Broken, *, tokenizer: str) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    total = sum(row["length"] for row in rows)
    said = {"tokenizer": tokenizer, "rows": len(rows), "tokens": total, "broken": broken}
    schema = pa.schema(
        {
            "record": pa.int64(),
            "name": pa.string(),
            "codes": pa.list_(pa.int32()),
            "keep": pa.list_(pa.bool_()),
            "length": pa.int32(),
        },
        metadata={KEY: json.dumps(said).encode()},
    )
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(rows, schema=schema), sink)
    write_whole(path, sink.getvalue().to_pybytes())


def _read(path: Path, tokenizer: str, columns: list[str] | None = None) -> tuple[Any, Any]:
    """Table and what the shard says of itself; no `columns` read the footer alone."""
    pa = require("pyarrow", extra="ray")
    from pyarrow import parquet

    again = "run the same lavit tokenize-corpus again"
    try:
        table = parquet.read_table(path, columns=columns)
        said = json.loads(table.schema.metadata[KEY])
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: {again}") from error
    except (pa.ArrowInvalid, OSError, KeyError, TypeError) as error:
        lacks = f"{path} is not a readable shard of tokens ({str(error).splitlines()[0]})"
        raise InputError(f"{lacks}: delete it and {again}") from error
    if said["tokenizer"] != tokenizer:
        other = f"{path} was made by another tokenizer than its folder says"
        raise InputError(f"{other}: delete it and tokenise again")
    return table, said

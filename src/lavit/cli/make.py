"""Verbs that make and measure: data, train, eval, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lavit.cli.output import ProgressBar, Words, answer_with


def train(
    stage: Words[Literal["tokenizer", "language", "pixels", "all"]],
    /,
    data: str,
    out: Path,
    preset: str = "nano",
    minutes: float | None = None,
    seed: int = 0,
) -> None:
    """Train a stage, or all three, of a preset on a data set. The same command goes on after an interruption.

    --minutes scales the steps: about that long on two idle CPU cores.
    """
    from dataclasses import replace

    from lavit.presets import preset as find
    from lavit.presets import scaled
    from lavit.train.run import STAGES, Run

    chosen = find(preset)
    training = replace(chosen.training, seed=seed)
    if minutes is not None:
        training = scaled(training, minutes / chosen.minutes)
    with ProgressBar() as progress:
        run = Run(out, data, chosen.model, training, watch=progress.report, prepare=progress.count)
        run.train(STAGES if stage == "all" else (stage,))
    print(f"trained: {out}")


def evaluate(
    run: Words[Path],
    /,
    data: str | None = None,
    json: bool = False,
    limit: int | None = None,
    study: Literal["steps", "attribution"] | None = None,
) -> None:
    """Measure a trained run: every figure with its count, interval, floor and ceiling.

    --study measures the pixel decoder instead: few steps against many, or what the tokens contribute to a picture.
    """
    from lavit.evaluate.pixels import run_study
    from lavit.evaluate.report import evaluate_run

    with ProgressBar() as progress:
        if study is None:
            figures = evaluate_run(run, data=data, limit=limit, progress=progress.count)
        else:
            figures = run_study(study, run, data=data, limit=limit, progress=progress.count)
    for figure in figures:
        answer_with(json, figure.line(), **figure.to_json())


def data_starter(out: Path, families: int | None = None, tones: tuple[str, ...] | None = None, seed: int = 0) -> None:
    """Build the starter data: emoji of two artists with names, questions and edits."""
    from lavit.data.starter import build_starter

    with ProgressBar() as progress:
        counts = build_starter(
            out,
            families=families,
            tones=tones,
            seed=seed,
            progress=lambda done, of: progress.count("pictures", done, of),
        )
    for name, count in counts.items():
        print(f"{name:>24} {count}")


def data_check(data: Words[str], /, split: str = "train", json: bool = False) -> None:
    """Read a data set and report counts, broken pictures, text lengths and licences."""
    import dataclasses

    from lavit.data.sources import check

    report = dataclasses.asdict(check(data, split))
    text = "\n".join(f"{name:>16} {value}" for name, value in report.items())
    answer_with(json, text, **report)


def demo(run: Words[Path], /, out: Path = Path("demo"), data: str | None = None) -> None:
    """Write OUT/index.html and OUT/sheet.png: what a trained run reads, draws, edits and answers."""
    from lavit.evaluate.demo import write_demo

    with ProgressBar() as progress:
        write_demo(run, out, data=data, progress=progress.count)
    print(f"wrote {out / 'index.html'} and {out / 'sheet.png'}")

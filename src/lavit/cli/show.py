"""Verb that shows a model at work: demo."""

from __future__ import annotations

from pathlib import Path

from lavit.cli.output import DEFAULT_MODEL, ProgressBar, Words


def demo(model: Words[str] = DEFAULT_MODEL, /, out: Path = Path("demo"), seed: int = 0) -> None:
    """Write OUT/index.html and OUT/sheet.png: what a model of scenes reads, answers and draws.

    Things that stand together there never did so in training; --seed shows others. Free
    generation, one sample each. Parts that the model lacks are said to be missing.
    """
    from lavit.evaluate.demo import write_demo

    with ProgressBar() as progress:
        sections = write_demo(model, out, seed=seed, progress=progress.count)
    for section in sections:
        if section.score or section.missing:
            print(f"{section.title}: {section.score or section.missing}")
    print(out / "index.html")
    print(out / "sheet.png")

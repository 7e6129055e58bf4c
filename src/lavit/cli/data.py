"""Verbs that make data sets and look into them: scenes, check."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from lavit.cli.output import ProgressBar, Words, answer_with


def scenes(
    out: Path,
    split: str = "train",
    pictures: int = 20_000,
    held_out_pairs: float = 0.1,
    objects: int = 48,
    seed: int = 0,
    size: int = 160,
    conversations: int = 0,
    free_words: bool = False,
) -> None:
    """Write scenes, described, asked about and edited, as an ordinary data set.

    --objects N takes the first N of the list; --held-out-pairs is the share of pairs of things that
    training never shows together. --conversations N writes N of them, for `lavit train finetune`
    and for presets whose mixture has them. --free-words asks for things in more ways than one, for
    models that begin with a trained language model.
    The same options give the same files, whatever the number of processes.
    """
    from lavit.data.scenes.dataset import write_pool
    from lavit.data.scenes.splits import Rules

    rules = Rules(objects=objects, held_out_pairs=held_out_pairs)
    with ProgressBar() as progress:
        written = write_pool(
            out,
            pictures=pictures,
            conversations=conversations,
            free_words=free_words,
            split=split,
            seed=seed,
            size=size,
            processes=min(4, os.cpu_count() or 1),
            rules=rules,
            progress=partial(progress.count, "pictures"),
        )
    for name, count in written.items():
        print(f"{name:>16} {count}")


def check(
    data: Words[tuple[str, ...]],
    /,
    split: str = "train",
    workers: int = 1,
    json: bool = False,
    images: Path | None = None,
) -> None:
    """Read data and report counts, what is broken, text lengths and licences, source by source.

    Several sources, SOURCE:0.5 for a weight, are reported as the mixture that --data of `lavit
    train` makes of them; a file of conversations is reported as such, and its pictures are below
    --images, or the file's folder. --workers N says whether the shards of a stream suffice for N
    processes.
    """
    from lavit.data.inspect import inspect_data

    for report in inspect_data(",".join(data), split, workers=workers, images=images):
        text = "\n".join(f"{name:>16} {_said(value)}" for name, value in report.items())
        answer_with(json, text, **report)


def _said(value: Any) -> str:
    """A figure, a list or a table of a report, for people."""
    if isinstance(value, dict):
        value = list(value.items())
    if not isinstance(value, list | tuple):
        return str(value)
    items = (": ".join(map(str, one)) if isinstance(one, tuple) else str(one) for one in value)
    return ", ".join(items) or "none"

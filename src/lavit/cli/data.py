"""Verbs that look into data sets: check."""

from __future__ import annotations

from lavit.cli.output import Words, answer_with


def check(data: Words[tuple[str, ...]], /, split: str = "train", workers: int = 1, json: bool = False) -> None:
    """Read data and report counts, what is broken, text lengths and licences, source by source.

    Several sources, SOURCE:0.5 for a weight, are reported as the mixture that --data of `lavit train` makes of them; a file
    of conversations is reported as such. --workers N says whether the shards of a stream suffice for N processes.
    """
    from lavit.data.inspect import inspect_data

    for report in inspect_data(",".join(data), split, workers=workers):
        text = "\n".join(f"{name:>16} {value}" for name, value in report.items())
        answer_with(json, text, **report)

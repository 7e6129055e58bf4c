"""Verb that answers questions about the method: compare."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path

from lavit.cli.output import ProgressBar, Words


def compare(
    study: Words[Path],
    /,
    seeds: int | None = None,
    out: Path = Path("runs/compare"),
    docs: Path = Path("docs"),
    plan: bool = False,
) -> None:
    """Train and measure all arms of a study (recipes/studies/NAME.py) and write what was found.

    --seeds N runs of every arm (default: the study's). --plan times single steps and prints what
    the whole costs, then ends. A stopped comparison goes on with the same command; given in a
    second shell, both share the arms. Tables, plots and data go to --docs, runs to --out, which
    studies share.
    """
    from lavit.evaluate.bench import Bench
    from lavit.evaluate.compare import compare as run
    from lavit.evaluate.pace import paces_of, plan_study
    from lavit.evaluate.results import write_results
    from lavit.evaluate.study import load_study
    from lavit.files import alone

    found = load_study(study)
    count = found.seeds if seeds is None else seeds
    if plan:
        logging.getLogger("lavit").setLevel(logging.WARNING)  # what it times is thrown away
        lines = plan_study(found, count, paces_of(found))
        print(f"{'what':<40}{'runs':>6}{'minutes':>10}{'in all':>10}")
        for line in lines:
            print(f"{line.what:<40}{line.count:>6}{line.minutes:>10.1f}{line.total:>10.0f}")
        print(f"{'hours':<56}{sum(line.total for line in lines) / 60:>10.1f}")
        return
    with ProgressBar() as progress:
        bench = Bench(found, out, watch=progress.report, progress=progress.count)
        values = run(bench, count)
    command = f"lavit compare {shlex.quote(study.as_posix())} --seeds {count}"
    with alone(docs, "results", wait=True):
        print(write_results(found, values, docs, command))

"""`lavit compare`: all arms of a study with several seeds, each part made once.

    OUT/pools/KEY/          scenes
    OUT/texts/KEY.jsonl     texts without pictures
    OUT/caches/KEY/         features and text tokenizer of a pool, for all runs on it
    OUT/tokenizers/KEY-S/   stage 1 of seed S
    OUT/models/KEY-S/       a run folder: that tokenizer, and stages 2 and 3 of an arm
    OUT/rows/KEY-S.json     what an arm was found to be; copied to another OUT, it is not made again
    OUT/locks/              what a process has in hand

A key is a hash of all settings that the part depends on, so arms with equal settings share it, in
other studies too. What is finished is skipped, what was killed goes on from its checkpoint.
Processes on one OUT share the arms: each takes those that no other has in hand.

Budgets are equal in target tokens of stage 2, those that the first arm has in its preset's steps;
arms of fewer target tokens a row have more rows a step, so that all make about as many steps.
Where an arm costs more than 5 % more or fewer FLOPs a token than the first, it is trained again for
as many FLOPs as that one.
"""

from __future__ import annotations

from itertools import product
from typing import Any

from lavit.config import InputError, read_json, to_json, write_json
from lavit.evaluate.bench import Bench
from lavit.evaluate.measure import known_figures
from lavit.evaluate.study_data import made_at
from lavit.files import Busy

COLUMNS = ("tokens", "flops")  # what is equal among arms


def compare(bench: Bench, seeds: int) -> dict[str, Any]:
    """Train and measure every arm; gives all values as plain data.

    Raises `InputError` for an unknown figure or fewer than one seed.
    """
    study = bench.study
    if seeds < 1:
        raise InputError(f"seeds is {seeds}: give 1 or more")
    known = known_figures(study)
    if wrong := [name for name in study.figures if name not in known]:
        raise InputError(f"there is no figure {wrong[0]!r}: choose from {', '.join(known)}")
    names = [name for name, arm in study.arms.items() if arm.measured]
    columns = COLUMNS[: 1 + any(not arm.tokenizer_alone for arm in study.arms.values())]
    rows = [*product(columns, names, range(seeds))]
    found: dict[str, Any] = {column: {name: [None] * seeds for name in names} for column in columns}
    for wait in (False, True):  # what others had in hand is read, or made, once they are through
        left, rows = rows, []
        for column, name, seed in left:
            try:
                found[column][name][seed] = measured_run(bench, name, seed, column, wait=wait)
            except Busy:
                if wait:
                    raise
                rows.append((column, name, seed))
    return found


def measured_run(
    bench: Bench, name: str, seed: int, column: str, *, wait: bool = True
) -> dict[str, Any] | None:
    """One arm of one seed as plain data; None where the column's run is that of equal tokens.

    Where another process makes it, `wait` for its end, or raise `Busy`.
    """
    path = bench.out / "rows" / f"{bench.row_key(name, column)}-{seed}.json"
    with made_at(bench.out, path, wait=wait):
        if not path.exists():
            trained, row = bench.model(name, seed, column), None
            if trained is not None:
                measured = bench.measured(name, trained.folder, bench.study.figures)
                where = trained.folder.relative_to(bench.out).as_posix()
                cost = to_json(trained.cost)
                row = {"seed": seed, "run": where, "rate": trained.rate, "cost": cost, **measured}
                row["tried"] = {f"{rate:g}": value for rate, value in bench.tried(name).items()}
            write_json(path, {"study": bench.study.name, "arm": name, "column": column, "row": row})
    found: dict[str, Any] | None = read_json(path)["row"]
    return found

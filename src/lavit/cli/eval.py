"""Verb that measures a model: eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import tyro

from lavit.cli.output import ProgressBar, Words
from lavit.config import InputError

Names = Annotated[str | None, tyro.conf.arg(help="only these, with commas between them", metavar="NAME,…")]
Items = Annotated[
    Path | None,
    tyro.conf.arg(help="items of your own, one JSON object a line, for the figures own_*"),
]
Pairs = Annotated[
    float | None,
    tyro.conf.arg(help="share of pairs of objects that training never showed together"),
]
Objects = Annotated[int | None, tyro.conf.arg(help="so many of the list of objects (default: as trained, else 48)")]
Data = Annotated[str | None, tyro.conf.arg(help="a folder or file of your own in place of scenes")]


def evaluate(
    model: Words[str],
    /,
    figures: Names = None,
    seed: int = 0,
    count: int | None = None,
    items: Items = None,
    json: Path | None = None,
    objects: Objects = None,
    held_out_pairs: Pairs = None,
    data: Data = None,
    valid: bool = False,
) -> None:
    """Measure a model: reading, answering, drawing, editing and tokens on scenes, each with
    interval, floor and ceiling.

    --count items a figure (default 500); --json FILE writes the figures as they are named;
    --valid asks about the splits to choose by (valid, valid_pairs) and not the test sets. A stopped
    evaluation goes on with the same command; all figures of a run go into its card. On
    --data of your own, or of a model trained on such, the figures are those that any pictures have,
    on a share that training left out.
    """
    from lavit.evaluate.evaluation import (
        card_rows,
        is_scenes,
        predictions_path,
        write_json,
    )
    from lavit.evaluate.evaluation import evaluate as measure
    from lavit.evaluate.exam import Exam
    from lavit.evaluate.folder import own_data, training_data
    from lavit.evaluate.known import rules_of
    from lavit.storage import model_folder
    from lavit.train.card import record_figures

    folder = model_folder(model)
    names = [name.strip() for name in (figures or "").split(",") if name.strip()]
    if figures is not None and not names:
        raise InputError("--figures names none: give names with commas between them, or leave it out")
    data = training_data(folder) if data is None else data
    kept = predictions_path(folder, json)
    with ProgressBar() as progress:
        exam = Exam(
            model,
            seed=seed,
            count=count,
            rules=rules_of(folder, objects, held_out_pairs),
            kept=kept,
            progress=progress.count,
            valid=valid,
        )
        if data is not None and not is_scenes(data):
            if items is not None:
                raise InputError("--items are judged as scenes are: leave --data out")
            found = own_data(exam, data, names)
        else:
            found = measure(exam, names, items=items)
    if json is not None:
        write_json(found, json)
    if not names and not valid and (folder / "training.json").is_file():
        record_figures(folder, card_rows(found))
    _print(found)


def _print(found: dict[str, Any]) -> None:
    """The figures as a table."""
    print(f"{'figure':<24} {'value':>8}  {'95 % interval':<18} {'n':>6} {'floor':>7} {'ceiling':>7}")
    for name, figure in found["figures"].items():
        if figure["value"] is None:
            print(f"{name:<24} {'none':>8}  {figure['reason']}")
            continue
        ends = [f"{figure[end]:7.3f}" if figure[end] is not None else f"{'':>7}" for end in ("floor", "ceiling")]
        interval = f"[{figure['low']:.3f}, {figure['high']:.3f}]"
        value, count = f"{figure['value']:8.3f}", f"{figure['count']:6d}"
        print(f"{name:<24} {value}  {interval:<18} {count} {ends[0]} {ends[1]}")
    if "held_out" in found:
        print(found["held_out"])
    if found.get("valid"):
        print("on the splits to choose by: no figures to publish")
    elif "test_hash" in found:
        said = "" if found["comparable"] else "  NOT COMPARABLE with published figures: other scenes or other packages"
        print(f"config {found['config_hash']}  test sets {found['test_hash'][:16]}{said}")

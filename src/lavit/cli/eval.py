"""Verb that measures a model: eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import tyro

from lavit.cli.output import ProgressBar, Protocol, Words
from lavit.config import InputError, write_json

arg = tyro.conf.arg
SMALL = 0.01  # three decimals of values below are too few digits
Names = Annotated[str | None, arg(help="names of figures, separated by commas", metavar="NAME,…")]
Items = Annotated[
    Path | None,
    arg(help="items of your own, one JSON object a line, for the figures own_*"),
]
Pairs = Annotated[
    float | None,
    arg(help="share of pairs of objects that training never showed together"),
]
Objects = Annotated[
    int | None,
    arg(help="number of objects, from the front of the list (default: as trained, else 48)"),
]
Data = Annotated[
    str | None, arg(help="a folder or file of your own in place of scenes, or --task's folder")
]
Task = Annotated[
    str | None,
    arg(help="a benchmark: coco_caption, nocaps, flickr30k, vqav2, okvqa, vizwiz, gqa, …"),
]
Inception = Annotated[Path | None, arg(help="TorchScript of Inception, for FID and KID")]
ClipFolder = Annotated[Path | None, arg(help="a transformers folder of CLIP, for CLIPScore")]
Pictures = Annotated[Path | None, arg(help="folder for what coco_image, geneval and geneval2 draw")]


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
    task: Task = None,
    inception: Inception = None,
    clip: ClipFolder = None,
    pictures: Pictures = None,
    batch: int | None = None,
    protocol: Protocol | None = None,
) -> None:
    """Measure a model: reading, answering, drawing, editing and tokens on scenes, each with
    interval, floor and ceiling.

    Predictions and the card go into the model's folder; of a model that comes with lavit, or from
    the hub, into evaluation/NAME/ of the working folder, and its card stays unless its folder is
    named.
    --count items a figure (default 500); --json FILE writes the figures as they are named;
    --valid measures on the validation splits (valid, valid_pairs), not the test sets. A stopped
    evaluation goes on with the same command; all figures of a run go into its card. On
    --data of your own, or of a model trained on such, the figures are those that any pictures have,
    on a share that training left out; those of --data are in no card.

    --task NAME measures a benchmark of the paper's table on its folder as downloaded, --data DIR
    (docs/evaluation.md); under torchrun the processes share the work. --batch examples (default
    32) are made together, by --protocol (default: paper).
    """
    of_rows: dict[str, Any] = {"inception": inception, "clip": clip, "batch": batch}
    of_rows |= {"pictures": pictures, "protocol": protocol}
    of_scenes: dict[str, Any] = {"items": items, "objects": objects}
    of_scenes |= {"held-out-pairs": held_out_pairs, "valid": valid or None}
    if task is not None:
        why = f"has no meaning for --task {task}: leave it out"
        _refuse({"figures": figures, **of_scenes}, why)
        _benchmark(model, task, data, json, {"seed": seed, "count": count, **of_rows})
        return
    _refuse(of_rows, "belongs to a benchmark: give --task NAME, or leave it out")
    from lavit.evaluate.examinee import Examinee, is_shipped, predictions_path
    from lavit.evaluate.folder import own_data
    from lavit.files import alone
    from lavit.storage import model_folder

    folder = model_folder(model)
    names = [name.strip() for name in (figures or "").split(",") if name.strip()]
    if figures is not None and not names:
        raise InputError("--figures names none: give names separated by commas, or leave it out")
    own = _own_data(folder, data, of_scenes)
    kept = predictions_path(folder, json)
    with alone(kept.parent, kept.name), ProgressBar() as progress:
        how: dict[str, Any] = {"seed": seed, "count": count, "kept": kept}
        how["progress"] = progress.count
        if own is not None:
            found = own_data(Examinee(model, **how), own, names)
        else:
            from lavit.evaluate import evaluation
            from lavit.evaluate.exam import Exam
            from lavit.evaluate.known import rules_of

            rules = rules_of(folder, objects, held_out_pairs)
            exam = Exam(model, rules=rules, valid=valid, **how)
            found = evaluation.evaluate(exam, names, items=items)
    if json is not None:
        write_json(json, found)
    _print(found)
    if not names and not valid and (own is None or data is None):
        _record(model, folder, found)
    if json is None and is_shipped(folder):
        print(f"predictions are kept in {kept.parent}")


def _own_data(folder: Path, data: str | None, of_scenes: dict[str, Any]) -> str | None:
    """Pictures of a user's own that a model is measured on: those given, else those that it was
    trained on; None where these are scenes.
    """
    from lavit.evaluate.folder import is_scenes, training_data

    found = training_data(folder) if data is None else data
    if found is not None and not is_scenes(found):
        _refuse(of_scenes, f"is of scenes, and has no meaning on {found}: leave it out")
        return found
    if data is not None and data.partition(":")[0] != "scenes":
        raise InputError(f"{data} holds scenes, which are drawn and not read: leave --data out")
    return None


def _refuse(options: dict[str, Any], why: str) -> None:
    """Raise `InputError` for the first option that is given."""
    for name, value in options.items():
        if value is not None:
            raise InputError(f"--{name} {why}")


def _record(model: str, folder: Path, found: dict[str, Any]) -> None:
    """Write figures into the model's card, if others compare with them and it is the user's."""
    from lavit.evaluate.examinee import card_rows, is_shipped
    from lavit.train.card import record_figures

    by_name = is_shipped(folder) and not Path(model).is_dir()
    if found.get("comparable", True) and (folder / "training.json").is_file() and not by_name:
        record_figures(folder, card_rows(found))


def _benchmark(
    model: str, task: str, data: str | None, json: Path | None, settings: dict[str, Any]
) -> None:
    """Measure one row of the paper's table and print it."""
    from lavit.evaluate.benchmarks.run import Row, RowSettings
    from lavit.evaluate.examinee import is_shipped, predictions_path
    from lavit.storage import model_folder

    if data is None:
        raise InputError(f"--task {task} needs --data, the folder that it is unpacked in")
    folder = model_folder(model)
    kept = predictions_path(folder, json)
    if json is None:
        kept = kept.with_stem(task)
    with ProgressBar() as progress:
        settings["out"] = settings.pop("pictures")
        given = {name: value for name, value in settings.items() if value is not None}
        row = Row(model, task, Path(data), RowSettings(**given), kept, progress.count)
        found = row.run()
    if found is None:  # a process that only shared the work
        return
    if json is not None:
        write_json(json, found)
    _print_figures(found["figures"])
    print(f"{found['task']} ({found['split']}), {found['examples']} examples, seed {found['seed']}")
    for name, figure in found["figures"].items():
        if "note" in figure:
            print(f"{name}: {figure['note']}")
    for note in found["notes"]:
        print(note)
    if found["paper"]:
        print("paper: " + ", ".join(f"{name} {value}" for name, value in found["paper"].items()))
    for name, value in found["protocol"].items():
        print(f"{name}: {value}")
    hashes = ("config", "weights", "data", "code")
    print("  ".join(f"{name} {found[f'{name}_hash']}" for name in hashes))
    print("  ".join(f"{name} {value}" for name, value in found["versions"].items()))
    if json is None and is_shipped(folder):
        print(f"predictions are kept in {kept}")


def _print(found: dict[str, Any]) -> None:
    """The figures as a table, and what they are of."""
    _print_figures(found["figures"])
    if "held_out" in found:
        print(found["held_out"])
    elif found["valid"]:
        print("on the validation splits: no figures to publish")
    elif found["test_hash"] is None:
        print(f"config {found['config_hash']}  own items alone, no figures of the test sets")
    else:
        others = "  NOT COMPARABLE with published figures: other scenes or other packages"
        said = "" if found["comparable"] else others
        hashes = f"test sets {found['test_hash'][:16]}  judge {found['judge_hash']}"
        print(f"config {found['config_hash']}  {hashes}{said}")


def _print_figures(figures: dict[str, Any]) -> None:
    """The figures as a table."""
    ends = f"{'floor':>7} {'ceiling':>7}"
    print(f"{'figure':<24} {'value':>8}  {'95 % interval':<18} {'n':>6} {ends}")
    for name, figure in figures.items():
        if figure["value"] is None:
            print(f"{name:<24} {'none':>8}  {figure['reason']}")
            continue
        interval = ""
        if figure["low"] is not None:
            interval = f"[{_digits(figure['low'])}, {_digits(figure['high'])}]"
        line = f"{name:<24} {_digits(figure['value']):>8}  {interval:<18} {figure['count']:6d}"
        for end in ("floor", "ceiling"):
            line += " " * 8 if figure[end] is None else f" {figure[end]:7.3f}"
        print(line)


def _digits(value: float) -> str:
    """Three decimals, or of what is small three digits."""
    return f"{value:.3g}" if 0 < abs(value) < SMALL else f"{value:.3f}"

"""Figures of a trained arm of a study, kept in its folder, and the keys of what is kept."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lavit.config import read_json, write_json
from lavit.data.scenes.frozen import PATH as FROZEN
from lavit.evaluate.evaluation import FIGURES
from lavit.evaluate.exam import Exam, world_hash
from lavit.evaluate.examinee import Missing, config_hash, hash_of
from lavit.evaluate.figures import Figure, nothing
from lavit.evaluate.judge import FOLDER as JUDGE
from lavit.evaluate.minimal import write_minimal_pairs
from lavit.evaluate.reading import read_likelihood
from lavit.evaluate.study import Study

Say = Callable[[str, int, int], None]
MORE: dict[str, Callable[[Exam], Figure]] = {
    "read_pairs_likelihood": read_likelihood,
    "write_minimal_pairs": write_minimal_pairs,
}


def key_of(said: Any) -> str:
    """A short hash of plain data."""
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def source_of(thing: Any) -> str:
    """The text of the module that defines a class or function (a partial: the one it calls)."""
    return inspect.getsource(inspect.getmodule(getattr(thing, "func", thing)) or thing)


def known_figures(study: Study) -> dict[str, Callable[[Exam], Figure]]:
    """Figures of `lavit eval`, those that tell young models apart, and the study's own."""
    return FIGURES | MORE | dict(study.own)


def figures_key(study: Study, name: str, names: tuple[str, ...], **more: Any) -> str:
    """A hash of what measures an arm, the frozen scenes and the judge among it: by the text of a
    module where the study brings it.
    """
    known, kind = known_figures(study), study.arms[name].exam
    said: list[Any] = [names, study.count, study.rules.options(), *more.values()]
    said += [hash_of([FROZEN, *sorted(JUDGE.iterdir())])]
    said += [source_of(known[figure]) for figure in names if figure in study.own]
    said += [source_of(kind), kind.__qualname__] * (kind is not Exam)
    return key_of(said)


def measure(
    study: Study,
    name: str,
    folder: Path,
    names: tuple[str, ...],
    *,
    valid: bool,
    progress: Say,
) -> dict[str, Any]:
    """Figures of an arm's model with the values of their items, and hashes, kept in its folder."""
    known, kind = known_figures(study), study.arms[name].exam
    paints = (folder / "pixels" / "done").exists()  # it may have come since
    key = figures_key(study, name, names, valid=valid, paints=paints)
    path = folder / f"figures-{key}.json"
    if not path.exists():
        torch.manual_seed(0)
        own = "" if kind is Exam else f"-{key}"
        exam = kind(
            folder,
            count=study.count,
            rules=study.rules,
            kept=folder / f"predictions{own}.jsonl",
            progress=progress,
            valid=valid,
        )
        found = {}
        for figure in names:
            try:
                value = known[figure](exam)
            except Missing as missing:
                value = nothing(str(missing))
            found[figure] = value.entry() | {"items": list(value.items)}
        hashes = {"weights_hash": exam.weights, "config_hash": config_hash(folder)}
        hashes["world_hash"] = world_hash()
        write_json(path, {"figures": found, **hashes})
    return read_json(path)

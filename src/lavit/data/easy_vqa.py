"""easy-VQA as a data set of this package: 5,000 pictures of one coloured shape with 48,248 questions (Victor Zhou, MIT).

Pictures and questions come from the PyPI package easy-vqa 1.0, with its own split: train (4,000 pictures), test (1,000).
What a picture shows is gathered from its questions (a "no" to every other colour is not used, only what is said): where
both shape and colour are said, the picture gets them as its text, "red circle."; else it is asked about only.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from lavit.config import InputError, require
from lavit.data.folder import check_place, written_whole

SPLITS = ("train", "test")
SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
MARK = "easy-vqa.json"  # a folder with this file is ours to replace
NEGATIONS = ("no", "not")
CARD = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train
    path: "train/**"
  - split: test
    path: "test/**"
---
# easy-VQA

Pictures of one coloured shape, with questions (questions.jsonl) and, where the questions tell it, a text. Made by Victor
Zhou, MIT licence (LICENSE), from the PyPI package easy-vqa {version}: https://github.com/vzhou842/easy-VQA
"""


def build_easy_vqa(
    out: Path, *, pictures: int | None = None, progress: Callable[[int, int], None] | None = None
) -> dict[str, int]:
    """Write the data set into `out`; returns counts. `pictures`: only that many of train (test stays whole).

    Written: SPLIT/NUMBER.png, SPLIT/metadata.jsonl, questions.jsonl, README.md, LICENSE, easy-vqa.json. An earlier folder of
    this kind is replaced; another folder that is not empty, no picture at all, or the package missing, raises `InputError`.
    `progress` hears (pictures done, of all).
    """
    if pictures is not None and pictures < 1:
        raise InputError(f"a data set needs at least one picture, not {pictures}")
    package = require("easy_vqa", extra="mini")
    out = Path(out)
    check_place(out, MARK, "easy-VQA")
    with written_whole(out) as partial:
        counts = _write(package, partial, pictures, progress)
    return counts


def _write(
    package: Any, out: Path, pictures: int | None, progress: Callable[[int, int], None] | None
) -> dict[str, int]:
    counts: Counter[str] = Counter()
    lines: list[dict[str, str]] = []
    read = {split: getattr(package, f"get_{split}_image_paths")() for split in SPLITS}
    read["train"] = dict(sorted(read["train"].items())[:pictures])
    total, done = sum(map(len, read.values())), 0
    for split in SPLITS:
        (out / split).mkdir(parents=True)
        asked: dict[int, list[tuple[str, str]]] = defaultdict(list)
        for question, answer, number in zip(*getattr(package, f"get_{split}_questions")(), strict=True):
            if number in read[split]:
                asked[number].append((question, answer))
        rows = []
        for number in sorted(read[split]):
            name = f"{number}.png"
            shutil.copyfile(read[split][number], out / split / name)
            rows.append({"file_name": name, "text": text_of(asked[number]), "license": "MIT"})
            lines += [
                {"split": split, "image": f"{split}/{name}", "question": question, "answer": answer}
                for question, answer in asked[number]
            ]
            done += 1
            if progress and (done % 100 == 0 or done == total):
                progress(done, total)
        _lines(out / split / "metadata.jsonl", rows)
        counts |= {
            f"{split} pictures": len(rows),
            f"{split} pictures with a text": sum(bool(row["text"]) for row in rows),
            f"{split} questions": sum(map(len, asked.values())),
        }
    _lines(out / "questions.jsonl", lines)
    found = distribution("easy-vqa")
    (out / "README.md").write_text(CARD.format(version=found.version))
    licence = next(file for file in found.files or () if file.name == "LICENSE")
    shutil.copyfile(licence.locate(), out / "LICENSE")
    (out / MARK).write_text(json.dumps({"easy-vqa": found.version, "counts": dict(counts)}, indent=1) + "\n")
    return dict(counts)


def text_of(asked: list[tuple[str, str]]) -> str:
    """Colour and shape as the questions and answers of one picture tell them, or "" where one of them stays open.

    Told by an answer ("what color is the circle?" red), by a question that names them in passing ("the circle"), and by
    yes to "is there a circle?" or no to "is there not a circle?".
    """
    told: dict[str, str] = {}
    for question, answer in asked:
        words = question.rstrip("?").split()
        named = {kind: next((w for w in words if w in of), None) for kind, of in (("c", COLOURS), ("s", SHAPES))}
        negated = any(word in NEGATIONS for word in words)
        if answer in ("yes", "no"):
            holds = (answer == "yes") != negated
        else:
            holds = True
            named["c" if answer in COLOURS else "s"] = answer
        if holds:
            told |= {kind: word for kind, word in named.items() if word}
    return f"{told['c']} {told['s']}." if len(told) == 2 else ""


def _lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

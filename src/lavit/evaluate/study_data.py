"""What the arms of a study learn from: pools of scenes, rows of them, texts; each written once."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from lavit.config import write_whole
from lavit.data.lines import json_lines
from lavit.data.scenes.dataset import write_pool
from lavit.data.scenes.splits import Rules
from lavit.evaluate.measure import Say, key_of
from lavit.evaluate.study import Study
from lavit.files import alone, replacing


def made_at(out: Path, path: Path, *, wait: bool = True) -> AbstractContextManager[None]:
    """Be the only process that makes a part of a comparison: `wait`, or raise `Busy`."""
    return alone(out / "locks", f"{path.parent.name}-{path.name}", wait=wait)


class StudyData:
    """The data of a study's arms below OUT, by what decides over them."""

    def __init__(self, study: Study, out: Path, progress: Say) -> None:
        self.study, self.out, self.progress = study, out, progress

    def pool(self, rules: Rules) -> Path:
        """Scenes of some rules, drawn once."""
        size = self.study.preset().model.vision.image_size
        how: dict[str, Any] = {"pictures": self.study.pictures, "size": size}
        folder = self.out / "pools" / key_of(how | rules.options())

        def say(done: int, of: int) -> None:
            self.progress("pictures", done, of)

        with made_at(self.out, folder):
            write_pool(folder, rules=rules, progress=say, **how)
        return folder

    def folder(self, name: str) -> Path:
        """What an arm learns from: its pool, or what its `rows` leave of it."""
        arm, pool = self.study.arms[name], self.pool(self.study.rules_of(name))
        if arm.rows is None:
            return pool
        rows = list(arm.rows(row for _, row in json_lines(pool / "train" / "metadata.jsonl")))
        folder = pool.with_name(f"{pool.name}-{key_of(rows)}")
        with made_at(self.out, folder):
            if not folder.exists():
                with replacing(folder) as new:
                    _write_rows(rows, pool, new)
        return folder

    def source(self, name: str, data: Path) -> str:
        """An arm's data with the texts that are mixed in, as the data of a run are named."""
        weight = self.study.arms[name].texts
        if not weight:
            return str(data)
        lines = [json.dumps({"text": text}) for text in self.study.texts()]
        path = self.out / "texts" / f"{key_of(lines)}.jsonl"
        if not path.exists():
            write_whole(path, "\n".join(lines) + "\n")
        return f"{data},{path}:{weight:g}"


def _write_rows(rows: list[dict[str, Any]], pool: Path, folder: Path) -> None:
    """A pool of some rows of another one, which gives the pictures."""
    (folder / "train").mkdir()
    for name in (row["file_name"] for row in rows):
        (folder / "train" / name).hardlink_to(pool / "train" / name)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "train" / "metadata.jsonl").write_text(lines)
    (folder / "origin.json").write_bytes((pool / "origin.json").read_bytes())

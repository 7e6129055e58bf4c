"""Rules of the house that are worth keeping are tests: import direction, offsets, prints, sizes, numbers of models."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "lavit"
FILES = sorted(PACKAGE.rglob("*.py"))
# a room may import itself and rooms before it; never sideways between those on one line
ORDER: tuple[tuple[str, ...], ...] = (
    ("config",),
    ("presets",),
    ("vocabulary", "images"),
    ("sequence",),
    ("modules",),
    ("storage",),
    ("model",),
    ("data", "generate"),
    ("train", "visualize"),
    ("evaluate",),
    ("convert",),
    ("serve",),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
# data/documents.py lays the paper's prompts out, which the pipeline must repeat
ALLOWED = {("generate", "data")}


def room_of(path: Path) -> str:
    """The room that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Rooms of this package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lavit":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lavit.")}
    return found


@pytest.mark.parametrize("path", [p for p in FILES if p.name != "__init__.py"], ids=lambda p: p.name)
def test_imports_go_one_way(path: Path) -> None:
    room = room_of(path)
    for other in imports(path) - {room}:
        if (room, other) not in ALLOWED:
            assert LEVEL[other] < LEVEL[room], f"{path.name} ({room}) imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_are_short_and_quiet(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    if room_of(path) != "cli":
        assert not [call for call in calls if getattr(call.func, "id", "") == "print"]


def test_functions_fit_a_screen() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                assert length <= 80, f"{path.name}: {node.name} has {length} lines"


def test_model_numbers_live_in_presets_and_convert() -> None:
    pattern = re.compile(r"\b(32000|32001|32002|16384|48386|4096)\b")
    for path in FILES:
        if room_of(path) in ("presets", "convert", "config"):
            continue
        code = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
        strings = [
            node.value
            for node in ast.walk(ast.parse(code))
            if isinstance(node, ast.Constant) and isinstance(node.value, int) and not isinstance(node.value, bool)
        ]
        assert not [value for value in strings if pattern.fullmatch(str(value))], path.name


def test_every_box_of_the_figure_is_a_file() -> None:
    boxes = {
        "vision",
        "selector",
        "merger",
        "codebook",
        "reconstructor",
        "tokenizer",
        "language",
        "pixels",
    }
    assert boxes <= {path.stem for path in (PACKAGE / "modules").glob("*.py")}

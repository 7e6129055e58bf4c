"""One toy model and one toy data set for the whole run of tests; nothing is downloaded.

pytest checks every annotation of the package: beartype types, jaxtyping shapes where it is used.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from functools import wraps
from inspect import isgeneratorfunction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}
os.environ.setdefault("OMP_NUM_THREADS", "1")  # what torchrun warns of else, in ranks of tests


def check_annotations() -> None:
    """Of modules imported from here on."""
    import jaxtyping
    from beartype import BeartypeConf, beartype
    from beartype.claw import beartype_package

    root = Path(__file__).parents[1] / "src"
    names = ("from jaxtyping import", "TYPE_CHECKING")  # shapes; what beartype cannot look up
    shaped = [
        ".".join(path.relative_to(root).with_suffix("").parts)
        for path in root.rglob("[!_]*.py")
        if any(name in path.read_text() for name in names)
    ]
    wrong = jaxtyping.TypeCheckError
    conf = BeartypeConf(is_pep484_tower=True, claw_is_pep526=False, violation_type=wrong)
    beartype_package("lavit", conf=conf)
    jaxtyping.install_import_hook(shaped, "beartype.beartype")
    jaxtyping.jaxtyped = lighter(jaxtyping.jaxtyped, beartype(conf=conf))


def lighter(jaxtyped: Callable[..., Any], check: Callable[..., Any]) -> Callable[..., Any]:
    """A `jaxtyped` that costs a third: it binds no signature and checks parameters once, and
    shapes are compared where there are some."""
    from jaxtyping import AbstractArray

    one_meaning = jaxtyped("context")  # of the names in shapes

    def shapes(hint: Any) -> bool:
        if isinstance(hint, type) and issubclass(hint, AbstractArray):
            return True
        return any(map(shapes, hint if isinstance(hint, list) else get_args(hint)))

    def looked_up(hint: Any, room: dict[str, Any]) -> Any:
        try:
            return get_type_hints(SimpleNamespace(__annotations__={"it": hint}), room)["it"]
        except Exception:  # imported for type checkers alone
            return Any

    def checked(function: Any) -> Any:
        if isinstance(function, type):
            if is_dataclass(function) and "__init__" in vars(function):
                function.__init__ = checked(function.__init__)
            return function
        written, room = function.__annotations__, vars(sys.modules[function.__module__])
        found = {name: looked_up(hint, room) for name, hint in written.items()}
        shaped = any(map(shapes, found.values()))
        if shaped and isgeneratorfunction(function):
            return jaxtyped(function, typechecker=check)
        function.__annotations__ = found
        inside = check(function)
        function.__annotations__ = written
        if not shaped:
            return inside

        @wraps(function)
        def within(*given: Any, **named: Any) -> Any:
            with one_meaning:
                return inside(*given, **named)

        return within

    return lambda typechecker: checked


if "pytest" in sys.modules:  # recipes take toys from here without
    check_annotations()

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import nn

from lavit.config import (
    LanguageConfig,
    LanguageTraining,
    ModelConfig,
    PixelsConfig,
    PixelsTraining,
    TokenizerConfig,
    TokenizerTraining,
    TrainConfig,
    VisionConfig,
)

# toy models gain nothing from two, and the workers of pytest-xdist share the cores
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Each stage collects garbage at its end: let it pass over what was imported."""
    gc.freeze()


ROOMS = ("lavit.data.documents", "lavit.data.stream_documents")


@pytest.fixture(scope="session", autouse=True)
def small_windows() -> Iterator[None]:
    """Toys train on a dozen rows: eight are filled together, not 64."""
    with pytest.MonkeyPatch.context() as patch:
        for room in ROOMS:
            patch.setattr(f"{room}.WINDOW", 8)
        yield


@pytest.fixture
def whole_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are filled as in use."""
    for room in ROOMS:
        monkeypatch.setattr(f"{room}.WINDOW", 64)


NAMES = (
    "red square",
    "green square",
    "blue square",
    "red bar",
    "green bar",
    "blue bar",
    "red dot",
    "blue dot",
)
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 60, 220)}


def tensors_equal(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(mine[name].equal(theirs[name]) for name in mine)


def toy_picture(name: str, size: int = 48) -> Image.Image:
    """A coloured shape on white."""
    colour, shape = name.split()
    pixels = np.full((size, size, 3), 255, dtype=np.uint8)
    y, x = np.mgrid[:size, :size] / size
    inside = {
        "square": (abs(y - 0.5) < 0.3) & (abs(x - 0.5) < 0.3),
        "bar": abs(y - 0.5) < 0.12,
        "dot": (y - 0.5) ** 2 + (x - 0.5) ** 2 < 0.04,
    }[shape]
    pixels[inside] = COLOURS[colour]
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures with names, as an imagefolder."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "train").mkdir()
    lines = []
    for number, name in enumerate(NAMES):
        toy_picture(name).save(folder / "train" / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"{name}."}))
    (folder / "train" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


SHAPES = ("square", "disc", "triangle", "ring")
HUES = {**COLOURS, "yellow": (230, 200, 20), "purple": (140, 40, 170), "black": (20, 20, 20)}


def draw_shapes(*names: str, size: int = 96) -> Image.Image:
    """Coloured shapes side by side on white, each as its name says: "red disc"."""
    page = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(page)
    side = size // (2 * len(names))
    for number, name in enumerate(names):
        colour, shape = HUES[name.split()[0]], name.split()[1]
        left = size * (2 * number + 1) // (2 * len(names)) - side // 2
        top = (size - side) // 2
        box = (left, top, left + side, top + side)
        if shape == "square":
            draw.rectangle(box, fill=colour)
        elif shape == "triangle":
            draw.polygon([(box[0], box[3]), (box[2], box[3]), (left + side // 2, top)], fill=colour)
        else:
            draw.ellipse(
                box, fill=colour if shape == "disc" else None, outline=colour, width=side // 6
            )
    return page


@pytest.fixture(scope="session")
def shapes_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty named pictures of shapes, with prompts, questions, edits of one and two sources."""
    folder = tmp_path_factory.mktemp("shapes")
    (folder / "train").mkdir()
    single = [f"{colour} {shape}" for colour in HUES for shape in SHAPES]
    pairs = [*zip(single[:-4:4], single[5::4], strict=True), (single[1], single[0])]
    rows, edits, questions = [], [], []

    def file(name: str) -> str:
        return f"train/{name.replace(' ', '-')}.png"

    for shown in [*((name,) for name in single), *pairs]:
        name = " and ".join(shown)
        draw_shapes(*shown).save(folder / file(name))
        prompts = [name, f"draw {name}"]
        rows.append({"file_name": Path(file(name)).name, "text": f"{name}.", "prompts": prompts})
        if len(shown) == 1:
            colour, shape = name.split()
            questions += [("which colour is it?", colour, name), (f"is it a {shape}?", "yes", name)]
            target = f"{'blue' if colour == 'red' else 'red'} {shape}"
            edits.append(([name], f"make it {target.split()[0]}", target, "colour"))
        else:
            edits.append((list(shown), "both together", name, "both"))
    lines = {
        "train/metadata.jsonl": rows,
        "questions.jsonl": [
            {"image": file(n), "question": q, "answer": a} for q, a, n in questions
        ],
        "edits.jsonl": [
            {
                "sources": [file(name) for name in sources],
                "prompt": prompt,
                "target": file(target),
                "kind": kind,
            }
            for sources, prompt, target, kind in edits
        ],
    }
    for name, items in lines.items():
        (folder / name).write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


def toy_config() -> ModelConfig:
    """A LaVIT of some ten thousand weights: 16 patches of 32 channels."""
    return ModelConfig(
        name="toy",
        vision=VisionConfig(
            source="random",
            image_size=32,
            grid=4,
            dim=32,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            architecture={
                "model_type": "dinov2",
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 8,
            },
        ),
        visual_tokenizer=TokenizerConfig(
            dim=32,
            patches=16,
            heads=2,
            merger_depth=1,
            reconstructor_depth=1,
            mlp_ratio=2.0,
            codes=32,
            code_dim=8,
        ),
        language=LanguageConfig(
            source="random",
            architecture={
                "model_type": "llama",
                "hidden_size": 48,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 256,
                "tie_word_embeddings": True,
            },
        ),
        pixels=PixelsConfig(
            size=16,
            features_dim=32,
            patches=16,
            condition="grid",
            condition_dim=8,
            patch=2,
            unet={
                "_class_name": "GridDenoiser",
                "in_channels": 12 + 8,
                "out_channels": 12,
                "width": 16,
                "depth": 2,
            },
        ),
    )


def toy_training(steps: int = 6) -> TrainConfig:
    """A few steps of every stage, without samples."""
    return TrainConfig(
        text_vocabulary=300,
        sample_every=0,
        checkpoint_every=4,
        log_every=2,
        tokenizer=TokenizerTraining(
            steps_a=steps, steps_b=steps, batch=8, learning_rate=2e-3, k_means_vectors=64
        ),
        language=LanguageTraining(
            steps=steps,
            rows=2,
            tokens=96,
            learning_rate=3e-3,
            rows_rate=3e-3,
            reader_rate=3e-3,
            weight_decay=0.0,
        ),
        pixels=PixelsTraining(steps=steps, batch=8, learning_rate=1e-3),
    )


def short_streams(patch: pytest.MonkeyPatch) -> None:
    """Let streams fill few rows together, and look at few pictures before the first step."""
    patch.setattr("lavit.data.stream_documents.WINDOW", 2)
    patch.setattr("lavit.train.tokenizer.SOME", 16)


@pytest.fixture(scope="session")
def toy_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with an encoder and an untrained tokenizer, for what needs no more."""
    from lavit.model import LaVIT
    from lavit.vision.encoder import load_vision
    from lavit.visual_tokenizer.tokenizer import VisualTokenizer

    config, folder = toy_config(), tmp_path_factory.mktemp("tokenizer") / "toy"
    torch.manual_seed(0)
    vision, tokenizer = load_vision(config.vision), VisualTokenizer(config.visual_tokenizer)
    LaVIT(config, vision=vision, visual_tokenizer=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def toy_run(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy run whose three stages have been trained for a few steps."""
    from lavit.train.run import open_run, train_stages

    folder = tmp_path_factory.mktemp("run") / "toy"
    train_stages(open_run(folder, toy_data, toy_config(), toy_training()))
    return folder

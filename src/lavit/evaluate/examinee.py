"""A model that is measured: its parts, the sampling of items, and what it said and drew so far."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL.Image import Image

import lavit
from lavit.config import PARTS, TO_READ, InputError, read_json
from lavit.data.corpus import origin_of
from lavit.evaluate.figures import Figure, nothing
from lavit.evaluate.kept import Kept, Progress
from lavit.generate.pipeline import Pipeline
from lavit.model import LaVIT
from lavit.storage import WEIGHTS, has_part, model_folder
from lavit.visual_tokenizer.layers import Patches
from lavit.visual_tokenizer.tokenizer import VisualTokenizer

T = TypeVar("T")
COUNT = 500  # items of a figure, where a user does not say
BATCH = 16  # pictures that are encoded together
SEED_STEP = 1_000_003  # between the user's seeds, so that no two items of two seeds share one


class Missing(InputError):
    """A figure needs what this model or machine lacks."""


class Examinee:
    """One model that is measured; `count` items a figure, sampling moved by `seed`.

    `about` says what it is measured on: predictions of other data are not taken up.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        seed: int = 0,
        count: int | None = None,
        kept: Path | None = None,
        progress: Progress = lambda task, done, count: None,
        about: str = "",
    ) -> None:
        if seed < 0:
            raise InputError(f"seed is {seed}: give a number from 0")
        if count is not None and count < 1:
            raise InputError(f"count is {count}: give the number of items of a figure, 1 or more")
        self.folder = model_folder(model)
        self.pipe = self.opened()
        self.model = self.pipe.model
        self.count = count or COUNT  # items of a figure
        self.seed, self.progress = seed, progress
        self.trained = training_of(self.folder)
        self.weights = weights_hash(self.folder)
        where = f"{self.model.device.type} {self.model.dtype} {self.pipe.protocol}"
        said = f"{self.weights} {config_hash(self.folder)} {seed} {about} {where} {code_hash()}"
        self.kept = Kept(kept, hashlib.sha256(said.encode()).hexdigest()[:16], self.progress)
        self.made = self.kept.made  # what the model said and drew
        self.cache: dict[Any, Any] = {}  # what several figures need, in memory
        self.items: list[Any] | None = None  # a user's own (evaluate/own.py)

    def opened(self) -> Pipeline:
        """The model as it is measured: unreleased, its decoder loaded for figures that need it."""
        return lavit.load(self.folder, safety=False, parts=TO_READ)

    def scaled(self, default: int) -> int:
        """`default` items, scaled by the user's count over the default of 500."""
        return max(1, round(default * self.count / COUNT))

    @cached_property
    def tokenizer(self) -> VisualTokenizer:
        """The visual tokenizer."""
        self.needs("visual_tokenizer")
        return self.model.visual_tokenizer

    def needs(self, *parts: str) -> None:
        """Raise `Missing` unless the model has these parts; loads the pixel decoder when needed."""
        model = self.model
        for part in parts:
            if not has_part(model.config, self.folder, part):
                raise Missing(f"this model has no {part} yet")
        if "pixels" in parts and model.pixels is None:
            where = {"device": model.device, "dtype": model.dtype, "parts": ("pixels",)}
            model.pixels = LaVIT.from_pretrained(self.folder, **where).pixels

    def seeds(self, items: Sequence[int]) -> list[int]:
        """Seeds that items are sampled with."""
        return [self.seed * SEED_STEP + item for item in items]

    def features(self, pictures: Sequence[Image]) -> Patches:
        """Encoder features of pictures, some of which are in memory at a time."""
        numbers = range(len(pictures))
        batches = [numbers[at : at + BATCH] for at in numbers[::BATCH]]
        return torch.cat([self.model.patches([pictures[n] for n in batch]) for batch in batches])

    def captions(self, task: str, items: Sequence[int], shown: Callable[[int], Image]) -> list[str]:
        """Captions of pictures, kept by item."""
        self.needs("language")

        def make(numbers: list[int]) -> list[str]:
            pictures = [shown(number) for number in numbers]
            return self.pipe.caption(pictures, seed=self.seeds(numbers))

        return self.made(task, items, make)


def chosen(names: Sequence[str], known: Mapping[str, Any]) -> list[str]:
    """The figures asked for (none: all), in their usual order; `InputError` for unknown names."""
    wrong = [name for name in names if name not in known]
    if wrong:
        raise InputError(f"there is no figure {wrong[0]!r}: choose from {', '.join(known)}")
    return [name for name in known if name in names or not names]


def measured(
    known: Mapping[str, Callable[[T], Figure]], names: Sequence[str], subject: T,
) -> dict[str, Any]:  # fmt: skip
    """The figures of `names` (none: all that are known) as plain data.

    What this model or machine lacks is null, with the reason; `InputError` if that is all of it.
    """
    found, lacking = {}, {}
    for name in chosen(names, known):
        try:
            figure = known[name](subject)
        except Missing as missing:
            lacking[name] = str(missing)
            figure = nothing(str(missing))
        found[name] = figure.entry()
    if found.keys() == lacking.keys():
        name, reason = next(iter(lacking.items()))
        raise InputError(f"{name} cannot be had: {reason}")
    return found


def training_of(folder: Path) -> dict[str, Any]:
    """The training that made a model, if its folder says."""
    path = folder / "training.json"
    return read_json(path) if path.is_file() else {}


def origin_in(folder: Path) -> dict[str, Any]:
    """How the data of a model were made, by training.json or else by themselves; or nothing."""
    said = training_of(folder)
    origin = said.get("origin")
    if origin is None and said.get("data"):
        try:
            origin = origin_of(str(said["data"]))
        except InputError:  # a name that is not there any more
            return {}
    return origin if isinstance(origin, dict) else {}


def scenes_of(folder: Path) -> dict[str, Any] | None:
    """Options of the scenes a model learnt from; None where it learnt from other data."""
    scenes = origin_in(folder).get("scenes")
    return scenes if isinstance(scenes, dict) else None


def weights_hash(folder: Path) -> str:
    """A hash of all weights of a model folder (training's own files are left out)."""
    digest = hashlib.sha256()
    files = sorted(
        path
        for part in (*PARTS, "reader", "base")
        for path in (folder / part).rglob("*")
        if path.suffix in (".safetensors", ".bin", ".json", ".model")
    )
    for path in files:
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def config_hash(folder: Path) -> str:
    """A hash of a model's configuration and, where it says, of its training's."""
    paths = [folder / name for name in ("config.json", "training.json")]
    return hash_of(path for path in paths if path.is_file())


def hash_of(paths: Iterable[Path]) -> str:
    """A short hash of the bytes of files."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()[:16]


@cache
def code_hash() -> str:
    """A hash of this package's code."""
    return hash_of(sorted(Path(lavit.__file__).parent.rglob("*.py")))


def is_shipped(folder: Path) -> bool:
    """Whether a model's folder is one of this package or of the hub's cache, not to be written."""
    return folder.resolve().is_relative_to(WEIGHTS.resolve()) or _cached(folder)


def _cached(folder: Path) -> bool:
    """Whether a folder is one of the hub's cache, models--ORG--NAME/snapshots/COMMIT."""
    return folder.parent.name == "snapshots"


def predictions_path(folder: Path, out: Path | None) -> Path:
    """Where predictions are kept: next to the JSON file, or in the model's folder; of a model of
    this package or of the hub in evaluation/NAME/ of the working folder.
    """
    if out is None:
        name = folder.parents[1].name if _cached(folder) else folder.name
        below = Path("evaluation") / name if is_shipped(folder) else folder / "evaluation"
        return below / "predictions.jsonl"
    if out.is_dir():
        raise InputError(f"{out} is a folder: give --json a file")
    return out.with_suffix(".predictions.jsonl")


def card_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The figures that have a value, as a model's card takes them."""
    return [
        {
            "name": name,
            **{key: figure[key] for key in ("value", "low", "high", "count")},
            "floor": None if figure["floor"] is None else [figure["floor_is"], figure["floor"]],
        }
        for name, figure in found["figures"].items()
        if figure["value"] is not None
    ]

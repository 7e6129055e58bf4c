"""What all figures share: the model, the scenes they ask about, and what was said and drawn so far.

Pictures are rendered at the encoder's size where they are read and at the decoder's where they are
judged. Wording and questions of item n are a function of n alone; the user's seed moves sampling
only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

import lavit
from lavit.config import PARTS, TO_READ, InputError
from lavit.data.scenes.render import render
from lavit.data.scenes.sample import scene_at
from lavit.data.scenes.splits import Rules
from lavit.data.scenes.world import Scene
from lavit.evaluate.kept import Kept, Progress
from lavit.evaluate.known import training_of
from lavit.model import LaVIT
from lavit.sequence import VisualTokens
from lavit.storage import has_part, model_folder
from lavit.visual_tokenizer.layers import Patches
from lavit.visual_tokenizer.tokenizer import VisualTokenizer

COUNT = 500  # items of a figure, where a user does not say
BATCH = 16  # pictures that are encoded together
WORDS = 0x5CE7E6  # moves wording and questions, and nothing else
TO_CHOOSE_BY = {"test": "valid", "pairs": "valid_pairs", "ladder": "valid_ladder"}  # in place of
SEED_STEP = 1_000_003  # between the user's seeds, so that no two items of two seeds share one

_scene = lru_cache(maxsize=8192)(scene_at)


class Missing(InputError):
    """A figure needs what this model or machine lacks."""


class Exam:
    """One model, examined on scenes under `rules`; `count` items a figure, sampling moved by
    `seed`. With `valid`, on the validation splits.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        seed: int = 0,
        count: int | None = None,
        rules: Rules | None = None,
        kept: Path | None = None,
        progress: Progress = lambda task, done, count: None,
        valid: bool = False,
    ) -> None:
        if seed < 0:
            raise InputError(f"seed is {seed}: give a number from 0")
        if count is not None and count < 1:
            raise InputError(f"count is {count}: give the number of items of a figure, 1 or more")
        self.folder = model_folder(model)
        # what is measured is not released; the pixel decoder is loaded for figures that need it
        self.pipe = lavit.load(self.folder, safety=False, parts=TO_READ)
        self.model = self.pipe.model
        self.asked, self.count = count, count or COUNT  # items of a figure
        self.seed, self.rules = seed, rules or Rules()
        self.progress, self.valid = progress, valid
        self.trained = training_of(self.folder)
        self.weights = weights_hash(self.folder)
        said = f"{self.weights} {config_hash(self.folder)} {world_hash()} {seed} {self.rules}"
        said += " valid" * valid
        self.kept = Kept(kept, hashlib.sha256(said.encode()).hexdigest()[:16], self.progress)
        self.made = self.kept.made  # what the model said and drew
        self.cache: dict[Any, Any] = {}  # what several figures need, in memory
        self.items: list[Any] | None = None  # a user's own (evaluate/own.py)

    def scaled(self, default: int) -> int:
        """`default` items, scaled by the user's count over the default of 500."""
        return max(1, round(default * self.count / COUNT))

    @cached_property
    def tokenizer(self) -> VisualTokenizer:
        """The visual tokenizer."""
        self.needs("visual_tokenizer")
        return self.model.visual_tokenizer

    @cached_property
    def judge(self) -> Any:
        """Who looks at pictures."""
        from lavit.evaluate.judge import Judge

        return Judge.load()

    @property
    def drawn_size(self) -> int:
        """Pixels of what the decoder paints."""
        return self.model.config.pixels.size

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

    def rng(self, item: int, what: int = 0) -> np.random.Generator:
        """What words and questions of an item are chosen with."""
        return np.random.default_rng([WORDS, what, item])

    def split(self, split: str) -> str:
        """The split that is measured for a split: itself, or its validation split."""
        if self.valid and split not in TO_CHOOSE_BY:
            raise Missing(f"nothing is chosen by {split}")
        return TO_CHOOSE_BY[split] if self.valid else split

    def scene(self, split: str, item: int) -> Scene:
        """Picture `item` of a split; `Missing` where these rules leave it none."""
        try:
            return _scene(self.split(split), item, rules=self.rules)
        except InputError as error:
            raise Missing(str(error)) from error

    def picture(self, scene: Scene) -> Image:
        """A scene as the encoder sees it."""
        try:
            return render(scene, self.model.config.vision.image_size)
        except InputError as error:
            if scene.style == "noto":
                raise Missing(str(error)) from error
            raise

    def small(self, scene: Scene) -> Image:
        """A scene at the decoder's size."""
        return render(scene, self.drawn_size)

    def features(self, pictures: Sequence[Image]) -> Patches:
        """Encoder features of pictures."""
        return self.model.patches(pictures)

    def encoded(self, split: str, count: int) -> tuple[Patches, VisualTokens]:
        """Encoder features and visual tokens of the first pictures of a split, kept in memory."""
        if ("encoded", split, count) not in self.cache:
            parts = []
            for at in range(0, count, BATCH):
                numbers = range(at, min(at + BATCH, count))
                parts.append(self.features([self.picture(self.scene(split, n)) for n in numbers]))
                self.progress(f"encode {split}", numbers[-1] + 1, count)
            features = torch.cat(parts)
            self.cache["encoded", split, count] = features, self.tokenizer.encode(features)
        return self.cache["encoded", split, count]


@torch.no_grad()
def rebuilt(tokenizer: VisualTokenizer, features: Patches) -> Patches:
    """Features through their own codes, in the tokenizer's own space."""
    parts = []
    for part in features.split(BATCH):
        parts.append(tokenizer.reconstruct(part, tokenizer.select(part), quantise=True))
    return torch.cat(parts)


def weights_hash(folder: Path) -> str:
    """A hash of all weights of a model folder (training's own files are left out)."""
    digest = hashlib.sha256()
    files = sorted(
        path
        for part in (*PARTS, "reader")
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
    return _hash(path for path in paths if path.is_file())


def world_hash() -> str:
    """A hash of the code that makes scenes and words of them."""
    folder = Path(lavit.__file__).parent / "data" / "scenes"
    return _hash(sorted([*folder.glob("*.py"), *folder.glob("*.tsv")]))


def _hash(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]

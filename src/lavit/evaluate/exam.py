"""What all figures share: the model, the scenes they ask about, and what was said and drawn so far.

Pictures are rendered at the encoder's size where they are read and at the decoder's where they are
judged. Wording and questions of item n are a function of n alone; the user's seed moves sampling
only.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

import lavit
from lavit.config import InputError
from lavit.data.scenes.render import render
from lavit.data.scenes.sample import scene_at
from lavit.data.scenes.splits import Rules
from lavit.data.scenes.world import Scene
from lavit.evaluate.examinee import BATCH, Examinee, Missing, hash_of
from lavit.evaluate.kept import Progress
from lavit.generate.request import Completion
from lavit.sequence import VisualTokens
from lavit.visual_tokenizer.layers import Patches
from lavit.visual_tokenizer.tokenizer import VisualTokenizer

WORDS = 0x5CE7E6  # moves wording and questions, and nothing else
TO_CHOOSE_BY = {"test": "valid", "pairs": "valid_pairs", "ladder": "valid_ladder"}  # in place of

_scene = lru_cache(maxsize=8192)(scene_at)


class Exam(Examinee):
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
        self.rules, self.valid = rules or Rules(), valid
        about = f"{world_hash()} {self.rules}" + " valid" * valid
        super().__init__(model, seed=seed, count=count, kept=kept, progress=progress, about=about)

    @cached_property
    def judge(self) -> Any:
        """Who looks at pictures."""
        from lavit.evaluate.judge import Judge

        return Judge.load()

    @property
    def drawn_size(self) -> int:
        """Pixels of what the decoder paints."""
        return self.model.config.pixels.size

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

    def true_codes(self, split: str) -> list[Any]:
        """What the first pictures of a split are painted from, as plain data: their codes."""
        _, tokens = self.encoded(split, self.count)
        return [one.tolist() for one in tokens.split()]

    def written_codes(self, completion: Completion) -> list[Any]:
        """What was written of a picture, as plain data: its codes."""
        return list(completion.images[0])

    def rebuilt(self, features: Patches) -> Patches:
        """Features through what a picture is painted from."""
        return rebuilt(self.tokenizer, features)


@torch.no_grad()
def rebuilt(tokenizer: VisualTokenizer, features: Patches) -> Patches:
    """Features through their own codes, in the tokenizer's own space."""
    parts = []
    for part in features.split(BATCH):
        parts.append(tokenizer.reconstruct(part, tokenizer.select(part), quantise=True))
    return torch.cat(parts)


def world_hash() -> str:
    """A hash of the code that makes scenes and words of them."""
    folder = Path(lavit.__file__).parent / "data" / "scenes"
    return hash_of(sorted([*folder.glob("*.py"), *folder.glob("*.tsv")]))

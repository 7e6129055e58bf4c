"""What a model says and draws for the examples of a benchmark."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from lavit.config import InputError
from lavit.evaluate.benchmarks.drawn import Drawings
from lavit.evaluate.benchmarks.image_metrics import Clip
from lavit.evaluate.benchmarks.layouts import Example
from lavit.evaluate.examinee import SEED_STEP
from lavit.generate.pipeline import Pipeline
from lavit.images import open_image

GENEVAL_SAMPLES = 4  # pictures of a prompt


class Maker:
    """Makes predictions of examples, given by their numbers; each is plain data."""

    def __init__(
        self,
        pipe: Pipeline,
        examples: Sequence[Example],
        drawings: Drawings,
        *,
        clip: Clip | None,
        seed: int,
        asks_first: bool,
    ) -> None:
        self.pipe, self.examples, self.drawings = pipe, examples, drawings
        self.clip, self.seed = clip, seed
        self.asks_first = asks_first  # whether a question can be answered
        best_of = pipe.protocol.best_of
        self.candidates = best_of if clip and best_of else 1  # of a drawing; CLIP chooses

    def captions(self, numbers: list[int]) -> list[Any]:
        """What is said of each picture, or {"unread": why it cannot be read}."""
        return self._read(numbers, lambda _, images: self.pipe.caption(images))

    def answers(self, numbers: list[int]) -> list[Any]:
        """What is answered to each question, or {"unread": why its picture cannot be read}."""

        def make(numbers: list[int], images: list[Image.Image]) -> list[str]:
            questions = [self.examples[n].text for n in numbers]
            return self.pipe.ask(images, questions, check_answerable=self.asks_first)

        return self._read(numbers, make)

    def _read(
        self, numbers: list[int], make: Callable[[list[int], list[Image.Image]], list[str]],
    ) -> list[Any]:  # fmt: skip
        """What is said of the pictures of examples; of one that cannot be read, why."""
        images: dict[int, Image.Image] = {}
        found: dict[int, Any] = {}
        for number in numbers:
            try:
                images[number] = open_image(self.examples[number].image or "")
            except InputError as error:
                found[number] = {"unread": str(error)}
        if images:
            said = make(list(images), list(images.values()))
            found |= zip(images, said, strict=True)
        return [found[number] for number in numbers]

    def pictures(self, numbers: list[int]) -> list[dict[str, Any]]:
        """Files of the pictures of captions, and CLIP's scores of them and of the first drawn."""
        found = []
        for number, (image, first) in zip(numbers, self._drawn(numbers), strict=True):
            example = self.examples[number]
            made: dict[str, Any] = {"files": self.drawings.save(f"{example.name}.png", image)}
            if self.clip:
                made["clip"] = self.clip.score(example.text, image)
                made["first"] = self.clip.score(example.text, first)
            found.append(made)
        return found

    def _drawn(
        self, numbers: list[int], sample: int = 0
    ) -> list[tuple[Image.Image, Image.Image]]:  # fmt: skip
        """Pictures of texts, each with the first of its candidates."""
        base = self.seed * SEED_STEP + sample * len(self.examples)
        texts, seeds = [self.examples[n].text for n in numbers], [base + n for n in numbers]
        if self.candidates == 1 or self.clip is None:
            images = self.pipe.draw(texts, seed=seeds, best_of=1)
            return list(zip(images, images, strict=True))
        shown, clip = [], self.clip

        def score(words: str, image: Image.Image) -> float:
            shown.append(image)  # candidates come in turn
            return clip.score(words, image)

        images = self.pipe.draw(texts, seed=seeds, best_of=self.candidates, scorer=score)
        return list(zip(images, shown[:: self.candidates], strict=True))

    def samples(self, numbers: list[int]) -> list[dict[str, Any]]:
        """GenEval's folders: NNNNN/metadata.jsonl, NNNNN/samples/0000.png to 0003.png."""
        found: list[dict[str, str]] = []
        for number in numbers:
            one = self.examples[number]
            about = json.dumps(one.raw).encode()
            found.append(self.drawings.write(f"{one.name}/metadata.jsonl", about))
        for sample in range(GENEVAL_SAMPLES):
            drawn = self._drawn(numbers, sample)
            for number, files, (image, _) in zip(numbers, found, drawn, strict=True):
                name = f"{self.examples[number].name}/samples/{sample:04d}.png"
                files |= self.drawings.save(name, image)
        return [{"files": files} for files in found]

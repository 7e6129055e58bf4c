"""`lavit eval MODEL --task NAME --data DIR`: one row of the paper's table (method, Sec. 6).

Text is written by the protocol "paper"; pictures are the best of four by CLIP where its folder is
given. Every prediction is kept, so a killed run goes on. Under torchrun each process makes its
share of the chunks into a file of its own, and the first one waits for the others' files and
scores: processes meet on the disk alone. Beside the figures stand prompts, crops, resizes, seeds,
versions, and hashes of code, weights and data.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import lavit
from lavit.config import PARTS, TO_READ, InputError
from lavit.evaluate.benchmarks.answer_metrics import exact_match, vqa_accuracy
from lavit.evaluate.benchmarks.caption_metrics import (
    ORDERS,
    bleu,
    bleu_counts,
    caption_words,
    cider,
    rouge_l,
)
from lavit.evaluate.benchmarks.geneval2 import geneval2_figures
from lavit.evaluate.benchmarks.image_metrics import (
    Clip,
    Inception,
    centre_square,
    frechet_distance,
    kernel_distances,
)
from lavit.evaluate.benchmarks.layouts import Example, benchmark, load_examples
from lavit.evaluate.examinee import SEED_STEP, config_hash, hash_of, weights_hash
from lavit.evaluate.figures import (
    Figure,
    average,
    averages,
    bootstrapped,
    mean,
    nothing,
    plain,
)
from lavit.evaluate.kept import TOGETHER, Kept, Progress
from lavit.files import alone
from lavit.generate.pipeline import Pipeline
from lavit.generate.protocols import BEST_OF
from lavit.images import open_image
from lavit.layout import question_text
from lavit.storage import model_folder

SIDE = 256  # pixels at which pictures are compared
GENEVAL_SAMPLES = 4  # pictures of a prompt
SECONDS_BETWEEN_LOOKS = 1.0  # for what other processes made
POINTS = (0.0, 100.0)
PACKAGES = ("torch", "transformers", "diffusers", "numpy", "pillow")


@dataclass(frozen=True)
class RowSettings:
    """What a row is made with, beside model, task and data."""

    seed: int = 0
    count: int | None = None  # examples; None: all
    batch: int = TOGETHER  # examples that are made together
    inception: Path | None = None  # a TorchScript file, for FID and KID
    clip: Path | None = None  # a transformers folder, for CLIPScore and the best of four
    out: Path | None = None  # folder for the pictures that are drawn


class Row:
    """One model on one benchmark."""

    def __init__(
        self, model: str | Path, name: str, data: Path, settings: RowSettings, kept: Path,
        progress: Progress = lambda task, done, count: None,
    ) -> None:  # fmt: skip
        self.known, self.name, self.settings = benchmark(name), name, settings
        _check(self.known.kind, settings)
        self.rank, self.ranks = (int(os.environ.get(k, d)) for k, d in _PLACE)
        self.examples, self.data_hash = load_examples(name, data, settings.count)
        self.folder = model_folder(model)
        self.out = settings.out or kept.with_suffix(".pictures")
        draws = self.known.kind in ("picture", "export", "atoms")
        device = "auto"
        if self.ranks > 1 and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', self.rank)}"
        parts = PARTS if draws else TO_READ
        self.pipe: Pipeline = lavit.load(
            self.folder, device=device, safety=False, protocol="paper", parts=parts
        )
        self.device = self.pipe.model.device
        self.clip = Clip(settings.clip, self.device) if settings.clip else None
        self.weights = weights_hash(self.folder)
        self.protocol = self._protocol()
        said = [self.name, self.data_hash, self.weights, config_hash(self.folder), settings.seed]
        said += [json.dumps(self.protocol, default=str), code_hash()]
        self.key = hashlib.sha256(repr(said).encode()).hexdigest()[:16]
        self.path, self.progress = kept, progress

    def run(self) -> dict[str, Any] | None:
        """The row as plain data, or None in a process that only made its share."""
        file = _shared_file(self.path, self.rank)
        with alone(file.parent, file.name):
            kept = Kept(file, self.key, self.progress)
            for other in self._others():
                kept.take(other)
            self._made(kept, self._share())
            if self.rank:
                return None
            self._wait(kept)
            return self._entry(self._figures(self._made(kept, range(len(self.examples)))))

    def _others(self) -> list[Path]:
        mine = _shared_file(self.path, self.rank)
        return sorted(path for path in _files_of(self.path) if path != mine)

    def _share(self) -> list[int]:
        """Numbers of the examples of this process: whole chunks, dealt in turn."""
        batch = self.settings.batch
        numbers = range(len(self.examples))
        return [n for n in numbers if n // batch % self.ranks == self.rank]

    def _wait(self, kept: Kept) -> None:
        """Until the other processes have made their shares."""
        sizes: dict[Path, int] = {}
        every = range(len(self.examples))
        while kept.missing(self.name, every, self.settings.batch):
            time.sleep(SECONDS_BETWEEN_LOOKS)
            for path in self._others():
                if path.stat().st_size != sizes.get(path):
                    sizes[path] = path.stat().st_size
                    kept.take(path)

    def _made(self, kept: Kept, numbers: Sequence[int]) -> list[Any]:
        make: Mapping[str, Callable[[list[int]], list[Any]]] = {
            "caption": self._captions,
            "vqa": self._answers,
            "match": self._answers,
            "picture": self._pictures,
            "atoms": self._pictures,
            "export": self._samples,
        }
        return kept.made(
            self.name, list(numbers), make[self.known.kind], together=self.settings.batch
        )

    def _captions(self, numbers: list[int]) -> list[str]:
        return self.pipe.caption([str(self.examples[n].image) for n in numbers])

    def _answers(self, numbers: list[int]) -> list[str]:
        asked = [self.examples[n] for n in numbers]
        images, questions = [str(one.image) for one in asked], [one.text for one in asked]
        return self.pipe.ask(images, questions, check_answerable=self.name == "vizwiz")

    def _pictures(self, numbers: list[int]) -> list[dict[str, Any]]:
        """Files of the pictures of captions, and CLIP's scores of them."""
        found = []
        for number, image in zip(numbers, self._drawn(numbers), strict=True):
            example = self.examples[number]
            file = _written(image, self.out / f"{example.name}.png")
            score = self.clip.score(example.text, image) if self.clip else None
            found.append({"file": file.name, "clip": score})
        return found

    def _drawn(self, numbers: list[int], sample: int = 0) -> list[Image.Image]:
        base = self.settings.seed * SEED_STEP + sample * len(self.examples)
        how: dict[str, Any] = {"best_of": 1}
        if self.clip and self.known.kind == "picture":
            how = {"best_of": BEST_OF, "scorer": self.clip.score}
        texts = [self.examples[n].text for n in numbers]
        return self.pipe.draw(texts, seed=[base + n for n in numbers], **how)

    def _samples(self, numbers: list[int]) -> list[dict[str, Any]]:
        """GenEval's folders: NNNNN/metadata.jsonl, NNNNN/samples/0000.png to 0003.png."""
        for number in numbers:
            one = self.examples[number]
            place = self.out / one.name
            (place / "samples").mkdir(parents=True, exist_ok=True)
            (place / "metadata.jsonl").write_text(json.dumps(one.raw), encoding="utf-8")
        for sample in range(GENEVAL_SAMPLES):
            for number, image in zip(numbers, self._drawn(numbers, sample), strict=True):
                place = self.out / self.examples[number].name / "samples"
                _written(image, place / f"{sample:04d}.png")
        return [{"samples": GENEVAL_SAMPLES} for _ in numbers]

    def _figures(self, made: list[Any]) -> dict[str, Figure]:
        if self.known.kind == "caption":
            return caption_figures(self.examples, made)
        if self.known.kind == "picture":
            return self._distances(made)
        if self.known.kind == "atoms":
            drawn = [self.out / one["file"] for one in made]
            return geneval2_figures([one.raw for one in self.examples], drawn, self.out)
        if self.known.kind == "export":
            note = f"folders in {self.out}, for GenEval's evaluate_images.py"
            return {"geneval_exported": plain(len(made), len(made), note=note)}
        pairs = list(zip(made, self.examples, strict=True))
        groups = [one.group or "all" for one in self.examples]
        if self.known.kind == "match":
            values = [exact_match(said, one.references[0]) for said, one in pairs]
            return {"exact_match": mean(values, within=POINTS)}
        values = [vqa_accuracy(said, one.references) for said, one in pairs]
        return {"vqa_accuracy": mean(values, within=POINTS, details=averages(groups, values))}

    def _distances(self, made: list[dict[str, Any]]) -> dict[str, Figure]:
        """FID and KID against the pictures of the same captions, and CLIPScore."""
        lacking = nothing("no CLIP folder was given: --clip FOLDER")
        found = {"fid": nothing("no Inception file was given: --inception FILE")}
        found["kid"] = found["fid"]
        if self.settings.inception is not None:
            network = Inception(self.settings.inception, self.device)
            drawn = [self.out / one["file"] for one in made]
            ours = self._features(network, drawn, "drawn pictures")
            real = [one.image for one in self.examples if one.image is not None]
            theirs = self._features(network, real, "real pictures")
            kid = kernel_distances(ours, theirs)
            found["fid"] = plain(frechet_distance(ours, theirs), len(made))
            found["kid"] = Figure(average(kid), *_quantiles(kid), len(made), note="x 1")
        scores = [one["clip"] for one in made]
        found["clip_score"] = mean(scores, within=POINTS) if self.clip else lacking
        return found

    def _features(self, network: Inception, paths: Sequence[Path], what: str) -> np.ndarray:
        parts = []
        for at in range(0, len(paths), self.settings.batch):
            some = paths[at : at + self.settings.batch]
            parts.append(network.features([centre_square(open_image(p), SIDE) for p in some]))
            self.progress(what, at + len(some), len(paths))
        return np.concatenate(parts)

    def _protocol(self) -> dict[str, Any]:
        """How predictions are made and compared, in words and numbers."""
        said, kind = self.pipe.protocol, self.known.kind
        vision = self.pipe.model.config.vision
        read = f"squashed to {vision.image_size} px, bicubic, no crop"
        if kind == "caption":
            return {"prompt": "none: the picture alone", "picture": read,
                    "sampling": asdict(said.caption), "cut_before": said.caption_ends,
                    "words": "Penn Treebank, lower case, no punctuation"}  # fmt: skip
        if kind in ("vqa", "match"):
            found = {"prompt": question_text("{question}"), "picture": read,
                     "sampling": asdict(said.answer), "cut_before": said.answer_ends,
                     "lemmatised": False}  # fmt: skip
            return found | {"asks_first": self.name == "vizwiz"}
        candidates = BEST_OF if self.clip and kind == "picture" else 1
        found = {
            "prompt": "the caption as it stands",
            "sampling": asdict(said.drawing),
            "decoder": f"{self.pipe.model.config.pixels.size} px, steps and guidance its own",
            "candidates": candidates,
            "chosen_by": _hashed(self.settings.clip) if candidates > 1 else None,
        }
        if kind == "picture":
            found["compared_at"] = f"centre square of {SIDE} px, bicubic, both sides"
            found["inception"] = _hashed(self.settings.inception)
        if kind == "atoms":
            found["judged_by"] = "the detector of scenes, a score of 0 or 1 an atom"
        return found

    def _entry(self, figures: Mapping[str, Figure]) -> dict[str, Any]:
        return {
            "task": self.name,
            "split": self.known.split,
            "figures": {name: figure.entry() for name, figure in figures.items()},
            "paper": dict(zip(("LaVIT", "v1", "v2"), self.known.paper, strict=False)),
            "protocol": self.protocol,
            "seed": self.settings.seed,
            "examples": len(self.examples),
            "config_hash": config_hash(self.folder),
            "weights_hash": self.weights,
            "data_hash": self.data_hash,
            "code_hash": code_hash(),
            "versions": {"lavit": lavit.__version__}
            | {name: importlib.metadata.version(name) for name in PACKAGES},
            "device": f"{self.device} {self.pipe.model.dtype}",
        }


_PLACE = (("RANK", "0"), ("WORLD_SIZE", "1"))


def _check(kind: str, settings: RowSettings) -> None:
    """Raise `InputError` for settings that a benchmark has no use for, or that are wrong."""
    if settings.batch < 1:
        raise InputError(f"batch is {settings.batch}: give the number of examples, 1 or more")
    if settings.count is not None and settings.count < 1:
        raise InputError(f"count is {settings.count}: give the number of examples, 1 or more")
    if settings.seed < 0:
        raise InputError(f"seed is {settings.seed}: give a number from 0")
    for name in ("inception", "clip"):
        if getattr(settings, name) is not None and kind != "picture":
            raise InputError(f"--{name} is for coco_image alone: leave it out")
    if kind == "picture" and settings.inception is None and settings.clip is None:
        raise InputError("coco_image needs --inception FILE (FID, KID), --clip FOLDER, or both")
    if settings.inception is not None and not settings.inception.is_file():
        raise InputError(f"there is no file {settings.inception}: give --inception a TorchScript")


def caption_figures(examples: Sequence[Example], said: Sequence[str]) -> dict[str, Figure]:
    """CIDEr-D, BLEU and ROUGE-L of captions; CIDEr-D by domain where there are any."""
    words = [caption_words(text) for text in said]
    references = [[caption_words(text) for text in one.references] for one in examples]
    counts = bleu_counts(words, references)
    found = {"cider": mean(cider(words, references))}
    for n in range(1, ORDERS + 1):
        found[f"bleu_{n}"] = bootstrapped(partial(_bleu_of, counts, n), len(words))
    rouge = [rouge_l(*pair) for pair in zip(words, references, strict=True)]
    found["rouge_l"] = mean(rouge, within=POINTS)
    for group in sorted({one.group for one in examples} - {""}):
        at = [n for n, one in enumerate(examples) if one.group == group]
        scores = cider([words[n] for n in at], [references[n] for n in at])
        found[f"cider_{group.replace('-', '_')}"] = mean(scores)
    return found


def _bleu_of(counts: np.ndarray, n: int, at: np.ndarray) -> float:
    return bleu(counts[at], n)


def _quantiles(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def _shared_file(path: Path, rank: int) -> Path:
    return path if not rank else path.with_suffix(f".{rank}{path.suffix}")


def _files_of(path: Path) -> list[Path]:
    """Files of predictions of all processes, of this run and of those before."""
    others = path.parent.glob(f"{path.stem}.*{path.suffix}")
    return [*[path] * path.is_file(), *(p for p in others if p.suffixes[-2][1:].isdigit())]


def _written(image: Image.Image, path: Path) -> Path:
    """A picture, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    image.save(new, format="PNG")
    os.replace(new, path)
    return path


def _hashed(path: Path | None) -> str | None:
    """Name and hash of a file, or of the weights of a folder."""
    if path is None:
        return None
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return f"{path.name} {hash_of(files)}"


def code_hash() -> str:
    """A hash of this package's code."""
    return hash_of(sorted(Path(lavit.__file__).parent.rglob("*.py")))

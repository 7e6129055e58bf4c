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
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lavit
from lavit.config import PARTS, TO_READ, InputError
from lavit.evaluate.benchmarks.drawn import Drawings
from lavit.evaluate.benchmarks.geneval2 import geneval2_figures
from lavit.evaluate.benchmarks.image_metrics import Clip, Inception, centre_square
from lavit.evaluate.benchmarks.layouts import benchmark, load_examples
from lavit.evaluate.benchmarks.making import Maker
from lavit.evaluate.benchmarks.scores import (
    POINTS,
    answer_figures,
    caption_figures,
    distance_figures,
    is_unread,
    match_figures,
    unread_note,
)
from lavit.evaluate.examinee import code_hash, config_hash, hash_of, weights_hash
from lavit.evaluate.figures import Figure, mean, nothing, plain
from lavit.evaluate.kept import TOGETHER, Kept, Progress
from lavit.files import alone
from lavit.generate.pipeline import Pipeline
from lavit.images import open_image
from lavit.layout import question_text
from lavit.storage import model_folder

log = logging.getLogger(__name__)
SIDE = 256  # pixels at which pictures are compared
SECONDS_BETWEEN_LOOKS = 1.0  # for what other processes made
OF_CLIP = (".safetensors", ".bin", ".json", ".txt", ".model")  # files of a transformers folder
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
    protocol: str = "paper"  # how text and pictures are sampled


class Row:
    """One model on one benchmark."""

    def __init__(
        self, model: str | Path, name: str, data: Path, settings: RowSettings, kept: Path,
        progress: Progress = lambda task, done, count: None,
    ) -> None:  # fmt: skip
        self.known, self.name, self.settings = benchmark(name), name, settings
        self.draws = self.known.kind in ("picture", "export", "atoms")
        _check(self.known.kind, settings)
        self.rank, self.ranks = _place()
        self.examples, self.data_hash = load_examples(name, data, settings.count, progress)
        if settings.inception is not None and len(self.examples) < 2:
            raise InputError("FID and KID compare sets of pictures: give 2 examples or more")
        self.folder = model_folder(model)
        self.drawings = Drawings((settings.out or kept.with_suffix(".pictures")).resolve())
        device = "auto"
        if self.ranks > 1 and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', self.rank)}"
        parts = PARTS if self.draws else TO_READ
        self.pipe: Pipeline = lavit.load(
            self.folder, device=device, safety=False, protocol=settings.protocol, parts=parts
        )
        self.device = self.pipe.model.device
        self.clip = Clip(settings.clip, self.device) if settings.clip else None
        self.inception = Inception(settings.inception, self.device) if settings.inception else None
        self.maker = Maker(
            self.pipe,
            self.examples,
            self.drawings,
            clip=self.clip,
            seed=settings.seed,
            asks_first=name == "vizwiz" and settings.protocol != "default",
        )
        self.weights = weights_hash(self.folder)
        self.protocol = self._protocol()
        self.notes: list[str] = []
        said = [self.name, self.data_hash, self.weights, config_hash(self.folder), settings.seed]
        said += [json.dumps(self.protocol, default=str), code_hash()]
        said += [self.device.type, str(self.pipe.model.dtype)]
        self.key = hashlib.sha256(repr(said).encode()).hexdigest()[:16]
        self.path, self.progress = kept, progress

    def run(self) -> dict[str, Any] | None:
        """The row as plain data, or None in a process that only made its share."""
        file = _shared_file(self.path, self.rank)
        with ExitStack() as locks:
            locks.enter_context(alone(file.parent, file.name))
            how: dict[str, Any] = {"names": [example.name for example in self.examples]}
            if self.draws:
                folder = _shared_file(self.drawings.folder, self.rank)
                locks.enter_context(alone(folder.parent, folder.name))
                how["valid"] = self.drawings.there
            kept = Kept(file, self.key, self.progress, **how)
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
        if kept.missing(self.name, every, self.settings.batch):
            others = ", ".join(map(str, range(1, self.ranks)))
            log.info(
                "waiting for RANK %s of WORLD_SIZE %d to make their shares", others, self.ranks
            )
        while kept.missing(self.name, every, self.settings.batch):
            time.sleep(SECONDS_BETWEEN_LOOKS)
            for path in self._others():
                if path.stat().st_size != sizes.get(path):
                    sizes[path] = path.stat().st_size
                    kept.take(path)

    def _made(self, kept: Kept, numbers: Sequence[int]) -> list[Any]:
        make: Mapping[str, Callable[[list[int]], list[Any]]] = {
            "caption": self.maker.captions,
            "vqa": self.maker.answers,
            "match": self.maker.answers,
            "picture": self.maker.pictures,
            "atoms": self.maker.pictures,
            "export": self.maker.samples,
        }
        return kept.made(
            self.name, list(numbers), make[self.known.kind], together=self.settings.batch
        )

    def _figures(self, made: list[Any]) -> dict[str, Figure]:
        kind, examples = self.known.kind, self.examples
        unread = [one.name for one, said in zip(examples, made, strict=True) if is_unread(said)]
        if unread:
            self.notes.append(unread_note(unread, "counted as wrong"))
        if kind == "picture":
            return self._distances(made)
        if kind == "atoms":
            drawn = [path for one in made for path in self.drawings.paths(one)]
            return geneval2_figures([one.raw for one in examples], drawn, self.drawings.folder)
        if kind == "export":
            note = f"folders in {self.drawings.folder}, for GenEval's evaluate_images.py"
            return {"geneval_exported": plain(len(made), len(made), note=note)}
        of = {"caption": caption_figures, "match": match_figures, "vqa": answer_figures}
        return of[kind](examples, made)

    def _distances(self, made: list[dict[str, Any]]) -> dict[str, Figure]:
        """FID and KID against the pictures of the same captions, and CLIPScore."""
        found = dict.fromkeys(
            ("fid", "kid"), nothing("no Inception file was given: --inception FILE")
        )
        if self.inception is not None:
            drawn = [path for one in made for path in self.drawings.paths(one)]
            ours = self._features(self.inception, drawn, "drawn pictures")
            real = [one.image for one in self.examples if one.image is not None]
            theirs = self._features(self.inception, real, "real pictures")
            if min(len(ours), len(theirs)) < 2:
                raise InputError("FID and KID need 2 real pictures or more that can be read")
            found = distance_figures(ours, theirs)
        found["clip_score"] = nothing("no CLIP folder was given: --clip FOLDER")
        if self.clip:
            best, first = ([one[which] for one in made] for which in ("clip", "first"))
            note = ""
            if self.maker.candidates > 1:
                note = f"of the best of {self.maker.candidates} by this same CLIP, which flatters"
                found["clip_score_first"] = mean(first, within=POINTS)
            found["clip_score"] = mean(best, within=POINTS, note=note)
        return found

    def _features(self, network: Inception, paths: Sequence[Path], what: str) -> np.ndarray:
        """Features of the pictures that can be read."""
        parts, unread = [], []
        for at in range(0, len(paths), self.settings.batch):
            squares = []
            for path in paths[at : at + self.settings.batch]:
                try:
                    squares.append(centre_square(open_image(path), SIDE))
                except InputError:
                    unread.append(path.name)
            if squares:
                parts.append(network.features(squares))
            self.progress(what, min(len(paths), at + self.settings.batch), len(paths))
        if unread:
            self.notes.append(unread_note(unread, "left out of FID and KID"))
        return np.concatenate(parts) if parts else np.empty((0, 1))

    def _protocol(self) -> dict[str, Any]:
        """How predictions are made and compared, in words and numbers."""
        said, kind = self.pipe.protocol, self.known.kind
        vision = self.pipe.model.config.vision
        read = f"squashed to {vision.image_size} px, bicubic, no crop"
        if kind == "caption":
            return {"protocol": said.name, "prompt": "none: the picture alone", "picture": read,
                    "sampling": asdict(said.caption), "cut_before": said.caption_ends,
                    "words": "Penn Treebank, lower case, no punctuation"}  # fmt: skip
        if kind in ("vqa", "match"):
            found = {"protocol": said.name, "prompt": question_text("{question}"), "picture": read,
                     "sampling": asdict(said.answer), "cut_before": said.answer_ends,
                     "lemmatised": False}  # fmt: skip
            return found | {"asks_first": self.maker.asks_first}
        found = {
            "protocol": said.name,
            "prompt": "the caption as it stands",
            "sampling": asdict(said.drawing),
            "decoder": f"{self.pipe.model.config.pixels.size} px, steps and guidance its own",
            "candidates": self.maker.candidates,
            "chosen_by": _hashed(self.settings.clip) if self.maker.candidates > 1 else None,
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
            "notes": self.notes,
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


def _place() -> tuple[int, int]:
    """Number of this process and how many there are, as torchrun says in RANK and WORLD_SIZE."""
    said = {
        name: os.environ.get(name, usual) for name, usual in (("RANK", "0"), ("WORLD_SIZE", "1"))
    }
    try:
        rank, ranks = (int(value) for value in said.values())
    except ValueError:
        rank, ranks = 0, 0
    if not 0 <= rank < ranks:
        shown = " ".join(f"{name}={value}" for name, value in said.items())
        raise InputError(f"{shown} name no process: torchrun gives RANK from 0 below WORLD_SIZE")
    return rank, ranks


def _check(kind: str, settings: RowSettings) -> None:
    """Raise `InputError` for settings that a benchmark has no use for, or that are wrong."""
    if settings.batch < 1:
        raise InputError(f"batch is {settings.batch}: give the number of examples, 1 or more")
    if settings.count is not None and settings.count < 1:
        raise InputError(f"count is {settings.count}: give the number of examples, 1 or more")
    if settings.seed < 0:
        raise InputError(f"seed is {settings.seed}: give a number from 0")
    if settings.out is not None and kind not in ("picture", "export", "atoms"):
        raise InputError("--pictures is for tasks that draw: leave it out")
    for name in ("inception", "clip"):
        if getattr(settings, name) is not None and kind != "picture":
            raise InputError(f"--{name} is for coco_image alone: leave it out")
    if kind == "picture" and settings.inception is None and settings.clip is None:
        raise InputError("coco_image needs --inception FILE (FID, KID), --clip FOLDER, or both")
    if settings.inception is not None and not settings.inception.is_file():
        raise InputError(f"there is no file {settings.inception}: give --inception a TorchScript")


def _shared_file(path: Path, rank: int) -> Path:
    return path if not rank else path.with_suffix(f".{rank}{path.suffix}")


def _files_of(path: Path) -> list[Path]:
    """Files of predictions of all processes, of this run and of those before."""
    others = path.parent.glob(f"{path.stem}.*{path.suffix}")
    return [*[path] * path.is_file(), *(p for p in others if p.suffixes[-2][1:].isdigit())]


def _hashed(path: Path | None) -> str | None:
    """Name and hash of a file, or of weights, configuration and tokenizer of a folder."""
    if path is None:
        return None
    files = [path]
    if path.is_dir():
        files = sorted(one for one in path.iterdir() if one.suffix in OF_CLIP)
    return f"{path.name} {hash_of(files)}"

"""Figures that any pictures have: on data of a user's own, on the share that training left out.

A source with a split of its own for this (test, validation, valid) is measured on that; else on its
records held out by hash (data/held_out.py). A source of fewer than 40 pictures has neither, and is
measured on what it was trained on, which is said.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from lavit.config import InputError
from lavit.data.corpus import Corpus, load_corpus, origin_of, parse_mixture
from lavit.data.held_out import HELD_OUT, SHARE, divides
from lavit.data.sources import Record
from lavit.evaluate.distance import distance_figure, jpeg_bytes
from lavit.evaluate.examinee import (
    Examinee,
    Missing,
    chosen,
    config_hash,
    measured,
    scenes_of,
    training_of,
)
from lavit.evaluate.figures import (
    Figure,
    average,
    bootstrapped,
    mean,
    plain,
    share,
    spearman,
    turned,
)
from lavit.generate.score import drawn_likelihood, likelihood, text_likelihood

SPLITS = (HELD_OUT, "test", "validation", "valid")


class Opened(Sequence[Image]):
    """Pictures that are opened when they are asked for."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, place: int) -> Image:  # type: ignore[override]  # no slices
        return self.records[place].open()


class OwnPictures:
    """Pictures of a user's own, with what figures need of them."""

    def __init__(self, exam: Examinee, corpus: Corpus) -> None:
        self.exam = exam
        self.pictures = corpus.pictures[: exam.count]
        self.images = Opened([one.record for one in self.pictures])
        self.features = exam.features(self.images)  # BATCH at a time
        self.tokens = exam.tokenizer.encode(self.features)
        self.lengths = self.tokens.lengths.cpu().numpy().astype(np.float64)
        names = repr([one.record.name for one in self.pictures])
        self.name = hashlib.sha256(names.encode()).hexdigest()[:12]

    def text(self, number: int) -> str:
        """The first text of a picture."""
        return self.pictures[number].captions[0]

    def captioned(self) -> list[int]:
        """Numbers of the pictures that have texts; none raises `Missing`."""
        found = [number for number, one in enumerate(self.pictures) if one.captions]
        if not found:
            raise Missing("no picture of this data has a text")
        self.exam.needs("language")
        return found


def is_scenes(data: str) -> bool:
    """Is a source, or one of a mixture, scenes: "scenes", or a data set of `lavit data scenes`?"""
    for name, _ in parse_mixture(data):
        path = Path(name)
        endless = path.name.partition(":")[0] == "scenes" and not path.exists()
        if endless or "scenes" in origin_of(name):
            return True
    return False


def training_data(folder: Path) -> str | None:
    """The data that a model was trained on; None where its folder does not say, or names scenes
    that are drawn anew. Raises `InputError` for others that are not here.
    """
    data = training_of(folder).get("data")
    if not data:
        return None
    gone = [name for name, _ in parse_mixture(data) if not Path(name).exists()]
    if not gone:
        return str(data)
    if scenes_of(folder) is not None or is_scenes(data):
        return None
    said = f"{folder} was trained on {gone[0]}, which is not here"
    raise InputError(f"{said}: say with --data where it is (scenes: for figures of those)")


def held_out(data: str) -> tuple[Corpus, str]:
    """What of some data a model is measured on, and in words what that is."""
    reasons: list[InputError] = []
    for split in SPLITS:
        try:
            corpus = load_corpus(data, (split,))
        except InputError as error:
            reasons.append(error)
            continue
        said = f"the split {split} of {data}"
        if split == HELD_OUT and any(divides(Path(name)) for name, _ in parse_mixture(data)):
            said = f"held out by hash: {100 * SHARE:.0f} % of {data}"
        return corpus, f"{said}, {len(corpus.pictures)} pictures"
    try:
        corpus = load_corpus(data)
    except InputError:
        raise reasons[0] from None
    said = f"NOT held out: all {len(corpus.pictures)} pictures of {data}"
    return corpus, f"{said}, which training may have seen ({reasons[0]})"


def distance(material: OwnPictures) -> Figure:
    """Mean 1 - cos between features and those rebuilt from codes."""
    features = material.features
    half = features[: max(1, len(features) // 2)]
    return distance_figure(material.exam.tokenizer, features, material.tokens.keep, half)


def codes_used(material: OwnPictures) -> Figure:
    """Share of the codebook that these pictures use at least once."""
    size, total = material.exam.tokenizer.config.codes, len(material.tokens.codes)
    used = len(material.tokens.codes.unique())
    note = f"{used} of {size} codes in {total} tokens"
    return plain(used / size, len(material.pictures), note=note)


def token_rank(material: OwnPictures) -> Figure:
    """Rank correlation of tokens with the bytes of the picture as a JPEG of the encoder's size."""
    side = material.exam.model.config.vision.image_size
    sizes = np.array([jpeg_bytes(image.resize((side, side))) for image in material.images])
    lengths = material.lengths
    floor = ("chance", 0.0)
    return bootstrapped(lambda at: spearman(lengths[at], sizes[at]), len(lengths), floor=floor)


def caption_losses(material: OwnPictures, *, blind: bool = False) -> list[float]:
    """Mean loss of a token of each picture's text, and of its end; `blind`: shown another."""
    exam, numbers = material.exam, material.captioned()
    shown = turned(numbers, 1) if blind else numbers

    def make(chosen: list[int]) -> list[float]:
        pairs = ((material.text(numbers[n]), material.images[shown[n]]) for n in chosen)
        return [-likelihood(exam.model, text, image) for text, image in pairs]

    task = f"loss{' blind' * blind} {material.name}"
    return exam.made(task, range(len(numbers)), make)


def drawing_losses(material: OwnPictures, *, blind: bool = False) -> list[float]:
    """Mean loss of a code of each picture behind its text; `blind`: behind another's."""
    exam, numbers, codes = material.exam, material.captioned(), material.tokens.split()
    told = turned(numbers, 1) if blind else numbers

    def make(chosen: list[int]) -> list[float]:
        pairs = ((material.text(told[n]), codes[numbers[n]].tolist()) for n in chosen)
        return [-drawn_likelihood(exam.model, text, tuple(own)) for text, own in pairs]

    task = f"code loss{' blind' * blind} {material.name}"
    return exam.made(task, range(len(numbers)), make)


def text_losses(material: OwnPictures) -> list[float]:
    """Mean loss of a token of each picture's text alone, and of its end."""
    exam, numbers = material.exam, material.captioned()

    def make(chosen: list[int]) -> list[float]:
        return [-text_likelihood(exam.model, material.text(numbers[n])) for n in chosen]

    return exam.made(f"text loss {material.name}", range(len(numbers)), make)


def caption_loss(material: OwnPictures) -> Figure:
    """Mean loss of a token of texts; the floor is with another picture."""
    floor = average(caption_losses(material, blind=True))
    return mean(caption_losses(material), floor=("another picture", floor))


def drawing_loss(material: OwnPictures) -> Figure:
    """Mean loss of a code behind the picture's text; the floor is behind another's."""
    floor = average(drawing_losses(material, blind=True))
    return mean(drawing_losses(material), floor=("another's text", floor))


def caption_exact(material: OwnPictures) -> Figure:
    """Share of captions that are one of the picture's texts, but for case and marks at the end."""
    numbers = material.captioned()
    said = material.exam.captions(
        f"caption {material.name}",
        range(len(numbers)),
        lambda place: material.images[numbers[place]],
    )
    known = [{_plain(text) for text in material.pictures[n].captions} for n in numbers]

    def hits(said: Sequence[str]) -> list[bool]:
        return [_plain(text) in right for text, right in zip(said, known, strict=True)]

    return share(hits(said), floor=("another picture's caption", average(hits(turned(said, 1)))))


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".! ")


def _spread(lengths: np.ndarray) -> float:
    return float(lengths.std() / lengths.mean())


FIGURES: Mapping[str, Callable[[OwnPictures], Figure]] = {
    "tokenizer_distance": distance,
    "live_codes": codes_used,
    "kept_share": lambda of: mean(of.lengths / of.tokens.keep.shape[1]),
    "tokens_mean": lambda of: mean(of.lengths),
    "tokens_spread": lambda of: bootstrapped(lambda at: _spread(of.lengths[at]), len(of.lengths)),
    "tokens_spearman_bytes": token_rank,
    "caption_loss": caption_loss,
    "caption_exact": caption_exact,
    "drawing_loss": drawing_loss,
    "text_loss": lambda of: mean(text_losses(of)),
}


def own_data(exam: Examinee, data: str, names: Sequence[str]) -> dict[str, Any]:
    """Figures of a model on data of a user's own, as plain data."""
    chosen(names, FIGURES)  # a wrong name is said before pictures are opened
    corpus, said = held_out(data)
    return {
        "figures": measured(FIGURES, names, OwnPictures(exam, corpus)),
        "config_hash": config_hash(exam.folder),
        "weights_hash": exam.weights,
        "held_out": said,
        "seed": exam.seed,
    }

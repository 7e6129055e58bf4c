"""Figures that any pictures have: on data of a user's own, on the share that training left out.

A source with a split of its own for this (test, validation, valid) is measured on that; else on its
records held out by hash (data/held_out.py). A source of fewer than 40 pictures has neither, and is
measured on what it was trained on, which is said.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from lavit.config import InputError, read_json
from lavit.data.corpus import Corpus, load_corpus, parse_mixture
from lavit.data.held_out import HELD_OUT, SHARE, divides
from lavit.evaluate.exam import Exam, Missing, config_hash, tokens_of
from lavit.evaluate.figures import Figure, bootstrapped, mean, nothing, plain, share, spearman
from lavit.evaluate.ladder import jpeg_bytes
from lavit.evaluate.tokens import constant_distance, distances
from lavit.generate.score import likelihood

SPLITS = (HELD_OUT, "test", "validation", "valid")


class Material:
    """Pictures of a user's own, with what figures need of them."""

    def __init__(self, exam: Exam, corpus: Corpus) -> None:
        self.exam = exam
        self.pictures = corpus.pictures[: exam.asked or len(corpus.pictures)]
        self.images: list[Image] = [one.record.open() for one in self.pictures]
        self.features = exam.features(self.images)
        self.tokens = tokens_of(exam.tokenizer, self.features)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each picture."""
        return self.tokens.lengths.cpu().numpy().astype(np.float64)

    def told(self) -> list[int]:
        """Numbers of the pictures that have texts; none raises `Missing`."""
        found = [number for number, one in enumerate(self.pictures) if one.captions]
        if not found:
            raise Missing("no picture of this data has a text")
        self.exam.needs("language")
        return found


def training_data(folder: Path) -> str | None:
    """The data of a user's own that a model was trained on, if its folder says and they are still
    there.
    """
    path = folder / "training.json"
    data = read_json(path).get("data") if path.is_file() else None
    pieces = [] if not data else [name for name, _ in parse_mixture(data)]
    return str(data) if pieces and all(Path(name).exists() for name in pieces) else None


def held_out(data: str) -> tuple[Corpus, str]:
    """What of some data a model is measured on, and in words what that is."""
    reasons: list[InputError] = []
    for split in SPLITS:
        try:
            corpus = load_corpus(data, (split,))
        except InputError as error:
            reasons.append(error)
            continue
        count = len(corpus.pictures)
        if split == HELD_OUT and any(divides(Path(name)) for name, _ in parse_mixture(data)):
            return corpus, f"held out by hash: {100 * SHARE:.0f} % of {data}, {count} pictures"
        return corpus, f"the split {split} of {data}, {count} pictures"
    try:
        corpus = load_corpus(data)
    except InputError:
        raise reasons[0] from None
    count = len(corpus.pictures)
    return (
        corpus,
        f"NOT held out: all {count} pictures of {data}, which training may have seen ({reasons[0]})",
    )


def distance(material: Material) -> Figure:
    """Mean 1 - cos between features and those rebuilt from codes."""
    tokenizer, features, keep = material.exam.tokenizer, material.features, material.tokens.keep
    half = max(1, len(features) // 2)
    floor = constant_distance(tokenizer, features, features[:half])
    best = float(np.mean(distances(tokenizer, features, keep, quantise=False)))
    values = distances(tokenizer, features, keep)
    return mean(
        "",
        values,
        floor=("mean feature of each place", floor),
        ceiling=("without the look-up", best),
    )


def codes_used(material: Material) -> Figure:
    """Share of the codebook that these pictures use at least once."""
    codes, size = material.tokens.codes.cpu().numpy(), material.exam.tokenizer.config.codes
    used = int((np.bincount(codes, minlength=size) > 0).sum())
    return plain(
        "",
        used / size,
        len(material.pictures),
        note=f"{used} of {size} codes in {len(codes)} tokens",
    )


def kept(material: Material) -> Figure:
    """Share of the patches that are kept."""
    return mean("", (material.lengths / material.tokens.keep.shape[1]).tolist())


def token_count(material: Material) -> Figure:
    """Tokens a picture."""
    return mean("", material.lengths.tolist())


def token_spread(material: Material) -> Figure:
    """Standard deviation of the number of tokens over its mean."""
    lengths = material.lengths
    return bootstrapped("", lambda at: float(lengths[at].std() / lengths[at].mean()), len(lengths))


def token_rank(material: Material) -> Figure:
    """Rank correlation of the number of tokens with the bytes of the picture as a JPEG of the
    encoder's size.
    """
    side = material.exam.model.config.vision.image_size
    sizes = np.array([jpeg_bytes(image.resize((side, side))) for image in material.images])
    lengths = material.lengths
    return bootstrapped("", lambda at: spearman(lengths[at], sizes[at]), len(lengths), floor=("chance", 0.0))


def caption_loss(material: Material) -> Figure:
    """Mean loss of a token of the pictures' texts, and of their end; the floor is that beside
    another picture.
    """
    exam, numbers = material.exam, material.told()

    def losses(task: str, other: int) -> list[float]:
        def make(chosen: list[int]) -> list[float]:
            images = [material.images[numbers[(place + other) % len(numbers)]] for place in chosen]
            texts = [material.pictures[numbers[place]].captions[0] for place in chosen]
            return [-likelihood(exam.model, text, image) for text, image in zip(texts, images, strict=True)]

        return exam.made(f"{task} {_name(material)}", range(len(numbers)), make)

    floor = ("another picture", float(np.mean(losses("loss blind", 1))))
    return mean("", losses("loss", 0), floor=floor)


def caption_exact(material: Material) -> Figure:
    """Share of captions that are one of the picture's texts, but for case and marks at the end."""
    exam, numbers = material.exam, material.told()

    def make(chosen: list[int]) -> list[str]:
        return exam.pipe.caption([material.images[numbers[place]] for place in chosen], seed=exam.seed)

    said = exam.made(f"caption {_name(material)}", range(len(numbers)), make)
    texts = [{_plain(text) for text in material.pictures[number].captions} for number in numbers]
    hits = [_plain(one) in known for one, known in zip(said, texts, strict=True)]
    turned = said[1:] + said[:1]
    floor = float(np.mean([_plain(one) in known for one, known in zip(turned, texts, strict=True)]))
    return share("", hits, floor=("another picture's caption", floor))


def _name(material: Material) -> str:
    names = repr([one.record.name for one in material.pictures])
    return hashlib.sha256(names.encode()).hexdigest()[:12]


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".! ")


FIGURES: Mapping[str, Callable[[Material], Figure]] = {
    "tokenizer_distance": distance,
    "live_codes": codes_used,
    "kept_share": kept,
    "tokens_mean": token_count,
    "tokens_spread": token_spread,
    "tokens_spearman_bytes": token_rank,
    "caption_loss": caption_loss,
    "caption_exact": caption_exact,
}


def own_data(exam: Exam, data: str, names: Sequence[str]) -> dict[str, Any]:
    """Figures of a model on data of a user's own, as plain data."""
    from lavit.evaluate.evaluation import chosen

    wanted = chosen(names, FIGURES)
    corpus, said = held_out(data)
    material = Material(exam, corpus)
    return {
        "figures": {
            name: _figure(partial(FIGURES[name], material), name, named=name in names).entry() for name in wanted
        },
        "config_hash": config_hash(exam.folder),
        "weights_hash": exam.weights,
        "held_out": said,
        "seed": exam.seed,
    }


def _figure(make: Callable[[], Figure], name: str, *, named: bool) -> Figure:
    try:
        return make()
    except Missing as missing:
        if named:
            raise InputError(f"{name} cannot be had: {missing}") from missing
        return nothing(name, str(missing))

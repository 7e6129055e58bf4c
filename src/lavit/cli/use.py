"""Verbs that use a model: caption, ask, draw, edit, reconstruct, tokenize, inspect."""

from __future__ import annotations

import time
from pathlib import Path

from lavit.cli.output import DEFAULT_MODEL, Model, Words, answer_with, load_model, write_pictures


def caption(images: Words[tuple[str, ...]], /, model: Model = DEFAULT_MODEL, json: bool = False) -> None:
    """Say what pictures show."""
    lavit = load_model(model, images)
    for image in images:
        started = time.perf_counter()
        answer = lavit.caption(image)
        seconds = round(time.perf_counter() - started, 3)
        tokens = int(lavit.tokenize(image).lengths[0])
        answer_with(json, answer, image=image, caption=answer, tokens=tokens, seconds=seconds)


def ask(image: Words[str], question: Words[str], /, model: Model = DEFAULT_MODEL, json: bool = False) -> None:
    """Answer a question about a picture."""
    answer = load_model(model, [image]).ask(image, question)
    answer_with(json, answer, image=image, question=question, answer=answer)


def draw(
    prompt: Words[str],
    /,
    out: Path,
    n: int = 1,
    model: Model = DEFAULT_MODEL,
    seed: int = 0,
    guidance: float | None = None,
    steps: int | None = None,
) -> None:
    """Draw a prompt; with --n 4, four pictures FILE-0 … FILE-3."""
    pictures = load_model(model).draw(prompt, n=n, seed=seed, guidance=guidance, steps=steps)
    write_pictures(pictures, out)


def edit(
    image: Words[str],
    prompt: Words[str],
    /,
    out: Path,
    n: int = 1,
    model: Model = DEFAULT_MODEL,
    seed: int = 0,
    guidance: float | None = None,
    steps: int | None = None,
) -> None:
    """Draw from a picture and an instruction."""
    pictures = load_model(model, [image]).edit(image, prompt, n=n, seed=seed, guidance=guidance, steps=steps)
    write_pictures(pictures, out)


def reconstruct(
    images: Words[tuple[str, ...]],
    /,
    out: Path,
    model: Model = DEFAULT_MODEL,
    seed: int = 0,
    keep: str = "auto",
    steps: int | None = None,
) -> None:
    """Turn pictures into visual tokens and back, without the language model."""
    lavit = load_model(model, images)
    pictures = [lavit.reconstruct(image, keep=keep, seed=seed, steps=steps) for image in images]
    write_pictures(pictures, out)


def tokenize(
    images: Words[tuple[str, ...]],
    /,
    model: Model = DEFAULT_MODEL,
    keep: str = "auto",
    seed: int = 0,
    json: bool = False,
) -> None:
    """Print the visual tokens of pictures; --json prints image, codes, kept patches and length, one object a line."""
    lavit = load_model(model, images)
    for image in images:
        tokens = lavit.tokenize(image, keep=keep, seed=seed)
        codes = tokens.codes.tolist()
        kept = tokens.keep[0].nonzero()[:, 0].tolist()
        answer_with(
            json,
            f"{image}: {len(codes)} tokens: {codes}",
            image=image,
            codes=codes,
            kept=kept,
            length=len(codes),
        )


def inspect(image: Words[str], /, out: Path, model: Model = DEFAULT_MODEL, keep: str = "auto") -> None:
    """Draw the kept patches over a picture."""
    from lavit.images import open_image
    from lavit.visualize import kept_over

    lavit = load_model(model, [image])
    picture = open_image(image)
    tokens = lavit.tokenize(picture, keep=keep)
    write_pictures([kept_over(picture, tokens.keep[0])], out)

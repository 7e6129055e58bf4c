"""Verbs that use a model: caption, choose, ask, chat, draw, edit, reconstruct, tokenize, tokenize-corpus, inspect, gallery."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import tyro

from lavit.cli.output import (
    DEFAULT_MODEL,
    Model,
    ProgressBar,
    Protocol,
    Safety,
    Size,
    Watermark,
    Words,
    answer_with,
    load_model,
    warn_of_unknown,
    write_drawn,
    write_pictures,
)
from lavit.config import InputError

BATCH = 16  # pictures that are read in one run of the engine


def caption(
    images: Words[tuple[str, ...]],
    /,
    model: Model = DEFAULT_MODEL,
    protocol: Protocol = "default",
    json: bool = False,
) -> None:
    """Say what pictures show."""
    lavit = load_model(model, images, protocol=protocol)
    for at in range(0, len(images), BATCH):
        started = time.perf_counter()
        answers = lavit.caption(images[at : at + BATCH])
        seconds = round((time.perf_counter() - started) / len(answers), 3)
        for image, answer in zip(images[at : at + BATCH], answers, strict=True):
            tokens = int(lavit.tokenize(image).lengths[0]) if json else 0
            answer_with(json, answer, image=image, caption=answer, tokens=tokens, seconds=seconds)


def choose(
    image: Words[str],
    among: Words[tuple[str, ...]],
    /,
    n: Annotated[int, tyro.conf.arg(help="so many of the likeliest, best first")] = 1,
    model: Model = DEFAULT_MODEL,
    json: bool = False,
) -> None:
    """Say which of some texts a picture shows: the likeliest as its caption."""
    chosen = load_model(model, [image]).choose(image, among, n=n)
    answer_with(json, "\n".join(chosen), image=image, chosen=chosen)


def ask(
    image: Words[str],
    question: Words[str],
    /,
    model: Model = DEFAULT_MODEL,
    protocol: Protocol = "default",
    json: bool = False,
) -> None:
    """Answer a question about a picture."""
    answer = load_model(model, [image], protocol=protocol).ask(image, question)
    answer_with(json, answer, image=image, question=question, answer=answer)


def chat(model: Model = DEFAULT_MODEL, seed: int = 0, out: Path = Path("chat.png"), steps: int | None = None) -> None:
    """Talk, a line a turn, until end of input. /image FILE shows a picture with the next line, /draw WORDS asks for one.

    Pictures that the model writes are saved as OUT, OUT-1, OUT-2 …
    """
    from lavit.images import open_image

    lavit = load_model(model)
    messages: list[dict[str, Any]] = []
    shown: list[dict[str, Any]] = []
    drawn = 0
    for line in map(str.strip, sys.stdin):
        command, _, rest = line.partition(" ")
        try:
            if command == "/image":
                shown.append({"type": "image", "image": open_image(rest.strip())})
                continue
            words = {"type": "text", "text": rest if command == "/draw" else line}
            talk = [*messages, {"role": "user", "content": [*shown, words]}]
            reply = lavit.chat(talk, out="image" if command == "/draw" else "text", seed=seed, steps=steps)
        except InputError as error:
            print(f"lavit: {error}", file=sys.stderr)
            continue
        messages, shown = [*talk, reply], []
        for part in reply["content"]:
            if part["type"] == "text":
                print(part["text"], flush=True)
            else:
                write_pictures([part["image"]], out.with_stem(f"{out.stem}-{drawn}") if drawn else out)
                drawn += 1


def draw(
    prompts: Words[tuple[str, ...]],
    /,
    out: Path,
    n: int = 1,
    best_of: int | None = None,
    model: Model = DEFAULT_MODEL,
    protocol: Protocol = "default",
    seed: int = 0,
    guidance: float | None = None,
    steps: int | None = None,
    size: Size = None,
    safety: Safety = True,
    watermark: Watermark = None,
) -> None:
    """Draw prompts. Several pictures are FILE-0, FILE-1 …, those of the first prompt first.

    --n 4 draws each prompt four times; --best-of 8 draws eight and keeps the n in which the model reads the prompt best.
    """
    lavit = load_model(model, protocol=protocol, safety=safety, watermark=watermark)
    warn_of_unknown(lavit, prompts)
    how = {"n": n, "best_of": best_of, "seed": seed, "guidance": guidance, "steps": steps, "size": size}
    write_drawn(lambda: [picture for made in lavit.draw(prompts, **how) for picture in made], out)


def edit(
    image: Words[str],
    prompt: Words[str],
    /,
    out: Path,
    n: int = 1,
    best_of: int | None = None,
    model: Model = DEFAULT_MODEL,
    protocol: Protocol = "default",
    seed: int = 0,
    guidance: float | None = None,
    steps: int | None = None,
    size: Size = None,
    safety: Safety = True,
    watermark: Watermark = None,
) -> None:
    """Draw from a picture and an instruction."""
    lavit = load_model(model, [image], protocol=protocol, safety=safety, watermark=watermark)
    warn_of_unknown(lavit, [prompt])
    how = {"n": n, "best_of": best_of, "seed": seed, "guidance": guidance, "steps": steps, "size": size}
    write_drawn(lambda: lavit.edit(image, prompt, **how), out)


def reconstruct(
    images: Words[tuple[str, ...]],
    /,
    out: Path,
    model: Model = DEFAULT_MODEL,
    seed: int = 0,
    keep: str = "auto",
    steps: int | None = None,
    size: Size = None,
    safety: Safety = True,
    watermark: Watermark = None,
) -> None:
    """Turn pictures into visual tokens and back, without the language model."""
    lavit = load_model(model, images, safety=safety, watermark=watermark)
    write_drawn(
        lambda: [lavit.reconstruct(image, keep=keep, seed=seed, steps=steps, size=size) for image in images], out
    )


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


def tokenize_corpus(
    data: Words[str],
    /,
    out: Path,
    model: Model = DEFAULT_MODEL,
    workers: int = 2,
    split: str = "train",
    keep: str = "auto",
    seed: int = 0,
    shard_size: int = 256,
    json: bool = False,
) -> None:
    """Write the visual tokens of a whole data set as parquet shards; the same command goes on after an interruption.

    --workers are processes of Ray Data, a thread each; 0 works in this process, without Ray.
    """
    import lavit
    from lavit.data.bulk import Job
    from lavit.data.bulk import tokenize_corpus as write

    device, dtype = lavit.place()
    job = Job(
        data=data,
        out=out,
        model=model,
        split=split,
        keep=keep,
        seed=seed,
        shard_size=shard_size,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
    )
    with ProgressBar() as progress:
        manifest = write(job, workers=workers, progress=lambda done, of: progress.count("pictures", done, of))
    counts = f"{manifest['tokens']} tokens of {manifest['pictures']} pictures, {len(manifest['broken'])} broken"
    answer_with(json, f"{out}: {counts}", **manifest)


def inspect(image: Words[str], /, out: Path, model: Model = DEFAULT_MODEL, keep: str = "auto") -> None:
    """Draw a picture, its kept patches, and a map of which kept token each dropped patch flowed into."""
    from lavit.images import open_image
    from lavit.visualize import kept_over, merge_map, sheet

    lavit = load_model(model, [image])
    picture = open_image(image)
    mask = lavit.tokenize(picture, keep=keep).keep
    flow = lavit.model.tokenizer.flow(lavit.model.patches([picture]), mask)[0]
    mask, flow = mask[0].cpu(), flow.float().cpu()
    words = ["picture", f"{int(mask.sum())} of {len(mask)} patches kept", "colour and line: the token that took most"]
    page = sheet([[picture, kept_over(picture, mask), merge_map(picture, mask, flow)], words], cell=320)
    write_pictures([page], out)


def gallery(
    data: Words[str],
    /,
    out: Path,
    model: Model = DEFAULT_MODEL,
    split: str = "train",
    codes: int = 40,
    patches: int = 12,
    limit: int | None = None,
    json: bool = False,
) -> None:
    """Draw patches of the most used codes, the use of all codes, and the lengths of a data set's pictures."""
    from lavit.visualize import write_gallery

    loaded = load_model(model).model
    with ProgressBar() as progress:
        figures = write_gallery(
            loaded,
            data,
            out,
            split=split,
            codes=codes,
            patches=patches,
            limit=limit,
            progress=lambda done, of: progress.count("pictures", done, of),
        )
    text = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    answer_with(json, f"{out}: {text}", **figures)

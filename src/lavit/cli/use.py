"""Verbs that use a model, from caption to demo."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    format_of,
    load_model,
    warn_of_unknown,
    write_drawn,
    write_pictures,
)
from lavit.config import PARTS, TO_READ, TO_SEE, InputError

if TYPE_CHECKING:  # pipelines take seconds to import
    from lavit.generate.options import RankedOptions, ReconstructionOptions

BATCH = 16  # pictures that are read in one run of the engine


def caption(
    images: Words[tuple[str, ...]],
    /,
    model: Model = DEFAULT_MODEL,
    protocol: Protocol = "default",
    json: bool = False,
) -> None:
    """Say what pictures show."""
    lavit = load_model(model, images, protocol=protocol, parts=TO_READ)
    for at in range(0, len(images), BATCH):
        batch = images[at : at + BATCH]
        started = time.perf_counter()
        answers = lavit.caption(batch)
        seconds = round((time.perf_counter() - started) / len(answers), 3)
        for image, answer in zip(batch, answers, strict=True):
            tokens = int(lavit.tokenize(image).lengths[0]) if json else 0
            fields = {"image": image, "caption": answer, "tokens": tokens, "seconds": seconds}
            answer_with(json, answer, **fields)


def choose(
    image: Words[str],
    among: Words[tuple[str, ...]],
    /,
    n: Annotated[int, tyro.conf.arg(help="number of texts to print, most likely first")] = 1,
    model: Model = DEFAULT_MODEL,
    json: bool = False,
) -> None:
    """Say which of some texts a picture shows: the likeliest as its caption."""
    if not 1 <= n <= max(1, len(among)):
        raise InputError(f"n is {n}: choose from 1 to all {len(among)} texts")
    chosen = load_model(model, [image], parts=TO_READ).rank(image, among)[:n]
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
    lavit = load_model(model, [image], protocol=protocol, parts=TO_READ)
    warn_of_unknown(lavit, [question])
    answer = lavit.ask(image, question)
    answer_with(json, answer, image=image, question=question, answer=answer)


def chat(
    model: Model = DEFAULT_MODEL,
    seed: int = 0,
    out: Path = Path("chat.png"),
    steps: int | None = None,
) -> None:
    """Talk, a line a turn, until end of input.

    /image FILE shows a picture with the next line, /draw WORDS asks for one. Pictures that the
    model writes are saved as OUT, OUT-1, OUT-2 …
    """
    from lavit.images import open_image

    format_of(out)  # before anything is drawn
    lavit = load_model(model)
    messages: list[Mapping[str, Any]] = []
    shown: list[dict[str, Any]] = []
    drawn = 0
    for line in map(str.strip, sys.stdin):
        command, _, rest = line.partition(" ")
        draws = command == "/draw"
        try:
            if command == "/image":
                shown.append({"type": "image", "image": open_image(rest.strip())})
                continue
            words = {"type": "text", "text": rest if draws else line}
            talk = [*messages, {"role": "user", "content": [*shown, words]}]
            if draws:
                reply = lavit.chat(talk, out="image", seed=seed, steps=steps)
            else:
                reply = lavit.chat(talk, seed=seed)
        except InputError as error:
            print(f"lavit: {error}", file=sys.stderr)
            continue
        messages, shown = [*talk, reply], []
        for part in reply["content"]:
            if part["type"] == "text":
                print(part["text"], flush=True)
            else:
                name = out.with_stem(f"{out.stem}-{drawn}") if drawn else out
                write_pictures([part["image"]], name)
                drawn += 1


@dataclass(frozen=True)
class Drawing:
    """The options of verbs that draw."""

    out: Path
    n: int = 1
    best_of: int | None = None
    model: Model = DEFAULT_MODEL
    protocol: Protocol = "default"
    seed: int = 0
    guidance: float | None = None
    steps: int | None = None
    size: Size = None
    safety: Safety = True
    watermark: Watermark = None

    def write(self, prompts: Sequence[str], image: str | None = None) -> None:
        """Draw prompts, from a picture where there is one, and save."""
        if self.n < 1:
            raise InputError(f"n is {self.n}: ask for at least one picture")
        safety = None if self.safety else False  # None: as the model says
        options = {"protocol": self.protocol, "safety": safety, "watermark": self.watermark}
        reads = image is not None or self.best_of is not None or self.protocol != "default"
        parts = PARTS if reads else PARTS[1:]
        lavit = load_model(self.model, None if image is None else [image], parts=parts, **options)
        warn_of_unknown(lavit, prompts)
        how: RankedOptions = {
            "best_of": self.best_of,
            "seed": self.seed,
            "guidance": self.guidance,
            "steps": self.steps,
            "size": self.size,
        }
        wanted = [prompt for prompt in prompts for _ in range(self.n)]
        if image is None:
            write_drawn(lambda: lavit.draw(wanted, **how), self.out)
        else:
            write_drawn(lambda: lavit.edit([image] * len(wanted), wanted, **how), self.out)


Drawn = Annotated[Drawing, tyro.conf.arg(name="")]


def draw(prompts: Words[tuple[str, ...]], /, how: Drawn) -> None:
    """Draw prompts. Several pictures are FILE-0, FILE-1 …, those of the first prompt first.

    Picture i takes seed + i. --n 4 draws each prompt four times; --best-of 8 draws eight for each
    picture and keeps the one in which the model reads the prompt best.
    """
    how.write(prompts)


def edit(image: Words[str], prompt: Words[str], /, how: Drawn) -> None:
    """Draw from a picture and an instruction."""
    how.write([prompt], image)


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
    checked = None if safety else False  # None: as the model says
    parts = (*TO_SEE, "pixels")
    lavit = load_model(model, images, safety=checked, watermark=watermark, parts=parts)
    how: ReconstructionOptions = {"keep": keep, "seed": seed, "steps": steps, "size": size}
    write_drawn(lambda: lavit.reconstruct(images, **how), out)


def tokenize(
    images: Words[tuple[str, ...]],
    /,
    model: Model = DEFAULT_MODEL,
    keep: str = "auto",
    seed: int = 0,
    json: bool = False,
) -> None:
    """Print the visual tokens of pictures; --json adds kept patches, one object a line."""
    lavit = load_model(model, images, parts=TO_SEE)
    for image in images:
        tokens = lavit.tokenize(image, keep=keep, seed=seed)
        codes, kept = tokens.codes.tolist(), tokens.keep[0].nonzero()[:, 0].tolist()
        text = f"{image}: {len(codes)} tokens: {codes}"
        answer_with(json, text, image=image, codes=codes, kept=kept, length=len(codes))


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
    """Write the visual tokens of a whole data set as parquet shards.

    The same command goes on after an interruption. --workers are processes of Ray Data, a thread
    each; 0 works in this process, without Ray.
    """
    import lavit
    from lavit.data.bulk import CorpusJob
    from lavit.data.bulk import tokenize_corpus as write

    device, dtype = lavit.place()
    job = CorpusJob(
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
        done = write(job, workers=workers, progress=partial(progress.count, "pictures"))
    counts = f"{done['tokens']} tokens of {done['pictures']} pictures, {len(done['broken'])} broken"
    answer_with(json, f"{out}: {counts}", **done)


def inspect(
    image: Words[str],
    /,
    out: Path,
    model: Model = DEFAULT_MODEL,
    keep: str = "auto",
) -> None:
    """Draw a picture, its kept patches, and which kept token each dropped patch flowed into."""
    from lavit.images import open_image
    from lavit.visualize import sheet, token_maps

    format_of(out)
    lavit = load_model(model, [image], parts=TO_SEE)
    picture = open_image(image)
    mask = lavit.tokenize(picture, keep=keep).keep
    kept = f"{int(mask.sum())} of {mask.shape[1]} patches kept"
    words = ["picture", kept, "colour and line: the token that took most"]
    pictures = [picture, *token_maps(lavit.model, picture, mask)]
    write_pictures([sheet([pictures, words], cell=320)], out)


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
    """Draw patches of the most used codes, the use of all codes, and lengths over a data set."""
    from lavit.visualize import write_gallery

    loaded = load_model(model, parts=TO_SEE).model
    with ProgressBar() as progress:
        figures = write_gallery(
            loaded,
            data,
            out,
            split=split,
            codes=codes,
            patches=patches,
            limit=limit,
            progress=partial(progress.count, "pictures"),
        )
    text = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    answer_with(json, f"{out}: {text}", **figures)


def words(model: Words[str] = DEFAULT_MODEL, /, json: bool = False) -> None:
    """List the things, colours, places and styles that a model of scenes has words for.

    `lavit draw` and its like name every other word of a prompt.
    """
    from lavit.evaluate.known import known_words
    from lavit.storage import model_folder

    known = known_words(model_folder(model))
    lines = [f"{kind}: {'; '.join(found)}" for kind, found in known.items()]
    answer_with(json, "\n".join(lines), **known)


def demo(model: Words[str] = DEFAULT_MODEL, /, out: Path = Path("demo"), seed: int = 0) -> None:
    """Write OUT/index.html and OUT/sheet.png: what a model of scenes reads, answers and draws.

    Things that stand together there never did so in training; --seed shows others. Free
    generation, one sample each. Parts that the model lacks are said to be missing.
    """
    from lavit.evaluate.demo import write_demo

    with ProgressBar() as progress:
        sections = write_demo(model, out, seed=seed, progress=progress.count)
    for section in sections:
        if section.score or section.missing:
            print(f"{section.title}: {section.score or section.missing}")
    print(out / "index.html")
    print(out / "sheet.png")

"""What verbs share: opening models, printing answers, writing pictures, showing progress."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from lavit.config import InputError, write_whole

if TYPE_CHECKING:
    from PIL.Image import Image

    from lavit.generate.pipeline import Pipeline
    from lavit.train.loop import Report

T = TypeVar("T")
Words = Annotated[T, tyro.conf.Positional]
arg = tyro.conf.arg
Model = Annotated[str, arg(help="a trained run or model folder, a hub's name, or nano")]
RATIOS = "aspect ratio: 1:1, 4:3, 3:2, 16:9, 2:3, 3:4 (default: the model's)"
Size = Annotated[str | None, arg(help=RATIOS)]
Safety = Annotated[bool, arg(help="check written pictures where the model asks for it")]
HIDDEN = "text to hide in the pictures (needs invisible-watermark)"
Watermark = Annotated[str | None, arg(help=HIDDEN)]
Protocol = Annotated[
    Literal["default", "paper", "published"],
    arg(help="how to sample: the paper's beams, best of four drawings (not in streams), …"),
]
DEFAULT_MODEL = "nano"  # comes with the package


def load_model(model: str, images: Sequence[str] | None = None, **options: Any) -> Pipeline:
    """`lavit.load`, after the pictures that are to be read have been seen to open."""
    import lavit
    from lavit.images import open_image

    if images is not None and not images:
        raise InputError("give at least one picture")
    for image in images or ():
        open_image(image)
    return lavit.load(model, **options)


def warn_of_unknown(lavit: Pipeline, prompts: Sequence[str]) -> None:
    """Name, in one line on stderr, words of prompts that a model of scenes never learnt."""
    from lavit.evaluate.examinee import scenes_of

    folder = lavit.model.folder
    if folder is None or scenes_of(folder) is None:
        return
    from lavit.evaluate.known import strange_words

    if words := strange_words(folder, prompts):
        print(f"{lavit.model.config.name} does not know: {', '.join(words)}", file=sys.stderr)


def answer_with(as_json: bool, text: str, **fields: Any) -> None:
    """Print an answer: `text`, or the fields as one JSON object a line."""
    print(json.dumps(fields, ensure_ascii=False) if as_json else text, flush=True)


def write_pictures(pictures: Sequence[Image | None], out: Path) -> None:
    """Save pictures as OUT, or OUT-0, OUT-1 … where there are several; None is left out."""
    for number, picture in enumerate(pictures):
        if picture is None:
            continue
        name, data = out if len(pictures) == 1 else out.with_stem(f"{out.stem}-{number}"), BytesIO()
        picture.save(data, format_of(out))
        write_whole(name, data.getvalue())
        print(name)


def format_of(out: Path) -> str:
    """The format of a picture's file, by its ending; raises `InputError` where there is none."""
    from PIL import Image

    found = Image.registered_extensions().get(out.suffix.lower())
    if found not in Image.SAVE:
        raise InputError(f"{out} ends as no picture does: name it .png, .jpg or .webp")
    return found


def write_drawn(draw: Callable[[], Sequence[Image]], out: Path) -> None:
    """Draw and save; where the safety checker refuses some pictures the others are saved first."""
    from lavit.generate.safety import Refused

    format_of(out)  # before anything is drawn
    try:
        pictures = draw()
    except Refused as refused:
        write_pictures(refused.pictures, out)
        raise
    write_pictures(pictures, out)


class ProgressBar:
    """A bar on a terminal, a line every few seconds elsewhere."""

    seconds_between_lines = 10.0

    def __enter__(self) -> ProgressBar:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.bar = None
        self.task: tuple[str, Any] | None = None
        self.spoke = 0.0
        console = Console(stderr=True)
        if console.is_terminal:
            name, line = TextColumn("{task.description:<18}"), TextColumn("{task.fields[line]}")
            self.bar = Progress(name, BarColumn(30), line, TimeElapsedColumn(), console=console)
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def count(self, what: str, done: int, of: int) -> None:
        """Progress of something that is counted."""
        self._show(what, done, of, f"{done}/{of}")

    def report(self, report: Report) -> None:
        """Progress of a training stage: rate, time left, losses and health on one line."""
        left = time.strftime("%H:%M:%S", time.gmtime(report.seconds_left))
        line = f"{report.step}/{report.steps} {report.rate:.2f} steps/s left {left}"
        for name, value in report.figures.items():
            if "/" not in name:  # no parts of histograms
                line += f" {name} {value:.3g}"
        self._show(report.stage, report.step, report.steps, line)

    def _show(self, what: str, done: int, of: int, line: str) -> None:
        if self.bar:
            if self.task is None or self.task[0] != what:
                self.task = (what, self.bar.add_task(what, total=of, line=line))
            self.bar.update(self.task[1], completed=done, line=line)
            return
        now = time.perf_counter()
        if done == of or now - self.spoke > self.seconds_between_lines:
            self.spoke = now
            print(f"{what} {line}", file=sys.stderr, flush=True)

"""The command line: every verb of the package, one function each. The only file that prints.

Bad input ends with one line on stderr and exit code 2; a failing training (`Alarm`) with one line and exit code 1.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from lavit.config import InputError

if TYPE_CHECKING:
    from lavit.generate.pipeline import Pipeline
    from lavit.train.loop import Report

Words = tyro.conf.Positional
Model = Annotated[str, tyro.conf.arg(help="a trained run or model folder")]
DEFAULT_MODEL = "runs/nano-demo"  # what `make demo` trains


def caption(images: Words[tuple[str, ...]], /, model: Model = DEFAULT_MODEL, json: bool = False) -> None:
    """Say what pictures show."""
    lavit = _open(model)
    for image in _some(images, "picture"):
        started = time.perf_counter()
        answer = lavit.caption(image)
        seconds = round(time.perf_counter() - started, 3)
        tokens = int(lavit.tokenize(image).lengths[0])
        _answer(json, answer, image=image, caption=answer, tokens=tokens, seconds=seconds)


def ask(image: Words[str], question: Words[str], /, model: Model = DEFAULT_MODEL, json: bool = False) -> None:
    """Answer a question about a picture."""
    answer = _open(model).ask(image, question)
    _answer(json, answer, image=image, question=question, answer=answer)


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
    pictures = _open(model).draw(prompt, n=n, seed=seed, guidance=guidance, steps=steps)
    _write(pictures, out)


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
    pictures = _open(model).edit(image, prompt, n=n, seed=seed, guidance=guidance, steps=steps)
    _write(pictures, out)


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
    lavit = _open(model)
    pictures = [lavit.reconstruct(image, keep=keep, seed=seed, steps=steps) for image in _some(images, "picture")]
    _write(pictures, out)


def tokenize(
    images: Words[tuple[str, ...]],
    /,
    model: Model = DEFAULT_MODEL,
    keep: str = "auto",
    seed: int = 0,
    json: bool = False,
) -> None:
    """Print the visual tokens of pictures; --json prints image, codes, kept patches and length, one object a line."""
    lavit = _open(model)
    for image in _some(images, "picture"):
        tokens = lavit.tokenize(image, keep=keep, seed=seed)
        codes = tokens.codes.tolist()
        kept = tokens.keep[0].nonzero()[:, 0].tolist()
        _answer(
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

    lavit = _open(model)
    picture = open_image(image)
    tokens = lavit.tokenize(picture, keep=keep)
    _write([kept_over(picture, tokens.keep[0])], out)


def train(
    stage: Words[Literal["tokenizer", "language", "pixels", "all"]],
    /,
    data: str,
    out: Path,
    preset: str = "nano",
    minutes: float | None = None,
    seed: int = 0,
) -> None:
    """Train a stage, or all three, of a preset on a data set. The same command goes on after an interruption.

    --minutes scales the steps: about that long on two idle CPU cores.
    """
    from dataclasses import replace

    from lavit.presets import preset as find
    from lavit.presets import scaled
    from lavit.train.run import STAGES, Run

    chosen = find(preset)
    training = replace(chosen.training, seed=seed)
    if minutes is not None:
        training = scaled(training, minutes / chosen.minutes)
    with _Progress() as progress:
        run = Run(out, data, chosen.model, training, watch=progress.report, prepare=progress.count)
        run.train(STAGES if stage == "all" else (stage,))
    print(f"trained: {out}")


def evaluate(run: Words[Path], /, data: str | None = None, json: bool = False, limit: int | None = None) -> None:
    """Measure a trained run: every figure with its count, interval, floor and ceiling."""
    from lavit.evaluate.report import evaluate_run

    with _Progress() as progress:
        figures = evaluate_run(run, data=data, limit=limit, progress=progress.count)
    for figure in figures:
        _answer(json, figure.line(), **figure.to_json())


def data_starter(out: Path, families: int | None = None, tones: tuple[str, ...] | None = None, seed: int = 0) -> None:
    """Build the starter data: emoji of two artists with names, questions and edits."""
    from lavit.data.starter import build_starter

    with _Progress() as progress:
        counts = build_starter(
            out,
            families=families,
            tones=tones,
            seed=seed,
            progress=lambda done, of: progress.count("pictures", done, of),
        )
    for name, count in counts.items():
        print(f"{name:>24} {count}")


def data_check(data: Words[str], /, split: str = "train", json: bool = False) -> None:
    """Read a data set and report counts, broken pictures, text lengths and licences."""
    import dataclasses

    from lavit.data.sources import check

    report = dataclasses.asdict(check(data, split))
    text = "\n".join(f"{name:>16} {value}" for name, value in report.items())
    _answer(json, text, **report)


def convert_check(fixture: Words[Path], /, json: bool = False) -> None:
    """Run our modules on the weights and inputs of a parity fixture and compare; exit code 1 if an output differs."""
    from lavit.convert import check_fixture

    results = check_fixture(fixture)
    for result in results:
        text = f"{result.name:<36} {result.error:9.2e}  {'ok' if result.ok else 'DIFFERS'}"
        _answer(json, text, name=result.name, error=result.error, ok=result.ok)
    if not all(result.ok for result in results):
        raise SystemExit(1)


def convert_published(folder: Words[Path], /, out: Path) -> None:
    """Turn the published weights into our on-disk format, every tensor once."""
    from lavit.convert import convert_published as convert

    done = convert(folder, out)
    print(f"{out}: {done.files} files, {done.tensors} tensors, {len(done.aside)} kept aside")


def convert_reverse(folder: Words[Path], /, out: Path) -> None:
    """Turn a converted folder back into the published one, equal to the bit."""
    from lavit.convert import convert_reverse as convert

    done = convert(folder, out)
    print(f"{out}: {done.files} files, {done.tensors} tensors, {len(done.aside)} taken from aside")


def demo(run: Words[Path], /, out: Path = Path("demo"), data: str | None = None) -> None:
    """Write OUT/index.html and OUT/sheet.png: what a trained run reads, draws, edits and answers."""
    from lavit.evaluate.demo import write_demo

    with _Progress() as progress:
        write_demo(run, out, data=data, progress=progress.count)
    print(f"wrote {out / 'index.html'} and {out / 'sheet.png'}")


VERBS: dict[str, Callable[..., Any]] = {
    "caption": caption,
    "ask": ask,
    "draw": draw,
    "edit": edit,
    "reconstruct": reconstruct,
    "tokenize": tokenize,
    "inspect": inspect,
    "train": train,
    "eval": evaluate,
    "demo": demo,
}
GROUPS: dict[str, dict[str, Callable[..., Any]]] = {
    "data": {"starter": data_starter, "check": data_check},
    "convert": {"check": convert_check, "published": convert_published, "reverse": convert_reverse},
}


def data() -> None:
    """Build the starter data, or check a data set (lavit data starter, lavit data check)."""
    _group("data")


def convert() -> None:
    """Published weights to ours and back, and parity (lavit convert check, published, reverse)."""
    _group("convert")


def _group(name: str) -> None:
    raise InputError("say which: " + ", ".join(f"lavit {name} {verb}" for verb in GROUPS[name]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `lavit`."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("lavit").setLevel(logging.INFO)
    for library in ("HF_HUB", "HF_DATASETS"):  # this command line has bars of its own
        os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    from lavit.train.health import Alarm

    words = list(sys.argv[1:] if arguments is None else arguments)
    verbs, prog = {**VERBS, "data": data, "convert": convert}, "lavit"
    if len(words) > 1 and words[0] in GROUPS:
        verbs, prog, words = GROUPS[words[0]], f"lavit {words[0]}", words[1:]
    try:
        tyro.extras.subcommand_cli_from_dict(
            verbs, prog=prog, description="LaVIT: images as a foreign language.", args=words
        )
    except InputError as error:
        print(f"lavit: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except Alarm as alarm:
        print(f"lavit: {alarm}", file=sys.stderr)
        raise SystemExit(1) from alarm
    except KeyboardInterrupt as stop:
        print("lavit: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from stop


def _open(model: str) -> Pipeline:
    import lavit

    return lavit.load(model)


def _some(items: Sequence[str], what: str) -> Sequence[str]:
    if not items:
        raise InputError(f"give at least one {what}")
    return items


def _answer(as_json: bool, text: str, **fields: Any) -> None:
    print(json.dumps(fields, ensure_ascii=False) if as_json else text, flush=True)


def _write(pictures: Sequence[Any], out: Path) -> None:
    """Save pictures as OUT, or OUT-0, OUT-1 … where there are several."""
    names = [out] if len(pictures) == 1 else [out.with_stem(f"{out.stem}-{i}") for i in range(len(pictures))]
    for picture, name in zip(pictures, names, strict=True):
        try:
            name.parent.mkdir(parents=True, exist_ok=True)
            picture.save(name)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot write {name}: {error}") from error
        print(name)


class _Progress:
    """A bar on a terminal, a line every few seconds elsewhere."""

    seconds_between_lines = 10.0

    def __enter__(self) -> _Progress:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.console = Console(stderr=True)
        self.bar = None
        self.task: tuple[str, Any] | None = None
        self.spoke = 0.0
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description:<18}"),
                BarColumn(30),
                TextColumn("{task.fields[line]}"),
            )
            self.bar = Progress(*columns, TimeElapsedColumn(), console=self.console)
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
        figures = " ".join(f"{name} {value:.3g}" for name, value in report.figures.items())
        line = f"{report.step}/{report.steps} {report.rate:.2f} steps/s left {left} {figures}"
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

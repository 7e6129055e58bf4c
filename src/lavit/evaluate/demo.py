"""The demonstration page of a trained run: what it reads, draws, edits and answers, as OUT/index.html and OUT/sheet.png."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

import lavit
from lavit.config import InputError
from lavit.evaluate.evaluation import Evaluation, trained_on
from lavit.evaluate.words import name_of
from lavit.generate.remember import shown_texts
from lavit.visualize import kept_over, sheet

CELL = 128
COMBINED = ("a cat at night", "a dog in a box", "a sad pizza", "a red heart and a star")
WORDS = ("sad", "at night", "in a box")
READ, DRAWN = 8, 6  # held-out pictures that are read, names that are drawn

Row = list[Image.Image | str]


def write_demo(
    run: str | Path,
    out: Path,
    *,
    data: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Write the page and the sheet. The held-out pictures are emoji that the run knows in the other artist's hand."""
    pipeline = lavit.load(run)
    evaluation = Evaluation(pipeline, data or trained_on(run), None, None)
    try:
        (out / "pictures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}") from error
    sections = []
    steps: tuple[tuple[str, Callable[[Evaluation], tuple[Row, list[Row]]]], ...] = (
        ("Reading pictures it never saw", _reading),
        ("Drawing names", _drawing),
        ("Editing: picture and words in, picture out", _editing),
        ("Two concepts, and words that no edit of the data had", _combining),
        ("Answering", _answering),
    )
    for number, (title, make) in enumerate(steps):
        header, rows = make(evaluation)
        sections.append((title, header, rows))
        if progress:
            progress("demo", number + 1, len(steps))
    rows = [row for title, header, part in sections for row in ([title, *[""] * (len(header) - 1)], header, *part)]
    page = sheet(rows, cell=CELL)
    page.save(out / "sheet.png")
    (out / "index.html").write_text(_page(pipeline.model.config.name, sections, out), encoding="utf-8")


def _reading(e: Evaluation) -> tuple[Row, list[Row]]:
    rows: list[Row] = []
    for number in e.some(READ, len(e.held_out)):
        picture = e.held_out.pictures[number]
        image = picture.record.open()
        tokens = e.pipeline.tokenize(image)
        said = e.pipeline.caption(image)
        rebuilt = e.pipeline.reconstruct(image)
        length = f"{int(tokens.lengths[0])} tokens"
        rows.append(
            [
                image,
                kept_over(image, tokens.keep[0]),
                length,
                said,
                f"(true: {name_of(picture)})",
                rebuilt,
            ]
        )
    return ["picture", "kept patches", "length", "caption", "truth", "through its tokens"], rows


def _drawing(e: Evaluation) -> tuple[Row, list[Row]]:
    names = sorted({name_of(picture) for picture in e.train.pictures})
    rows: list[Row] = []
    for number in e.some(DRAWN, len(names), seed=3):
        name = names[number]
        real = next(p for p in e.train.pictures if name_of(p) == name)
        rows.append([name, *e.pipeline.draw(name, n=4, seed=number), real.record.open()])
    return ["prompt", "seed 0", "seed 1", "seed 2", "seed 3", "a real one"], rows


def _editing(e: Evaluation) -> tuple[Row, list[Row]]:
    rows: list[Row] = []
    for kind in ("artist", "tone", "gender"):
        edits = [edit for edit in e.train.edits if edit.kind == kind]
        for number in e.some(1, len(edits), seed=4):
            edit = edits[number]
            source, target = (e.train.pictures[i].record.open() for i in (edit.source, edit.target))
            rows.append(
                [
                    source,
                    edit.prompt,
                    *e.pipeline.edit(source, edit.prompt, n=3, seed=number),
                    target,
                ]
            )
    return ["source", "instruction", "seed 0", "seed 1", "seed 2", "the real pair"], rows


def _combining(e: Evaluation) -> tuple[Row, list[Row]]:
    shown = [", ".join(dict.fromkeys(shown_texts(e.pipeline.model, prompt))) for prompt in COMBINED]
    rows: list[Row] = [
        [prompt, *e.pipeline.draw(prompt, n=4, seed=0), f"(shown: {texts})" if texts else ""]
        for prompt, texts in zip(COMBINED, shown, strict=True)
    ]
    picture = e.train.pictures[e.some(1, len(e.train), seed=7)[0]].record.open()
    rows += [[picture, words, *e.pipeline.edit(picture, words, n=3, seed=0), ""] for words in WORDS]
    return ["prompt, or picture and words", "", "", "", "", ""], rows


def _answering(e: Evaluation) -> tuple[Row, list[Row]]:
    rows: list[Row] = []
    for number in e.some(4, len(e.held_out.questions), seed=5):
        asked = e.held_out.questions[number]
        image = e.held_out.pictures[asked.picture].record.open()
        rows.append(
            [
                image,
                asked.question,
                e.pipeline.ask(image, asked.question),
                f"(true: {asked.answer})",
                "",
                "",
            ]
        )
    return ["picture", "question", "answer", "truth", "", ""], rows


def _page(name: str, sections: Sequence[tuple[str, Row, list[Row]]], out: Path) -> str:
    parts = []
    count = 0
    for title, header, rows in sections:
        cells = "".join(f"<th>{html.escape(str(text))}</th>" for text in header)
        lines = [f"<tr>{cells}</tr>"]
        for row in rows:
            line = ""
            for item in row:
                if isinstance(item, str):
                    line += f"<td>{html.escape(item)}</td>"
                    continue
                file = f"pictures/{count:03d}.png"
                item.resize((CELL, CELL), Image.Resampling.BICUBIC).save(out / file)
                line += f'<td><img src="{file}" width="{CELL}" height="{CELL}" alt=""></td>'
                count += 1
            lines.append(f"<tr>{line}</tr>")
        parts.append(f"<h2>{html.escape(title)}</h2>\n<table>\n" + "\n".join(lines) + "\n</table>")
    return PAGE.format(name=html.escape(name), body="\n".join(parts))


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>LaVIT {name}</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #222 }}
td, th {{ padding: .3rem .6rem .3rem 0; text-align: left; vertical-align: middle; max-width: 10rem }}
th {{ font-weight: 600; color: #666 }}
img {{ border: 1px solid #ddd }}
</style>
<h1>LaVIT {name}</h1>
<p>One model, shown as it is: nothing is picked by hand. Kept patches are framed; dropped ones, faded, flow into them.
Pictures: Twemoji (CC-BY 4.0) and OpenMoji (CC-BY-SA 4.0).</p>
{body}
</html>
"""

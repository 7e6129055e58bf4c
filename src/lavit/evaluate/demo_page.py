"""The page and the contact sheet of a demonstration, both drawn from the same sections."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from lavit.evaluate.drawing import packed

WIDTH, MARGIN, CELL, GAP = 1560, 30, 112, 6  # pixels of the sheet
LARGEST = 500_000  # bytes of the sheet
PAPER, INK, SOFT, RULE = (255, 255, 255), (28, 30, 34), (98, 104, 114), (222, 224, 228)
GOOD, BAD, BLUE = (30, 140, 70), (196, 52, 52), (46, 98, 190)

Counts = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Item:
    """Labelled pictures, what was asked and said, and whether that is right (None: not judged)."""

    pictures: tuple[tuple[str, Image.Image], ...]
    asked: str = ""
    said: str = ""
    truth: str = ""
    right: bool | None = None


@dataclass(frozen=True)
class Section:
    """Items under a title; `missing` says why there are none. `counts` are tokens by things."""

    title: str
    about: str
    items: tuple[Item, ...] = ()
    missing: str = ""
    counts: Counts = ()

    @property
    def score(self) -> str:
        """How many items are right, where that is judged."""
        judged = [item.right for item in self.items if item.right is not None]
        return f"{sum(judged)} of {len(judged)} right" if judged else ""


def page(name: str, sections: Sequence[Section]) -> str:
    """One HTML file with everything in it."""
    parts = []
    for section in sections:
        score = f' <span class="score">{section.score}</span>' if section.score else ""
        lines = [f"<h2>{html.escape(section.title)}{score}</h2>"]
        lines.append(f"<p>{html.escape(section.about)}</p>")
        if section.missing:
            lines.append(f'<p class="missing">{html.escape(section.missing)}</p>')
        if section.counts:
            lines.append(svg(section.counts))
        if section.items:
            cards = "\n".join(_card(item) for item in section.items)
            lines.append(f'<div class="items">\n{cards}\n</div>')
        parts.append("<section>\n" + "\n".join(lines) + "\n</section>")
    return PAGE.replace("NAME", html.escape(name)).replace("BODY", "\n".join(parts))


def _card(item: Item) -> str:
    figures = "".join(
        f'<figure><img src="data:image/png;base64,{packed(picture)}" alt="{html.escape(label)}">'
        f"<figcaption>{html.escape(label)}</figcaption></figure>"
        for label, picture in item.pictures
    )
    lines = [f'<div class="pictures">{figures}</div>']
    if item.asked:
        lines.append(f'<p class="asked">{html.escape(item.asked)}</p>')
    if item.said or item.right is not None:
        marks = {True: ("good", "right", "✓"), False: ("bad", "wrong", "✗")}
        mark = None if item.right is None else marks[item.right]
        sign = f'<b class="{mark[0]}" title="{mark[1]}">{mark[2]}</b> ' if mark else ""
        lines.append(f'<p class="said">{sign}{html.escape(item.said) or "(nothing)"}</p>')
    if item.truth:
        lines.append(f'<p class="truth">{html.escape(item.truth)}</p>')
    return f'<article style="--pictures:{len(item.pictures)}">{"".join(lines)}</article>'


def _axis(counts: Counts) -> tuple[int, int]:
    """The top of the axis of tokens, and the distance of its lines."""
    most = max((count for rung in counts for count in rung), default=1)
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, most) if most / step <= 6)
    return -(-most // step) * step, step


def svg(counts: Counts) -> str:
    """Tokens against number of things, in the colours of the page."""
    width, height, left, top, right, bottom = 680, 300, 56, 14, 664, 250
    most, step = _axis(counts)

    def at(number: float, tokens: float) -> tuple[float, float]:
        x = left + (number + 0.5) * (right - left) / len(counts)
        return round(x, 1), round(bottom - tokens / most * (bottom - top), 1)

    parts = []
    for tokens in range(0, most + 1, step):
        y = at(0, tokens)[1]
        parts.append(f'<line class="rule" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{tokens}</text>')
    for number, rung in enumerate(counts):
        x = at(number, 0)[0]
        parts.append(f'<text x="{x}" y="{bottom + 20}" text-anchor="middle">{number}</text>')
        parts += [f'<circle cx="{x}" cy="{at(number, tokens)[1]}" r="4"/>' for tokens in rung]
    means = [at(number, sum(rung) / len(rung)) for number, rung in enumerate(counts) if rung]
    line = " ".join(f"{x},{y}" for x, y in means)
    parts.append(f'<polyline points="{line}"/>')
    middle = (left + right) / 2
    parts.append(f'<text x="{middle}" y="{height - 8}" text-anchor="middle">things</text>')
    turn = f"translate(14 {(top + bottom) / 2}) rotate(-90)"
    parts.append(f'<text transform="{turn}" text-anchor="middle">tokens</text>')
    label = "; ".join(f"{n} things: {', '.join(map(str, rung))}" for n, rung in enumerate(counts))
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="tokens, {label}">'
    return head + "".join(parts) + "</svg>"


class Sheet:
    """A white page that grows downwards."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (WIDTH, 6000), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.top = MARGIN

    def words(
        self,
        text: str,
        left: int,
        top: int,
        width: int,
        size: int = 14,
        fill: tuple[int, int, int] = INK,
    ) -> int:
        """Text broken to a width; returns where it ends."""
        font = ImageFont.load_default(size)
        lines = [""]
        for word in text.split():
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and self.draw.textlength(longer, font) > width:
                lines.append(word)
            else:
                lines[-1] = longer
        for line in lines:
            self.draw.text((left, top), line, fill=fill, font=font)
            top += round(size * 1.3)
        return top

    def mark(self, good: bool, x: int, y: int) -> None:
        """A tick or a cross."""
        tick = [(x, y + 9), (x + 4, y + 13), (x + 12, y + 3)]
        cross = [(x, y + 3), (x + 10, y + 13), (x + 5, y + 8), (x, y + 13), (x + 10, y + 3)]
        self.draw.line(tick if good else cross, fill=GOOD if good else BAD, width=3)

    def item(self, item: Item, left: int, top: int, width: int) -> int:
        """Pictures side by side, with words below; returns where it ends."""
        for number, (label, picture) in enumerate(item.pictures):
            x = left + number * (CELL + GAP)
            small = picture.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS)
            self.image.paste(small, (x, top))
            if len(item.pictures) > 1:
                self.words(label, x, top + CELL + 2, CELL + GAP, 11, SOFT)
        top += CELL + (20 if len(item.pictures) > 1 else 4)
        if item.asked:
            top = self.words(item.asked, left, top, width)
        if item.right is not None:
            self.mark(item.right, left, top)
            top = self.words(item.said or "(nothing)", left + 18, top, width - 18)
        if item.truth:
            top = self.words(item.truth, left, top, width, 12, SOFT)
        return top

    def plot(self, counts: Counts) -> None:
        """Tokens against number of things."""
        most, step = _axis(counts)
        left, right, top, bottom = MARGIN + 50, MARGIN + 700, self.top + 8, self.top + 208
        for tokens in range(0, most + 1, step):
            y = round(bottom - tokens / most * (bottom - top))
            self.draw.line([(left, y), (right, y)], fill=RULE)
            self.words(str(tokens), left - 34, y - 8, 34, 12, SOFT)
        points = []
        for number, rung in enumerate(counts):
            x = round(left + (number + 0.5) * (right - left) / len(counts))
            self.words(str(number), x - 3, bottom + 6, 40, 12, SOFT)
            for tokens in rung:
                y = round(bottom - tokens / most * (bottom - top))
                self.draw.ellipse((x - 3, y - 3, x + 3, y + 3), outline=BLUE)
            if rung:
                points.append((x, round(bottom - sum(rung) / len(rung) / most * (bottom - top))))
        self.draw.line(points, fill=BLUE, width=2)
        self.words("tokens (up) against things (across)", right + 20, top, 200, 12, SOFT)
        self.top = bottom + 36

    def section(self, section: Section) -> None:
        """A title, what it is about, and its items in rows."""
        inner = WIDTH - 2 * MARGIN
        self.draw.line([(MARGIN, self.top), (WIDTH - MARGIN, self.top)], fill=RULE)
        title = f"{section.title}: {section.score}" if section.score else section.title
        self.top = self.words(title, MARGIN, self.top + 10, inner, 22)
        self.top = self.words(section.about, MARGIN, self.top + 2, inner, 14, SOFT) + 8
        if section.missing:
            self.top = self.words(section.missing, MARGIN, self.top, inner, 14, BAD) + 8
        if section.counts:
            self.plot(section.counts)
        if section.items:
            widest = max(len(item.pictures) for item in section.items) * (CELL + GAP) + 12
            columns = max(1, min(inner // max(widest, 180), max(len(section.items), 3)))
            width = inner // columns
            for at in range(0, len(section.items), columns):
                ends = [
                    self.item(item, MARGIN + place * width, self.top, width - 20)
                    for place, item in enumerate(section.items[at : at + columns])
                ]
                self.top = max(ends) + 14
        self.top += 6


def contact_sheet(name: str, sections: Sequence[Section]) -> Image.Image:
    """Everything on one picture."""
    made = Sheet()
    made.top = made.words(f"LaVIT {name}", MARGIN, made.top, WIDTH - 2 * MARGIN, 30) + 4
    made.top = made.words(NOTE, MARGIN, made.top, WIDTH - 2 * MARGIN, 14, SOFT) + 14
    for section in sections:
        made.section(section)
    made.top = made.words(CREDITS, MARGIN, made.top, WIDTH - 2 * MARGIN, 12, SOFT)
    return made.image.crop((0, 0, WIDTH, made.top + MARGIN))


def save_sheet(image: Image.Image, path: Path) -> None:
    """Write a PNG of at most `LARGEST` bytes, with as few colours or pixels as that takes."""
    while True:
        for colours in (0, 256, 128, 64):
            stream = io.BytesIO()
            one = image.quantize(colours) if colours else image
            one.save(stream, "PNG")
            if stream.tell() <= LARGEST:
                path.write_bytes(stream.getvalue())
                return
        smaller = (image.width * 4 // 5, image.height * 4 // 5)
        image = image.resize(smaller, Image.Resampling.LANCZOS)


NOTE = (
    "One model reads and writes pictures as tokens. Everything here is its first try: free "
    "generation, one sample, nothing chosen among several."
)
CREDITS = (
    "Pictures: Twemoji by Twitter, Inc and other contributors (CC-BY 4.0), OpenMoji (CC-BY-SA "
    "4.0), and shapes of our own. Everything drawn is the model's."
)
PAGE = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>LaVIT NAME</title>
<style>
:root {{ --paper: #fff; --card: #f6f7f9; --ink: #1c1e22; --soft: #626872; --rule: #dcdfe4;
  --good: #1e8c46; --bad: #c43434; --line: #2e62be }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: #15171a; --card: #1f2226; --ink: #e8eaee; --soft: #a0a7b2; --rule: #363b42;
    --good: #58c984; --bad: #f08080; --line: #7fa9f5 }}
}}
* {{ box-sizing: border-box }}
body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 72rem; margin: 0 auto; padding: 2rem 1.25rem 4rem }}
h1 {{ font-size: 2rem; margin: 0 0 .25rem }}
h2 {{ font-size: 1.3rem; margin: 0 }}
section {{ border-top: 1px solid var(--rule); margin-top: 2.5rem; padding-top: 1.5rem }}
p {{ margin: .4rem 0; max-width: 46rem }}
section > p, .score, figcaption, .truth, footer {{ color: var(--soft) }}
.score {{ font-size: 1rem; font-weight: 400; margin-left: .5rem }}
.missing {{ color: var(--bad) }}
.items {{ display: flex; flex-wrap: wrap; gap: 1rem; margin-top: 1rem }}
article {{ background: var(--card); border-radius: .6rem; padding: .75rem;
  width: calc(var(--pictures) * 8.5rem + 1.5rem + (var(--pictures) - 1) * .5rem);
  min-width: 13rem; max-width: 100% }}
.pictures {{ display: flex; gap: .5rem; flex-wrap: wrap }}
figure {{ margin: 0; width: 8.5rem }}
img {{ display: block; width: 100%; aspect-ratio: 1; border-radius: .3rem }}
figcaption {{ font-size: .8rem }}
article p {{ font-size: .92rem; line-height: 1.35 }}
.asked {{ font-style: italic }}
.good {{ color: var(--good) }}
.bad {{ color: var(--bad) }}
svg {{ display: block; width: 100%; max-width: 42rem; margin: 1rem 0; font-size: 13px }}
svg text {{ fill: var(--soft) }}
svg .rule {{ stroke: var(--rule) }}
svg circle {{ fill: var(--line); opacity: .45 }}
svg polyline {{ fill: none; stroke: var(--line); stroke-width: 2 }}
footer {{ margin-top: 3rem; font-size: .85rem }}
</style>
</head>
<body>
<h1>LaVIT NAME</h1>
<p>{NOTE}</p>
BODY
<footer>{CREDITS}</footer>
</body>
</html>
"""

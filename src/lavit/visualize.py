"""Pictures about the tokenizer: kept patches, where the dropped ones flow, what codes stand for.

kept_over, merge_map   over one picture: which patches stay, and where the dropped ones flow
token_maps             both, of a model
write_gallery          over a data set: patches of the most used codes, use of all, lengths
"""

from __future__ import annotations

import colorsys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from lavit.config import InputError
from lavit.data.sources import load_records
from lavit.model import LaVIT

GAP, LINE, LETTER = 6, 20, 6  # pixels: between cells, height of a row of text, width of a letter
INK, PALE, BLUE, RED = (20, 20, 20), (225, 225, 225), (52, 101, 164), (220, 40, 40)
BICUBIC = Image.Resampling.BICUBIC
Place = tuple[int, int]  # (picture, patch)


def _boxes(patches: int, size: int) -> list[tuple[int, int, int, int]]:
    """The pixels of each patch of a picture, left, top, right and bottom inclusive."""
    edges = np.linspace(0, size, round(patches**0.5) + 1).round().astype(int).tolist()
    sides = [(start, end - 1) for start, end in pairwise(edges)]
    return [(x[0], y[0], x[1], y[1]) for y in sides for x in sides]


def kept_over(image: Image.Image, keep: Bool[Tensor, "patches"], *, size: int = 320) -> Image.Image:
    """The picture, squashed to `size` pixels: dropped patches faded, kept ones framed."""
    base = image.convert("RGB").resize((size, size), BICUBIC)
    picture = Image.blend(base, Image.new("RGB", base.size, (200, 200, 200)), 0.75)
    draw = ImageDraw.Draw(picture)
    for box, kept in zip(_boxes(len(keep), size), keep.tolist(), strict=True):
        if kept:
            picture.paste(base.crop((*box[:2], box[2] + 1, box[3] + 1)), box[:2])
            draw.rectangle(box, outline=RED)
    return picture


def merge_map(
    image: Image.Image,
    keep: Bool[Tensor, "patches"],
    flow: Float[Tensor, "patches patches"],
    *,
    size: int = 320,
) -> Image.Image:
    """A colour and a frame for each kept patch; a dropped one has that of the token it flows to.

    `flow` is `VisualTokenizer.flow` of the picture. A line leads from a dropped patch to the token
    that takes most of it; the more that is, compared with the other tokens, the stronger are line
    and colour.
    """
    base = image.convert("L").convert("RGB").resize((size, size), BICUBIC)
    picture = Image.blend(base, Image.new("RGB", base.size, "white"), 0.35)
    draw = ImageDraw.Draw(picture, "RGBA")
    boxes, taken = _boxes(len(keep), size), flow.sum(0)
    middles = [((left + right) // 2, (top + low) // 2) for left, top, right, low in boxes]
    kept = keep.nonzero()[:, 0].tolist()
    colours = {patch: _colour(number) for number, patch in enumerate(kept)}
    lines = []
    for patch in (~keep).nonzero()[:, 0].tolist():
        token = int(flow[:, patch].argmax())
        strength = float(flow[token, patch] / taken[patch].clamp(min=1e-12))
        draw.rectangle(boxes[patch], fill=(*colours[token], round(70 + 120 * strength)))
        lines.append(([middles[patch], middles[token]], round(60 + 160 * strength)))
    for patch in kept:
        draw.rectangle(boxes[patch], fill=(*colours[patch], 130), outline=INK, width=2)
    for ends, strength in lines:
        draw.line(ends, fill=(*INK, strength), width=1)
    return picture


def token_maps(
    model: LaVIT, image: Image.Image, keep: Bool[Tensor, "1 patches"]
) -> tuple[Image.Image, Image.Image]:
    """`kept_over` and `merge_map` of a picture whose keep mask is known."""
    flow = model.visual_tokenizer.flow(model.patches([image]), keep)[0].float().cpu()
    mask = keep[0].cpu()
    return kept_over(image, mask), merge_map(image, mask, flow)


def _colour(number: int) -> tuple[int, int, int]:
    """Neighbouring numbers get hues far apart (golden ratio), and two of three lightnesses."""
    lightness = (0.5, 0.65, 0.38)[number % 3]
    red, green, blue = colorsys.hls_to_rgb(number * 0.618034 % 1, lightness, 0.8)
    return round(255 * red), round(255 * green), round(255 * blue)


def occurrences(
    picture_codes: Sequence[Int[Tensor, "_"]],
    keep: Bool[Tensor, "images patches"],
    *,
    codes: int,
    each: int,
) -> dict[int, list[Place]]:
    """Where the most used codes stand, most used first: `each` places, each in another picture.

    Of more pictures than that, `each` are taken at even distances in their order.
    """
    places: dict[int, dict[int, Place]] = defaultdict(dict)
    count: Counter[int] = Counter()
    for number, (found, mask) in enumerate(zip(picture_codes, keep, strict=True)):
        count.update(found.tolist())
        for code, patch in zip(found.tolist(), mask.nonzero()[:, 0].tolist(), strict=True):
            places[code].setdefault(number, (number, patch))
    chosen = {}
    for code in sorted(count, key=lambda code: (-count[code], code))[:codes]:
        firsts = list(places[code].values())
        step = max(1.0, len(firsts) / each)
        chosen[code] = [firsts[int(i * step)] for i in range(min(each, len(firsts)))]
    return chosen


def code_gallery(
    found: Mapping[int, Sequence[Place]],
    count: Mapping[int, int],
    picture: Callable[[int], Image.Image],
    *,
    grid: int,
    cell: int = 56,
) -> Image.Image:
    """A row a code: its number, its uses, and patches that got it with half a patch around each."""
    label, step, half = 92, cell + GAP, cell // 2
    size = (label + max(map(len, found.values())) * step + GAP, len(found) * step + GAP)
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    wanted = []
    for row, (code, places) in enumerate(found.items()):
        top = GAP + row * step
        draw.multiline_text((GAP, top + half - 14), f"code {code}\n{count[code]} times", fill=INK)
        wanted += [(place, (label + at * step, top)) for at, place in enumerate(places)]
    last, image = -1, page
    for (number, patch), (left, top) in sorted(wanted):  # every picture is opened once
        if number != last:
            last = number
            image = picture(number).convert("RGB").resize((grid * half, grid * half), BICUBIC)
            image = ImageOps.expand(image, half // 2, PALE)
        x, y = patch % grid * half, patch // grid * half
        page.paste(image.crop((x, y, x + cell, y + cell)), (left, top))
        x, y = left + half // 2 - 1, top + half // 2 - 1
        draw.rectangle((x, y, x + half + 1, y + half + 1), outline=RED)
    return page


def bars(values: Sequence[float], *, title: str, low: str, high: str) -> Image.Image:
    """A bar chart; `low` and `high` stand under the first and last bar, the largest by the axis."""
    page = Image.new("RGB", (640, 240), "white")
    draw = ImageDraw.Draw(page)
    left, top, right, bottom = 52, 26, 630, 216
    most = max([*values, 1e-12])
    edges = np.linspace(left, right, len(values) + 1).tolist()
    for value, (start, end) in zip(values, pairwise(edges), strict=True):
        if value > 0:
            height = max(1.0, (bottom - top) * value / most)
            end = max(start, end - (end - start > 4))
            draw.rectangle((start, bottom - height, end, bottom), fill=BLUE)
    draw.line((left, bottom, right, bottom), fill=INK)
    draw.text((left, 6), title, fill=INK)
    draw.text((4, top - 4), f"{most:.4g}", fill=INK)
    draw.text((left, bottom + 6), low, fill=INK)
    draw.text((right - draw.textlength(high), bottom + 6), high, fill=INK)
    return page


def write_gallery(
    model: LaVIT,
    data: str | Path,
    out: Path,
    *,
    split: str = "train",
    codes: int = 40,
    patches: int = 12,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write OUT/codes.png, use.png and lengths.png of a split and return their figures.

    `codes` rows of `patches` patches; `limit` takes that many pictures at even distances. Broken
    pictures are counted.
    """
    records = load_records(data, split)
    number = min(limit or len(records), len(records))
    chosen, tokens = [], []
    for at in range(number):
        record = records[at * len(records) // number]
        try:
            tokens.append(model.encode_images([record.open()]))
            chosen.append(record)
        except InputError:
            pass  # counted below
        if progress:
            progress(at + 1, number)
    if not tokens:
        remedy = "lavit data check says why"
        raise InputError(f"none of the {number} pictures of {data} can be read: {remedy}")
    found = [part.codes.cpu() for part in tokens]
    use = torch.bincount(torch.cat(found), minlength=model.config.visual_tokenizer.codes)
    lengths = torch.cat([part.lengths.cpu() for part in tokens])
    keep = torch.cat([part.keep.cpu() for part in tokens])
    live, mean = float((use > 0).double().mean()), float(lengths.double().mean())
    deviation = float(lengths.double().std(correction=0))
    places = occurrences(found, keep, codes=codes, each=patches)
    grid, uses = model.config.vision.grid, dict(enumerate(use.tolist()))
    pages = {
        "codes.png": code_gallery(places, uses, lambda at: chosen[at].open(), grid=grid),
        "use.png": bars(
            use.sort(descending=True).values.tolist(),
            title=f"uses of each of {len(use)} codes, most used first: {live:.1%} are used at all",
            low="most used",
            high="least used",
        ),
        "lengths.png": bars(
            torch.bincount(lengths, minlength=keep.shape[1] + 1)[1:].tolist(),
            title=f"pictures by number of tokens: mean {mean:.1f}, deviation {deviation:.1f}",
            low="1",
            high=str(keep.shape[1]),
        ),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, page in pages.items():
            page.save(out / name)
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror or error}") from error
    return {
        "pictures": len(chosen),
        "broken": number - len(chosen),
        "tokens": int(lengths.sum()),
        "live_codes": live,
        "mean_length": mean,
        "length_spread": deviation / mean,
    }


def sheet(rows: Sequence[Sequence[Image.Image | str]], *, cell: int = 128) -> Image.Image:
    """Rows of texts and pictures in squares of `cell` pixels, on white; rows of text are low."""
    heights = [LINE if all(isinstance(item, str) for item in row) else cell for row in rows]
    width = max(map(len, rows)) * (cell + GAP) + GAP
    page = Image.new("RGB", (width, sum(heights) + GAP * (len(rows) + 1)), "white")
    draw = ImageDraw.Draw(page)
    top = GAP
    for row, height in zip(rows, heights, strict=True):
        for left, item in zip(range(GAP, width, cell + GAP), row, strict=False):
            if isinstance(item, str):
                room = (cell if height == cell else width) // LETTER
                draw.multiline_text((left, top + 4), textwrap.fill(item, room), fill=INK)
            else:
                page.paste(item.convert("RGB").resize((cell, cell), BICUBIC), (left, top))
        top += height + GAP
    return page

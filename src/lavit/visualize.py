"""Pictures about the tokenizer: kept patches, where the dropped ones flow, what codes stand for, charts of a training.

    kept_over, merge_map     over one picture: which patches stay, and which kept token took most of each dropped one
    write_gallery            over a data set: patches of the most used codes, use of all codes, lengths

All of it is drawn with Pillow, so that nothing more has to be installed to see what a tokenizer does.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image, ImageDraw
from torch import Tensor

from lavit.config import InputError
from lavit.data.sources import load_records
from lavit.model import LaVIT

GAP, LINE = 6, 20  # pixels between cells; height of a row of text
INK, PALE, BLUE = (20, 20, 20), (225, 225, 225), (52, 101, 164)
Place = tuple[int, int]  # (picture, patch)


def kept_over(image: Image.Image, keep: Bool[Tensor, "patches"], *, size: int = 320) -> Image.Image:
    """The picture, squashed to a square of `size` pixels, with dropped patches faded and kept ones framed."""
    grid = round(len(keep) ** 0.5)
    base = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
    edges = np.linspace(0, size, grid + 1).round().astype(int)
    mask = keep.reshape(grid, grid).cpu().numpy()
    cell = np.zeros((size, size), dtype=bool)
    for y, x in zip(*mask.nonzero(), strict=True):
        cell[edges[y] : edges[y + 1], edges[x] : edges[x + 1]] = True
    faded = 0.25 * base + 0.75 * 200
    picture = Image.fromarray(np.where(cell[..., None], base, faded).round().astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for y, x in zip(*mask.nonzero(), strict=True):
        box = (edges[x], edges[y], edges[x + 1] - 1, edges[y + 1] - 1)
        draw.rectangle([int(edge) for edge in box], outline=(220, 40, 40))
    return picture


def merge_map(
    image: Image.Image,
    keep: Bool[Tensor, "patches"],
    flow: Float[Tensor, "patches patches"],
    *,
    size: int = 320,
) -> Image.Image:
    """A colour and a frame for each kept patch; a dropped one has the colour of the token that takes most of it.

    `flow` is `VisualTokenizer.flow` of the picture. A line leads from a dropped patch to its token; the more of the patch
    that token takes, compared with the other tokens, the stronger are line and colour.
    """
    grid = round(len(keep) ** 0.5)
    base = image.convert("L").convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    picture = Image.blend(base, Image.new("RGB", base.size, "white"), 0.35)
    draw = ImageDraw.Draw(picture, "RGBA")
    edges = np.linspace(0, size, grid + 1).round().astype(int).tolist()
    boxes = [(edges[x], edges[y], edges[x + 1] - 1, edges[y + 1] - 1) for y in range(grid) for x in range(grid)]
    kept, taken = keep.nonzero()[:, 0].tolist(), flow.sum(0)
    colours = {patch: _colour(number) for number, patch in enumerate(kept)}
    lines = []
    for patch in (~keep).nonzero()[:, 0].tolist():
        token = int(flow[:, patch].argmax())
        strength = float(flow[token, patch] / taken[patch].clamp(min=1e-12))
        draw.rectangle(boxes[patch], fill=(*colours[token], round(70 + 120 * strength)))
        lines.append((patch, token, strength))
    for patch in kept:
        draw.rectangle(boxes[patch], fill=(*colours[patch], 130), outline=INK, width=2)
    for patch, token, strength in lines:
        ends = [((box[0] + box[2]) // 2, (box[1] + box[3]) // 2) for box in (boxes[patch], boxes[token])]
        draw.line(ends, fill=(*INK, round(60 + 160 * strength)), width=1)
    return picture


def _colour(number: int) -> tuple[int, int, int]:
    """Neighbouring numbers get hues far apart (steps of the golden ratio), and two of three lightnesses."""
    red, green, blue = colorsys.hls_to_rgb(number * 0.618034 % 1, (0.5, 0.65, 0.38)[number % 3], 0.8)
    return round(255 * red), round(255 * green), round(255 * blue)


def occurrences(
    picture_codes: Sequence[Int[Tensor, "_"]],
    keep: Bool[Tensor, "images patches"],
    *,
    codes: int,
    each: int,
) -> dict[int, list[Place]]:
    """Where the most used codes stand, most used first: up to `each` places a code, each in another picture.

    Of more pictures than that, `each` are taken at even distances in their order.
    """
    places: dict[int, dict[int, Place]] = {}
    count: dict[int, int] = {}
    for number, (found, mask) in enumerate(zip(picture_codes, keep, strict=True)):
        for code, patch in zip(found.tolist(), mask.nonzero()[:, 0].tolist(), strict=True):
            count[code] = count.get(code, 0) + 1
            places.setdefault(code, {}).setdefault(number, (number, patch))
    best = sorted(count, key=lambda code: (-count[code], code))[:codes]
    chosen = {}
    for code in best:
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
    """A row a code: its number, how often it was used, and patches that got it, each with half a patch around it."""
    label, longest = 92, max(map(len, found.values()))
    page = Image.new("RGB", (label + longest * (cell + GAP) + GAP, len(found) * (cell + GAP) + GAP), "white")
    draw = ImageDraw.Draw(page)
    rows = {code: GAP + row * (cell + GAP) for row, code in enumerate(found)}
    for code, top in rows.items():
        draw.multiline_text((GAP, top + cell // 2 - 14), f"code {code}\n{count[code]} times", fill=INK)
    wanted = sorted((place, code, column) for code, places in found.items() for column, place in enumerate(places))
    opened: tuple[int, Image.Image | None] = (-1, None)
    for (number, patch), code, column in wanted:  # every picture is opened once
        if opened[0] != number:
            side = grid * cell // 2
            opened = (number, picture(number).convert("RGB").resize((side, side), Image.Resampling.BICUBIC))
        left, half = label + column * (cell + GAP), cell // 2
        x, y = patch % grid * half - half // 2, patch // grid * half - half // 2
        tile = Image.new("RGB", (cell, cell), PALE)
        tile.paste(opened[1], (-x, -y))
        page.paste(tile, (left, rows[code]))
        inner = (left + half // 2 - 1, rows[code] + half // 2 - 1)
        draw.rectangle((*inner, inner[0] + half + 1, inner[1] + half + 1), outline=(220, 40, 40))
    return page


def bars(values: Sequence[float], *, title: str, low: str, high: str, size: Place = (640, 240)) -> Image.Image:
    """A bar chart; `low` and `high` stand under the first and the last bar, the largest value beside the axis."""
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    left, top, right, bottom = 52, 26, size[0] - 10, size[1] - 24
    most = max([*values, 1e-12])
    for number, value in enumerate(values):
        start, end = (left + (right - left) * edge / len(values) for edge in (number, number + 1))
        if value > 0:
            height = max(1.0, (bottom - top) * value / most)
            draw.rectangle((start, bottom - height, max(start, end - (end - start > 4)), bottom), fill=BLUE)
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

    `codes` rows of `patches` patches; `limit` takes that many pictures at even distances. Broken pictures are counted.
    """
    records = load_records(data, split)
    number = min(limit or len(records), len(records))
    chosen, tokens, broken = [], [], 0
    for at in range(number):
        record = records[at * len(records) // number]
        try:
            tokens.append(model.encode([record.open()]))
            chosen.append(record)
        except InputError:
            broken += 1
        if progress:
            progress(at + 1, number)
    if not tokens:
        raise InputError(f"none of the {number} pictures of {data} can be read: lavit data check says why")
    found = [part.codes.cpu() for part in tokens]
    use = torch.bincount(torch.cat(found), minlength=model.config.tokenizer.codes)
    lengths = torch.cat([part.lengths.cpu() for part in tokens])
    keep = torch.cat([part.keep.cpu() for part in tokens])
    live, mean = float((use > 0).double().mean()), float(lengths.double().mean())
    pages = {
        "codes.png": code_gallery(
            occurrences(found, keep, codes=codes, each=patches),
            dict(enumerate(use.tolist())),
            lambda at: chosen[at].open(),
            grid=model.config.vision.grid,
        ),
        "use.png": bars(
            use.sort(descending=True).values.tolist(),
            title=f"uses of each of {len(use)} codes, most used first: {live:.1%} are used at all",
            low="most used",
            high="least used",
        ),
        "lengths.png": bars(
            torch.bincount(lengths, minlength=keep.shape[1] + 1)[1:].tolist(),
            title=f"pictures by number of tokens: mean {mean:.1f}, deviation {float(lengths.double().std(correction=0)):.1f}",
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
        "broken": broken,
        "tokens": int(lengths.sum()),
        "live_codes": live,
        "mean_length": mean,
        "length_spread": float(lengths.double().std(correction=0)) / mean,
    }


def sheet(rows: Sequence[Sequence[Image.Image | str]], *, cell: int = 128) -> Image.Image:
    """Rows of pictures and texts on white, each picture in a square of `cell` pixels; rows of text alone are low."""
    heights = [cell if any(not isinstance(item, str) for item in row) else LINE for row in rows]
    width = max(map(len, rows)) * (cell + GAP) + GAP
    page = Image.new("RGB", (width, sum(heights) + GAP * (len(rows) + 1)), (255, 255, 255))
    draw = ImageDraw.Draw(page)
    top = GAP
    for row, height in zip(rows, heights, strict=True):
        for column, item in enumerate(row):
            left = GAP + column * (cell + GAP)
            if isinstance(item, str):
                _text(draw, item, left, top, cell if height == cell else width)
            else:
                page.paste(item.convert("RGB").resize((cell, cell), Image.Resampling.BICUBIC), (left, top))
        top += height + GAP
    return page


def _text(draw: ImageDraw.ImageDraw, text: str, left: int, top: int, width: int) -> None:
    """Text broken at spaces to the width of a cell."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    draw.multiline_text((left, top + 4), "\n".join(lines), fill=(20, 20, 20))

"""Pictures about pictures: kept patches over an image, and sheets of pictures in rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageDraw
from torch import Tensor

GAP, LINE = 6, 20  # pixels between cells; height of a row of text


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

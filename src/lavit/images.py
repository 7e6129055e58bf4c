"""PIL pictures and tensors: safe open, resize, normalise, and back.

Every picture enters the program through `open_image`: any mode and format Pillow decodes becomes
plain RGB, upright (EXIF), transparency laid on white, the first frame of an animation. Sizes are
checked from the header, before a pixel is decoded. `pixels` squashes to a square, bicubic, no crop,
as the published preprocessing does (method: arXiv 2309.04669); the decoder's picture sizes stand in
`ASPECT_SIZES`.
"""

from __future__ import annotations

import io
import stat
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from lavit.config import InputError

MAX_PIXELS = 64 * 1024 * 1024  # larger headers are refused: a few kB of file could ask for GB of memory

# width:height -> (height, width) of the 1024-px decoder
ASPECT_SIZES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "1:1": (1024, 1024),
        "4:3": (896, 1152),
        "3:2": (832, 1216),
        "16:9": (768, 1344),
        "2:3": (1216, 832),
        "3:4": (1152, 896),
    }
)

_ORIENTATION = 0x0112  # EXIF tag; its value says how to turn the stored rows to stand upright
_UPRIGHT = MappingProxyType(
    {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
)


def aspect_size(ratio: str) -> tuple[int, int]:
    """(height, width) in pixels of an aspect ratio such as "4:3"; an unknown one raises
    `InputError`.
    """
    if ratio not in ASPECT_SIZES:
        raise InputError(f"aspect ratio {ratio!r} is not known: choose one of {', '.join(ASPECT_SIZES)}")
    return ASPECT_SIZES[ratio]


def open_image(source: str | Path | bytes | Image.Image) -> Image.Image:
    """Open a picture (file, encoded bytes, or PIL image) as upright RGB on white.

    16-bit greys keep their upper 8 bits; 32-bit integers are read as 16-bit if any value is over
    255; floats up to 1 are taken as 0..1, others as 0..255. A missing file, a folder, something
    that is no picture, a damaged picture and one of more than `MAX_PIXELS` raise `InputError` with
    one line naming the source.
    """
    if isinstance(source, Image.Image):
        name = repr(getattr(source, "filename", "") or "the given picture")
        return _to_rgb(_decode(source, name))
    if isinstance(source, bytes):
        return _open_stream(io.BytesIO(source), f"the given data ({len(source)} bytes)")
    name = repr(str(source))
    _check_file(Path(source), name)
    try:
        with open(source, "rb") as stream:
            return _open_stream(stream, name)
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or error}") from error


def pixels(
    images: Sequence[Image.Image], size: int, mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "images 3 size size"]:
    """Squash pictures to size x size (bicubic, no crop), scale to 0..1 and normalise per channel;
    float32.

    With mean = std = (0.5, 0.5, 0.5) the values lie in -1..1 and `to_image` is the inverse.
    """
    batch = np.empty((len(images), size, size, 3), dtype=np.uint8)
    for row, image in zip(batch, images, strict=True):
        image = image if image.mode == "RGB" else open_image(image)
        row[:] = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    scaled = torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 255
    shift, scale = (torch.tensor(tuple(value)).view(3, 1, 1) for value in (mean, std))
    return ((scaled - shift) / scale).contiguous()


def to_image(picture: Float[Tensor, "3 height width"]) -> Image.Image:
    """Values in -1..1 (clipped) as an RGB picture; a value that is not finite raises ValueError."""
    picture = picture.detach().float().cpu()
    if not torch.isfinite(picture).all():
        raise ValueError("the picture holds values that are not finite: has the decoder's training diverged?")
    levels = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


def _check_file(path: Path, name: str) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise InputError(f"{name} does not exist: give the path of a picture file") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISDIR(mode):
        raise InputError(f"{name} is a folder: give the path of a picture file")
    if not stat.S_ISREG(mode):
        raise InputError(f"{name} is not a regular file: give the path of a picture file")


def _open_stream(stream: io.BufferedIOBase, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():  # Pillow's own, higher limit only warns; ours below refuses
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(stream)
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is not a picture, or is damaged: no known format matches it") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} is too large ({error}): at most {MAX_PIXELS / 1e6:.0f} megapixels") from error
    except Exception as error:  # decoders raise anything (struct.error, SyntaxError, ...) on a broken header
        raise InputError(f"{name} is damaged: {_line(error)}") from error
    with image:
        if image.format == "EPS":  # Pillow would run Ghostscript on it
            raise InputError(f"{name} is an EPS drawing: convert it to PNG or JPEG first")
        return _to_rgb(_decode(image, name))


def _decode(image: Image.Image, name: str) -> Image.Image:
    """Check the header's size, decode the first frame and turn it upright."""
    width, height = image.size
    if width < 1 or height < 1:
        raise InputError(f"{name} is empty: {width}x{height} pixels")
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{name} is too large: {width}x{height} pixels, at most {MAX_PIXELS / 1e6:.0f} megapixels; scale it down"
        )
    try:
        if getattr(image, "n_frames", 1) > 1 and image.tell() != 0:
            image.seek(0)
        image.load()
    except Exception as error:  # as above: whatever a decoder raises, the file is what is wrong
        raise InputError(f"{name} is damaged or cut short: {_line(error)}") from error
    turn = _UPRIGHT.get(_orientation(image))  # after load: TIFF turns itself and drops the tag there
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a broken EXIF block says nothing about the pixels: the picture stays as stored
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_grey_levels(image)).convert("RGB")
    if image.mode == "La":  # premultiplied; Pillow converts it to LA alone
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _grey_levels(image: Image.Image) -> np.ndarray:
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    if image.mode.startswith("I;16") or (image.mode == "I" and values.max() > 255):
        values = values // 256
    elif image.mode == "F" and values.max() <= 1:
        values = np.rint(values * 255)
    return values.clip(0, 255).astype(np.uint8)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

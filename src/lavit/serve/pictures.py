"""Pictures that clients send and get: data URLs, uploads, and addresses where fetching is allowed.

What is sent is checked by its header, decoded in a thread and squashed at once to the encoder's
square, as `images.pixels` would do later: the tokens are the same, and nothing large waits in the
queue. A string is never taken for a path.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from lavit.config import InputError
from lavit.images import open_image
from lavit.serve.errors import ApiError
from lavit.serve.fetch import Fetcher
from lavit.serve.limits import Limits

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
THREADS = 2  # pictures decoded at a time


class SentPictures:
    """The border of a server for pictures; `side` is that of the encoder's square in pixels."""

    def __init__(self, side: int, limits: Limits, fetcher: Fetcher | None = None) -> None:
        self.side, self.limits, self.fetcher = side, limits, fetcher
        self._threads = ThreadPoolExecutor(THREADS, "pictures")

    async def sent(self, picture: str | bytes) -> Image.Image:
        """The picture of an address or of a file's bytes, squashed; `ApiError` for anything else.

        An address is a data URL in base64, or, where a fetcher is there, one of http or https.
        """
        loop = asyncio.get_running_loop()
        if isinstance(picture, str) and picture[:5].lower() != "data:":
            if self.fetcher is None or not picture[:8].lower().startswith(("http://", "https://")):
                said = (
                    "this server takes pictures as data URLs (data:image/png;base64,…) or uploads"
                )
                raise ApiError(400, said, param="image_url", code="invalid_image_url")
            picture = await loop.run_in_executor(self._threads, self.fetcher.get, picture)
        return await loop.run_in_executor(self._threads, self._open, picture)

    async def encoded(self, picture: Image.Image, kind: str = "png", quality: int = 100) -> str:
        """A file of the kind png, jpeg or webp in base64."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, encode, picture, kind, quality)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _open(self, picture: str | bytes) -> Image.Image:
        data = data_of(picture) if isinstance(picture, str) else picture
        try:
            check_header(data, self.limits.picture_pixels)
            whole = open_image(data)
        except InputError as error:
            raise ApiError(400, str(error), code="invalid_image") from error
        return whole.resize((self.side, self.side), Image.Resampling.BICUBIC)


def data_of(address: str) -> bytes:
    """The bytes of a data URL in base64; another raises `ApiError`."""
    head, comma, body = address.partition(",")
    try:
        if not comma or not head.lower().endswith(";base64"):
            raise ValueError("it is not of the form data:image/png;base64,…")
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        said = f"the picture's data URL cannot be read: {error}"
        raise ApiError(400, said, param="image_url", code="invalid_base64_image") from error


def check_header(data: bytes, most: int) -> None:
    """Raise `InputError` for what is no picture of the `FORMATS`, or has more than `most` pixels.

    Nothing is decoded.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except Exception as error:  # decoders raise anything on a broken header, and for bombs
        known = f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise InputError(f"the data is no picture, or is damaged: send {known}") from error
    if width * height > most:
        limit = f"at most {most / 1e6:.0f} megapixels are taken"
        raise InputError(f"the picture is too large: {width}x{height} pixels, {limit}")


def encode(picture: Image.Image, kind: str = "png", quality: int = 100) -> str:
    """A picture as a file in base64."""
    stream = io.BytesIO()
    picture.save(stream, kind, **({} if kind == "png" else {"quality": max(1, quality)}))
    return base64.b64encode(stream.getvalue()).decode()


def data_url(encoded: str, kind: str = "png") -> str:
    """A file in base64 as a data URL."""
    return f"data:image/{kind};base64,{encoded}"

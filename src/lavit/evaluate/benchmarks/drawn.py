"""Pictures that a row draws: files of a folder, known by their SHA-256."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from lavit.config import write_whole
from lavit.files import sha256


class Drawings:
    """A folder for what is drawn. What is kept of a prediction is {"files": {name: SHA-256}}."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[Path, tuple[int, int, str]] = {}  # of files as they were last seen

    def save(self, name: str, image: Image.Image) -> dict[str, str]:
        """Write a picture as PNG; returns its name and hash."""
        data = io.BytesIO()
        image.save(data, format="PNG")
        return self.write(name, data.getvalue())

    def write(self, name: str, data: bytes) -> dict[str, str]:
        """Write a file, whole or not at all; returns its name and hash."""
        write_whole(self.folder / name, data)
        return {name: hashlib.sha256(data).hexdigest()}

    def there(self, made: Any) -> bool:
        """Whether all files of a prediction lie in the folder as they were written."""
        files: Mapping[str, str] = made["files"]
        return all(self._hash(self.folder / name) == wanted for name, wanted in files.items())

    def paths(self, made: Any) -> list[Path]:
        """The files of a prediction."""
        return [self.folder / name for name in made["files"]]

    def _hash(self, path: Path) -> str | None:
        try:
            about = path.stat()
            if self.known.get(path, ())[:2] != (about.st_mtime_ns, about.st_size):
                self.known[path] = (about.st_mtime_ns, about.st_size, sha256(path))
        except OSError:
            return None
        return self.known[path][2]

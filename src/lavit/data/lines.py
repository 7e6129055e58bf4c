"""Files of JSON lines, read so that a broken line is named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lavit.config import InputError


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbers and objects of a file of JSON lines, blank ones passed over.

    A line that is no object raises `InputError` with its number.
    """
    with Path(path).open("rb") as file:  # as text, some characters of a string would end a line
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line) if line.strip() else {}
            except (ValueError, RecursionError) as error:
                said = " ".join(str(error).split())
                raise InputError(f"{path}, line {number} is not valid JSON: {said}") from error
            if not isinstance(row, dict):
                raise InputError(f"{path}, line {number} is no JSON object")
            if line.strip():
                yield number, row

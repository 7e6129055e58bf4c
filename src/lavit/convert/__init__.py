"""Published weights and fixtures ⇄ ours: the only room that knows foreign names (names.py)."""

from lavit.convert.fixture import Result, check_fixture
from lavit.convert.published import (
    Converted,
    convert_encoder,
    convert_published,
    convert_reverse,
)

__all__ = [
    "Converted",
    "Result",
    "check_fixture",
    "convert_encoder",
    "convert_published",
    "convert_reverse",
]

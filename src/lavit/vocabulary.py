"""The joint vocabulary: an LM's own text ids, image start, image end, the codes (paper Sec. 3.2).

    0 ............ text_size - 1 | text_size   | text_size + 1 | text_size + 2 ......... size - 1
    the LM's own text ids        | image start | image end     | code 0 ... code K - 1

This is the only file that adds an offset or knows the order of the parts.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Int
from torch import Tensor

from lavit.config import InputError

MARKERS = 2  # image start and image end stand before the codes


@dataclass(frozen=True)
class Vocabulary:
    """Joint ids of a language model with `text_size` rows of its own and a codebook of `codes`.

    `end` is the LM's end-of-text id; its tokenizer may know fewer ids than it has rows.
    """

    text_size: int
    codes: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.end < self.text_size:
            raise InputError(f"end id {self.end} is outside the text ids 0..{self.text_size - 1}")
        if self.codes < 1:
            raise InputError(f"a vocabulary needs at least one code, not {self.codes}")

    @property
    def image_start(self) -> int:
        """Id that opens an image."""
        return self.text_size

    @property
    def image_end(self) -> int:
        """Id that closes an image."""
        return self.text_size + 1

    @property
    def visual_size(self) -> int:
        """Number of rows behind the text ids: both markers and the codes."""
        return MARKERS + self.codes

    @property
    def size(self) -> int:
        """Number of joint ids."""
        return self.text_size + self.visual_size

    def ids(self, codes: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Joint ids of codebook indices; inverse of `codes_of`."""
        return codes + self.text_size + MARKERS

    def codes_of(self, ids: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Codebook indices of joint ids; raises `InputError` where an id is not a code."""
        strangers = ids[~self.is_code(ids)].tolist()
        if strangers:
            raise InputError(f"ids {strangers[:5]} are not codes of this vocabulary")
        return ids - self.text_size - MARKERS

    def rows(self, ids: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Rows of joint visual ids in the visual table (0 image start, 1 image end, 2… codes)."""
        return ids - self.text_size

    def is_visual(self, ids: Int[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        """True where an id is image start, image end or a code."""
        return ids >= self.text_size

    def is_code(self, ids: Int[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        """True where an id is a code."""
        return ids >= self.text_size + MARKERS

    @property
    def writing(self) -> slice:
        """Visual rows allowed inside an image: image end and every code (a contiguous range)."""
        return slice(1, self.visual_size)

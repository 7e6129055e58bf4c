"""What the verbs of a pipeline take and give: inputs, options, messages.

The options of a verb are the keys of one `TypedDict`, so no option can be given to a verb that does
not use it:

    TextOptions            seed, sampling                         complete; chat, reply in words
      ReadingOptions       + keep                                 caption
        AskingOptions      + check_answerable                     ask
    DrawingOptions         seed, sampling, guidance, steps, size  streams; chat, reply in a picture
      RankedOptions        + best_of, scorer                      draw, edit, compose
      OpenOptions          + image_sampling                       generate; chat, open reply
    ReconstructionOptions  seed, keep, guidance, steps, size      reconstruct
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict

from PIL import Image

from lavit.generate.sampling import Sampling
from lavit.images import ImageInput
from lavit.visual_tokenizer.selector import KeepPolicy

ImageList = Sequence[ImageInput]
Pieces = Sequence[ImageInput]  # words (strings) and pictures (all else), in order
PiecesList = Sequence[Pieces]
Messages = Sequence[Mapping[str, Any]]  # a conversation, in the form of Hugging Face chats
MessagesList = Sequence[Messages]
Written = list[str | Image.Image]  # words and pictures, in order

KeepLike = str | int | float | KeepPolicy
Seed = int | Sequence[int]
PictureSize = tuple[int, int] | str
Scorer = Callable[[str, Image.Image], float]


class TextOptions(TypedDict, total=False):
    """How text is written."""

    seed: Seed  # 0; input i takes seed + i, or entry i of a list
    sampling: Sampling | None  # None: as the pipeline's protocol says


class ReadingOptions(TextOptions, total=False):
    """How text about a picture is written."""

    keep: KeepLike  # patches that are looked at: "auto", "all", 64 of them, 0.25 of them, …


class AskingOptions(ReadingOptions, total=False):
    """How a question is answered."""

    check_answerable: bool  # False; ask first whether the picture answers it, else "unanswerable"


class CodesOptions(TypedDict, total=False):
    """How the codes of a picture are written."""

    seed: Seed  # 0; input i takes seed + i, or entry i of a list, for its codes and its noise
    sampling: Sampling | None  # None: as the pipeline's protocol says
    guidance: float | None  # of Eq. 7; None: that of the sampling


class DrawingOptions(CodesOptions, total=False):
    """How a picture is written and painted."""

    steps: int | None  # of the pixel decoder
    size: PictureSize | None  # (height, width) in pixels, or an aspect ratio such as "4:3"


class RankedOptions(DrawingOptions, total=False):
    """How the best of several candidates is written."""

    best_of: int | None  # candidates of an input; c takes its seed + c * 2**32 (None: the protocol)
    scorer: Scorer | None  # (words, picture) -> float; None: the likelihood of the words


class OpenOptions(DrawingOptions, total=False):
    """How text with pictures in it is written."""

    image_sampling: Sampling | None  # of the pictures' codes; `sampling` is that of the text


class ReconstructionOptions(TypedDict, total=False):
    """How a picture is turned into tokens, and painted from them."""

    seed: Seed  # as in `DrawingOptions`
    keep: KeepLike  # as in `ReadingOptions`
    guidance: float | None  # of the pixel decoder
    steps: int | None
    size: PictureSize | None


class TextContent(TypedDict):
    """Words of a message."""

    type: Literal["text"]
    text: str


class ImageContent(TypedDict):
    """A picture of a message; it enters the conversation that goes on as its `codes`."""

    type: Literal["image"]
    image: Image.Image
    codes: tuple[int, ...]


class ChatMessage(TypedDict):
    """The assistant's reply, to be appended to the messages."""

    role: Literal["assistant"]
    content: list[TextContent | ImageContent]

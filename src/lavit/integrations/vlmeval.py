"""LaVIT as a model of VLMEvalKit (https://github.com/open-compass/VLMEvalKit).

    from vlmeval.config import supported_VLM
    supported_VLM["lavit-7b"] = partial(LaVITModel, pretrained="lavit-7b")

in its config.py or before its `run.main`, then `--model lavit-7b --data TASK`. `pretrained` is what
`lavit.load` opens. A message of one picture is captioned where the task is one of captions, else
laid out as a question ("ask", the paper's layout) or as a chat's turn (layout="chat"); one of no or
several pictures, as words and pictures in order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from vlmeval.dataset import DATASET_TYPE
from vlmeval.vlm.base import BaseModel

import lavit
from lavit.config import TO_READ, InputError


class LaVITModel(BaseModel):  # type: ignore[misc]  # Any
    """A loaded pipeline that answers VLMEvalKit's messages."""

    INTERLEAVE = True
    allowed_types = ("text", "image")

    def __init__(
        self,
        pretrained: str = "nano",
        layout: Literal["question", "chat"] = "question",
        protocol: str = "default",
        device: str = "auto",
        dtype: str | None = None,
    ) -> None:
        super().__init__()
        if layout not in ("question", "chat"):
            raise InputError(f"layout is {layout!r}: use 'question' or 'chat'")
        self.layout = layout
        self.pipe = lavit.load(
            pretrained, device=device, dtype=dtype, protocol=protocol, parts=TO_READ
        )

    def generate_inner(
        self, message: Sequence[Mapping[str, str]], dataset: str | None = None
    ) -> str:
        """The reply to parts {"type": "text" or "image", "value": words or a path}, in order."""
        if self.layout == "chat":
            content = [{"type": one["type"], one["type"]: one["value"]} for one in message]
            reply = self.pipe.chat([{"role": "user", "content": content}])["content"]
            return "".join(part["text"] for part in reply if part["type"] == "text")
        pieces: list[Any] = [
            Path(one["value"]) if one["type"] == "image" else one["value"] for one in message
        ]
        images = [piece for piece in pieces if isinstance(piece, Path)]
        if len(images) != 1:
            return self.pipe.complete(pieces)
        if dataset is not None and DATASET_TYPE(dataset) == "Caption":
            return self.pipe.caption(images[0])
        words = (one["value"] for one in message if one["type"] == "text")
        return self.pipe.ask(images[0], "\n".join(words))

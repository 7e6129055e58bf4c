"""The LM as the engine calls it: read prompts, read one token per lane, logits of one modality.

This is the plain way through transformers, which takes any causal LM with keys and values; `packed.py` has a faster
step for some. Allowed ids are a slice of the head: an image-writing lane never pays for the text head (codes are a
contiguous range of rows), a text lane never for the codes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lavit.config import InputError
from lavit.generate.cache import LaneCache
from lavit.modules.language import Language


class Decoder:
    """One causal LM behind a `Language`. `static` keeps shapes fixed; `compile` names a backend to compile the step."""

    def __init__(self, language: Language, *, static: bool = False, compile: str | None = None) -> None:
        self.language = language
        self.static = static
        if "past_key_values" not in inspect.signature(language.body.forward).parameters:
            raise InputError(
                f"{type(language.lm).__name__} takes no past_key_values: use a causal LM that attends to keys and values"
            )
        self._body: Callable = (
            torch.compile(language.body, dynamic=False, backend=compile) if compile else language.body
        )

    @property
    def device(self) -> torch.device:
        """Where the LM is."""
        return self.language.rows.device

    @property
    def context(self) -> int:
        """Number of tokens that the LM can attend to."""
        config = self.language.lm.config.get_text_config()
        limits = [getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window")]
        return min([limit for limit in limits if limit is not None], default=2**31)

    def prefill(
        self, embeddings: Float[Tensor, "lanes tokens width"], lengths: list[int], columns: int
    ) -> tuple[LaneCache, Float[Tensor, "lanes width"]]:
        """Read prompts padded behind; returns their cache and the hidden state of each last token."""
        memory = LaneCache(len(lengths), columns, device=self.device, static=self.static)
        hidden = self._forward(self.language.body, embeddings, memory)
        memory.advance(lengths)
        return memory, hidden[torch.arange(len(lengths)), torch.tensor(lengths) - 1]

    def step(self, ids: Int[Tensor, "lanes"], memory: LaneCache) -> Float[Tensor, "lanes width"]:
        """Read one joint id per lane; returns its hidden state."""
        hidden = self._forward(self._body, self.language.embed(ids[:, None]), memory)
        memory.advance([1] * len(ids))
        return hidden[:, 0]

    def _forward(self, body: Callable, embeddings: Tensor, memory: LaneCache) -> Tensor:
        positions = memory.begin(embeddings.shape[1])
        mask = memory.mask(positions, embeddings.dtype)
        out = body(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=memory,
            use_cache=True,
        )
        return out.last_hidden_state

    def text_logits(self, hidden: Float[Tensor, "lanes width"]) -> Float[Tensor, "lanes text"]:
        """Logits of the text ids."""
        return self.language.text_logits(hidden).float()

    def start_logits(self, hidden: Float[Tensor, "lanes width"]) -> Float[Tensor, "lanes 1"]:
        """Logit of [image start]."""
        return F.linear(hidden, self._head_rows[:1].to(hidden.dtype)).float()

    def writing_logits(self, hidden: Float[Tensor, "lanes width"]) -> Float[Tensor, "lanes writing"]:
        """Logits of what may stand inside an image: image end and the codes."""
        return F.linear(hidden, self._head_rows[self.language.vocabulary.writing].to(hidden.dtype)).float()

    @property
    def _head_rows(self) -> Tensor:
        return self.language.rows if self.language.tied else self.language.head_rows

"""The LM as the engine calls it: read prompts, read one token per lane, logits of one modality.

This is the plain way through transformers, for any causal LM with keys and values; `packed.py` has
a faster step for some. Allowed ids are a slice of the head: an image lane never pays for the text
head (codes are a contiguous range of rows), a text lane never for codes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache

from lavit.config import InputError
from lavit.language.model import Language

Hidden = Float[Tensor, "lanes width"]
CACHE_NAMES = ("past_key_values", "cache")  # the latter since transformers 5.24
CHUNK = 64  # columns are added in multiples of this


class LaneCache(Cache):
    """Keys and values of running rows, each at its own length: rows start and stop at any time.

    Lane l has read `lengths[l]` tokens, in the first columns of its row of the buffers; a step
    writes the next one. A token's column is its position, and what lies behind a lane's length is
    hidden by the mask (x may be attended by the next token):

        lane 0, length 4   x x x x x . .
        lane 1, length 1   x x . . . . .        just opened: an unconditional stream
        lane 2, length 6   x x x x x x x

    `buffers` `[lanes, heads, columns, dim]` are keys, then values of each layer, made at first use.
    `static`: attention sees all columns, so that shapes stay the same from step to step.
    """

    def __init__(
        self,
        lanes: int,
        columns: int,
        *,
        device: torch.device,
        static: bool = False,
    ) -> None:
        super().__init__(layers=[])
        self.columns = columns
        self.static = static
        self.buffers: list[Tensor] = []
        self.lengths = torch.zeros(lanes, dtype=torch.long, device=device)
        self.longest = 0  # max of lengths, known without asking the device

    def begin(self, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Make room for the next `tokens` of every lane.

        Returns their positions `[lanes, tokens]` and the attention bias `[lanes, 1, tokens,
        columns]`: 0 up to each token's own position, -inf behind it.
        """
        needed, device = self.longest + tokens, self.lengths.device
        if needed > self.columns:
            self._widen(max(-(-needed // CHUNK) * CHUNK, self.columns * 3 // 2))
        self.visible = self.columns if self.static else needed
        self.positions = self.lengths[:, None] + torch.arange(tokens, device=device)
        hidden = torch.arange(self.visible, device=device) > self.positions[..., None]
        bias = torch.zeros(hidden.shape, dtype=dtype, device=device)
        return self.positions, bias.masked_fill_(hidden, -torch.inf)[:, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values `[lanes, heads, tokens, dim]` of a layer; returns the visible."""
        found = []
        for at, new in enumerate((key_states, value_states), 2 * layer_idx):
            lanes, heads, _, dim = new.shape
            if at == len(self.buffers):
                self.buffers.append(new.new_zeros(lanes, heads, self.columns, dim))
            buffer = self.buffers[at]
            # layers may lie on several devices
            rows = torch.arange(lanes, device=buffer.device)[:, None]
            buffer[rows, :, self.positions.to(buffer.device)] = new.transpose(1, 2)
            found.append(buffer[:, :, : self.visible])
        return found[0], found[1]

    def advance(self, tokens: list[int]) -> None:
        """Count what each lane has read: 1, or a prompt in an empty cache without its padding."""
        self.lengths = self.lengths + torch.tensor(tokens, device=self.lengths.device)
        self.longest += max(tokens)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns in use (the LM asks for it where no positions are given)."""
        return self.longest

    def keep(self, parents: list[int]) -> None:
        """New lane i continues old lane parents[i]; -1 opens an empty lane."""
        if parents == list(range(len(self.lengths))):
            return
        index = torch.tensor(parents, device=self.lengths.device)
        source = index.clamp(min=0)
        for at, buffer in enumerate(self.buffers):
            used = buffer[:, :, : self.longest].index_select(0, source.to(buffer.device))
            self.buffers[at] = F.pad(used, (0, 0, 0, self.columns - self.longest))
        self.lengths = self.lengths[source].masked_fill(index < 0, 0)
        self.longest = int(self.lengths.max()) if parents else 0

    def join(self, other: LaneCache) -> None:
        """Append the lanes of another cache behind these."""
        columns = max(self.columns, other.columns)
        self._widen(columns)
        other._widen(columns)
        self.buffers = [torch.cat(pair) for pair in zip(self.buffers, other.buffers, strict=True)]
        self.lengths = torch.cat([self.lengths, other.lengths])
        self.longest = max(self.longest, other.longest)

    def _widen(self, columns: int) -> None:
        if columns > self.columns:
            behind = (0, 0, 0, columns - self.columns)
            self.buffers = [F.pad(buffer, behind) for buffer in self.buffers]
            self.columns = columns


class Decoder:
    """One causal LM. `static` keeps shapes fixed; `compile` names a backend to compile the step."""

    def __init__(
        self,
        language: Language,
        *,
        static: bool = False,
        compile: str | None = None,
    ) -> None:
        self.language = language
        self.static = static
        body = language.body
        taken = inspect.signature(body.forward).parameters
        self._cache = next((name for name in CACHE_NAMES if name in taken), "")
        if not self._cache or getattr(body, "_is_stateful", False):
            raise InputError(
                f"{type(language.lm).__name__} keeps no keys and values alone: "
                "use a causal LM that attends to keys and values"
            )
        self._body = torch.compile(body, dynamic=False, backend=compile) if compile else body
        rows = language.rows if language.tied else language.head_rows
        assert rows is not None  # an untied head has rows of its own
        self._head_rows: Tensor = rows

    @property
    def device(self) -> torch.device:
        """Where the LM is."""
        return self.language.rows.device

    @property
    def context(self) -> int:
        """Number of tokens that the LM can attend to."""
        config = self.language.lm.config.get_text_config()
        names = ("max_position_embeddings", "sliding_window")
        limits = [getattr(config, name, None) for name in names]
        return min([limit for limit in limits if limit is not None], default=2**31)

    def prefill(
        self, embeddings: Float[Tensor, "lanes tokens width"], lengths: list[int], columns: int
    ) -> tuple[LaneCache, Hidden]:
        """Read prompts padded behind; returns their cache and each last token's hidden state."""
        memory = LaneCache(len(lengths), columns, device=self.device, static=self.static)
        hidden = self._forward(self.language.body, embeddings, memory)
        memory.advance(lengths)
        return memory, hidden[torch.arange(len(lengths)), torch.tensor(lengths) - 1]

    def step(self, ids: Int[Tensor, "lanes"], memory: LaneCache) -> Hidden:
        """Read one joint id per lane; returns its hidden state."""
        return self.read(self.language.embed(ids[:, None]), memory)

    def read(self, embeddings: Float[Tensor, "lanes 1 width"], memory: LaneCache) -> Hidden:
        """Read one embedding per lane; returns its hidden state."""
        hidden = self._forward(self._body, embeddings, memory)
        memory.advance([1] * len(embeddings))
        return hidden[:, 0]

    def _forward(self, body: Callable[..., Any], embeddings: Tensor, memory: LaneCache) -> Tensor:
        positions, mask = memory.begin(embeddings.shape[1], embeddings.dtype)
        out = body(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{self._cache: memory},
        )
        return out.last_hidden_state

    def text_logits(self, hidden: Hidden) -> Float[Tensor, "lanes text"]:
        """Logits of the text ids."""
        return self.language.text_logits(hidden).float()

    def start_logits(self, hidden: Hidden) -> Float[Tensor, "lanes 1"]:
        """Logit of [image start]."""
        return F.linear(hidden, self._head_rows[:1].to(hidden.dtype)).float()

    def writing_logits(self, hidden: Hidden) -> Float[Tensor, "lanes writing"]:
        """Logits of what may stand inside an image: image end and the codes."""
        rows = self._head_rows[self.language.vocabulary.writing]
        return F.linear(hidden, rows.to(hidden.dtype)).float()

"""Keys and values of running rows ("lanes"), each at its own length: what lets rows start and stop at any time.

Lane l has read `lengths[l]` tokens, in the columns 0 … lengths[l] - 1 of its row of the buffers; a step writes column
lengths[l]. Nothing is padded on the left, a token's column is its position, and what lies behind a lane's length is
hidden by the mask (x may be attended by the next token of each lane):

    lane 0, length 4   x x x x x . .
    lane 1, length 1   x x . . . . .        just opened beside lane 0: an unconditional stream
    lane 2, length 6   x x x x x x x

It is a `transformers.Cache`, so any causal LM of the library writes into it, given position ids and a 4-D mask.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache

CHUNK = 64  # columns are added in multiples of this


class LaneCache(Cache):
    """Buffers `[lanes, heads, columns, dim]` for each layer, made when the LM first writes.

    `static`: attention always sees all `columns`, so that shapes stay the same from step to step.
    """

    def __init__(self, lanes: int, columns: int, *, device: torch.device, static: bool = False) -> None:
        super().__init__(layers=[])
        self.columns = columns
        self.static = static
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.lengths = torch.zeros(lanes, dtype=torch.long, device=device)
        self.longest = 0  # max of lengths, known without asking the device
        self.prefilling = True
        self._lanes = torch.arange(lanes, device=device)

    def begin(self, tokens: int) -> Int[Tensor, "lanes tokens"]:
        """Make room for the next `tokens` of every lane; returns their positions."""
        self.prefilling = tokens > 1 or self.longest == 0
        if self.prefilling and self.longest:
            raise RuntimeError("a prompt is read into an empty cache, tokens are added one by one")
        if self.longest + tokens > self.columns:
            self._widen(max(-(-(self.longest + tokens) // CHUNK) * CHUNK, self.columns * 3 // 2))
        return self.lengths[:, None] + torch.arange(tokens, device=self.lengths.device)

    def visible(self, tokens: int) -> int:
        """Number of columns that the next `tokens` may look at."""
        return self.columns if self.static else self.longest + tokens

    def mask(
        self, positions: Int[Tensor, "lanes tokens"], dtype: torch.dtype
    ) -> Float[Tensor, "lanes 1 tokens columns"]:
        """Attention bias: 0 up to each token's own position, -inf behind it."""
        columns = torch.arange(self.visible(positions.shape[1]), device=positions.device)
        hidden = columns > positions[..., None]
        bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        return bias.masked_fill_(hidden, -torch.inf)[:, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values `[lanes, heads, tokens, dim]` of one layer; returns all visible ones."""
        if layer_idx == len(self.keys):
            for buffers, new in ((self.keys, key_states), (self.values, value_states)):
                lanes, heads, _, dim = new.shape
                buffers.append(new.new_zeros(lanes, heads, self.columns, dim))
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        tokens = key_states.shape[2]
        if self.prefilling:
            keys[:, :, :tokens] = key_states
            values[:, :, :tokens] = value_states
        else:
            # layers may lie on several devices
            lanes, at = self._lanes.to(keys.device), self.lengths.to(keys.device)
            keys[lanes, :, at] = key_states[:, :, 0]
            values[lanes, :, at] = value_states[:, :, 0]
        visible = self.visible(tokens)
        return keys[:, :, :visible], values[:, :, :visible]

    def advance(self, tokens: list[int]) -> None:
        """Count the tokens that each lane has read (padding behind a prompt is not counted, and written over later)."""
        new = torch.tensor(tokens, device=self.lengths.device)
        self.longest = int((self.lengths + new).max()) if self.prefilling else self.longest + 1
        self.lengths = self.lengths + new

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns in use (the LM asks for it where no positions are given)."""
        return self.longest

    def keep(self, parents: list[int]) -> None:
        """New lane i continues old lane parents[i]; -1 opens an empty lane."""
        if parents == list(range(len(self.lengths))):
            return
        index = torch.tensor(parents, device=self.lengths.device)
        source = index.clamp(min=0)
        self._map(lambda buffer: _moved(buffer, source, self.longest))
        self.lengths = self.lengths[source].masked_fill(index < 0, 0)
        self._lanes = torch.arange(len(parents), device=index.device)
        self.longest = int(self.lengths.max()) if parents else 0

    def join(self, other: LaneCache) -> None:
        """Append the lanes of another cache behind these."""
        if not self.keys:
            self.__dict__.update(other.__dict__)
            return
        columns = max(self.columns, other.columns)
        self._widen(columns)
        other._widen(columns)
        self.keys = [torch.cat(pair) for pair in zip(self.keys, other.keys, strict=True)]
        self.values = [torch.cat(pair) for pair in zip(self.values, other.values, strict=True)]
        self.lengths = torch.cat([self.lengths, other.lengths])
        self._lanes = torch.arange(len(self.lengths), device=self.lengths.device)
        self.longest = max(self.longest, other.longest)

    def _widen(self, columns: int) -> None:
        if columns > self.columns:
            self._map(lambda buffer: _widened(buffer, columns))
            self.columns = columns

    def _map(self, change: Any) -> None:
        for buffers in (self.keys, self.values):
            for layer, buffer in enumerate(buffers):
                buffers[layer] = change(buffer)


def _widened(buffer: Tensor, columns: int) -> Tensor:
    lanes, heads, old, dim = buffer.shape
    wide = buffer.new_zeros(lanes, heads, columns, dim)
    wide[:, :, :old] = buffer
    return wide


def _moved(buffer: Tensor, source: Tensor, used: int) -> Tensor:
    moved = buffer.new_zeros(len(source), *buffer.shape[1:])
    moved[:, :, :used] = buffer[:, :, :used].index_select(0, source.to(buffer.device))
    return moved

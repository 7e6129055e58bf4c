"""Attention inside the documents of packed rows without a mask over whole rows (paper Sec. 3.2).

    row  a a a b b c c c d d d d     batches  a a a   b b   d d d d     each causal, none masked
                                              c c c

Documents of like length form a padded batch of their own; a causal batch needs no mask, because
what pads a document stands behind it. Work grows with the sum of squared document lengths, where a
block-diagonal mask costs rows · tokens²: 13 % of a training step of 512-token rows of short
documents. Any transformers LM whose attention goes through the library's interface takes it;
padding of a row is a document of its own, which no other attends to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lavit.config import InputError

NAME = "lavit_documents"  # of the attention, in the library's register


@dataclass(frozen=True)
class DocumentGroups:
    """Where the tokens of packed rows stand in padded batches of documents, and back.

    `places` are the flat positions (row · tokens + column) of all batches, one after the other;
    `pads` the places that hold no token; `back` the place of each flat position; `shapes` the
    (documents, longest) of each batch.
    """

    places: Int[Tensor, "padded"]
    pads: Int[Tensor, "pads"]
    back: Int[Tensor, "total"]
    shapes: tuple[tuple[int, int], ...]

    def to(self, device: torch.device | str) -> DocumentGroups:
        """The same on a device."""
        places, pads, back = self.places.to(device), self.pads.to(device), self.back.to(device)
        return DocumentGroups(places, pads, back, self.shapes)


def group_documents(documents: Int[Tensor, "rows tokens"]) -> DocumentGroups:
    """Group the documents of packed rows by length, half an octave to a group."""
    # shapes are data: the host waits, unless rows come from the CPU, as in training they do
    device, documents = documents.device, documents.cpu()
    opens = torch.ones_like(documents, dtype=torch.bool)
    opens[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = opens.flatten().nonzero()[:, 0]
    lengths = torch.diff(starts, append=torch.tensor([documents.numel()]))
    group = (2 * lengths.double().log2()).ceil().long()
    places, pads, shapes, filled = [], [], [], 0
    back = torch.empty(documents.numel(), dtype=torch.long)
    for number in group.unique().tolist():
        start, length = starts[group == number], lengths[group == number]
        longest = int(length.max())
        column = torch.arange(longest)
        valid = column < length[:, None]
        place = torch.where(valid, start[:, None] + column, start[:, None])
        back[place[valid]] = filled + valid.flatten().nonzero()[:, 0]
        pads.append(filled + (~valid).flatten().nonzero()[:, 0])
        places.append(place.flatten())
        shapes.append((len(start), longest))
        filled += place.numel()
    groups = DocumentGroups(torch.cat(places), torch.cat(pads), back, tuple(shapes))
    return groups.to(device)


class _Reorder(torch.autograd.Function):
    """x[there]. The gradient comes back by index too, not by adding: a token stands in one place.

    `empty` are the rows of x that nothing was taken from.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor, empty: Tensor) -> Tensor:
        ctx.save_for_backward(back, empty)
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        back, empty = ctx.saved_tensors
        return gradient.index_select(0, back).index_fill_(0, empty, 0.0), None, None, None


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    groups: DocumentGroups | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The library's call: attention of packed rows where `groups` are given, else its own `sdpa`.

    query [rows, heads, tokens, dim], key and value [rows, kv_heads, keys, dim]; gives [rows,
    tokens, heads, dim]. Shapes stand here, not in the annotations: a checker of shapes cannot be
    compiled, and the engine compiles this.
    """
    if groups is None:
        options = {**options, "scaling": scaling, "sliding_window": sliding_window}
        parts = query, key, value, attention_mask
        return sdpa_attention_forward(module, *parts, dropout=dropout, **options)
    for name in ("softcap", "position_bias", "s_aux"):
        if options.get(name) is not None:
            kind = type(module).__name__
            raise InputError(f"{kind} attends with {name}, which packed rows do not support yet")
    reorder: Callable[..., Tensor] = _Reorder.apply
    padded = [
        reorder(x.transpose(1, 2).flatten(0, 1), groups.places, groups.back, groups.pads[:0])
        for x in (query, key, value)
    ]
    sizes = [documents * longest for documents, longest in groups.shapes]
    grouped = query.shape[1] != key.shape[1]
    mixed = []
    batches = zip(*(x.split(sizes) for x in padded), strict=True)
    for shape, batch in zip(groups.shapes, batches, strict=True):
        q, k, v = (part.unflatten(0, shape).transpose(1, 2) for part in batch)
        band = _band(shape[1], sliding_window, q.device)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=band, is_causal=band is None,
            dropout_p=dropout, scale=scaling, enable_gqa=grouped,
        )  # fmt: skip
        mixed.append(out.transpose(1, 2).flatten(0, 1))
    out = reorder(torch.cat(mixed), groups.back, groups.places, groups.pads)
    return out.unflatten(0, (len(query), -1)), None


def _band(tokens: int, window: int | None, device: torch.device) -> Tensor | None:
    """Mask of a causal window where documents are longer than it."""
    if not window or tokens <= window:
        return None
    distance = torch.arange(tokens, device=device)[:, None] - torch.arange(tokens, device=device)
    return (distance >= 0) & (distance < window)


def attend_by_document(lm: PreTrainedModel) -> bool:
    """Let an LM attend by `document_attention`; False if it lacks the library's interface."""
    known = getattr(lm, "_supports_attention_backend", False)
    if not known or lm.config._attn_implementation == "eager":
        return False
    AttentionInterface.register(NAME, document_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    lm.set_attn_implementation(NAME)
    return True

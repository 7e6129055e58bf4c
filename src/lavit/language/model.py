"""Language: any causal LM from transformers that reads and writes images too (paper Sec. 3.2).

    text ids ──── the LM's own embedding ───┐
    visual ids ── rows of our own ──────────┼─ LM ─ hidden ─┬─ the LM's own head ─ text logits
    slots ─────── reader ───────────────────┘               └─ visual head ────── visual logits

The LM is left as it is: the new rows are parameters of their own, so nothing of it is resized, the
visual logits are a product with those rows alone, and LoRA (peft, injected in place) leaves the
base weights untouched. `export` joins the rows to a plain transformers checkpoint. Read images
enter as continuous features of a reader (reader.py): a *second* merger, initialised from stage 1.

Packed rows attend document by document (attention.py), and the loss makes its gradients on its way
through the head in chunks (head.py): no mask over whole rows and no full logits ever exist.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lavit.config import InputError
from lavit.language.head import HeadLoss
from lavit.language.reader import Reader
from lavit.sequence import IGNORE, Batch, attention_mask, check_slots, fill_slots
from lavit.visual_tokenizer.attention import (
    DocumentGroups,
    attend_by_document,
    group_documents,
)
from lavit.visual_tokenizer.layers import Keep, Patches
from lavit.visual_tokenizer.merger import MergerBlock
from lavit.vocabulary import Vocabulary

CHUNK = 1024  # positions whose logits exist at one time


@dataclass(frozen=True)
class LanguageLoss:
    """Sums over the target tokens of a batch; divide by the (global) counts.

    `total` goes backward; the rest are figures without gradient, text and visual targets apart.
    """

    total: Float[Tensor, ""]
    text: Float[Tensor, ""]
    visual: Float[Tensor, ""]
    text_tokens: Int[Tensor, ""]
    visual_tokens: Int[Tensor, ""]
    text_correct: Int[Tensor, ""]
    visual_correct: Int[Tensor, ""]


class Language(nn.Module):
    """A causal LM with visual rows, a visual head and a reader for pictures.

    `lm` is any transformers causal LM whose logits are `get_output_embeddings()(hidden)`
    (`check_lm`). `end` is the id that ends a text; `trained` says whether the LM is more than
    freshly initialised: new rows begin accordingly. `read_as` is that of `LanguageConfig`.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        reader: Reader,
        *,
        codes: int,
        end: int,
        trained: bool = True,
        read_as: Literal["features", "codes"] = "features",
    ) -> None:
        super().__init__()
        self.lm, self.reader, self.read_as = lm, reader, read_as
        self.by_document = attend_by_document(lm)
        table, head = table_and_head(lm)
        text_size, self.width = table.shape
        self.vocabulary = Vocabulary(text_size=text_size, codes=codes, end=end)
        self.tied = head is table
        shape = (self.vocabulary.visual_size, self.width)
        self.rows = nn.Parameter(torch.empty(shape))
        self.head_rows = None if self.tied else nn.Parameter(torch.empty(shape))
        _init_like(self.rows, table, trained)
        if self.head_rows is not None:
            _init_like(self.head_rows, head, trained)
        # units of FSDP2
        self._no_split_modules = [*(lm._no_split_modules or ()), MergerBlock.__name__]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up what another process made; this one may not know attention by document yet."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.by_document:
            attend_by_document(self.lm)

    @property
    def embeds(self) -> int:
        """Embeddings of a picture that is written, for rivals that write no codes: 0."""
        return 0

    def next_embedding(self, hidden: Float[Tensor, "lanes width"]) -> Float[Tensor, "lanes width"]:
        """What rivals that write embeddings read next."""
        raise NotImplementedError("this model writes codes")

    @property
    def body(self) -> nn.Module:
        """The LM without its head: ids or embeddings in, hidden states out."""
        return self.lm.base_model

    @property
    def visual_head(self) -> nn.Parameter:
        """Rows of the visual head: those that embed where the LM ties its own."""
        return self.rows if self.head_rows is None else self.head_rows

    @property
    def scale(self) -> float | Float[Tensor, ""]:
        """What the LM's embedding multiplies its rows by (Gemma): the visual rows get the same."""
        return getattr(self.lm.get_input_embeddings(), "embed_scale", 1.0)

    @torch.no_grad()
    def begin_codes(self, vectors: Float[Tensor, "codes size"]) -> None:
        """Begin the rows of codes as a fixed random projection of the codebook's `vectors`.

        Codes that are alike begin alike; mean and spread of the rows stay.
        """
        generator = torch.Generator().manual_seed(0)
        mix = torch.randn(vectors.shape[1], self.width, generator=generator)
        begun = vectors.float().cpu() @ mix
        begun -= begun.mean(0)
        for rows in (self.rows, self.head_rows):
            if rows is not None:
                codes = rows[-len(vectors) :]
                mean = codes.mean(0)
                codes.copy_(begun.to(codes) * ((codes - mean).std() / begun.std()) + mean)

    def recompute(self, on: bool) -> None:
        """Activation checkpointing of the LM's and the reader's blocks."""
        module: Any
        for module in self.reader.modules():
            if hasattr(module, "recompute"):  # of mergers
                module.recompute = on
        if on and not self.lm.supports_gradient_checkpointing:
            kind = type(self.lm).__name__
            raise InputError(f"{kind} cannot recompute its activations: set recompute to False")
        for module in self.lm.modules():
            if hasattr(module, "gradient_checkpointing"):  # the switch of transformers' blocks
                module.gradient_checkpointing = on
                module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def check_lm(self) -> None:
        """Raise `InputError` unless the LM embeds by its table, its head makes its logits, and
        documents of one row do not see each other.
        """
        ids = torch.arange(4, device=self.rows.device)[None] % self.vocabulary.text_size
        embedding: Any = self.lm.get_input_embeddings()
        kind = type(self.lm).__name__
        other = "which is not supported: use another language model"
        with torch.no_grad():
            if not torch.allclose(embedding(ids), embedding.weight[ids] * self.scale, rtol=1e-3):
                said = f"{type(embedding).__name__} does more than look rows up and scale them"
                raise InputError(f"{said}, {other}")
            expected = self.lm(input_ids=ids).logits
            found = self.text_logits(self.body(input_ids=ids).last_hidden_state)
            if not torch.allclose(expected, found, rtol=1e-3, atol=1e-3):
                said = f"{kind} changes its logits behind the head (soft-capping or scaling)"
                raise InputError(f"{said}, {other}")
            places = torch.arange(8, device=ids.device)[None]
            both = self.embed(torch.cat([ids, ids], 1))
            try:
                hidden = self.hidden(both, documents=places // 4, positions=places % 4)
            except Exception as error:  # LMs fail in ways of their own
                raise InputError(f"{kind} takes no mask of documents ({error}), {other}") from error
            apart = (self.text_logits(hidden) - expected.repeat(1, 2, 1)).abs().max()
            if apart > 1e-3 * expected.std():
                raise InputError(f"{kind} does not keep documents of one row apart, {other}")

    def read(self, patches: Patches, keep: Keep) -> Float[Tensor, "total width"]:
        """Continuous features of pictures that are read (no look-up), packed image after image.

        `patches` are prepared (`VisualTokenizer.prepare`).
        """
        return self.reader(patches, keep)

    def embed(
        self,
        ids: Int[Tensor, "rows tokens"],
        *,
        slots: Bool[Tensor, "rows tokens"] | None = None,
        features: Float[Tensor, "total width"] | None = None,
    ) -> Float[Tensor, "rows tokens width"]:
        """Input embeddings of joint ids; at `slots` the rows of `features` enter instead."""
        visual = self.vocabulary.is_visual(ids)
        text = self.lm.get_input_embeddings()(ids.masked_fill(visual, self.vocabulary.end))
        rows = F.embedding(self.vocabulary.rows(ids).clamp(min=0), self.rows) * self.scale
        embeddings = torch.where(visual[..., None], rows.to(text.dtype), text)
        if slots is None or features is None:
            return embeddings
        return fill_slots(embeddings, slots, features)

    def text_logits(self, hidden: Float[Tensor, "*shape width"]) -> Float[Tensor, "*shape text"]:
        """Logits of the LM's own text ids."""
        return self.lm.get_output_embeddings()(hidden)

    def visual_logits(self, hidden: Float[Tensor, "*shape width"]) -> Float[Tensor, "*shape rows"]:
        """Logits of image start, image end and the codes, in the order of `Vocabulary.rows`."""
        return F.linear(hidden, self.visual_head.to(hidden.dtype))

    def hidden(
        self,
        embeddings: Float[Tensor, "rows tokens width"],
        *,
        documents: Int[Tensor, "rows tokens"],
        positions: Int[Tensor, "rows tokens"],
        groups: DocumentGroups | None = None,
    ) -> Float[Tensor, "rows tokens width"]:
        """Hidden states of packed rows; attention stays inside each document.

        `groups` are those of `group_documents`, where they are known already.
        """
        if self.by_document:
            nothing = embeddings.new_zeros(1, 1, 1, 1)  # four dimensions: the LM makes no mask
            how = {"attention_mask": nothing, "groups": groups or group_documents(documents)}
        else:
            mask = attention_mask(documents)
            bias = embeddings.new_zeros(mask.shape).masked_fill_(~mask, -torch.inf)
            how = {"attention_mask": bias}
        how |= {"position_ids": positions, "use_cache": False}
        return self.body(inputs_embeds=embeddings, **how).last_hidden_state

    def forward(
        self,
        batch: Batch,
        patches: Patches | None = None,
        keep: Keep | None = None,
        groups: DocumentGroups | None = None,
    ) -> LanguageLoss:
        """Next-id cross-entropy over text and codes with one softmax (Eq. 6), summed over targets.

        `patches` and `keep` are those of `batch.images`, in order; without them, or where pictures
        are read as codes, slots take the rows of their codes. `groups` are those of the documents.
        """
        hidden, _ = self.states(batch, patches, keep, groups)
        wanted = batch.labels != IGNORE  # the host waits: the head takes no rows without target
        return self.loss(hidden[wanted], batch.labels[wanted])

    def states(
        self,
        batch: Batch,
        patches: Patches | None,
        keep: Keep | None,
        groups: DocumentGroups | None = None,
    ) -> tuple[Float[Tensor, "rows tokens width"], Float[Tensor, "total width"] | None]:
        """Hidden states of packed rows, and the rows of pictures that stand at their slots."""
        if self.read_as == "codes":
            patches = None
        features = None
        if patches is not None and len(patches):
            if keep is None:
                raise InputError("patches of pictures were given without `keep`: give both")
            # the host waits: a mask that is not the codes' would train on other features
            check_slots(batch.slots, [self.reader.rows(kept) for kept in keep.sum(1).tolist()])
            features = self.read(patches, keep)
        embeddings = self.embed(batch.ids, slots=batch.slots, features=features)
        if patches is not None and features is None and torch.is_grad_enabled():
            # a rank whose rows read no picture takes part in the reader's gradients all the same
            blank = patches.new_zeros(1, *patches.shape[1:])
            nothing = self.read(blank, blank.new_ones(blank.shape[:2], dtype=torch.bool)).sum()
            embeddings = embeddings + 0.0 * nothing.to(embeddings.dtype)
        packed = {"documents": batch.documents, "positions": batch.positions}
        return self.hidden(embeddings, **packed, groups=groups), features

    def loss(
        self,
        hidden: Float[Tensor, "targets width"],
        labels: Int[Tensor, "targets"],
    ) -> LanguageLoss:
        """Cross-entropy in chunks: the full logits never exist, forward or backward."""
        head = self.lm.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise InputError(f"the LM's head is a {type(head).__name__}, expected a plain Linear")
        weights, train = (head.weight, head.bias, self.visual_head), torch.is_grad_enabled()
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):  # else the head's products, a fifth of all, are fp32
            hidden = hidden.to(torch.get_autocast_dtype(kind))
        apply: Callable[..., tuple[Tensor, Tensor, Tensor]] = HeadLoss.apply
        total, losses, correct = apply(hidden, labels, *weights, CHUNK, train)
        visual = self.vocabulary.is_visual(labels)
        return LanguageLoss(
            total,
            (losses * ~visual).sum(),
            (losses * visual).sum(),
            (~visual).sum(),
            visual.sum(),
            (correct & ~visual).sum(),
            (correct & visual).sum(),
        )


Reader.language = Language


def table_and_head(lm: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Weights of an LM's embedding and of its head [rows width]; one tensor where it ties them."""
    embedding: Any = lm.get_input_embeddings()
    head: Any = lm.get_output_embeddings()
    return embedding.weight, head.weight


@torch.no_grad()
def _init_like(rows: Tensor, table: Tensor, trained: bool) -> None:
    """New rows around a table's mean, as far apart as its own, a quarter of that if it is trained.

    The hidden states of a trained LM have a large mean, which lifts the logits of all its text
    alike: rows around zero begin far below them, rows with the full spread scatter as far above
    (SmolLM2: a loss of 24 on codes, of 14 this way).
    """
    if not table.is_meta:
        known = table.detach().float()
        spread = float(known.std())
        if not math.isfinite(spread):
            raise InputError("the language model's table holds no numbers: is its file damaged?")
        rows.normal_(std=spread / (4 if trained else 1)).add_(known.mean(0))

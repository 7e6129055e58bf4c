"""Emu (arXiv 2307.05222; the paper's Fig. 1b): a picture is 32 embeddings that the LM regresses.

    patches ─ Causal Former: 32 queries, causal among themselves, attend to patches ─ Linear ─ rows
    ids and rows ─ LM ─┬─ head ─ next id
                       └─ Linear without bias ─ next row (squared error, target detached)

A picture is 32 rows whether it is read or written: what is written is fed back row by row, and a
decoder paints from the rows. From the paper: the Causal Former, ℓ2 at image positions in both
orders beside cross-entropy at text, feeding back, a diffusion decoder conditioned on rows.
Different here: the encoder, LM and data are this frame's; the decoder is LaVIT's own kind, painting
from features that `Rebuild` makes of rows (it learns beside stage 2 on rows without gradient),
since Emu's begins with Stable Diffusion; no second tuning on instructions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lavit.baselines.regression import Regressing, Regressor
from lavit.config import TO_READ
from lavit.data.documents import Documents
from lavit.language.reader import projection
from lavit.layout import Part
from lavit.model import LaVIT
from lavit.sequence import Document, Image, Text, VisualTokens, lay_out, supervise_some
from lavit.sequence import Sequence as Laid
from lavit.train.encoded import Encoded
from lavit.train.language import LanguageBatch, LanguageStage
from lavit.visual_tokenizer.layers import CrossBlock, Keep, Patches, initialise
from lavit.visual_tokenizer.tokenizer import (
    VisualTokenizer,
    cosine_distance,
    foreground_weights,
)


class Rebuild(nn.Module):
    """Rows to the encoder's features: learned queries of all patches attend to the rows."""

    def __init__(self, width: int, dim: int, patches: int, heads: int, depth: int) -> None:
        super().__init__()
        self.from_rows = nn.Linear(width, dim)
        self.norm_rows = nn.LayerNorm(dim)
        self.queries = nn.Parameter(torch.randn(patches, dim) * 0.02)
        self.blocks = nn.ModuleList(CrossBlock(dim, heads, 2.0) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, dim)
        initialise(self)

    def forward(self, rows: Float[Tensor, "images rows width"]) -> Patches:
        """Features of all patches of each picture."""
        rows = self.norm_rows(self.from_rows(rows))
        x = self.queries.expand(len(rows), -1, -1)
        all_ = rows.new_ones(len(rows), 1, rows.shape[1], dtype=torch.bool)
        for block in cast("Iterable[CrossBlock]", self.blocks):
            x = block.padded(x, rows, all_)
        return self.out(self.norm(x))


class EmuDocuments(Documents):
    """Documents whose pictures all enter as rows, and are learnt as rows."""

    @property
    def count(self) -> int:
        """Rows of a picture."""
        assert self.read_rows is not None
        return self.read_rows(0)

    def segments(self, parts: Sequence[Part], codes: Callable[[int], tuple[int, ...]]) -> Document:
        """Parts as a document; codes stand for rows, and are never looked at."""
        blank = (0,) * self.count
        found = super().segments(parts, codes)
        return tuple(
            replace(one, codes=blank, read=True, rows=None) if isinstance(one, Image) else one
            for one in found
        )

    def lay_out(self, document: Document, rng: np.random.Generator) -> Laid:
        """All of a written picture is learnt, and a share of one that is read."""
        laid = lay_out(document, self.vocabulary, supervise_read_images=True)
        self.check_length(laid)
        last = document[-1]  # behind a written picture only the end of the text
        written = isinstance(last, Text) and last.ids == (self.vocabulary.end,)
        return laid if written else supervise_some(laid, self.config.read_share, rng)


class EmuStage(LanguageStage):
    """Stage 2, with the features that `Rebuild` learns to make."""

    def goals(self, batch: LanguageBatch) -> tuple[Tensor, ...]:
        """Standardised features of the pictures of a batch."""
        where = self.tokenizer.place_code.device
        found = self.tokenizer.standard(batch.patches.to(where).float())
        return (found.to(self.accelerator.device),)


class EmuReader(Regressor):
    """The Causal Former, the regression head, and what makes features of rows."""

    language, documents, stage = Regressing, EmuDocuments, EmuStage

    def __init__(
        self,
        dim: int,
        width: int,
        *,
        patches: int,
        queries: int = 32,
        depth: int = 2,
        heads: int = 7,
        ratio: float = 2.0,
        rebuild_depth: int = 3,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, dim) * 0.02)
        self.norm_patches = nn.LayerNorm(dim)
        self.blocks = nn.ModuleList(CrossBlock(dim, heads, ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        initialise(self)
        self.to_language = projection(dim, width)
        self.head = nn.Linear(width, width, bias=False)
        self.rebuild = Rebuild(width, dim, patches, heads, rebuild_depth)
        self.writes, self.weight = queries, weight

    def rows(self, kept: int) -> int:
        """As many as queries."""
        return self.writes

    def forward(self, patches: Patches, keep: Keep) -> Float[Tensor, "total width"]:
        """Rows of each picture; none sees those behind it."""
        images, count = len(patches), self.writes
        context = self.norm_patches(patches)
        before = torch.ones(count, count, dtype=torch.bool, device=patches.device).tril()
        all_ = before.new_ones(images, 1, patches.shape[1])
        x = self.queries.expand(images, -1, -1)
        for block in cast("Iterable[CrossBlock]", self.blocks):
            x = block.padded(x, context, all_, before.expand(images, -1, -1))
        return self.to_language(self.norm(x)).flatten(0, 1)

    def goals(
        self, features: Float[Tensor, "slots width"], given: Tensor
    ) -> Float[Tensor, "slots width"]:
        """The rows themselves, which do not move towards what is predicted of them."""
        return features.detach()

    def beside_loss(
        self, features: Float[Tensor, "slots width"], given: Tensor
    ) -> Float[Tensor, ""]:
        """Distance of features rebuilt from rows, weighted as stage 1 weights it; LaVIT's Eq. 4."""
        found = self.rebuild(features.detach().unflatten(0, (-1, self.writes)))
        return cosine_distance(found, given, foreground_weights(given, 1.0)).sum()


class Emu(LaVIT):
    """A model whose pictures are rows: `decode` takes rows [32, width] in place of codes."""

    @torch.no_grad()
    def rows(self, patches: Patches) -> Float[Tensor, "images rows width"]:
        """Rows of pictures with these encoder features."""
        prepared = self.visual_tokenizer.prepare(patches)
        keep = prepared.new_ones(prepared.shape[:2], dtype=torch.bool)
        reader = self._reader
        return reader(prepared, keep).unflatten(0, (-1, reader.writes))

    @torch.no_grad()
    def decode(self, codes: Sequence[Tensor]) -> Float[Tensor, "images patches dim"]:
        """Features of pictures given as rows."""
        return self._reader.rebuild(torch.stack([one.float() for one in codes]))

    @property
    def _reader(self) -> EmuReader:
        return cast("EmuReader", self.language.reader)


class _FromNumbers(VisualTokenizer):
    """Features, rebuilt from rows, of pictures that are given by number; it decodes alone."""

    def __init__(self, model: Emu, features: Any) -> None:
        nn.Module.__init__(self)
        self.model, self.features = model, features

    def decode(
        self,
        codes: Int[Tensor, "images"],
        lengths: Int[Tensor, "images"],
        *,
        keep: Keep | None = None,
    ) -> Patches:
        features = self.features.rows(codes.cpu()).to(codes.device)
        return self.model.decode(list(self.model.rows(features)))


class EmuEncoded(Encoded):
    """What a decoder of Emu learns from: a picture's "code" is its number."""

    def __init__(self, folder: Path, encoded: Encoded) -> None:
        super().__init__(encoded.run)
        model = cast(Emu, Emu.from_pretrained(folder, parts=TO_READ))
        count = len(encoded.features)
        keep = torch.zeros(count, model.config.vision.patches, dtype=torch.bool)
        numbers = torch.arange(count)
        self.__dict__ |= {
            "corpus": encoded.corpus,
            "vision": encoded.vision,
            "features": encoded.features,
            "tokenizer": _FromNumbers(model, encoded.features),
            "tokens": VisualTokens(numbers, torch.ones_like(numbers), keep),
        }

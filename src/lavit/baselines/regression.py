"""Regression at image positions, where LaVIT classifies the next code (Eq. 6).

A reader says what is regressed: it maps hidden states (`head`) and gives the goals of all its rows.
The position before a slot predicts that slot's goal; the error is squared, and its mean over the
channels of a goal is added to the tokens' cross-entropies, times `weight`. Errors of goals are not
of one size: an answer of 0 costs 0.09 of a histogram of gradients, 1.0 of normalised pixels, and a
code 6.9 nats. Which positions learn, the labels say, as they do for codes.

    document    S f1 f2 f3 E t t .
    predicts    1  2  3  E t t .        1 2 3: goals of the slots f1 f2 f3
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lavit.config import InputError
from lavit.data.features import Pictures
from lavit.language.model import Language, LanguageLoss
from lavit.language.reader import MergerReader, Reader
from lavit.sequence import IGNORE, Batch
from lavit.train.language import LanguageBatch, LanguageStage
from lavit.visual_tokenizer.attention import DocumentGroups
from lavit.visual_tokenizer.layers import Keep, Patches
from lavit.visual_tokenizer.merger import BaseMerger

BINS, CELL = 9, 8  # of HOG: orientations of half a turn, pixels of a cell's side
EPS = 1e-6


class Regressor(Reader):
    """A reader whose rows have goals that an LM predicts."""

    head: nn.Linear
    weight = 1.0  # of the squared error
    writes = 0  # embeddings of a picture that is written; 0: it is written as codes

    @abstractmethod
    def goals(
        self, features: Float[Tensor, "slots width"], given: Tensor
    ) -> Float[Tensor, "slots channels"]:
        """What the positions before slots predict; `features` stand at the slots."""

    def beside_loss(
        self, features: Float[Tensor, "slots width"], given: Tensor
    ) -> Float[Tensor, ""]:
        """A loss of parts that the LM does not see: none."""
        return features.new_zeros(())


class Regressing(Language):
    """A language part whose reader is a `Regressor`."""

    reader: Regressor

    @property
    def embeds(self) -> int:
        """Embeddings of a picture that is written; 0 where it writes codes."""
        return self.reader.writes

    def next_embedding(self, hidden: Float[Tensor, "lanes width"]) -> Float[Tensor, "lanes width"]:
        """What is read next where a picture is written."""
        return self.reader.head(hidden)

    def forward(
        self,
        batch: Batch,
        patches: Patches | None = None,
        keep: Keep | None = None,
        groups: DocumentGroups | None = None,
        given: Tensor | None = None,
    ) -> LanguageLoss:
        """As `Language`, with squared errors before slots; `given` makes their goals."""
        hidden, features = self.states(batch, patches, keep, groups)
        learnt = batch.labels != IGNORE
        before = F.pad(batch.slots[:, 1:], (0, 1))  # a position whose next one is a slot
        loss = self.loss(hidden[learnt & ~before], batch.labels[learnt & ~before])
        if features is None or given is None:
            return loss
        here = learnt[before]
        goals = self.reader.goals(features, given)[here]
        errors = (self.reader.head(hidden[learnt & before]) - goals).square().mean(-1).sum()
        total = loss.total + self.reader.weight * errors + self.reader.beside_loss(features, given)
        visual, count = loss.visual + errors.detach(), loss.visual_tokens + here.sum()
        return replace(loss, total=total, visual=visual, visual_tokens=count)


class GoalStage(LanguageStage):
    """Stage 2 of a `GoalReader`: goals are made of the pictures that are read."""

    def goals(self, batch: LanguageBatch) -> tuple[Tensor, ...]:
        """Goals of the slots of a batch."""
        reader: GoalReader = self.module.reader  # type: ignore[assignment]
        keep, device = batch.keep, self.accelerator.device
        if reader.kind == "features":
            where = self.tokenizer.place_code.device
            return (self.tokenizer.standard(batch.patches.to(where).float())[keep].to(device),)
        pictures = self.documents.corpus.pictures  # type: ignore[union-attr]
        openers = [pictures[number].record.open for number in batch.rows.images.tolist()]
        rows = Pictures(openers, reader.picture).rows(torch.arange(len(openers)))
        make = normalised_pixels if reader.kind == "pixels" else hog
        return (make(rows, reader.grid)[keep].to(device),)


class GoalReader(MergerReader, Regressor):
    """LaVIT's reader, whose LM regresses what is at the next kept patch, in place of its code.

    features   the encoder's, standardised
    pixels     MAE's (arXiv 2111.06377): the patch's pixels, each patch with mean 0, deviation 1
    hog        MaskFeat's (arXiv 2112.09133): histograms of oriented gradients of each colour

    Both papers predict hidden patches of one picture by an encoder that sees the others; here, as
    LaVIT's codes are, the goals are those of the next kept patch, and a causal LM predicts them.
    """

    language, stage = Regressing, GoalStage

    def __init__(
        self,
        merger: BaseMerger,
        width: int,
        *,
        goals: str,
        picture: int,
        grid: int,
        weight: float = 1.0,
    ) -> None:
        super().__init__(merger, width)
        patch = picture // grid
        sizes = {
            "features": merger.dim,
            "pixels": 3 * patch**2,
            "hog": 3 * BINS * max(1, patch // CELL) ** 2,
        }
        if goals not in sizes:
            raise InputError(f"goals are {', '.join(sizes)}, not {goals!r}")
        self.kind, self.picture, self.grid, self.weight = goals, picture, grid, weight
        self.head = nn.Linear(width, sizes[goals])

    def goals(
        self, features: Float[Tensor, "slots width"], given: Tensor
    ) -> Float[Tensor, "slots channels"]:
        """Those that the stage made."""
        return given


def normalised_pixels(
    pictures: Float[Tensor, "images 3 side side"], grid: int
) -> Float[Tensor, "images patches channels"]:
    """Pixels of each patch, of mean 0 and deviation 1 (MAE's `norm_pix_loss`)."""
    patch = pictures.shape[-1] // grid
    rows = F.pixel_unshuffle(pictures, patch).flatten(2).transpose(1, 2)
    centred = rows - rows.mean(-1, keepdim=True)
    return centred / (rows.var(-1, keepdim=True) + EPS).sqrt()


def hog(
    pictures: Float[Tensor, "images 3 side side"], grid: int
) -> Float[Tensor, "images patches channels"]:
    """Histograms of oriented gradients of each patch, by colour, cell and orientation.

    Gradients are central differences (0 at the border), orientations unsigned in 9 bins of 20
    degrees, a pixel counts its gradient's length for its bin alone; cells are of 8 pixels (a patch
    if that is smaller), each histogram has length 1, as in MaskFeat.
    """
    patch = pictures.shape[-1] // grid
    cells, side = max(1, patch // CELL), pictures.shape[-1]
    down, right = torch.zeros_like(pictures), torch.zeros_like(pictures)
    down[:, :, 1:-1] = pictures[:, :, 2:] - pictures[:, :, :-2]
    right[..., 1:-1] = pictures[..., 2:] - pictures[..., :-2]
    angle = torch.rad2deg(torch.atan2(down, right)) % 180
    bins = (angle * BINS / 180).floor().long().clamp(max=BINS - 1)
    length = (down.square() + right.square()).sqrt()
    votes = F.one_hot(bins, BINS) * length[..., None]  # images 3 side side bins
    cell = side // (grid * cells)
    shape = (len(pictures), 3, grid, cells, cell, grid, cells, cell, BINS)
    found = F.normalize(
        votes.view(shape).sum((4, 7)), dim=-1
    )  # images 3 grid cells grid cells bins
    return found.permute(0, 2, 4, 1, 3, 5, 6).flatten(3).flatten(1, 2)

"""The reader learns words before the LM reads: a warm-up of stage 2 in which the LM itself takes no part.

A picture that is read enters the LM as a row of continuous features. A trained LM understands rows of its own embedding
table, so the reader (merger copy and projection) is first taught to point there: the mean of a picture's features predicts
the words said of it, and its caption among the corpus's captions. Both heads are the LM's frozen embedding table, its rows
centred and of unit length:

    words      cross-entropy of softmax(κ p·e + log frequency) against the ids of captions, keywords and answers
    captions   cross-entropy of softmax(κ p·c), c the mean direction of a caption's ids, over up to `CAPTIONS` captions

with p the mean feature in units of the table's mean row length. A picture costs a fortieth of what the LM takes to read it.
With `reader_weight` the lesson goes on beside the LM's loss, on pictures of its own: what the LM alone teaches the reader
is to tell training pictures apart, and the words fade. (Ours: the paper aligns the reader through the LM alone, which needs
its number of pictures. LOG.md has what it is worth.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lavit.config import InputError
from lavit.data.corpus import Corpus
from lavit.data.documents import thin, thinned_count
from lavit.modules.language import Language
from lavit.train.language import LanguageStage
from lavit.train.loop import Figure, Shard
from lavit.train.stages import draw_pictures, seeded

SHARPNESS = 17.0  # κ
CAPTIONS = 4000  # that a picture's own is told from, at most
FEWEST = 1e-6  # frequency of a word that nobody says
SAY_NOTHING = frozenset(("yes", "no"))  # answers that are about the question


@dataclass(frozen=True)
class ReadBatch:
    """Features and masks of this rank's pictures, shares of the words said of each, and its caption's number (or -1)
    among candidates, which are their words one after the other.
    """

    patches: Float[Tensor, "images patches dim"]
    keep: Bool[Tensor, "images patches"]
    words: Float[Tensor, "images words"]
    captions: Int[Tensor, "images"]
    candidates: Int[Tensor, "total"]
    lengths: Int[Tensor, "candidates"]


class ReaderLoss(nn.Module):
    """Merger copy and projection of a `Language` (shared with it) in front of its frozen embedding table."""

    def __init__(self, language: Language, ids: Int[Tensor, "words"], frequency: Float[Tensor, "words"]) -> None:
        super().__init__()
        self.merger, self.to_language = language.merger, language.to_language
        table = language.lm.get_input_embeddings().weight.detach().float()
        self.register_buffer("directions", F.normalize(table[ids] - table.mean(0), dim=1), persistent=False)
        self.register_buffer("frequency", frequency.clamp(min=FEWEST).log(), persistent=False)
        self.sharpness = SHARPNESS / float(table.norm(dim=1).mean())

    def forward(self, batch: ReadBatch) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Int[Tensor, ""]]:
        """Mean over pictures of the loss of words and of captions (0 where there is none), and how many captions are found."""
        features = self.to_language(self.merger(batch.patches, batch.keep)).float()
        mean = torch.segment_reduce(features, "mean", lengths=batch.keep.sum(1)) * self.sharpness
        words = -(batch.words * (mean @ self.directions.T + self.frequency).log_softmax(1)).sum(1).mean()
        told = batch.captions >= 0
        first = batch.lengths.cumsum(0) - batch.lengths
        candidates = F.normalize(F.embedding_bag(batch.candidates, self.directions, first, mode="mean"), dim=1)
        logits, wanted = mean[told] @ candidates.T, batch.captions[told]
        captions = F.cross_entropy(logits, wanted, reduction="sum") / len(told)
        return words, captions, (logits.argmax(1) == wanted).sum()


class ReaderStage:
    """Warm-up of the reader; see the file's header."""

    name = "reader"

    def __init__(self, stage: LanguageStage, text: PreTrainedTokenizerBase, corpus: Corpus, *, seed: int) -> None:
        """`stage` is the language stage that will follow, on `corpus`: its pictures, its shift, its rates."""
        self.tokenizer, self.features, self.tokens, self.shift = (
            stage.tokenizer,
            stage.features,
            stage.tokens,
            stage.shift,
        )
        self.config, self.seed, self.steps = stage.config, seed, stage.config.reader_steps
        said = said_of(corpus)
        if not any(said):
            raise InputError("reader_steps: nothing is said of the pictures: give captions or questions, or 0 steps")
        every = sorted({texts[0] for picture, texts in zip(corpus.pictures, said, strict=True) if picture.captions})
        numbers = {caption: number for number, caption in enumerate(every)}
        self.own = [numbers[texts[0]] if p.captions else -1 for p, texts in zip(corpus.pictures, said, strict=True)]
        ids = {one: _ids(text, one) for one in {one for texts in said for one in texts}}
        used = sorted({word for words in ids.values() for word in words})
        places = {word: place for place, word in enumerate(used)}
        words = {one: [places[word] for word in found] for one, found in ids.items()}
        self.said = [[words[one] for one in texts if words[one]] for texts in said]
        self.captions = [words[caption] for caption in every]
        self.count = len(used)
        frequency = sum(self._shares(texts) for texts in self.said) / len(self.said)
        self.module = ReaderLoss(stage.module, torch.tensor(used), frequency)

    def _shares(self, texts: list[list[int]]) -> Float[Tensor, "words"]:
        """Shares of words: half to those of the first text, half to those of the others, alike in each text."""
        shares = torch.zeros(self.count)
        for number, words in enumerate(texts):
            share = 1.0 if len(texts) == 1 else 0.5 if number == 0 else 0.5 / (len(texts) - 1)
            shares.index_add_(0, torch.tensor(words), torch.full((len(words),), share / len(words)))
        return shares

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One group: the reader."""
        rates = {"lr": self.config.reader_rate, "weight_decay": self.config.weight_decay}
        return [{"params": [p for p in self.module.parameters() if p.requires_grad], **rates}]

    def batch(self, step: int, shard: Shard) -> ReadBatch:
        """Pictures in random views, some of them moved to another hand, some with kept patches left out."""
        pictures = draw_pictures(len(self.features), self.config.reader_batch, seed=self.seed, step=step)
        views = torch.randint(self.features.views, pictures.shape, generator=seeded(self.seed, 9, step))
        candidates = self._candidates({self.own[one] for one in pictures.tolist()}, step)
        place = {caption: number for number, caption in enumerate(candidates)}
        mine = shard.of(torch.arange(len(pictures)))
        pictures, views = pictures[mine], views[mine]
        rows = pictures * self.features.views + views
        patches = self.features.rows(pictures, views)
        if self.shift.share:
            patches = self.shift(patches, rows, step, int(mine[0]))
        keep = []
        for row, at in zip(rows.tolist(), mine.tolist(), strict=True):
            mask, rng = self.tokens.keep[row], np.random.default_rng([self.seed, 11, step, at])
            keep.append(thin(mask, thinned_count(int(mask.sum()), self.config.thinned, rng), rng))
        return ReadBatch(
            patches,
            torch.stack(keep),
            torch.stack([self._shares(self.said[one]) for one in pictures.tolist()]),
            torch.tensor([place.get(self.own[one], -1) for one in pictures.tolist()]),
            torch.tensor([word for caption in candidates for word in self.captions[caption]], dtype=torch.long),
            torch.tensor([len(self.captions[caption]) for caption in candidates]),
        )

    def _candidates(self, own: set[int], step: int) -> list[int]:
        """Captions to tell apart: all, or the batch's own and as many random ones as `CAPTIONS` allows."""
        count = len(self.captions)
        if count <= CAPTIONS:
            return list(range(count))
        rng = np.random.default_rng([self.seed, 10, step])
        return sorted((own - {-1}).union(rng.choice(count, CAPTIONS - len(own), replace=False).tolist()))

    def losses(self, module: nn.Module, batch: ReadBatch, step: int, accelerator: Accelerator) -> dict[str, Figure]:
        """Words and captions, summed."""
        fields = {name: getattr(batch, name).to(accelerator.device) for name in ReadBatch.__dataclass_fields__}
        fields["patches"] = self.tokenizer.prepare(batch.patches).to(accelerator.device)
        words, captions, found = module(ReadBatch(**fields))
        told = (fields["captions"] >= 0).sum()
        return {"loss": words + captions, "word_loss": words, "caption_loss": captions, "captions_found": (found, told)}

    def after_step(self, step: int) -> dict[str, float]:
        """Nothing follows."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Nothing beyond the module."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Nothing beyond the module."""


def said_of(corpus: Corpus) -> list[list[str]]:
    """What is said of each picture, the most telling first: captions, keywords, answers that are not yes or no."""
    said = [[*p.captions, *p.row.get("keywords", ())] for p in corpus.pictures]
    for question in corpus.questions:
        if question.answer not in SAY_NOTHING:
            said[question.picture].append(question.answer)
    return [list(dict.fromkeys(text.removesuffix(".").strip() for text in texts)) for texts in said]


def _ids(text: PreTrainedTokenizerBase, said: str) -> tuple[int, ...]:
    """Ids of words as they stand inside a sentence."""
    return tuple(text(" " + said, add_special_tokens=False)["input_ids"])

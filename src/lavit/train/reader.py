"""The reader learns words before the LM reads: a warm-up of stage 2 in which the LM itself takes no part.

A picture that is read enters the LM as a row of continuous features. A trained LM understands rows of its own embedding
table, so the reader (merger copy and projection) is first taught to point there: the mean of a picture's features predicts
the words said of it, and its caption among the corpus's captions. Both heads are the LM's frozen embedding table, its rows
centred and of unit length:

    words      cross-entropy of softmax(κ p·e + log frequency) against the ids of captions, keywords and answers
    captions   cross-entropy of softmax(κ p·c), c the mean direction of a caption's ids, over up to `CAPTIONS` captions

with p the mean feature in units of the table's mean row length. A picture costs a hundredth of what the LM takes to read it.
(Ours: the paper aligns the reader through the LM alone, which needs its number of pictures. LOG.md has what it is worth.)
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

from lavit.config import InputError, LanguageTraining
from lavit.data.corpus import Corpus
from lavit.data.features import Features
from lavit.modules.language import Language
from lavit.modules.tokenizer import VisualTokenizer
from lavit.sequence import VisualTokens
from lavit.train.language import StyleShift
from lavit.train.loop import Figure, Shard
from lavit.train.stages import draw_pictures, seeded

SHARPNESS = 17.0  # κ
CAPTIONS = 4096  # that a picture's own is told from, at most
DROPPED = 0.7  # kept patches left out of a picture, at most
FEWEST = 1e-6  # frequency of a word that nobody says
SAY_NOTHING = frozenset(("yes", "no"))  # answers that are about the question


@dataclass(frozen=True)
class ReadBatch:
    """Features and masks of this rank's pictures, shares of the words said of each, and its caption's number (or -1)."""

    patches: Float[Tensor, "images patches dim"]
    keep: Bool[Tensor, "images patches"]
    words: Float[Tensor, "images words"]
    captions: Int[Tensor, "images"]
    candidates: Int[Tensor, "candidates"]


class ReaderLoss(nn.Module):
    """Merger copy and projection of a `Language` (shared with it) in front of its frozen embedding table."""

    def __init__(
        self, language: Language, ids: Int[Tensor, "words"], frequency: Float[Tensor, "words"], captions: Tensor
    ) -> None:
        super().__init__()
        self.merger, self.to_language = language.merger, language.to_language
        table = language.lm.get_input_embeddings().weight.detach()
        directions = F.normalize(table[ids].float() - table.float().mean(0), dim=1)
        self.register_buffer("directions", directions, persistent=False)
        self.register_buffer("frequency", frequency.clamp(min=FEWEST).log(), persistent=False)
        self.register_buffer("captions", F.normalize(captions.to(table.device) @ directions, dim=1), persistent=False)
        self.sharpness = SHARPNESS / float(table.float().norm(dim=1).mean())

    def forward(self, batch: ReadBatch) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Int[Tensor, ""]]:
        """Mean over pictures of the loss of words and of captions (0 where there is none), and how many captions are found."""
        features = self.to_language(self.merger(batch.patches, batch.keep))
        mean = torch.segment_reduce(features, "mean", lengths=batch.keep.sum(1)) * self.sharpness
        words = -(batch.words * (mean @ self.directions.T + self.frequency).log_softmax(1)).sum(1).mean()
        told = batch.captions >= 0
        logits, wanted = mean[told] @ self.captions[batch.candidates].T, batch.captions[told]
        captions = F.cross_entropy(logits, wanted, reduction="sum") / len(told)
        return words, captions, (logits.argmax(1) == wanted).sum()


class ReaderStage:
    """Warm-up of the reader; see the file's header."""

    name = "reader"

    def __init__(
        self,
        language: Language,
        tokenizer: VisualTokenizer,
        text: PreTrainedTokenizerBase,
        corpus: Corpus,
        features: Features,
        tokens: VisualTokens,
        config: LanguageTraining,
        *,
        seed: int,
    ) -> None:
        self.tokenizer, self.features, self.tokens, self.config, self.seed = tokenizer, features, tokens, config, seed
        self.steps = config.reader_steps
        said = said_of(corpus)
        if not any(said):
            raise InputError("reader_steps: nothing is said of the pictures: give captions or questions, or 0 steps")
        self.shift = StyleShift(corpus, features, config, seed=seed)
        every = sorted({one for picture in corpus.pictures for one in picture.captions[:1]})
        numbers = {caption: number for number, caption in enumerate(every)}
        self.captions = [numbers[p.captions[0]] if p.captions else -1 for p in corpus.pictures]
        self.count = len(every)
        ids = {one: _ids(text, one) for one in {*every, *(one for texts in said for one in texts)}}
        used = sorted({word for words in ids.values() for word in words})
        self.places = {word: place for place, word in enumerate(used)}
        self.words = torch.stack([self._shares([ids[one] for one in texts]) for texts in said])
        captions = torch.stack([self._shares([ids[caption]]) for caption in every] or [torch.zeros(len(used))])
        self.module = ReaderLoss(language, torch.tensor(used), self.words.mean(0), captions)

    def _shares(self, texts: list[tuple[int, ...]]) -> Float[Tensor, "words"]:
        """Shares of words: half to those of the first text, half to those of the others, alike in each text."""
        shares = torch.zeros(len(self.places))
        for number, words in enumerate(texts):
            share = 1.0 if len(texts) == 1 else 0.5 if number == 0 else 0.5 / (len(texts) - 1)
            for word in words:
                shares[self.places[word]] += share / len(words)
        return shares

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One group: the reader."""
        rates = {"lr": self.config.reader_rate, "weight_decay": self.config.weight_decay}
        return [{"params": [p for p in self.module.parameters() if p.requires_grad], **rates}]

    def batch(self, step: int, shard: Shard) -> ReadBatch:
        """Pictures in random views, some of them moved to another hand, some with kept patches left out."""
        pictures = draw_pictures(len(self.features), self.config.reader_batch, seed=self.seed, step=step)
        views = torch.randint(self.features.views, pictures.shape, generator=seeded(self.seed, 9, step))
        candidates = self._candidates(torch.tensor([self.captions[one] for one in pictures.tolist()]), step)
        mine = shard.of(torch.arange(len(pictures)))
        pictures, views = pictures[mine], views[mine]
        rows = pictures * self.features.views + views
        patches = self.features.rows(pictures, views)
        if self.shift.share:
            patches = self.shift(patches, rows, step, int(mine[0]))
        numbers = torch.tensor([self.captions[picture] for picture in pictures.tolist()])
        numbers = torch.where(numbers < 0, -1, torch.searchsorted(candidates, numbers.clamp(min=0)))
        keep = torch.stack(
            [
                _thinned(self.tokens.keep[row], self.seed, step, int(place))
                for row, place in zip(rows, mine, strict=True)
            ]
        )
        return ReadBatch(patches, keep, self.words[pictures], numbers, candidates)

    def _candidates(self, own: Int[Tensor, "images"], step: int) -> Int[Tensor, "candidates"]:
        """Captions to tell apart, sorted: all, or the batch's own and as many random ones as `CAPTIONS` allows."""
        if self.count <= CAPTIONS:
            return torch.arange(max(1, self.count))
        rng = np.random.default_rng([self.seed, 10, step])
        drawn = torch.from_numpy(rng.choice(self.count, CAPTIONS - len(own), replace=False))
        return torch.cat([own[own >= 0], drawn]).unique()

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


def _thinned(keep: Bool[Tensor, "patches"], seed: int, step: int, place: int) -> Bool[Tensor, "patches"]:
    """A mask that keeps a random share of the kept patches, one at least."""
    generator = seeded(seed, 11, step, place)
    share = DROPPED * torch.rand((), generator=generator)
    thin = keep & (torch.rand(keep.shape, generator=generator) >= share)
    return thin if thin.any() else keep


def said_of(corpus: Corpus) -> list[list[str]]:
    """What is said of each picture, the most telling first: captions, keywords, answers that are not yes or no."""
    said = [[*p.captions, *p.row.get("keywords", ())] for p in corpus.pictures]
    for question in corpus.questions:
        if question.answer not in SAY_NOTHING:
            said[question.picture].append(question.answer)
    return [list(dict.fromkeys(text.removesuffix(".").strip() for text in texts)) for texts in said]


def _ids(text: PreTrainedTokenizerBase, said: str) -> tuple[int, ...]:
    """Ids of words as they stand inside a sentence."""
    return tuple(text(" " + said.removesuffix(".").strip(), add_special_tokens=False)["input_ids"])

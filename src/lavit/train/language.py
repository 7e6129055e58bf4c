"""Stage 2 as an object for the loop: next-token cross-entropy over text and codes, both orders (paper Eq. 6).

What trains: the LM (or its LoRA), the visual rows, the second merger and the projection, each at its own rate; selector,
encoder and stage-1 merger are frozen, the latter because it makes the ids.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lavit.config import InputError, LanguageTraining
from lavit.data.conversations import ConversationDocuments
from lavit.data.corpus import Corpus
from lavit.data.documents import Documents, answer_text, question_text, thin
from lavit.data.features import Features
from lavit.data.stream import StreamingDocuments
from lavit.modules.language import Language, LanguageLoss
from lavit.modules.tokenizer import VisualTokenizer
from lavit.sequence import IGNORE, Batch, VisualTokens, slot_lengths
from lavit.train.loop import Figure, Shard

END = "<|endoftext|>"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LanguageBatch:
    """Packed rows of this rank, features and masks of the pictures read in them, target tokens of all ranks."""

    rows: Batch
    patches: Float[Tensor, "images patches dim"]
    keep: Bool[Tensor, "images patches"]
    targets: int
    lesson: Any = None  # the reader's own batch (train/reader.py)


class StyleShift:
    """Moves features of a read picture towards another hand, so that a name is not learnt together with the hand that drew it.

    The move is the difference of the mean patches of a random edit "in the … style" whose source is in the picture's own
    hand. (Ours: the paper's data has no hands. LOG.md has what it is worth.)
    """

    def __init__(self, corpus: Corpus, features: Features, config: LanguageTraining, *, seed: int) -> None:
        self.share, self.strength, self.seed, self.views = (
            config.style_shift,
            config.style_strength,
            seed,
            features.views,
        )
        self.hands = [picture.row.get("artist") for picture in corpus.pictures]
        self.edits: dict[Any, list[tuple[int, int]]] = {}
        for edit in corpus.edits:
            if edit.kind == "artist":
                self.edits.setdefault(self.hands[edit.source], []).append((edit.source, edit.target))
        if self.share and not self.edits:
            log.warning("style_shift: the data has no edit from one artist's hand to another's, no features are moved")
        elif self.share:
            every = torch.arange(len(features))
            self.means = torch.cat([features.rows(part).mean(1) for part in every.split(64)])

    def __call__(self, patches: Tensor, rows: Tensor, step: int, first: int) -> Tensor:
        """Patches [images, patches, dim] of feature rows, some of them moved; `first` is their place in the global batch."""
        moved = []
        for place, (picture, row) in enumerate(zip(patches, rows.tolist(), strict=True), first):
            rng = np.random.default_rng([self.seed, 8, step, place])
            known = self.edits.get(self.hands[row // self.views])
            if known and rng.random() < self.share:
                source, target = known[rng.integers(len(known))]
                picture = picture + self.strength * (self.means[target] - self.means[source])
            moved.append(picture)
        return torch.stack(moved) if moved else patches


class LanguageStage:
    """Stage 2."""

    name = "language"
    shards = True  # under FSDP2

    def __init__(
        self,
        language: Language,
        tokenizer: VisualTokenizer,
        documents: Documents | ConversationDocuments | StreamingDocuments,
        features: Features | None,
        tokens: VisualTokens | None,
        config: LanguageTraining,
    ) -> None:
        self.module, self.tokenizer, self.documents = language, tokenizer, documents
        self.features, self.tokens, self.config = features, tokens, config
        self.steps, self.accumulate = config.steps, config.accumulate
        language.train().recompute(config.recompute)
        language.merger.requires_grad_(config.train_merger)
        self.lesson: Any = None  # the reader's own stage, whose losses go beside the LM's (`reader_weight`)
        self._drawn: tuple[int, Batch] | None = None  # the batch of a step, whose parts come one after the other
        self.streams = documents if isinstance(documents, StreamingDocuments) else None
        if self.streams is None:
            self.shift = StyleShift(documents.corpus, features, config, seed=documents.seed)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """LM, visual rows, reader."""
        groups: dict[str, list[Tensor]] = {"lm": [], "rows": [], "reader": []}
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                part = "lm" if name.startswith("lm.") else "rows" if "rows" in name.split(".")[0] else "reader"
                groups[part].append(parameter)
        rates = {
            "lm": self.config.learning_rate,
            "rows": self.config.rows_rate,
            "reader": self.config.reader_rate,
        }
        decay = {"lm": self.config.weight_decay, "rows": 0.0, "reader": self.config.weight_decay}
        return [{"params": groups[part], "lr": rates[part], "weight_decay": decay[part]} for part in groups]

    def batch(self, step: int, shard: Shard) -> LanguageBatch:
        """This rank's rows of a step."""
        if self._drawn is None or self._drawn[0] != step:
            self._drawn = (step, self.documents.batch(step))
            self._targets = int((self._drawn[1].labels != IGNORE).sum())
            if self.streams is not None:  # which gave the rows of this process alone
                self._targets = _over_processes(self._targets, self.tokenizer)
        batch, targets = self._drawn[1], self._targets
        if self.streams is not None:
            shard = Shard(shard.rank % self.accumulate, self.accumulate)
        mine = shard.of(torch.arange(len(batch.ids)))
        images_before = self._images(batch, slice(0, int(mine[0])))
        images = batch.images[images_before : images_before + self._images(batch, mine)]
        rows = Batch(
            batch.ids[mine],
            batch.labels[mine],
            batch.positions[mine],
            batch.documents[mine],
            batch.slots[mine],
            images,
        )
        if self.streams is not None:
            patches, keep = self.streams.pictures(images)
        else:
            patches = torch.from_numpy(self.features.array[images.numpy()].astype("float32"))
            keep = self.tokens.keep[images]
            if self.shift.share:
                patches = self.shift(patches, images, step, images_before)
        if self.config.thinned and len(images):
            seeds = ([self.documents.seed, 12, step, images_before + place] for place in range(len(images)))
            parts = zip(keep, slot_lengths(rows.slots), map(np.random.default_rng, seeds), strict=True)
            keep = torch.stack([thin(mask, length, rng) for mask, length, rng in parts])
        lesson = self.lesson.batch(step, shard) if self.lesson else None
        return LanguageBatch(rows, patches, keep, targets, lesson)

    @staticmethod
    def _images(batch: Batch, rows: Any) -> int:
        """Number of read images in some rows."""
        return len(slot_lengths(batch.slots[rows]))

    def losses(self, module: nn.Module, batch: LanguageBatch, step: int, accelerator: Accelerator) -> dict[str, Figure]:
        """Cross-entropy over the global number of target tokens; per modality loss and accuracy beside it."""
        device = accelerator.device
        rows = Batch(*(getattr(batch.rows, name).to(device) for name in Batch.__dataclass_fields__))
        patches = self.tokenizer.prepare(batch.patches).to(device)
        out: LanguageLoss = module(rows, patches, batch.keep.to(device))
        loss = out.total / batch.targets * accelerator.num_processes
        beside: dict[str, Figure] = {}
        if batch.lesson is not None:
            beside = self.lesson.losses(self.lesson.module, batch.lesson, step, accelerator)
            loss = loss + self.config.reader_weight / self.accumulate * beside.pop("loss")
        return {
            "loss": loss,
            **beside,
            "text_loss": (out.text, out.text_tokens),
            "code_loss": (out.visual, out.visual_tokens),
            "text_accuracy": (out.text_correct, out.text_tokens),
            "code_accuracy": (out.visual_correct, out.visual_tokens),
            "useful": ((rows.documents >= 0).sum(), torch.tensor(rows.documents.numel())),
        }

    def after_step(self, step: int) -> dict[str, float]:
        """Streams tell each other where they are; nothing else follows."""
        if self.streams is not None:
            self.streams.share()
        return {}

    def state(self) -> dict[str, Tensor]:
        """Places in streams."""
        return {} if self.streams is None else {"streams": self.streams.state()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Streams go on from their places."""
        if self.streams is not None:
            self.streams.load_state(state["streams"])


def _over_processes(count: int, module: nn.Module) -> int:
    """A sum over all processes."""
    if not dist.is_initialized():
        return count
    total = torch.tensor(count, device=next(module.parameters()).device)
    dist.all_reduce(total)
    return int(total)


def train_text_tokenizer(corpus: Corpus, size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of at most `size` ids trained on the corpus's texts, for LMs from scratch."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = [text for picture in corpus.pictures for text in (*picture.captions, *picture.prompts)]
    texts += [question_text(q.question) + answer_text(q.answer) for q in corpus.questions]
    texts += [edit.prompt for edit in corpus.edits]
    texts += [text for part in corpus.parts for text in part.texts]
    if not texts:
        raise InputError("the corpus has no texts to train a text tokenizer on")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)

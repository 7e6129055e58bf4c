"""Stage 2 as an object for the loop: next-token cross-entropy over text and codes, both orders (paper Eq. 6).

What trains: the LM (or its LoRA), the visual rows, the second merger and the projection, each at its own rate; selector,
encoder and stage-1 merger are frozen, the latter because it makes the ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lavit.config import InputError, LanguageTraining
from lavit.data.conversations import ConversationDocuments
from lavit.data.corpus import Corpus
from lavit.data.documents import Documents, answer_text, question_text
from lavit.data.features import Features
from lavit.data.stream import StreamingDocuments
from lavit.modules.language import Language, LanguageLoss
from lavit.modules.tokenizer import VisualTokenizer
from lavit.sequence import IGNORE, Batch, VisualTokens, slot_lengths
from lavit.train.loop import Figure, Shard
from lavit.train.muon import matrices_apart

END = "<|endoftext|>"


@dataclass(frozen=True)
class LanguageBatch:
    """Packed rows of this rank, features and masks of the pictures read in them, target tokens of all ranks."""

    rows: Batch
    patches: Float[Tensor, "images patches dim"]
    keep: Bool[Tensor, "images patches"]
    targets: int


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
        self._drawn: tuple[int, Batch] | None = None  # the batch of a step, whose parts come one after the other
        self.streams = documents if isinstance(documents, StreamingDocuments) else None

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
        found = [{"params": groups[part], "lr": rates[part], "weight_decay": decay[part]} for part in groups]
        if self.config.optimizer == "adamw":
            return found
        head = self.module.lm.get_output_embeddings()
        return matrices_apart(found, self.module, but=(head.weight,))

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
            patches, keep = self.features.rows(images), self.tokens.keep[images]
        return LanguageBatch(rows, patches, keep, targets)

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
        return {
            "loss": loss,
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

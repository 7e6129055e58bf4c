"""Stage 2: next-token cross-entropy over text and codes, both orders (paper Eq. 6).

What trains: the LM (or its LoRA), the visual rows, the second merger and the projection, each at
its own rate; selector, encoder and stage-1 merger are frozen, the latter because it makes the ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lavit.config import InputError, LanguageTraining
from lavit.data.conversation_documents import ConversationDocuments
from lavit.data.corpus import Corpus
from lavit.data.documents import Documents
from lavit.data.features import Features
from lavit.data.stream_documents import StreamingDocuments
from lavit.language.model import Language, LanguageLoss, table_and_head
from lavit.layout import answer_text, question_text
from lavit.sequence import IGNORE, Batch, VisualTokens, slot_lengths
from lavit.train.batches import Shard, to_device
from lavit.train.loop import Metric, Stage
from lavit.train.muon import matrices_apart
from lavit.visual_tokenizer.attention import group_documents
from lavit.visual_tokenizer.tokenizer import VisualTokenizer

END = "<|endoftext|>"


@dataclass(frozen=True)
class LanguageBatch:
    """Packed rows of this rank, features and masks of read pictures, target tokens of all ranks."""

    rows: Batch
    patches: Float[Tensor, "images patches dim"]
    keep: Bool[Tensor, "images patches"]
    targets: int


class LanguageStage(Stage):
    """Stage 2. `features` and `tokens` are of the pictures read; None where `documents` stream."""

    name = "language"
    shards = True  # under FSDP2
    module: Language
    config: LanguageTraining

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
        for name, parameter in language.named_parameters():
            if name.startswith("reader.merger."):
                parameter.requires_grad_(config.train_merger)
            elif name.startswith("lm.") and not config.train_lm:
                parameter.requires_grad_(False)
        self._drawn: tuple[int, Batch, int] | None = None  # step, its batch, its targets
        self.streams = documents if isinstance(documents, StreamingDocuments) else None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """LM, visual rows, reader."""
        config, decay = self.config, self.config.weight_decay
        parts: dict[str, list[Tensor]] = {"lm": [], "rows": [], "reader": []}
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                own = {"lm": "lm", "rows": "rows", "head_rows": "rows"}
                parts[own.get(name.split(".")[0], "reader")].append(parameter)
        groups = [
            {"params": parts["lm"], "lr": config.learning_rate, "weight_decay": decay},
            {"params": parts["rows"], "lr": config.rows_rate, "weight_decay": 0.0},
            {"params": parts["reader"], "lr": config.reader_rate, "weight_decay": decay},
        ]
        if config.optimizer == "adamw":
            return [group for group in groups if group["params"]]
        _, head = table_and_head(self.module.lm)
        return matrices_apart(groups, self.module, but=(head,))

    def batch(self, step: int, shard: Shard) -> LanguageBatch:
        """This rank's rows of a step."""
        if self._drawn is None or self._drawn[0] != step:
            batch = self.documents.batch(step)
            self._drawn = step, batch, self._targets(batch)
        _, batch, targets = self._drawn
        if self.streams is not None:
            shard = Shard(shard.rank % self.accumulate, self.accumulate)
        if len(batch.ids) < shard.ranks:
            said = f"{len(batch.ids)} rows a step cannot be shared by {shard.ranks} processes"
            raise InputError(f"{said} (or parts of a step): start fewer, or give more rows")
        mine = shard.of(torch.arange(len(batch.ids)))
        fields = (batch.ids, batch.labels, batch.positions, batch.documents, batch.slots)
        ids, labels, positions, documents, slots = (field[mine] for field in fields)
        before = len(slot_lengths(batch.slots[: int(mine[0])]))  # images read in earlier rows
        images = batch.images[before : before + len(slot_lengths(slots))]
        rows = Batch(ids, labels, positions, documents, slots, images)
        if self.streams is not None:
            patches, keep = self.streams.pictures(images)
        else:
            assert self.features is not None and self.tokens is not None  # documents do not stream
            patches, keep = self.features.rows(images), self.tokens.keep[images]
        return LanguageBatch(rows, patches, keep, targets)

    def _targets(self, batch: Batch) -> int:
        """Target tokens of all processes; a stream gives the rows of this one alone."""
        count = (batch.labels != IGNORE).sum()
        if self.streams is not None and dist.is_initialized():
            count = count.to(next(self.tokenizer.parameters()).device)
            dist.all_reduce(count)
        return int(count)  # the host waits: the loss is divided by it

    def losses(self, module: nn.Module, batch: LanguageBatch, step: int) -> dict[str, Metric]:
        """Cross-entropy over all target tokens of a step; loss and accuracy of text and codes."""
        device = self.accelerator.device
        groups = group_documents(batch.rows.documents).to(device)  # from the CPU: nobody waits
        rows = Batch(*(to_device(field, device) for field in vars(batch.rows).values()))
        where = self.tokenizer.place_code.device  # the CPU, where nothing else needs the tokenizer
        patches = self.tokenizer.prepare(to_device(batch.patches, where).float())
        patches, keep = to_device(patches, device), to_device(batch.keep, device)
        out: LanguageLoss = module(rows, patches, keep, groups, *self.goals(batch))
        loss = out.total / batch.targets * self.accelerator.num_processes
        return {
            "loss": loss,
            "text_loss": (out.text, out.text_tokens),
            "code_loss": (out.visual, out.visual_tokens),
            "text_accuracy": (out.text_correct, out.text_tokens),
            "code_accuracy": (out.visual_correct, out.visual_tokens),
            "useful": ((rows.documents >= 0).sum(), torch.tensor(rows.documents.numel())),
        }

    def goals(self, batch: LanguageBatch) -> tuple[Tensor, ...]:
        """What the module of a rival takes besides: nothing."""
        return ()

    def state(self) -> dict[str, Tensor]:
        """Places in streams."""
        return {} if self.streams is None else {"streams": self.streams.state()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Streams go on from their places."""
        if self.streams is not None:
            self.streams.load_state(state["streams"])


def train_text_tokenizer(corpus: Corpus, size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of at most `size` ids, trained on a corpus, for new LMs."""
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
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)

"""Stage 2 as an object for the loop: next-token cross-entropy over text and codes, both orders (paper Eq. 6).

What trains: the LM (or its LoRA), the visual rows, the second merger and the projection, each at its own rate; selector,
encoder and stage-1 merger are frozen, the latter because it makes the ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lavit.config import InputError, LanguageTraining
from lavit.data.corpus import Corpus
from lavit.data.documents import Documents, answer_text, question_text
from lavit.data.features import Features
from lavit.modules.language import Language, LanguageLoss
from lavit.modules.tokenizer import VisualTokenizer
from lavit.sequence import IGNORE, Batch, VisualTokens
from lavit.train.loop import Shard

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

    def __init__(
        self,
        language: Language,
        tokenizer: VisualTokenizer,
        documents: Documents,
        features: Features,
        tokens: VisualTokens,
        config: LanguageTraining,
    ) -> None:
        self.module, self.tokenizer, self.documents = language, tokenizer, documents
        self.features, self.tokens, self.config = features, tokens, config
        self.steps = config.steps

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
        batch = self.documents.batch(step)
        targets = int((batch.labels != IGNORE).sum())
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
        patches = torch.from_numpy(self.features.array[images.numpy()].astype("float32"))
        return LanguageBatch(rows, patches, self.tokens.keep[images], targets)

    @staticmethod
    def _images(batch: Batch, rows: Any) -> int:
        """Number of read images in some rows: a slot whose neighbour on the left is none opens one."""
        slots = batch.slots[rows]
        return int((slots[:, 1:] & ~slots[:, :-1]).sum())

    def losses(self, module: nn.Module, batch: LanguageBatch, step: int, accelerator: Accelerator) -> dict[str, Tensor]:
        """Cross-entropy over the global number of target tokens; per modality loss and accuracy beside it."""
        device = accelerator.device
        rows = Batch(*(getattr(batch.rows, name).to(device) for name in Batch.__dataclass_fields__))
        patches = self.tokenizer.prepare(batch.patches.to(device))
        out: LanguageLoss = module(rows, patches, batch.keep.to(device))
        loss = (out.text + out.visual) / batch.targets * accelerator.num_processes
        text, visual = out.text_tokens.clamp(min=1), out.visual_tokens.clamp(min=1)
        return {
            "loss": loss,
            "text_loss": out.text.detach() / text,
            "code_loss": out.visual.detach() / visual,
            "text_accuracy": out.text_correct / text,
            "code_accuracy": out.visual_correct / visual,
            "useful": (rows.documents >= 0).float().mean(),
        }

    def after_step(self, step: int) -> dict[str, float]:
        """Nothing follows."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Nothing beyond the module."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Nothing beyond the module."""


def train_text_tokenizer(corpus: Corpus, size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of at most `size` ids trained on the corpus's texts, for LMs from scratch."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = [text for picture in corpus.pictures for text in (*picture.captions, *picture.prompts)]
    texts += [question_text(q.question) + answer_text(q.answer) for q in corpus.questions]
    texts += [edit.prompt for edit in corpus.edits]
    if not texts:
        raise InputError("the corpus has no texts to train a text tokenizer on")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)

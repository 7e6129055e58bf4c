"""Fine-tuning of a trained model on conversations with pictures on both sides, whole or by LoRA.

Encoder and tokenizer stay as they are; the LM, the visual rows and the reader train as in stage 2,
on the assistant's turns alone. The new folder is a model folder of its own: other parts are copied.
LoRA (arXiv 2106.09685) that was put in here is merged when the model is saved, so `language/` stays
a plain causal LM; a model that *has* LoRA over a base (presets do) trains that on. The same command
on the same folder goes on where it was.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lavit.config import (
    TO_READ,
    FinetuneTraining,
    InputError,
    LanguageTraining,
    ModelConfig,
    TrainConfig,
    from_json,
    read_config,
    read_json,
    to_json,
    write_json,
)
from lavit.data.conversations import ConversationDocuments, load_conversations
from lavit.data.features import nothing_read
from lavit.files import naming
from lavit.language.lora import inject_lora, merge_lora
from lavit.language.model import Language
from lavit.model import LaVIT
from lavit.storage import model_folder
from lavit.train.language import LanguageStage
from lavit.train.run import Run

log = logging.getLogger(__name__)
COPIED = ("vision", "visual_tokenizer", "pixels", "base")
MEASURED = 3  # steps whose time says how many fit into some minutes


def finetune_training(
    model: str | Path, *, lora_rank: int | None = None, steps: int = 200, seed: int = 0
) -> FinetuneTraining:
    """A training for a model folder: rows as in its stage 2 and a tenth of its rates (LoRA: its).

    A model that does not say how it was trained gets rows of its LM's own length, at most 2048
    tokens, and 2e-5 / 5e-5 (LoRA 2e-4).
    """
    model = model_folder(model)
    rates: dict[str, Any]
    if (model / "training.json").exists():
        trained = read_json(model / "training.json").get("training", {})
        with naming(model / "training.json"):
            language = from_json(TrainConfig, trained).language
        rates = {"learning_rate": (1.0 if lora_rank else 0.1) * language.learning_rate}
        rates |= {"rows_rate": 0.1 * language.rows_rate, "reader_rate": 0.1 * language.reader_rate}
    else:
        config = read_json(model / "language" / "config.json")
        length = min(2048, int(config.get("max_position_embeddings", 2048)))
        rates = {"rows_rate": 5e-5, "reader_rate": 5e-5}
        rates["learning_rate"] = 2e-4 if lora_rank else 2e-5
        language = LanguageTraining(steps=steps, rows=8, tokens=length, **rates)
    language = replace(language, steps=steps, **rates)
    return FinetuneTraining(language=language, lora_rank=lora_rank, seed=seed)


class Finetune(Run):
    """One fine-tuning in a folder; `minutes` replaces the steps by as many as take that long."""

    training: FinetuneTraining  # type: ignore[assignment]  # a run of one stage has its own

    def __init__(
        self,
        folder: Path,
        data: str | Path,
        model: str | Path,
        training: FinetuneTraining,
        *,
        minutes: float | None = None,
        **options: Any,
    ) -> None:
        """`options` are `watch`, `prepare` and `trackers` of a `Run`."""
        self.source, self.minutes = model_folder(model), minutes
        self.path = Path(folder) / "finetune.json"
        self.said = {"data": str(Path(data)), "model": str(self.source), "minutes": minutes}
        if minutes is not None and minutes <= 0:
            raise InputError(f"a training needs a positive time, not {minutes} minutes")
        if Path(folder).resolve() == self.source.resolve():
            raise InputError(f"{folder} is the model to be fine-tuned: give another --out")
        config = read_config(self.source)
        super().__init__(folder, Path(data), config, training, **options)
        if self.accelerator.is_fsdp2:
            raise InputError("fine-tuning runs in one process or under DDP: start it without FSDP")

    def _settle(self, model: ModelConfig) -> ModelConfig:
        """Check that the folder is of the same fine-tuning, if it is one; measured steps stay."""
        self.accelerator.wait_for_everyone()
        if self.path.exists():
            saved = read_json(self.path)
            with naming(self.path):
                settled = from_json(FinetuneTraining, saved.pop("training", {}))
            if self.minutes is not None:
                self._take_steps(settled.language.steps)
            if saved != self.said or settled != self.training:
                said = f"{self.folder} holds a fine-tuning with other settings"
                raise InputError(f"{said}: give another --out, or delete it")
        return model

    def _agree(self, stages: Sequence[str]) -> None:
        """Nothing more to settle: there is one stage."""

    def _take_steps(self, steps: int) -> None:
        language = replace(self.training.language, steps=steps)
        self.training = replace(self.training, language=language)

    def train(self, stages: Sequence[str] = ("language",)) -> None:
        """Train to the end and save; what is finished is not touched again."""
        super().train(stages)

    def _train_language(self) -> None:
        conversations = load_conversations(self.data)
        parts = TO_READ if conversations.pictures else TO_READ[1:]
        model = LaVIT.from_pretrained(self.source, device=self.accelerator.device, parts=parts)
        model.needs(*parts)
        language, text = model.language, model.text_tokenizer
        adapted = prepare_lora(language, self.config, self.training.lora_rank)
        features, tokens = nothing_read(self.config.vision)
        if conversations.pictures:
            features = self._features(conversations.pictures, model.vision)
            tokens = self._tokens(model.visual_tokenizer, features)
        config, seed = self.training.language, self.training.seed
        codes = tuple(tuple(part.tolist()) for part in tokens.split())
        make = {"text": text, "vocabulary": language.vocabulary, "config": config, "seed": seed}
        documents = ConversationDocuments(conversations, codes, **make)
        tokenizer = model.visual_tokenizer
        stage = LanguageStage(language, tokenizer, documents, features, tokens, config)
        stage.name = "finetune"
        if self.minutes is not None and not self.path.exists():
            self._measure(stage, self.minutes)
        if self.accelerator.is_main_process:
            write_json(self.path, self.said | {"training": to_json(self.training)})
        origins = {"": f"loaded from {self.source.name}"}
        self._loop(stage, origins, warmup=config.warmup, betas=(0.9, 0.95))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self._save_all(language, text, adapted)

    def _measure(self, stage: LanguageStage, minutes: float) -> None:
        """Settle the steps: time some forward and backward, and agree on rank 0's answer."""
        device, module = self.accelerator.device, stage.module.to(self.accelerator.device)
        stage.accelerator = self.accelerator
        for step in range(MEASURED + 1):
            if step == 1:
                started = time.perf_counter()
            batch = stage.batch(step, stage.shard)
            loss = stage.losses(module, batch, step)["loss"]
            assert isinstance(loss, Tensor)
            loss.backward()
        module.zero_grad(set_to_none=True)
        seconds = (time.perf_counter() - started) / MEASURED
        found = torch.tensor([max(1, round(60 * minutes / seconds))], device=device)
        steps = int(self.accelerator.gather(found)[0])
        log.info("%.1f minutes are %d steps of %.2f seconds", minutes, steps, seconds)
        self._take_steps(steps)
        stage.config, stage.steps = self.training.language, steps

    def _save_all(self, language: Language, text: PreTrainedTokenizerBase, adapted: bool) -> None:
        """The whole model folder: language and reader of this training, everything else copied."""
        for part in COPIED:
            if (self.source / part).is_dir():
                shutil.copytree(self.source / part, self.folder / part, dirs_exist_ok=True)
        if (self.source / "training.json").exists():
            shutil.copy(self.source / "training.json", self.folder / "training.json")
        config = self.config
        if not adapted:
            merge_lora(language.lm)
            config = replace(config, language=replace(config.language, lora_rank=0))
        LaVIT(config, language=language, text_tokenizer=text).save_pretrained(self.folder)
        (self.folder / "language" / "done").touch()


def prepare_lora(language: Language, config: ModelConfig, rank: int | None) -> bool:
    """Make the LM train as asked (`FinetuneTraining.lora_rank`); True if it trains its own LoRA."""
    has = config.language.lora_rank
    if has and rank in (None, has):
        return True
    merge_lora(language.lm)
    if rank:
        inject_lora(language.lm, replace(config.language, lora_rank=rank))
    return False

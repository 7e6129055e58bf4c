"""Fine-tuning of a trained model on conversations with pictures on both sides, whole or by LoRA (arXiv 2106.09685).

Encoder and tokenizer stay as they are; the LM, the visual rows and the reader train as in stage 2, on the assistant's
turns alone. The new folder is a model folder of its own: other parts are copied from the old one. LoRA that was put in here
is merged when the model is saved, so `language/` stays a plain causal LM; a model that *has* LoRA over a base (presets
do) keeps its form and trains that adapter on. The same command on the same folder goes on where it was.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lavit.config import (
    FinetuneTraining,
    InputError,
    LanguageTraining,
    ModelConfig,
    TrainConfig,
    from_json,
    read_json,
    require,
    to_json,
)
from lavit.data.conversations import ConversationDocuments, Conversations, load_conversations
from lavit.data.features import Features, compute_features, nothing_read, tokenize_features
from lavit.model import LaVIT
from lavit.modules.language import Language
from lavit.sequence import VisualTokens
from lavit.storage import inject_lora, model_folder
from lavit.train.language import LanguageStage
from lavit.train.loop import Report, Shard, train
from lavit.train.spread import first_alone, make_accelerator

log = logging.getLogger(__name__)
COPIED = ("vision", "tokenizer", "pixels", "base")
MEASURED = 3  # steps whose time says how many fit into some minutes


class FinetuneStage(LanguageStage):
    """Stage 2's loss on conversations."""

    name = "finetune"


def finetune_training(
    model: str | Path, *, lora_rank: int | None = None, steps: int = 200, seed: int = 0
) -> FinetuneTraining:
    """A training for a model folder: rows as in its own stage 2 and a tenth of its rates (LoRA: its rates).

    A model that does not say how it was trained gets rows of its LM's own length, at most 2048 tokens, and 2e-5 / 5e-5
    (LoRA 2e-4).
    """
    model = model_folder(model)
    if (model / "training.json").exists():
        language = from_json(TrainConfig, read_json(model / "training.json")["training"]).language
        share = 1.0 if lora_rank else 0.1
        rates = {"learning_rate": share * language.learning_rate}
        rates |= {"rows_rate": 0.1 * language.rows_rate, "reader_rate": 0.1 * language.reader_rate}
        language = replace(language, **rates)
    else:
        length = int(read_json(model / "language" / "config.json").get("max_position_embeddings", 2048))
        rates = {"learning_rate": 2e-4 if lora_rank else 2e-5, "rows_rate": 5e-5, "reader_rate": 5e-5}
        language = LanguageTraining(steps=steps, rows=8, tokens=min(2048, length), **rates)
    return FinetuneTraining(language=replace(language, steps=steps), lora_rank=lora_rank, seed=seed)


class Finetune:
    """One fine-tuning in a folder; `minutes` replaces the steps by as many as take that long on this machine."""

    def __init__(
        self,
        folder: Path,
        data: str | Path,
        model: Path,
        training: FinetuneTraining,
        *,
        minutes: float | None = None,
        watch: Callable[[Report], None] | None = None,
        prepare: Callable[[str, int, int], None] | None = None,
        trackers: Sequence[str] = ("tensorboard",),
    ) -> None:
        self.folder, self.data, self.source = Path(folder), Path(data), model_folder(model)
        self.minutes, self.watch, self.prepare, self.trackers = minutes, watch, prepare, tuple(trackers)
        if minutes is not None and minutes <= 0:
            raise InputError(f"a training needs a positive time, not {minutes} minutes")
        if self.folder.resolve() == self.source.resolve():
            raise InputError(f"{folder} is the model that is to be fine-tuned: give another --out")
        self.accelerator = make_accelerator(training.precision)
        if self.accelerator.is_fsdp2:
            raise InputError("fine-tuning runs in one process or under DDP: start it without FSDP")
        self.training = self._settle(training)

    def _settle(self, training: FinetuneTraining) -> FinetuneTraining:
        """Check that the folder is of the same fine-tuning, if it is one; steps that were measured stay."""
        path = self.folder / "finetune.json"
        self.accelerator.wait_for_everyone()
        if not path.exists():
            return training
        saved = read_json(path)
        settled = from_json(FinetuneTraining, saved.pop("training"))
        if self.minutes is not None:
            training = replace(training, language=replace(training.language, steps=settled.language.steps))
        if saved != self._said() or settled != training:
            raise InputError(f"{self.folder} holds a fine-tuning with other settings: give another --out, or delete it")
        return settled

    def _said(self) -> dict[str, Any]:
        return {"data": str(self.data), "model": str(self.source), "minutes": self.minutes}

    def train(self) -> None:
        """Train to the end and save; what is finished is not touched again."""
        if (self.folder / "language" / "done").exists():
            log.info("%s is fine-tuned already", self.folder)
            return
        conversations = load_conversations(self.data)
        torch.manual_seed(self.training.seed)
        model = LaVIT.from_pretrained(self.source, device=self.accelerator.device)
        language, text = model.language, model.text
        adapted = prepare_lora(language, model.config, self.training.lora_rank)
        stage = self._stage(model, language, text, conversations)
        if self.minutes is not None and not (self.folder / "finetune.json").exists():
            self._measure(stage)
        if self.accelerator.is_main_process:
            self._write_settings()
        self._loop(stage)
        self._save(model.config, language, text, adapted)

    def _stage(
        self, model: LaVIT, language: Language, text: PreTrainedTokenizerBase, conversations: Conversations
    ) -> FinetuneStage:
        config = self.training.language
        features, tokens = self._pictures(model, conversations)
        codes = tuple(tuple(part.tolist()) for part in tokens.split())
        make = {"text": text, "vocabulary": language.vocabulary, "config": config, "seed": self.training.seed}
        documents = ConversationDocuments(conversations, codes, **make)
        return FinetuneStage(language, model.tokenizer, documents, features, tokens, config)

    def _pictures(self, model: LaVIT, conversations: Conversations) -> tuple[Features, VisualTokens]:
        """Features and tokens of every picture; none where nobody shows one."""
        vision = model.config.vision
        if not conversations.pictures:
            return nothing_read(vision)
        progress = self.prepare if self.accelerator.is_main_process else None
        with first_alone(self.accelerator):
            features = compute_features(
                conversations.pictures,
                model.vision,
                self.folder / "cache",
                progress=progress and (lambda done, of: progress("encoder features", done, of)),
            )
        return features, tokenize_features(model.tokenizer, features)

    def _measure(self, stage: FinetuneStage) -> None:
        """Settle the steps: time some (forward and backward, nothing is changed) on rank 0, agree on its answer."""
        device, module = self.accelerator.device, stage.module.to(self.accelerator.device)
        for step in range(MEASURED + 1):
            if step == 1:
                started = time.perf_counter()
            batch = stage.batch(step, Shard(self.accelerator.process_index, self.accelerator.num_processes))
            stage.losses(module, batch, step, self.accelerator)["loss"].backward()
        module.zero_grad(set_to_none=True)
        seconds = (time.perf_counter() - started) / MEASURED
        found = torch.tensor(max(1, round(60 * self.minutes / seconds)), device=device)
        steps = int(self.accelerator.gather(found[None])[0])
        log.info("%.1f minutes are %d steps of %.2f seconds", self.minutes, steps, seconds)
        self.training = replace(self.training, language=replace(self.training.language, steps=steps))
        stage.config, stage.steps = self.training.language, steps

    def _write_settings(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            said = {**self._said(), "training": to_json(self.training)}
            (self.folder / "finetune.json").write_text(json.dumps(said, indent=1) + "\n")
        except OSError as error:
            raise InputError(f"cannot write to {self.folder}: {error.strerror}") from error

    def _loop(self, stage: FinetuneStage) -> None:
        training = self.training
        train(
            stage,
            self.folder,
            accelerator=self.accelerator,
            clip=training.clip,
            warmup=training.language.warmup,
            betas=(0.9, 0.95),
            checkpoint_every=training.checkpoint_every,
            keep_last=training.keep_last,
            log_every=training.log_every,
            trackers=self.trackers,
            watch=self.watch if self.accelerator.is_main_process else None,
        )

    def _save(self, config: ModelConfig, language: Language, text: PreTrainedTokenizerBase, adapted: bool) -> None:
        """The whole model folder: language and reader anew, everything else copied."""
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        for part in COPIED:
            if (self.source / part).is_dir():
                shutil.copytree(self.source / part, self.folder / part, dirs_exist_ok=True)
        if (self.source / "training.json").exists():
            shutil.copy(self.source / "training.json", self.folder / "training.json")
        if not adapted:
            merge_lora(language.lm)
            config = replace(config, language=replace(config.language, lora_rank=0))
        LaVIT(config, {"language": language}, text=text, folder=self.folder).save_pretrained(
            self.folder, parts=("language",)
        )
        (self.folder / "language" / "done").touch()


def prepare_lora(language: Language, config: ModelConfig, rank: int | None) -> bool:
    """Make the LM train as asked (`FinetuneTraining.lora_rank`); True if it trains the LoRA that the model has."""
    has = config.language.lora_rank
    if has and rank in (None, has):
        return True
    merge_lora(language.lm)
    if rank:
        inject_lora(language, replace(config.language, lora_rank=rank))
    return False


def merge_lora(lm: nn.Module) -> None:
    """Add LoRA to the weights it stands beside and take it out; all weights train afterwards. Logits stay."""
    tuners = require("peft.tuners.tuners_utils", extra="train")
    for name, module in list(lm.named_modules()):
        if isinstance(module, tuners.BaseTunerLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(lm.get_submodule(parent), child, module.get_base_layer())
    if hasattr(lm, "peft_config"):
        del lm.peft_config
    lm.requires_grad_(True)

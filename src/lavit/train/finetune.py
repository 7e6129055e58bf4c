"""Fine-tuning of a trained model on conversations with pictures on both sides, whole or by LoRA.

Encoder and tokenizer stay as they are; the LM, the visual rows and the reader train as in stage 2,
on the assistant's turns alone. The new folder is a model folder of its own: other parts are copied.
LoRA (arXiv 2106.09685) that was put in here is merged when the model is saved, so `language/` stays
a plain causal LM, or kept as a PEFT adapter, whose base is in base/ (`keep_adapter`); a model that
*has* LoRA over a base (presets do) trains that on. The same command on the same folder goes on
where it was.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
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
from lavit.data.conversation_documents import ConversationDocuments
from lavit.data.conversations import Conversations, load_conversations
from lavit.data.corpus import parse_mixture, with_more
from lavit.data.features import nothing_read
from lavit.data.sources import open_source
from lavit.data.text import TextPieces, Texts
from lavit.files import alone, naming, sha256
from lavit.language.lora import inject_lora, merge_lora
from lavit.language.model import Language
from lavit.model import LaVIT
from lavit.storage import model_folder
from lavit.train.encoded import check_reader, features_of, tokens_of
from lavit.train.language import LanguageStage
from lavit.train.loop import Report, step_once
from lavit.train.metrics import check_trackers
from lavit.train.muon import Muon
from lavit.train.run import Run, train_loop
from lavit.train.settings import FREE
from lavit.train.spread import make_accelerator

log = logging.getLogger(__name__)
COPIED = ("vision", "visual_tokenizer", "pixels", "safety_checker", "base")
FILE = "finetune.json"  # what the folder's fine-tuning is
MEASURED = 3  # steps whose time says how many fit into some minutes


def finetune_training(
    model: str | Path,
    *,
    lora_rank: int | None = None,
    steps: int = 200,
    seed: int = 0,
    keep_adapter: bool = False,
    images: str | Path | None = None,
    replay: str = "",
) -> FinetuneTraining:
    """A training for a model folder: rows as in its stage 2 and a tenth of its rates (LoRA: its).

    A model that does not say how it was trained gets rows of its LM's own length, at most 2048
    tokens, and 2e-5 / 5e-5 (LoRA 2e-4).
    """
    if steps < 1:
        raise InputError(f"a training needs at least 1 step, not {steps}")
    if lora_rank is not None and lora_rank < 0:
        raise InputError(f"--lora {lora_rank} is no rank: give 1 or more, or 0 for all weights")
    if keep_adapter and not lora_rank:
        raise InputError("an adapter is kept where one trains: give its rank too (--lora 16)")
    model = model_folder(model)
    rates: dict[str, Any]
    if (model / "training.json").exists():
        trained = read_json(model / "training.json").get("training", {})
        with naming(model / "training.json"):
            language = from_json(TrainConfig, trained).language
        rates = {"learning_rate": (1.0 if lora_rank else 0.1) * language.learning_rate}
        rates |= {"rows_rate": 0.1 * language.rows_rate, "reader_rate": 0.1 * language.reader_rate}
    else:
        under = "language" if (model / "language" / "config.json").is_file() else "base"
        config = read_json(model / under / "config.json")
        length = min(2048, int(config.get("max_position_embeddings", 2048)))
        rates = {"rows_rate": 5e-5, "reader_rate": 5e-5}
        rates["learning_rate"] = 2e-4 if lora_rank else 2e-5
        language = LanguageTraining(steps=steps, rows=8, tokens=length, **rates)
    language = replace(language, steps=steps, **rates)
    how: dict[str, Any] = {
        "keep_adapter": keep_adapter,
        "images": None if images is None else str(images),
        "replay": replay,
    }
    return FinetuneTraining(language=language, lora_rank=lora_rank, seed=seed, **how)


def finetune(
    folder: Path,
    data: str | Path,
    model: str | Path,
    training: FinetuneTraining,
    *,
    minutes: float | None = None,
    watch: Callable[[Report], None] | None = None,
    prepare: Callable[[str, int, int], None] | None = None,
    trackers: Sequence[str] = ("tensorboard",),
) -> Run[FinetuneTraining]:
    """Fine-tune a model folder into another one; what is finished is not touched again.

    `minutes` replaces the steps by as many as take that long. Raises `InputError` where the folder
    holds another fine-tuning.
    """
    run, source = _open(Path(folder), data, model, training, minutes)
    run.watch, run.prepare, run.trackers = watch, prepare, tuple(trackers)
    check_trackers(run.trackers)
    if run.has_done("language"):
        log.info("%s is fine-tuned already", folder)
        return run
    images = run.training.images
    conversations = load_conversations(Path(run.data), Path(images) if images else None)
    replayed = _replayed(run.training)
    with alone(run.folder) if run.main else nullcontext():
        _train(run, source, minutes, conversations, replayed)
    return run


def _train(
    run: Run[FinetuneTraining],
    source: Path,
    minutes: float | None,
    conversations: Conversations,
    replayed: tuple[Texts, int] | None,
) -> None:
    torch.manual_seed(run.training.seed)
    parts = TO_READ if conversations.pictures else TO_READ[1:]
    lavit = LaVIT.from_pretrained(source, device=run.accelerator.device, parts=parts)
    lavit.needs(*parts)
    language, text = lavit.language, lavit.text_tokenizer
    adapted = prepare_lora(language, run.config, run.training.lora_rank)
    if run.training.lora_rank == 0:
        log.info("LoRA of rank 0: all weights of the language model train")
    stage = _stage(run, lavit, conversations, replayed)
    path = run.folder / FILE
    if minutes is not None and not path.exists():
        _measure(run, stage, minutes)
    if run.main:
        write_json(path, run.settings | {"training": to_json(run.training)})
    config = run.training.language
    origins = {"": f"loaded from {source.name}"}
    train_loop(run, stage, origins, warmup=config.warmup, betas=(0.9, 0.95))
    run.accelerator.wait_for_everyone()
    if run.main:
        _save_all(run, source, language, text, adapted)


def _open(
    folder: Path,
    data: str | Path,
    model: str | Path,
    training: FinetuneTraining,
    minutes: float | None,
) -> tuple[Run[FinetuneTraining], Path]:
    """The fine-tuning in a folder, and the model's folder; steps that were measured stay."""
    source = model_folder(model)
    replay = training.replay.rpartition(":")[0]
    contents = {name: _content(Path(name)) for name in (str(Path(data)), replay) if name}
    said = {"data": str(Path(data)), "model": str(source), "minutes": minutes, "sha256": contents}
    if minutes is not None and not 0 < minutes < float("inf"):
        raise InputError(f"a training needs a positive time, not {minutes} minutes")
    if folder.resolve() == source.resolve():
        raise InputError(f"{folder} is the model to be fine-tuned: give another --out")
    config = read_config(source)
    accelerator = make_accelerator(training.precision)
    if accelerator.is_fsdp2:
        raise InputError("fine-tuning runs in one process or under DDP: start it without FSDP")
    run = Run(folder, str(Path(data)), training, config, accelerator, settings=said)
    accelerator.wait_for_everyone()
    begun = any((folder / name).exists() for name in ("config.json", "training.json"))
    if begun and not (folder / FILE).exists():
        raise InputError(f"{folder} holds a model or another training: give another --out")
    if (folder / FILE).exists():
        saved = read_json(folder / FILE)
        with naming(folder / FILE):
            settled = from_json(FinetuneTraining, saved.pop("training", {}))
        settled = replace(settled, **{name: getattr(training, name) for name in FREE})
        if minutes is not None:
            _take_steps(run, settled.language.steps)
        before = saved.get("sha256")
        if isinstance(before, dict) and before.keys() == contents.keys() and before != contents:
            changed = ", ".join(name for name in contents if before[name] != contents[name])
            since = f"{changed} has changed since {folder} was begun with it"
            raise InputError(f"{since}: give another --out, or delete that one")
        if saved != said or settled != run.training:
            holds = f"{folder} holds a fine-tuning with other settings"
            raise InputError(f"{holds}: give another --out, or delete it")
    return run, source


def _content(path: Path) -> str | None:
    """A hash of what a file or the files of a folder hold; None for a name on the hub."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    names = [file for file in files if file.is_file()]
    try:
        hashes = [(file.relative_to(path).as_posix(), sha256(file)) for file in names]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    return hashlib.sha256(repr(hashes).encode()).hexdigest() if hashes else None


def _stage(
    run: Run[FinetuneTraining],
    model: LaVIT,
    conversations: Conversations,
    replayed: tuple[Texts, int] | None,
) -> LanguageStage:
    """Stage 2 on conversations, and on texts that fill some rows of a step."""
    check_reader(model.language)
    features, tokens = nothing_read(run.config.vision)
    if conversations.pictures:
        features = features_of(run, conversations.pictures, model.vision)
        tokens = tokens_of(run, model.visual_tokenizer, features)
    config, language = run.training.language, model.language
    codes = tuple(tuple(part.tolist()) for part in tokens.split())
    make: dict[str, Any] = {"vocabulary": language.vocabulary, "config": config}
    make |= {"text": model.text_tokenizer, "seed": run.training.seed}
    make["rows"] = language.reader.rows
    if replayed is not None:
        texts, make["text_rows"] = replayed
        end = language.vocabulary.end
        make["texts"] = TextPieces(texts, model.text_tokenizer, config.tokens, end)
    documents = ConversationDocuments(conversations, codes, **make)
    tokenizer = model.visual_tokenizer
    stage = LanguageStage(language, tokenizer, documents, features, tokens, config)
    stage.name = "finetune"
    return stage


def _replayed(training: FinetuneTraining) -> tuple[Texts, int] | None:
    """Texts alone, and how many rows of a step they fill."""
    if not training.replay:
        return None
    (name, share), *more = parse_mixture(training.replay)
    rows, like = training.language.rows, "--replay TEXTS:0.25"
    if more or not 0 < share < 1:
        said = f"replay {training.replay!r} is not one source and a share of rows"
        raise InputError(f"{said}: write {like}")
    texts = open_source(name)
    if not isinstance(texts, Texts):
        raise InputError(f"{name} holds pictures: give texts alone to be replayed")
    if not sum(texts.characters):
        raise InputError(f"{name} has no text in it")
    filled = min(rows - 1, max(1, round(share * rows)))
    if filled < 1:
        raise InputError(f"a step of {rows} row has no room for replay: use 2 rows or more")
    return texts, filled


def _take_steps(run: Run[FinetuneTraining], steps: int) -> None:
    language = replace(run.training.language, steps=steps)
    run.training = replace(run.training, language=language)


def _measure(run: Run[FinetuneTraining], stage: LanguageStage, minutes: float) -> None:
    """Settle the steps: time some whole ones that move nothing, and agree on rank 0's answer."""
    accelerator = run.accelerator
    device, module = accelerator.device, stage.module.to(accelerator.device)
    stage.accelerator = accelerator
    still = [group | {"lr": 0.0, "weight_decay": 0.0} for group in stage.parameter_groups()]
    optimizer = Muon(still, fused=True)  # costs what a step costs, and moves nothing
    for step in range(MEASURED + 1):
        if step == 1:
            started = time.perf_counter()
        step_once(stage, module, optimizer, step, clip=run.training.clip)
    module.zero_grad(set_to_none=True)
    seconds = (time.perf_counter() - started) / MEASURED
    found = torch.tensor([max(1, round(60 * minutes / seconds))], device=device)
    steps = int(accelerator.gather(found)[0])
    log.info("%.1f minutes are %d steps of %.2f seconds", minutes, steps, seconds)
    _take_steps(run, steps)
    stage.config, stage.steps = run.training.language, steps


def _save_all(
    run: Run[FinetuneTraining],
    source: Path,
    language: Language,
    text: PreTrainedTokenizerBase,
    adapted: bool,
) -> None:
    """The whole model folder: language and reader of this training, everything else copied."""
    kept = not adapted and run.training.keep_adapter
    for part in COPIED if adapted else COPIED[:-1]:  # what is merged stands alone
        if (source / part).is_dir():
            shutil.copytree(source / part, run.folder / part, dirs_exist_ok=True)
    if (source / "training.json").exists():
        data = ",".join(filter(None, (run.data, run.training.replay)))
        said = read_json(source / "training.json") | {"origin": with_more(source, data)}
        write_json(run.folder / "training.json", said)
    config = run.config
    if kept:
        rank = run.training.lora_rank or 0
        own: dict[str, Any] = {
            "source": "base",
            "architecture": {},
            "sha256": None,
            "lora_rank": rank,
        }
        config = replace(config, language=replace(config.language, **own))
    elif not adapted:
        merge_lora(language.lm)
        config = replace(config, language=replace(config.language, lora_rank=0))
    LaVIT(config, language=language, text_tokenizer=text).save_pretrained(run.folder)
    (run.folder / "language" / "done").touch()


def prepare_lora(language: Language, config: ModelConfig, rank: int | None) -> bool:
    """Make the LM train as asked (`FinetuneTraining.lora_rank`); True if it trains its own LoRA."""
    has = config.language.lora_rank
    if has and rank in (None, has):
        return True
    merge_lora(language.lm)
    if rank:
        inject_lora(language.lm, replace(config.language, lora_rank=rank))
    return False

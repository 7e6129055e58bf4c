"""Every part on disk is a standard checkpoint; reading is strict, and safetensors only.

config.json        ours (`ModelConfig`), with a format number
vision/            a transformers vision checkpoint, where the encoder is not a reference
visual_tokenizer/  model.safetensors: selector, merger, codebook, reconstructor
language/          a plain transformers causal LM with the joint vocabulary and its text tokenizer;
                   or, over a referenced base, a PEFT adapter, rows.safetensors and the tokenizer
reader/            model.safetensors: the second merger and the projection of pictures into the LM
pixels/            a diffusers folder
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lavit.config import PARTS, InputError, LanguageConfig, ModelConfig, require
from lavit.language.model import Language
from lavit.language.smollm2 import SMOLLM2, load_smollm2, load_smollm2_text, smollm2_file
from lavit.vision.encoder import pretrained, sha256
from lavit.visual_tokenizer.merger import Merger
from lavit.visual_tokenizer.tokenizer import VisualTokenizer
from lavit.vocabulary import MARKERS

log = logging.getLogger(__name__)
WEIGHTS = Path(__file__).parent / "weights"  # a folder for each model that comes with this package
READER = ("merger.", "to_language.")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def model_folder(
    model: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    parts: Sequence[str] = PARTS,
) -> Path:
    """The folder of a model: a folder, a model of this package ("nano") or of the hub ("org/name").

    The other arguments are for the hub: `revision`, `cache_dir` and `token` are those of
    huggingface_hub, and of `parts` that are not named no files are downloaded. Raises `InputError`
    where there is no such model.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    shipped = sorted(path.parent.name for path in WEIGHTS.glob("*/config.json"))
    if str(model) in shipped:
        return WEIGHTS / str(model)
    said = f"there is no model at {model}"
    if not (isinstance(model, str) and HUB_NAME.fullmatch(model)):
        hint = "give the folder of a trained run, a name of the hub (org/name), or a shipped one"
        raise InputError(f"{said}: {hint} ({', '.join(shipped) or 'none'})")
    from huggingface_hub import snapshot_download

    left_out = [part for part in PARTS if part not in parts]
    left_out += ["reader"] * ("language" in left_out)
    options = {"revision": revision, "cache_dir": cache_dir, "token": token}
    try:
        ignored = [f"{part}/*" for part in left_out]
        return Path(snapshot_download(model, ignore_patterns=ignored, **options))
    except (OSError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise InputError(f"{said}, and the hub does not give it: {line}") from error


def has_part(config: ModelConfig, folder: Path, part: str) -> bool:
    """Whether a model folder has a part; an encoder that is only referenced is always there."""
    return (folder / part).is_dir() or (part == "vision" and config.vision.source != "folder")


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `folder` at the end, if anything lies in it then."""
    new, old = (folder.with_name(f".{folder.name}.{age}") for age in ("new", "old"))
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from error
    try:
        yield new
        if not any(new.iterdir()):
            return
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Be the only process that writes into a folder; the lock dies with the process.

    Raises `InputError` if another one is at it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            said = f"another process is writing to {folder}"
            raise InputError(f"{said}: wait for its end, or give another folder") from error
        yield


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors, creating the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: one.detach().contiguous().cpu() for name, one in tensors.items()}, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; a missing or broken one raises `InputError`."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        said = f"{path} is missing: this model folder is incomplete (did its training end?)"
        raise InputError(said) from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}") from error


def load_strictly(module: nn.Module, tensors: dict[str, Tensor], where: Path) -> None:
    """Load every tensor into the module; names or shapes that differ raise `InputError`."""
    expected = module.state_dict()
    missing, unknown = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or unknown:
        said = f"missing {missing[:3]}, not expected {unknown[:3]}"
        raise InputError(f"{where} does not fit this configuration: {said}")
    for name, tensor in tensors.items():
        wanted = list(expected[name].shape)
        if list(tensor.shape) != wanted:
            said = f"{name} is {list(tensor.shape)}, this configuration expects {wanted}"
            raise InputError(f"{where}: {said}")
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise InputError(f"{where}: {name} is of {tensor.dtype}, not {expected[name].dtype}")
    module.load_state_dict(tensors)


def load_base(
    config: LanguageConfig,
    folder: Path | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The causal LM that `config` names, and its text tokenizer ("random" has none yet)."""
    if config.source == "random":
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.architecture)), None
    if config.source == SMOLLM2:
        file = smollm2_file(config.sha256)
        lm = load_smollm2(file)
        if folder is not None and (folder / "tokenizer.json").is_file():
            return lm, AutoTokenizer.from_pretrained(folder)
        return lm, load_smollm2_text(file)
    where = folder if config.source == "folder" else config.source
    if config.source == "folder" and not (folder and (folder / "config.json").is_file()):
        raise InputError(f"{folder} holds no language model: has the language stage been trained?")
    try:
        return pretrained(AutoModelForCausalLM, where), AutoTokenizer.from_pretrained(where)
    except Exception as error:  # configurations, weights and tokenizers fail in ways of their own
        if "tiktoken" in str(error):  # what transformers says where it cannot read SentencePiece
            require("sentencepiece", extra="published")
        why = " ".join(str(error).split())[:200] or type(error).__name__
        named = "" if where == folder or folder is None else f" (language.source, {folder.parent})"
        raise InputError(f"no language model at {where}{named}: {why}") from error


def build_language(
    lm: PreTrainedModel,
    merger: Merger,
    config: ModelConfig,
    text: PreTrainedTokenizerBase,
) -> Language:
    """A new `Language` around a base LM: fresh rows, the stage-1 merger copied, LoRA if asked."""
    language = Language(
        lm,
        merger,
        dim=config.vision.dim,
        codes=config.visual_tokenizer.codes,
        end=text.eos_token_id,
        trained=config.language.source != "random",
        read_as=config.language.read_as,
    )
    if config.language.lora_rank:
        inject_lora(language, config.language)
    return language


def inject_lora(language: Language, config: LanguageConfig) -> None:
    """Put LoRA layers into the LM in place (peft); only they, rows and reader train then."""
    peft = require("peft", extra="mini")
    rank, targets = config.lora_rank, list(config.lora_targets)
    lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    peft.inject_adapter_in_model(lora, language.lm)


def merge_lora(language: Language) -> None:
    """Add LoRA to the weights beside it and take it out: the same outputs; all weights train."""
    lora = require("peft.tuners.lora", extra="mini")
    for name, layer in list(language.lm.named_modules()):
        if isinstance(layer, lora.LoraLayer):
            layer.merge()
            language.lm.set_submodule(name, layer.get_base_layer())
    for trace in ("peft_config", "_hf_peft_config_loaded"):
        language.lm.__dict__.pop(trace, None)
    language.lm.requires_grad_(True)


def export_language(config: ModelConfig, folder: Path, out: Path, *, merge: bool = False) -> None:
    """Write a model's language part as a plain transformers folder with the joint vocabulary.

    An adapter over a base needs `merge`. Raises `InputError` if it is missing, or if `out` exists.
    """
    if out.exists():
        raise InputError(f"{out} exists already: give another --out")
    if config.language.lora_rank and not merge:
        said = f"{folder} holds an adapter over {config.language.source}"
        raise InputError(f"{said}: --merge joins the two")
    language, text = load_language(config, folder)
    if config.language.lora_rank:
        merge_lora(language)
    with replacing(out) as new:
        export(language, text, new)


def save_language(
    language: Language,
    text: PreTrainedTokenizerBase,
    config: LanguageConfig,
    folder: Path,
) -> LanguageConfig:
    """Write `language/` and `reader/` into `folder`; returns the configuration that reads them."""
    tensors = language.state_dict()
    with replacing(folder / "reader") as new:
        reader = {name: tensors[name] for name in tensors if name.startswith(READER)}
        save_tensors(reader, new / "model.safetensors")
    with replacing(folder / "language") as new:
        if not config.lora_rank:
            export(language, text, new)
            return replace(config, source="folder", architecture={})
        adapter = require("peft", extra="mini").get_peft_model_state_dict(language.lm)
        save_tensors(adapter, new / "adapter_model.safetensors")
        said = copy(language.lm.peft_config["default"])
        said.target_modules = sorted(said.target_modules)  # a set: in any order
        said.save_pretrained(new)
        rows = {name: tensors[name] for name in ("rows", "head_rows") if name in tensors}
        save_tensors(rows, new / "rows.safetensors")
        text.save_pretrained(new)
    if config.source != SMOLLM2:
        return config
    return replace(config, sha256=sha256(smollm2_file()))  # an adapter fits no other weights


@torch.no_grad()
def export(language: Language, text: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a plain transformers causal LM with the joint vocabulary and equal logits."""
    lm = language.lm
    table, head = lm.get_input_embeddings().weight, lm.get_output_embeddings()
    joint = {id(table): torch.cat([table, language.rows.to(table.dtype)])}
    if not language.tied:
        rows = language.head_rows.to(head.weight.dtype)
        joint[id(head.weight)] = torch.cat([head.weight, rows])
    if head.bias is not None:
        joint[id(head.bias)] = F.pad(head.bias, (0, language.vocabulary.visual_size))
    tensors = lm.state_dict()
    for name, parameter in lm.named_parameters(remove_duplicate=False):
        tensors[name] = joint.get(id(parameter), tensors[name])
    size = lm.config.vocab_size
    lm.config.vocab_size = language.vocabulary.size
    try:
        lm.save_pretrained(folder, state_dict=tensors)
    finally:
        lm.config.vocab_size = size
    text.save_pretrained(folder)


def load_visual_tokenizer(config: ModelConfig, folder: Path) -> VisualTokenizer:
    """Read `visual_tokenizer/` of a model folder (fp32); raises `InputError` if it does not fit."""
    tokenizer = VisualTokenizer(config.visual_tokenizer)
    where = folder / "visual_tokenizer" / "model.safetensors"
    tensors = load_tensors(where)
    known = {"codebook.vectors", "codebook.mass"} <= tensors.keys()
    if known and "codebook.sums" not in tensors:
        mass = tensors["codebook.mass"][:, None]  # shipped models leave the sums out
        tensors["codebook.sums"] = tensors["codebook.vectors"] * mass
    load_strictly(tokenizer, tensors, where)
    return tokenizer


def over_base(config: ModelConfig, source: str) -> ModelConfig:
    """The configuration with another language model (a path or hub id) under its adapter.

    Raises `InputError` for a model whose language part is no adapter over a base.
    """
    language = config.language
    if not language.lora_rank:
        raise InputError(f"{config.name} is no adapter over a base: leave the other base out")
    said = "base weights: %s instead of %s, so the figures of this model do not apply"
    log.warning(said, source, language.source)
    return replace(config, language=replace(language, source=source, sha256=None))


def load_language(config: ModelConfig, folder: Path) -> tuple[Language, PreTrainedTokenizerBase]:
    """Read `language/` and `reader/` of a model folder; raises `InputError` if they do not fit."""
    if (folder / "language").is_dir() and not (folder / "reader").is_dir():
        said = f"{folder} has no reader for pictures (reader/ is missing)"
        raise InputError(f"{said}: copy it there, or train the language stage again")
    lm, text = load_base(config.language, folder / "language")
    tokenizer = config.visual_tokenizer
    merger = Merger(tokenizer.dim, tokenizer.heads, tokenizer.merger_depth, tokenizer.mlp_ratio)
    tensors = load_tensors(folder / "reader" / "model.safetensors")
    if not config.language.lora_rank:
        visual = MARKERS + tokenizer.codes
        table, head = lm.get_input_embeddings().weight, lm.get_output_embeddings().weight
        tensors["rows"] = table[-visual:].detach().clone()
        if head is not table:
            tensors["head_rows"] = head[-visual:].detach().clone()
        lm.resize_token_embeddings(len(table) - visual)
    language = build_language(lm, merger, config, text)
    if config.language.lora_rank:
        _load_adapter(language, folder / "language")
        tensors |= load_tensors(folder / "language" / "rows.safetensors")
    tensors |= {f"lm.{name}": tensor for name, tensor in language.lm.state_dict().items()}
    load_strictly(language, tensors, folder / "language")
    return language, text


def _load_adapter(language: Language, folder: Path) -> None:
    tensors = load_tensors(folder / "adapter_model.safetensors")
    try:
        result = require("peft", extra="mini").set_peft_model_state_dict(language.lm, tensors)
    except RuntimeError as error:  # other widths
        raise InputError(f"{folder} holds an adapter for another language model") from error
    if result.unexpected_keys or any("lora_" in key for key in result.missing_keys):
        raise InputError(f"{folder} holds an adapter for another language model")

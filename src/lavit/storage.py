"""Every part on disk is a standard checkpoint; this file reads and writes them, strictly, safetensors only.

config.json      ours (`ModelConfig`)
tokenizer/       model.safetensors: selector, merger, codebook, reconstructor
vision/          a transformers vision checkpoint, where the encoder is not a reference
language/        a plain transformers causal LM with the joint vocabulary and its text tokenizer;
                 or, over a referenced base, a PEFT adapter, rows.safetensors and the text tokenizer
reader/          model.safetensors: the second merger and the projection that let pictures into the LM
pixels/          a diffusers folder
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path

import torch
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

from lavit.config import InputError, LanguageConfig, ModelConfig, require
from lavit.modules.language import Language
from lavit.modules.merger import Merger
from lavit.modules.smollm2 import SMOLLM2, load_smollm2, load_smollm2_text, smollm2_file
from lavit.modules.vision import sha256

WEIGHTS = Path(__file__).parent / "weights"  # a folder for each model that comes with this package
READER = ("merger.", "to_language.")


def model_folder(model: str | Path) -> Path:
    """A model's folder: the one given, or that of a model that comes with this package ("nano").

    Raises `InputError` where there is neither.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    shipped = sorted(path.parent.name for path in WEIGHTS.glob("*/config.json"))
    if str(model) in shipped:
        return WEIGHTS / str(model)
    names = ", ".join(shipped) or "none"
    raise InputError(f"there is no model at {model}: give the folder of a trained run, or a name (shipped: {names})")


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Give an empty folder that takes the place of `folder` at the end, or vanishes if the block fails."""
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = folder.with_name(f".{folder.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from error
    try:
        yield new
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors, creating the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; a missing or broken one raises `InputError`."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing: this model folder is incomplete (did its training end?)") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a readable safetensors file: {error}") from error


def load_strictly(module: nn.Module, tensors: dict[str, Tensor], where: Path) -> None:
    """Load every tensor into the module; names or shapes that differ raise `InputError` saying which."""
    expected = module.state_dict()
    missing, unknown = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or unknown:
        raise InputError(f"{where} does not fit this configuration: missing {missing[:3]}, not expected {unknown[:3]}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise InputError(
                f"{where}: {name} is {list(tensor.shape)}, this configuration expects {list(expected[name].shape)}"
            )
    module.load_state_dict(tensors)


def load_base(config: LanguageConfig, folder: Path | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The causal LM that `config` names, and its text tokenizer ("random" has none yet)."""
    if config.source == "random":
        options = dict(config.architecture)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(options.pop("model_type"), **options)), None
    if config.source == SMOLLM2:
        file = smollm2_file(config.sha256)
        lm = load_smollm2(file)
        kept = folder is not None and (folder / "tokenizer.json").is_file()
        return lm, AutoTokenizer.from_pretrained(folder) if kept else load_smollm2_text(file)
    where = folder if config.source == "folder" else config.source
    if config.source == "folder" and not (folder and (folder / "config.json").is_file()):
        raise InputError(f"{folder} holds no language model: has the language stage been trained?")
    try:
        return AutoModelForCausalLM.from_pretrained(where), AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise InputError(f"no language model at {where}: {str(error).splitlines()[0]}") from error


def build_language(lm: PreTrainedModel, merger: Merger, config: ModelConfig, text: PreTrainedTokenizerBase) -> Language:
    """A new `Language` around a base LM: fresh rows, the stage-1 merger copied, LoRA injected where asked."""
    dim, codes = config.vision.dim, config.tokenizer.codes
    trained = config.language.source != "random"
    language = Language(lm, merger, dim=dim, codes=codes, end=text.eos_token_id, trained=trained)
    if config.language.lora_rank:
        inject_lora(language, config.language)
    return language


def inject_lora(language: Language, config: LanguageConfig) -> None:
    """Put LoRA layers into the LM in place (peft); only they, the rows and the reader train then."""
    peft = require("peft", extra="mini")
    lora = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank,
        target_modules=list(config.lora_targets),
    )
    peft.inject_adapter_in_model(lora, language.lm)


def merge_lora(language: Language) -> None:
    """Add the adapter to the weights it stands beside, and take it away: the same outputs from a plain model."""
    lora = require("peft.tuners.lora", extra="mini")
    for name, layer in list(language.lm.named_modules()):
        if isinstance(layer, lora.LoraLayer):
            layer.merge()
            language.lm.set_submodule(name, layer.get_base_layer())
    for trace in ("peft_config", "_hf_peft_config_loaded"):
        language.lm.__dict__.pop(trace, None)


def export_language(config: ModelConfig, folder: Path, out: Path, *, merge: bool = False) -> None:
    """Write the language model of a model folder as a plain transformers folder with the joint vocabulary.

    A model that is an adapter over a base needs `merge`. Raises `InputError` if it is missing, or if `out` exists.
    """
    if out.exists():
        raise InputError(f"{out} exists already: give another --out")
    if config.language.lora_rank and not merge:
        raise InputError(f"{folder} holds an adapter over {config.language.source}: --merge joins the two")
    language, text = load_language(config, folder)
    if config.language.lora_rank:
        merge_lora(language)
    with replacing(out) as new:
        export(language, text, new)


def save_language(
    language: Language, text: PreTrainedTokenizerBase, config: LanguageConfig, folder: Path
) -> LanguageConfig:
    """Write `language/` and `reader/` into `folder`; returns the configuration that reads them again."""
    reader = {name: tensor for name, tensor in language.state_dict().items() if name.startswith(READER)}
    with replacing(folder / "reader") as new:
        save_tensors(reader, new / "model.safetensors")
    with replacing(folder / "language") as new:
        if config.lora_rank:
            _save_adapter(language, new)
            text.save_pretrained(new)
            return pinned(config)
        export(language, text, new)
    return replace(config, source="folder", architecture={})


def pinned(config: LanguageConfig) -> LanguageConfig:
    """The same, with the SHA-256 of base weights that are a file: an adapter fits no others."""
    return replace(config, sha256=sha256(smollm2_file())) if config.source == SMOLLM2 else config


def _save_adapter(language: Language, folder: Path) -> None:
    from peft import get_peft_model_state_dict

    save_tensors(get_peft_model_state_dict(language.lm), folder / "adapter_model.safetensors")
    said = copy(language.lm.peft_config["default"])
    said.target_modules = sorted(said.target_modules)  # a set: each process would write it in another order
    said.save_pretrained(folder)
    save_tensors(_rows(language), folder / "rows.safetensors")


def _rows(language: Language) -> dict[str, Tensor]:
    head = {} if language.head_rows is None else {"head_rows": language.head_rows}
    return {"rows": language.rows, **head}


@torch.no_grad()
def export(language: Language, text: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a plain transformers causal LM with the joint vocabulary: AutoModelForCausalLM opens it, logits are equal."""
    lm = language.lm
    table, head = lm.get_input_embeddings().weight, lm.get_output_embeddings()
    names = {id(parameter): name for name, parameter in lm.named_parameters(remove_duplicate=False)}
    tensors = {name: tensor.detach() for name, tensor in lm.state_dict().items()}
    joint = torch.cat([table, language.rows.to(table.dtype)])
    for name, parameter in lm.named_parameters(remove_duplicate=False):
        if parameter is table:
            tensors[name] = joint
    if not language.tied:
        tensors[names[id(head.weight)]] = torch.cat([head.weight, language.head_rows.to(head.weight.dtype)])
        if head.bias is not None:
            raise InputError("a language model whose head has a bias cannot be exported with visual rows")
    size = lm.config.vocab_size
    lm.config.vocab_size = language.vocabulary.size
    try:
        lm.save_pretrained(folder, state_dict=tensors)
    finally:
        lm.config.vocab_size = size
    text.save_pretrained(folder)


def load_language(config: ModelConfig, folder: Path) -> tuple[Language, PreTrainedTokenizerBase]:
    """Read `language/` and `reader/` of a model folder."""
    lm, text = load_base(config.language, folder / "language")
    tokenizer = config.tokenizer
    merger = Merger(tokenizer.dim, tokenizer.heads, tokenizer.merger_depth, tokenizer.mlp_ratio)
    tensors = load_tensors(folder / "reader" / "model.safetensors")
    if config.language.lora_rank:
        language = build_language(lm, merger, config, text)
        _load_adapter(language, folder / "language")
        tensors |= load_tensors(folder / "language" / "rows.safetensors")
    else:
        visual = 2 + tokenizer.codes
        table, head = lm.get_input_embeddings().weight, lm.get_output_embeddings().weight
        rows = {"rows": table[-visual:].detach().clone()}
        if head is not table:
            rows["head_rows"] = head[-visual:].detach().clone()
        lm.resize_token_embeddings(len(table) - visual)
        language = build_language(lm, merger, config, text)
        tensors |= rows
    kept = {name: tensor for name, tensor in language.state_dict().items() if name.startswith("lm.")}
    load_strictly(language, tensors | kept, folder / "language")
    return language, text


def _load_adapter(language: Language, folder: Path) -> None:
    from peft import set_peft_model_state_dict

    try:
        result = set_peft_model_state_dict(language.lm, load_tensors(folder / "adapter_model.safetensors"))
    except RuntimeError as error:  # other widths
        raise InputError(f"{folder} holds an adapter for another language model") from error
    if result.unexpected_keys or any("lora_" in key for key in result.missing_keys):
        raise InputError(f"{folder} holds an adapter for another language model")

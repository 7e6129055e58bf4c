"""Every part on disk is a standard checkpoint; reading is strict, and safetensors only.

config.json        ours (`ModelConfig`), with a format number
vision/            a transformers vision checkpoint, where the encoder is not a reference
visual_tokenizer/  model.safetensors: selector, merger, codebook, reconstructor
language/          a plain transformers causal LM with the joint vocabulary and its text tokenizer;
                   or, over a base (referenced, or in base/), a PEFT adapter, rows.safetensors and
                   the tokenizer
reader/            model.safetensors: the second merger and the projection of pictures into the LM
pixels/            a diffusers folder
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lavit.config import (
    PARTS,
    InputError,
    LanguageConfig,
    ModelConfig,
    TokenizerConfig,
    read_json,
    require,
)
from lavit.files import load_strictly, load_tensors, pretrained, replacing, save_tensors, sha256
from lavit.language.lora import inject_lora, merge_lora
from lavit.language.model import Language, table_and_head
from lavit.language.reader import MergerReader, Reader
from lavit.language.smollm2 import SMOLLM2, load_smollm2, load_smollm2_text, smollm2_file
from lavit.visual_tokenizer.merger import BaseMerger
from lavit.visual_tokenizer.tokenizer import VisualTokenizer, merger_of
from lavit.vocabulary import MARKERS

log = logging.getLogger(__name__)
T = TypeVar("T")
WEIGHTS = Path(__file__).parent / "weights"  # a folder for each model that comes with this package
IN_PEFT = "base_model.model."  # peft's names of an adapter's tensors begin with it
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
    if os.path.isdir(folder):  # that of Path raises for a name that is too long
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
    options: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token}
    try:
        ignored = [f"{part}/*" for part in left_out]
        found: str = snapshot_download(model, ignore_patterns=ignored, **options)
        return Path(found)
    except (OSError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise InputError(f"{said}, and the hub does not give it: {line}") from error


def has_part(config: ModelConfig, folder: Path, part: str) -> bool:
    """Whether a model folder has a part; an encoder that is only referenced is always there."""
    return (folder / part).is_dir() or (part == "vision" and config.vision.source != "folder")


def check_base(config: LanguageConfig, folder: Path) -> None:
    """Raise `InputError` for a base LM that cannot be had or trained as asked; reads no weights."""
    if config.lora_rank:
        require("peft", extra="mini")
    if config.source == "random":
        if config.lora_rank:
            said = "LoRA adapts a trained language model, and this preset's is random"
            raise InputError(f"{said}: leave --lora out")
    elif config.source == SMOLLM2:
        smollm2_file(config.sha256)
    else:
        where = place_of_base(config, folder)
        with _opening(where):
            _text_of(where)
        if config.lora_rank:
            with torch.device("meta"):
                lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(where))
            inject_lora(lm, config)


def load_base(
    config: LanguageConfig, folder: Path | None, *, strict: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The causal LM of `config` (`strict`: all that a folder holds), its text tokenizer or None."""
    if config.source == "random":
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.architecture)), None
    if config.source == SMOLLM2:
        file = smollm2_file(config.sha256)
        lm = load_smollm2(file)
        if folder is not None and (folder / "tokenizer.json").is_file():
            return lm, AutoTokenizer.from_pretrained(folder)
        return lm, load_smollm2_text(file)
    where = place_of_base(config, folder)
    found = hash_of_base(where) if config.lora_rank and config.sha256 else None
    if found and found != config.sha256:
        said = f"the weights of {where} are not those that the adapter {folder} was trained over"
        raise InputError(f"{said}: put those back, or load with base={str(where)!r}")
    named = "" if where == folder or folder is None else f" (language.source, {folder.parent})"
    with _opening(where, named):
        text = _text_of(where)
        strict = strict and config.source == "folder"
        return pretrained(AutoModelForCausalLM, where, strict=strict), text


def place_of_base(config: LanguageConfig, folder: Path | None) -> str | Path:
    """Folder or hub id of a base LM that is neither random nor SmolLM2."""
    if config.source == "base" and folder is not None:
        return folder.parent / "base"
    if config.source != "folder":
        return config.source
    if folder is None or not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no language model: has the language stage been trained?")
    return folder


def _text_of(where: str | Path) -> PreTrainedTokenizerBase:
    """The text tokenizer beside a causal LM."""
    config = AutoConfig.from_pretrained(where)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise InputError(f"{config.model_type} is no causal LM of transformers")
    text = AutoTokenizer.from_pretrained(where)
    if text.eos_token_id is None:
        raise InputError("its tokenizer has no end token, set eos_token in tokenizer_config.json")
    return text


@contextmanager
def _opening(where: str | Path, named: str = "") -> Iterator[None]:
    """Turn what fails while an LM is opened into one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # configurations, weights and tokenizers fail in ways of their own
        if "tiktoken" in str(error):  # what transformers says where it cannot read SentencePiece
            require("sentencepiece", extra="published")
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"no language model at {where}{named}: {why}") from error


def build_tokenizer(config: TokenizerConfig) -> VisualTokenizer:
    """A new visual tokenizer, or the rival of it that the configuration names."""
    if not config.rival:
        return VisualTokenizer(config)
    return baseline(config.rival, VisualTokenizer, config)


def baseline(sizes: Mapping[str, Any], kind: type[T], *given: Any) -> T:
    """What `sizes` name ("_class_name"), one of the rivals in lavit/baselines/, of some kind.

    Nothing else imports those. Raises `InputError` for an unknown name or size.
    """
    rivals = importlib.import_module("lavit.baselines").RIVALS
    known = {name: one for name, one in rivals.items() if issubclass(one, kind)}
    name, rest = sizes.get("_class_name"), dict(sizes)
    if name not in known:
        what = kind.__name__
        raise InputError(f"there is no {what} {name!r}: choose from {', '.join(known)}")
    rest.pop("_class_name")
    try:
        return getattr(known[name], "beside", known[name])(*given, **rest)
    except TypeError as error:
        raise InputError(f"{name}: {error} (given {rest})") from error


def build_language(
    lm: PreTrainedModel,
    merger: BaseMerger,
    config: ModelConfig,
    text: PreTrainedTokenizerBase,
) -> Language:
    """A new `Language` around a base LM: fresh rows, the stage-1 merger copied, LoRA if asked."""
    width = table_and_head(lm)[0].shape[1]
    if config.language.reader:
        kind: Any = Reader  # abstract
        reader = baseline(config.language.reader, kind, merger, width)
    else:
        reader = MergerReader.beside(merger, width)
    language = reader.language(
        lm,
        reader,
        codes=config.visual_tokenizer.codes,
        end=text.eos_token_id,
        trained=config.language.source != "random",
        read_as=config.language.read_as,
    )
    if config.language.lora_rank:
        inject_lora(language.lm, config.language)
    return language


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
        merge_lora(language.lm)
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
        save_tensors(language.reader.state_dict(), new / "model.safetensors")
    with replacing(folder / "language") as new:
        if not config.lora_rank:
            export(language, text, new)
            return replace(config, source="folder", architecture={})
        adapter = require("peft", extra="mini").get_peft_model_state_dict(language.lm)
        adapter = {IN_PEFT + name: tensor for name, tensor in adapter.items()}
        save_tensors(adapter, new / "adapter_model.safetensors")
        said: Any = copy(language.lm.peft_config["default"])
        said.target_modules = sorted(said.target_modules)  # a set: in any order
        said.save_pretrained(new)
        rows = {name: tensors[name] for name in tensors if name in ("rows", "head_rows")}
        save_tensors(rows, new / "rows.safetensors")
        text.save_pretrained(new)
    if config.source == "base":
        with replacing(folder / "base") as new:
            _save_base(language.lm, new)
            text.save_pretrained(new)
    if config.source == SMOLLM2:
        return replace(config, sha256=sha256(smollm2_file()))  # an adapter fits no other weights
    return replace(config, sha256=hash_of_base(place_of_base(config, folder / "language")))


def hash_of_base(where: str | Path) -> str | None:
    """SHA-256 of the weights in a folder; None for an id of the hub, whose commit may move."""
    if not Path(where).is_dir():
        return None
    files = (path for path in Path(where).iterdir() if path.suffix in (".safetensors", ".bin"))
    each = "".join(f"{path.name} {sha256(path)}\n" for path in sorted(files))
    return hashlib.sha256(each.encode()).hexdigest()


def _save_base(lm: PreTrainedModel, folder: Path) -> None:
    """Write a causal LM as it is below its LoRA."""
    tensors = lm.state_dict()
    below = {name.replace(".base_layer.", "."): tensors[name] for name in tensors}
    lm.save_pretrained(folder, state_dict={n: t for n, t in below.items() if ".lora_" not in n})


@torch.no_grad()
def export(language: Language, text: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a plain transformers causal LM with the joint vocabulary and equal logits."""
    lm = language.lm
    table, head = table_and_head(lm)
    joint = {id(table): torch.cat([table, language.rows.to(table.dtype)])}
    if language.head_rows is not None:
        joint[id(head)] = torch.cat([head, language.head_rows.to(head.dtype)])
    bias = getattr(lm.get_output_embeddings(), "bias", None)
    if bias is not None:
        joint[id(bias)] = F.pad(bias, (0, language.vocabulary.visual_size))
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


def export_lm(language: Language, text: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the LM alone, without visual rows, as a plain transformers folder."""
    language.lm.save_pretrained(folder)
    text.save_pretrained(folder)


def load_visual_tokenizer(config: ModelConfig, folder: Path) -> VisualTokenizer:
    """Read `visual_tokenizer/` of a model folder (fp32); raises `InputError` if it does not fit."""
    tokenizer = build_tokenizer(config.visual_tokenizer)
    where = folder / "visual_tokenizer" / "model.safetensors"
    tensors = load_tensors(where)
    if "codebook.sums" not in tensors and {"codebook.vectors", "codebook.mass"} <= tensors.keys():
        mass = tensors["codebook.mass"][:, None]  # shipped models leave the sums out
        tensors["codebook.sums"] = tensors["codebook.vectors"] * mass
    load_strictly(tokenizer, tensors, where)
    return tokenizer


def over_base(config: ModelConfig, source: str) -> ModelConfig:
    """The configuration with another language model (a path or hub id) under its adapter.

    Raises `InputError` for a model whose language part is not an adapter over a base.
    """
    language = config.language
    if not language.lora_rank:
        raise InputError(f"{config.name} is not an adapter over a base: leave the other base out")
    said = "base weights: %s instead of %s, so the figures of this model do not apply"
    log.warning(said, source, language.source)
    return replace(config, language=replace(language, source=source, sha256=None))


def load_language(config: ModelConfig, folder: Path) -> tuple[Language, PreTrainedTokenizerBase]:
    """Read `language/` and `reader/` of a model folder; raises `InputError` if they do not fit."""
    if (folder / "language").is_dir() and not (folder / "reader").is_dir():
        said = f"{folder} has no reader for pictures (reader/ is missing)"
        raise InputError(f"{said}: copy it there, or train the language stage again")
    lm, text = load_base(config.language, folder / "language", strict=True)
    if text is None:
        raise InputError(f"{folder} names no language model that was trained: train that stage")
    tokenizer = config.visual_tokenizer
    merger = build_tokenizer(tokenizer).merger if tokenizer.rival else merger_of(tokenizer)
    read = load_tensors(folder / "reader" / "model.safetensors")
    tensors = {f"reader.{name}": tensor for name, tensor in read.items()}
    if not config.language.lora_rank:
        visual = MARKERS + tokenizer.codes
        table, head = table_and_head(lm)
        tensors["rows"] = table[-visual:].detach().clone()
        if head is not table:
            tensors["head_rows"] = head[-visual:].detach().clone()
        lm.resize_token_embeddings(len(table) - visual)
    language = build_language(lm, merger, config, text)
    if config.language.lora_rank:
        _load_adapter(language, folder / "language", config.language)
        tensors |= load_tensors(folder / "language" / "rows.safetensors")
    tensors |= {f"lm.{name}": tensor for name, tensor in language.lm.state_dict().items()}
    load_strictly(language, tensors, folder / "language")
    return language, text


def _load_adapter(language: Language, folder: Path, config: LanguageConfig) -> None:
    own = read_json(folder / "adapter_config.json")
    rank, targets = own.get("r"), own.get("target_modules")
    if (rank, targets) != (config.lora_rank, sorted(config.lora_targets)):
        ours = f"config.json says rank {config.lora_rank} in {', '.join(config.lora_targets)}"
        said = f"r {rank!r}, target_modules {targets}; {ours}"
        raise InputError(f"{folder}/adapter_config.json: {said}")
    tensors = load_tensors(file := folder / "adapter_model.safetensors")
    if wrong := [name for name, tensor in tensors.items() if not tensor.is_floating_point()]:
        raise InputError(f"{file}: {wrong[0]} is of {tensors[wrong[0]].dtype}, not of floats")
    tensors = {name.removeprefix(IN_PEFT): tensor for name, tensor in tensors.items()}
    try:
        result = require("peft", extra="mini").set_peft_model_state_dict(language.lm, tensors)
    except RuntimeError as error:  # other widths
        raise InputError(f"{folder} holds an adapter for another language model") from error
    if result.unexpected_keys or any("lora_" in key for key in result.missing_keys):
        raise InputError(f"{folder} holds an adapter for another language model")

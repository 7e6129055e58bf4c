"""Memory of stage 2 before a machine is rented: computed from the configuration, not guessed.

    weights, gradients, moments    counted on the meta device; FSDP2 divides what trains by the GPUs
    activations                    bytes that autograd keeps, counted by its hooks on one and on two
                                   blocks of the real architecture and drawn out to its depth; with
                                   recomputing, a block's input each and one block
    head                           one chunk of logits, and the gradients that the loss makes
    gathered, cast                 what a pass needs whole: FSDP2's units, autocast's bf16 copies

The test holds parameter bytes to the byte, and the total to 25 % of a step's peak on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lavit.config import InputError, ModelConfig, TrainConfig
from lavit.language.lora import inject_lora
from lavit.language.model import CHUNK, Language, table_and_head
from lavit.language.reader import MergerReader
from lavit.language.smollm2 import SMOLLM2, smollm2_config, smollm2_file
from lavit.visual_tokenizer.tokenizer import merger_of

GIB = 2**30
PARTS = {
    "lm": "language model",
    "rows": "visual rows",
    "head_rows": "visual head",
    "reader.merger": "reader: merger copy",
    "reader.to_language": "reader: projection",
}
Parallelism = Literal["single", "ddp", "fsdp2"]
TEXT = 32  # tokens of text that go with an image, where only their order of size matters
SHORT = 16  # tokens of a document in counts: meta attention keeps squares, real kernels do not
CONTEXT = 1.0  # GiB of a GPU that its driver, kernels and library take; the one figure assumed here


@dataclass(frozen=True)
class PartCount:
    """Parameters of one part."""

    name: str
    trains: int
    frozen: int


@dataclass(frozen=True)
class Plan:
    """What one GPU (or this machine) must hold during a step, in GiB by kind, and if it does."""

    layout: Parallelism
    gpus: int
    precision: Literal["fp32", "bf16"]
    rows: int  # packed rows in one pass of one GPU
    accumulate: int
    recompute: bool
    merger: bool  # whether the second merger trains
    parts: tuple[PartCount, ...]
    gib: dict[str, float]
    memory: float | None

    @property
    def total(self) -> float:
        """GiB."""
        return sum(self.gib.values())

    @property
    def fits(self) -> bool | None:
        """Whether it fits into the memory that was given."""
        return None if self.memory is None else self.total <= self.memory

    def lines(self) -> list[str]:
        """The plan as a table."""
        lines = [f"{'part':<24}{'train':>16}{'frozen':>16}"]
        lines += [f"{part.name:<24}{part.trains:>16,}{part.frozen:>16,}" for part in self.parts]
        rows = f"{self.rows} rows a pass, accumulate {self.accumulate}"
        kept = "recomputed" if self.recompute else "kept"
        how = f"{self.layout} on {self.gpus}, {self.precision}, {rows}, {kept} activations"
        lines += ["", f"GiB each ({how})"]
        lines += [f"  {name:<30}{value:>10.2f}" for name, value in self.gib.items()]
        if not self.merger:
            lines.append("  (the second merger is frozen: train_merger=False)")
        verdict = {None: "", True: ": fits into {}", False: ": does NOT fit into {}"}[self.fits]
        return [*lines, f"  {'total':<30}{self.total:>10.2f}{verdict.format(self.memory)}"]


def plan_language(
    model: ModelConfig,
    training: TrainConfig,
    *,
    gpus: int = 1,
    layout: Parallelism | None = None,
    memory: float | None = None,
    lora: int | None = None,
    precision: Literal["fp32", "bf16"] = "bf16",
) -> Plan:
    """Plan stage 2. `memory` is one GPU's in GiB; `lora` a rank that replaces the configuration's.

    If the configuration does not fit into the memory given, recomputing is switched on, then rows
    are divided by accumulation down to one a pass, then under LoRA the second merger is frozen.
    `layout` defaults to FSDP2 on several GPUs.
    """
    if gpus < 1 or (memory is not None and memory <= 0):
        raise InputError(f"a plan needs at least one GPU with memory, not {gpus} with {memory} GiB")
    layout = layout or ("fsdp2" if gpus > 1 else "single")
    if lora is not None:
        model = replace(model, language=replace(model.language, lora_rank=lora))
    config = training.language
    here = max(1, config.rows // gpus)
    wanted = min(here, max(1, config.accumulate))
    tries = [(config.train_merger, wanted, config.recompute)]
    if memory is not None:
        divisions = [number for number in range(wanted, here + 1) if here % number == 0]
        tries += [(config.train_merger, number, True) for number in divisions]
        tries += [(False, number, True) for number in divisions if model.language.lora_rank]

    @cache
    def counted(merger: bool) -> _Counter:
        trained = replace(training, language=replace(config, train_merger=merger))
        size, shards = 2 if precision == "bf16" else 4, gpus if layout == "fsdp2" else 0
        return _Counter(model, trained, size, shards)

    for merger, accumulate, recompute in tries:
        rows, counter = -(-here // accumulate), counted(merger)
        how = (layout, gpus, precision, rows, accumulate, recompute, merger)
        plan = Plan(*how, counter.parts, counter.gib(rows, recompute=recompute), memory)
        if memory is None or plan.fits:
            break
    return plan


class _Counter:
    """Counts one model; `size` is of activations in bytes, `shards` FSDP2's GPUs, 0 without it."""

    def __init__(self, model: ModelConfig, training: TrainConfig, size: int, shards: int) -> None:
        self.model, self.training, self.size, self.shards = model, training, size, shards
        self.lm_config = _architecture(model, training)
        self.language = _build(model, self.lm_config, self.lm_config.num_hidden_layers)
        reader = cast("MergerReader", self.language.reader)
        reader.merger.requires_grad_(training.language.train_merger)
        self.parts = _count(self.language)

    def gib(self, rows: int, *, recompute: bool) -> dict[str, float]:
        """GiB by kind at so many packed rows a pass."""
        each, trains = max(1, self.shards), sum(part.trains for part in self.parts)
        frozen = sum(part.frozen for part in self.parts)
        frozen *= self.size if each == 1 else 4  # train/run.py halves what is not sharded
        found = {
            "weights": (4 * trains + frozen) / each,
            "gradients": 4 * trains / each,
            "moments of AdamW": 8 * trains / each,
            "gathered or cast weights": self._working(),
            "activations": self._activations(rows, recompute),
            "head: logits and gradients": self._head(rows),
        }
        if self.size == 2:
            found["context (assumed)"] = CONTEXT * GIB
        return {name: count / GIB for name, count in found.items()}

    def _working(self) -> float:
        """Copies of weights that a pass needs besides the kept ones."""
        language = self.language
        if self.shards:  # root and two units, and as much of their gradients
            names = language._no_split_modules
            units = [_numel(m) for m in language.modules() if type(m).__name__ in names]
            return self.size * (2 * (_numel(language) - sum(units)) + 4 * max(units))
        if self.size == 4:
            return 0.0
        return 2.0 * sum(part.trains for part in self.parts)  # autocast's bf16 copies

    def _head(self, rows: int) -> float:
        """A chunk of logits, and gradients that are made with them."""
        language, config = self.language, self.training.language
        targets = rows * config.tokens
        visual = language.rows if language.head_rows is None else language.head_rows
        text = language.lm.get_output_embeddings().weight
        made = sum(weight.numel() for weight in (text, visual) if weight.requires_grad)
        logits = min(CHUNK, targets) * language.vocabulary.size * (4 if self.size == 4 else 8)
        return 4 * made + logits + 2 * self.size * targets * language.width

    def _activations(self, rows: int, recompute: bool) -> float:
        """Bytes kept between forward and backward: LM and reader."""
        tokens, depth = rows * self.training.language.tokens, self.lm_config.num_hidden_layers
        block, rest = self._lm_bytes
        inputs = self.language.width * self.size
        lm = rest + (depth * inputs + block if recompute else depth * block)
        block, rest = self._reader_bytes
        tokenizer = self.model.visual_tokenizer
        depth, inputs = tokenizer.merger_depth, tokenizer.dim * self.size
        inputs *= self._kept_patches
        reader = rest + (depth * inputs + block if recompute else depth * block)
        mixture = self.training.language.mixture
        read = (mixture.reading + mixture.question) / sum(vars(mixture).values())
        images = tokens / (self._kept_patches + 2 + TEXT) * read
        return tokens * lm + images * reader

    @property
    def _kept_patches(self) -> int:
        return max(1, round(self.training.tokenizer.rate * self.model.visual_tokenizer.patches))

    @cached_property
    def _lm_bytes(self) -> tuple[float, float]:
        """Bytes a token that autograd keeps in a block of the LM, and around the blocks."""
        rows, tokens = 4, 4 * SHORT
        documents = torch.arange(tokens).expand(rows, -1) // SHORT
        positions = (torch.arange(tokens) % SHORT).expand(rows, -1).to("meta")
        found = []
        for layers in (1, 2):
            language = _build(self.model, self.lm_config, layers)
            dtype = torch.bfloat16 if self.size == 2 else torch.float32
            lm: nn.Module = language.lm
            lm.to(dtype)
            entered = torch.empty(rows, tokens, language.width, device="meta", dtype=dtype)
            packed = {"documents": documents, "positions": positions}
            forward = partial(language.hidden, entered.requires_grad_(), **packed)
            found.append(kept_bytes(forward, language) / (rows * tokens))
        return found[1] - found[0], 2 * found[0] - found[1]

    @cached_property
    def _reader_bytes(self) -> tuple[float, float]:
        """Bytes an image that autograd keeps in a block of the merger, and around the blocks."""
        config = self.model.visual_tokenizer  # a real merger: which rows stay is data
        merger = merger_of(replace(config, merger_depth=1))
        keep = (torch.arange(config.patches) < self._kept_patches).expand(2, -1)
        forward = partial(merger, torch.zeros(2, config.patches, config.dim), keep)
        whole = kept_bytes(forward, merger)
        merger.blocks = nn.ModuleList()
        around = kept_bytes(forward, merger)
        return (whole - around) / 2 * self.size / 4, around / 2 * self.size / 4


def kept_bytes(forward: Any, module: nn.Module) -> int:
    """Bytes that autograd keeps of a call for its backward pass, each storage once, no weights."""
    weights = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights)


def _architecture(model: ModelConfig, training: TrainConfig) -> Any:
    """The base LM's configuration, without the visual rows."""
    source = model.language.source
    if source == SMOLLM2:
        return smollm2_config(smollm2_file())
    options = {"vocab_size": training.text_vocabulary, **model.language.architecture}
    if not model.language.architecture:
        try:
            return AutoConfig.from_pretrained(source)
        except OSError as error:
            why = str(error).splitlines()[0]
            raise InputError(f"no language model at {source}: {why}") from error
    if source == "folder":  # a saved language model has the joint vocabulary
        options["vocab_size"] -= 2 + model.visual_tokenizer.codes
    return AutoConfig.for_model(**options)


def _build(model: ModelConfig, config: Any, layers: int) -> Language:
    """The model of stage 2 on the meta device, with so many blocks in its LM."""
    fields = {**config.to_dict(), "num_hidden_layers": layers}
    if fields.get("layer_types"):
        fields["layer_types"] = fields["layer_types"][:layers]
    config = type(config).from_dict(fields)
    tokenizer = model.visual_tokenizer
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
        reader = MergerReader(merger_of(tokenizer), table_and_head(lm)[0].shape[1])
        language = Language(lm, reader, codes=tokenizer.codes, end=0)
        if model.language.lora_rank:
            inject_lora(language.lm, model.language)
    return language


def _count(language: Language) -> tuple[PartCount, ...]:
    counts: dict[str, list[int]] = {}
    for name, parameter in language.named_parameters():
        first, second, *_ = f"{name}.".split(".")
        part = PARTS[f"reader.{second}" if first == "reader" else first]
        part = "LoRA" if ".lora_" in name else part
        counts.setdefault(part, [0, 0])[0 if parameter.requires_grad else 1] += parameter.numel()
    return tuple(PartCount(name, *pair) for name, pair in counts.items())


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

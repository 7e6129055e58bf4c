"""Memory of a training before a machine is rented: computed from the configuration.

    weights, gradients, moments    counted on the meta device; FSDP2 divides what trains by the GPUs
    activations                    bytes that autograd keeps, counted on small copies of the model
                                   and drawn out to its size (activations.py)
    head                           one chunk of logits, and the gradients that the loss makes
    gathered, cast                 what a pass needs whole: FSDP2's units, autocast's bf16 copies
    beside it                      frozen parts that encode in line, averaged weights, DDP's buckets

Tests hold parameter bytes to the byte, and what autograd keeps to 10 % of a real model of a GB.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lavit.config import InputError, ModelConfig, TrainConfig
from lavit.language.model import CHUNK, Language, table_and_head
from lavit.language.reader import MergerReader
from lavit.pixels.condition import HEADS
from lavit.train.activations import (
    KeptBytes,
    Numbers,
    denoiser_of,
    language_bytes,
    pixels_bytes,
    reader_bytes,
    tokenizer_bytes,
)
from lavit.train.muon import matrices
from lavit.train.parts import (
    PartCount,
    architecture_of,
    autoencoder_of,
    count_parts,
    encoder_of,
    language_of,
    numel,
)
from lavit.visual_tokenizer.tokenizer import VisualTokenizer

GIB = 2**30
Parallelism = Literal["single", "ddp", "fsdp2"]
TEXT = 32  # tokens of text that go with an image, where only their order of size matters
CONTEXT = 1.0  # GiB of a GPU that its driver, kernels and library take; the one figure assumed here


@dataclass(frozen=True)
class Plan:
    """What one GPU must hold during a step, in GiB by kind, and if it does."""

    stage: str
    layout: Parallelism
    gpus: int
    precision: Literal["fp32", "bf16"]
    rows: int  # packed rows, or pictures, in one pass of one GPU
    accumulate: int
    recompute: bool
    merger: bool  # whether the second merger trains
    parts: tuple[PartCount, ...]
    gib: dict[str, float]
    memory: float | None
    disk: float  # GiB of one checkpoint

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
        lines = [f"{self.stage:<24}{'train':>16}{'frozen':>16}"]
        lines += [f"{part.name:<24}{part.trains:>16,}{part.frozen:>16,}" for part in self.parts]
        language = self.stage == "language"
        what = f"{self.rows} {'rows' if language else 'pictures'} a pass"
        kept = "recomputed" if self.recompute else "kept"
        layout = "fsdp2 (--fsdp)" if self.layout == "fsdp2" else self.layout
        how = f"{layout} on {self.gpus}, {self.precision}, {what}, accumulate {self.accumulate}"
        lines += ["", f"GiB each ({how}, {kept} activations)"]
        lines += [f"  {name:<30}{value:>10.2f}" for name, value in self.gib.items()]
        if not self.merger:
            lines.append("  (the second merger is frozen: train_merger=False)")
        verdict = {None: "", True: ": fits into {}", False: ": does NOT fit into {}"}[self.fits]
        lines += [f"  {'total':<30}{self.total:>10.2f}{verdict.format(f'{self.memory or 0:.4g}')}"]
        if self.fits is False:
            helps = f"  what helps: GPUs of {int(self.total) + 1} GiB"
            helps += ", or more --gpus, which share it" if language else ""
            frozen = any(part.frozen for part in self.parts)
            lines.append(helps + (", or --lora 16" if language and not frozen else ""))
        return [*lines, f"  {'a checkpoint, on disk':<30}{self.disk:>10.2f}"]


def plan_stage(
    stage: str,
    model: ModelConfig,
    training: TrainConfig,
    *,
    gpus: int = 1,
    layout: Parallelism | None = None,
    memory: float | None = None,
    lora: int | None = None,
    precision: Literal["fp32", "bf16"] | None = None,
) -> Plan:
    """Plan a stage. `memory` is one GPU's in GiB; `lora` a rank that replaces the configuration's.

    If the configuration does not fit into the memory given, recomputing is switched on, then rows
    or pictures are divided by accumulation down to one a pass, then under LoRA the second merger
    is frozen. `layout` defaults to FSDP2 for stage 2 on several GPUs, to DDP for the others;
    `precision` to the configuration's, "auto" being bf16.
    """
    precision = precision or ("fp32" if training.precision == "fp32" else "bf16")
    if gpus < 1 or not (memory is None or memory > 0):
        raise InputError(f"a plan needs at least one GPU with memory, not {gpus} with {memory} GiB")
    several: Parallelism = "fsdp2" if stage == "language" else "ddp"
    layout = layout or (several if gpus > 1 else "single")
    if lora is not None:
        model = replace(model, language=replace(model.language, lora_rank=lora))
    config: Any = getattr(training, stage)
    count, what = (config.rows, "rows") if stage == "language" else (config.batch, "pictures")
    if count % gpus:
        said = f"a batch of {count} {what} cannot be shared by {gpus} GPUs"
        raise InputError(f"{said}: plan for a divisor of it")
    here = count // gpus
    merger = stage != "language" or config.train_merger
    wanted = min(here, max(1, config.accumulate))
    tries = [(merger, wanted, config.recompute)]
    if memory is not None:
        divisions = [number for number in range(wanted, here + 1) if here % number == 0]
        tries += [(merger, number, True) for number in divisions]
        if stage == "language" and model.language.lora_rank:
            tries += [(False, number, True) for number in divisions]
    with torch.random.fork_rng(devices=[]):
        counter = COUNTERS[stage](model, training, precision, layout, gpus)
        for merger, accumulate, recompute in tries:
            rows = -(-here // accumulate)
            if isinstance(counter, _Language):
                counter.train_merger(merger)
            how = (stage, layout, gpus, precision, rows, accumulate, recompute, merger)
            found = counter.gib(rows, recompute=recompute)
            plan = Plan(*how, counter.parts, found, memory, counter.checkpoint / GIB)
            if memory is None or plan.fits:
                break
    return plan


class _Counter(ABC):
    """Counts one stage of a model in a layout."""

    stage: str

    def __init__(
        self,
        model: ModelConfig,
        training: TrainConfig,
        precision: Literal["fp32", "bf16"],
        layout: Parallelism,
        gpus: int,
    ) -> None:
        self.model, self.training, self.layout = model, training, layout
        self.size = 2 if precision == "bf16" else 4  # bytes of a product's numbers
        self.shards = gpus if layout == "fsdp2" else 1
        self.numbers: Numbers = "autocast" if precision == "bf16" else "fp32"

    @property
    def held(self) -> int:
        """Patches that are kept of a picture."""
        patches = self.model.visual_tokenizer.patches
        return max(1, round(self.training.tokenizer.rate * patches))

    def gib(self, rows: int, *, recompute: bool) -> dict[str, float]:
        """GiB by kind at so many packed rows or pictures a pass."""
        found = self.bytes(rows, recompute)
        found["context (assumed)"] = CONTEXT * GIB
        return {name: count / GIB for name, count in found.items() if count}

    def bytes(self, rows: int, recompute: bool) -> dict[str, float]:
        """Bytes by kind."""
        trains = sum(part.trains for part in self.parts)
        buckets = 4.0 * trains if self.layout == "ddp" else 0.0
        return {
            "weights": 4 * trains / self.shards,
            "gradients": 4 * trains / self.shards,
            "moments": (8 * trains - 4 * self.turning) / self.shards,
            "buckets of DDP": buckets,
            "cast weights": 2.0 * trains if self.size == 2 else 0.0,
            "frozen parts": self.frozen,
            "activations": rows * float(self.kept[int(recompute)]),
        }

    @property
    def checkpoint(self) -> float:
        """Bytes of a checkpoint: weights that train, and their moments."""
        return 12.0 * sum(part.trains for part in self.parts) - 4.0 * self.turning

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """What trains, on the meta device."""

    @property
    @abstractmethod
    def parts(self) -> tuple[PartCount, ...]:
        """Its parts, and what lies frozen among them."""

    @property
    @abstractmethod
    def kept(self) -> KeptBytes:
        """Bytes that autograd keeps of a picture, or a row."""

    @property
    @abstractmethod
    def frozen(self) -> float:
        """Bytes of what lies beside it: frozen parts, averaged weights."""

    @property
    def by_adamw(self) -> list[Tensor]:
        """Matrices that Muon does not move, as the stage says."""
        return []

    @property
    def turning(self) -> int:
        """Weights that Muon moves, with one moment in place of two."""
        if getattr(self.training, self.stage).optimizer == "adamw":
            return 0
        found = matrices(self.module, but=self.by_adamw)
        return sum(weight.numel() for weight in found if weight.requires_grad)

    def encoding(self) -> float:
        """Bytes of the encoder where pictures are encoded in line."""
        stream = getattr(self.training, self.stage).stream
        return 4.0 * numel(encoder_of(self.model)) if stream else 0.0

    @property
    def tokenizer(self) -> float:
        """Bytes of the visual tokenizer."""
        with torch.device("meta"):
            return 4.0 * numel(VisualTokenizer(self.model.visual_tokenizer))


class _Tokenizer(_Counter):
    """Stage 1, while its selector trains."""

    stage = "tokenizer"

    @cached_property
    def module(self) -> nn.Module:
        with torch.device("meta"):
            return VisualTokenizer(self.model.visual_tokenizer)

    @property
    def by_adamw(self) -> list[Tensor]:
        return list(cast(VisualTokenizer, self.module).selector.parameters())

    @cached_property
    def parts(self) -> tuple[PartCount, ...]:
        children = self.module.named_children()
        return tuple(PartCount(name, numel(part), 0) for name, part in children)

    @property
    def frozen(self) -> float:
        return self.encoding()

    @cached_property
    def kept(self) -> KeptBytes:
        config = self.model.visual_tokenizer
        dense = self.training.tokenizer.selector_gradient == "dense"
        held = max(self.held, config.patches // 2)  # as many as a selector keeps that knows nothing
        return tokenizer_bytes(config, held, dense=dense, numbers=self.numbers)


class _Pixels(_Counter):
    """Stage 3: denoiser and condition, their averaged weights, a frozen autoencoder."""

    stage = "pixels"

    @cached_property
    def module(self) -> nn.Module:
        config = self.model.pixels
        with torch.device("meta"):
            parts = {"denoiser": denoiser_of(config), "condition": HEADS[config.condition](config)}
            return nn.ModuleDict(parts)

    @cached_property
    def parts(self) -> tuple[PartCount, ...]:
        trained = [PartCount(name, numel(part), 0) for name, part in self.module.named_children()]
        return (*trained, PartCount("autoencoder", 0, numel(self.autoencoder)))

    @property
    def checkpoint(self) -> float:
        return super().checkpoint + 4.0 * numel(self.module)

    @cached_property
    def autoencoder(self) -> nn.Module:
        """What pictures become latents by."""
        return autoencoder_of(self.model.pixels)

    @property
    def frozen(self) -> float:
        """The averaged weights are a copy of what trains; pictures become latents one by one."""
        widest = 4 * getattr(self.autoencoder, "config", {}).get("block_out_channels", (0,))[0]
        working = 4.0 * widest * self.model.pixels.size**2
        own = 4.0 * (numel(self.module) + numel(self.autoencoder))
        return own + working + self.tokenizer + self.encoding()

    @cached_property
    def kept(self) -> KeptBytes:
        return pixels_bytes(self.model.pixels, self.numbers)


class _Language(_Counter):
    """Stage 2."""

    stage = "language"

    @cached_property
    def lm_config(self) -> Any:
        """The base LM's configuration."""
        return architecture_of(self.model, self.training)

    @cached_property
    def module(self) -> Language:
        return language_of(self.model, self.lm_config)

    @property
    def by_adamw(self) -> list[Tensor]:
        return [table_and_head(self.module.lm)[1]]

    def train_merger(self, on: bool) -> None:
        """Whether the second merger trains."""
        cast("MergerReader", self.module.reader).merger.requires_grad_(on)
        self.__dict__.pop("parts", None)  # counted anew

    @cached_property
    def parts(self) -> tuple[PartCount, ...]:
        return count_parts(self.module)

    @property
    def frozen(self) -> float:
        return self.encoding() + (self.tokenizer if self.training.language.stream else 0.0)

    def bytes(self, rows: int, recompute: bool) -> dict[str, float]:
        found, trains = super().bytes(rows, recompute), sum(part.trains for part in self.parts)
        frozen = sum(part.frozen for part in self.parts)
        frozen *= self.size if self.shards == 1 else 4  # train/run.py halves what is not sharded
        found["weights"] = (4 * trains + frozen) / self.shards
        found["cast weights"] = 0.0
        found["gathered or cast weights"] = self._working(trains)
        return found | {"head: logits and gradients": self._head(rows)}

    def _working(self, trains: int) -> float:
        """Copies of weights that a pass needs besides the kept ones."""
        language = self.module
        if self.shards > 1:  # root and two units, and as much of their gradients
            names = language._no_split_modules
            units = [numel(m) for m in language.modules() if type(m).__name__ in names]
            return self.size * (2 * (numel(language) - sum(units)) + 4 * max(units))
        table = table_and_head(language.lm)[0]
        looked_up = table.numel() if table.requires_grad and not language.tied else 0
        return 2.0 * (trains - looked_up) if self.size == 2 else 0.0

    def _head(self, rows: int) -> float:
        """A chunk of logits, and gradients that are made with them."""
        language, config = self.module, self.training.language
        targets = rows * config.tokens
        visual = language.rows if language.head_rows is None else language.head_rows
        text = language.lm.get_output_embeddings().weight
        made = sum(weight.numel() for weight in (text, visual) if weight.requires_grad)
        logits = min(CHUNK, targets) * language.vocabulary.size * (4 if self.size == 4 else 8)
        return 4 * made + logits + 2 * self.size * targets * language.width

    @cached_property
    def kept(self) -> KeptBytes:
        """Of a row: of its tokens, and of the pictures read in it."""
        base, config = self.model.language, self.training.language
        halved = self.size == 2 and (self.shards > 1 or base.lora_rank > 0)
        numbers: Numbers = "bf16" if halved else self.numbers
        document = self.held + 2 + TEXT
        tokens = config.tokens * language_bytes(self.lm_config, base, document, numbers)
        numbers = "bf16" if halved and self.shards > 1 else self.numbers
        reader = reader_bytes(self.model.visual_tokenizer, self.held, numbers)
        read = (config.mixture.reading + config.mixture.question) / sum(
            vars(config.mixture).values()
        )
        return tokens + config.tokens / document * read * reader


COUNTERS: dict[str, type[_Counter]] = {
    kind.stage: kind for kind in (_Tokenizer, _Language, _Pixels)
}

"""Bytes that autograd keeps of a step, counted on small copies of a model and drawn out to its own.

What is kept grows linearly with the number of tokens or pictures, with the depth of a stack, and,
while patches and tokens stay, with the width of its heads and their number. So a few passes of
small copies, through the very code that trains, give the bytes of any size. Two kinds are counted
at once:

    whole         what is kept of the forward pass
    recomputed    what is kept around the units that are computed again, what enters each of them,
                  and the largest unit: which one it is is another question at another size

Casts of weights are the same for one picture and for two, so they drop out; the plan adds them.
Autocast casts here as it does on CUDA, norms and losses to fp32, whatever the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AutoModelForCausalLM

from lavit.config import LanguageConfig, PixelsConfig, TokenizerConfig
from lavit.language.lora import inject_lora
from lavit.language.model import Language
from lavit.language.reader import MergerReader
from lavit.pixels.diffusion import UNet, class_of, options
from lavit.visual_tokenizer.tokenizer import VisualTokenizer, cosine_distance, merger_of

# fp32 weights; fp32 weights under autocast; bf16 weights
Numbers = Literal["fp32", "autocast", "bf16"]
KeptBytes = np.ndarray  # bytes: whole, recomputed
SMALL = (8, 16)  # channels of a head in the small copies
CODES = 8  # of a small copy's codebook
# of denoisers, that are computed again
UNITS = ("GridBlock", "ResnetBlock2D", "BasicTransformerBlock")
TO_FP32 = {
    *(F.layer_norm, F.group_norm, F.softmax, torch.softmax, F.log_softmax, torch.log_softmax),
    *(F.cosine_similarity, torch.cosine_similarity, F.mse_loss, F.rms_norm),
}


class _AsOnCuda(TorchFunctionMode):
    """Norms, softmax and losses in fp32, which a CPU's autocast leaves in bf16."""

    def __torch_function__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op in TO_FP32:
            args, kwargs = tree_map(_as_fp32, (args, kwargs or {}))
        return op(*args, **(kwargs or {}))


def _as_fp32(value: Any) -> Any:
    halved = isinstance(value, Tensor) and value.dtype == torch.bfloat16
    return value.float() if halved else value


@contextmanager
def numbers_of(numbers: Numbers) -> Iterator[None]:
    """Compute in these number types, autocast as on CUDA."""
    if numbers == "fp32":
        yield
        return
    with torch.autocast("cpu", torch.bfloat16), _AsOnCuda():
        yield


def kept(forward: Callable[[], object], units: list[nn.Module]) -> KeptBytes:
    """What autograd keeps of a call; `units` are the modules that may be computed again."""
    return _with_largest(_by_kind(forward, [units]))


def _with_largest(found: KeptBytes) -> KeptBytes:
    """Both kinds of bytes, of what `_by_kind` found: the largest unit is known at full size."""
    return np.array([found[0], found[1] + max(found[2:], default=0)])


def _by_kind(forward: Callable[[], object], kinds: Sequence[Sequence[nn.Module]]) -> KeptBytes:
    """Whole; around all units that may be computed again; the largest unit of each kind."""
    units = [unit for kind in kinds for unit in kind]
    outside: dict[int, Tensor] = {}
    inside: dict[nn.Module, list[dict[int, Tensor]]] = {unit: [] for unit in units}
    entered: dict[int, Tensor] = {}
    stack = [outside]

    def keep(tensor: Tensor) -> Tensor:
        stack[-1][tensor.untyped_storage()._cdata] = tensor
        return tensor

    def within(unit: nn.Module, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, Tensor):
                    entered[value.untyped_storage()._cdata] = value
            inside[unit].append({})
            stack.append(inside[unit][-1])
            try:
                return run(*args, **kwargs)
            finally:
                stack.pop()

        return call

    named = [
        (unit, name) for unit in units for name in ("forward", "padded") if hasattr(unit, name)
    ]
    for unit, name in named:  # mergers and reconstructors have both
        setattr(unit, name, within(unit, getattr(unit, name)))
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            forward()
    finally:
        for unit, name in named:
            delattr(unit, name)
    around = {**entered, **outside}
    parts = [part for unit in units for part in inside[unit]]
    whole = _bytes({**outside, **{key: t for part in parts for key, t in part.items()}})
    largest = (
        max((_bytes(part, but=around) for unit in kind for part in inside[unit]), default=0)
        for kind in kinds
    )
    return np.array([whole, _bytes(around), *largest], dtype=float)


def _bytes(tensors: dict[int, Tensor], but: dict[int, Tensor] | None = None) -> int:
    left = (t for key, t in tensors.items() if not but or key not in but)
    return sum(t.untyped_storage().nbytes() for t in left)


def _each(count: Callable[[int], KeptBytes]) -> KeptBytes:
    """Bytes of one more item."""
    return count(2) - count(1)


def _drawn_out(measure: Callable[[int], KeptBytes], width: float) -> KeptBytes:
    """At `width`, a straight line through what is measured at the small ones."""
    low, high = (measure(small) for small in SMALL)
    return low + (high - low) * (width - SMALL[0]) / (SMALL[1] - SMALL[0])


def _of_heads(measure: Callable[[int, int], KeptBytes], heads: int, width: float) -> KeptBytes:
    """With so many heads of `width`, by what one and two have: each more adds as much."""
    one, two = (_drawn_out(partial(measure, few), width) for few in (1, 2))
    return one + (heads - 1) * (two - one)


def language_bytes(config: Any, lora: LanguageConfig, document: int, numbers: Numbers) -> KeptBytes:
    """Bytes a token of a LM on packed documents; `config` is transformers' of the LM."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def at(channels: int, layers: int) -> KeptBytes:
        fields = config.to_dict() | {"num_hidden_layers": layers, "vocab_size": 64}
        if fields.get("layer_types"):
            fields["layer_types"] = fields["layer_types"][:layers]
        small = type(config).from_dict({**fields, "pad_token_id": None})
        for name in ("hidden_size", "intermediate_size", "head_dim"):
            if value := getattr(config, name, None):
                setattr(small, name, round(value * channels / head))
        lm = AutoModelForCausalLM.from_config(small)
        reader = MergerReader(merger_of(_small_tokenizer()), small.hidden_size)
        language = Language(lm, reader, codes=CODES, end=0).train()
        if lora.lora_rank:
            inject_lora(language.lm, lora)
        if numbers == "bf16":
            language.to(torch.bfloat16)
        blocks = max((part for part in lm.modules() if isinstance(part, nn.ModuleList)), key=len)

        def count(documents: int) -> KeptBytes:
            shape = (1, documents * document)
            ids = torch.zeros(shape, dtype=torch.long)
            place = torch.arange(shape[1])[None]
            packed: dict[str, Any] = {"documents": place // document, "positions": place % document}

            def forward() -> Tensor:
                with numbers_of(numbers):
                    return language.hidden(language.embed(ids), **packed)

            return _by_kind(forward, [list(blocks)])

        return _each(count) / document

    def whole(channels: int) -> KeptBytes:
        one, two = at(channels, 1), at(channels, 2)
        return one + (config.num_hidden_layers - 1) * (two - one)

    return _with_largest(_drawn_out(whole, head))


def _small_tokenizer() -> TokenizerConfig:
    sizes: dict[str, Any] = {
        "merger_depth": 1,
        "reconstructor_depth": 1,
        "codes": CODES,
        "code_dim": 4,
    }
    return TokenizerConfig(dim=8, patches=4, heads=1, **sizes)


def reader_bytes(config: TokenizerConfig, held: int, numbers: Numbers) -> KeptBytes:
    """Bytes a picture of the merger and projection that read it, `held` patches kept."""

    def at(heads: int, channels: int, depth: int) -> KeptBytes:
        dim = heads * channels
        merger = merger_of(replace(config, dim=dim, heads=heads, merger_depth=depth))
        reader = MergerReader(merger, 8)
        if numbers == "bf16":
            reader.to(torch.bfloat16)
        dtype = torch.bfloat16 if numbers == "bf16" else torch.float32

        def count(pictures: int) -> KeptBytes:
            patches = torch.randn(pictures, config.patches, dim, dtype=dtype)
            keep = (torch.arange(config.patches) < held).expand(pictures, -1)

            def forward() -> Tensor:
                with numbers_of(numbers):
                    return reader(patches, keep)

            return _by_kind(forward, [list(merger.blocks)])

        return _each(count)

    def whole(heads: int, channels: int) -> KeptBytes:
        one, two = at(heads, channels, 1), at(heads, channels, 2)
        return one + (config.merger_depth - 1) * (two - one)

    return _with_largest(_of_heads(whole, config.heads, config.dim / config.heads))


def tokenizer_bytes(
    config: TokenizerConfig, held: int, *, dense: bool, numbers: Numbers
) -> KeptBytes:
    """Bytes a picture of stage 1 while its selector trains, `held` patches kept."""

    def at(heads: int, channels: int, merger: int, reconstructor: int) -> KeptBytes:
        sizes: dict[str, Any] = {
            "heads": heads,
            "dim": heads * channels,
            "merger_depth": merger,
            "reconstructor_depth": reconstructor,
            "codes": CODES,
        }
        tokenizer = VisualTokenizer(replace(config, **sizes)).train()

        def count(pictures: int) -> KeptBytes:
            patches = torch.randn(pictures, config.patches, heads * channels)
            wanted = torch.arange(config.patches)[None, :, None] < held
            noise = torch.where(wanted ^ torch.tensor([False, True]), 99.0, -99.0)
            noise = noise.expand(pictures, -1, -1)

            def forward() -> Tensor:
                with numbers_of(numbers):
                    out = tokenizer(patches, noise, quantise=False, dense=dense)
                    return cosine_distance(out.features, tokenizer.standard(patches)).mean()

            blocks = (tokenizer.merger.blocks, tokenizer.reconstructor.blocks)
            return _by_kind(forward, [list(kind) for kind in blocks])

        return _each(count)

    def whole(heads: int, channels: int) -> KeptBytes:
        one = at(heads, channels, 1, 1)
        merger, rebuilt = at(heads, channels, 2, 1) - one, at(heads, channels, 1, 2) - one
        deeper = (config.merger_depth - 1) * merger
        return one + deeper + (config.reconstructor_depth - 1) * rebuilt

    return _with_largest(_of_heads(whole, config.heads, config.dim / config.heads))


def denoiser_of(config: PixelsConfig) -> nn.Module:
    """The denoiser with random weights; Stable Diffusion 1.5's where a folder has it."""
    unet = config.unet or {
        "_class_name": "UNet2DConditionModel",
        "cross_attention_dim": config.condition_dim,
    }
    made: nn.Module = class_of(unet, "unet", UNet).from_config(options(unet))
    return made


def pixels_bytes(config: PixelsConfig, numbers: Numbers) -> KeptBytes:
    """Bytes a picture of stage 3's denoiser, whole, in tensors without values."""
    latents = config.size // (8 if config.vae else config.patch)
    channels = config.unet.get("in_channels", 4)
    if config.condition == "grid":
        channels -= config.condition_dim
    with FakeTensorMode(allow_non_fake_inputs=True):
        unet = denoiser_of(config).train()
        units = [part for part in unet.modules() if type(part).__name__ in UNITS]

        def count(pictures: int) -> KeptBytes:
            noisy = torch.empty(pictures, channels, latents, latents)
            times = torch.zeros(pictures, dtype=torch.long)
            how: dict[str, Any] = {}
            if config.condition == "grid":
                extra = torch.empty(pictures, config.condition_dim, latents, latents)
                noisy = torch.cat([noisy, extra.requires_grad_()], 1)
            else:
                context = torch.empty(pictures, config.patches, config.condition_dim)
                valid = torch.ones(pictures, config.patches, dtype=torch.bool)
                how = {"encoder_hidden_states": context.requires_grad_()}
                how["encoder_attention_mask"] = valid

            def forward() -> Tensor:
                with numbers_of(numbers):
                    found: Tensor = unet(noisy, times, **how).sample
                    return found.float().square().mean()

            return _by_kind(forward, [[unit] for unit in units])

        return _with_largest(_each(count))

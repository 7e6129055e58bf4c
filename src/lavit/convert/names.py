"""The published names and ours: one table per part, read in both directions (glossary: style.md).

A `Rename` says which published tensors become which of ours. Nearly all are the same tensor under
another name; two kinds are not: tables with a leading axis of one ("squeeze"), and the encoder's
q_bias and v_bias, which transformers keeps in one vector with zeros for the key between them
("qkv_bias"). `theirs_to_ours` and `ours_to_theirs` are inverses to the bit. No other room knows a
foreign name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lavit.config import InputError


@dataclass(frozen=True)
class Rename:
    """Published tensor names that make one of ours."""

    theirs: tuple[str, ...]
    ours: str
    kind: Literal["same", "squeeze", "qkv_bias"] = "same"


Renames = tuple[Rename, ...]


def pairs(modules: Mapping[str, str]) -> Renames:
    """Weight and bias of modules that only changed their name."""
    return tuple(
        Rename((f"{theirs}.{kind}",), f"{ours}.{kind}")
        for theirs, ours in modules.items()
        for kind in ("weight", "bias")
    )


def under(renames: Iterable[Rename], theirs: str, ours: str) -> Renames:
    """Rules with prefixes on both sides."""
    found = []
    for rename in renames:
        moved = tuple(theirs + name for name in rename.theirs)
        found.append(replace(rename, theirs=moved, ours=ours + rename.ours))
    return tuple(found)


def stack(block: Renames, depth: int, ours: str = "blocks") -> Renames:
    """The rules of a block, for each of `depth` blocks."""
    return tuple(r for i in range(depth) for r in under(block, f"blocks.{i}.", f"{ours}.{i}."))


def _cross_block(self_attention: str, cross_attention: str) -> Renames:
    """A block of merger or reconstructor, which differ in the names of their attentions only."""
    norms = {"norm0": "norm_self", "norm1": "norm_cross", "norm2": "norm_mlp"}
    parts = {"query": "query", "key": "key", "value": "value", "proj": "out"}
    return (
        *pairs(norms | {"mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}),
        *under(pairs({"qkv": "qkv", "proj": "out"}), f"{self_attention}.", "self_attention."),
        *under(pairs(parts), f"{cross_attention}.", "cross_attention."),
    )


def vision(depth: int) -> Renames:
    """EVA ViT → transformers' `blip_2_vision_model`, which has no place for its head."""
    kept = {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    block = (
        Rename(("attn.q_bias", "attn.v_bias"), "self_attn.qkv.bias", "qkv_bias"),
        Rename(("attn.qkv.weight",), "self_attn.qkv.weight"),
        *pairs({"attn.proj": "self_attn.projection", **kept}),
        *pairs({"norm1": "layer_norm1", "norm2": "layer_norm2"}),
    )
    return (
        Rename(("cls_token",), "embeddings.class_embedding"),
        Rename(("pos_embed",), "embeddings.position_embedding"),
        *pairs({"patch_embed.proj": "embeddings.patch_embedding"}),
        *stack(block, depth, ours="encoder.layers"),
        *pairs({"norm": "post_layernorm"}),
    )


VISION_ASIDE = ("head.weight", "head.bias")


def selector() -> Renames:
    """Token predictor → selector."""
    linears = {f"out_conv.{i}": f"head.{i}" for i in (0, 2, 4)}
    return pairs({"in_conv.0": "norm", "in_conv.1": "local", **linears})


def merger(depth: int) -> Renames:
    """Causal encoder → merger."""
    block = _cross_block("token_causal_attn", "token_cross_attn")
    return (*pairs({"ln_vision": "norm_patches", "norm": "norm"}), *stack(block, depth))


def codebook() -> Renames:
    """Code vectors (published part `vq`) → codebook."""
    return (Rename(("embedding.weight",), "vectors"),)


def to_code() -> Renames:
    """Encode task layer → the codebook's projection."""
    return pairs({"0": "0", "2": "2"})


def reconstructor(depth: int) -> Renames:
    """Tokenizer decoder without its condition heads → reconstructor."""
    return (
        Rename(("pos_embed",), "positions", "squeeze"),
        Rename(("query_embed",), "queries", "squeeze"),
        *pairs({"in_proj": "from_code", "norm": "norm"}),
        *pairs({f"decode_task_layer.{i}": f"to_features.{i}" for i in (0, 2)}),
        *stack(_cross_block("self_attn", "cross_attn"), depth),
    )


def condition(kind: str) -> Renames:
    """Condition heads of a decoder: "cross" (512 px) or "pooled" (1024 px)."""
    if kind == "cross":
        return pairs({"unet_proj": "to_context"})
    pool = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "c_proj": "out"}
    return (
        *pairs({"unet_proj_1": "to_narrow", "unet_proj_2": "to_wide"}),
        *under(pairs(pool), "unet_attnpool.", "pool."),
        Rename(("unet_attnpool.positional_embedding",), "pool.positions"),
    )


def depth_of(names: Iterable[str], prefix: str = "") -> int:
    """Number of blocks among published names."""
    found = (re.match(re.escape(prefix) + r"blocks\.(\d+)\.", name) for name in names)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def check_names(
    found: Iterable[str],
    expected: Iterable[str],
    *,
    where: str,
    aside: Iterable[str] = (),
) -> None:
    """Raise `InputError` unless `found` are the expected names, plus some of `aside`."""
    found, expected = set(found), set(expected)
    missing, unknown = sorted(expected - found), sorted(found - expected - set(aside))
    if missing or unknown:
        raise InputError(f"{where}: missing {missing[:3]}, not expected {unknown[:3]}")


def published(renames: Renames) -> set[str]:
    """All published names of rules."""
    return {name for rename in renames for name in rename.theirs}


def theirs_to_ours(rename: Rename, tensors: Mapping[str, Tensor], *, where: str = "") -> Tensor:
    """Our tensor from the published ones that a rule names; inverse of `ours_to_theirs`."""
    parts = [tensors[name] for name in rename.theirs]
    if rename.kind == "qkv_bias":
        return torch.cat([parts[0], torch.zeros_like(parts[0]), parts[1]])
    if rename.kind == "squeeze":
        table = parts[0]
        if table.dim() < 2 or table.numel() != table.shape[-2] * table.shape[-1]:
            given = f"{rename.theirs[0]} is {list(table.shape)}"
            raise InputError(f"{where}: {given}, expected [1, rows, channels]")
        return table.reshape(table.shape[-2:])
    return parts[0]


def ours_to_theirs(rename: Rename, tensor: Tensor) -> dict[str, Tensor]:
    """The published tensors behind one of ours; a key bias that is not zero raises `InputError`.

    A squeezed table comes back with one leading axis.
    """
    if rename.kind == "qkv_bias":
        query, key, value = tensor.chunk(3)
        if bool(key.any()):
            raise InputError(f"{rename.ours} has a key bias, which the published form has not")
        return dict(zip(rename.theirs, (query, value), strict=True))
    return {rename.theirs[0]: tensor[None] if rename.kind == "squeeze" else tensor}


def convert_all(
    tensors: Mapping[str, Tensor],
    renames: Renames,
    *,
    where: str,
    aside: Iterable[str] = (),
) -> dict[str, Tensor]:
    """All our tensors of a part at once, names checked."""
    check_names(tensors, published(renames), where=where, aside=aside)
    return {rename.ours: theirs_to_ours(rename, tensors, where=where) for rename in renames}


def started_codebook(vectors: Tensor) -> dict[str, Tensor]:
    """The averages that our codebook keeps beside its vectors: as if each code had one vector."""
    codes = len(vectors)
    return {
        "mass": torch.ones(codes, device=vectors.device),
        "sums": vectors.float().clone(),
        "idle": torch.zeros(codes, dtype=torch.long, device=vectors.device),
    }

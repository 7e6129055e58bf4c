"""The published forms, written a second time from the method's page, as an oracle at any size.

Nothing here is shared with the package: plain functions over published tensor names, one picture's
full grid at a time, masks and the smoothing of 1e-6 as the published modules have them. `fixture`
writes a parity fixture of given sizes.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

SMOOTHING = 1e-6
Weights = dict[str, Tensor]


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(x: Tensor, weights: Weights, name: str, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def mlp(x: Tensor, weights: Weights, name: str) -> Tensor:
    return linear(gelu(linear(x, weights, f"{name}.fc1")), weights, f"{name}.fc2")


def attend(
    query: Tensor, key: Tensor, value: Tensor, heads: int, allowed: Tensor | None, smoothing: float
) -> Tensor:
    """Rows [n dim]; `allowed` [n keys] of zeros and ones, max over all keys, smoothed softmax."""
    out = []
    for q, k, v in zip(*(part.chunk(heads, -1) for part in (query, key, value)), strict=True):
        logits = q @ k.T / math.sqrt(q.shape[-1])
        if allowed is None:
            out.append(logits.softmax(-1) @ v)
            continue
        terms = (logits - logits.amax(-1, keepdim=True)).exp() * allowed
        share = (terms + smoothing / len(k)) / (terms.sum(-1, keepdim=True) + smoothing)
        out.append(share @ v)
    return torch.cat(out, -1)


def selector(patches: Tensor, weights: Weights) -> Tensor:
    """[n dim] → log-probabilities [n 2]."""
    x = gelu(linear(norm(patches, weights, "in_conv.0"), weights, "in_conv.1"))
    half = x.shape[-1] // 2
    x = torch.cat([x[:, :half], x[:, half:].mean(0, keepdim=True).expand(len(x), -1)], -1)
    x = gelu(linear(x, weights, "out_conv.0"))
    x = gelu(linear(x, weights, "out_conv.2"))
    return linear(x, weights, "out_conv.4").log_softmax(-1)


def merger(
    patches: Tensor,
    keep: Tensor,
    weights: Weights,
    *,
    heads: int,
    depth: int,
    smoothing: float = SMOOTHING,
) -> Tensor:
    """All rows [n dim] under masks; those of dropped patches are meant to be thrown away."""
    n = len(patches)
    kept = keep.to(patches.dtype)
    causal = torch.ones(n, n).tril() * kept[None, :]
    causal.fill_diagonal_(1.0)
    context = norm(patches, weights, "ln_vision")
    x = patches
    for i in range(depth):
        block = f"blocks.{i}"
        own = linear(
            norm(x, weights, f"{block}.norm0"), weights, f"{block}.token_causal_attn.qkv"
        ).chunk(3, -1)
        mixed = attend(*own, heads, causal, smoothing)
        x = x + linear(mixed, weights, f"{block}.token_causal_attn.proj")
        name = f"{block}.token_cross_attn"
        query = linear(norm(x, weights, f"{block}.norm1"), weights, f"{name}.query")
        key, value = (linear(context, weights, f"{name}.{part}") for part in ("key", "value"))
        mixed = attend(query, key, value, heads, (1 - kept).expand(n, n), smoothing)
        x = x + linear(mixed, weights, f"{name}.proj")
        x = x + mlp(norm(x, weights, f"{block}.norm2"), weights, f"{block}.mlp")
    return norm(x, weights, "norm")


def vit(pixels: Tensor, weights: Weights, *, heads: int, depth: int) -> Tensor:
    """One picture [3 h w] → class token and patches [1+n dim], before the final norm."""
    kernel = weights["patch_embed.proj.weight"]
    size = kernel.shape[-1]
    squares = (
        pixels.unfold(1, size, size)
        .unfold(2, size, size)
        .permute(1, 2, 0, 3, 4)
        .flatten(2)
        .flatten(0, 1)
    )
    x = torch.cat(
        [weights["cls_token"][0], squares @ kernel.flatten(1).T + weights["patch_embed.proj.bias"]]
    )
    x = x + weights["pos_embed"][0]
    for i in range(depth):
        block = f"blocks.{i}"
        y = norm(x, weights, f"{block}.norm1", 1e-6)
        query, key, value = (y @ part.T for part in weights[f"{block}.attn.qkv.weight"].chunk(3))
        query, value = (
            query + weights[f"{block}.attn.q_bias"],
            value + weights[f"{block}.attn.v_bias"],
        )
        x = x + linear(attend(query, key, value, heads, None, 0.0), weights, f"{block}.attn.proj")
        x = x + mlp(norm(x, weights, f"{block}.norm2", 1e-6), weights, f"{block}.mlp")
    return x


def decoder(codes: Tensor, weights: Weights, *, heads: int, depth: int) -> Tensor:
    """Codes of one picture [kept code_dim] → normed queries [n dim]."""
    context = linear(codes, weights, "in_proj") + weights["pos_embed"][0, : len(codes)]
    x = weights["query_embed"][0]
    for i in range(depth):
        block = f"blocks.{i}"
        own = linear(norm(x, weights, f"{block}.norm0"), weights, f"{block}.self_attn.qkv").chunk(
            3, -1
        )
        x = x + linear(attend(*own, heads, None, 0.0), weights, f"{block}.self_attn.proj")
        name = f"{block}.cross_attn"
        query = linear(norm(x, weights, f"{block}.norm1"), weights, f"{name}.query")
        key, value = (linear(context, weights, f"{name}.{part}") for part in ("key", "value"))
        x = x + linear(attend(query, key, value, heads, None, 0.0), weights, f"{name}.proj")
        x = x + mlp(norm(x, weights, f"{block}.norm2"), weights, f"{block}.mlp")
    return norm(x, weights, "norm")


def pool(features: Tensor, weights: Weights, *, heads: int) -> Tensor:
    """Attention pool of one picture [n dim] → [1280]."""
    rows = (
        torch.cat([features.mean(0, keepdim=True), features])
        + weights["unet_attnpool.positional_embedding"]
    )
    query, key, value = (linear(rows, weights, f"unet_attnpool.{part}_proj") for part in "qkv")
    pooled = attend(query[:1], key, value, heads, None, 0.0)
    return linear(pooled, weights, "unet_attnpool.c_proj")[0]


def task_layer(x: Tensor, weights: Weights, name: str) -> Tensor:
    return linear(linear(x, weights, f"{name}0").tanh(), weights, f"{name}2")


def random_weights(shapes: dict[str, list[int]], generator: torch.Generator) -> Weights:
    """Random published weights: norms near one, everything else small."""
    weights = {
        name: 0.15 * torch.randn(shape, generator=generator) for name, shape in shapes.items()
    }
    for name, value in weights.items():
        if len(value.shape) == 1 and name.endswith("weight"):
            weights[name] = 1 + value
    return weights


def outputs(
    parts: dict[str, Weights], pixels: Tensor, keep: Tensor, *, heads: int, depth: int
) -> dict[str, Tensor]:
    """What the published modules compute, by their fixture names."""
    size = {"heads": heads, "depth": depth}
    tokens = torch.stack([vit(picture, parts["vit"], **size) for picture in pixels])
    patches = tokens[:, 1:]
    kept = [merger(p, k, parts["merger"], **size)[k] for p, k in zip(patches, keep, strict=True)]
    inputs = [task_layer(rows, parts["encode_task_layer"], "") for rows in kept]
    table = parts["vq"]["embedding.weight"]
    ids = [torch.cdist(F.normalize(x, dim=-1), table).argmin(-1) for x in inputs]
    low, high = parts["decoder"], parts["highres_decoder"]
    normed = torch.stack([decoder(table[i], low, **size) for i in ids])
    features = task_layer(normed, low, "decode_task_layer.")
    fine = torch.stack(
        [task_layer(decoder(table[i], high, **size), high, "decode_task_layer.") for i in ids]
    )
    return {
        "vit_tokens": tokens,
        "selector_log_probs": torch.stack([selector(p, parts["selector"]) for p in patches]),
        "merged_kept": torch.cat(kept),
        "code_input": torch.cat(inputs),
        "code_ids": torch.cat(ids),
        "codes": table[torch.cat(ids)],
        "decoder_norm_reconstruction": normed,
        "context_512": linear(features, low, "unet_proj"),
        "context_1024": torch.cat([linear(fine, high, f"unet_proj_{i}") for i in (1, 2)], -1),
        "pooled_1024": torch.stack([pool(f, high, heads=heads) for f in fine]),
    }


def fixture(
    path: Path, shapes: dict[str, dict[str, list[int]]], keep: Tensor, sizes: dict[str, object]
) -> None:
    """Write a fixture: random weights of the given shapes, random pixels, and what they give."""
    generator = torch.Generator().manual_seed(int(sizes["seed"]))
    parts = {part: random_weights(tensors, generator) for part, tensors in shapes.items()}
    parts["vq"]["embedding.weight"] = F.normalize(
        torch.randn(shapes["vq"]["embedding.weight"], generator=generator), dim=-1
    )
    side = sizes["image_size"]
    pixels = torch.randn(len(keep), 3, side, side, generator=generator)
    results = outputs(parts, pixels, keep, heads=sizes["heads"], depth=sizes["depth"])
    tensors = {
        f"weights/{part}/{name}": value
        for part, values in parts.items()
        for name, value in values.items()
    }
    tensors |= {"in/pixels": pixels, "in/keep": keep.float()}
    tensors |= {f"out/{name}": value.contiguous() for name, value in results.items()}
    save_file(tensors, path, metadata={name: str(value) for name, value in sizes.items()})

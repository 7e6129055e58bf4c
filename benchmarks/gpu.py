"""The four rates that decide what a GPU is rented for, in one command; in small on a CPU.

    python benchmarks/gpu.py [--size large|small] [--rounds 5] [--tokens 64] [--json FILE]

Random weights, made on the spot: rates do not depend on them. `large`, the default on CUDA, has a
Llama of 1.1 B weights, EVA ViT-g/14 and Stable Diffusion 1.5's UNet at 512 px, in bf16; `small`
fits a test, in fp32. Runs of a comparison alternate, round after round; medians count.

decode_ratio          tokens a second of our engine (on CUDA compiled, with a static cache) over
                      transformers' `generate` as it comes (growing cache), same LM, greedy
decode_bandwidth      bytes of weights that a step reads, over its time, over the rate at which a
                      large tensor is copied (read and written) in the same run
train_mfu             FLOPs of a packed step by the configuration (6 a weight of a product and
                      token, 12 · width a pair of tokens that attend, per block), over its time,
                      over the best large product in the same run; embedding tables, recomputation
                      and padding do not count
encode_per_second     pictures a second, from PIL pictures to features
encode_ratio          the bare encoder's time on the same blocks of tensors over that of `encode`
tokens_per_second     pictures a second, from PIL pictures to codes
paint_per_second      pictures a second by the preset's sampler, steps and guidance

Measure on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from lavit.config import PixelsConfig, TokenizerConfig, VisionConfig
from lavit.generate.engine import Engine
from lavit.generate.request import Request
from lavit.generate.sampling import Sampling
from lavit.images import pixels as to_pixels
from lavit.language.model import Language
from lavit.language.reader import MergerReader
from lavit.pixels.decoder import Pixels
from lavit.presets import lavit_7b, nano
from lavit.sequence import IGNORE, Batch
from lavit.train.parts import STABLE_DIFFUSION_VAE
from lavit.vision.encoder import BLOCK, load_vision
from lavit.visual_tokenizer.attention import group_documents
from lavit.visual_tokenizer.merger import Merger
from lavit.visual_tokenizer.tokenizer import VisualTokenizer

Runs = dict[str, Callable[[], object]]
SD15 = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
VAE = {"_class_name": "AutoencoderKL", **STABLE_DIFFUSION_VAE}


@dataclass(frozen=True)
class Size:
    """What is measured, and how much of it at a time."""

    device: torch.device
    dtype: torch.dtype
    lm: dict[str, Any]
    vision: VisionConfig
    tokenizer: TokenizerConfig
    pixels: PixelsConfig
    rows: int
    row_tokens: int
    document: int  # tokens
    pictures: int
    product: int  # side of the matrices whose product is the peak
    copied: int  # bytes


def size_of(name: Literal["large", "small"], device: torch.device) -> Size:
    """Large: the 7B preset around a LM of 1.1 B. Small: nano's own tokenizer and decoder."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lm = {"model_type": "llama", "bos_token_id": None, "eos_token_id": 0}
    if name == "large":
        model = lavit_7b().model
        shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
        lm |= {**shape, "num_attention_heads": 32, "num_key_value_heads": 4}
        vision = replace(model.vision, source="random")
        pixels = replace(model.pixels, unet=SD15, vae=VAE, unconditional="learned")
        sizes = {"rows": 4, "row_tokens": 2048, "document": 128, "pictures": 64}
        sizes |= {"product": 8192, "copied": 2**31}
    else:
        model = nano().model
        lm |= {**model.language.architecture, "model_type": "llama", "vocab_size": 2048}
        width = {"hidden_size": 112, "num_hidden_layers": 3, "num_attention_heads": 4}
        side = {"image_size": model.vision.image_size, "patch_size": 16}
        architecture = {"model_type": "dinov2", **width, **side}
        vision = replace(model.vision, source="random", layer=-1, architecture=architecture)
        pixels = model.pixels
        sizes = {"rows": 2, "row_tokens": 256, "document": 64, "pictures": 8}
        sizes |= {"product": 1024, "copied": 2**27}
    return Size(device, dtype, lm, vision, model.visual_tokenizer, pixels, **sizes)


def language_of(size: Size) -> Language:
    """The LM with its visual rows and a reader, as stage 2 trains it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**size.lm)
    with size.device:
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        reader = MergerReader(Merger(32, 2, 1, 2.0), config.hidden_size)
        return Language(lm, reader, codes=size.tokenizer.codes, end=0)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run, until the device has done it."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def measure(runs: Runs, rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of every run over rounds, after one round that is not counted."""
    for run in runs.values():
        run()
    times = [[timed(run, device) for run in runs.values()] for _ in range(rounds)]
    return dict(zip(runs, map(statistics.median, zip(*times, strict=True)), strict=True))


def copy_rate(size: Size, rounds: int) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.ones(size.copied // 4, device=size.device)
    target = torch.empty_like(source)
    return (
        2
        * source.nbytes
        / min(timed(lambda: target.copy_(source), size.device) for _ in range(rounds + 1))
    )


def product_rate(size: Size, rounds: int) -> float:
    """FLOP/s of a large product in the number type of training."""
    a, b = (torch.randn(size.product, size.product, device=size.device) for _ in range(2))
    a, b = a.to(size.dtype), b.to(size.dtype)
    return 2 * size.product**3 / min(timed(lambda: a @ b, size.device) for _ in range(rounds + 1))


def decode(size: Size, tokens: int, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds a run, and the figures of decoding text greedily."""
    language = language_of(size).to(size.dtype).eval()
    prompt = tuple(range(5, 37))
    ids = torch.tensor([prompt], device=size.device)
    how = Sampling(temperature=0, min_tokens=tokens, max_tokens=tokens)
    request = Request(ids=prompt, sampling=how)
    engine = Engine(language, compile="inductor" if size.device.type == "cuda" else None)
    options = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens}
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        runs: Runs = {
            "transformers": lambda: language.lm.generate(
                ids, attention_mask=mask, pad_token_id=0, **options
            ),
            "ours": lambda: engine.complete([request]),
        }
        seconds = measure(runs, rounds, size.device)
    table = language.lm.get_input_embeddings().weight
    body = [p for p in language.body.parameters() if p is not table]
    head = language.lm.get_output_embeddings().weight
    read = sum(weight.nbytes for weight in (*body, head))
    share = read * tokens / seconds["ours"] / copy_rate(size, rounds)
    ratio = seconds["transformers"] / seconds["ours"]
    return seconds, {
        "decode_ratio": ratio,
        "decode_bandwidth": share,
        "decode_per_second": tokens / seconds["ours"],
    }


def step_flops(config: Any, codes: int, size: Size) -> float:
    """FLOPs of a training step on packed rows, from sizes alone."""
    width, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or width // heads
    attention = width * head_dim * 2 * (heads + config.num_key_value_heads)
    block = attention + 3 * width * config.intermediate_size
    weights = config.num_hidden_layers * block + width * (config.vocab_size + 2 + codes)
    tokens, length = size.rows * size.row_tokens, size.document
    pairs = tokens / length * length * (length + 1) / 2
    return 6 * weights * tokens + 12 * config.num_hidden_layers * heads * head_dim * pairs


def packed_rows(language: Language, size: Size) -> Batch:
    """Rows of documents of equal length, half text and half codes."""
    shape, vocabulary = (size.rows, size.row_tokens), language.vocabulary
    positions = torch.arange(size.row_tokens).expand(shape) % size.document
    documents = torch.arange(size.row_tokens).expand(shape) // size.document
    text = torch.randint(vocabulary.text_size, shape)
    codes = vocabulary.image_end + 1 + torch.randint(size.tokenizer.codes, shape)
    ids = torch.where(positions * 2 < size.document, text, codes)
    labels = ids.roll(-1, 1)
    labels[:, -1] = IGNORE
    nothing = torch.zeros(shape, dtype=torch.bool)
    return Batch(ids, labels, positions, documents, nothing, torch.zeros(0, dtype=torch.long))


def train(size: Size, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of a whole step with clipping and AdamW, and the share of the peak."""
    language = language_of(size).train()
    optimizer = torch.optim.AdamW(language.parameters(), lr=1e-5, eps=1e-6, fused=True)
    rows = packed_rows(language, size)
    batch = rows.to(size.device)
    half = size.dtype == torch.bfloat16

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        groups = group_documents(rows.documents).to(size.device)  # as in stage 2: nobody waits
        with torch.autocast(size.device.type, torch.bfloat16, enabled=half):
            loss = language(batch, groups=groups).total / batch.labels.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(language.parameters(), 1.0)
        optimizer.step()

    seconds = measure({"training step": step}, rounds, size.device)
    spent = step_flops(language.lm.config, size.tokenizer.codes, size)
    rate = spent / seconds["training step"]
    tokens = size.rows * size.row_tokens / seconds["training step"]
    return seconds, {
        "train_mfu": rate / product_rate(size, rounds),
        "train_tokens_per_second": tokens,
    }


def encode(size: Size, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Pictures to features, and to tokens, against the bare encoder."""
    torch.manual_seed(0)
    vision = load_vision(size.vision).to(size.device)
    tokenizer = VisualTokenizer(size.tokenizer).to(size.device).eval()
    side, config = 2 * size.vision.image_size, size.vision
    noise = np.random.default_rng(0).integers(0, 256, (size.pictures, side, side, 3), np.uint8)
    pictures = [Image.fromarray(one) for one in noise]
    ready = to_pixels(pictures, config.image_size, config.mean, config.std).to(size.device)
    cuda = size.device.type == "cuda"

    @torch.no_grad()
    def bare() -> None:
        with torch.autocast(size.device.type, torch.float16, enabled=cuda):
            for block in ready.split(BLOCK):
                vision.encoder(pixel_values=block)

    @torch.no_grad()
    def tokens() -> None:
        tokenizer.encode(vision.encode(pictures))

    runs: Runs = {
        "bare encoder": bare,
        "features": lambda: vision.encode(pictures),
        "tokens": tokens,
    }
    seconds = measure(runs, rounds, size.device)
    figures = {"encode_per_second": size.pictures / seconds["features"]}
    figures["encode_ratio"] = seconds["bare encoder"] / seconds["features"]
    return seconds, figures | {"tokens_per_second": size.pictures / seconds["tokens"]}


def paint(size: Size, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Pictures painted from features."""
    torch.manual_seed(0)
    pixels = Pixels.build(size.pixels).to(size.device, size.dtype).eval()
    count = max(1, size.pictures // 8)
    features = torch.randn(count, size.pixels.patches, size.pixels.features_dim).to(size.device)
    seconds = measure(
        {"painting": lambda: pixels.sample(features, seeds=range(count))}, rounds, size.device
    )
    return seconds, {"paint_per_second": count / seconds["painting"]}


def main() -> None:
    """Measure the four rates, print them, and write them where --json says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("large", "small"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    size = size_of(options.size or ("large" if cuda else "small"), device)
    parts: list[Callable[[], tuple[dict[str, float], dict[str, float]]]] = [
        lambda: decode(size, options.tokens, options.rounds),
        lambda: train(size, options.rounds),
        lambda: encode(size, options.rounds),
        lambda: paint(size, options.rounds),
    ]
    table, figures = Table("run", "seconds"), {}
    for part in parts:
        seconds, found = part()
        for name, value in seconds.items():
            table.add_row(name, f"{value:.4f}")
        figures |= found
        if cuda:
            torch.cuda.empty_cache()
    against = Table("figure", "value")
    for name, value in figures.items():
        against.add_row(name, f"{value:.3f}")
    console = Console()
    console.print(table, against)
    where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    console.print(f"{where}, {str(size.dtype).removeprefix('torch.')}, {options.rounds} rounds")
    if options.json:
        options.json.write_text(json.dumps({"figures": figures, "device": where}, indent=1) + "\n")


if __name__ == "__main__":
    main()

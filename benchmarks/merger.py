"""The ragged merger against the dense one, at the published size: what kept rows alone save.

    python benchmarks/merger.py [--images 4] [--depth 12] [--runs 7] [--json FILE]

Dense = all 256 rows of every picture under masks, as the published modules run it, but through
PyTorch's fused attention with a boolean mask; ragged = `Merger.forward`, kept rows only, packed
without padding. Same weights, dtype and threads; runs alternate and the medians are compared. At
36 % kept the arithmetic allows 2.5 times; the target is 2.2. About 90 seconds on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lavit.visual_tokenizer.merger import Merger

DIM, HEADS, DEPTH, PATCHES, MLP_RATIO, KEPT = 1408, 16, 12, 256, 4.3637, 0.36


def dense(merger: Merger, patches: Tensor, keep: Tensor) -> Tensor:
    """All rows [images patches dim] under masks; those of dropped patches are of no use."""
    causal = torch.ones(patches.shape[1], patches.shape[1], dtype=torch.bool).tril()
    itself = torch.eye(patches.shape[1], dtype=torch.bool)
    self_mask = causal & keep[:, None, :] | itself
    context = merger.norm_patches(patches)
    x = patches
    for block in merger.blocks:
        x = block.padded(x, context, ~keep[:, None, :], self_mask)
    return merger.norm(x)


def seconds(call: Callable[[], Tensor]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@torch.inference_mode()
def main() -> None:
    """Measure, check that both forms agree, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--depth", type=int, default=DEPTH)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    merger = Merger(DIM, HEADS, options.depth, MLP_RATIO).eval()
    patches = torch.randn(options.images, PATCHES, DIM, generator=generator)
    kept = round(KEPT * PATCHES)
    order = torch.rand(options.images, PATCHES, generator=generator).argsort(1)
    keep = torch.zeros(options.images, PATCHES, dtype=torch.bool).scatter_(1, order[:, :kept], True)
    ours, theirs = merger(patches, keep), dense(merger, patches, keep)[keep]  # warm-up
    error = float((ours - theirs).norm() / theirs.norm())
    if error > 1e-5:
        raise SystemExit(f"the two forms differ: relative error {error:.1e}")
    times: dict[str, list[float]] = {"dense": [], "ragged": []}
    for _ in range(max(options.runs, 5)):
        times["dense"].append(seconds(lambda: dense(merger, patches, keep)))
        times["ragged"].append(seconds(lambda: merger(patches, keep)))
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = medians["dense"] / medians["ragged"]
    size = f"{DIM} x {options.depth} blocks x {PATCHES} patches"
    print(
        f"merger {size}, {kept} kept, {options.images} image(s), fp32, {options.threads} threads,"
    )
    print(f"median of {len(times['dense'])} alternating runs; relative error {error:.1e}")
    for name, value in medians.items():
        spread = f"{min(times[name]):.3f} … {max(times[name]):.3f}"
        print(f"  {name:7} {value:7.3f} s   ({spread} s)   {options.images / value:6.2f} images/s")
    print(f"  ratio   {ratio:7.2f}     (target 2.2, arithmetic 2.5)")
    if options.json:
        options.json.write_text(json.dumps({"figures": {"merger_ratio": round(ratio, 4)}}) + "\n")


if __name__ == "__main__":
    main()

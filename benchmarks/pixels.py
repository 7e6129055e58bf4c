"""The pixel decoder against the UNet's forwards alone; 12 steps of DPM-Solver++ against 50 of DDIM.

    python benchmarks/pixels.py [--run RUN] [--json FILE] [--rounds 7] [--batch 1]

The limit is the time of the UNet on the very inputs of one step, times the number of steps; what
sampling takes beyond it is overhead (condition, guidance, solver, decoding): the target is a ratio
of at most 1.10. Runs are interleaved, round after round; a figure is the median of the rounds'
ratios, its spread the smallest and the largest. Without --run the decoder is nano's with random
weights, which are as fast as trained ones. Measure idle, or with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import lavit
from lavit.pixels.decoder import Pixels
from lavit.presets import preset

FEW, MANY = 12, 50
GUIDANCE = 3.0


def decoder(run: Path | None) -> Pixels:
    """The decoder of a run, or nano's at random weights."""
    if run is not None:
        return lavit.load(run, parts=("pixels",)).model.pixels
    torch.manual_seed(0)
    return Pixels.build(preset("nano").model.pixels).eval()


def forward_of(pixels: Pixels, features: torch.Tensor, guidance: float) -> Callable[[], object]:
    """The UNet on the inputs that it gets in a step of sampling."""
    inputs: list[tuple[tuple, dict]] = []
    hook = pixels.unet.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True
    )
    pixels.sample(features, seeds=range(len(features)), steps=1, guidance=guidance)
    hook.remove()
    args, kwargs = inputs[0]

    @torch.no_grad()
    def forward() -> object:
        return pixels.unet(*args, **kwargs)

    return forward


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run in every round, after one round that is not counted."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
    return times


def main() -> None:
    """Measure, print, and write --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="a trained run")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=1, help="pictures painted together")
    options = parser.parse_args()
    pixels, batch = decoder(options.run), options.batch
    config = pixels.config
    features = torch.randn(
        batch, config.patches, config.features_dim, generator=torch.Generator().manual_seed(0)
    )

    def sampled(steps: int, sampler: str, guidance: float) -> Callable[[], object]:
        return lambda: pixels.sample(
            features, seeds=range(batch), steps=steps, sampler=sampler, guidance=guidance
        )

    plain, guided = forward_of(pixels, features, 1.0), forward_of(pixels, features, GUIDANCE)
    runs = {
        f"{FEW} forwards": lambda: [plain() for _ in range(FEW)],
        f"DPM-Solver++, {FEW} steps": sampled(FEW, "dpm", 1.0),
        f"{FEW} guided forwards": lambda: [guided() for _ in range(FEW)],
        f"DPM-Solver++, {FEW} guided steps": sampled(FEW, "dpm", GUIDANCE),
        f"DDIM, {MANY} steps": sampled(MANY, "ddim", 1.0),
    }
    times = measure(runs, options.rounds)
    names = list(runs)
    ratios = {
        "pixels_overhead": (names[1], names[0]),
        "pixels_guided_overhead": (names[3], names[2]),
        "pixels_few_steps": (names[4], names[1]),
    }
    table = Table("run", "seconds a picture")
    for name, found in times.items():
        table.add_row(name, f"{statistics.median(found) / batch:.4f}")
    figures: dict[str, float] = {}
    against = Table("figure", "median", "spread")
    for name, (above, below) in ratios.items():
        each = [a / b for a, b in zip(times[above], times[below], strict=True)]
        figures[f"{name}_ratio"] = statistics.median(each)
        against.add_row(
            f"{name}_ratio", f"{statistics.median(each):.3f}", f"{min(each):.3f} … {max(each):.3f}"
        )
    console = Console()
    console.print(table, against)
    size = (
        f"{config.size} px, {sum(p.numel() for p in pixels.unet.parameters()) / 1e6:.1f} M weights"
    )
    console.print(
        f"{size}, batch {batch}, {torch.get_num_threads()} threads, {options.rounds} rounds"
    )
    if options.json:
        options.json.write_text(json.dumps({"figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()

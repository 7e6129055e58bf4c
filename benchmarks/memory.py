"""Peak memory of a training on streams, by the number of pictures: it must not depend on it.

    python benchmarks/memory.py [--pictures 1000 20000] [--steps 80] [--batch 256] [--json FILE]

All three stages of a small model train on WebDataset shards of drawn pictures of 64 px, with as
many steps whatever the data: by default stages 1 and 3 take 20,480 pictures each, so that a stream
of 20,000 is read to its end and one of 1,000 many times. Each run is a process of its own; its peak
is what the system says of it.

memory_ratio   peak of the largest data over that of the smallest. Aim 1.00 (at most 1.03).
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from lavit.config import (
    LanguageConfig,
    LanguageTraining,
    ModelConfig,
    PixelsConfig,
    PixelsTraining,
    TokenizerConfig,
    TokenizerTraining,
    TrainConfig,
    VisionConfig,
)
from lavit.train.metrics import peak_gib
from lavit.train.run import open_run, train_stages

SHARD = 500  # pictures
SIZE = 64  # pixels
DIM, PATCHES = 32, 16


def write_shards(folder: Path, count: int) -> None:
    """Pictures of a colour with noise, and what colour it is, as .tar files."""
    folder.mkdir()
    for first in range(0, count, SHARD):
        with tarfile.open(folder / f"{first // SHARD:05d}.tar", "w") as tar:
            for number in range(first, min(first + SHARD, count)):
                rng = np.random.default_rng(number)
                colour, stream = rng.integers(256, size=3), io.BytesIO()
                levels = (colour + rng.normal(0, 8, (SIZE, SIZE, 3))).clip(0, 255)
                Image.fromarray(levels.astype(np.uint8)).save(stream, "PNG", compress_level=1)
                words = f"red {colour[0]}, green {colour[1]}, blue {colour[2]}".encode()
                for suffix, data in (("png", stream.getvalue()), ("txt", words)):
                    entry = tarfile.TarInfo(f"{number:08d}.{suffix}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))


def model() -> ModelConfig:
    """Small enough that data would show."""
    vision = {"hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"model_type": "dinov2", "image_size": 32, "patch_size": 8}
    moments = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    language = {"model_type": "llama", "hidden_size": 48, "intermediate_size": 96}
    language |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}
    tokenizer = {"heads": 2, "merger_depth": 1, "reconstructor_depth": 1, "codes": 64}
    unet = {"_class_name": "GridDenoiser", "in_channels": 20, "out_channels": 12}
    unet |= {"width": 16, "depth": 2}
    pixels = {"size": 16, "condition": "grid", "condition_dim": 8, "patch": 2, "unet": unet}
    sizes = {"image_size": 32, "grid": 4, "dim": DIM}
    return ModelConfig(
        name="memory",
        vision=VisionConfig(source="random", architecture=vision, **sizes, **moments),
        visual_tokenizer=TokenizerConfig(dim=DIM, patches=PATCHES, code_dim=8, **tokenizer),
        language=LanguageConfig(source="random", architecture=language),
        pixels=PixelsConfig(features_dim=DIM, patches=PATCHES, **pixels),
    )


def settings(steps: int, batch: int) -> TrainConfig:
    """As many steps of every stage."""
    rates = {"learning_rate": 1e-3, "rows_rate": 1e-3, "reader_rate": 1e-3}
    half, common = steps // 2, {"batch": batch, "learning_rate": 1e-3, "stream": True}
    return TrainConfig(
        text_vocabulary=300,
        sample_every=0,
        tokenizer=TokenizerTraining(
            steps_a=half, steps_b=steps - half, k_means_vectors=1000, **common
        ),
        language=LanguageTraining(steps=steps, rows=16, tokens=128, stream=True, **rates),
        pixels=PixelsTraining(steps=steps, **common),
    )


def peak_of(data: Path, steps: int, batch: int) -> dict[str, float]:
    """Peak of a process that trains on this data, in GiB, after each stage."""
    command = [sys.executable, __file__, "--data", str(data)]
    command += ["--steps", str(steps), "--batch", str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def train_once(data: Path, steps: int, batch: int) -> None:
    """Train in this process and print the peaks."""
    peaks = {}
    with tempfile.TemporaryDirectory() as out:
        run = open_run(Path(out) / "run", data, model(), settings(steps, batch), trackers=())
        for stage in ("tokenizer", "language", "pixels"):
            train_stages(run, (stage,))
            peaks[stage] = peak_gib()
    print(json.dumps(peaks))


def main() -> None:
    """Measure, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, nargs="+", default=[1000, 20_000])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--data", type=Path, help="train on this, in this process")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.data:
        train_once(options.data, options.steps, options.batch)
        return
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        for count in options.pictures:
            data = Path(folder) / str(count)
            write_shards(data, count)
            peaks.append(peak_of(data, options.steps, options.batch))
            stages = "   ".join(f"{stage} {gib:.3f}" for stage, gib in peaks[-1].items())
            print(f"{count:8d} pictures   peak GiB after   {stages}", flush=True)
    ratio = peaks[-1]["pixels"] / peaks[0]["pixels"]
    print(f"memory_ratio {ratio:.3f} (aim 1.00)")
    if options.json:
        options.json.write_text(json.dumps({"figures": {"memory_ratio": round(ratio, 4)}}) + "\n")


if __name__ == "__main__":
    main()

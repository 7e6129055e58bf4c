"""Speed and memory of `tokenize` against the encoder alone; tokenize-corpus on two workers and one.

    python benchmarks/tokenizer.py [--model RUN] [--pictures 24] [--runs 5] [--workers 2]
                                   [--json FILE]

Pictures go one by one, as `lavit tokenize` does (`LaVIT.encode_images`), against `LaVIT.patches` on
the same pictures in the same process; rounds alternate and medians are compared, `tokenize_ratio` =
images/s of tokenize / of the encoder (1 would be a tokenizer for nothing). Peak memory is that of a
fresh process for each. Without --model a `nano` with untrained tokenizer keeps 36 % of the patches,
as the paper's does. `--workers 2` also tokenises a corpus on 1 and on 2 Ray workers, a thread each:
`workers_ratio` takes the seconds between the first shard and the last, so that Ray's start does not
count. About 2 minutes on two idle cores. (The file is not called tokenize: that would hide Python's
own module of the name.)
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lavit.config import TO_SEE
from lavit.data.bulk import CorpusJob, tokenize_corpus
from lavit.model import LaVIT
from lavit.presets import nano
from lavit.vision.encoder import load_vision
from lavit.visual_tokenizer.selector import KeepPolicy
from lavit.visual_tokenizer.tokenizer import VisualTokenizer

KEEP = KeepPolicy("rate", 0.36)
WHAT = ("encoder", "tokenize")


def pictures(count: int, size: int = 256) -> list[Image.Image]:
    """Blurred noise: nothing to see, the same work."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return [
        Image.fromarray(array).resize((size, size), Image.Resampling.BICUBIC) for array in small
    ]


def untrained(folder: Path) -> Path:
    """A `nano` on disk whose tokenizer has random weights."""
    torch.manual_seed(0)
    config = nano().model
    vision, tokenizer = load_vision(config.vision), VisualTokenizer(config.visual_tokenizer)
    LaVIT(config, vision=vision, visual_tokenizer=tokenizer).save_pretrained(folder)
    return folder


def work(model: LaVIT, what: str, images: list[Image.Image]) -> None:
    """One picture after the other through the encoder, or through encoder and tokenizer."""
    for image in images:
        if what == "encoder":
            model.patches([image])
        else:
            model.encode_images([image], KEEP)


def peak_megabytes() -> float:
    """Peak resident memory of this process; getrusage would give the parent's, hence /proc."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts bytes


def memory_of(what: str, folder: Path, count: int) -> float:
    """Peak resident MB of a fresh process that does nothing else."""
    command = [
        sys.executable,
        __file__,
        "--model",
        str(folder),
        "--pictures",
        str(count),
        "--alone",
        what,
    ]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def corpus_seconds(
    folder: Path, data: Path, out: Path, workers: int, shard: int
) -> tuple[float, int]:
    """Seconds between the first finished shard and the last, and how many pictures they cover."""
    heard: list[tuple[float, int]] = []
    job = CorpusJob(data=data, out=out, model=folder, keep="rate:0.36", shard_size=shard)
    tokenize_corpus(
        job, workers=workers, progress=lambda done, _: heard.append((time.perf_counter(), done))
    )
    return heard[-1][0] - heard[0][0], heard[-1][1] - heard[0][1]


def compare_workers(folder: Path, count: int, workers: int) -> dict[str, float]:
    """Images/s of a corpus on one worker and on several, alternating twice; the better of each."""
    rates: dict[int, list[float]] = {1: [], workers: []}
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "data" / "train"
        data.mkdir(parents=True)
        for number, image in enumerate(pictures(count)):
            image.save(data / f"{number:05d}.png")
        for turn in range(2):
            for number in rates:
                out = Path(place) / f"{number}-{turn}"
                seconds, done = corpus_seconds(
                    folder, data.parent, out, number, max(1, count // 24)
                )
                rates[number].append(done / seconds)
    best = {number: max(found) for number, found in rates.items()}
    for number, found in rates.items():
        print(
            f"  corpus, {number} worker(s)  {best[number]:7.2f} images/s  "
            f"({min(found):.2f} … {max(found):.2f})"
        )
    print(
        f"  ratio of workers      {best[workers] / best[1]:7.2f}            "
        "(target 1.7 at 2 workers)"
    )
    return {"workers_ratio": best[workers] / best[1]}


def main() -> None:
    """Measure, print, and write --json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path)
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--workers", type=int, default=0, help="also compare this many workers of a corpus with one"
    )
    parser.add_argument("--corpus", type=int, default=960, help="pictures of that corpus")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", choices=WHAT, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    with tempfile.TemporaryDirectory() as place:
        folder = options.model or untrained(Path(place) / "nano")
        model = LaVIT.from_pretrained(folder, parts=TO_SEE)
        images = pictures(options.pictures)
        if options.alone:
            work(model, options.alone, images)
            print(peak_megabytes())
            return
        times: dict[str, list[float]] = {what: [] for what in WHAT}
        for what in WHAT:  # warm-up
            work(model, what, images[:2])
        for _ in range(options.runs):
            for what in WHAT:
                start = time.perf_counter()
                work(model, what, images)
                times[what].append(time.perf_counter() - start)
        rates = {what: len(images) / statistics.median(found) for what, found in times.items()}
        memory = {what: memory_of(what, folder, min(8, len(images))) for what in WHAT}
        print(
            f"{model.config.name}, one picture at a time, {options.threads} thread(s), "
            f"median of {options.runs} runs"
        )
        for what, found in times.items():
            spread = f"{len(images) / max(found):.2f} … {len(images) / min(found):.2f}"
            print(
                f"  {what:20}  {rates[what]:7.2f} images/s  ({spread})  peak {memory[what]:.0f} MB"
            )
        figures = {
            "tokenize_ratio": rates["tokenize"] / rates["encoder"],
            "tokenize_extra_megabytes": memory["tokenize"] - memory["encoder"],
        }
        print(f"  ratio                 {figures['tokenize_ratio']:7.2f}")
        if options.workers > 1:
            figures |= compare_workers(folder, options.corpus, options.workers)
    if options.json:
        options.json.write_text(
            json.dumps({"figures": {k: round(v, 4) for k, v in figures.items()}}) + "\n"
        )


if __name__ == "__main__":
    main()

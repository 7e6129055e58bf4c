"""Two processes at once on the same cores: seconds of their captions over those of one alone.

    python benchmarks/busy.py PICTURE... [--model FOLDER] [--rounds 3] [--json FILE]

Each process loads the model, says that it is ready, and captions the same pictures one by one once
all are. Sharing the machine fairly gives 2 at most. The same is measured where threads spin 300,000
times while they wait, as libgomp does by itself; `lavit` asks for 1,000 times. Measure idle; the
medians of the rounds count.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

SPINS = ("1000", "300000")
MOST = 2.2
CHILD = """
import sys, time, lavit
model, *pictures = sys.argv[1:]
lv = lavit.load(model)
lv.caption(pictures[0])
print("ready", flush=True)
input()
start = time.perf_counter()
for picture in pictures:
    lv.caption(picture)
print((time.perf_counter() - start) / len(pictures))
"""


def seconds(processes: int, spins: str, arguments: list[str]) -> float:
    """Mean seconds of a caption in so many processes at once."""
    settings = {**os.environ, "GOMP_SPINCOUNT": spins}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, *arguments],
            env=settings,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for _ in range(processes)
    ]
    if any(child.stdout.readline() != "ready\n" for child in children):
        raise SystemExit(
            f"a process could not caption: try lavit caption {arguments[1]} --model {arguments[0]}"
        )
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    return statistics.mean(float(child.communicate()[0]) for child in children)


def main() -> None:
    """Print the ratios beside their aim."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano")
    parser.add_argument("pictures", nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    arguments = [options.model, *options.pictures]
    rounds = [
        {(count, spins): seconds(count, spins, arguments) for count in (1, 2) for spins in SPINS}
        for _ in range(options.rounds)
    ]
    figures = {}
    table = Table("spins", "alone, s", "two at once, s", "ratio", "aim")
    for spins, aim in zip(SPINS, (f"≤ {MOST}", ""), strict=True):
        alone, both = (statistics.median(each[count, spins] for each in rounds) for count in (1, 2))
        ratio = statistics.median(each[2, spins] / each[1, spins] for each in rounds)
        table.add_row(spins, f"{alone:.3f}", f"{both:.3f}", f"{ratio:.2f}", aim)
        figures[spins] = {"alone": alone, "two": both, "ratio": ratio}
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()

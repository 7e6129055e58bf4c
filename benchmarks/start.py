"""Cold start and memory of `lavit caption` in a fresh process, and the time of its imports.

    python benchmarks/start.py PICTURE [--model FOLDER] [--rounds 3] [--profile] [--json FILE]

Each round starts the command line anew and waits for its caption: wall seconds, CPU seconds and
peak resident memory of that process, and the same of a process that only imports torch (the floor).
The medians count; `lavit --help` is timed too. The first round of a machine reads everything from
disk: drop it by hand if the disk's cache was cold. --profile lists the slowest imports
(`python -X importtime`, which slows them down itself).
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

MAIN = "from lavit.cli import main; main()"
MOST_SECONDS, MOST_MEGABYTES = 15.0, 3000.0
SLOWEST = 15  # imports that --profile lists


def measure(arguments: list[str]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak megabytes of one python process with these arguments."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    # a process between, so that the peak is of this child alone
    code = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run([sys.executable, *sys.argv[1:]], stdout=subprocess.DEVNULL)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, done.returncode)"
    )
    found = subprocess.run(
        [sys.executable, "-S", "-c", code, *arguments], capture_output=True, text=True
    )
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak, code_ = found.stdout.split() or ("0", "1")
    if code_ != "0":
        raise SystemExit(found.stderr)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu, int(peak) / 1024


def imports(arguments: list[str]) -> list[tuple[float, str]]:
    """Seconds that each module takes with all that it brings, the slowest first."""
    found = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, check=True
    ).stderr
    lines = re.findall(r"import time:\s+\d+ \|\s+(\d+) \|\s+(\S+)", found)
    return sorted(((int(micro) / 1e6, name) for micro, name in lines), reverse=True)


def main() -> None:
    """Measure, print, and write --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    caption = ["-c", MAIN, "caption", str(options.picture), "--model", options.model]
    runs = {
        "import torch": ["-c", "import torch"],
        "lavit --help": ["-c", MAIN, "--help"],
        "lavit caption": caption,
    }
    table = Table("run", "wall s", "spread", "CPU s", "peak MB")
    figures: dict[str, float] = {}
    for name, arguments in runs.items():
        rounds = [measure(arguments) for _ in range(options.rounds)]
        wall, cpu, peak = (statistics.median(column) for column in zip(*rounds, strict=True))
        walls = [round_[0] for round_ in rounds]
        table.add_row(
            name, f"{wall:.2f}", f"{min(walls):.2f} … {max(walls):.2f}", f"{cpu:.2f}", f"{peak:.0f}"
        )
        key = name.replace("lavit ", "").replace("--", "").replace(" ", "_")
        figures |= {f"{key}_seconds": wall, f"{key}_cpu_seconds": cpu, f"{key}_megabytes": peak}
    console = Console()
    console.print(table)
    console.print(
        f"{options.model}: caption in {figures['caption_seconds']:.1f} s "
        f"(wanted: {MOST_SECONDS:.0f} at most), "
        f"{figures['caption_megabytes']:.0f} MB (wanted: {MOST_MEGABYTES:.0f} at most)"
    )
    if options.profile:
        slowest = Table("import", "s, with what it brings")
        for seconds, name in imports(caption)[:SLOWEST]:
            slowest.add_row(name, f"{seconds:.2f}")
        console.print(slowest)
    if options.json:
        options.json.write_text(json.dumps({"figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()

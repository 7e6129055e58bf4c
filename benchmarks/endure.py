"""Many clients of a server for some minutes: answers by status, memory's slope, and its health.

    python benchmarks/endure.py [--model nano] [--clients 64] [--seconds 300] [--json FILE]

The server is `lavit serve` in a process of its own. Each client asks, draws, streams a drawing and
asks about a picture in turn, and again at once. `/health` is asked twice a second. The slope is a
line through the server's resident memory after the first minute (a fifth of shorter runs).
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx2
import numpy as np
from PIL import Image

TALK = [{"role": "user", "content": "what is an owl?"}]


def turns() -> list[tuple[str, dict[str, object]]]:
    """What a client asks, one after the other."""
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(stream, "PNG")
    url = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    seen = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]
    drawing = {"prompt": "a red star"}
    return [
        ("chat/completions", {"messages": TALK, "max_tokens": 16}),
        ("images/generations", drawing),
        ("images/generations", drawing | {"stream": True, "partial_images": 2}),
        ("chat/completions", {"messages": [{"role": "user", "content": seen}]}),
    ]


async def endure(address: str, process: int, clients: int, seconds: float) -> dict[str, float]:
    """Load a server; the figures."""
    statuses: Counter[str] = Counter()
    memory: list[tuple[float, float]] = []
    health: list[float] = []
    started = time.monotonic()
    until = started + seconds
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=address, timeout=330, limits=limits) as http:

        async def client(number: int) -> None:
            asked, at = turns(), number
            while time.monotonic() < until:
                path, body = asked[at % len(asked)]
                at += 1
                try:
                    answer = await http.post(f"/v1/{path}", json=body)
                    broken = '"error"' in answer.text and answer.status_code == 200
                    statuses["broken" if broken else str(answer.status_code)] += 1
                    if answer.status_code == 429:
                        await asyncio.sleep(float(answer.headers["retry-after"]))
                except httpx2.HTTPError:
                    statuses["none"] += 1

        async def watch() -> None:
            while time.monotonic() < until:
                now = time.monotonic()
                (await http.get("/health")).raise_for_status()
                health.append(time.monotonic() - now)
                lines = Path(f"/proc/{process}/status").read_text().splitlines()
                (size,) = (line.split()[1] for line in lines if line.startswith("VmRSS"))
                memory.append((now - started, int(size) / 1024))
                await asyncio.sleep(0.5)

        await asyncio.gather(watch(), *map(client, range(clients)))
    settled = [point for point in memory if point[0] > min(60, seconds / 5)]
    when, much = np.array(settled).T
    figures = {f"status_{name}": float(count) for name, count in sorted(statuses.items())}
    return figures | {
        "answers_per_second": sum(statuses.values()) / seconds,
        "memory_mb": float(much[-1]),
        "memory_slope_mb_per_minute": float(np.polyfit(when / 60, much, 1)[0]),
        "health_seconds_worst": max(health),
    }


def main() -> None:
    """Measure, print, and write --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lavit", "serve", options.model, "--port", str(port)]
    address = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command) as server:
        try:
            while True:
                try:
                    httpx2.get(f"{address}/health")
                    break
                except httpx2.TransportError:
                    assert server.poll() is None, "the server does not start"
                    time.sleep(0.2)
            work = endure(address, server.pid, options.clients, options.seconds)
            figures = asyncio.run(work)
        finally:
            server.terminate()
    for name, value in figures.items():
        print(f"{name:28} {value:10.3f}")
    if options.json:
        options.json.write_text(json.dumps({"figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()

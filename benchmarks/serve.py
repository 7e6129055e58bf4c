"""Requests and pictures per second of the server, and times to the first token and picture.

    python benchmarks/serve.py [--model nano] [--clients 1 4 16 64] [--each 2] [--json FILE]

Each client draws `--each` pictures, one after the other, and asks a question in between. The peer
is the same model without the server's session: a thread a client, each call with a session of its
own, as the pipeline has it. Both run in this process, one after the other, for each number of
clients. `cpu_ratio` is of processor seconds a picture, clients included: on a busy machine, where
more threads get more of it, that is the one to look at.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
from rich.console import Console
from rich.table import Table

import lavit
from lavit.generate.pipeline import Pipeline
from lavit.serve.app import create_app
from lavit.serve.limits import Limits

PROMPT = "a small owl left of a small red star on a striped blue background"


async def draw(client: httpx2.AsyncClient, seed: int) -> float:
    """Seconds until a picture has come."""
    started = time.perf_counter()
    body = {"prompt": PROMPT, "seed": seed}
    answer = await client.post("/v1/images/generations", json=body)
    answer.raise_for_status()
    return time.perf_counter() - started


async def ask(client: httpx2.AsyncClient) -> float:
    """Seconds until the first word has come."""
    started, first = time.perf_counter(), 0.0
    messages = [{"role": "user", "content": "what is an owl?"}]
    body = {"messages": messages, "stream": True, "max_tokens": 16}
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if '"content": ""' not in line and '"content":""' not in line and not first:
                first = time.perf_counter() - started if line.startswith("data") else 0.0
    return first


async def shared(pipeline: Pipeline, clients: int, each: int) -> dict[str, float]:
    """The figures of the server."""
    app = create_app(pipeline, limits=Limits(requests=2 * clients))
    transport = httpx2.ASGITransport(app)
    address = {"base_url": "http://localhost", "timeout": 600.0}

    async with httpx2.AsyncClient(transport=transport, **address) as client:

        async def one(number: int) -> list[tuple[float, float]]:
            turns = range(number * each, (number + 1) * each)
            return [(await draw(client, turn), await ask(client)) for turn in turns]

        started, used = time.perf_counter(), time.process_time()
        found = [
            turn for turns in await asyncio.gather(*map(one, range(clients))) for turn in turns
        ]
        seconds, used = time.perf_counter() - started, time.process_time() - used
    app.state.service.close()
    pictures, words = zip(*found, strict=True)
    return {
        "requests_per_second": 2 * len(found) / seconds,
        "pictures_per_second": len(found) / seconds,
        "first_token_seconds": statistics.median(words),
        "picture_seconds": statistics.median(pictures),
        "cpu_seconds_per_picture": used / len(found),
    }


def apart(pipeline: Pipeline, clients: int, each: int) -> tuple[float, float]:
    """Pictures per second of a session per call, and processor seconds a picture."""

    def one(number: int) -> None:
        for seed in range(number * each, (number + 1) * each):
            pipeline.draw(PROMPT, seed=seed)
            pipeline.complete(["what is an owl?"], sampling=lavit.Sampling(max_tokens=16))

    started, used = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(one, range(clients)))
    count = clients * each
    return count / (time.perf_counter() - started), (time.process_time() - used) / count


def main() -> None:
    """Measure, print a table, and write --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--each", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    pipeline = lavit.load(options.model)
    pipeline.draw(PROMPT)
    figures: dict[str, float] = {}
    names = ("requests/s", "pictures/s", "token s", "picture s", "CPU s")
    table = Table("clients", *names, "ratio", "CPU ratio")
    for clients in options.clients:
        found = asyncio.run(shared(pipeline, clients, options.each))
        rate, used = apart(pipeline, clients, options.each)
        found["pictures_ratio"] = found["pictures_per_second"] / rate
        found["cpu_ratio"] = used / found["cpu_seconds_per_picture"]
        figures |= {f"{name}_{clients}": value for name, value in found.items()}
        table.add_row(str(clients), *(f"{value:.2f}" for value in found.values()))
    Console().print(table)
    Console().print("ratios: against a session per call; above 1 the server is better")
    if options.json:
        options.json.write_text(json.dumps({"figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()

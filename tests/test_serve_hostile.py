"""What strangers do to a server, in a process of its own where that matters."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import multiprocessing
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

import lavit
from conftest import toy_picture
from lavit.cli import main
from lavit.serve.pictures import data_url, encode
from test_serve import serving

CHAT, DRAW, EDIT = "/v1/chat/completions", "/v1/images/generations", "/v1/images/edits"
ANSWER, TOKENS = "/v1/responses", "/v1/tokenize"
URL = data_url(encode(toy_picture("red square", 64)))
SAYING = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(lavit.load("nano")) as (found, _):
        yield found


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, pixels: bytes, before: bytes = b"") -> str:
    """A picture's address, whatever it holds."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return data_url(base64.b64encode(data).decode())


def zeros(count: int) -> bytes:
    return zlib.compress(bytes(count), 9)


def shown(url: str, **more: Any) -> dict[str, Any]:
    item = {"type": "image_url", "image_url": {"url": url}, **more}
    return {"messages": [{"role": "user", "content": [item]}], "max_tokens": 1}


BOMBS = {
    "wide": png(30_000, 30_000, zeros(2**20)),
    "empty": png(0, 0, b""),
    "cut": png(4000, 4000, b""),
    "profile": png(4, 4, zeros(52), chunk(b"iCCP", b"k\0\0" + zeros(2**27))),
    "text": png(4, 4, zeros(52), chunk(b"zTXt", b"k\0\0" + zeros(2**27))),
    "drawing": data_url(base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg'/>").decode()),
    "program": data_url(base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n").decode()),
}


@pytest.mark.parametrize("name", BOMBS)
def test_pictures_that_are_bombs(address: str, name: str) -> None:
    found = httpx2.post(address + CHAT, json=shown(BOMBS[name]))
    assert found.status_code == 400 and found.json()["error"]["code"] == "invalid_image"


LONG = "a b c " * 20_000
HOSTILE: list[tuple[str, Any, int, str]] = [
    (CHAT, {"messages": [{"role": "user", "content": LONG}]}, 400, "characters"),
    (DRAW, {"prompt": LONG}, 400, "characters"),
    (ANSWER, {"input": "a", "instructions": LONG}, 400, "characters"),
    (CHAT, {"messages": [{"role": "user", "content": "a"}] * 1025}, 422, "1024"),
    (CHAT, SAYING | {"stop": ["x"] * 5}, 422, "stop"),
    (CHAT, SAYING | {"stop": "x" * 257}, 422, "256 characters"),
    (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, 400, "half a character"),
    (DRAW, {"prompt": "\ud800"}, 422, "unicode"),
    (CHAT, SAYING | {"model": "\ud800"}, 404, "does not exist"),
    (CHAT, SAYING | {"model": "x" * 10**6}, 404, "the model"),
    (CHAT, '{"messages":' + "[" * 10**6, 413, "items"),
    (CHAT, '{"a":' * 10**5 + "1" + "}" * 10**5, 400, "pars"),
    (CHAT, '{"messages":[],"metadata":[' + "[]," * 10**5 + "1]}", 413, "items"),
    (CHAT, shown(URL, codes=[-1]), 400, "codes"),
    (CHAT, shown(URL, codes=[10**30]), 400, "codes"),
    (CHAT, shown(URL, codes=[]), 400, "codes"),
    (CHAT, SAYING | {"n": 10**4000}, 400, "n is 1000"),
    (TOKENS, {"image": URL, "keep": True}, 422, "keep"),
    (ANSWER, {"input": "a", "tool_choice": "required"}, 422, "tools"),
    (ANSWER, {"input": "a", "tool_choice": {"type": "function"}}, 422, "tool_choice"),
    (ANSWER, {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 422, "image_url"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(HOSTILE)))
def test_hostile_bodies(address: str, case: int) -> None:
    path, body, status, word = HOSTILE[case]
    content = body if isinstance(body, str) else json.dumps(body)
    kind = {"content-type": "application/json"}
    found = httpx2.post(address + path, content=content, headers=kind)
    assert (found.status_code, word in found.text) == (status, True), found.text[:300]
    assert len(found.content) < 2000


def test_more_patches_than_there_are_are_all(address: str) -> None:
    found = httpx2.post(address + TOKENS, json={"image": URL, "keep": 10**30}).json()
    assert found["tokens"] == found["patches"]


def form(*parts: tuple[bytes, bytes], end: bytes = b"--x--\r\n") -> bytes:
    return b"".join(b"--x\r\n" + head + b"\r\n\r\n" + data + b"\r\n" for head, data in parts) + end


def field(name: bytes, file: bytes = b"") -> bytes:
    return b'Content-Disposition: form-data; name="' + name + b'"' + file


FILE = b'; filename="../../etc/passwd"'
FORMS = {
    "cut": form((field(b"prompt"), b"a"), (field(b"image", FILE), b"a"), end=b""),
    "nameless": form((b"Content-Disposition: form-data", b"a")),
    "headless": form((b"X: y", b"a")),
    "headers": form((b"\r\n".join(b"X%d: y" % n for n in range(5000)), b"a")),
    "long header": form((b"X: " + b"y" * 10**5, b"a")),
    "fields": form(*((field(b"f%d" % n), b"a") for n in range(1000))),
    "files": form(*((field(b"image", FILE), b"a") for _ in range(1000))),
    "long field": form((field(b"prompt"), b"a" * 2**20)),
    "no picture": form((field(b"prompt"), b"a"), (field(b"image", FILE), b"")),
    "words": form((field(b"prompt"), b"a"), (field(b"image"), b"a")),
    "mask": form((field(b"prompt"), b"a"), (field(b"mask", FILE), b"a")),
}


# a form that is cut leaves its last file to the garbage collector
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", FORMS)
def test_broken_forms(address: str, name: str) -> None:
    kind = {"content-type": "multipart/form-data; boundary=x"}
    found = httpx2.post(address + EDIT, content=FORMS[name], headers=kind)
    assert found.status_code in (400, 422) and found.json()["error"]["message"]
    assert "passwd" not in found.text


def test_a_failure_is_an_answer_and_the_connection_goes_on(address: str) -> None:
    """The last bytes of a picture are missing, so no check of its header finds it."""
    with httpx2.Client(base_url=address) as client:
        for _ in range(2):
            assert client.post(CHAT, json=shown(BOMBS["cut"])).status_code == 400
        assert client.get("/health").json() == {"status": "ok"}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def process(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`lavit serve nano`, ready, and its address."""
    port = free_port()
    command = [sys.executable, "-m", "lavit", "serve", "nano", "--port", str(port), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        try:
            address = f"http://127.0.0.1:{port}"
            while not answers(f"{address}/health"):
                assert running.poll() is None
                time.sleep(0.1)
            yield running, address
        finally:
            running.kill()


def answers(address: str) -> bool:
    try:
        return httpx2.get(address, timeout=60).status_code == 200
    except httpx2.TransportError:
        return False


def draws(address: str, begun: Event) -> None:
    """A client that says when the first line of its answer is there."""
    body = {"prompt": "an owl", "n": 10, "quality": "high", "size": "192x192", "stream": True}
    with httpx2.stream("POST", address + DRAW, json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        if next(lines).startswith("event"):
            begun.set()
        for _ in lines:
            pass


def serves(port: int, said: Path) -> None:
    """`lavit serve nano`; what it says goes to a file."""
    with said.open("w") as file:
        os.dup2(file.fileno(), 2)
        sys.stderr = file
        main(["serve", "nano", "--port", str(port)])


def gauges(address: str) -> dict[str, float]:
    lines = httpx2.get(f"{address}/metrics").text.splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if line[0] != "#"}


# Python 3.12 on forks of a process with threads
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_process_whose_client_is_killed_and_that_is_stopped(tmp_path: Path) -> None:
    """Both are forks, which have the imports behind them."""
    context, port, said = multiprocessing.get_context("fork"), free_port(), tmp_path / "said"
    address, begun = f"http://127.0.0.1:{port}", context.Event()
    running = context.Process(target=serves, args=(port, said))
    client = context.Process(target=draws, args=(address, begun))
    running.start()
    try:
        while not answers(f"{address}/health"):
            assert running.is_alive()
            time.sleep(0.1)
        client.start()
        assert begun.wait(60)
        client.kill()
        until = time.monotonic() + 60
        while (now := gauges(address))["lavit_lanes"] or now["lavit_waiting"]:
            assert time.monotonic() < until
            time.sleep(0.05)

        body = {"prompt": "an owl", "n": 4, "stream": True}
        with httpx2.stream("POST", address + DRAW, json=body, timeout=60) as answer:
            os.kill(running.pid, signal.SIGTERM)
            lines = [line for line in answer.iter_lines() if line.startswith("event: ")]
        assert lines == ["event: image_generation.completed"] * 4
        running.join(60)
        assert running.exitcode == 128 + signal.SIGTERM  # as a shell says it
        assert "Traceback" not in said.read_text()
        assert not answers(f"{address}/health")
    finally:
        running.kill()


@pytest.mark.slow
def test_replicas_share_one_address_and_finish_what_runs() -> None:
    pytest.importorskip("ray.serve")
    drawing = {"prompt": "an owl", "seed": 1, "quality": "low"}
    with process("--replicas", "2") as (running, address):
        for _ in range(20):
            assert httpx2.get(f"{address}/v1/models").status_code == 200
        said = [httpx2.get(f"{address}/metrics").text for _ in range(20)]
        line = r'lavit_requests_total{path="/v1/models",status="200"} (\d+)'
        counts = [int(found[1]) for one in said if (found := re.search(line, one))]
        assert 0 < max(counts) < 20  # whichever answers, it had a part of them
        found = [httpx2.post(address + DRAW, json=drawing, timeout=60).json() for _ in range(4)]
        nano = lavit.load("nano")
        steps = max(1, nano.model.config.pixels.steps // 2)
        own = nano.draw("an owl", steps=steps, seed=1)
        assert {one["data"][0]["b64_json"] for one in found} == {encode(own)}
        refused = httpx2.post(address + DRAW, json={"prompt": 3})
        assert refused.status_code == 422 and "prompt" in refused.json()["error"]["message"]

        body = {"prompt": "an owl", "n": 4, "stream": True}
        with httpx2.stream("POST", address + DRAW, json=body, timeout=60) as answer:
            running.send_signal(signal.SIGTERM)
            lines = [line for line in answer.iter_lines() if line.startswith("event: ")]
        assert lines == ["event: image_generation.completed"] * 4
        assert running.wait(60) == 128 + signal.SIGTERM


@pytest.mark.skipif(not importlib.util.find_spec("litellm"), reason="needs litellm")
def test_litellm(address: str) -> None:
    import litellm

    how = {"api_base": f"{address}/v1", "api_key": "none"}
    talk = [{"role": "user", "content": "a red star"}]
    said = litellm.completion("openai/nano", talk, max_tokens=4, **how)
    assert said.choices[0].message.content and said.usage.total_tokens > 0
    pieces = litellm.completion("openai/nano", talk, max_tokens=4, stream=True, **how)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces)
    drawn = litellm.completion("openai/nano", talk, modalities=["image"], **how)
    (shown,) = drawn.choices[0].message.images
    assert shown["image_url"]["url"].startswith("data:image/png;base64,")
    picture = litellm.image_generation("a red star", model="openai/nano", **how)
    data = base64.b64decode(picture.data[0].b64_json)
    assert Image.open(io.BytesIO(data)).size == (80, 80)

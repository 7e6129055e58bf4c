"""The server through the official client: what it answers is what the pipeline gives."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
import uvicorn
from openai import OpenAI
from PIL import Image

import lavit
from conftest import toy_picture
from lavit.config import InputError
from lavit.generate.pipeline import Pipeline
from lavit.generate.sampling import Sampling
from lavit.generate.stream import Update
from lavit.serve import fetch
from lavit.serve.app import create_app
from lavit.serve.chat import ChatRequest, _chunks
from lavit.serve.errors import ApiError, api_error
from lavit.serve.limits import Limits
from lavit.serve.metrics import ServerMetrics
from lavit.serve.painter import preview_steps
from lavit.serve.pictures import data_of, data_url, encode
from lavit.serve.server import Server, keys_of
from lavit.serve.service import Service, canvas
from lavit.serve.ticket import PromptSize, Ticket
from lavit.serve.worker import Order, Worker

PROMPT = "a red star on a blue background"
MIXED = "multipart/form-data; boundary=x"
LOW: dict[str, Any] = {"quality": "low"}  # half of the solver's steps
HOW = {"steps": 1}  # the same


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return lavit.load("nano")


@contextmanager
def serving(pipeline: Pipeline, **options: Any) -> Iterator[tuple[str, Server]]:
    """A real server in a thread; yields its address."""
    app = create_app(pipeline, **options)
    limits = options.get("limits", Limits())
    config = uvicorn.Config(app, port=0, log_level="error", access_log=False)
    server = Server(config, app.state.service.worker, limits.stop_seconds)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", server
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def address(pipeline: Pipeline) -> Iterator[str]:
    limits = Limits(
        seconds=60.0, request_bytes=2**20, picture_pixels=2**20, pictures=3, prompt_tokens=600
    )
    with serving(pipeline, limits=limits) as (found, _):
        yield found


def client_of(address: str, key: str = "none") -> OpenAI:
    return OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[OpenAI]:
    with client_of(address) as found:
        yield found


PICTURE = toy_picture("red square", 64)
URL = data_url(encode(PICTURE))


def asking(words: str, detail: str = "auto") -> list[dict[str, Any]]:
    image = {"type": "image_url", "image_url": {"url": URL, "detail": detail}}
    return [{"role": "user", "content": [image, {"type": "text", "text": words}]}]


def talk(words: str) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": PICTURE}, {"type": "text", "text": words}]
    return [{"role": "user", "content": parts}]


def opened(encoded: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")


def same(encoded: str, picture: Image.Image) -> bool:
    """True but for the rounding of products, which depends on the batch."""
    a, b = (np.asarray(each).astype(int) for each in (opened(encoded), picture))
    return a.shape == b.shape and abs(a - b).mean() < 0.5


def test_a_chat_answers_as_the_pipeline_does(client: OpenAI, pipeline: Pipeline) -> None:
    expected = pipeline.chat(talk("what is it?"))["content"][0]["text"]
    kept = int(pipeline.tokenize(PICTURE).lengths[0])
    found = client.chat.completions.create(model="nano", messages=asking("what is it?"))
    assert found.choices[0].message.content == expected
    assert found.usage.prompt_tokens_details.image_tokens == kept
    assert found.usage.completion_tokens_details.text_tokens == found.usage.completion_tokens
    assert found.choices[0].finish_reason == "stop"

    how = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(
        client.chat.completions.create(model="nano", messages=asking("what is it?"), **how)
    )
    pieces = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(pieces) == expected
    assert chunks[-1].usage == found.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_options_of_a_chat(client: OpenAI, pipeline: Pipeline) -> None:
    create = client.chat.completions.create
    cut = create(model="nano", messages=asking("what is it?"), max_tokens=1)
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 1
    whole = create(model="nano", messages=asking("describe it")).choices[0].message.content
    stopped = create(model="nano", messages=asking("describe it"), stop=whole[1:3])
    assert stopped.choices[0].message.content == whole[:1].strip()
    sizes = {
        detail: create(model="nano", messages=asking("what is it?", detail), max_tokens=1)
        for detail in ("low", "high")
    }
    read = {name: one.usage.prompt_tokens_details.image_tokens for name, one in sizes.items()}
    assert read["low"] <= 25 and read["high"] == 100
    drawn = {"temperature": 1.5, "seed": 3, "max_tokens": 8}
    several = create(model="nano", messages=asking("describe it"), n=3, **drawn)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    alone = create(model="nano", messages=asking("describe it"), **(drawn | {"seed": 4}))
    assert several.choices[1].message.content == alone.choices[0].message.content


def test_pictures_are_those_of_the_pipeline(client: OpenAI, pipeline: Pipeline) -> None:
    expected = pipeline.draw([PROMPT] * 2, seed=3, **HOW)
    how = {"model": "nano", "prompt": PROMPT, "extra_body": {"seed": 3}, **LOW}
    found = client.images.generate(n=2, size="1024x1024", **how)
    assert all(same(i.b64_json, p) for i, p in zip(found.data, expected, strict=True))
    size = "{}x{}".format(*expected[0].size)
    assert found.size == size and found.usage.input_tokens_details.image_tokens == 0
    assert found.usage.output_tokens == found.usage.output_tokens_details.image_tokens > 0

    how["quality"] = "high"  # 4 solver steps; nano's own 2 have one partial image
    final = pipeline.draw(PROMPT, seed=3, steps=4)
    events = list(client.images.generate(stream=True, partial_images=2, **how))
    assert [event.type for event in events] == [
        *["image_generation.partial_image"] * 2,
        "image_generation.completed",
    ]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert same(events[-1].b64_json, final)
    assert not same(events[0].b64_json, final)
    assert 0 < events[-1].usage.output_tokens < found.usage.output_tokens


def test_every_address_edits_alike(client: OpenAI, pipeline: Pipeline) -> None:
    words, seeded = "make it blue", {"seed": 5}
    expected = pipeline.edit(PICTURE, words, seed=5)
    file = base64.b64decode(encode(PICTURE))
    upload = client.images.edit(model="nano", image=file, prompt=words, extra_body=seeded)
    assert same(upload.data[0].b64_json, expected)
    assert upload.usage.input_tokens_details.image_tokens > 0

    several = client.images.edit(
        model="nano", image=[file, file], prompt=words, stream=True, extra_body=seeded
    )
    (event,) = several
    assert event.type == "image_edit.completed"
    assert event.usage.input_tokens_details.image_tokens == (
        2 * upload.usage.input_tokens_details.image_tokens
    )

    how = {"model": "nano", "messages": asking(words), "modalities": ["image"], "seed": 5}
    message = client.chat.completions.create(**how).choices[0].message
    (shown,) = message.images
    assert same(shown["image_url"]["url"].partition(",")[2], expected)
    form = {"extra_body": {"picture_format": "content"}}
    (part,) = client.chat.completions.create(**how, **form).choices[0].message.content
    assert part == shown
    deltas = [c.choices[0].delta for c in client.chat.completions.create(**how, stream=True)]
    assert [delta.images for delta in deltas if hasattr(delta, "images")] == [[shown]]

    image, words = {"type": "input_image", "image_url": URL}, {"type": "input_text", "text": words}
    found = client.responses.create(
        model="nano",
        input=[{"role": "user", "content": [image, words]}],
        tools=[{"type": "image_generation"}],
        tool_choice="required",
        extra_body=seeded,
    )
    (call,) = found.output
    assert (call.type, call.status, found.status) == (
        "image_generation_call", "completed", "completed",
    )  # fmt: skip
    assert same(call.result, expected)


def test_a_reply_goes_on_from_the_codes_of_its_pictures(client: OpenAI) -> None:
    begun = [{"role": "user", "content": PROMPT}]
    drawing = {"model": "nano", "modalities": ["image"], "seed": 1}
    first = client.chat.completions.create(messages=begun, **drawing).choices[0].message
    sent = [*begun, first.model_dump(exclude_none=True), {"role": "user", "content": "again"}]
    read = client.chat.completions.create(messages=sent, **drawing).usage
    assert read.prompt_tokens_details.image_tokens == len(first.images[0]["codes"])


def test_responses_stream(client: OpenAI) -> None:
    create = client.responses.create
    plain = create(model="nano", input="what is a star?", instructions="be brief")
    events = list(
        create(model="nano", input="what is a star?", instructions="be brief", stream=True)
    )
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created" and events[-1].type == "response.completed"
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == plain.output_text == events[-1].response.output_text
    assert events[-1].response.usage == plain.usage

    tool = {"type": "image_generation", "partial_images": 2, "quality": "high"}
    how = {"tools": [tool], "tool_choice": {"type": "image_generation"}, "stream": True}
    events = list(create(model="nano", input=PROMPT, **how))
    names = [event.type.removeprefix("response.") for event in events]
    call = "image_generation_call"
    assert names == [
        "created", "in_progress", "output_item.added", f"{call}.in_progress", f"{call}.generating",
        f"{call}.partial_image", f"{call}.partial_image", f"{call}.completed", "output_item.done",
        "completed",
    ]  # fmt: skip
    assert [e.partial_image_index for e in events if "partial" in e.type] == [0, 1]
    assert opened(events[-1].response.output[0].result).size == (80, 80)
    assert events[-1].response.usage.output_tokens > 0


def test_callers_share_one_session(client: OpenAI, pipeline: Pipeline, address: str) -> None:
    prompts = ["a red star", "a blue moon", "two owls", "a green square"]
    expected = [pipeline.draw(prompt, seed=7, **HOW) for prompt in prompts]
    lanes: list[float] = []

    def draw(prompt: str) -> str:
        how = {"extra_body": {"seed": 7}, **LOW}
        found = client.images.generate(model="nano", prompt=prompt, **how)
        return found.data[0].b64_json

    with ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(draw, prompt) for prompt in prompts]
        while not all(future.done() for future in waiting):
            lines = httpx2.get(f"{address}/metrics").text.splitlines()
            lanes += [float(line.split()[1]) for line in lines if line.startswith("lavit_lanes ")]
            time.sleep(0.02)
    assert all(same(f.result(), p) for f, p in zip(waiting, expected, strict=True))
    assert max(lanes) > 2  # one guided drawing takes two


def test_tokens_models_health_and_metrics(address: str, client: OpenAI, pipeline: Pipeline) -> None:
    assert [model.id for model in client.models.list()] == ["nano"]
    assert client.models.retrieve("nano").id == "nano"
    tokens = httpx2.post(f"{address}/v1/tokenize", json={"image": URL, "keep": 0.2}).json()
    expected = pipeline.tokenize(PICTURE, keep=0.2)
    assert tokens["codes"] == expected.codes.tolist() and tokens["tokens"] == 20
    assert tokens["kept"] == expected.keep[0].nonzero()[:, 0].tolist()
    assert httpx2.get(f"{address}/health").json() == {"status": "ok"}
    text = httpx2.get(f"{address}/metrics").text
    for name in ("requests_total", "tokens_total", "waiting", "lanes", "first_token_seconds_sum"):
        assert f"lavit_{name}" in text


BOMB = io.BytesIO()
Image.new("1", (6000, 6000)).save(BOMB, "PNG")
CHAT, DRAW, EDIT = "/v1/chat/completions", "/v1/images/generations", "/v1/images/edits"


def shown(url: str) -> dict[str, Any]:
    item = {"type": "image_url", "image_url": {"url": url}}
    return {"messages": [{"role": "user", "content": [item]}]}


GLASS = {"type": "image_generation", "background": "transparent"}


@pytest.mark.parametrize(
    ("path", "body", "status", "word"),
    [
        (CHAT, {"messages": "hello"}, 422, "messages"),
        (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, 422, "role"),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "model": "gpt"}, 404, "gpt"),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "n": 99}, 400, "n is 99"),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "tools": [1]}, 422, "tools"),
        (DRAW, {"prompt": "a b " * 999}, 400, "prompt"),
        (CHAT, {"messages": [{"role": "assistant", "content": "a"}]}, 400, "user"),
        (CHAT, {"messages": [{"role": "user", "content": ""}]}, 400, "empty"),
        (CHAT, shown("/etc/hostname"), 400, "data URL"),
        (CHAT, shown("file:///etc/hostname"), 400, "data URL"),
        (CHAT, shown("http://127.0.0.1/a.png"), 400, "data URL"),
        (CHAT, shown("data:image/png;base64,AAAA"), 400, "no picture"),
        (CHAT, shown("data:image/png;base64,%%"), 400, "data URL"),
        (CHAT, shown(data_url(base64.b64encode(BOMB.getvalue()).decode())), 400, "6000x6000"),
        (CHAT, {"messages": shown(URL)["messages"] * 4}, 400, "4 pictures"),
        (DRAW, {"prompt": ""}, 422, "prompt"),
        (DRAW, {"prompt": "  "}, 400, "prompt"),
        (DRAW, {"prompt": "a", "size": "7x7"}, 400, "7x7"),
        (DRAW, {"prompt": "a", "partial_images": 9}, 422, "partial_images"),
        (DRAW, {"prompt": "a" * 2**20}, 413, "bytes"),
        (EDIT, {"prompt": "a"}, 400, "0 pictures"),
        (EDIT, {"image": URL}, 422, "prompt"),
        ("/v1/responses", {"input": []}, 422, "input"),
        ("/v1/responses", {"input": "a", "previous_response_id": "b"}, 422, "previous"),
        (EDIT, {"image": URL, "prompt": "a", "mask": {"image_url": URL}}, 422, "mask"),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "top_k": 5}, 422, "top_k"),
        ("/v1/responses", {"input": "a", "conversation": "c"}, 422, "conversation"),
        ("/v1/responses", {"input": "a", "text": {"format": {"type": "json_schema"}}}, 422, "text"),
        ("/v1/responses", {"input": "a", "tools": [GLASS]}, 422, "background"),
        ("/v1/tokenize", {"image": URL, "keep": "most"}, 400, "keep"),
        ("/v1/nothing", {}, 404, "address"),
        ("/health", {}, 405, "method"),
    ],
)  # fmt: skip
def test_wrong_requests(address: str, path: str, body: dict, status: int, word: str) -> None:
    found = httpx2.post(address + path, json=body)
    error = found.json()["error"]
    assert (found.status_code, error.keys()) == (status, {"message", "type", "param", "code"})
    assert word in error["message"]
    assert "src/lavit" not in found.text and "Traceback" not in found.text


@pytest.mark.parametrize(
    ("path", "content", "kind"),
    [
        (CHAT, b"{", "application/json"),
        (CHAT, b"[" * 100_000, "application/json"),
        (CHAT, b'{"messages": ' + b"9" * 5000 + b"}", "application/json"),
        (CHAT, b'{"messages": [{"role": "user", "content": "\xff"}]}', "application/json"),
        (CHAT, b"a=b", "application/x-www-form-urlencoded"),
        (EDIT, b"{", "application/json"),
        (EDIT, b"--x\r\nnothing", "multipart/form-data; boundary=x"),
        (EDIT, b"nothing", "multipart/form-data"),
        (EDIT, b"", "text/plain"),
    ],
)
def test_broken_bodies(address: str, path: str, content: bytes, kind: str) -> None:
    found = httpx2.post(address + path, content=content, headers={"content-type": kind})
    assert 400 <= found.status_code < 500 and found.json()["error"]["message"]


def test_errors_are_those_that_clients_know(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="gpt", messages=asking("?"))
    with pytest.raises(openai.BadRequestError, match="U\\+E000"):  # before a stream begins
        client.chat.completions.create(model="nano", messages=asking("\ue000"), stream=True)


def test_the_gate(pipeline: Pipeline) -> None:
    limits = Limits(requests=1, body_seconds=0.3)
    with serving(pipeline, keys=["k" * 16, "l" * 16], limits=limits) as (address, _):
        for key in ("x", "k" * 15, "k" * 17):
            refused = httpx2.get(f"{address}/v1/models", headers={"authorization": f"Bearer {key}"})
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
        assert httpx2.get(f"{address}/metrics").status_code == 401
        assert httpx2.get(f"{address}/health").status_code == 200
        with client_of(address, "l" * 16) as known, client_of(address, "k" * 16) as again:
            assert known.models.list().data
            with known.images.generate(model="nano", prompt=PROMPT, stream=True) as running:
                with pytest.raises(openai.RateLimitError) as full:
                    again.images.generate(model="nano", prompt=PROMPT)
                assert full.value.response.headers["retry-after"] == "1"
                assert [event.type for event in running] == ["image_generation.completed"]
        name = {"authorization": "Bearer " + "k" * 16}
        twice = [*name.items(), ("content-type", "application/json"), ("content-type", MIXED)]
        many = httpx2.post(address + CHAT, content=b"[" + b"[]," * 10**6, headers=twice)
        assert many.status_code == 413  # a second type does not make JSON a form
        long = httpx2.stream("POST", address + DRAW, content=slowly(), headers=name)
        with long as answer:
            assert answer.status_code == 408


def slowly() -> Iterator[bytes]:
    yield b'{"prompt": "'
    time.sleep(0.6)
    yield b'a"}'


def test_without_a_key_other_names_are_refused(address: str) -> None:
    found = httpx2.get(f"{address}/v1/models", headers={"host": "rebound.example:80"})
    assert found.status_code == 403 and found.json()["error"]["code"] == "invalid_host"


def test_keys(tmp_path: Path) -> None:
    assert keys_of(None, "127.0.0.1") == keys_of(None, "::1") == keys_of(None, "localhost") == []
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.com"):
        with pytest.raises(InputError, match="--api-key-file"):
            keys_of(None, host)
    file = tmp_path / "keys"
    for text in ("", "short\n"):
        file.write_text(text)
        with pytest.raises(InputError, match="16 characters"):
            keys_of(file, "0.0.0.0")
    file.write_text("a" * 16 + "\n\n" + "b" * 20 + "\n")
    assert keys_of(file, "0.0.0.0") == ["a" * 16, "b" * 20]


def test_a_client_that_leaves_frees_its_lanes(pipeline: Pipeline) -> None:
    async def run() -> None:
        worker = Worker(pipeline, Limits(), ServerMetrics())
        steps = 0
        step = worker.running.session.step

        def counted():
            nonlocal steps
            steps += 1
            return step()

        worker.running.session.step = counted
        talk = [{"role": "user", "content": PROMPT}]
        endless = Sampling(max_tokens=2000, min_tokens=1999)
        order = Order(lambda pipe: pipe.replies(talk, "text", sampling=endless), n=3)
        ticket, prompt = await worker.open(order)
        assert prompt.text > 0 and prompt.image == 0
        async for _ in ticket:
            break
        assert worker.lanes == 3
        ticket.close()
        before = steps
        while worker.running.busy:
            await asyncio.sleep(0.001)
        assert worker.lanes == 0 and steps - before <= 3  # one may run when it leaves
        worker.stop()
        worker.join()

    asyncio.run(run())


@pytest.mark.parametrize("error", [ZeroDivisionError("zero"), InputError("no numbers")])
def test_a_failing_step_ends_its_requests_alone(pipeline: Pipeline, error: Exception) -> None:
    def fails() -> list:
        raise error

    async def run() -> None:
        worker = Worker(pipeline, Limits(), ServerMetrics())
        talk = [{"role": "user", "content": "hello"}]
        order = Order(lambda pipe: pipe.replies(talk, "text", sampling=Sampling(max_tokens=4)))
        session, step = worker.running.session, worker.running.session.step
        session.step = fails
        ticket, _ = await worker.open(order)
        with pytest.raises(RuntimeError, match=str(error)) as failed:
            async for _ in ticket:
                pass
        assert api_error(failed.value).status_code == 500
        ticket.close()
        assert worker.running.session is not session and step is not None
        ticket, _ = await worker.open(order)
        assert [update.kind async for update in ticket][-1] == "finished"
        ticket.close()
        worker.stop()
        worker.join()

    asyncio.run(run())


def test_calls_that_wait_are_told_when_the_server_stops(pipeline: Pipeline) -> None:
    async def run() -> None:
        worker, held = Worker(pipeline, Limits(), ServerMetrics()), threading.Event()
        began = threading.Event()

        def hold(_: Pipeline) -> str:
            began.set()
            held.wait(10)
            return "done"

        first = asyncio.ensure_future(worker.call(hold))
        await asyncio.to_thread(began.wait, 10)
        gone, second = (asyncio.ensure_future(worker.call(hold)) for _ in range(2))
        await asyncio.sleep(0)
        gone.cancel()
        worker.stop()
        with pytest.raises(ApiError, match="stopping"):
            await second
        held.set()
        assert await first == "done"
        worker.join()

    asyncio.run(run())


def test_words_behind_a_picture_wait_for_it(pipeline: Pipeline) -> None:
    picture = Image.new("RGB", (8, 8))
    words = [Update(0, "text", text=text) for text in ("before", "behind", ".")]
    drawn = [Update(0, "image", codes=(1,)), Update(0, "image", codes=(1,), picture=picture)]
    end = Update(0, "finished", tokens=3, reason="end")
    updates = [words[0], drawn[0], words[1], words[2], drawn[1], end]

    async def run(form: str) -> list[str]:
        service = Service(pipeline, Limits())
        ticket = Ticket(Order(lambda pipe: pipe.replies([], "auto")), 60, lambda _: None)
        for update in updates:
            ticket.take(update)
        body = ChatRequest(messages=asking("draw"), picture_format=form)
        lines = [line async for line in _chunks(service, ticket, PromptSize(1, 0), body)]
        ticket.close()
        service.close()
        deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines[:-1]]
        kinds = [each.get("content") or each.get("images") for each in deltas]
        return ["picture" if isinstance(kind, list) else kind for kind in kinds if kind]

    assert asyncio.run(run("content")) == ["before", "picture", "behind."]
    assert asyncio.run(run("images")) == ["before", "behind", ".", "picture"]


def test_time_is_bounded_and_streams_end_with_an_error(pipeline: Pipeline) -> None:
    late = pytest.raises(openai.InternalServerError, match="seconds")
    server = serving(pipeline, limits=Limits(seconds=0.05))
    with server as (address, _), client_of(address) as client, late:
        client.images.generate(model="nano", prompt=PROMPT, n=4)


def test_a_connection_that_breaks_ends_its_request(pipeline: Pipeline) -> None:
    with serving(pipeline) as (address, server):
        endless = {"messages": asking("describe it"), "n": 10, "temperature": 2, "stream": True}
        with httpx2.stream("POST", address + CHAT, json=endless | {"max_tokens": 1500}) as answer:
            next(answer.iter_lines())
            until = time.monotonic() + 30
            while len(server.worker.tickets) != 1:  # its first line may leave before it is taken up
                assert time.monotonic() < until
                time.sleep(0.001)
        while server.worker.tickets or server.worker.lanes:
            assert time.monotonic() < until
            time.sleep(0.01)


@pytest.mark.parametrize(("grace", "ends"), [(60.0, "completed"), (0.0, "error")])
def test_a_server_that_stops_finishes_or_says_so(
    pipeline: Pipeline, grace: float, ends: str
) -> None:
    with serving(pipeline, limits=Limits(stop_seconds=grace)) as (address, server):
        body = {"prompt": PROMPT, "stream": True, "n": 6}
        with httpx2.stream("POST", address + DRAW, json=body, timeout=60) as answer:
            server.should_exit = True
            lines = [line for line in answer.iter_lines() if line.startswith("event: ")]
    assert lines[-1].endswith(ends)


PRIVATE = (
    "http://127.0.0.1/a.png", "http://169.254.169.254/latest", "http://[::1]/a.png",
    "http://0x7f000001/a.png", "http://2130706433/a.png", "http://127.1/a.png",
    "http://10.0.0.1/a.png", "http://[::ffff:127.0.0.1]/a.png", "http://[64:ff9b::7f00:1]/a.png",
    "http://rebound.example/a.png", "http://good.example:8080/a.png", "http://a@good.example/a.png",
    "ftp://good.example/a.png", "http://other.example/a.png", "http://good.example:99999/a.png",
    "http://[broken/a.png", "https://good.example:80/a.png",
)  # fmt: skip


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What would be connected to; names of example resolve without a name server."""
    made: list[tuple[str, int]] = []
    real = socket.getaddrinfo

    def resolve(host: str, port: int, **how: Any) -> list:
        known = {"good.example": "93.184.216.34", "rebound.example": "10.1.2.3"}
        if host.endswith(".example"):
            return [(2, 1, 6, "", (known.get(host, "93.184.216.35"), port))]
        return real(host, port, **how)

    def connect(where: tuple[str, int], timeout: float) -> socket.socket:
        made.append(where)
        raise ConnectionRefusedError(f"{where}")

    monkeypatch.setattr(fetch.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(fetch.socket, "create_connection", connect)
    return made


@pytest.mark.parametrize("url", PRIVATE)
def test_addresses_that_are_not_public_are_never_connected_to(
    url: str, connections: list[tuple[str, int]]
) -> None:
    hosts = [fetch.urlsplit(each).hostname for each in PRIVATE[:10]]
    with pytest.raises(ApiError) as refused:
        fetch.Fetcher([*map(str, hosts), "good.example"], 1000).get(url)
    assert connections == [] and refused.value.status_code == 400
    assert "10.1.2.3" not in refused.value.message


def answering(answers: list[bytes]) -> Callable[..., socket.socket]:
    """Connections to a server that gives these answers in turn."""

    def connect(where: tuple[str, int], timeout: float) -> socket.socket:
        here, there = socket.socketpair()
        there.sendall(answers.pop(0))
        there.shutdown(socket.SHUT_WR)
        kept.append((where, there))
        return here

    kept: list[tuple[tuple[str, int], socket.socket]] = []
    connect.kept = kept
    return connect


def test_fetching(connections: list, monkeypatch: pytest.MonkeyPatch) -> None:
    fetcher = fetch.Fetcher(["good.example", "127.0.0.1"], 10)
    moved = b"HTTP/1.1 302 Found\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n"
    fine = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabcd"
    for answers, expected in (
        ([fine], b"abcd"),
        ([moved % b"/there.png", fine], b"abcd"),
        ([moved % b"http://127.0.0.1/a.png"], "not fetched"),
        ([moved % b"http://other.example/a.png"], "not fetched"),
        ([moved % b"/"] * 9, "cannot be fetched"),
        ([b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n"], "cannot be fetched"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 40\r\n\r\n" + b"a" * 40], "larger than 10"),
    ):
        connect = answering(list(answers))
        monkeypatch.setattr(fetch.socket, "create_connection", connect)
        if isinstance(expected, bytes):
            assert fetcher.get("http://good.example/a.png") == expected
        else:
            with pytest.raises(ApiError, match=expected):
                fetcher.get("http://good.example/a.png")
        assert {where for where, _ in connect.kept} == {("93.184.216.34", 80)}
        for _, there in connect.kept:
            there.close()


def test_a_picture_that_drips_in_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dripping(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(4096)
            self.request.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n")
            with contextlib.suppress(OSError):
                for _ in range(100):
                    self.request.sendall(b"x")
                    time.sleep(0.05)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Dripping) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(fetch, "SECONDS", 0.3)
        monkeypatch.setattr(fetch, "PORTS", {"http": server.server_address[1]})
        monkeypatch.setattr(fetch, "public_address", lambda host, port: "127.0.0.1")
        started = time.monotonic()
        with pytest.raises(ApiError, match="cannot be fetched"):
            fetch.Fetcher(["slow.example"], 1000).get("http://slow.example/a.png")
        assert time.monotonic() - started < 3
        server.shutdown()


def test_an_error_hides_the_models_folder_alone() -> None:
    said = api_error(InputError("run: truncated, see run/config.json"), "run").message
    assert said == "MODEL: truncated, see MODEL/config.json"


def test_small_functions(pipeline: Pipeline) -> None:
    assert preview_steps(3, 12) == [2, 5, 8] and preview_steps(0, 12) == []
    assert preview_steps(3, 2) == [0] and preview_steps(3, 1) == []
    pixels = pipeline.model.pixels
    sizes = {"auto": None, "96x96": (96, 96), "120x72": (72, 120), "1536x1024": "3:2", "3:2": "3:2"}
    assert {size: canvas(pixels, size) for size in sizes} == sizes
    for wrong in ("0x96", "97x96", "9600x96", "big"):
        with pytest.raises(InputError, match=wrong):
            canvas(pixels, wrong)
    assert data_of("data:,".replace(",", ";base64,YQ==")) == b"a"

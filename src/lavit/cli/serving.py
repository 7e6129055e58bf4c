"""The verb that serves a model over HTTP."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

from lavit.cli.output import (
    DEFAULT_MODEL,
    Model,
    Protocol,
    Safety,
    Watermark,
    Words,
    arg,
    load_model,
)
from lavit.config import InputError, require

Keys = Annotated[Path | None, arg(help="a file of keys, one a line; without, only localhost")]
Page = Annotated[bool, arg(help="serve a page at /web too: ask, draw, see the tokens")]
Replicas = Annotated[int, arg(help="processes that serve, each with a model, on Ray Serve")]
Hosts = Annotated[tuple[str, ...], arg(help="hosts that pictures may be fetched from (none)")]


def serve(
    model: Words[Model] = DEFAULT_MODEL,
    /,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: Keys = None,
    fetch_hosts: Hosts = (),
    protocol: Protocol = "default",
    safety: Safety = True,
    watermark: Watermark = None,
    web: Page = False,
    replicas: Replicas = 1,
) -> None:
    """Serve a model to OpenAI's clients: chat, images, edits, responses, streamed."""
    for package in ("fastapi", "uvicorn", "python_multipart", "prometheus_client"):
        require(package, extra="serve")
    if web:
        require("gradio", extra="demo")
    if replicas < 1 or (web and replicas > 1):
        said = f"replicas is {replicas}: give a number of at least 1"
        raise InputError("the page runs beside one model: leave --replicas out" if web else said)
    from lavit.serve import server

    keys = server.keys_of(api_key_file, host)
    checked = None if safety else False  # None: as the model says
    load = partial(load_model, model, protocol=protocol, safety=checked, watermark=watermark)
    if replicas == 1:
        server.serve(load(), host=host, port=port, keys=keys, fetch_hosts=fetch_hosts, web=web)
        return
    require("ray.serve", extra="replicas")
    from lavit.serve.replicas import serve_replicas
    from lavit.storage import model_folder

    model_folder(model)  # a wrong name is said once, not by each replica
    serve_replicas(load, replicas, host=host, port=port, keys=keys, fetch_hosts=fetch_hosts)

"""The verb that serves a model over HTTP."""

from __future__ import annotations

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
from lavit.config import require

Keys = Annotated[Path | None, arg(help="a file of keys, one a line; without, only localhost")]
Page = Annotated[bool, arg(help="serve a page at /web too: ask, draw, see the tokens")]
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
) -> None:
    """Serve a model to OpenAI's clients: chat, images, edits, responses, streamed."""
    for package in ("fastapi", "uvicorn", "python_multipart", "prometheus_client"):
        require(package, extra="serve")
    if web:
        require("gradio", extra="demo")
    from lavit.serve import server

    keys = server.keys_of(api_key_file, host)
    checked = None if safety else False  # None: as the model says
    pipeline = load_model(model, protocol=protocol, safety=checked, watermark=watermark)
    server.serve(pipeline, host=host, port=port, keys=keys, fetch_hosts=fetch_hosts, web=web)

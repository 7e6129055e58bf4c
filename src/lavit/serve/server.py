"""`lavit serve`: the application under uvicorn, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from lavit.config import InputError
from lavit.generate.pipeline import Pipeline
from lavit.serve.app import create_app
from lavit.serve.gate import PAGE, is_loopback
from lavit.serve.limits import Limits
from lavit.serve.worker import Worker

log = logging.getLogger(__name__)
SHORTEST_KEY = 16  # characters
LAST_WORDS = 5  # seconds in which errors of stopped requests are sent


def keys_of(file: Path | None, host: str) -> list[str]:
    """The keys of a file, one a line; without one, only the loopback may be served.

    Raises `InputError` for a file that cannot be read, or keys that are easily guessed.
    """
    if file is None:
        if not is_loopback(host):
            said = f"{host} can be reached from elsewhere and there is no key"
            raise InputError(f"{said}: give --api-key-file, or serve 127.0.0.1")
        return []
    try:
        keys = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the keys cannot be read from {file}: {error}") from error
    if not keys or min(map(len, keys)) < SHORTEST_KEY:
        said = f"{file} holds no key, or one of less than {SHORTEST_KEY} characters"
        raise InputError(f"{said}: write one key a line, such as `openssl rand -hex 24` gives")
    return keys


class Server(uvicorn.Server):
    """Told to stop, it takes no new requests; those that run have `grace` seconds to finish."""

    def __init__(self, config: uvicorn.Config, worker: Worker, grace: float) -> None:
        super().__init__(config)
        self.worker, self.grace = worker, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop, ending what takes too long with an error."""
        asyncio.get_running_loop().call_later(self.grace, self.worker.stop)
        await super().shutdown(sockets)


def serve(
    pipeline: Pipeline,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    keys: Sequence[str] = (),
    fetch_hosts: Sequence[str] = (),
    limits: Limits | None = None,
    web: bool = False,
) -> None:
    """Serve a loaded model until the process is told to stop; `web`: with the page at /web."""
    limits = limits or Limits()
    app = create_app(pipeline, keys=keys, limits=limits, fetch_hosts=fetch_hosts, web=web)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(limits.stop_seconds + LAST_WORDS),
    )
    log.info("%s at http://%s:%d/v1", app.state.service.name, host, port)
    if web:
        log.info("the page is at http://%s:%d%s", host, port, PAGE)
    Server(config, app.state.service.worker, limits.stop_seconds).run()

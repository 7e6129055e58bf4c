"""`lavit serve --replicas N`: the application N times on Ray Serve, behind its one address."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import ray
import torch
from fastapi import FastAPI
from ray import serve

from lavit.generate.pipeline import Pipeline
from lavit.serve.app import create_app
from lavit.serve.limits import Limits


def serve_replicas(
    load: Callable[[], Pipeline],
    count: int,
    *,
    host: str,
    port: int,
    keys: Sequence[str] = (),
    fetch_hosts: Sequence[str] = (),
) -> None:
    """Serve `count` models, each opened by `load` in a process of its own, until Ctrl-C.

    Each has its own session, queue and limits, and a GPU where there is one.
    """
    limits = Limits()

    def build() -> FastAPI:
        return create_app(load(), keys=keys, limits=limits, fetch_hosts=fetch_hosts)

    # Ray's 5 seconds are too few to import it on a busy machine; its controller reads this
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")
    ray.init(include_dashboard=False, ignore_reinit_error=True)
    serve.start(http_options={"host": host, "port": port})
    replica = serve.deployment(
        serve.ingress(build)(),
        name="lavit",
        num_replicas=count,
        max_ongoing_requests=2 * limits.requests,  # past its own limit a replica answers 429
        max_queued_requests=limits.requests,
        graceful_shutdown_timeout_s=limits.stop_seconds,
        ray_actor_options={"num_cpus": 0, "num_gpus": int(torch.cuda.is_available())},
    )
    try:
        serve.run(replica.bind(), blocking=True)
    finally:
        serve.shutdown()

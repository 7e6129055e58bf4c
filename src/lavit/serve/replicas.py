"""`lavit serve --replicas N`: the application N times on Ray Serve, behind its one address."""

from __future__ import annotations

import logging
import os
import queue
import signal
from collections.abc import Callable, Sequence

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig

from lavit.config import InputError
from lavit.generate.pipeline import Pipeline
from lavit.serve.app import create_app
from lavit.serve.limits import Limits

log = logging.getLogger(__name__)
APP = "lavit"
# Ray gives its proxy 5 and its start 60 seconds, too few to import it on a busy machine
PATIENCE = ("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "RAY_raylet_start_wait_time_s")


def serve_replicas(
    load: Callable[[], Pipeline],
    count: int,
    *,
    host: str,
    port: int,
    keys: Sequence[str] = (),
    fetch_hosts: Sequence[str] = (),
) -> None:
    """Serve `count` models, each opened by `load` in a process of its own, until SIGTERM or Ctrl-C.

    Each has its own session, queue and limits, and its share of the cores and GPUs of the cluster:
    that of RAY_ADDRESS, else this machine. Raises `InputError` for more replicas than cores.
    """
    limits = Limits()

    def build() -> FastAPI:
        return create_app(load(), keys=keys, limits=limits, fetch_hosts=fetch_hosts)

    for name in PATIENCE:
        os.environ.setdefault(name, "300")
    quiet = {"include_dashboard": False, "logging_level": logging.ERROR, "log_to_driver": False}
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    ray.init(**quiet)
    try:
        has = ray.cluster_resources()
        if count > has["CPU"]:
            said = f"replicas is {count}, and there are {has['CPU']:g} cores"
            raise InputError(f"{said}: a replica needs one")
        nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
        cores = int(min(has["CPU"] // count, *filter(None, nodes)))  # which one node has
        serve.start(
            http_options=HTTPOptions(host=host, port=port),
            logging_config=LoggingConfig(log_level="ERROR", enable_access_log=False),
        )
        replica = serve.deployment(
            serve.ingress(build)(),
            name=APP,
            num_replicas=count,
            max_ongoing_requests=2 * limits.requests,  # past its own limit a replica answers 429
            graceful_shutdown_timeout_s=limits.stop_seconds,
            ray_actor_options={
                "num_cpus": cores,  # as many threads have its products
                "num_gpus": min(1, has.get("GPU", 0) / count),
            },
        )
        serve.run(replica.bind(), name=APP)
        told: queue.SimpleQueue[int] = queue.SimpleQueue()
        for kind in (signal.SIGTERM, signal.SIGINT):
            signal.signal(kind, lambda number, _: told.put(number))
        log.info("%d replicas at http://%s:%d/v1", count, host, port)
        number = told.get()
        serve.delete(APP)  # what runs is answered first; a shutdown alone would cut it off
        serve.shutdown()
    finally:
        ray.shutdown()
    raise SystemExit(128 + number)  # as a shell says it

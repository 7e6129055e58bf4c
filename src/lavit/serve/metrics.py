"""What /metrics shows, in the form of Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class ServerMetrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("lavit_requests", "requests", ["path", "status"], **own)
        self.tokens = Counter("lavit_tokens", "tokens", ["way", "modality"], **own)
        self.first = Histogram(
            "lavit_first_token_seconds", "until the first token", buckets=SECONDS, **own
        )
        self.picture = Histogram(
            "lavit_picture_seconds", "until a picture is painted", buckets=SECONDS, **own
        )

    def watch(self, name: str, about: str, value: Callable[[], float]) -> None:
        """A gauge whose value is asked for when it is read."""
        Gauge(f"lavit_{name}", about, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self.registry)

"""What every request passes before anything reads it: key, host, number, size and time."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from lavit.serve.errors import ApiError, busy, too_slow
from lavit.serve.limits import Limits
from lavit.serve.metrics import ServerMetrics

Scope = MutableMapping[str, Any]
AsgiMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[AsgiMessage]]
Send = Callable[[AsgiMessage], Awaitable[None]]
OPEN = ("/health",)  # needs no key


def is_loopback(host: str) -> bool:
    """True for the names and addresses of this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Gate:
    """An ASGI middleware. Without keys it answers only to names of the loopback.

    (A web page elsewhere whose name leads to 127.0.0.1 sends its own name.)
    """

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        limits: Limits,
        metrics: ServerMetrics,
        keys: Sequence[str],
    ) -> None:
        self.app, self.limits, self.metrics, self.keys = app, limits, metrics, keys
        self.requests = 0  # that came and are not answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = Answer(send)
        try:
            if (refusal := self._refusal(scope)) is not None:
                await refusal.response()(scope, receive, answer.send)
                return
            self.requests += scope["method"] == "POST"
            try:
                body = Body(receive, self.limits)
                async with asyncio.timeout(self.limits.seconds + self.limits.stop_seconds):
                    await self.app(scope, body.receive, answer.send)
            except TimeoutError:
                if not answer.status:
                    slow = too_slow(self.limits.seconds).response()
                    await slow(scope, receive, answer.send)
            finally:
                self.requests -= scope["method"] == "POST"
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, str(answer.status)).inc()

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if scope["path"] not in OPEN:
            if not self.keys:
                host = headers.get(b"host", b"").decode("latin-1")
                name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
                if not is_loopback(name.strip("[]")):
                    said = "without a key this server answers only to localhost"
                    return ApiError(403, said, code="invalid_host")
            elif not self._known(headers.get(b"authorization", b"")):
                said = "give a key of this server: Authorization: Bearer KEY"
                bearer = {"WWW-Authenticate": "Bearer"}
                return ApiError(401, said, code="invalid_api_key", headers=bearer)
        if scope["method"] == "POST" and self.requests >= self.limits.requests:
            return busy()
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.limits.request_bytes:
            return too_large(self.limits)
        return None

    def _known(self, authorization: bytes) -> bool:
        scheme, _, given = authorization.partition(b" ")
        given = given.strip()
        # all keys are compared, each in constant time
        same = [hmac.compare_digest(given, key.encode()) for key in self.keys]
        return scheme.lower() == b"bearer" and any(same)


def too_large(limits: Limits) -> ApiError:
    """A body is longer than is taken."""
    said = f"the request has more than {limits.request_bytes} bytes"
    return ApiError(413, said, code="request_too_large")


class Answer:
    """What is sent, and its status (0: nothing yet)."""

    def __init__(self, send: Send) -> None:
        self._send, self.status = send, 0

    async def send(self, message: AsgiMessage) -> None:
        """Pass a message on."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)


class Body:
    """What is received: at most so many bytes, in at most so many seconds."""

    def __init__(self, receive: Receive, limits: Limits) -> None:
        self._receive, self.limits = receive, limits
        self.bytes, self.whole = 0, False
        self.until = asyncio.get_running_loop().time() + limits.body_seconds

    async def receive(self) -> AsgiMessage:
        """The next message; raises `ApiError` where a limit is passed."""
        if self.whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self.until):
                message = await self._receive()
        except TimeoutError as error:
            said = f"the request did not arrive within {self.limits.body_seconds:g} seconds"
            raise ApiError(408, said, code="timeout") from error
        if message["type"] == "http.request":
            self.bytes += len(message.get("body", b""))
            self.whole = not message.get("more_body", False)
            if self.bytes > self.limits.request_bytes:
                raise too_large(self.limits)
        return message

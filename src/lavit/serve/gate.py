"""What every request passes before anything reads it: key, host, number, size and time."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any

from lavit.serve.errors import ApiError, busy, too_slow
from lavit.serve.limits import Limits
from lavit.serve.metrics import ServerMetrics

Scope = MutableMapping[str, Any]
AsgiMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[AsgiMessage]]
Send = Callable[[AsgiMessage], Awaitable[None]]
OPEN = ("/health",)  # needs no key
PAGE = "/web"  # the web page, which asks for a key itself


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
        explain: Callable[[Exception], ApiError],
    ) -> None:
        self.app, self.limits, self.metrics, self.keys = app, limits, metrics, keys
        self.explain = explain
        self.requests = 0  # that came and are not answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # there are no websockets
            await send({"type": "websocket.close", "code": 1008})
            return
        answer = Answer(send)
        try:
            if (refusal := self._refusal(scope)) is not None:
                await refusal.response()(scope, receive, answer.send)
                return
            posted = scope["method"] == "POST"
            self.requests += posted
            try:
                body = Body(receive, self.limits, _is_form(scope))
                most = self.limits.seconds + self.limits.stop_seconds if posted else None
                async with asyncio.timeout(most):
                    await self.app(scope, body.receive, answer.send)
            except TimeoutError:
                if not answer.status:
                    slow = too_slow(self.limits.seconds).response()
                    await slow(scope, receive, answer.send)
            except Exception as error:
                failed = self.explain(error).response()
                if answer.status:  # the answer has begun: breaking the connection says so
                    raise
                await failed(scope, receive, answer.send)
            finally:
                self.requests -= posted
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, str(answer.status)).inc()

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        path = scope["path"]
        if path not in OPEN:
            if not self.keys:
                # a page elsewhere may not send forms here either; a browser says whose it is
                hosts = [headers.get(b"host", b""), headers.get(b"origin", b"localhost")]
                if not all(is_loopback(_name(host.decode("latin-1"))) for host in hosts):
                    said = "without a key this server answers only to localhost"
                    return ApiError(403, said, code="invalid_host")
            elif not (path + "/").startswith(f"{PAGE}/") and not self._known(headers):
                said = "give a key of this server: Authorization: Bearer KEY"
                bearer = {"WWW-Authenticate": "Bearer"}
                return ApiError(401, said, code="invalid_api_key", headers=bearer)
        if scope["method"] == "POST" and self.requests >= self.limits.requests:
            return busy()
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.limits.request_bytes:
            return too_large(self.limits)
        return None

    def _known(self, headers: Mapping[bytes, bytes]) -> bool:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        return is_key(given.strip(), self.keys) and scheme.lower() == b"bearer"


def is_key(given: bytes, keys: Sequence[str]) -> bool:
    """True for one of the keys; all are compared, each in constant time."""
    return any([hmac.compare_digest(given, key.encode()) for key in keys])


def _name(host: str) -> str:
    """The name in a Host or an Origin: without scheme and port."""
    host = host.removeprefix("http://").removeprefix("https://")
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    return name.strip("[]")


def _is_form(scope: Scope) -> bool:
    kinds = [value for name, value in scope["headers"] if name.lower() == b"content-type"]
    forms = [kind.strip().lower().startswith(b"multipart/") for kind in kinds]
    return bool(forms) and all(forms)  # of several, the routes may read any


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
    """What is received: at most so many bytes, in at most so many seconds.

    Of what is no form, which may be JSON, at most so many items: parsed, they take much more memory
    than their bytes.
    """

    def __init__(self, receive: Receive, limits: Limits, form: bool) -> None:
        self._receive, self.limits, self.form = receive, limits, form
        self.bytes, self.items, self.whole = 0, 0, False
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
            body = message.get("body", b"")
            self.bytes += len(body)
            self.items += 0 if self.form else sum(map(body.count, (b",", b"[", b"{")))
            self.whole = not message.get("more_body", False)
            if self.bytes > self.limits.request_bytes:
                raise too_large(self.limits)
            if self.items > self.limits.json_items:
                said = f"the request has more than {self.limits.json_items} items of JSON"
                raise ApiError(413, said, code="request_too_large")
        return message

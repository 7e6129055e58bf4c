"""Errors as OpenAI's clients read them: {"error": {message, type, param, code}} and a status."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from lavit.config import InputError
from lavit.generate.safety import Refused

log = logging.getLogger(__name__)


class ApiError(HTTPException):
    """What a client is told; `status` is that of HTTP."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.message, self.param, self.code = message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        kind = {429: "rate_limit_error"}.get(self.status_code, "invalid_request_error")
        kind = "server_error" if self.status_code >= 500 else kind
        fields = {"type": kind, "param": self.param, "code": self.code}
        return {"error": {"message": self.message, **fields}}

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body, self.status_code, dict(self.headers or {}))


def busy() -> ApiError:
    """The server has as many requests as it takes on."""
    said = "the server has as many requests as it takes on: try again"
    return ApiError(429, said, code="queue_full", headers={"Retry-After": "1"})


def stopping() -> ApiError:
    """The server goes down."""
    return ApiError(503, "the server is stopping: try again", code="stopping")


def too_slow(seconds: float) -> ApiError:
    """A request has had its time."""
    return ApiError(504, f"no answer within {seconds:g} seconds", code="timeout")


def api_error(error: Exception, hidden: str = "") -> ApiError:
    """What a client is told of any error; `hidden` is a path that no message may name."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    if isinstance(error, HTTPException):
        said = {404: "there is no such address", 405: "this address does not take that method"}
        detail = said.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, detail, headers=error.headers)
    if isinstance(error, InputError):
        code = "moderation_blocked" if isinstance(error, Refused) else "invalid_value"
        message = str(error).replace(hidden, "MODEL") if hidden else str(error)
        return ApiError(400, message, code=code)
    log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed; its log says why", code="internal_error")


def _invalid(error: RequestValidationError) -> ApiError:
    """The first of a body's faults."""
    found = error.errors()
    first = found[0] if found else {"loc": (), "msg": "the body cannot be read"}
    where = [str(part) for part in first["loc"] if part != "body"]
    name = ".".join(where) or None
    said = f"{name}: {first['msg']}" if name else str(first["msg"])
    return ApiError(422, said, param=name, code="invalid_type")

"""Errors as OpenAI's clients read them: {"error": {message, type, param, code}} and a status."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from lavit.config import InputError
from lavit.generate.safety import Refused

log = logging.getLogger(__name__)
LONGEST = 500  # characters of a message: it may quote what was sent


class ErrorBody(BaseModel):
    """An error in an answer, for the schema."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """An answer that is an error, for the schema."""

    error: ErrorBody


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
        said = message if len(message) <= LONGEST else f"{message[:LONGEST]}…"
        self.message = said.encode(errors="replace").decode()  # half a character cannot be sent
        super().__init__(status, self.message, dict(headers or {}))
        self.param, self.code = param, code

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
        whole = rf"(?<![\w/]){re.escape(hidden)}(?!\w)"  # no part of another word or path
        message = re.sub(whole, "MODEL", str(error)) if hidden else str(error)
        return ApiError(400, message, code=code)
    log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed; its log says why", code="internal_error")


def _invalid(error: RequestValidationError) -> ApiError:
    """One of a body's faults: of alternatives, that of the one which fits furthest."""
    unread = {"loc": (), "msg": "the body cannot be read"}
    worst = max(error.errors(), key=lambda fault: len(fault["loc"]), default=unread)
    # names of alternatives, which are those of classes and types, are left out
    where = [
        str(part) for part in worst["loc"] if re.fullmatch(r"(?!body$|str$)[a-z_]+|\d+", f"{part}")
    ]
    name = ".".join(where) or None
    said = f"{name}: {worst['msg']}" if name else str(worst["msg"])
    return ApiError(422, said, param=name, code="invalid_type")

"""The application: routes, errors and the gate in front of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, StrictFloat, StrictInt
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response

from lavit.config import InputError
from lavit.generate.options import KeepLike
from lavit.generate.pipeline import Pipeline
from lavit.serve.chat import chat_router
from lavit.serve.errors import ErrorAnswer
from lavit.serve.gate import Gate
from lavit.serve.images import image_router
from lavit.serve.limits import Limits
from lavit.serve.responses import response_router
from lavit.serve.service import Service


def create_app(
    pipeline: Pipeline,
    *,
    keys: Sequence[str] = (),
    limits: Limits | None = None,
    fetch_hosts: Sequence[str] = (),
    web: bool = False,
) -> FastAPI:
    """An ASGI application over a loaded model; its lifespan ends the model's threads.

    keys: what a client's bearer token may be; without any, only names of the loopback are answered.
    fetch_hosts: hosts that pictures may be fetched from; none by default. web: add the page, /web.
    """
    limits = limits or Limits()
    service = Service(pipeline, limits, tuple(fetch_hosts))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    about: dict[str, Any] = {"title": "lavit", "docs_url": None, "redoc_url": None}
    about["responses"] = {kind: {"model": ErrorAnswer} for kind in ("422", "4XX", "5XX")}
    app = FastAPI(**about, lifespan=lifespan)
    app.state.service = service
    for router in (chat_router, image_router, response_router, _router):
        app.include_router(router(service))

    async def explain(_: Request, error: Exception) -> Response:
        return service.error(error).response()

    for kind in (InputError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, explain)
    known: dict[str, Any] = {"keys": tuple(keys), "explain": service.error}
    app.add_middleware(Gate, limits=limits, metrics=service.metrics, **known)
    if web:
        from lavit.serve.web import add_page

        add_page(app, service, keys)
    return app


class TokenizeRequest(BaseModel):
    """A picture as a data URL, and how many patches to keep: "auto", "all", 64, 0.25, …"""

    image: str
    keep: str | StrictInt | StrictFloat = "auto"


def _router(service: Service) -> APIRouter:
    """Models, tokens, health and metrics."""
    router = APIRouter()

    def model() -> dict[str, Any]:
        made = {"created": service.created, "owned_by": "lavit"}
        return {"id": service.name, "object": "model", **made}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model of this server."""
        return {"object": "list", "data": [model()]}

    @router.get("/v1/models/{name}")
    async def one_model(name: str) -> dict[str, Any]:
        """The model, if it has that name."""
        service.check(name)
        return model()

    @router.get("/health")
    async def health() -> dict[str, str]:
        """Whether requests are served."""
        return {"status": "ok"}

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        """Counters in the form of Prometheus."""
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @router.post("/v1/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """Codes of a picture's kept patches, and which those are, row by row."""
        picture = await service.pictures.sent(body.image)
        keep: KeepLike = body.keep
        found = await service.worker.call(lambda pipe: pipe.tokenize(picture, keep=keep))
        config = service.pipeline.model.config.vision
        kept = found.keep[0].nonzero()[:, 0].tolist()
        counts = {"tokens": len(kept), "patches": config.patches, "grid": config.grid}
        return {"object": "tokens", "codes": found.codes.tolist(), "kept": kept, **counts}

    return router

"""/v1/images/generations and /v1/images/edits, whole or streamed with partial images.

Partial images are what the pixel decoder has after some of its solver's steps. `seed` is ours:
without one each request draws another picture, and the answer says its seed.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from PIL.Image import Image
from pydantic import BaseModel, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.responses import JSONResponse, Response

from lavit.generate.pipeline import Pipeline
from lavit.generate.prompts import Inputs, drawings_of, words_of
from lavit.generate.runner import Work
from lavit.layout import editing
from lavit.serve.answers import EventStream, gathered, image_usage, sse
from lavit.serve.chat import RequestBody, RequestSeed
from lavit.serve.errors import ApiError
from lavit.serve.pictures import data_url
from lavit.serve.service import Service, seed_or_new, until_gone
from lavit.serve.ticket import Order, PromptSize, Ticket

UPLOADS = ("image", "image[]")
FIELD_BYTES = 2**18  # of a field of a form that is no file
Quality = Literal["low", "medium", "high", "auto", "standard", "hd"]


class DrawingRequest(RequestBody):
    """What both addresses take."""

    prompt: Annotated[str, Field(min_length=1)]
    n: int | None = 1
    size: str | None = None
    quality: Quality | None = None
    background: Literal["auto", "opaque"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    stream: bool | None = False
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = 0
    seed: RequestSeed | None = None


class ImageReference(BaseModel):
    """A picture of an edit: a data URL."""

    image_url: str


class EditingRequest(DrawingRequest):
    """An edit by JSON: `images` of `image_url`, or `image`, one data URL or several."""

    images: list[ImageReference] | None = None
    image: str | list[str] | None = None


@dataclass(frozen=True)
class Canvas:
    """How the pictures of one request are sent."""

    body: DrawingRequest
    seed: int

    @property
    def kind(self) -> str:
        """Of the file."""
        return self.body.output_format or "png"

    def about(self, picture: Image) -> dict[str, str]:
        """What OpenAI's answers say of a picture."""
        size, quality = f"{picture.width}x{picture.height}", self.body.quality or "auto"
        known = {"standard": "auto", "hd": "high"}.get(quality, quality)
        look = {"size": size, "quality": known, "background": "opaque"}
        return {**look, "output_format": self.kind}

    async def encoded(self, service: Service, picture: Image) -> str:
        """The file in base64."""
        compression = self.body.output_compression
        quality = 100 if compression is None else compression
        return await service.pictures.encoded(picture, self.kind, quality)


def image_router(service: Service) -> APIRouter:
    """The routes of this file."""
    router = APIRouter()

    @router.post("/v1/images/generations", response_model=None)
    async def generate(request: Request, body: DrawingRequest) -> Response:
        """Draw a prompt."""
        return await _drawn(service, request, body, (), "image_generation")

    @router.post("/v1/images/edits", response_model=None, openapi_extra=_edit_body())
    async def edit(request: Request) -> Response:
        """Draw from one picture or several, and an instruction."""
        body, sent = await _edit_of(service, request)
        if not 1 <= len(sent) <= service.limits.pictures:
            said = f"{len(sent)} pictures: send 1 to {service.limits.pictures} as image"
            raise ApiError(400, said, param="image", code="invalid_value")
        pictures = [await service.pictures.sent(picture) for picture in sent]
        return await _drawn(service, request, body, pictures, "image_edit")

    return router


def _edit_body() -> dict[str, Any]:
    """The two forms of an edit, for the schema."""
    json_form = EditingRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    json_form.pop("$defs", None)
    reference = {"type": "object", "properties": {"image_url": {"type": "string"}}}
    json_form["properties"]["images"] = {"type": "array", "items": reference}
    file = {"type": "string", "format": "binary"}
    fields = {"prompt": {"type": "string"}, "image": {"type": "array", "items": file}}
    form = {"type": "object", "properties": fields, "required": ["prompt", "image"]}
    content = {
        "application/json": {"schema": json_form},
        "multipart/form-data": {"schema": form},
    }
    return {"requestBody": {"required": True, "content": content}}


async def _edit_of(
    service: Service, request: Request
) -> tuple[EditingRequest, Sequence[str | bytes]]:
    """The request of an edit and its pictures, from JSON or a form."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        try:
            body = EditingRequest.model_validate_json(await request.body())
        except ValidationError as error:
            raise RequestValidationError(error.errors()) from error
        image = [body.image] if isinstance(body.image, str) else body.image or []
        return body, [*(each.image_url for each in body.images or []), *image]
    if kind != "multipart/form-data":
        said = f"the content type is {kind!r}: send application/json or multipart/form-data"
        raise ApiError(415, said, code="unsupported_media_type")
    files = service.limits.pictures + 1
    async with request.form(max_files=files, max_fields=64, max_part_size=FIELD_BYTES) as form:
        sent: list[bytes] = []
        fields: dict[str, Any] = {}
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):
                fields[name] = value
            elif name in UPLOADS:
                sent.append(await value.read())
            else:
                said = f"a file came as {name!r}: send pictures as image (masks are not supported)"
                raise ApiError(400, said, param=name, code="unknown_parameter")
    if unread := [name for name in UPLOADS if name in fields]:
        raise ApiError(400, "image is no file: upload it", param=unread[0], code="invalid_type")
    try:
        return EditingRequest.model_validate(fields), sent
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


async def _drawn(
    service: Service,
    request: Request,
    body: DrawingRequest,
    pictures: Sequence[Image],
    name: str,
) -> Response:
    """The answer with the pictures drawn from a prompt and pictures; `name` is its events'."""
    n = 1 if body.n is None else body.n
    service.check(body.model, n)
    service.check_words([body.prompt], "prompt")
    steps, size = service.painting(body.size, body.quality)
    canvas = Canvas(body, seed_or_new(body.seed))
    previews = body.partial_images or 0 if body.stream else 0
    make = drawing_of(body.prompt, pictures, seed=canvas.seed, steps=steps, size=size)
    ticket, prompt = await service.open(Order(make, n, steps, size, previews))
    if body.stream:
        events = _events(service, ticket, prompt, canvas, name)
        return EventStream(service, ticket, events, _failed)
    answer = _answer(service, ticket, prompt, canvas)
    return JSONResponse(await until_gone(request.receive, ticket, answer))


def _failed(error: ApiError) -> bytes:
    return sse({"type": "error", **error.body}, "error")


def drawing_of(prompt: str, pictures: Sequence[Image], **how: Any) -> Callable[[Pipeline], Work]:
    """What makes the work of a drawing, from pictures where there are some."""

    def make(pipeline: Pipeline) -> Work:
        if not pictures:
            return pipeline.drawings(drawings_of(prompt), **how)
        (instruction,) = words_of(prompt, "instruction")
        return pipeline.drawings(Inputs([editing(pictures, instruction)], True), **how)

    return make


async def _answer(
    service: Service, ticket: Ticket, prompt: PromptSize, canvas: Canvas
) -> dict[str, Any]:
    data, about, codes = [], {}, 0
    for number, choice in enumerate(await gathered(ticket)):
        (drawn,) = choice.pictures
        assert drawn.picture is not None
        about, codes = canvas.about(drawn.picture), codes + len(drawn.codes)
        encoded = await canvas.encoded(service, drawn.picture)
        item = {"b64_json": encoded}
        if canvas.body.response_format == "url":
            item = {"url": data_url(encoded, canvas.kind)}
        data.append({**item, "seed": canvas.seed + number})
    usage = image_usage(prompt, codes)
    return {"created": int(time.time()), "data": data, **about, "usage": usage}


async def _events(
    service: Service, ticket: Ticket, prompt: PromptSize, canvas: Canvas, name: str
) -> AsyncIterator[bytes]:
    """Partial images, and the completed picture of each choice."""
    shown = [0] * ticket.order.n
    async for update in ticket:
        if update.picture is None:
            continue
        event: dict[str, Any] = {"created_at": int(time.time()), **canvas.about(update.picture)}
        event["b64_json"] = await canvas.encoded(service, update.picture)
        if update.kind == "preview":
            event |= {"type": f"{name}.partial_image", "partial_image_index": shown[update.input]}
            shown[update.input] += 1
        else:
            event |= {"type": f"{name}.completed", "seed": canvas.seed + update.input}
            event["usage"] = image_usage(prompt, len(update.codes))
        yield sse(event, event["type"])

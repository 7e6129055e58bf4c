"""/v1/responses: words and, with the tool image_generation, pictures; nothing is stored.

With `tool_choice` "required", or of the tool, the reply is a picture; else the model decides.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, model_validator
from starlette.responses import JSONResponse, Response
from typing_extensions import TypedDict

from lavit.conversation import Reply
from lavit.generate.stream import Update
from lavit.serve.answers import EventStream, sse
from lavit.serve.chat import (
    MESSAGES,
    Detail,
    ImageItem,
    ImageURL,
    MessageBody,
    OpenBody,
    RequestBody,
    RequestSeed,
    Temperature,
    TextItem,
    TopP,
    conversation,
    order_of,
)
from lavit.serve.errors import ApiError
from lavit.serve.images import Quality
from lavit.serve.pictures import data_url
from lavit.serve.service import Service, seed_or_new, until_gone
from lavit.serve.ticket import PromptSize, Ticket

ServerEvent = dict[str, Any]


class Words(BaseModel):
    """Words of an item."""

    type: Literal["input_text", "output_text"]
    text: str


class ShownImage(BaseModel):
    """A picture of an item: a data URL."""

    type: Literal["input_image"]
    image_url: str
    detail: Detail | None = "auto"


class Said(BaseModel):
    """A message, a user's or a reply that is sent back."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[Words | ShownImage, Field(discriminator="type")]]


class Drew(BaseModel):
    """A picture of a reply that is sent back."""

    type: Literal["image_generation_call"]
    result: str
    codes: list[int] | None = None


class Tool(OpenBody):
    """The one tool that there is: drawing."""

    type: Literal["image_generation"]
    size: str | None = None
    quality: Quality | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = 0


class Format(BaseModel):
    """Of words: plain."""

    type: Literal["text"] = "text"


class WordsAs(BaseModel):
    """How words are written."""

    format: Format | None = None


Items = Annotated[list[Drew | Said], Field(min_length=1, max_length=MESSAGES)]


class ToolChoice(TypedDict):
    """The tool, and no other."""

    type: Literal["image_generation"]


class ResponseRequest(RequestBody):
    """A response as OpenAI has it."""

    input: Annotated[str, Field(min_length=1)] | Items
    instructions: str | None = None
    tools: Annotated[list[Tool], Field(max_length=1)] | None = None
    tool_choice: Literal["auto", "none", "required"] | ToolChoice | None = "auto"
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: RequestSeed | None = None
    text: WordsAs | None = None
    stream: bool | None = False
    previous_response_id: None = None  # nothing is stored
    background: Literal[False] | None = None

    @model_validator(mode="after")
    def _has_tool(self) -> ResponseRequest:
        if self.tool_choice not in ("auto", "none", None) and not self.tools:
            raise ValueError("tool_choice asks for a tool: give image_generation as tools")
        return self

    @property
    def tool(self) -> Tool | None:
        """The tool, where it may be used."""
        return self.tools[0] if self.tools and self.tool_choice != "none" else None

    @property
    def reply(self) -> Reply:
        """What kind of reply is wanted."""
        if self.tool is None:
            return "text"
        return "auto" if self.tool_choice in ("auto", None) else "image"

    @property
    def messages(self) -> list[MessageBody]:
        """The input as messages of a chat."""
        given = self.input
        items = [Said(role="user", content=given)] if isinstance(given, str) else given
        found = [MessageBody(role="system", content=self.instructions)] if self.instructions else []
        for item in items:
            if isinstance(item, Drew):
                seen = ImageURL(url=data_url(item.result))
                part = ImageItem(type="image_url", image_url=seen, codes=item.codes)
                found.append(MessageBody(role="assistant", content=[part]))
            elif isinstance(item.content, str):
                found.append(MessageBody(role=item.role, content=item.content))
            else:
                found.append(MessageBody(role=item.role, content=[_item(p) for p in item.content]))
        return found


def _item(part: Words | ShownImage) -> TextItem | ImageItem:
    if isinstance(part, Words):
        return TextItem(type="text", text=part.text)
    seen = ImageURL(url=part.image_url, detail=part.detail)
    return ImageItem(type="image_url", image_url=seen)


def response_router(service: Service) -> APIRouter:
    """The routes of this file."""
    router = APIRouter()

    @router.post("/v1/responses", response_model=None)
    async def respond(request: Request, body: ResponseRequest) -> Response:
        """Answer an input."""
        service.check(body.model)
        tool = body.tool
        painting: dict[str, Any] = {}
        if tool is not None:
            steps, size = service.painting(tool.size, tool.quality)
            previews = tool.partial_images or 0 if body.stream else 0
            painting = {"steps": steps, "size": size, "previews": previews}
        order = order_of(
            await conversation(service, body.messages),
            body.reply,
            seed=seed_or_new(body.seed),
            temperature=body.temperature,
            top_p=body.top_p,
            max_tokens=body.max_output_tokens,
            **painting,
        )
        ticket, prompt = await service.open(order)
        writing = Writing(service, body, prompt)
        if body.stream:
            events = _events(ticket, writing)
            return EventStream(service, ticket, events, writing.failed)
        return JSONResponse(await until_gone(request.receive, ticket, _whole(ticket, writing)))

    return router


async def _events(ticket: Ticket, writing: Writing) -> AsyncIterator[bytes]:
    for event in writing.begin():
        yield sse(event, event["type"])
    async for update in ticket:
        for event in await writing.take(update):
            yield sse(event, event["type"])


async def _whole(ticket: Ticket, writing: Writing) -> dict[str, Any]:
    async for update in ticket:
        await writing.take(update)
    return writing.response()


class Writing:
    """A response on its way: updates in, events out; its items are those written so far."""

    def __init__(self, service: Service, body: ResponseRequest, prompt: PromptSize) -> None:
        self.service, self.body, self.prompt = service, body, prompt
        self.id, self.created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self.status = "in_progress"
        self.error: dict[str, str] | None = None
        self.items: list[dict[str, Any]] = []
        self.pictures: dict[int, int] = {}  # number of an image -> its place among the items
        self.partial: dict[int, int] = {}  # number of an image -> previews so far
        self.message: int | None = None  # place of the message that is open
        self.text = self.codes = self.events = 0

    def begin(self) -> list[ServerEvent]:
        """The first events."""
        kinds = ("response.created", "response.in_progress")
        return [self._event(kind, response=self.response()) for kind in kinds]

    async def take(self, update: Update) -> list[ServerEvent]:
        """The events that an update comes to."""
        if update.kind == "text":
            return self._words(update.text)
        if update.kind == "image_start":
            return [*self._close(), *self._open_picture(update.image)]
        if update.picture is not None:
            return await self._picture(update)
        if update.kind != "finished":
            return []
        self.text = update.tokens
        events = self._close()
        whole = update.reason == "end" or self.body.reply == "image"
        self.status = "completed" if whole else "incomplete"
        return [*events, self._event(f"response.{self.status}", response=self.response())]

    def failed(self, error: ApiError) -> bytes:
        """The last events of a response that fails."""
        self.status = "failed"
        code = "rate_limit_exceeded" if error.status_code == 429 else "server_error"
        self.error = {"code": code, "message": error.message}
        said = {"code": error.code, "message": error.message, "param": error.param}
        events = [
            self._event("error", **said),
            self._event("response.failed", response=self.response()),
        ]
        return b"".join(sse(event, event["type"]) for event in events)

    def response(self) -> dict[str, Any]:
        """The response as it stands."""
        body = self.body
        read = self.prompt.text + self.prompt.image
        wrote = self.text + self.codes
        usage = {
            "input_tokens": read,
            "input_tokens_details": {
                "cached_tokens": 0,
                "cache_write_tokens": 0,
                "text_tokens": self.prompt.text,
                "image_tokens": self.prompt.image,
            },
            "output_tokens": wrote,
            "output_tokens_details": {
                "reasoning_tokens": 0,
                "text_tokens": self.text,
                "image_tokens": self.codes,
            },
            "total_tokens": read + wrote,
        }
        cut = {"reason": "max_output_tokens"} if self.status == "incomplete" else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": self.status,
            "error": self.error,
            "incomplete_details": cut,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self.service.name,
            "output": [dict(item) for item in self.items],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "tool_choice": body.tool_choice or "auto",
            "tools": [tool.model_dump(exclude_none=True) for tool in body.tools or []],
            "top_p": body.top_p,
            "usage": None if self.status == "in_progress" else usage,
            "metadata": {},
        }

    def _event(self, kind: str, **fields: Any) -> ServerEvent:
        self.events += 1
        return {"type": kind, "sequence_number": self.events - 1, **fields}

    def _added(self, item: dict[str, Any]) -> tuple[dict[str, Any], ServerEvent]:
        """Where an item is, and the event that it is there."""
        self.items.append(item)
        at = len(self.items) - 1
        added = self._event("response.output_item.added", item=dict(item), output_index=at)
        return {"item_id": item["id"], "output_index": at}, added

    def _words(self, piece: str) -> list[ServerEvent]:
        events: list[ServerEvent] = []
        if self.message is None:
            self.message = len(self.items)
            new = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant"}
            place, added = self._added({**new, "status": "in_progress", "content": []})
            part = {"type": "output_text", "text": "", "annotations": []}
            self.items[-1]["content"] = [part]
            events = [added, self._part("added", place, part)]
        item = self.items[self.message]
        item["content"][0]["text"] += piece
        place = {"item_id": item["id"], "output_index": self.message, "content_index": 0}
        delta = {"delta": piece, "logprobs": []}
        return [*events, self._event("response.output_text.delta", **place, **delta)]

    def _part(self, what: str, place: dict[str, Any], part: dict[str, Any]) -> ServerEvent:
        where = {**place, "content_index": 0}
        return self._event(f"response.content_part.{what}", **where, part=dict(part))

    def _close(self) -> list[ServerEvent]:
        """End the message that is open."""
        if self.message is None:
            return []
        item, at = self.items[self.message], self.message
        item["status"], self.message = "completed", None
        place, part = {"item_id": item["id"], "output_index": at}, item["content"][0]
        text = {"text": part["text"], "logprobs": [], "content_index": 0}
        return [
            self._event("response.output_text.done", **place, **text),
            self._part("done", place, part),
            self._event("response.output_item.done", item=dict(item), output_index=at),
        ]

    def _open_picture(self, number: int) -> list[ServerEvent]:
        self.pictures[number], self.partial[number] = len(self.items), 0
        item = {"id": f"ig_{uuid.uuid4().hex}", "type": "image_generation_call"}
        place, added = self._added({**item, "status": "in_progress", "result": None})
        kinds = ("in_progress", "generating")
        return [
            added,
            *(self._event(f"response.image_generation_call.{k}", **place) for k in kinds),
        ]

    async def _picture(self, update: Update) -> list[ServerEvent]:
        """A preview, or the picture that ends its item."""
        at, picture = self.pictures[update.image], update.picture
        assert picture is not None
        item = self.items[at]
        kind = (self.body.tool and self.body.tool.output_format) or "png"
        encoded = await self.service.pictures.encoded(picture, kind)
        place = {"item_id": item["id"], "output_index": at}
        about = {"size": f"{picture.width}x{picture.height}", "output_format": kind}
        if update.kind == "preview":
            index = self.partial[update.image]
            self.partial[update.image] += 1
            shown = {"partial_image_b64": encoded, "partial_image_index": index}
            event = "response.image_generation_call.partial_image"
            return [self._event(event, **place, **shown, **about)]
        self.codes += len(update.codes)
        item |= {"status": "completed", "result": encoded, **about, "codes": list(update.codes)}
        return [
            self._event("response.image_generation_call.completed", **place),
            self._event("response.output_item.done", item=dict(item), output_index=at),
        ]

"""What is written, as answers: gathered, or as server-sent events, with its usage."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lavit.generate.request import Reason
from lavit.serve.errors import ApiError
from lavit.serve.service import Service, until_gone
from lavit.serve.ticket import PromptSize, Ticket


@dataclass(eq=False)
class WrittenPicture:
    """A picture of a choice, and its codes."""

    codes: tuple[int, ...]
    picture: Image.Image | None = None  # not painted yet


@dataclass(eq=False)
class Choice:
    """What one choice holds: words and pictures in order."""

    parts: list[str | WrittenPicture] = field(default_factory=list)
    reason: Reason = "end"
    tokens: int = 0  # of its text

    @property
    def text(self) -> str:
        """All words."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def pictures(self) -> list[WrittenPicture]:
        """All pictures."""
        return [part for part in self.parts if isinstance(part, WrittenPicture)]

    @property
    def codes(self) -> int:
        """Image tokens."""
        return sum(len(drawn.codes) for drawn in self.pictures)


async def gathered(ticket: Ticket) -> list[Choice]:
    """All choices of a request, complete."""
    choices = [Choice() for _ in range(ticket.order.n)]
    async for update in ticket:
        choice = choices[update.input]
        if update.kind == "text":
            choice.parts.append(update.text)
        elif update.kind == "image" and update.picture is None:
            choice.parts.append(WrittenPicture(update.codes))
        elif update.kind == "image":
            choice.pictures[update.image].picture = update.picture
        elif update.kind == "finished":
            choice.reason, choice.tokens = update.reason or "end", update.tokens
    return choices


def image_usage(prompt: PromptSize, codes: int) -> dict[str, Any]:
    """Usage as the addresses of images say it."""
    read = prompt.text + prompt.image
    return {
        "input_tokens": read,
        "input_tokens_details": {"text_tokens": prompt.text, "image_tokens": prompt.image},
        "output_tokens": codes,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": codes},
        "total_tokens": read + codes,
    }


def chat_usage(prompt: PromptSize, text: int, codes: int) -> dict[str, Any]:
    """Usage as chat completions say it."""
    read, wrote = prompt.text + prompt.image, text + codes
    return {
        "prompt_tokens": read,
        "completion_tokens": wrote,
        "total_tokens": read + wrote,
        "prompt_tokens_details": {"text_tokens": prompt.text, "image_tokens": prompt.image},
        "completion_tokens_details": {"text_tokens": text, "image_tokens": codes},
    }


def sse(data: dict[str, Any] | str, event: str | None = None) -> bytes:
    """One server-sent event."""
    body = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    return (f"event: {event}\n" if event else "").encode() + f"data: {body}\n\n".encode()


def plain_error(error: ApiError) -> bytes:
    """An error within a stream."""
    return sse(error.body)


class EventStream(Response):
    """Events as they come; a client that leaves closes the ticket, and so does the end."""

    media_type = "text/event-stream"

    def __init__(
        self,
        service: Service,
        ticket: Ticket,
        events: AsyncIterator[bytes],
        as_event: Callable[[ApiError], bytes] = plain_error,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.service, self.ticket, self.events, self.as_event = service, ticket, events, as_event

    async def __call__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Send all events, unless the client leaves."""
        with contextlib.suppress(ApiError):  # the client has left
            await until_gone(receive, self.ticket, self._write(send))

    async def _write(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        try:
            async for event in self.events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except OSError:  # the client has left
            return
        except Exception as error:
            event = self.as_event(self.service.error(error))
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

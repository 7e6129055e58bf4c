"""/v1/chat/completions: words and pictures in, words and pictures out.

Pictures of a reply stand in `message.images`, as LiteLLM and OpenRouter read them, or, with
`picture_format="content"`, as `image_url` parts of the content. Each carries its `codes`: sent back
with the conversation they, not a new look at the picture, stand in it.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import AfterValidator, BaseModel, Field, model_validator
from starlette.responses import JSONResponse, Response

from lavit.config import TokenizerConfig
from lavit.conversation import Reply
from lavit.generate.pipeline import Pipeline
from lavit.generate.protocols import fitted
from lavit.generate.runner import Work
from lavit.generate.sampling import Sampling
from lavit.serve.answers import Choice, EventStream, WrittenPicture, chat_usage, gathered, sse
from lavit.serve.errors import ApiError
from lavit.serve.pictures import data_url
from lavit.serve.service import Service, seed_or_new, until_gone
from lavit.serve.ticket import Order, PromptSize, Ticket
from lavit.visual_tokenizer.selector import KeepPolicy

Detail = Literal["auto", "low", "high", "original"]
MESSAGES = 1024  # of one request
LOW = 4  # detail "low" keeps at most one patch in so many
REASONS = {"end": "stop", "length": "length", "context": "length"}
# what would change the answer and is not done here, with values that ask for nothing
NOT_DONE = {
    "tools": ([],), "functions": ([],), "logprobs": (False,), "top_logprobs": (0,),
    "logit_bias": ({},), "audio": (), "frequency_penalty": (0,), "presence_penalty": (0,),
    "response_format": ({"type": "text"},), "web_search_options": (), "prediction": (),
    "top_k": (-1, 0), "min_p": (0,), "repetition_penalty": (1,),
    "mask": (), "input_image_mask": (), "background": ("auto", "opaque"),
    "conversation": (), "prompt": (),
}  # fmt: skip
COLDEST = 0.01  # below, logits overflow, and the likeliest token is what is meant
RequestSeed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Temperature = Annotated[
    float, Field(ge=0, le=2), AfterValidator(lambda value: value if value >= COLDEST else 0.0)
]
TopP = Annotated[float, Field(gt=0, le=1)]


StopText = Annotated[str, Field(max_length=256)]


class ImageURL(BaseModel):
    """Where a picture is: a data URL."""

    url: str
    detail: Detail | None = "auto"


class TextItem(BaseModel):
    """Words of a message."""

    type: Literal["text"]
    text: str


class ImageItem(BaseModel):
    """A picture of a message, or of a reply that is sent back, with its `codes`."""

    type: Literal["image_url"]
    image_url: ImageURL
    codes: list[int] | None = None


class MessageBody(BaseModel):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextItem | ImageItem, Field(discriminator="type")]] | None = None
    images: list[ImageItem] | None = None

    @property
    def items(self) -> list[TextItem | ImageItem]:
        """Its words and pictures in order."""
        content = self.content or []
        if isinstance(content, str):
            content = [TextItem(type="text", text=content)]
        return [*content, *(self.images or [])]


class StreamOptions(BaseModel):
    """How a stream is written."""

    include_usage: bool | None = False


class OpenBody(BaseModel):
    """Takes any field, but refuses what would change the answer and is not done here."""

    model_config = {"extra": "allow"}

    @model_validator(mode="after")
    def _refuse(self) -> OpenBody:
        for name, value in (self.model_extra or {}).items():
            if name in NOT_DONE and value is not None and value not in NOT_DONE[name]:
                raise ValueError(f"{name} is not supported: leave it out")
        return self


class RequestBody(OpenBody):
    """What requests share."""

    model: str | None = None


class ChatRequest(RequestBody):
    """A chat completion as OpenAI has it."""

    messages: Annotated[list[MessageBody], Field(min_length=1, max_length=MESSAGES)]
    modalities: list[Literal["text", "image"]] | None = None
    n: int | None = 1
    seed: RequestSeed | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    picture_format: Literal["images", "content"] = "images"

    @property
    def reply(self) -> Reply:
        """What kind of reply is wanted."""
        asked = set(self.modalities or ["text"])
        return "auto" if len(asked) > 1 else "image" if asked == {"image"} else "text"

    @property
    def ends(self) -> tuple[str, ...]:
        """The strings before which the text is cut."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(filter(None, given))


async def conversation(service: Service, messages: Sequence[MessageBody]) -> list[dict[str, Any]]:
    """Messages in the form of Hugging Face chats, their pictures opened."""
    parts = [item for message in messages for item in message.items]
    count = sum(isinstance(item, ImageItem) for item in parts)
    if count > service.limits.pictures:
        said = f"{count} pictures, at most {service.limits.pictures} are taken"
        raise ApiError(400, said, param="messages", code="too_many_images")
    texts = (item.text for item in parts if isinstance(item, TextItem))
    service.check_words(texts, "messages")
    config = service.pipeline.model.config.visual_tokenizer
    patches = config.patches
    keeps = {"low": KeepPolicy(max_tokens=max(1, patches // LOW)), "high": "all", "original": "all"}
    talk: list[dict[str, Any]] = []
    for message in messages:
        content: list[dict[str, Any]] = []
        for item in message.items:
            if isinstance(item, TextItem):
                content.append({"type": "text", "text": item.text})
                continue
            if item.codes is not None and not _fit(item.codes, config):
                said = f"codes are 1 to {patches} numbers from 0 to {config.codes - 1}"
                raise ApiError(400, said, param="codes", code="invalid_value")
            picture = await service.pictures.sent(item.image_url.url)
            keep = keeps.get(item.image_url.detail or "auto", "auto")
            found = {"type": "image", "image": picture, "keep": keep, "codes": item.codes}
            content.append(found)
        role = "system" if message.role == "developer" else message.role
        talk.append({"role": role, "content": content or ""})
    return talk


def _fit(codes: Sequence[int], config: TokenizerConfig) -> bool:
    """Whether codes may be those of a picture."""
    return 0 < len(codes) <= config.patches and all(0 <= code < config.codes for code in codes)


def sampled(usual: Sampling, **given: float | int | None) -> Sampling:
    """The usual sampling with what is given; `max_tokens` bounds `min_tokens` too."""
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    most = changes.get("max_tokens", usual.max_tokens)
    return replace(usual, **changes, min_tokens=min(usual.min_tokens, int(most)))


def order_of(
    talk: list[dict[str, Any]],
    reply: Reply,
    *,
    n: int = 1,
    seed: int,
    ends: tuple[str, ...] = (),
    temperature: float | None = None,
    top_p: float | None = None,
    max_tokens: int | None = None,
    **painting: Any,
) -> Order:
    """The order of a reply; `painting` is that of `Order`. `max_tokens` bounds its text."""

    def make(pipeline: Pipeline) -> Work:
        given = {"temperature": temperature, "top_p": top_p}
        how: dict[str, Any] = {"seed": seed}
        if reply == "image":
            patches = pipeline.model.config.visual_tokenizer.patches
            how["sampling"] = sampled(fitted(pipeline.protocol.drawing, patches), **given)
        else:
            usual = pipeline.protocol.chat
            usual = replace(usual, min_tokens=0) if reply == "auto" else usual
            how["sampling"] = sampled(usual, **given, max_tokens=max_tokens)
        if reply != "text":
            how |= {name: painting.get(name) for name in ("steps", "size")}
        work = pipeline.replies(talk, reply, **how)
        return replace(work, jobs=[replace(job, ends=(*job.ends, *ends)) for job in work.jobs])

    return Order(make, n, **painting)


def chat_router(service: Service) -> APIRouter:
    """The routes of this file."""
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=None)
    async def complete(request: Request, body: ChatRequest) -> Response:
        """Answer a conversation."""
        n = 1 if body.n is None else body.n
        service.check(body.model, n)
        order = order_of(
            await conversation(service, body.messages),
            body.reply,
            n=n,
            seed=seed_or_new(body.seed),
            ends=body.ends,
            temperature=body.temperature,
            top_p=body.top_p,
            max_tokens=body.max_completion_tokens or body.max_tokens,
        )
        ticket, prompt = await service.open(order)
        if body.stream:
            return EventStream(service, ticket, _chunks(service, ticket, prompt, body))
        answer = _answer(service, ticket, prompt, body)
        return JSONResponse(await until_gone(request.receive, ticket, answer))

    return router


async def _shown(service: Service, drawn: WrittenPicture, index: int) -> dict[str, Any]:
    """A picture of a reply."""
    assert drawn.picture is not None
    url = data_url(await service.pictures.encoded(drawn.picture))
    item = {"type": "image_url", "image_url": {"url": url}, "index": index}
    return {**item, "codes": list(drawn.codes)}


def _head(service: Service, kind: str) -> dict[str, Any]:
    made = {"object": kind, "created": int(time.time()), "model": service.name}
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", **made}


async def _answer(
    service: Service, ticket: Ticket, prompt: PromptSize, body: ChatRequest
) -> dict[str, Any]:
    choices = await gathered(ticket)
    found = []
    for number, choice in enumerate(choices):
        message = await _message(service, choice, body.picture_format)
        reason = _reason(body, choice.reason)
        found.append(
            {"index": number, "message": message, "finish_reason": reason, "logprobs": None}
        )
    text, codes = (sum(each) for each in zip(*((c.tokens, c.codes) for c in choices), strict=True))
    usage = chat_usage(prompt, text, codes)
    return {**_head(service, "chat.completion"), "choices": found, "usage": usage}


async def _message(service: Service, choice: Choice, form: str) -> dict[str, Any]:
    shown = [await _shown(service, drawn, at) for at, drawn in enumerate(choice.pictures)]
    message: dict[str, Any] = {"role": "assistant", "refusal": None}
    if form == "content" and shown:
        pictures = iter(shown)
        parts = [
            {"type": "text", "text": part} if isinstance(part, str) else next(pictures)
            for part in choice.parts
        ]
        return {**message, "content": parts}
    message["content"] = choice.text if choice.text or not shown else None
    return {**message, "images": shown} if shown else message


def _reason(body: ChatRequest, reason: str) -> str:
    return "stop" if body.reply == "image" else REASONS[reason]


async def _chunks(
    service: Service, ticket: Ticket, prompt: PromptSize, body: ChatRequest
) -> AsyncIterator[bytes]:
    """The events of a stream; usage comes in the last one."""
    head = _head(service, "chat.completion.chunk")
    asked = bool(body.stream_options and body.stream_options.include_usage)
    empty = {"usage": None} if asked else {}

    def chunk(number: int, delta: dict[str, Any], reason: str | None = None) -> bytes:
        choice = {"index": number, "delta": delta, "finish_reason": reason, "logprobs": None}
        return sse({**head, "choices": [choice], **empty})

    text = codes = 0
    mixed = body.picture_format == "content"
    unpainted: Counter[int] = Counter()
    held: defaultdict[int, str] = defaultdict(str)  # words behind a picture that is not painted yet
    for number in range(ticket.order.n):
        yield chunk(number, {"role": "assistant", "content": ""})
    async for update in ticket:
        choice = update.input
        if update.kind == "text" and mixed and unpainted[choice]:
            held[choice] += update.text
        elif update.kind == "text":
            yield chunk(choice, {"content": update.text})
        elif update.kind == "image" and update.picture is None:
            unpainted[choice] += 1
        elif update.kind == "image":
            codes += len(update.codes)
            drawn = WrittenPicture(update.codes, update.picture)
            shown = await _shown(service, drawn, update.image)
            yield chunk(choice, {"content" if mixed else "images": [shown]})
            unpainted[choice] -= 1
            if not unpainted[choice] and (words := held.pop(choice, "")):
                yield chunk(choice, {"content": words})
        elif update.kind == "finished":
            text += update.tokens
            yield chunk(update.input, {}, _reason(body, update.reason or "end"))
    if asked:
        yield sse({**head, "choices": [], "usage": chat_usage(prompt, text, codes)})
    yield sse("[DONE]")

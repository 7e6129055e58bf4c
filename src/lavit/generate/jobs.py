"""A pipeline's calls as jobs for the engine, one for each input, and what the jobs wrote as results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lavit.config import InputError
from lavit.data.chat import ChatPicture, ChatText, Reply, turn_end
from lavit.generate.prompts import lay_prompt
from lavit.generate.protocols import Protocol, fitted
from lavit.generate.request import Request
from lavit.generate.sampling import Sampling
from lavit.generate.stream import Drawn, Job
from lavit.model import LaVIT

# sample i of every input takes seed + i, or entry i of a tuple; a list has one of these for each input; None: fresh ones
Seed = int | tuple[int, ...] | list[Any] | None
Parts = Sequence[ChatText | ChatPicture]
MODES = {"text": "text", "image": "image", "auto": "mixed"}


def reading(
    model: LaVIT,
    prompts: Sequence[Parts],
    sampling: Sampling,
    n: int,
    seed: Seed,
    ends: tuple[str, ...],
) -> list[Job]:
    """Jobs that write text about pictures that are read."""
    if n > 1 and sampling.temperature == 0 and sampling.beams == 1:
        raise InputError(f"n={n} samples at temperature 0 are all alike: give sampling=Sampling(temperature=1.0)")
    samplings = _seeded(sampling, n, seed, len(prompts))
    return [_job(model, prompt, each, "text", ends=ends) for prompt, each in zip(prompts, samplings, strict=True)]


def writing(
    model: LaVIT,
    protocol: Protocol,
    prompts: Sequence[Parts],
    *,
    out: Reply,
    n: int,
    seed: Seed,
    sampling: Sampling | None,
    picture: Sampling | None,
    guidance: float | None,
    chat: bool = False,
) -> list[Job]:
    """Jobs that go on from prompts with text, a picture, or both. In a chat text ends where the turn does."""
    if out not in MODES:
        raise InputError(f"out {out!r} is not known: use 'text', 'image' or 'auto'")
    patches = model.config.tokenizer.patches
    inside = (sampling if out == "image" else picture) or fitted(protocol.drawing, patches)
    if guidance is not None:
        inside = replace(inside, guidance=guidance)
    if out != "text" and inside.max_tokens > patches:
        raise InputError(
            f"max_tokens is {inside.max_tokens}, but pictures of this model have at most {patches} codes: "
            f"set max_tokens={patches} or fewer"
        )
    # a reply that may hold pictures need not hold text
    text = sampling or replace(protocol.chat, min_tokens=0 if out == "auto" else protocol.chat.min_tokens)
    ends, stop = _turn_end(model) if chat and out != "image" else ((), ())
    samplings = _seeded(inside if out == "image" else text, n, seed, len(prompts))
    return [
        _job(model, prompt, each, MODES[out], picture=inside, ends=ends, stop=stop)
        for prompt, each in zip(prompts, samplings, strict=True)
    ]


def result(sample: list[str | Drawn], out: str) -> Any:
    """What one sample wrote: a string, a picture, or ("auto") a list of both."""
    if out == "text":
        return "".join(part for part in sample if isinstance(part, str))
    parts = [part if isinstance(part, str) else part.picture for part in sample]
    return parts if out == "auto" else parts[0]


def message(sample: list[str | Drawn]) -> dict[str, Any]:
    """The assistant's message of one sample, in the form of Hugging Face chats; pictures carry their codes."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part.picture, "codes": part.codes}
        for part in sample
    ]
    return {"role": "assistant", "content": content or [{"type": "text", "text": ""}]}


def _seeded(sampling: Sampling, n: int, seed: Seed, inputs: int) -> list[Sampling]:
    """The sampling of each input, its seeds resolved."""
    if isinstance(seed, list) and len(seed) != inputs:
        raise InputError(f"{len(seed)} seeds for {inputs} inputs: a list has one entry for each input")
    each = seed if isinstance(seed, list) else [seed] * inputs
    chosen = [replace(sampling, n=n, seed=own) for own in each]
    return [replace(one, seed=one.seeds()) for one in chosen]


def _job(
    model: LaVIT,
    parts: Parts,
    sampling: Sampling,
    mode: Any,
    *,
    picture: Sampling | None = None,
    ends: tuple[str, ...] = (),
    stop: tuple[int, ...] = (),
) -> Job:
    prompt = lay_prompt(model, parts)
    inside = {} if picture is None else {"picture": picture}
    request = Request(
        ids=prompt.ids,
        slots=prompt.slots,
        features=prompt.features,
        mode=mode,
        sampling=sampling,
        stop=stop,
        **inside,
    )
    return Job(request, sampling.seeds(), ends)


def _turn_end(model: LaVIT) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """How an assistant's turn ends: strings that cut its text, ids that stop it."""
    closing = turn_end(model.text)
    ids = model.text(closing, add_special_tokens=False)["input_ids"]
    special = bool(ids) and not model.text.decode(ids[:1], skip_special_tokens=True)
    return ((), (ids[0],)) if special else ((closing.strip() or closing,), ())

"""What one server takes on, and what one request may ask for."""

from __future__ import annotations

from dataclasses import dataclass

MiB = 2**20


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds that are checked before work is done."""

    requests: int = 64  # running and waiting; more are answered with 429
    request_bytes: int = 24 * MiB  # of a body; more are answered with 413
    json_items: int = 2**17  # of a body in JSON: commas and brackets, counted before it is parsed
    picture_pixels: int = 16 * MiB  # of a picture that is sent, checked before it is decoded
    pictures: int = 16  # of one request
    prompt_tokens: int = 8 * 1024  # or the language model's context, whichever is less
    characters: int = 64 * 1024  # of all texts of one request, checked before they are tokenised
    choices: int = 10  # `n`
    body_seconds: float = 60.0  # until a body must have arrived
    seconds: float = 300.0  # until a request must be answered, its time in the queue included
    stop_seconds: float = 20.0  # that running requests have after SIGTERM

"""LaVIT as a model of lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval).

    python -m lmms_eval --model lavit --model_args pretrained=nano --tasks TASK --batch_size 8

`pretrained` is what `lavit.load` opens. A request of one picture is laid out as a question ("ask",
the paper's layout) or as a chat's turn (layout=chat); of none or several, as words and pictures in
order. A task's temperature, beams, lengths and ends are kept to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, Literal

from lmms_eval.api.model import lmms

import lavit
from lavit.config import TO_READ, InputError
from lavit.generate.protocols import cut_before
from lavit.generate.sampling import Sampling


class LaVITEval(lmms):  # type: ignore[misc]  # Any
    """A loaded pipeline that answers lmms-eval's requests."""

    def __init__(
        self,
        pretrained: str = "nano",
        layout: Literal["question", "chat"] = "question",
        protocol: str = "default",
        device: str = "auto",
        dtype: str | None = None,
        batch_size: int | str = 1,
        **others: Any,
    ) -> None:
        super().__init__()
        if layout not in ("question", "chat"):
            raise InputError(f"layout is {layout!r}: use 'question' or 'chat'")
        given = {name for name, value in others.items() if value is not None}
        if unknown := sorted(given - {"max_batch_size"}):  # lmms-eval gives that one itself
            raise InputError(f"--model_args has {unknown[0]}, which LaVIT does not take")
        self.layout, self.together = layout, int(batch_size)
        self.pipe = lavit.load(
            pretrained, device=device, dtype=dtype, protocol=protocol, parts=TO_READ
        )

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answer to each request, in order; those of like settings are one batch."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        found: list[str] = [""] * len(requests)
        for numbers in groups.values():
            for at in range(0, len(numbers), self.together):
                chunk = numbers[at : at + self.together]
                for number, said in zip(
                    chunk, self._said([requests[n] for n in chunk]), strict=True
                ):
                    found[number] = said
                    self.cache_hook.add_partial("generate_until", requests[number].args[:2], said)
        return found

    def _said(self, requests: Sequence[Any]) -> list[str]:
        inputs = [self._input(request) for request in requests]
        options = requests[0].args[1]
        how, ends = self._sampling(options), self._ends(options)
        said = [""] * len(inputs)
        shown = [[part for part in parts if not isinstance(part, str)] for parts in inputs]
        asked = [n for n, images in enumerate(shown) if len(images) == 1]
        mixed = [n for n, images in enumerate(shown) if len(images) != 1]
        if self.layout == "chat":
            mixed, asked = [], []
            chats = [[_message(parts)] for parts in inputs]
            said = [_text(reply) for reply in self.pipe.chat(chats, sampling=how)]
        if asked:
            images = [shown[n][0] for n in asked]
            texts = [" ".join(part for part in inputs[n] if isinstance(part, str)) for n in asked]
            for n, text in zip(asked, self.pipe.ask(images, texts, sampling=how), strict=True):
                said[n] = text
        if mixed:
            pieces = [inputs[n] for n in mixed]
            for n, text in zip(mixed, self.pipe.complete(pieces, sampling=how), strict=True):
                said[n] = text
        return [cut_before(text, ends)[0].strip() for text in said]

    def _input(self, request: Any) -> list[Any]:
        """Pictures and words of a request, pictures first where the words mark no places."""
        context, _, pictures_of, document, task, split = request.args
        pictures = list(pictures_of(self.task_dict[task][split][document]) or [])
        first, *rest = (words.strip() for words in context.split("<image>"))
        if len(rest) == len(pictures):
            parts = [first, *chain.from_iterable(zip(pictures, rest, strict=True))]
        else:
            parts = [*pictures, context.replace("<image>", "").strip()]
        return [part for part in parts if part != ""] or [""]

    def _sampling(self, options: dict[str, Any]) -> Sampling:
        """A task's settings over those of the protocol."""
        usual = self.pipe.protocol.chat if self.layout == "chat" else self.pipe.protocol.answer
        most = options.get("max_new_tokens") or options.get("max_gen_toks") or usual.max_tokens
        warm = options.get("temperature") or 0.0
        if options.get("do_sample") is False:
            warm = 0.0
        beams = options.get("num_beams") or (1 if warm else usual.beams)
        least = min(usual.min_tokens, int(most))
        return replace(
            usual,
            max_tokens=int(most),
            min_tokens=least,
            temperature=float(warm),
            top_p=float(options.get("top_p") or 1.0) if warm else 1.0,
            beams=int(beams),
        )

    @staticmethod
    def _ends(options: dict[str, Any]) -> tuple[str, ...]:
        until = options.get("until") or ()
        return (until,) if isinstance(until, str) else tuple(end for end in until if end)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not served: tasks of likelihoods are refused in one line."""
        raise InputError("LaVIT answers tasks of kind generate_until; choose such a task")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not served: refused in one line."""
        raise InputError("LaVIT answers tasks of one round (generate_until); choose such a task")


def _message(parts: Sequence[Any]) -> dict[str, Any]:
    kinds = ("text" if isinstance(part, str) else "image" for part in parts)
    content = [{"type": kind, kind: part} for kind, part in zip(kinds, parts, strict=True)]
    return {"role": "user", "content": content}


def _text(reply: Any) -> str:
    return "".join(part["text"] for part in reply["content"] if part["type"] == "text")

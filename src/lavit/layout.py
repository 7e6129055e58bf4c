"""Words and pictures in order: the only place that knows how the documents of stage 2 are laid out.

A prompt is a list of parts, `TextPart` and `ImagePart`. The functions here put parts in order for
each kind of document; `segments` turns them into ids. Training, generation, scoring and samples all
go through it, so what is learnt is what is asked (`.` is the LM's end token):

    reading        [image read] caption .
    asking         [image read] Question: … Answer: | answer . Question: … Answer: | answer .
    drawing        prompt [image written] .
    editing        [image] instruction | [image written] .
    composing      [image] [image] instruction | [image written] .
    (what stands before | gives no loss; conversation.py lays out conversations)

A picture that words are to follow is read: it enters as continuous features. One that a picture is
to follow enters as its codes; of a picture that the assistant wrote those it wrote (method, Sec. 3
and 5). Each part is tokenised on its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lavit.config import InputError
from lavit.sequence import Document, Image, Text

UNWANTED = re.compile(r'[.!"()*#:;~]')  # removed from questions
QUESTION_WORDS = 50
HALF = re.compile("[\ud800-\udfff]")  # of a character: of bytes that are no UTF-8, or bad JSON


@dataclass(frozen=True)
class TextPart:
    """A piece of text; `target`: it is learnt; `ends`: the LM's end token follows it.

    `controls`: control tokens that it spells are meant, since a chat template wrote it.
    """

    text: str
    target: bool = False
    ends: bool = False
    controls: bool = False


@dataclass(frozen=True, eq=False)
class ImagePart:
    """A picture in any form its user can open; `read`: as features, else as its `codes` (if known).

    `target` and `ends` are those of `TextPart`; `keep` is the keep policy of its encoding, in any
    form that `KeepPolicy.parse` takes.
    """

    image: Any
    read: bool
    target: bool = False
    ends: bool = False
    codes: tuple[int, ...] | None = None
    keep: Any = "auto"


Part = TextPart | ImagePart


def reading(image: Any, caption: str | None = None, *, keep: Any = "auto") -> list[Part]:
    """A picture and its caption; without one, what captions go on from."""
    seen = ImagePart(image, read=True, target=True, keep=keep)
    return [seen] if caption is None else [seen, TextPart(caption, target=True, ends=True)]


def asking(image: Any, *asked: tuple[str, str | None], keep: Any = "auto") -> list[Part]:
    """A picture, questions and answers; an answer of None is what the model is to write."""
    parts: list[Part] = [ImagePart(image, read=True, keep=keep)]
    for question, answer in asked:
        parts.append(TextPart(question_text(question)))
        if answer is not None:
            parts.append(TextPart(answer_text(answer), target=True, ends=True))
    return parts


def drawing(prompt: str | None, image: Any = None) -> list[Part]:
    """A prompt and the picture of it; without a prompt, the unconditional branch of guidance."""
    parts: list[Part] = []
    if prompt is not None:
        parts.append(TextPart(prompt, target=image is not None))
    if image is not None:
        parts.append(ImagePart(image, read=False, target=True, ends=True))
    return parts


def editing(sources: Sequence[Any], instruction: str, image: Any = None) -> list[Part]:
    """Pictures, what is to be made of them, and the picture that was."""
    parts: list[Part] = [ImagePart(source, read=False) for source in sources]
    parts.append(TextPart(instruction))
    return (
        parts if image is None else [*parts, ImagePart(image, read=False, target=True, ends=True)]
    )


def mixed(items: Sequence[Any], *, read: bool) -> list[Part]:
    """Words (strings) and pictures (anything else) in the order they are given."""
    if not items:
        raise InputError("give at least one picture or word to draw from")
    return [TextPart(i) if isinstance(i, str) else ImagePart(i, read=read) for i in items]


def normalised(question: str) -> str:
    """A question in the paper's form: lower case, cleaned, at most 50 words."""
    words = UNWANTED.sub("", question.lower()).split()
    return " ".join(words[:QUESTION_WORDS])


def question_text(question: str) -> str:
    """The paper's prompt for questions, in training and in use."""
    return f"Question: {normalised(question)} Answer:"


def answer_text(answer: str) -> str:
    """An answer as it follows the prompt."""
    return f" {answer}"


def ids_of(
    tokenizer: PreTrainedTokenizerBase, text: str, controls: bool = False
) -> tuple[int, ...]:
    """Ids of a text, without the tokenizer's own begin and end.

    Control tokens that it spells are words like others, unless `controls` are meant.
    """
    if half := HALF.search(text):
        raise InputError(f"a text holds {half[0]!r}, which is no character: is it UTF-8?")
    options = {"add_special_tokens": False, "split_special_tokens": not controls}
    return tuple(tokenizer(text, verbose=False, **options)["input_ids"])


def segments(
    parts: Sequence[Part],
    ids: Callable[[str, bool], tuple[int, ...]],
    codes: Callable[[ImagePart], tuple[int, ...]],
    end: int,
    *,
    read_as: Literal["features", "codes"] = "features",
    rows: Callable[[int], int] | None = None,
) -> Document:
    """Parts as segments of ids: `ids` tokenises text, `codes` looks pictures up or looks at them.

    `ids` also takes whether control tokens are meant. A part's `image` becomes the segment's index
    where it is a number. With `read_as` "codes" no picture enters as features; `rows` says as how
    many of them one with so many codes does (None: as many).
    """
    found: list[Text | Image] = []
    for part in parts:
        if isinstance(part, TextPart):
            words = ids(part.text, part.controls)
            found.append(Text((*words, *[end] * part.ends), target=part.target))
            continue
        part = replace(part, read=part.read and read_as == "features")
        index = part.image if isinstance(part.image, int) else -1
        own = codes(part)
        entering = rows(len(own)) if rows and part.read else None
        found.append(Image(own, part.read, index, target=part.target, rows=entering))
        if part.ends:
            found.append(Text((end,), target=part.target))
    return tuple(found)

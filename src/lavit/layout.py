"""Words and pictures in order: the only place that knows how the documents of stage 2 are laid out.

A prompt is a list of parts, `TextPart` and `ImagePart`. The functions here put parts in order for
each kind of document; `segments` turns them into ids. Training, generation, scoring and samples all
go through it, so what is learnt is what is asked (`.` is the LM's end token):

    reading        [image read] caption .
    asking         [image read] Question: … Answer: | answer . Question: … Answer: | answer .
    drawing        prompt [image written] .
    editing        [image] instruction | [image written] .
    composing      [image] [image] instruction | [image written] .
    conversation   the text tokenizer's chat template where it has one; else turns are lines:
                       reply in words      [image] Question: … Answer: | answer ⏎
                                           (a picture alone is answered as captions are)
                       reply is a picture  [image] instruction | [image written] ⏎
                       reply left open     [image] words |
    (what stands before | gives no loss)

A picture that words are to follow is read: it enters as continuous features. One that a picture is
to follow enters as its codes; of a picture that the assistant wrote those it wrote (method, Sec. 3
and 5). Each part is tokenised on its own.

Messages of conversations are those of Hugging Face chats: {"role": "user", "content": "…"} or, with
pictures, a list of parts, {"type": "text", "text": …} and {"type": "image", "image": path or PIL
image}. A picture may say how many patches to "keep". One that the assistant wrote may carry its
"codes": where it enters as codes, these. Words of a message stay words: one that spells a control
token of the template (`<|im_end|>`) is not a control token.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lavit.config import InputError
from lavit.sequence import Document, Image, Text

Reply = Literal["text", "image", "auto"]
UNWANTED = re.compile(r'[.!"()*#:;~]')  # removed from questions
QUESTION_WORDS = 50
HALF = re.compile("[\ud800-\udfff]")  # of a character: of bytes that are no UTF-8, or bad JSON
ROLES = ("system", "user", "assistant")
Flat = list[tuple[str, str]]  # role, and text with marks for pictures
Spans = list[tuple[str, bool]]  # text with marks, and whether it is learnt
# a picture, or words that spell a control token, while text is laid out; private characters
MARK = re.compile("\ue000(\\d+)\ue001")


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


@dataclass(frozen=True)
class Turn:
    """A checked message: its pieces are strings and pictures."""

    role: str
    pieces: tuple[str | ImagePart, ...]

    @property
    def kind(self) -> str:
        """Whether it holds a picture."""
        return "image" if any(isinstance(piece, ImagePart) for piece in self.pieces) else "text"


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise `InputError` for messages of another form."""
    _turns(messages)


def conversation(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    reply: Reply,
) -> list[Part]:
    """A conversation up to where the assistant's `reply` begins.

    Neighbours of one role are one turn. Raises `InputError` for messages of another form.
    """
    turns = _turns(messages)
    if reply not in ("text", "image", "auto"):
        raise InputError(f"reply {reply!r} is not known: use 'text', 'image' or 'auto'")
    if turns[-1].role != "user":
        last = f"the last message is of the {turns[-1].role}"
        raise InputError(f"{last}: add the user's, which is to be answered")
    return _laid(turns, tokenizer, reply)


def replies(
    messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> list[list[Part]]:
    """A document for each turn of the assistant: what stands before it, and the turn, to be learnt.

    Each begins as `conversation` lays out the messages before that turn.
    """
    turns = _turns(messages)
    if turns[-1].role != "assistant":
        raise InputError("a complete conversation ends with the assistant's message")
    ends = [number for number, turn in enumerate(turns, 1) if turn.role == "assistant"]
    return [_laid(turns[:end], tokenizer, None) for end in ends]


def _laid(
    turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, reply: Reply | None
) -> list[Part]:
    """Parts of turns; without a `reply` to come, the last turn is one, and is learnt."""
    kinds = [turn.kind for turn in turns]
    read = (reply or kinds[-1]) == "text"
    marked: list[Part] = []
    flat: Flat = []

    def mark(part: Part) -> str:
        marked.append(part)
        return f"\ue000{len(marked) - 1}\ue001"

    for number, turn in enumerate(turns, 1):
        learnt = reply is None and number == len(turns)
        text = ""
        for piece in turn.pieces:
            if isinstance(piece, ImagePart):
                text += mark(replace(piece, read=read and not learnt, target=learnt))
                continue
            for place, words in enumerate(_controls(tokenizer, turn.role).split(piece)):
                halves = (words[:1], words[1:]) if place % 2 else ()  # none is a token by itself
                text += "".join(mark(TextPart(half, learnt)) for half in halves) or words
        flat.append((turn.role, text))
    if tokenizer.chat_template:
        return _parts(_templated(flat, tokenizer, reply), marked, controls=True)
    parts = _parts(_plain(flat, [*kinds[1:], reply]), marked, controls=False)
    return parts if reply else [*parts[:-1], replace(parts[-1], ends=True)]


def _controls(tokenizer: PreTrainedTokenizerBase, role: str) -> re.Pattern[str]:
    """What a template alone may write; of its markers of turns, not all are special everywhere."""
    template = str(tokenizer.chat_template) if role != "assistant" else ""
    tokens = tokenizer.added_tokens_decoder.values() if tokenizer.chat_template else ()
    named = {one.content for one in tokens if one.content.strip() and one.content in template}
    known = sorted(named | {one.content for one in tokens if one.special}, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, known)) or '(?!)'})")


def turn_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that closes an assistant's turn; without a template the LM's end token does."""
    if not tokenizer.chat_template:
        return ""
    text = _apply([("user", "?"), ("assistant", "\ue0000\ue001")], tokenizer)
    return text.split("\ue001")[-1]


def _turns(messages: Any) -> list[Turn]:
    """Checked messages, with one turn for neighbours of one role, a line each."""
    if isinstance(messages, Mapping | str) or not isinstance(messages, Iterable) or not messages:
        like = '{"role": "user", "content": "hello"}'
        raise InputError(f"a conversation is a list of messages such as {like}")
    turns: list[Turn] = []
    for turn in [_turn(message, number) for number, message in enumerate(messages)]:
        if turns and turns[-1].role == turn.role:
            turns[-1] = Turn(turn.role, (*turns[-1].pieces, "\n", *turn.pieces))
        else:
            turns.append(turn)
    roles = [turn.role for turn in turns]
    if "user" not in roles or roles[0] == "assistant":
        begin = "a conversation begins with the user (or a system message)"
        raise InputError(f"{begin}: the assistant answers")
    if any(turn.role == "system" and turn.kind == "image" for turn in turns):
        raise InputError("a system message holds text only: put the picture into a user's message")
    return turns


def _turn(message: Any, number: int) -> Turn:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        like = "give a dict with 'role' and 'content'"
        raise InputError(f"message {number} is not a message: {like}")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise InputError(f"message {number} has role {role!r}: use one of {', '.join(ROLES)}")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, Sequence) or not parts:
        raise InputError(f"message {number} is empty: give text, or a list of text and image parts")
    return Turn(role, tuple(_piece(part, number) for part in parts))


def _piece(part: Any, number: int) -> str | ImagePart:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        if wrong := re.search("[\ud800-\udfff\ue000\ue001]", part["text"]):
            marks = "U+E000 or U+E001, which mark pictures, or half a character (a surrogate)"
            raise InputError(f"message {number} holds {marks}: remove {wrong[0]!r}")
        return part["text"]
    picture = part.get("image", part.get("path")) if kind == "image" else None
    if picture is None:
        forms = "{'type': 'text', 'text': …} nor {'type': 'image', 'image': path or PIL image}"
        raise InputError(f"message {number} has a part that is neither {forms}")
    codes = part.get("codes")
    if codes is None:
        return ImagePart(picture, read=False, keep=part.get("keep", "auto"))
    try:
        numbers = tuple(map(operator.index, codes))
    except TypeError:
        numbers = ()
    if not numbers or min(numbers) < 0:
        bad = f"message {number} has a picture of no codes but {codes!r:.40}"
        raise InputError(f"{bad}: leave 'codes' out, or give numbers from 0, one at least")
    return ImagePart(picture, read=False, codes=numbers)


def _templated(flat: Flat, tokenizer: PreTrainedTokenizerBase, reply: Reply | None) -> Spans:
    """What stands before the reply, and the reply if it is there, by the tokenizer's template."""
    turns = len(flat) - (reply is None)
    before = _apply(flat[:turns], tokenizer, open_reply=True)
    if reply is not None:
        return [(before, False)]
    whole = _apply(flat, tokenizer)
    if not whole.startswith(before):
        bad = "the chat template of this tokenizer changes earlier turns when a message is added"
        raise InputError(f"{bad}: set tokenizer.chat_template to one that only appends")
    return [(before, False), (whole[len(before) :], True)]


def _apply(flat: Flat, tokenizer: PreTrainedTokenizerBase, *, open_reply: bool = False) -> str:
    from jinja2 import TemplateError

    messages = [{"role": role, "content": text} for role, text in flat]
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": open_reply}
    try:
        return str(tokenizer.apply_chat_template(messages, **options))
    except TemplateError as error:
        refused = "the tokenizer's chat template refuses this conversation"
        raise InputError(f"{refused}: {error}") from error


def _plain(flat: Flat, kinds: list[str | None]) -> Spans:
    """The layout of the header for tokenizers without a template."""
    spans: Spans = []
    framed = False
    for (role, text), kind in zip(flat, kinds, strict=True):
        learnt = kind is None and role == "assistant"
        if role == "assistant":
            said = answer_text(text) if framed else text
            spans.append((said if learnt else said + "\n", learnt))
            continue
        framed = role == "user" and kind == "text" and bool(MARK.sub("", text).strip())
        if framed:
            first = re.match(f"(?:\\s*{MARK.pattern})*", text)
            pictures = first.group() if first else ""
            asked = question_text(text[len(pictures) :])
            if len(MARK.findall(pictures + asked)) < len(MARK.findall(text)):
                behind = f"a picture stands behind the first {QUESTION_WORDS} words of a question"
                raise InputError(f"{behind}: put it before them")
            text = pictures + asked
        spans.append((text + "\n" * (role == "system"), False))
    return spans


def _parts(spans: Spans, marked: Sequence[Part], *, controls: bool) -> list[Part]:
    """Spans with their marks turned into what they stand for."""
    parts: list[Part] = []
    for text, target in spans:
        for place, piece in enumerate(MARK.split(text)):
            if place % 2:
                parts.append(marked[int(piece)])
            elif piece:
                parts.append(TextPart(piece, target, controls=controls))
    return parts

"""Messages in order: the only place that knows how conversations are laid out.

Their turns are parts of layout.py, in the text tokenizer's chat template where it has one; else
turns are lines:

    reply in words      [image] Question: … Answer: | answer ⏎
                        (a picture alone is answered as captions are)
    reply is a picture  [image] instruction | [image written] ⏎
    reply left open     [image] words |
    (what stands before | gives no loss; in a template earlier replies of the same kind do)

Messages of conversations are those of Hugging Face chats: {"role": "user", "content": "…"} or, with
pictures, a list of parts, {"type": "text", "text": …} and {"type": "image", "image": path or PIL
image}. A picture may say how many patches to "keep". One that the assistant wrote may carry its
"codes": where it enters as codes, these. Words of a message stay words: one that spells a control
token of the template (`<|im_end|>`) is not a control token.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lavit.config import InputError
from lavit.layout import QUESTION_WORDS, ImagePart, Part, TextPart, answer_text, question_text

Reply = Literal["text", "image", "auto"]
ROLES = ("system", "user", "assistant")
Flat = list[tuple[str, str]]  # role, and text with marks for pictures
Spans = list[tuple[str, bool]]  # text with marks, and whether it is learnt
# a picture, or words that spell a control token, while text is laid out; private characters
MARK = re.compile("\ue000(\\d+)\ue001")


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
    """Documents in which every turn of the assistant is learnt once, behind what stands before it.

    With a chat template that only appends, one for each kind of turn, with all turns of this kind;
    else one for each turn. Each begins as `conversation` lays out the messages before such a turn.
    """
    turns = _turns(messages)
    if turns[-1].role != "assistant":
        raise InputError("a complete conversation ends with the assistant's message")
    ends = [number for number, turn in enumerate(turns, 1) if turn.role == "assistant"]
    learnt = {end: [end] for end in ends}
    if tokenizer.chat_template and _appended(_flat(turns, tokenizer, []), tokenizer, ends):
        alike = [[end for end in ends if turns[end - 1].kind == kind] for kind in ("text", "image")]
        learnt = {kind[-1]: kind for kind in sorted(filter(None, alike), key=max)}
    return [_laid(turns[:end], tokenizer, None, learnt[end]) for end in learnt]


def _laid(
    turns: Sequence[Turn],
    tokenizer: PreTrainedTokenizerBase,
    reply: Reply | None,
    learnt: Sequence[int] = (),
) -> list[Part]:
    """Parts of turns up to a `reply`, or to the last turn: turns of these numbers are learnt."""
    kinds = [turn.kind for turn in turns]
    marked: list[Part] = []
    flat = _flat(turns, tokenizer, marked, read=(reply or kinds[-1]) == "text")
    if tokenizer.chat_template:
        return _parts(_templated(flat, tokenizer, reply, learnt), marked, controls=True)
    parts = _parts(_plain(flat, [*kinds[1:], reply]), marked, controls=False)
    return parts if reply else [*parts[:-1], replace(parts[-1], ends=True)]


def _flat(
    turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, marked: list[Part], read: bool = True
) -> Flat:
    """Turns as text with marks for pictures and for words that spell control tokens: `marked`."""

    def mark(part: Part) -> str:
        marked.append(part)
        return f"\ue000{len(marked) - 1}\ue001"

    flat: Flat = []
    for turn in turns:
        text = ""
        for piece in turn.pieces:
            if isinstance(piece, ImagePart):
                text += mark(replace(piece, read=read))
                continue
            for place, words in enumerate(_controls(tokenizer, turn.role).split(piece)):
                halves = (words[:1], words[1:]) if place % 2 else ()  # none is a token by itself
                text += "".join(mark(TextPart(half)) for half in halves) or words
        flat.append((turn.role, text))
    return flat


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


def _templated(
    flat: Flat, tokenizer: PreTrainedTokenizerBase, reply: Reply | None, learnt: Sequence[int]
) -> Spans:
    """What stands before the reply, or turns of which these are learnt, by the chat template."""
    if reply is not None:
        return [(_apply(flat, tokenizer, open_reply=True), False)]
    spans = _appended(flat, tokenizer, learnt)
    if spans is None:
        bad = "the chat template of this tokenizer changes earlier turns when a message is added"
        raise InputError(f"{bad}: set tokenizer.chat_template to one that only appends")
    return spans


def _appended(
    flat: Flat, tokenizer: PreTrainedTokenizerBase, learnt: Sequence[int]
) -> Spans | None:
    """Turns up to the last of these numbers, which are learnt; None where one of them does not
    only add text to what stands before it.
    """
    spans: Spans = []
    text = ""
    for end in learnt:
        for turns, target in ((end - 1, False), (end, True)):
            before, text = text, _apply(flat[:turns], tokenizer, open_reply=not target)
            if not text.startswith(before):
                return None
            spans.append((text[len(before) :], target))
    return spans


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
                parts.append(replace(marked[int(piece)], target=target))
            elif piece:
                parts.append(TextPart(piece, target, controls=controls))
    return parts

"""Conversations as text and pictures in order: one layout for training (data/) and use (generate/).

Messages are those of Hugging Face chats: {"role": "user", "content": "…"} or, with pictures, a list
of parts, {"type": "text", "text": …} and {"type": "image", "image": path or PIL image}. A picture
that the assistant wrote may carry its "codes": they, not a new look at the picture, stand in the
conversation then.

The text around them is the text tokenizer's chat template where it has one. Where it has none, one
turn is laid out as the documents of stage 2 are (data/documents.py), and turns are lines:

    reply in words      [image] Question: … Answer: | answer ⏎
                        (a picture alone is answered as captions are)
    reply is a picture  [image] instruction | [image written] ⏎
    reply left open     [image] words |             (what stands before | gives no loss)

A picture of the user's is read, as features, where the reply to its message is in words, and enters
as its codes where the reply holds a picture (method, Sec. 5: prompts for writing); the assistant's
pictures are codes. Each part is tokenised on its own, so both sides get the same ids.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from lavit.config import InputError
from lavit.data.documents import answer_text, question_text

Reply = Literal["text", "image", "auto"]
ROLES = ("system", "user", "assistant")
Flat = list[tuple[str, str]]  # role, and text with marks for pictures
Spans = list[tuple[str, bool]]  # text with marks, and whether the assistant wrote it
MARK = re.compile("\ue000(\\d+)\ue001")  # a picture while text is laid out; private characters


@dataclass(frozen=True)
class ChatText:
    """A piece of text; `target`: the assistant wrote it, so it trains."""

    text: str
    target: bool = False


@dataclass(frozen=True, eq=False)
class ChatPicture:
    """A picture as the message gave it; `read`: as features, else as its `codes` (if known).

    `keep` is the keep policy of a look at it, in any form that `KeepPolicy.parse` takes.
    """

    picture: Any
    read: bool
    target: bool = False
    codes: tuple[int, ...] | None = None
    keep: Any = "auto"


@dataclass(frozen=True)
class Turn:
    """A checked message: its pieces are strings and pictures."""

    role: str
    pieces: tuple[str | ChatPicture, ...]

    @property
    def pictured(self) -> bool:
        """True where it holds a picture."""
        return any(isinstance(piece, ChatPicture) for piece in self.pieces)


def render_chat(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    reply: Reply | None = None,
) -> list[ChatText | ChatPicture]:
    """Text and pictures of a conversation, in order.

    reply: what the assistant is to write next; the layout then ends where it begins. None: the
    conversation is complete (training) and ends with what the assistant wrote. Neighbours of one
    role are one turn. Raises `InputError` for messages of another form.
    """
    turns = _turns(messages, reply)
    # what the message after each one is: "text", "image", or what is asked for
    replies = [*("image" if turn.pictured else "text" for turn in turns[1:]), reply]
    pictures: list[ChatPicture] = []
    flat: Flat = []
    for turn, kind in zip(turns, replies, strict=True):
        mine = turn.role == "assistant"
        text = ""
        for piece in turn.pieces:
            if isinstance(piece, ChatPicture):
                text += f"\ue000{len(pictures)}\ue001"
                pictures.append(replace(piece, read=not mine and kind != "image", target=mine))
            else:
                text += piece
        flat.append((turn.role, text))
    if tokenizer.chat_template:
        return _parts(_templated(flat, tokenizer, reply), pictures)
    return _parts(_plain(flat, replies), pictures)


def turn_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that closes an assistant's turn."""
    if not tokenizer.chat_template:
        return "\n"
    text = _apply([("user", "?"), ("assistant", "\ue0000\ue001")], tokenizer)
    return text.split("\ue001")[-1]


def _turns(messages: Any, reply: Any) -> list[Turn]:
    """Checked messages, with one turn for neighbours of one role, a line each."""
    if reply not in (None, "text", "image", "auto"):
        raise InputError(f"reply {reply!r} is not known: use 'text', 'image' or 'auto'")
    if isinstance(messages, Mapping | str) or not messages:
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
    if reply is not None and roles[-1] != "user":
        last = f"the last message is of the {roles[-1]}"
        raise InputError(f"{last}: add the user's, which is to be answered")
    if reply is None and roles[-1] != "assistant":
        raise InputError("a complete conversation ends with the assistant's message")
    if any(turn.role == "system" and turn.pictured for turn in turns):
        cure = "put the picture into a user's message"
        raise InputError(f"a system message holds text only: {cure}")
    return turns


def _turn(message: Any, number: int) -> Turn:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise InputError(f"message {number} is no message: give a dict with 'role' and 'content'")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise InputError(f"message {number} has role {role!r}: use one of {', '.join(ROLES)}")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, Sequence) or not parts:
        raise InputError(f"message {number} is empty: give text, or a list of text and image parts")
    return Turn(role, tuple(_piece(part, number) for part in parts))


def _piece(part: Any, number: int) -> str | ChatPicture:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        if "\ue000" in part["text"] or "\ue001" in part["text"]:
            marks = "the characters U+E000 or U+E001, which mark pictures"
            raise InputError(f"message {number} holds {marks}: remove them")
        return part["text"]
    picture = part.get("image", part.get("path")) if kind == "image" else None
    if picture is None:
        raise InputError(
            f"message {number} has a part that is neither {{'type': 'text', 'text': …}} nor "
            "{'type': 'image', 'image': path or PIL image}"
        )
    codes = part.get("codes")
    if codes is None:
        return ChatPicture(picture, read=False)
    if not len(codes):
        empty = f"message {number} has a picture of no codes"
        raise InputError(f"{empty}: leave 'codes' out, or give at least one")
    return ChatPicture(picture, read=False, codes=tuple(map(int, codes)))


def _templated(flat: Flat, tokenizer: PreTrainedTokenizerBase, reply: Reply | None) -> Spans:
    """Text and whether it is the assistant's, from the tokenizer's own template."""
    ends = []  # of what is said up to there: how many turns, and whether a reply is opened
    for number, (role, _) in enumerate(flat):
        if role == "assistant":
            ends += [(number, True), (number + 1, False)]
    if reply is not None:
        ends.append((len(flat), True))
    spans: Spans = []
    done = ""
    for turns, opens in ends:
        text = _apply(flat[:turns], tokenizer, open_reply=opens)
        if not text.startswith(done):
            bad = "the chat template of this tokenizer changes earlier turns when a message is added"
            raise InputError(f"{bad}: set tokenizer.chat_template to one that only appends")
        spans.append((text[len(done) :], not opens))
        done = text
    return spans


def _apply(flat: Flat, tokenizer: PreTrainedTokenizerBase, *, open_reply: bool = False) -> str:
    from jinja2 import TemplateError

    messages = [{"role": role, "content": text} for role, text in flat]
    options = {"tokenize": False, "add_generation_prompt": open_reply}
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except TemplateError as error:
        refused = "the tokenizer's chat template refuses this conversation"
        raise InputError(f"{refused}: {error}") from error


def _plain(flat: Flat, replies: list[str | None]) -> Spans:
    """The layout of the header for tokenizers without a template."""
    spans: Spans = []
    framed = False
    for number, ((role, text), kind) in enumerate(zip(flat, replies, strict=True)):
        last = number == len(flat) - 1
        if role == "assistant":
            spans.append(((answer_text(text) if framed else text) + "\n" * (not last), True))
            continue
        framed = role == "user" and kind == "text" and bool(MARK.sub("", text).strip())
        if framed:
            pictures = re.match(f"(?:\\s*{MARK.pattern})*", text).group()
            text = pictures + question_text(text[len(pictures) :].strip())
        spans.append((text + "\n" * (role == "system"), False))
    return spans


def _parts(spans: Spans, pictures: list[ChatPicture]) -> list[ChatText | ChatPicture]:
    """Spans with their marks turned into pictures; neighbours of one kind are joined."""
    parts: list[ChatText | ChatPicture] = []
    for text, target in spans:
        for place, piece in enumerate(MARK.split(text)):
            if place % 2:
                parts.append(pictures[int(piece)])
            elif piece and parts and isinstance(parts[-1], ChatText) and parts[-1].target == target:
                parts[-1] = ChatText(parts[-1].text + piece, target)
            elif piece:
                parts.append(ChatText(piece, target))
    return parts

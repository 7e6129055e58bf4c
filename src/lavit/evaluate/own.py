"""A user's own items, one JSON object a line, judged as the scenes are.

    {"kind": "read", "pictures": ["a.png"], "facts": "two owls on a plain blue background"}
    {"kind": "ask", "pictures": ["a.png"], "question": "how many owls?", "answers": ["two"]}
    {"kind": "draw", "prompt": "an owl above a red star", "facts": "an owl above a red star"}
    {"kind": "edit", "pictures": ["a.png"], "prompt": "remove the star", "facts": "an owl"}
    {"kind": "chat", "turns": [{"text": "what is it?", "pictures": ["a.png"], "answers": ["owl"]},
                               {"text": "draw it twice", "facts": "two owls"}]}

Pictures are paths beside the file. In place of pictures a "scene" may stand: {"background",
"pattern", "style", "things": [{"name", "size", "cell", "colour"}]}, which is rendered; of a scene
that is read, the facts are its own unless given. "facts" are a sentence in the language of scenes;
what it does not say is free. "answers" are all right answers. A turn of a chat that has facts is
answered by a picture, one with answers by words.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from lavit.config import InputError
from lavit.data.scenes.parse import parse
from lavit.data.scenes.questions import normal
from lavit.data.scenes.sample import nominal
from lavit.data.scenes.world import BACKGROUNDS, COLOURS, PATTERNS, SHAPES, STYLES, Facts, Scene, Thing, facts, objects
from lavit.evaluate.drawing import atoms_of, codes_for, packed, painted, unpacked
from lavit.evaluate.exam import Exam, Missing
from lavit.evaluate.figures import Figure, mean, share
from lavit.images import open_image

KINDS = ("read", "draw", "ask", "edit", "chat")


@dataclass(frozen=True)
class Turn:
    """One request: words and pictures, and what is right."""

    text: str
    pictures: tuple[str | Scene, ...] = ()
    facts: Facts | None = None
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Item:
    """One line of the file; what is no chat has one turn."""

    kind: str
    turns: tuple[Turn, ...]


def load_items(path: Path) -> list[Item]:
    """All items of a file; a line that cannot be used raises `InputError` with its number."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    items = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            items.append(_item(json.loads(line), path.parent))
        except (InputError, ValueError, KeyError, TypeError) as error:
            said = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
            raise InputError(f"{path}, line {number}: {said}") from error
    if not items:
        raise InputError(f"{path} holds no items: a line is an object with kind, and what it needs")
    return items


def _item(row: Any, folder: Path) -> Item:
    if not isinstance(row, Mapping):
        raise InputError("an item is an object with kind, and what it needs")
    kind = row.get("kind")
    if kind not in KINDS:
        raise InputError(f"kind is {kind!r}: give one of {', '.join(KINDS)}")
    if kind == "chat":
        if not isinstance(row["turns"], list) or not row["turns"]:
            raise InputError("turns is a list of what the user says")
        turns = tuple(_turn(turn, turn["text"], folder) for turn in row["turns"])
        return Item(kind, turns)
    words = {"read": "", "ask": "question"}.get(kind, "prompt")
    turn = _turn(row, row[words] if words else "", folder)
    if kind != "draw" and not turn.pictures:
        raise InputError(f"an item of kind {kind!r} needs pictures or a scene")
    if (kind == "ask" and not turn.answers) or (kind != "ask" and turn.facts is None):
        raise InputError(f"an item of kind {kind!r} needs {'answers' if kind == 'ask' else 'facts'}")
    if kind == "edit" and "facts" not in row:
        raise InputError("an edit needs the facts of what it should give")
    return Item(kind, (turn,))


def _turn(row: Mapping[str, Any], text: Any, folder: Path) -> Turn:
    if not isinstance(text, str):
        raise InputError(f"{text!r} is no text")
    pictures: list[str | Scene] = []
    given = row.get("pictures", [])
    for name in [given] if isinstance(given, str) else given:
        path = folder / name
        open_image(path)
        pictures.append(str(path))
    said: Facts | None = None
    if "scene" in row:
        scene = scene_of(row["scene"])
        pictures.append(scene)
        said = facts(scene)
    if "facts" in row:
        said = parse(row["facts"]) if isinstance(row["facts"], str) else None
        if said is None:
            raise InputError(f"facts {row['facts']!r} is no sentence about a scene")
    answers = row.get("answers", ())
    answers = (answers,) if isinstance(answers, str) else tuple(str(one) for one in answers)
    return Turn(text, tuple(pictures), None if answers else said, answers)


def scene_of(row: Mapping[str, Any]) -> Scene:
    """A scene that is written out."""
    if not isinstance(row, Mapping):
        raise InputError("a scene is an object with background, pattern, style and things")
    for name, known in (("background", BACKGROUNDS), ("pattern", PATTERNS), ("style", STYLES)):
        if row.get(name) not in known:
            raise InputError(f"{name} is {row.get(name)!r}: give one of {', '.join(known)}")
    things = []
    for one in sorted(row["things"], key=lambda thing: tuple(thing["cell"])):
        size, cell = one.get("size", "small"), tuple(one["cell"])
        if size not in ("small", "big") or cell not in [(r, c) for r in range(3) for c in range(3)]:
            raise InputError(f"a thing has size small or big and a cell from [0, 0] to [2, 2]: {size!r}, {cell}")
        name, colour = one["name"], one.get("colour")
        names = SHAPES if colour in COLOURS else [kind.name for kind in objects()]
        if colour not in (None, *COLOURS) or name not in names:
            raise InputError(f"there is no thing {name!r} with colour {colour!r}")
        things.append(Thing(name, colour, size, cell, nominal(cell, size), 0.0))
    return Scene(row["background"], row["pattern"], row["style"], tuple(things))


def _shown(exam: Exam, turn: Turn) -> list[Image]:
    return [exam.picture(one) if isinstance(one, Scene) else open_image(one) for one in turn.pictures]


def _task(items: list[Item], name: str) -> str:
    """The name under which answers are kept: those of other items are none of these."""
    return f"own {name} {hashlib.sha256(repr(items).encode()).hexdigest()[:12]}"


def chats(exam: Exam, items: list[Item]) -> list[list[dict[str, str]]]:
    """The model's replies to each chat, turn by turn, its own replies standing in the talk."""
    exam.needs("language")

    def make(numbers: list[int]) -> list[list[dict[str, str]]]:
        return [_talk(exam, items[number], number) for number in numbers]

    return exam.made(_task(items, "chat"), range(len(items)), make, together=1)


def _talk(exam: Exam, item: Item, number: int) -> list[dict[str, str]]:
    messages: list[Any] = []
    replies: list[dict[str, str]] = []
    for turn in item.turns:
        content: list[dict[str, Any]] = [{"type": "image", "image": one} for one in _shown(exam, turn)]
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": turn.text}]})
        out = "text" if turn.facts is None else "image"
        if out == "image":
            exam.needs("pixels")
        reply = exam.pipe.chat(messages, out=out, seed=exam.seeds([number])[0])
        messages.append(reply)
        parts = reply["content"]
        texts = [part["text"] for part in parts if part["type"] == "text"]
        pictures = [packed(part["image"]) for part in parts if part["type"] == "image"]
        replies.append({"picture": pictures[0]} if out == "image" else {"text": " ".join(texts)})
    return replies


def _chosen(exam: Exam, *kinds: str) -> list[Item]:
    if exam.items is None:
        raise Missing("no items were given (--items FILE.jsonl)")
    found = [item for item in exam.items if item.kind in kinds]
    if not found:
        raise Missing(f"the items hold none of kind {' or '.join(kinds)}")
    return found


def own_read(exam: Exam) -> Figure:
    """Share of the items' pictures of which the caption states all facts that the item states, and
    no wrong ones.
    """
    items = _chosen(exam, "read")
    exam.needs("language")

    def make(numbers: list[int]) -> list[str]:
        return exam.pipe.caption([_shown(exam, items[n].turns[0])[0] for n in numbers], seed=exam.seed)

    texts = exam.made(_task(items, "read"), range(len(items)), make)
    said = [item.turns[0].facts for item in items]
    return share("own_read", [covers(text, one) for text, one in zip(texts, said, strict=True)])


def covers(text: str, wanted: Facts) -> bool:
    """Does a text state all wanted facts, of just these things? What they leave open it may say as
    it likes.
    """
    said = parse(text)
    if said is None or {group.name for group in said.groups} != {group.name for group in wanted.groups}:
        return False
    if wanted.background not in (None, said.background) or wanted.pattern not in (
        None,
        said.pattern,
    ):
        return False
    for group in wanted.groups:
        own = said.group(group.name)
        if own.number != group.number or group.size not in (None, own.size) or group.colour not in (None, own.colour):
            return False
    return wanted.relations <= said.relations


def own_answer(exam: Exam) -> Figure:
    """Share of the items' questions, chats included, that are answered right."""
    items = _chosen(exam, "ask", "chat")
    exam.needs("language")
    asked = [item for item in items if item.kind == "ask"]

    def make(numbers: list[int]) -> list[str]:
        pictures = [_shown(exam, asked[n].turns[0])[0] for n in numbers]
        return exam.pipe.ask(pictures, [asked[n].turns[0].text for n in numbers], seed=exam.seed)

    said = exam.made(_task(asked, "ask"), range(len(asked)), make)
    hits = [_among(text, item.turns[0].answers) for text, item in zip(said, asked, strict=True)]
    talks = [item for item in items if item.kind == "chat"]
    for item, replies in zip(talks, chats(exam, talks), strict=True):
        pairs = zip(item.turns, replies, strict=True)
        hits += [_among(reply["text"], turn.answers) for turn, reply in pairs if turn.answers]
    if not hits:
        raise Missing("the items hold no question with answers")
    return share("own_answer", hits)


def _among(text: str, answers: tuple[str, ...]) -> bool:
    said = normal(text)
    return bool(said) and said in {normal(answer) for answer in answers}


def own_draw(exam: Exam) -> Figure:
    """Mean share of the stated facts that are right in what is drawn and edited, chats included."""
    items = _chosen(exam, "draw", "edit", "chat")
    exam.needs("language", "pixels")
    drawn = [item for item in items if item.kind != "chat"]

    def make(numbers: list[int]) -> list[list[int]]:
        turns = [drawn[n].turns[0] for n in numbers]
        return codes_for(exam, [[*_shown(exam, turn), turn.text] for turn in turns], exam.seeds(numbers))

    codes = exam.made(_task(drawn, "write"), range(len(drawn)), make)
    pictures = painted(exam, _task(drawn, "draw"), range(len(drawn)), codes)
    said = [item.turns[0].facts for item in drawn]
    talks = [item for item in items if item.kind == "chat"]
    for item, replies in zip(talks, chats(exam, talks), strict=True):
        for turn, reply in zip(item.turns, replies, strict=True):
            if turn.facts is not None:
                said.append(turn.facts)
                pictures.append(unpacked(reply["picture"]))
    if not said:
        raise Missing("the items ask for no picture")
    values = atoms_of(said, exam.judge.look(pictures))
    return mean("own_draw_atoms", values, within=(0.0, 1.0))


OWN: dict[str, Callable[[Exam], Figure]] = {
    "own_read": own_read,
    "own_answer": own_answer,
    "own_draw_atoms": own_draw,
}

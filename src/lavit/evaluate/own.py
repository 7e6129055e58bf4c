"""A user's own items, one JSON object a line, judged as the scenes are.

    {"kind": "read", "pictures": ["a.png"], "facts": "two owls on a plain blue background"}
    {"kind": "ask", "pictures": ["a.png"], "question": "how many owls?", "answers": ["two"]}
    {"kind": "draw", "prompt": "an owl above a red star", "facts": "an owl above a red star"}
    {"kind": "edit", "pictures": ["a.png"], "prompt": "remove the star", "facts": "an owl"}
    {"kind": "chat", "turns": [{"text": "what is it?", "pictures": ["a.png"], "answers": ["owl"]},
                               {"text": "draw it twice", "facts": "two owls"}]}

Pictures are paths below the file's folder. In place of pictures a "scene" may stand: {"background",
"pattern", "style", "things": [{"name", "size", "cell", "colour"}]}, which is rendered; of a scene
that is read, the facts are its own unless given. "facts" are a sentence in the language of scenes;
what it does not say is free. "answers" are all right answers. A turn of a chat that has facts is
answered by a picture, one with answers by words.

own_items.jsonl has a hundred in free English, worded as no training words them; they are asked
where nobody gives others, of models that know all their things. "as" there says a question in the
language of scenes, so that tests can tell that its answers are right.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from PIL.Image import Image

from lavit.config import InputError
from lavit.conversation import Reply as Kind
from lavit.data.scenes import world
from lavit.data.scenes.parse import parse
from lavit.data.scenes.questions import normal, true_of
from lavit.data.scenes.sample import nominal
from lavit.data.scenes.world import Facts, Scene, Thing, facts
from lavit.evaluate.conversing import PlainReply, plain_reply, user_message
from lavit.evaluate.drawing import atoms_of, drawn, unpacked
from lavit.evaluate.exam import Exam
from lavit.evaluate.examinee import Missing
from lavit.evaluate.figures import Figure, average, mean, share, turned
from lavit.evaluate.reading import model_answers
from lavit.files import sha256
from lavit.images import open_image

OWN_ITEMS = Path(__file__).with_name("own_items.jsonl")
KINDS = ("read", "draw", "ask", "edit", "chat")


@dataclass(frozen=True)
class OwnTurn:
    """One request: words and pictures, and what is right."""

    text: str
    pictures: tuple[str | Scene, ...] = ()
    facts: Facts | None = None
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class OwnItem:
    """One line of the file; all but chats have one turn."""

    kind: str
    turns: tuple[OwnTurn, ...]


def load_items(path: Path) -> list[OwnItem]:
    """All items of a file; a line that cannot be used raises `InputError` with its number."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    items = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            items.append(_item(json.loads(line), path.parent))
        except RecursionError as error:
            raise InputError(f"{path}, line {number}: it is nested too deeply") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            said = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
            raise InputError(f"{path}, line {number}: {said}") from error
    if not items:
        raise InputError(f"{path} holds no items: a line is an object with kind, and what it needs")
    return items


def _item(row: Any, folder: Path) -> OwnItem:
    if not isinstance(row, Mapping):
        raise InputError("an item is an object with kind, and what it needs")
    kind = row.get("kind")
    if kind not in KINDS:
        raise InputError(f"kind is {kind!r}: give one of {', '.join(KINDS)}")
    if kind == "chat":
        turns = row["turns"]
        if not isinstance(turns, list) or not turns or not all(isinstance(t, dict) for t in turns):
            raise InputError('turns is a list of {"text": …} with pictures, answers or facts')
        return OwnItem(kind, tuple(_turn(turn, turn["text"], folder) for turn in row["turns"]))
    words = {"read": "", "ask": "question"}.get(kind, "prompt")
    turn = _turn(row, row[words] if words else "", folder)
    if kind != "draw" and not turn.pictures:
        raise InputError(f"an item of kind {kind!r} needs pictures or a scene")
    if kind == "ask" and not turn.answers:
        raise InputError("an item of kind 'ask' needs answers")
    if kind != "ask" and turn.facts is None:
        raise InputError(f"an item of kind {kind!r} needs facts")
    if kind == "edit" and "facts" not in row:
        raise InputError("an edit needs the facts of what it should give")
    return OwnItem(kind, (turn,))


def _turn(row: Mapping[str, Any], text: Any, folder: Path) -> OwnTurn:
    if not isinstance(text, str):
        raise InputError(f"{text!r} is not a text")
    pictures: list[str | Scene] = []
    given = row.get("pictures", [])
    for name in [given] if isinstance(given, str) else given:
        open_image(folder / name)
        pictures.append(str(folder / name))
    said: Facts | None = None
    if "scene" in row:
        pictures.append(scene_of(row["scene"]))
        said = facts(pictures[-1])
    if "facts" in row:
        said = parse(row["facts"]) if isinstance(row["facts"], str) else None
        if said is None:
            raise InputError(f"facts {row['facts']!r} is not a sentence about a scene")
    right = row.get("answers", ())
    right = (right,) if isinstance(right, str) else tuple(str(one) for one in right)
    return OwnTurn(text, tuple(pictures), None if right else said, right)


def scene_of(row: Any) -> Scene:
    """A scene that is written out."""
    if not isinstance(row, Mapping):
        raise InputError("a scene is an object with background, pattern, style and things")
    kinds = {"background": world.BACKGROUNDS, "pattern": world.PATTERNS, "style": world.STYLES}
    for name, known in kinds.items():
        if row.get(name) not in known:
            raise InputError(f"{name} is {row.get(name)!r}: give one of {', '.join(known)}")
    things = []
    for one in sorted(row["things"], key=lambda thing: tuple(thing["cell"])):
        size, cell = one.get("size", "small"), tuple(one["cell"])
        if size not in world.EXTENTS or cell not in world.CELLS:
            said = f"{size!r}, {cell}"
            raise InputError(f"a thing is small or big, in a cell from [0, 0] to [2, 2]: {said}")
        name, colour = one["name"], one.get("colour")
        objects = [kind.name for kind in world.objects()]
        names = world.SHAPES if colour in world.COLOURS else objects
        if colour not in (None, *world.COLOURS) or name not in names:
            raise InputError(f"there is no thing {name!r} with colour {colour!r}")
        things.append(Thing(name, colour, size, cell, nominal(cell, size), 0.0))
    return Scene(row["background"], row["pattern"], row["style"], tuple(things))


def _shown(exam: Exam, turn: OwnTurn) -> list[Image]:
    opened = []
    for one in turn.pictures:
        opened.append(exam.picture(one) if isinstance(one, Scene) else open_image(one))
    return opened


def _task(items: Sequence[OwnItem | OwnTurn], name: str) -> str:
    """The name under which answers are kept; other items, or other pictures, have another."""
    turns = chain(*(one.turns if isinstance(one, OwnItem) else (one,) for one in items))
    shown = (one for turn in turns for one in turn.pictures if isinstance(one, str))
    parts = [repr(items), *(sha256(Path(path)) for path in shown)]
    return f"own {name} {hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]}"


def _chosen(exam: Exam, *kinds: str) -> tuple[list[OwnTurn], list[OwnTurn], list[PlainReply]]:
    """The requests of items of these kinds; and those of chats, with the model's replies."""
    if exam.items is None:
        raise Missing("no items were given (--items FILE.jsonl)")
    found = [item for item in exam.items if item.kind in kinds]
    if not found:
        raise Missing(f"the items hold none of kind {' or '.join(kinds)}")
    exam.needs("language")
    alone = [item.turns[0] for item in found if item.kind != "chat"]
    talks = [item for item in found if item.kind == "chat"]

    def make(numbers: list[int]) -> list[list[PlainReply]]:
        return [_talk(exam, talks[number], number) for number in numbers]

    replies = exam.made(_task(talks, "chat"), range(len(talks)), make, together=1)
    return alone, [turn for item in talks for turn in item.turns], list(chain(*replies))


def _talk(exam: Exam, item: OwnItem, number: int) -> list[PlainReply]:
    """The model's replies, turn by turn, which stand in the talk."""
    messages: list[Mapping[str, Any]] = []
    replies = []
    for turn in item.turns:
        messages.append(user_message([*_shown(exam, turn), turn.text]))
        if turn.facts is not None:
            exam.needs("pixels")
        out: Kind = "text" if turn.facts is None else "image"
        reply = exam.pipe.chat(messages, out=out, seed=exam.seeds([number]))
        messages.append(reply)
        replies.append(plain_reply(reply))
    return replies


def own_read(exam: Exam) -> Figure:
    """Share of pictures of which the caption states all facts of the item, and no wrong ones."""
    asked, _, _ = _chosen(exam, "read")
    task, items = _task(asked, "read"), range(len(asked))
    texts = exam.captions(task, items, lambda n: _shown(exam, asked[n])[0])
    said = [one.facts for one in asked if one.facts is not None]  # of all
    others = [covers(*pair) for pair in zip(turned(texts), said, strict=True)]
    hits = [covers(text, wanted) for text, wanted in zip(texts, said, strict=True)]
    return share(hits, floor=("another item's caption", average(others)))


def covers(text: str, wanted: Facts) -> bool:
    """Does a text state all wanted facts, of just these things? What they leave open is free."""
    said = parse(text)
    if said is None or {group.name for group in said.groups} != {g.name for g in wanted.groups}:
        return False
    return true_of(wanted, said)


def own_answer(exam: Exam) -> Figure:
    """Share of the items' questions, chats included, that are answered right."""
    asked, turns, replies = _chosen(exam, "ask", "chat")
    said = model_answers(
        exam,
        _task(asked, "ask"),
        range(len(asked)),
        lambda n: _shown(exam, asked[n])[0],
        lambda n: asked[n].text,
    )
    pairs = [(text, one.answers) for text, one in zip(said, asked, strict=True)]
    replied = zip(turns, replies, strict=True)
    pairs += [(reply["text"], turn.answers) for turn, reply in replied if turn.answers]
    if not pairs:
        raise Missing("the items hold no question with answers")
    every = sorted({answer for _, right in pairs for answer in right})
    same = max(average([_among(answer, right) for _, right in pairs]) for answer in every)
    return share([_among(*pair) for pair in pairs], floor=("one answer to all", same))


def _among(text: str, right: tuple[str, ...]) -> bool:
    said = normal(text)
    return bool(said) and said in {normal(answer) for answer in right}


def own_draw(exam: Exam) -> Figure:
    """Mean share of the stated facts that are right in what is drawn and edited, chats included."""
    asked, turns, replies = _chosen(exam, "draw", "edit", "chat")

    def parts(n: int) -> list[Any]:
        return [*_shown(exam, asked[n]), asked[n].text]

    pictures = drawn(exam, _task(asked, "draw"), range(len(asked)), parts)
    said = [turn.facts for turn in asked if turn.facts is not None]
    for turn, reply in zip(turns, replies, strict=True):
        if turn.facts is not None:
            pictures.append(unpacked(reply["picture"]))
            said.append(turn.facts)
    if not said:
        raise Missing("the items ask for no picture")
    looks = exam.judge.look(pictures)
    floor = ("another item's drawing", average(atoms_of(said, turned(looks))))
    return mean(atoms_of(said, looks), floor=floor, within=(0.0, 1.0))


OWN: dict[str, Callable[[Exam], Figure]] = {
    "own_read": own_read,
    "own_answer": own_answer,
    "own_draw_atoms": own_draw,
}

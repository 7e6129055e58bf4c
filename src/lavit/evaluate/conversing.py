"""Conversations of four turns about test scenes: the model's own replies stand in the talk, and
each must be right.
"""

from __future__ import annotations

from typing import Any

from lavit.conversation import Reply as Kind
from lavit.data.scenes.parse import parse
from lavit.data.scenes.questions import right, true_of
from lavit.data.scenes.tasks import FULL, SHORT, SceneConversation, scene_conversation
from lavit.data.scenes.world import Scene, facts
from lavit.evaluate import judge
from lavit.evaluate.drawing import packed, unpacked
from lavit.evaluate.exam import Exam
from lavit.evaluate.examinee import Missing
from lavit.evaluate.figures import Figure, average, share, turned
from lavit.generate.options import ChatMessage

TURNS = 4
TALKS = 8  # that go on together
PlainReply = dict[str, str]  # its text, or its packed picture


def chat_items(exam: Exam) -> list[SceneConversation]:
    """The conversations."""
    split = exam.split("test")
    rngs = [exam.rng(n, 70) for n in range(exam.count)]
    return [scene_conversation(rng, exam.rules, TURNS, split=split) for rng in rngs]


def chat_all(exam: Exam) -> Figure:
    """Share of conversations in which all four replies are right."""
    mixture = exam.trained.get("training", {}).get("language", {}).get("mixture", {})
    if not (exam.folder / "finetune.json").is_file() and not mixture.get("conversation"):
        raise Missing("this model was not trained on conversations")
    exam.needs("language", "pixels")
    talks = chat_items(exam)

    def make(numbers: list[int]) -> list[list[PlainReply]]:
        return model_replies(exam, [talks[number] for number in numbers], exam.seeds(numbers))

    said = exam.made("chat", range(exam.count), make, together=TALKS)
    verdicts = [judged(exam, talk, found) for talk, found in zip(talks, said, strict=True)]
    others = zip(talks, turned(said, 1), strict=True)
    wrong = average([all(judged(exam, talk, found)) for talk, found in others])
    return share(
        [all(one) for one in verdicts],
        floor=("another talk's replies", wrong),
        details={f"turn_{n + 1}": average([one[n] for one in verdicts]) for n in range(TURNS)},
    )


def model_replies(
    exam: Exam, talks: list[SceneConversation], seeds: list[int]
) -> list[list[PlainReply]]:
    """The model's replies, turn by turn; those of one kind are written together."""
    messages: list[list[Any]] = [[] for _ in talks]
    found: list[list[PlainReply]] = [[] for _ in talks]
    for turn in range(TURNS):
        kinds: dict[Kind, list[int]] = {"text": [], "image": []}
        for number, talk in enumerate(talks):
            user, wanted = talk.messages[2 * turn : 2 * turn + 2]
            shown = [exam.picture(part) if isinstance(part, Scene) else part for part in user.parts]
            messages[number].append(user_message(shown))
            kinds["image" if isinstance(wanted.parts[0], Scene) else "text"].append(number)
        for out, numbers in kinds.items():
            if not numbers:
                continue
            seed = [seeds[number] + turn for number in numbers]
            given = exam.pipe.chat([messages[number] for number in numbers], out=out, seed=seed)
            for number, reply in zip(numbers, given, strict=True):
                messages[number].append(reply)
                found[number].append(plain_reply(reply))
    return found


def user_message(parts: list[Any]) -> dict[str, Any]:
    """What a user says: words and pictures, as a message of a chat."""
    content = []
    for part in parts:
        kind = "text" if isinstance(part, str) else "image"
        content.append({"type": kind, kind: part})
    return {"role": "user", "content": content}


def plain_reply(reply: ChatMessage) -> PlainReply:
    """The model's message as plain data."""
    part = reply["content"][0]
    return {"text": part["text"]} if part["type"] == "text" else {"picture": packed(part["image"])}


def judged(exam: Exam, talk: SceneConversation, said: list[PlainReply]) -> list[bool]:
    """Is each reply right?"""
    verdicts = []
    last: Scene | None = None
    for turn, reply in enumerate(said):
        user, wanted = talk.messages[2 * turn : 2 * turn + 2]
        shown = [part for part in user.parts if isinstance(part, Scene)]
        last = shown[-1] if shown else last
        asked, true = str(user.parts[-1]), wanted.parts[0]
        if isinstance(true, Scene):
            last = true
            verdicts.append("picture" in reply and _drawn(exam, asked, true, reply["picture"]))
        elif "text" not in reply or last is None:
            verdicts.append(False)
        elif asked in FULL:
            verdicts.append(parse(reply["text"]) == facts(last))
        elif asked in SHORT:
            read = parse(reply["text"])
            verdicts.append(read is not None and true_of(read, last))
        else:
            verdicts.append(right(reply["text"], asked, last))
    return verdicts


def _drawn(exam: Exam, asked: str, true: Scene, picture: str) -> bool:
    """A drawing shows what its prompt says, an edit all facts of the target."""
    (look,) = exam.judge.look([unpacked(picture)])
    return judge.all_right(parse(asked) or facts(true), look)

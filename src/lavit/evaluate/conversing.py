"""Conversations of four turns about test scenes: the model's own replies stand in the talk, and
each must be right.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lavit.data.scenes.parse import parse
from lavit.data.scenes.questions import right, true_of
from lavit.data.scenes.tasks import FULL, SHORT, Conversation, Message, conversation
from lavit.data.scenes.world import Scene, facts
from lavit.evaluate.drawing import packed, unpacked
from lavit.evaluate.exam import Exam, Missing
from lavit.evaluate.figures import Figure, share

TURNS = 4
TALKS = 8  # that go on together


def talks_of(exam: Exam) -> list[Conversation]:
    """The conversations."""
    if "talks" not in exam.cache:
        split = exam.split("test")
        exam.cache["talks"] = [conversation(exam.rng(n, 70), exam.rules, TURNS, split=split) for n in range(exam.count)]
    return exam.cache["talks"]


def chat_all(exam: Exam) -> Figure:
    """Share of conversations in which all four replies are right."""
    if not (exam.folder / "finetune.json").is_file() and not exam.trained.get("conversations"):
        raise Missing("this model was not trained on conversations")
    exam.needs("language", "pixels")
    talks = talks_of(exam)

    def make(numbers: list[int]) -> list[list[dict[str, str]]]:
        return replies(exam, [talks[number] for number in numbers], exam.seeds(numbers))

    said = exam.made("chat", range(exam.count), make, together=TALKS)
    verdicts = [judged(exam, talk, found) for talk, found in zip(talks, said, strict=True)]
    others = said[1:] + said[:1]
    wrong = [all(judged(exam, talk, found)) for talk, found in zip(talks, others, strict=True)]
    details = {f"turn_{n + 1}": float(np.mean([one[n] for one in verdicts])) for n in range(TURNS)}
    hits = [all(one) for one in verdicts]
    return share("chat4_all", hits, floor=("another talk's replies", float(np.mean(wrong))), details=details)


def replies(exam: Exam, talks: list[Conversation], seeds: list[int]) -> list[list[dict[str, str]]]:
    """The model's replies, turn by turn; those of one kind are written together."""
    messages: list[list[Any]] = [[] for _ in talks]
    found: list[list[dict[str, str]]] = [[] for _ in talks]
    for turn in range(TURNS):
        kinds: dict[str, list[int]] = {"text": [], "image": []}
        for number, talk in enumerate(talks):
            user, wanted = talk.messages[2 * turn : 2 * turn + 2]
            messages[number].append({"role": "user", "content": _content(exam, user)})
            kinds["image" if isinstance(wanted.parts[0], Scene) else "text"].append(number)
        for out, numbers in kinds.items():
            if not numbers:
                continue
            seed = [seeds[number] + turn for number in numbers]
            given = exam.pipe.chat([messages[number] for number in numbers], out=out, seed=seed)
            for number, reply in zip(numbers, given, strict=True):
                messages[number].append(reply)
                found[number].append(_plain(reply))
    return found


def _content(exam: Exam, message: Message) -> list[dict[str, Any]]:
    return [
        {"type": "image", "image": exam.picture(part)} if isinstance(part, Scene) else {"type": "text", "text": part}
        for part in message.parts
    ]


def _plain(reply: dict[str, Any]) -> dict[str, str]:
    part = reply["content"][0]
    return {"text": part["text"]} if part["type"] == "text" else {"picture": packed(part["image"])}


def judged(exam: Exam, talk: Conversation, said: list[dict[str, str]]) -> list[bool]:
    """Is each reply right?"""
    from lavit.evaluate.judge import all_right, text_exact

    verdicts = []
    last: Scene | None = None
    for turn, reply in enumerate(said):
        user, wanted = talk.messages[2 * turn : 2 * turn + 2]
        shown = [part for part in user.parts if isinstance(part, Scene)]
        last = shown[-1] if shown else last
        asked, true = str(user.parts[-1]), wanted.parts[0]
        if isinstance(true, Scene):
            last = true
            verdicts.append("picture" in reply and _drawn(exam, all_right, asked, true, reply["picture"]))
        elif "text" not in reply or last is None:
            verdicts.append(False)
        elif asked in FULL:
            verdicts.append(text_exact(reply["text"], facts(last)))
        elif asked in SHORT:
            said_ = parse(reply["text"])
            verdicts.append(said_ is not None and true_of(said_, last))
        else:
            verdicts.append(right(reply["text"], asked, last))
    return verdicts


def _drawn(exam: Exam, all_right: Any, asked: str, true: Scene, picture: str) -> bool:
    """A drawing shows what its prompt says, an edit all facts of the target."""
    said = parse(asked)
    return all_right(said or facts(true), exam.judge.look([unpacked(picture)])[0])

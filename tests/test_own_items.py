"""The package's own items: 100 requests worded as training never words them, with right answers."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from lavit.data.scenes.dataset import in_free_words, unit_at
from lavit.data.scenes.lexicon import (
    NUMBERS,
    PATTERN_WORDS,
    SIZES,
    Noun,
    names_in,
    split,
    tokens,
    unknown_words,
)
from lavit.data.scenes.parse import parse
from lavit.data.scenes.questions import answers, normal
from lavit.data.scenes.rewording import freely, reworded, reworded_talk, words_of_rewording
from lavit.data.scenes.splits import Rules, valid_world, violations
from lavit.data.scenes.tasks import scene_conversation
from lavit.data.scenes.world import BACKGROUNDS, COLOURS, Scene, facts
from lavit.evaluate.own import OWN_ITEMS, load_items, scene_of

RULES = Rules()
UNITS = 50
ROWS = [json.loads(line) for line in OWN_ITEMS.read_text().splitlines()]
SAID = {*COLOURS, *BACKGROUNDS, *SIZES, *PATTERN_WORDS, *NUMBERS, "a", "an"}


def frame(text: str) -> str:
    """A text without what it is about: two of one frame are worded alike."""
    found = tokens(split(re.sub(r"[^\w\s'-]", " ", text), strictly=False) or [])
    words = ("#" if isinstance(word, Noun) else word for word in found)
    kept = [word for word in words if word not in SAID and not word.isdigit()]
    return " ".join(kept)


def turns(row: dict) -> list[dict]:
    """The requests of an item, each with the scene or the facts that it speaks of."""
    found, so = [], None
    for turn in row.get("turns", [row]):
        so = facts(scene_of(turn["scene"])) if "scene" in turn else so
        found.append({**turn, "so": so})
        so = parse(turn["facts"]) if "facts" in turn else so
    return found


def asked_in_training() -> list[str]:
    """Requests as pools of free words have them, and as the language itself does."""
    rng, found = np.random.default_rng(0), []
    for number in range(UNITS):
        unit = unit_at("train", number, rules=RULES)
        for one in (unit, *(in_free_words(unit, rng) for _ in range(6))):
            found += [text for each in one.pictures for text in each.prompts]
            found += [q.question for each in one.pictures for q in each.questions]
            found += [one.change.prompt] if one.change else []
    return found


def test_there_are_a_hundred_and_they_load() -> None:
    assert len(load_items(OWN_ITEMS)) == len(ROWS) == 100
    kinds = Counter(row["kind"] for row in ROWS)
    assert kinds == {"ask": 45, "draw": 30, "chat": 13, "edit": 12}
    assert sum("facts" in turn for row in ROWS for turn in turns(row)) > 60


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["kind"])
def test_answers_are_right_and_what_is_asked_for_can_be_drawn(row: dict) -> None:
    for turn in turns(row):
        if "scene" in turn:
            assert valid_world(scene_of(turn["scene"])) is None
        if "answers" in turn:
            assert {normal(one) for one in turn["answers"]} == answers(turn["so"], turn["as"])
        if "facts" in turn:
            wanted = parse(turn["facts"])
            assert wanted is not None and wanted != turn["so"]
            assert wanted.number <= 4
            colours = {group.colour for group in wanted.groups if group.colour}
            assert wanted.background not in colours


def test_training_words_nothing_like_them() -> None:
    known = {frame(text) for text in asked_in_training()}
    assert len(known) > 150
    own = [
        turn.get("question", turn.get("prompt", turn.get("text")))
        for row in ROWS
        for turn in turns(row)
    ]
    assert [text for text in own if frame(text) in known] == []


def test_rewordings_keep_names_and_so_what_is_held_out() -> None:
    rng, changed = np.random.default_rng(1), Counter()
    for number in range(UNITS):
        unit = unit_at("train", number, rules=RULES)
        free = in_free_words(unit, rng)
        assert [one.scene for one in free.pictures] == [one.scene for one in unit.pictures]
        first = [one.prompts[0] for one in unit.pictures]
        assert [one.prompts[0] for one in free.pictures] == first
        texts = [q.question for one in unit.pictures for q in one.questions]
        texts += [unit.change.prompt] if unit.change else []
        for text in texts:
            said = reworded(text, rng)
            assert names_in(said)[0] == names_in(text)[0], (text, said)
            changed[said != text] += 1
            known = words_of_rewording()
            assert [word for word in unknown_words(said) if word not in known] == [], said
    assert changed[True] > 20 * changed[False]


def test_conversations_are_reworded_and_edits_joined() -> None:
    joined = 0
    for number in range(60):
        rng = np.random.default_rng([2, number])
        talk = scene_conversation(rng, RULES, 4)
        free = reworded_talk(talk, rng)
        assert free.messages[-1] == talk.messages[-1]
        assert [m.role for m in free.messages[:2]] == ["user", "assistant"]
        joined += len(free.messages) < len(talk.messages)
        assert not violations(free.texts, free.scenes, RULES)
        given = [m for m in free.messages if m.role == "assistant"]
        assert all(isinstance(m.parts[0], Scene | str) for m in given)
    assert joined


def test_requests_are_typed_as_people_type_them() -> None:
    """Half begin with a capital, a third of those without a mark gets one; the words stay."""
    rng = np.random.default_rng(3)
    plain = "add a red star"
    said = [freely(plain, rng) for _ in range(400)]
    assert 0.4 < sum(one[0].isupper() for one in said) / len(said) < 0.6
    assert 0.25 < sum(one[-1] in ".!" for one in said) / len(said) < 0.5
    assert {one.lower().rstrip(".!") for one in said} > {plain}
    talk = scene_conversation(rng, RULES, 4)
    for free in (reworded_talk(talk, np.random.default_rng(number)) for number in range(20)):
        for message in free.messages:
            if message.role == "assistant":
                assert message in talk.messages


def test_a_test_conversation_leaves_nothing_open() -> None:
    """What follows a drawing is judged by its scene, so the prompt says all of it."""
    drawn = 0
    for number in range(60):
        rng = np.random.default_rng([4, number])
        talk = scene_conversation(rng, RULES, 4, split="test")
        for asked, given in zip(talk.messages[::2], talk.messages[1::2], strict=True):
            said = parse(str(asked.parts[-1]))
            if isinstance(given.parts[0], Scene) and said is not None and len(asked.parts) == 1:
                drawn += said == facts(given.parts[0])
                assert said == facts(given.parts[0]), asked
    assert drawn > 10


def test_a_frame_is_blind_to_what_is_said() -> None:
    row = replace(load_items(OWN_ITEMS)[0].turns[0], text="How many red stars are there?")
    assert frame(row.text) == frame("how many small owls are there") != frame("count the owls")

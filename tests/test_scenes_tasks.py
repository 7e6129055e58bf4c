"""Questions, edits, several pictures and conversations about scenes."""

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from lavit.data.scenes.edits import EDIT_KINDS, edit
from lavit.data.scenes.lexicon import names_in, unknown_words
from lavit.data.scenes.parse import parse
from lavit.data.scenes.questions import CONTENTS, KINDS, answers, normal, questions, right
from lavit.data.scenes.sample import belongs, scene_at
from lavit.data.scenes.splits import HELD_OUT_COLOURS, Rules, valid_world, violations
from lavit.data.scenes.tasks import FULL, SEVERAL_KINDS, SHORT, scene_conversation, several
from lavit.data.scenes.world import STYLES, Scene, facts

RULES = Rules()


@pytest.fixture(scope="module")
def scenes():
    return [scene_at("train", n, rules=RULES) for n in range(600)]


@pytest.fixture(scope="module")
def asked(scenes):
    rng = np.random.default_rng(0)
    return [(scene, one) for scene in scenes for one in questions(scene, rng, RULES, 3)]


@pytest.fixture(scope="module")
def edits(scenes):
    rng = np.random.default_rng(1)
    return [e for scene in scenes[:120] for k in EDIT_KINDS if (e := edit(scene, rng, RULES, k))]


def test_answers_are_right_and_the_other_answers_are_not(asked):
    assert {one.kind for _, one in asked} == set(KINDS)
    given = defaultdict(set)
    for _, one in asked:
        given[one.kind].add(one.answer)
    for scene, one in asked:
        assert one.question.endswith("?") and one.question == one.question.lower()
        assert not unknown_words(f"{one.question} {one.answer}")
        assert right(one.answer, one.question, scene), one
        if one.kind == "contents":
            continue
        accepted = answers(scene, one.question)
        assert normal(one.answer) in accepted
        wrong = [other for other in sorted(given[one.kind])[:20] if normal(other) not in accepted]
        assert wrong and not any(right(other, one.question, scene) for other in wrong)


def test_answers_may_differ_in_case_articles_and_marks(asked):
    for scene, one in asked[:300]:
        for text in (one.answer.upper(), f"{one.answer}.", one.answer.replace("the ", "")):
            assert right(text, one.question, scene) or one.kind == "contents"
    assert normal("To the left of the Owl.") == "left of owl"
    assert normal("2") == "two" and normal("grey") == "gray" and normal("a bike") == "bicycle"


def test_what_is_in_the_picture_is_judged_for_truth(scenes):
    scene = next(scene for scene in scenes if len(scene.names) == 2)
    groups = sorted(facts(scene).groups)
    assert not right("nothing", CONTENTS[0], scene)
    assert not right(f"a {groups[0].name} and", CONTENTS[0], scene)
    assert not right("nine owls", CONTENTS[0], scene)
    assert right("nothing.", CONTENTS[0], replace(scene, things=()))


def test_words_of_a_question_say_little_about_its_answer():
    """The best answer per question, learnt on one half and tried on the other."""
    rng = np.random.default_rng(2)
    found = defaultdict(list)
    for n in range(1500):
        for one in questions(scene_at("train", n, rules=RULES), rng, RULES, 3):
            found[one.kind].append((one.question, one.answer))
    for kind, most in (("exists", 0.58), ("how many", 0.36), ("compare", 0.62), ("colour", 0.3)):
        hits = 0
        for half in (0, 1):
            seen, over = defaultdict(Counter), Counter()
            for question, answer in found[kind][half::2]:
                seen[question][answer] += 1
                over[answer] += 1
            for question, answer in found[kind][1 - half :: 2]:
                hits += (seen[question] or over).most_common(1)[0][0] == answer
        assert hits / len(found[kind]) < most, kind


def test_nothing_is_asked_for_that_training_keeps_away(asked):
    for scene, one in asked:
        assert not violations([one.question, one.answer], [scene], RULES)


def test_every_kind_of_edit_happens_and_is_sound(edits):
    assert {one.kind for one in edits} == set(EDIT_KINDS)
    for one in edits:
        assert not unknown_words(one.prompt)
        assert one.source != one.target and valid_world(one.target) is None
        assert not violations([one.prompt], [one.source, one.target], RULES)
        if one.kind != "style":
            assert facts(one.source) != facts(one.target)
        if len(one.target.names) > 1:
            assert facts(one.target).relations


def test_edits_leave_all_else_as_it_was(edits):
    for one in edits:
        before, after = one.source, one.target
        if one.kind not in ("background", "pattern"):
            assert (before.background, before.pattern) == (after.background, after.pattern)
        assert (before.style == after.style) == (one.kind != "style")
        touched = names_in(one.prompt)[0]
        if one.kind == "add":
            assert set(before.things) < set(after.things)
        elif one.kind in ("background", "pattern", "style"):
            assert before.things == after.things
        else:
            changed = set(before.things) ^ set(after.things)
            named = {thing.name for thing in changed}
            assert named <= touched
            assert len(named) <= (2 if one.kind in ("swap", "replace") else 1)
        if one.kind in ("recolour", "resize", "number"):
            assert facts(before).relations == facts(after).relations
        if one.kind in ("recolour", "replace"):
            assert [t.box for t in before.things] == [t.box for t in after.things]


def test_where_an_edit_puts_things_is_said_and_so(edits):
    placed = [one for one in edits if one.kind in ("add", "move") and one.source.things]
    assert len(placed) > 30
    for one in placed:
        name = next(n for n in one.target.names if facts(one.target).group(n) and _is_it(one, n))
        mine = [r for r in facts(one.target).relations if name in (r.first, r.second)]
        words = one.prompt.replace(" over ", " above ").replace(" under ", " below ")
        said = sum(words.count(word) for word in (" left of", " right of", " above ", " below "))
        assert said == len(mine) > 0
        for relation in mine:
            word = relation.kind
            if relation.second == name:
                word = {"left of": "right of", "above": "below"}[word]
            assert word in words


def _is_it(one, name):
    thing = [t for t in one.target.things if t.name == name]
    return thing != [t for t in one.source.things if t.name == name]


def test_edits_can_be_asked_for_in_test():
    rng = np.random.default_rng(3)
    found = 0
    for n in range(1, 13):
        scene = scene_at("test", n, rules=RULES)
        one = edit(scene, rng, RULES, allowed=lambda s: belongs(s, "test", RULES))
        found += one is not None and belongs(one.target, "test", RULES)
        assert edit(scene, rng, RULES) is None  # no source of training
    assert found >= 10


def test_several_pictures_make_one():
    rng = np.random.default_rng(4)
    for kind in SEVERAL_KINDS:
        for _ in range(30):
            one = several(rng, RULES, kind)
            (a, b), target = one.sources, one.target
            assert not violations([one.prompt], [a, b, target], RULES)
            assert not set(a.names) & set(b.names)
            if kind == "together":
                assert set(target.things) == {*a.things, *b.things} and a.things and b.things
                assert (target.background, target.pattern) == (a.background, a.pattern)
            else:
                assert target.things == a.things
                assert (target.background, target.pattern) == (b.background, b.pattern)
                assert a.background != b.background
    assert belongs(several(rng, RULES, split="test").target, "test", RULES)


def test_both_pictures_are_of_the_split_that_is_asked():
    rng = np.random.default_rng(8)
    for _ in range(5):
        one = several(rng, RULES, "background", split="binding")
        assert all(scene.coloured & HELD_OUT_COLOURS for scene in one.sources)


def test_conversations_hold_together():
    rng = np.random.default_rng(5)
    for n in range(90):
        talk = scene_conversation(rng, RULES, 2 + n % 3)
        assert [m.role for m in talk.messages] == ["user", "assistant"] * (2 + n % 3)
        assert not violations(talk.texts, talk.scenes, RULES)
        last = None
        for user, reply in zip(talk.messages[::2], talk.messages[1::2], strict=True):
            last = next((p for p in user.parts if isinstance(p, Scene)), last)
            request, given = user.parts[-1], reply.parts[0]
            assert not unknown_words(request)
            if isinstance(given, Scene):
                said = parse(request)
                assert said is None or said.groups or not given.things
                last = given
            elif request in FULL:
                assert parse(given) == facts(last)
            elif request not in SHORT:
                assert right(given, request, last)


def test_the_same_randomness_gives_the_same_documents(scenes):
    def made():
        rng = np.random.default_rng(6)
        return (
            questions(scenes[0], rng, RULES, 3), edit(scenes[1], rng, RULES),
            several(rng, RULES), scene_conversation(rng, RULES, 3),
        )  # fmt: skip

    assert made() == made()


def test_a_planted_leak_is_found(scenes):
    names = RULES.objects_named
    pair = next((a, b) for a in names for b in names if a < b and RULES.pair_of(a, b) == "pairs")
    assert violations([f"is there a {pair[0]}?", f"no, two {pair[1]}s"], [], RULES)
    with_one = next(scene for scene in scenes if scene.names == (pair[0],))
    assert violations([f"add a {pair[1]}"], [with_one], RULES)
    shape, colour = sorted(HELD_OUT_COLOURS)[0]
    for text in (f"a {colour} {shape}", f"make the {shape} {colour}", f"is the {shape} {colour}?"):
        assert violations([text], [], RULES)
    assert violations([], [scene_at("test", 1, rules=RULES)], RULES)
    only = next(n for n in names if RULES.style_of(n))
    other = next(style for style in STYLES if style != RULES.style_of(only))
    thing = replace(with_one.things[0], name=only)
    assert violations([], [replace(with_one, style=other, things=(thing,))], RULES)

"""Scenes in words, and words as facts."""

import itertools
import re

import numpy as np
import pytest

from lavit.data.scenes.language import (
    describe,
    mention,
    plainly,
    prompt,
    say,
)
from lavit.data.scenes.lexicon import article, names_in, noun, nouns, unknown_words, vocabulary
from lavit.data.scenes.parse import parse
from lavit.data.scenes.questions import true_of
from lavit.data.scenes.sample import scene_at
from lavit.data.scenes.splits import Rules
from lavit.data.scenes.world import (
    BACKGROUNDS,
    COLOURS,
    PATTERNS,
    SHAPES,
    Facts,
    Group,
    Relation,
    facts,
    objects,
)

RULES = Rules(objects=160)
ADJECTIVES = (("small", "big"), tuple(COLOURS), tuple(BACKGROUNDS), PATTERNS)
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def scenes():
    return [scene_at("train", n, rules=RULES) for n in range(800)]


def test_every_description_reads_back_as_its_facts(scenes):
    rng = np.random.default_rng(0)
    for scene in scenes:
        said = facts(scene)
        for text in (plainly(scene), describe(scene, rng), prompt(scene, rng, full=True)):
            assert parse(text) == said, text


def test_larger_numbers_read_back_too():
    rng = np.random.default_rng(0)
    for number in range(1, 10):
        groups = frozenset({Group("mouse", number, "small"), Group("star", 9 - number or 1)})
        said = Facts("pink", "dotted", groups, frozenset({Relation("above", "mouse", "star")}))
        assert parse(say(said, rng)) == said


def test_captions_and_prompts_are_true_and_partial(scenes):
    rng = np.random.default_rng(1)
    full = 0
    for scene in scenes:
        for text in (mention(scene, rng), prompt(scene, rng)):
            said = parse(text)
            assert said is not None and true_of(said, scene), text
            assert {g.name for g in said.groups} == set(scene.names)
        full += said == facts(scene)
        assert "background" not in mention(scene, rng)
    assert 0.4 < full / len(scenes) < 0.75


def test_descriptions_are_short_and_varied(scenes):
    rng = np.random.default_rng(2)
    words = [len(describe(scene, rng).split()) for scene in scenes]
    assert 10 < np.mean(words) < 16
    for fewest, groups in ((4, 0), (10, 1), (40, 2), (40, 3)):
        for scene in [scene for scene in scenes if len(scene.names) == groups][:15]:
            assert len({describe(scene, rng) for _ in range(120)}) > fewest, scene
    assert not any(". " in prompt(scene, rng)[-2:] for scene in scenes[:200])


def test_a_content_word_less_more_or_other_is_another_fact_or_none(scenes):
    rng = np.random.default_rng(3)
    nouns_ = [noun(name, n) for n in (1, 2) for name in (*SHAPES, *(k.name for k in objects()))]
    classes = [*ADJECTIVES, NUMBERS, ("left", "right"), ("above", "below"), ("stripes", "dots")]
    classes.append(tuple(word for word in nouns_ if " " not in word))
    everything = [word for one in classes for word in one]
    for scene in scenes[:50]:
        said = facts(scene)
        words = describe(scene, rng).replace(".", " .").replace(",", " ,").split()
        for place, word in enumerate(words):
            homes = [one for one in classes if word in one]
            others = [other for one in homes for other in one if other != word]
            changed = [words[:place] + words[place + 1 :]] if homes else []
            for other in rng.permutation(others)[:3]:
                changed.append([*words[:place], str(other), *words[place + 1 :]])
            more = str(rng.choice(everything))
            changed.append([*words[:place], more, *words[place:]])
            for each in changed:
                assert parse(" ".join(each)) != said, (words, each)


def test_a_word_twice_or_a_small_word_less_is_no_sentence(scenes):
    rng = np.random.default_rng(7)
    small = {"a", "an", "the", "of", "to", "on", "against", "is", "are", "with", "background", ":"}
    for scene, other in itertools.pairwise(scenes[:100]):
        words = re.findall(r"[a-z]+|[.,:]", describe(scene, rng))
        for place, word in enumerate(words):
            assert parse(" ".join([*words[:place], word, *words[place:]])) is None, (words, word)
            if word in small:
                assert parse(" ".join(words[:place] + words[place + 1 :])) is None, (words, place)
            turned = [*words[:place], *words[place : place + 2][::-1], *words[place + 2 :]]
            assert parse(" ".join(turned)) in (None, facts(scene)), turned
        assert parse(mention(scene, rng) + " " + mention(other, rng)) is None


def test_random_words_are_not_in_the_language():
    rng = np.random.default_rng(4)
    words = sorted(vocabulary())
    for _ in range(2000):
        text = " ".join(rng.choice(words, int(rng.integers(3, 15))))
        assert parse(text) is None, text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "hello",
        "two owl",
        "an owls",
        "a red owl",  # objects have no colour
        "a white star",  # a colour of backgrounds alone
        "an owl and an owl",
        "a red star and a blue star",
        "a small big owl",
        "an owl left of an owl",
        "the owl is left of the star",  # of things that are not there
        "an owl and a star. the owl is left of the key",
        "an owl and a star. the owls are left of the star",
        "an owl and a star. the owl is left of the star. the star is right of the owl",
        "an owl and a star. the owl is left of the star and the owl is right of the star",
        "an owl and a star. the owl is left of the star. the owl is above the star",
        "an owl, a star and a key. the owl is above the star and the star is above the key and "
        "the key is above the owl",
        "a blue background",
        "an empty picture",
        "a striped plain background with an owl",
        "an owl on a blue background. the background is blue",
        "an owl on a blue background, on a red background",
        "nothing on a blue background. an owl",
        "an owl; a star",
        "an owl on a striped striped background",
        "there is there is an owl",
        "there are an owl",
        "there is two owls",
        "a owl",
        "an star",
        "an owl, a star",
        "an owl, and a star",
        "an owl. a star",
        "an owl on blue background",
        "a blue background: an owl",
        "blue background with an owl",
        "on a blue background an owl",
        "on a blue background, on a red background, an owl",
        "an owl on a pink plain background",
        "an owl on a blue background. the background is striped",
        "an owl. the background is striped and",
        "an owl. the background is striped and.",
        "an owl. the background is blue and with stripes",
        "an owl. the background is blue. the background is striped",
        "the owl is left of the star. an owl and a star",
        "an owl and a star. the owl are left of the star",
        "two owls and a star. the owls is left of the star",
        "an owl, a star and a key. the owl is left of the star, the star is above the key",
        "an owl and a star. left of the owl are the star",
        "an owl and a star. left of the owl the star",
        "an owl and a star. left of the owl",
        "an owl and a star, left of the owl",
        "an owl and a star, the owl is left of the star",
        "an owl, a star and a key. the owl is left of the star is the key",
        "please an owl",
        "draw there is an owl",
        "draw the background is blue. an owl",
        "draw on a blue background, an owl",
        "draw blue background: an owl",
        "nothing on a blue background. nothing",
    ],
)
def test_what_does_not_fit_together_is_not_read(text):
    assert parse(text) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("A BIKE on a grey background", Facts("gray", None, frozenset({Group("bicycle", 1)}))),
        ("2 large mice", Facts(None, None, frozenset({Group("mouse", 2, "big")}))),
        (
            "please draw an ice cream to the right of nine tiny ferris wheels "
            "on a dotted background",
            Facts(
                None,
                "dotted",
                frozenset({Group("ice cream", 1), Group("ferris wheel", 9, "small")}),
                frozenset({Relation("left of", "ferris wheel", "ice cream")}),
            ),
        ),
        (
            "three green stars and a key. the key is under the stars. the background is pink",
            Facts(
                "pink",
                None,
                frozenset({Group("star", 3, None, "green"), Group("key", 1)}),
                frozenset({Relation("above", "star", "key")}),
            ),
        ),
        (
            "an owl, a star, and a key against a pink striped background, with the owl over the "
            "star and left of the key",
            Facts(
                "pink",
                "striped",
                frozenset({Group("owl", 1), Group("star", 1), Group("key", 1)}),
                frozenset({Relation("above", "owl", "star"), Relation("left of", "owl", "key")}),
            ),
        ),
        (
            "on a blue background there are two owls and a star. "
            "to the left of the star are the owls",
            Facts(
                "blue",
                None,
                frozenset({Group("owl", 2), Group("star", 1)}),
                frozenset({Relation("left of", "owl", "star")}),
            ),
        ),
        ("an empty plain white background", Facts("white", "plain", frozenset())),
        ("nothing", Facts(None, None, frozenset())),
    ],
)
def test_words_as_facts(text, said):
    assert parse(text) == said


def test_every_noun_reads_back_alone_and_as_several():
    for name in (*SHAPES, *(kind.name for kind in objects())):
        assert parse(article(noun(name, 1))) == Facts(None, None, frozenset({Group(name, 1)}))
        assert parse(f"two {noun(name, 2)}") == Facts(None, None, frozenset({Group(name, 2)}))
    for words, one in nouns().items():
        said = " ".join(words)
        assert parse(article(said) if one.one else f"two {said}") is not None, words


def test_articles_follow_the_ear():
    assert article("owl") == "an owl" and article("small owl") == "a small owl"
    assert article("unicorn") == "a unicorn" and article("hourglass") == "an hourglass"


def test_unknown_words_are_named_and_texts_of_the_language_have_none(scenes):
    rng = np.random.default_rng(6)
    assert unknown_words("draw a purple Zeppelin near two owls, zeppelin!") == ["zeppelin", "near"]
    for scene in scenes[:100]:
        assert not unknown_words(describe(scene, rng) + " " + prompt(scene, rng))


def test_names_and_colours_are_found_in_any_text():
    names, coloured = names_in("is the red star bigger than 3 Mice? make the heart green, ok")
    assert names == {"star", "mouse", "heart"}
    assert coloured == {("star", "red"), ("heart", "green")}
    assert names_in("a small blue square on a red background")[1] == {("square", "blue")}
    assert names_in("the stars are yellow")[1] == {("star", "yellow")}

"""How answers are scored: the VQA accuracy with its normalisation, and GQA's exact match.

VQA (Antol et al. 2015, its server's code): an answer is right by min(1, people who said it / 3),
averaged over the ten sets of nine people. Where the people differ, punctuation, articles, number
words and apostrophes are made alike first, theirs and ours. Scores are in points (x 100).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
BETWEEN_DIGITS = re.compile(r"\d,\d")
STOP = re.compile(r"\.(?!\d)")
STOPS = 32  # of which no more are removed: the server's code gives a flag for a count
ARTICLES = {"a", "an", "the"}
NUMBERS = "zero one two three four five six seven eight nine ten"
DIGITS = {word: str(number) for number, word in enumerate(NUMBERS.split())} | {"none": "0"}
WITH_APOSTROPHES = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've
"""


def _lacking_one(word: str) -> list[str]:
    """A word without each of its apostrophes."""
    return [word[:at] + word[at + 1 :] for at, letter in enumerate(word) if letter == "'"]


APOSTROPHES = {short: word for word in WITH_APOSTROPHES.split() for short in _lacking_one(word)}
APOSTROPHES |= {"somebody'd": "somebodyd"}  # so in the server's table


def made_alike(answer: str) -> str:
    """An answer as VQA compares it: punctuation, articles, number words and apostrophes."""
    text = answer
    for mark in PUNCTUATION:
        apart = f"{mark} " in answer or f" {mark}" in answer or BETWEEN_DIGITS.search(answer)
        text = text.replace(mark, "" if apart else " ")
    words = STOP.sub("", text, count=STOPS).lower().split()
    words = [DIGITS.get(word, word) for word in words]
    return " ".join(APOSTROPHES.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """How right an answer is by what people said (ten of them, as a rule), in points."""
    answer, *said = (" ".join(re.split(r"[\n\t]", text)).strip() for text in (answer, *people))
    if len(set(said)) > 1:
        answer, *said = map(made_alike, (answer, *said))
    agree = said.count(answer)
    rights = [min(1.0, (agree - (one == answer)) / 3) for one in said]
    return 100 * sum(rights) / len(rights)


def exact_match(answer: str, right: str) -> float:
    """100 where an answer is the right one but for case, spaces and a full stop, else 0."""
    return 100.0 * (_bare(answer) == _bare(right))


def _bare(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".")

"""Named ways to ask and draw: prompts, lengths, cuts and normalisation (method, Sec. 5).

CAPTION     the paper's captions: no prompt, beam 2, 8-36 new tokens, cut at the first full stop
QUESTION    its answers: "Question: … Answer:", beam 5, 2-10 new tokens, length penalty 0, early stopping
DRAW        its pictures: top-k 200, T = 1, guidance 2, the best of four (by CLIP-L; a scorer of ours, or yours)
PUBLISHED   its authors' code draws with top-k 50, guidance 4 (5 with pictures in the prompt), 20-200 codes

A `Protocol` is one of each, and what a pipeline goes by. Not done here: the paper lemmatises nouns and verbs of answers
before they are compared; no library of ours has word lists, so `answer_words` takes a `lemmatise` function and leaves
words as they are without one. VizWiz's question of whether a question can be answered is in words of our own: the
paper's are not known.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from lavit.config import InputError
from lavit.generate.sampling import Sampling, caption, draw_paper, draw_published, question

CAPTION = caption()
QUESTION = question()
DRAW = replace(draw_paper(), n=1)
PUBLISHED = draw_published()
BEST_OF = 4  # of DRAW
CHAT = Sampling(temperature=0.0, max_tokens=200)

CAPTION_ENDS = (".", "\n")
ANSWER_ENDS = ("\n", "question:", "Question:", "Long answer:", ",", ".")
UNANSWERABLE = "unanswerable"  # VizWiz's answer where there is none

UNWANTED = re.compile(r'[.!"()*#:;~]')  # removed from questions
QUESTION_WORDS = 50
ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What the verbs of a pipeline go by where a call does not say otherwise."""

    name: str
    caption: Sampling
    answer: Sampling
    drawing: Sampling
    chat: Sampling = CHAT
    best_of: int | None = None  # candidates of a drawing, of which the likeliest are kept
    caption_ends: tuple[str, ...] = CAPTION_ENDS  # a text ends before the first of these
    answer_ends: tuple[str, ...] = ANSWER_ENDS


def protocol_of(name: str, patches: int) -> Protocol:
    """The protocol "default" (greedy text to the end token, guidance 3), "paper" or "published".

    Pictures have at most `patches` codes.
    """
    greedy = Protocol(
        name="default",
        caption=Sampling(temperature=0.0, max_tokens=96),
        answer=Sampling(temperature=0.0, max_tokens=24),
        caption_ends=(),
        answer_ends=(),
        drawing=Sampling(top_k=50, guidance=3.0, min_tokens=1, max_tokens=patches),
    )
    paper = Protocol(
        name="paper",
        caption=CAPTION,
        answer=QUESTION,
        drawing=fitted(DRAW, patches),
        best_of=BEST_OF,
    )
    known = {
        "default": greedy,
        "paper": paper,
        "published": replace(paper, name="published", drawing=fitted(PUBLISHED, patches), best_of=None),
    }
    if name not in known:
        raise InputError(f"protocol {name!r} is not known: use one of {', '.join(known)}")
    return known[name]


def fitted(sampling: Sampling, patches: int) -> Sampling:
    """The same drawing for a model whose pictures have at most `patches` codes."""
    most = min(sampling.max_tokens, patches)
    return replace(sampling, max_tokens=most, min_tokens=min(sampling.min_tokens, most))


def asked(question: str) -> str:
    """A question as the paper puts it: lower case, without the characters it removes, at most 50 words.

    Raises `InputError` where no word is left.
    """
    words = UNWANTED.sub("", question.lower()).split()
    if not any(character.isalnum() for word in words for character in word):
        raise InputError(f"the question {question!r} has no words: ask about the picture")
    return " ".join(words[:QUESTION_WORDS])


def answerable(question: str) -> str:
    """The question that VizWiz asks first."""
    return f"can this be answered from the picture, {asked(question).rstrip('?')}?"


def refuses(answer: str) -> bool:
    """True where the answer to `answerable` is no."""
    return answer.strip().lower().split(" ")[0].strip(",.") in ("no", "not", UNANSWERABLE)


def answer_words(answer: str, *, lemmatise: Callable[[str], str] | None = None) -> str:
    """An answer as it is compared with others: lower case, no punctuation, no articles, single spaces.

    `lemmatise` turns one word into its base form (the paper does that with nouns and verbs). None: words stay.
    """
    text = re.sub(r"[^\w\s']", " ", answer.lower())
    words = ARTICLES.sub(" ", text).split()
    return " ".join(words if lemmatise is None else map(lemmatise, words))


def cut(text: str, ends: tuple[str, ...]) -> tuple[str, bool]:
    """The text before the first of `ends`, and whether there was one."""
    found = [place for end in ends if (place := text.find(end)) >= 0]
    return (text[: min(found)], True) if found else (text, False)

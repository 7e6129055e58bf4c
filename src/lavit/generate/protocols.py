"""Named ways to ask and draw: lengths and cuts (method, Sec. 5).

CAPTION     the paper's captions: no prompt, beam 2, 8-36 new tokens, cut at the first full stop
QUESTION    its answers: "Question: … Answer:", beam 5, 2-10 new tokens, no length penalty
DRAW        its pictures: top-k 200, T = 1, guidance 2, the best of four (by CLIP-L; here a scorer)
PUBLISHED   its authors' code: top-k 50, guidance 4 (5 with pictures in the prompt), 20-200 codes

A `Protocol` is one of each. VizWiz's question of whether a question can be answered is in words of
our own: the paper's are not known.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lavit.config import InputError
from lavit.generate.sampling import Sampling

CAPTION = Sampling(temperature=0.0, beams=2, min_tokens=8, max_tokens=36)
QUESTION = Sampling(
    temperature=0.0,
    beams=5,
    min_tokens=2,
    max_tokens=10,
    length_penalty=0.0,
    early_stopping=True,
)
DRAW = Sampling(top_k=200, guidance=2.0, min_tokens=20, max_tokens=200)
PUBLISHED = Sampling(top_k=50, guidance=4.0, min_tokens=20, max_tokens=200)
BEST_OF = 4  # of DRAW
CHAT = Sampling(temperature=0.0, max_tokens=200)

CAPTION_ENDS = (".", "\n")
ANSWER_ENDS = ("\n", "question:", "Question:", "Long answer:", ",", ".")
UNANSWERABLE = "unanswerable"  # VizWiz's answer where there is none


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What the verbs of a pipeline go by where a call does not say otherwise."""

    name: str
    caption: Sampling
    answer: Sampling
    drawing: Sampling
    chat: Sampling = CHAT
    best_of: int | None = None  # candidates of a drawing, of which the likeliest is kept
    caption_ends: tuple[str, ...] = CAPTION_ENDS  # a text ends before the first of these
    answer_ends: tuple[str, ...] = ANSWER_ENDS


def protocol_of(name: str, patches: int) -> Protocol:
    """The protocol "default", "paper" or "published", for pictures of at most `patches` codes."""
    greedy = Protocol(
        name="default",
        caption=Sampling(temperature=0.0, max_tokens=96),
        answer=Sampling(temperature=0.0, max_tokens=24),
        caption_ends=(),
        answer_ends=(),
        # chosen on valid and valid_pairs with nano (LOG.md)
        drawing=Sampling(temperature=0.3, top_k=50, guidance=1.5, min_tokens=1, max_tokens=patches),
    )
    paper = Protocol(
        name="paper",
        caption=CAPTION,
        answer=QUESTION,
        drawing=fitted(DRAW, patches),
        best_of=BEST_OF,
    )
    drawing = fitted(PUBLISHED, patches)
    published = replace(paper, name="published", drawing=drawing, best_of=None)
    known = {protocol.name: protocol for protocol in (greedy, paper, published)}
    if name not in known:
        raise InputError(f"protocol {name!r} is not known: use one of {', '.join(known)}")
    return known[name]


def fitted(sampling: Sampling, patches: int) -> Sampling:
    """The same drawing for a model whose pictures have at most `patches` codes."""
    most = min(sampling.max_tokens, patches)
    return replace(sampling, max_tokens=most, min_tokens=min(sampling.min_tokens, most))


def answerable(question: str) -> str:
    """The question that VizWiz asks first."""
    return f"can this be answered from the picture, {question.strip(' ?')}?"


def refuses(answer: str) -> bool:
    """True where the answer to `answerable` is no."""
    return answer.strip().lower().split(" ")[0].strip(",.") in ("no", "not", UNANSWERABLE)


def cut_before(text: str, ends: tuple[str, ...]) -> tuple[str, bool]:
    """The text before the first of `ends`, and whether there was one."""
    found = [place for end in ends if (place := text.find(end)) >= 0]
    return (text[: min(found)], True) if found else (text, False)

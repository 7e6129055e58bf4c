"""Replay: what is text worth that is mixed in while the language model learns pictures?

Command   lavit compare recipes/studies/replay.py
Cost      lavit compare recipes/studies/replay.py --plan
Score     docs/results.md

All arms begin with one language model of the same seed (`texts`), trained on prose and, for a
third of its tokens, on texts of scenes without pictures; it is measured for what is forgotten, and
cannot read. Then it learns to read and write pictures: `with text` goes on seeing the prose,
one document of it (480 tokens) for 36 of pictures, a third of its target tokens;
`without text` never sees it again, and so has half as many tokens of pictures more. The prose is
Python's manual, as CPython carries it; every fifth topic is held out, with each paragraph of it
that stands elsewhere too.

From the paper: text beside pairs, about 2 : 1 ([A]; Sec. 3.2). Different here: 0.5 : 1, a manual in
place of RedPajama, a small LM. Each arm's rates: the best of 0.5, 1 and 2 times the preset's, by
the likelihood of validation descriptions in seed 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pydoc_data.topics import topics

import numpy as np

from lavit.config import Mixture
from lavit.evaluate.exam import Exam
from lavit.evaluate.figures import Figure, mean
from lavit.evaluate.study import Arm, Comparison, Study, in_training
from lavit.evaluate.text import perplexity
from lavit.presets import Preset

WEIGHT, FIRST = 0.028, 0.1  # of prose, to 1 of pictures; to 1 of their texts
FIGURES = {
    "text_nats": -1,
    "read_test_exact": 0,
    "read_pairs_exact": 0,
    "read_pairs_likelihood": 0,
    "write_minimal_pairs": 0,
}


def paragraphs(text: str) -> list[str]:
    """Its paragraphs, each with single spaces."""
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]


def held_out() -> Sequence[str]:
    """Every fifth topic of Python's manual."""
    return [topics[name] for name in sorted(topics)[::5]]


def seen() -> Sequence[str]:
    """The other topics, without the paragraphs that a topic that is held out has too."""
    known = {part for text in held_out() for part in paragraphs(text)}
    names = [name for n, name in enumerate(sorted(topics)) if n % 5]
    left = [[part for part in paragraphs(topics[name]) if part not in known] for name in names]
    return ["\n\n".join(parts) for parts in left if parts]


def text_nats(exam: Exam) -> Figure:
    """Nats a token of held-out topics, topic by topic; codes take their share of the softmax."""
    exam.needs("language")
    text, language = exam.model.text_tokenizer, exam.model.language
    passages = held_out()[: exam.count]
    found = [perplexity([one], text, language, None, where="manual").value for one in passages]
    return mean(np.log(np.array(found, dtype=np.float64)))


def texts(preset: Preset) -> Preset:
    """Prompts alone, without their pictures; the study's prose comes beside them."""
    return in_training(preset, "language", mixture=Mixture(text=1.0))


STUDY = Study(
    name="replay",
    claim="text mixed in keeps the LM's language (Sec. 3.2; no ablation is given)",
    at_scale="an LM of billions of weights that was trained on trillions of tokens has more to "
    "forget, and more room to keep it",
    arms={
        "without text": Arm(lm_of="texts", rates=True),
        "with text": Arm(lm_of="texts", texts=WEIGHT, rates=True),
        "texts": Arm(texts, texts=FIRST),
    },
    figures=tuple(FIGURES),
    comparisons=(
        *(
            Comparison("with text", "without text", figure, better)
            for figure, better in FIGURES.items()
        ),
        Comparison("without text", "texts", "text_nats", 1),
        Comparison("with text", "texts", "text_nats"),
    ),
    rates=(0.5, 1.0, 2.0),
    own={"text_nats": text_nats},
    texts=seen,
)

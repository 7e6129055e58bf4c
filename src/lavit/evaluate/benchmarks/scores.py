"""The figures of a benchmark's predictions. A picture that cannot be read has none: that counts
as a wrong answer, or a caption without words.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from lavit.evaluate.benchmarks.answer_metrics import exact_match, vqa_accuracy
from lavit.evaluate.benchmarks.caption_metrics import (
    ORDERS,
    bleu,
    bleu_counts,
    caption_words,
    cider,
    rouge_l,
)
from lavit.evaluate.benchmarks.image_metrics import (
    SUBSET,
    frechet_distance,
    kernel_distances,
)
from lavit.evaluate.benchmarks.layouts import Example
from lavit.evaluate.figures import Figure, average, averages, bootstrapped, mean

POINTS = (0.0, 100.0)
FEW = 2048  # pictures, below which the covariance of Inception's features has not full rank
NAMED = 5  # pictures that a note names


def is_unread(made: Any) -> bool:
    """Whether a prediction lacks because its picture cannot be read."""
    return isinstance(made, dict) and "unread" in made


def unread_note(names: Sequence[str], then: str) -> str:
    """A line that counts and names pictures that cannot be read, and says what becomes of them."""
    more = ", …" if len(names) > NAMED else ""
    shown = ", ".join(names[:NAMED]) + more
    return f"pictures that cannot be read, {then}: {len(names)} ({shown})"


def caption_figures(examples: Sequence[Example], made: Sequence[Any]) -> dict[str, Figure]:
    """CIDEr-D, BLEU and ROUGE-L of captions; CIDEr-D by domain where there are any."""
    words = [[] if is_unread(one) else caption_words(one) for one in made]
    references = [[caption_words(text) for text in one.references] for one in examples]
    counts = bleu_counts(words, references)
    found = {"cider": mean(cider(words, references))}
    for n in range(1, ORDERS + 1):
        found[f"bleu_{n}"] = bootstrapped(partial(_bleu_of, counts, n), len(words))
    rouge = [rouge_l(*pair) for pair in zip(words, references, strict=True)]
    found["rouge_l"] = mean(rouge, within=POINTS)
    for group in sorted({one.group for one in examples} - {""}):
        at = [n for n, one in enumerate(examples) if one.group == group]
        scores = cider([words[n] for n in at], [references[n] for n in at])
        found[f"cider_{group.replace('-', '_')}"] = mean(scores)
    return found


def _bleu_of(counts: np.ndarray, n: int, at: np.ndarray) -> float:
    return bleu(counts[at], n)


def match_figures(examples: Sequence[Example], made: Sequence[Any]) -> dict[str, Figure]:
    """Share of answers that are the right one, in points."""
    pairs = zip(made, examples, strict=True)
    values = [0.0 if is_unread(said) else exact_match(said, one.references[0])
              for said, one in pairs]  # fmt: skip
    return {"exact_match": mean(values, within=POINTS)}


def answer_figures(examples: Sequence[Example], made: Sequence[Any]) -> dict[str, Figure]:
    """The VQA accuracy, and that of each kind of answer."""
    pairs = zip(made, examples, strict=True)
    values = [0.0 if is_unread(said) else vqa_accuracy(said, one.references) for said, one in pairs]
    groups = [one.group or "all" for one in examples]
    return {"vqa_accuracy": mean(values, within=POINTS, details=averages(groups, values))}


def distance_figures(drawn: np.ndarray, real: np.ndarray) -> dict[str, Figure]:
    """FID and KID of the features `[pictures, dim]` of drawn and real pictures, two or more each.

    FID has no interval, and KID none where its subsets are all that there is.
    """
    count, fewest = len(drawn), min(len(drawn), len(real))
    fid, kid = frechet_distance(drawn, real), kernel_distances(drawn, real)
    note = f"of {fewest} pictures: below {FEW:,} FID is too large" if fewest < FEW else ""
    low, high = _quantiles(kid) if fewest > SUBSET else (None, None)
    return {
        "fid": Figure(fid, None, None, count, note=note),
        "kid": Figure(average(kid), low, high, count),
    }


def _quantiles(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)

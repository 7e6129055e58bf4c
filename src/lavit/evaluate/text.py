"""Does the language model keep its language? Perplexity on text outside the training data, compared
with the base language model's.

A text alone, as stage 2 sees it (paper Sec. 3.2 mixes text in for this): cut into documents of a
row, each token predicted from those before it in its document. Ours spends probability on codes as
well (one softmax over both, Eq. 6), the base does not: what is lost to codes counts against us.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lavit.config import LanguageConfig, from_json
from lavit.evaluate.exam import Exam
from lavit.evaluate.examinee import Missing
from lavit.evaluate.figures import Figure, mean
from lavit.evaluate.kept import Progress
from lavit.language.model import Language
from lavit.layout import ids_of
from lavit.storage import load_base

WINDOW = 512  # tokens of a document
PASSAGES = 40  # of prose, for the ratio

LogitsOf = Callable[[Int[Tensor, "1 tokens"]], Float[Tensor, "1 tokens ids"]]


def perplexity(
    texts: Sequence[str],
    text: PreTrainedTokenizerBase,
    language: Language,
    base: PreTrainedModel | None,
    *,
    where: str,
    progress: Progress | None = None,
) -> Figure:
    """Perplexity of `language` over `texts`; the floor is that of the base model, if there is one.

    The interval is that of the mean log-likelihood, text by text; `count` counts texts.
    """

    def joint(ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)[None]
        documents = torch.zeros_like(places)
        hidden = language.hidden(language.embed(ids), documents=documents, positions=places)
        return torch.cat([language.text_logits(hidden), language.visual_logits(hidden)], -1)

    device = language.rows.device
    models: list[LogitsOf] = [joint]
    if base is not None:
        lm: nn.Module = base
        models.append(lambda ids: lm.to(device)(input_ids=ids).logits)
    scores: list[list[tuple[float, int]]] = [[] for _ in models]
    for number, passage in enumerate(texts):
        ids = torch.tensor([ids_of(text, passage)], device=device)
        if ids.shape[1] < 2:
            continue
        for found, logits in zip(scores, models, strict=True):
            found.append(_log_likelihood(ids, logits))
        if progress:
            progress(f"text, {where}", number + 1, len(texts))
    sums = [[sum(column) for column in zip(*found, strict=True)] for found in scores]
    ours, *others = [math.exp(-total / count) for total, count in sums]
    spread = mean([total / count for total, count in scores[0]])
    assert spread.low is not None and spread.high is not None
    factor = math.exp((spread.high - spread.low) / 2)
    floor = ("base language model", others[0]) if others else None
    return Figure(ours, ours / factor, ours * factor, len(scores[0]), floor)


@torch.no_grad()
def _log_likelihood(ids: Int[Tensor, "1 tokens"], logits: LogitsOf) -> tuple[float, int]:
    """Sum of log-probabilities of a text, document by document, and how many tokens it predicts."""
    total, count = 0.0, 0
    for document in ids.split(WINDOW, dim=1):
        if document.shape[1] > 1:
            found = logits(document[:, :-1])[0].float()
            total -= float(F.cross_entropy(found, document[0, 1:], reduction="sum"))
            count += document.shape[1] - 1
    return total, count


def text_ratio(exam: Exam) -> Figure:
    """Perplexity of English prose (Python's manual) over that of the base language model."""
    from pydoc_data.topics import topics

    exam.needs("language")
    language = exam.model.config.language
    began = exam.trained.get("model", {}).get("language")
    if began is None and language.lora_rank:
        began = {"source": language.source}
    if began is not None and began["source"] == "random":
        reason = "its language model was trained from scratch"
        raise Missing(f"{reason}: there is no base to compare with")
    if began is None or began["source"] == "folder":
        raise Missing("the base of its language model is not known")
    base, _ = load_base(from_json(LanguageConfig, began), exam.folder / "base")
    texts = [topics[name] for name in sorted(topics)][: min(PASSAGES, exam.count)]
    text, where = exam.model.text_tokenizer, "Python's manual"
    found = perplexity(texts, text, exam.model.language, base, where=where, progress=exam.progress)
    assert found.value is not None and found.low is not None and found.high is not None
    assert found.floor is not None  # the base's perplexity
    under = found.floor[1]
    return Figure(
        found.value / under,
        found.low / under,
        found.high / under,
        found.count,
        ceiling=("the base itself", 1.0),
        details={"perplexity": found.value, "base": under},
    )

"""Does the language model keep its language? Perplexity on text that nobody trained on, beside the base LM's.

A text alone, as stage 2 sees it (paper Sec. 3.2 mixes text in for this): cut into documents of a row, each token predicted
from those before it in its document. Ours spends probability on codes as well (one softmax over both, Eq. 6), the base
LM does not: what is lost to codes counts against us.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lavit.evaluate.figures import Figure, mean
from lavit.modules.language import Language

WINDOW = 512  # tokens of a document

Logits = Callable[[Int[Tensor, "1 tokens"]], Float[Tensor, "1 tokens ids"]]


def perplexity(
    texts: Sequence[str],
    text: PreTrainedTokenizerBase,
    language: Language,
    base: PreTrainedModel | None,
    *,
    where: str,
    progress: Callable[[str, int, int], None] | None = None,
) -> Figure:
    """Perplexity of `language` over `texts`; the floor is the base LM's and the note the ratio of the two.

    The interval is that of the mean log-likelihood, text by text; `count` counts texts.
    """

    def joint(ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)[None]
        documents = torch.zeros_like(places)
        hidden = language.hidden(language.embed(ids), documents=documents, positions=places)
        return torch.cat([language.text_logits(hidden), language.visual_logits(hidden)], -1)

    device = language.rows.device
    models: list[Logits] = [joint]
    if base is not None:
        models.append(lambda ids: base.to(device)(input_ids=ids).logits)
    scores: list[list[tuple[float, int]]] = [[] for _ in models]
    for number, passage in enumerate(texts):
        ids = torch.tensor([text(passage, add_special_tokens=False)["input_ids"]], device=device)
        if ids.shape[1] < 2:
            continue
        for found, logits in zip(scores, models, strict=True):
            found.append(_log_likelihood(ids, logits))
        if progress:
            progress(f"text, {where}", number + 1, len(texts))
    ours, *others = [sum(total for total, _ in found) / sum(count for _, count in found) for found in scores]
    spread = mean("", [total / count for total, count in scores[0]])
    half = (spread.high - spread.low) / 2
    floor, note = None, ""
    if others:
        floor = ("base language model", math.exp(-others[0]))
        note = f"{math.exp(others[0] - ours):.3f} of the base"
    low, high = math.exp(-ours - half), math.exp(-ours + half)
    return Figure(f"perplexity of text, {where}", math.exp(-ours), low, high, len(scores[0]), floor, None, note)


@torch.no_grad()
def _log_likelihood(ids: Int[Tensor, "1 tokens"], logits: Logits) -> tuple[float, int]:
    """Sum of log-probabilities of one text, document by document, and how many tokens were predicted."""
    total, count = 0.0, 0
    for document in ids.split(WINDOW, dim=1):
        if document.shape[1] > 1:
            found = logits(document[:, :-1])[0].float()
            total -= float(F.cross_entropy(found, document[0, 1:], reduction="sum"))
            count += document.shape[1] - 1
    return total, count

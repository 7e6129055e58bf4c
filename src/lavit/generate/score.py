"""How likely texts are as the caption of a picture: to choose one, and to keep the best drawings.

The paper keeps the best of four by CLIP-L. Ours, without another model: the picture is read again,
and scores the mean log-likelihood of the prompt as its caption. Any callable (prompt, picture) ->
float may take its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from lavit.config import InputError
from lavit.generate.decoder import Decoder
from lavit.generate.prompts import Prompt, lay_prompt
from lavit.layout import reading
from lavit.model import LaVIT

T = TypeVar("T")
Scorer = Callable[[str, Image.Image], float]


def scorer_of(model: LaVIT, scorer: Scorer | str) -> Scorer:
    """The scorer that is meant: a function, or "likelihood"."""
    if callable(scorer):
        return scorer
    if scorer != "likelihood":
        known = "use 'likelihood' or a function (prompt, picture) -> float"
        raise InputError(f"scorer {scorer!r} is not known: {known}")
    return partial(likelihood, model)


def likelihood(model: LaVIT, prompt: str, picture: Image.Image) -> float:
    """Mean log-likelihood, per token and end, of the prompt as the caption of a read picture."""
    seen = lay_prompt(model, reading(picture))
    return float(_said(model, seen, prompt).mean())


def choices(model: LaVIT, seen: Prompt, texts: Sequence[str]) -> list[float]:
    """Log-likelihood of each whole text behind a prompt, the likelier of with and without a "."."""
    return [max(float(_said(model, seen, text + end).sum()) for end in ("", ".")) for text in texts]


@torch.inference_mode()
def _said(model: LaVIT, seen: Prompt, words: str) -> Float[Tensor, "tokens"]:
    """Log-likelihood of each token of the words behind a prompt, and of the end."""
    language, text = model.language, model.text_tokenizer
    said = [*text(words, add_special_tokens=False)["input_ids"], language.vocabulary.end]
    ids = torch.tensor([[*seen.ids, *said]], device=model.device)
    length, context = ids.shape[1], Decoder(language).context
    if length > context:
        raise InputError(
            f"a picture and its text have {length} tokens but the language model attends to "
            f"{context}: shorten the text, or give a scorer of your own"
        )
    slots = torch.zeros_like(ids, dtype=torch.bool)
    slots[0, : len(seen.slots)] = torch.tensor(seen.slots, device=model.device)
    embeddings = language.embed(ids, slots=slots, features=seen.features)
    hidden = language.body(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    hidden = hidden[0, -len(said) - 1 : -1]
    heads = (language.text_logits(hidden), language.visual_logits(hidden))
    log_p = torch.cat(heads, -1).float().log_softmax(-1)
    return log_p.gather(-1, ids[0, -len(said) :, None])[:, 0]


def best(candidates: Sequence[T], scores: Sequence[float], n: int) -> list[T]:
    """The n candidates of the highest scores, best first; of equals the earlier one."""
    order = sorted(range(len(candidates)), key=lambda place: -scores[place])  # stable
    return [candidates[place] for place in order[:n]]

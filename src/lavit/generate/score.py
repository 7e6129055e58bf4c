"""Best of n: candidates are drawn, scored against their prompt, and the best are kept.

The paper keeps the best of four by CLIP-L. Ours, without another model: the picture is read again, and scores the mean
log-likelihood of the prompt as its caption. Any callable (prompt, picture) -> float may take its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from PIL import Image

from lavit.config import InputError
from lavit.data.chat import ChatPicture
from lavit.generate.decoder import Decoder
from lavit.generate.prompts import lay_prompt
from lavit.model import LaVIT

T = TypeVar("T")
Scorer = Callable[[str, Image.Image], float]


def scorer_of(model: LaVIT, scorer: Scorer | str) -> Scorer:
    """The scorer that is meant: a function, or "likelihood"."""
    if callable(scorer):
        return scorer
    if scorer != "likelihood":
        raise InputError(f"scorer {scorer!r} is not known: use 'likelihood' or a function (prompt, picture) -> float")
    return lambda prompt, picture: likelihood(model, prompt, picture)


@torch.inference_mode()
def likelihood(model: LaVIT, prompt: str, picture: Image.Image) -> float:
    """Mean log-likelihood, per token and end, of the prompt as the caption of a picture that the model reads."""
    language, text = model.language, model.text
    seen = lay_prompt(model, [ChatPicture(picture, read=True)])
    said = [*text(prompt, add_special_tokens=False)["input_ids"], language.vocabulary.end]
    ids = torch.tensor([[*seen.ids, *said]], device=model.device)
    context = Decoder(language).context
    if ids.shape[1] > context:
        raise InputError(
            f"a drawing and its prompt have {ids.shape[1]} tokens but the language model attends to {context}: "
            "shorten the prompt, or give a scorer of your own"
        )
    slots = torch.zeros_like(ids, dtype=torch.bool)
    slots[0, : len(seen.slots)] = torch.tensor(seen.slots, device=model.device)
    embeddings = language.embed(ids, slots=slots, features=seen.features)
    hidden = language.body(inputs_embeds=embeddings, use_cache=False).last_hidden_state[0, -len(said) - 1 : -1]
    logits = torch.cat([language.text_logits(hidden), language.visual_logits(hidden)], -1).float()
    return float(logits.log_softmax(-1).gather(-1, ids[0, -len(said) :, None]).mean())


def best(candidates: Sequence[T], scores: Sequence[float], n: int) -> list[T]:
    """The n candidates of the highest scores, best first; of equals the earlier one."""
    order = sorted(range(len(candidates)), key=lambda place: (-scores[place], place))
    return [candidates[place] for place in order[:n]]

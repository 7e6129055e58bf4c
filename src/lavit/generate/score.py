"""How likely texts are as the caption of a picture: to choose one, and to keep the best drawings.

The paper keeps the best of four by CLIP-L. Ours, without another model: the picture is read again,
and scores the mean log-likelihood of the prompt as its caption. Any callable (prompt, picture) ->
float may take its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from lavit.config import InputError
from lavit.generate.decoder import Decoder
from lavit.generate.prompts import Prompt, lay_prompt
from lavit.layout import ImagePart, Part, TextPart, drawing, ids_of, reading, segments
from lavit.model import LaVIT
from lavit.sequence import lay_out, pack


def likelihood(model: LaVIT, prompt: str, picture: Image.Image) -> float:
    """Mean log-likelihood, per token and end, of the prompt as the caption of a read picture."""
    seen = lay_prompt(model, reading(picture))
    return float(_said(model, seen, prompt).mean())


def text_likelihood(model: LaVIT, text: str) -> float:
    """Mean log-likelihood, per token and end, of a text that stands alone."""
    return -_alone(model, [TextPart(text, target=True, ends=True)])


def drawn_likelihood(model: LaVIT, prompt: str, codes: tuple[int, ...]) -> float:
    """Mean log-likelihood, per code and marker, of a picture's codes behind its prompt."""
    words, picture = drawing(prompt, 0)
    assert isinstance(words, TextPart) and isinstance(picture, ImagePart)
    picture = replace(picture, codes=codes, ends=False)
    return -_alone(model, [replace(words, target=False), picture])


@torch.inference_mode()
def _alone(model: LaVIT, parts: list[Part]) -> float:
    """Mean loss of a document's targets, no picture of which is read."""
    language = model.language
    ids, end = partial(ids_of, model.text_tokenizer), language.vocabulary.end
    document = segments(parts, ids, lambda part: part.codes or (), end)
    rows = pack([[lay_out(document, language.vocabulary)]], language.vocabulary)
    return float(model(rows.to(model.device)))


def ranked(model: LaVIT, seen: Prompt, texts: Sequence[str]) -> list[str]:
    """Whole texts by their log-likelihood behind a prompt, likeliest first; of equals the earlier.

    A text counts as the more likely of itself with and without a full stop.
    """

    def score(text: str) -> float:
        return max(float(_said(model, seen, text + end).sum()) for end in ("", "."))

    return sorted(texts, key=score, reverse=True)  # keeps the order of equals


@torch.inference_mode()
def _said(model: LaVIT, seen: Prompt, words: str) -> Float[Tensor, "tokens"]:
    """Log-likelihood of each token of the words behind a prompt, and of the end."""
    language, text = model.language, model.text_tokenizer
    said = [*ids_of(text, words), language.vocabulary.end]
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

"""The language part on three families of causal LMs: packed = separate, chunked = plain, exported = ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lavit.modules import language as language_module
from lavit.modules.language import Language
from lavit.modules.merger import Merger
from lavit.sequence import Image, Text, lay_out, pack
from lavit.storage import export

COMMON = {"vocab_size": 60, "bos_token_id": None, "eos_token_id": 2}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES = {
    "llama tied": {"model_type": "llama", "tie_word_embeddings": True, **LLAMA},
    "qwen2 untied": {"model_type": "qwen2", "tie_word_embeddings": False, **LLAMA},
    "mistral untied": {"model_type": "mistral", "tie_word_embeddings": False, **LLAMA},
    "gpt2 tied": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4},
}


def toy_language(family: str) -> Language:
    options = {**COMMON, **FAMILIES[family]}
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(options.pop("model_type"), **options))
    return Language(lm, Merger(16, 2, 1, 2.0), dim=16, codes=12, end=2).eval()


@pytest.fixture(params=FAMILIES)
def language(request: pytest.FixtureRequest) -> Language:
    return toy_language(request.param)


def documents(language: Language) -> tuple[list, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    patches = torch.randn(2, 9, 16, generator=generator)
    keep = torch.rand(2, 9, generator=generator) > 0.5
    codes = [tuple(torch.randint(12, (int(k.sum()),), generator=generator).tolist()) for k in keep]
    parts = [
        (Image(codes[0], read=True, index=0), Text((5, 6, 7))),
        (Text((8, 9)), Image((1, 2, 3), read=False)),
        (Text((4, 4, 4, 4)),),
        (Image(codes[1], read=True, index=1), Text((3,))),
    ]
    return [lay_out(part, language.vocabulary) for part in parts], patches, keep


def total(language: Language, rows: list, patches: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    batch = pack(rows, language.vocabulary)
    out = language(batch, patches[batch.images], keep[batch.images])
    return out.text + out.visual


def test_packed_loss_is_the_sum_of_separate_losses(language: Language) -> None:
    sequences, patches, keep = documents(language)
    packed = total(language, [sequences[:3], sequences[3:]], patches, keep)
    separate = sum(total(language, [[sequence]], patches, keep) for sequence in sequences)
    assert torch.allclose(packed, separate, rtol=1e-5)


def test_another_document_never_changes_a_hidden_state(language: Language) -> None:
    sequences, patches, keep = documents(language)
    rows = pack([[sequences[0], sequences[2]]], language.vocabulary)
    other = pack([[sequences[0], lay_out((Text((7, 7, 7, 7)),), language.vocabulary)]], language.vocabulary)
    length = len(sequences[0])
    states = []
    for batch in (rows, other):
        features = language.read(patches[batch.images], keep[batch.images])
        embeddings = language.embed(batch.ids, slots=batch.slots, features=features)
        states.append(language.hidden(embeddings, documents=batch.documents, positions=batch.positions)[0, :length])
    assert states[0].equal(states[1])


def test_chunked_loss_is_the_plain_loss(language: Language, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences, patches, keep = documents(language)
    losses, gradients = [], []
    for chunk in (10_000, 3):
        monkeypatch.setattr(language_module, "CHUNK", chunk)
        language.zero_grad()
        loss = total(language, [sequences], patches, keep)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(language.rows.grad.clone())
    assert torch.allclose(losses[0], losses[1], rtol=1e-6)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_new_rows_have_the_scale_of_the_lms_own(language: Language) -> None:
    own = language.lm.get_input_embeddings().weight.detach().std()
    assert 0.8 < float(language.rows.detach().std() / own) < 1.25


def test_exported_folder_opens_in_transformers_with_equal_logits(language: Language, tmp_path: Path) -> None:
    text = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="<end>")
    export(language, text, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[1, 5, 60, 63, 64, 61]])
    with torch.no_grad():
        expected = plain(input_ids=ids).logits
        hidden = language.body(inputs_embeds=language.embed(ids)).last_hidden_state
        ours = torch.cat([language.text_logits(hidden), language.visual_logits(hidden)], -1)
    assert expected.shape[-1] == language.vocabulary.size
    assert torch.allclose(expected, ours, atol=1e-5)


def test_soft_capped_logits_are_refused() -> None:
    options = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "final_logit_softcapping": 0.1,
    }
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", **options, **heads, eos_token_id=2))
    language = Language(lm, Merger(16, 2, 1, 2.0), dim=16, codes=12, end=2)
    with pytest.raises(ValueError, match="soft-capping"):
        language.check_head()

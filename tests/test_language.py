"""The language part on three LM families: packed = separate, chunked = plain, exported = ours."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import import_protobuf

from lavit.config import InputError, LanguageConfig
from lavit.language import model as language_module
from lavit.language.head import HeadLoss
from lavit.language.model import Language
from lavit.language.reader import MergerReader
from lavit.sequence import Image, Text, lay_out, pack
from lavit.storage import export, load_base
from lavit.visual_tokenizer.merger import Merger

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
    "gemma tied, scaled": {"model_type": "gemma", "head_dim": 8, "pad_token_id": None, **LLAMA},
    "phi untied, biased": {"model_type": "phi", "tie_word_embeddings": False, **LLAMA},
}


def toy_language(family: str) -> Language:
    options = {**COMMON, **FAMILIES[family]}
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(options.pop("model_type"), **options)
    )
    if (bias := lm.get_output_embeddings().bias) is not None:
        bias.data.normal_()
    return Language(
        lm, MergerReader(Merger(16, 2, 1, 2.0), lm.config.hidden_size), codes=12, end=2
    ).eval()


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


def total(
    language: Language, rows: list, patches: torch.Tensor, keep: torch.Tensor
) -> torch.Tensor:
    batch = pack(rows, language.vocabulary)
    out = language(batch, patches[batch.images], keep[batch.images])
    return out.total


def test_packed_loss_is_the_sum_of_separate_losses(language: Language) -> None:
    sequences, patches, keep = documents(language)
    packed = total(language, [sequences[:3], sequences[3:]], patches, keep)
    separate = sum(total(language, [[sequence]], patches, keep) for sequence in sequences)
    assert torch.allclose(packed, separate, rtol=1e-5)


def test_features_of_another_picture_are_refused(language: Language) -> None:
    """Two read pictures whose masks change places: as many features in all, but not in each."""
    images = [Image((1,) * length, read=True, index=n) for n, length in enumerate((5, 7))]
    sequences = [lay_out((image, Text((3,))), language.vocabulary) for image in images]
    batch, patches = pack([sequences], language.vocabulary), torch.zeros(2, 9, 16)
    keep = torch.arange(9) < torch.tensor([[5], [7]])
    language(batch, patches, keep)
    with pytest.raises(InputError, match="image 0 has 5 slots but 7 features"):
        language(batch, patches, keep.flip(0))


def test_another_document_never_changes_a_hidden_state(language: Language) -> None:
    sequences, patches, keep = documents(language)
    rows = pack([[sequences[0], sequences[2]]], language.vocabulary)
    other = pack(
        [[sequences[0], lay_out((Text((7, 7, 7, 7)),), language.vocabulary)]], language.vocabulary
    )
    length = len(sequences[0])
    states = []
    for batch in (rows, other):
        features = language.read(patches[batch.images], keep[batch.images])
        embeddings = language.embed(batch.ids, slots=batch.slots, features=features)
        hidden = language.hidden(embeddings, documents=batch.documents, positions=batch.positions)
        states.append(hidden[0, :length])
    assert states[0].equal(states[1])


def test_chunked_loss_is_the_plain_loss(
    language: Language, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_attention_by_document_is_attention_under_the_mask(language: Language) -> None:
    """Forward and gradients, documents of many lengths, padding behind them."""
    generator = torch.Generator().manual_seed(2)
    lengths = ((1, 7, 3, 12, 2), (9, 9, 4), (24,))
    documents = torch.full((3, 26), -1)
    positions = torch.zeros(3, 26, dtype=torch.long)
    for row, parts in enumerate(lengths):
        found = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(parts))
        documents[row, : len(found)] = found
        positions[row, : len(found)] = torch.cat([torch.arange(n) for n in parts])
    embeddings = torch.randn(3, 26, language.width, generator=generator)
    weight = torch.randn(3, 26, language.width, generator=generator) * (documents >= 0)[..., None]
    assert language.by_document
    states, gradients = [], []
    for language.by_document in (True, False):
        entered = embeddings.clone().requires_grad_()
        state = language.hidden(entered, documents=documents, positions=positions)
        (state * weight).sum().backward()
        states.append(state.detach()[documents >= 0])
        gradients.append(entered.grad)
    assert torch.allclose(states[0], states[1], atol=1e-5)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_the_heads_loss_and_gradients_are_those_of_cross_entropy(bias: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden, text, visual = (
        torch.randn(n, 8, generator=generator).requires_grad_() for n in (23, 30, 14)
    )
    offset = torch.randn(30, generator=generator).requires_grad_() if bias else None
    labels = torch.randint(44, (23,), generator=generator)
    wanted = [x for x in (hidden, text, visual, offset) if x is not None]
    total, losses, correct = HeadLoss.apply(hidden, labels, text, offset, visual, 5, True)
    found = torch.autograd.grad(3.0 * total, wanted)
    logits = torch.cat([F.linear(hidden, text, offset), F.linear(hidden, visual)], -1)
    plain = F.cross_entropy(logits, labels, reduction="none")
    expected = torch.autograd.grad(3.0 * plain.sum(), wanted)
    assert torch.allclose(losses, plain, atol=1e-5)
    assert correct.equal(logits.argmax(-1) == labels)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_pictures_read_as_codes_bring_no_features(language: Language) -> None:
    sequences, patches, keep = documents(language)
    batch = pack([sequences], language.vocabulary)
    read = language(batch, patches[batch.images], keep[batch.images]).total
    language.read_as = "codes"
    loss = language(batch, patches[batch.images], keep[batch.images]).total
    loss.backward()
    assert loss.equal(language(batch).total) and not loss.equal(read)
    assert language.reader.to_language.weight.grad is None


def test_new_rows_lie_around_the_mean_of_the_lms_own(language: Language) -> None:
    own = language.lm.get_input_embeddings().weight.detach()
    away = language.rows.detach() - own.mean(0)
    assert 0.2 < float(away.std() / own.std()) < 0.3


def test_rows_of_codes_begin_as_near_as_their_vectors(language: Language) -> None:
    vectors = F.normalize(torch.randn(12, 8), dim=-1)
    vectors[5] = vectors[4]
    old = {name: rows.clone() for name, rows in language.named_parameters() if "rows" in name}
    language.begin_codes(vectors)
    apart = torch.pdist(vectors)
    for name, rows in language.named_parameters():
        if "rows" not in name:
            continue
        codes, before = rows[2:], old[name][2:]
        assert torch.equal(rows[:2], old[name][:2])  # the markers
        torch.testing.assert_close(codes.std(), before.std())
        torch.testing.assert_close(codes.mean(0), before.mean(0))
        assert torch.equal(codes[5], codes[4])
        assert torch.corrcoef(torch.stack([torch.pdist(codes), apart]))[0, 1] > 0.7
    first = language.rows.clone()
    language.begin_codes(vectors)
    torch.testing.assert_close(language.rows, first)  # no chance in it


def test_exported_folder_opens_in_transformers_with_equal_logits(
    language: Language, tmp_path: Path
) -> None:
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


@pytest.mark.parametrize("trained", [True, False])
def test_new_rows_begin_around_the_mean_row_of_the_table(trained: bool) -> None:
    """As far apart as rows of a fresh LM; a trained one's hidden states would be too far."""
    lm = toy_language("qwen2 untied").lm
    table, head = (
        layer.weight.data.normal_(1.0, 0.2) for layer in (lm.get_input_embeddings(), lm.lm_head)
    )
    language = Language(
        lm,
        MergerReader(Merger(16, 2, 1, 2.0), lm.config.hidden_size),
        codes=500,
        end=2,
        trained=trained,
    )
    for rows, known in ((language.rows, table), (language.head_rows, head)):
        rows = rows.detach()
        assert (rows.mean(0) - known.mean(0)).abs().max() < 0.05
        assert float((rows - rows.mean(0)).std()) == pytest.approx(
            0.05 if trained else 0.2, rel=0.1
        )


def test_embeddings_that_are_no_rows_of_a_table_are_refused() -> None:
    language = toy_language("llama tied")
    language.check_lm()
    language.lm.get_input_embeddings().register_forward_hook(lambda module, ids, rows: rows + 1)
    with pytest.raises(InputError, match="more than look rows up"):
        language.check_lm()


def test_a_sentencepiece_model_is_read_or_its_package_named(tmp_path: Path) -> None:
    """LLaMA's own folders have a tokenizer.model and no tokenizer.json."""
    proto = import_protobuf().ModelProto()
    for number, piece in enumerate(("<unk>", "<s>", "</s>", "▁", "▁c", "a", "c", "▁ca")):
        kind = (2, 3, 3)[number] if number < 3 else 1  # unknown, control, normal
        proto.pieces.add(piece=piece, score=-float(number), type=kind)
    proto.trainer_spec.model_type = 2
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    toy_language("llama tied").lm.save_pretrained(tmp_path)
    config = LanguageConfig(source=str(tmp_path))
    if find_spec("sentencepiece"):
        _, text = load_base(config, None)
        assert text("ca", add_special_tokens=False)["input_ids"] == [7]
        return
    with pytest.raises(InputError, match=r"sentencepiece.*pip install 'lavit\[published\]'"):
        load_base(config, None)


def test_soft_capped_logits_are_refused() -> None:
    options = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "final_logit_softcapping": 0.1,
    }
    lm = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gemma2", **options, **heads, eos_token_id=2)
    )
    language = Language(
        lm, MergerReader(Merger(16, 2, 1, 2.0), lm.config.hidden_size), codes=12, end=2
    )
    with pytest.raises(ValueError, match="soft-capping"):
        language.check_lm()


@pytest.mark.parametrize("kind", ["bloom", "mamba", "lfm2"])
def test_lms_that_see_beyond_a_document_are_refused(kind: str) -> None:
    """ALiBi takes its distances from a mask of rows; states and convolutions run through a row."""
    options = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 1, "n_head": 4}
    if kind == "lfm2":
        options |= {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}
        options |= {"initializer_range": 0.3}  # or what leaks is less than rounding
        options |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options, eos_token_id=2))
    reader = MergerReader(Merger(16, 2, 1, 2.0), 32)
    with pytest.raises(InputError, match="documents"):
        Language(lm, reader, codes=12, end=2).eval().check_lm()

"""Readers of Fig. 1a against their formulae, and the seams that arms of studies use."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Blip2QFormerModel

from conftest import toy_config, toy_training
from lavit.baselines.readers import LinearReader, QFormer, Resampler
from lavit.config import InputError, Mixture
from lavit.generate.pipeline import Pipeline
from lavit.language.reader import Reader
from lavit.model import LaVIT
from lavit.storage import baseline
from lavit.train.language import LanguageStage
from lavit.train.run import open_run, train_stages
from lavit.visual_tokenizer.merger import Merger
from lavit.visual_tokenizer.selector import KeepPolicy
from lavit.visual_tokenizer.tokenizer import VisualTokenizer

DIM, WIDTH = 12, 20


def loud(module: torch.nn.Module) -> torch.nn.Module:
    """Weights of a size that lets every part matter."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.4)
    return module.eval()


def norm(x: Tensor, layer: torch.nn.LayerNorm, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return centred / deviation * layer.weight + layer.bias


def heads_of(x: Tensor, heads: int) -> Tensor:
    """[rows, inner] as [heads, rows, inner / heads]."""
    return torch.stack(x.chunk(heads, -1))


def mixed(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    q, k, v = (heads_of(x, heads) for x in (query, key, value))
    shares = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)
    return torch.cat(list(shares @ v), -1)


def test_the_resampler_is_its_formula() -> None:
    reader = loud(Resampler(DIM, WIDTH, latents=5, depth=2, heads=2, head_dim=3))
    patches = torch.randn(2, 7, DIM)
    found = reader(patches, torch.ones(2, 7, dtype=torch.bool)).unflatten(0, (2, 5))
    for picture, rows in zip(patches, found, strict=True):
        x = reader.latents
        for layer in reader.layers:
            own = norm(x, layer.norm_latents, 1e-5)
            seen = torch.cat([norm(picture, layer.norm_patches, 1e-5), own])
            to_key, to_value = layer.key_value.weight.chunk(2)
            parts = own @ layer.query.weight.T, seen @ to_key.T, seen @ to_value.T
            x = x + mixed(*parts, 2) @ layer.out.weight.T
            first, last = layer.mlp[1].weight, layer.mlp[3].weight
            hidden = norm(x, layer.mlp[0], 1e-5) @ first.T
            x = x + hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2 @ last.T
        out = norm(x, reader.norm, 1e-5) @ reader.to_language.weight.T + reader.to_language.bias
        torch.testing.assert_close(rows, out, rtol=1e-4, atol=1e-4)
    assert reader.rows(3) == 5
    assert not [name for name, _ in reader.layers.named_parameters() if "out.bias" in name]


def test_the_q_former_is_transformers_with_cross_attention_in_every_second_layer() -> None:
    sizes = {"queries": 4, "hidden": 8, "depth": 3, "heads": 2}
    reader = loud(QFormer(DIM, WIDTH, **sizes))
    patches = torch.randn(2, 7, DIM)
    peer = Blip2QFormerModel(reader.qformer.config).eval()
    peer.load_state_dict(reader.qformer.state_dict())
    queries = reader.queries.expand(2, -1, -1)
    hidden = peer(query_embeds=queries, encoder_hidden_states=patches).last_hidden_state
    found = reader(patches, torch.ones(2, 7, dtype=torch.bool))
    torch.testing.assert_close(found, reader.to_language(hidden).flatten(0, 1))
    crossed = [layer.has_cross_attention for layer in reader.qformer.encoder.layer]
    assert crossed == [True, False, True] and reader.rows(3) == 4
    # and by hand: BERT's layers, norm after each sum
    x = norm(reader.queries, reader.qformer.layernorm, 1e-12)
    for layer, crosses in zip(reader.qformer.encoder.layer, crossed, strict=True):
        for block in [layer.attention, *([layer.crossattention] if crosses else [])]:
            own, out = block.attention, block.output
            seen = x if block is layer.attention else patches[0]
            parts = own.query(x), own.key(seen), own.value(seen)
            x = norm(out.dense(mixed(*parts, 2)) + x, out.LayerNorm, 1e-12)
        wide = layer.intermediate_query.dense(x)
        wide = wide * (1 + torch.erf(wide / math.sqrt(2))) / 2
        x = norm(layer.output_query.dense(wide) + x, layer.output_query.LayerNorm, 1e-12)
    torch.testing.assert_close(found[:4], reader.to_language(x), rtol=1e-3, atol=1e-3)


def test_the_linear_reader_takes_every_patch() -> None:
    reader = loud(LinearReader(DIM, WIDTH, patches=7))
    patches = torch.randn(2, 7, DIM)
    found = reader(patches, torch.zeros(2, 7, dtype=torch.bool))
    expected = patches.flatten(0, 1) @ reader.to_language.weight.T + reader.to_language.bias
    torch.testing.assert_close(found, expected)
    assert reader.rows(1) == 7


def test_unknown_readers_and_sizes_are_named() -> None:
    with pytest.raises(InputError, match="no Reader 'Other': choose from LinearReader"):
        baseline({"_class_name": "Other"}, Reader, DIM, WIDTH)
    with pytest.raises(InputError, match="no Reader 'Clusters'"):
        baseline({"_class_name": "Clusters"}, Reader, DIM, WIDTH)
    with pytest.raises(InputError, match="beams"):
        baseline({"_class_name": "Resampler", "beams": 3}, Reader, DIM, WIDTH)


def test_a_reader_with_other_numbers_trains_and_reads_behind_a_frozen_lm(
    toy_data: Path, tmp_path: Path
) -> None:
    """Three rows for each picture, whatever the number of its codes; the LM stays as it was."""
    model, training = toy_config(), toy_training(3)
    reader = {"_class_name": "Resampler", "latents": 3, "depth": 1, "heads": 2, "head_dim": 8}
    model = replace(model, language=replace(model.language, reader=reader))
    language = replace(training.language, train_lm=False, mixture=Mixture(reading=1.0))
    run = open_run(tmp_path, toy_data, model, replace(training, language=language, sample_every=3))
    seen: list[dict[str, Tensor]] = []
    begun = LanguageStage.__init__

    def noted(stage: LanguageStage, *parts: object) -> None:
        begun(stage, *parts)  # type: ignore[arg-type]
        named = stage.module.state_dict()
        seen.append({name: tensor.clone() for name, tensor in named.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageStage, "__init__", noted)
        train_stages(run)
    trained = LaVIT.from_pretrained(tmp_path)
    after = trained.language.state_dict()
    same = {name: torch.equal(tensor, after[name]) for name, tensor in seen[0].items()}
    assert all(value for name, value in same.items() if name.startswith("lm."))
    assert not same["reader.latents"] and not same["reader.to_language.weight"]
    assert isinstance(Pipeline(trained).caption(toy_data / "train" / "0.png"), str)


def tokenizer(**fields: object) -> VisualTokenizer:
    torch.manual_seed(0)
    return loud(VisualTokenizer(replace(toy_config().visual_tokenizer, **fields)))


def test_one_keep_policy_is_that_of_training_and_use() -> None:
    """`auto` is the configuration's: in stage 1's forward, in tokens, in what a user asks for."""
    patches = torch.randn(6, 16, 32)
    own = tokenizer().select(patches)
    for keep, counts in (
        ("all", [16] * 6),
        ("top_k:5", [5] * 6),
        ("scattered", own.sum(1).tolist()),
    ):
        one = tokenizer(keep=keep)
        mask = one.select(patches)
        assert mask.sum(1).tolist() == counts
        assert torch.equal(one.select(patches, KeepPolicy.parse("auto")), mask)
        assert torch.equal(one.encode(patches).keep, mask)
        assert torch.equal(one(patches, None, quantise=False, dense=False).mask > 0.5, mask)
        assert one.select(patches, KeepPolicy(max_tokens=2)).sum(1).tolist() == [2] * 6
    assert not torch.equal(tokenizer(keep="scattered").select(patches), own)


def test_lengths_of_other_pictures_are_dealt_out() -> None:
    patches = torch.randn(64, 16, 32)
    own = tokenizer().select(patches).sum(1)
    dealt, fixed = tokenizer(keep="dealt"), tokenizer(keep="mean")
    for one in (dealt, fixed):
        one.measure_lengths(patches)
    lengths = dealt.select(patches).sum(1)
    assert set(lengths.tolist()) <= set(own.tolist()) and not torch.equal(lengths, own)
    assert abs(float(lengths.double().mean() - own.double().mean())) < 1.5
    assert torch.equal(dealt.select(patches[3:4]).sum(1), lengths[3:4])  # of one picture the same
    mean = round(float(own.double().mean()))
    assert all(abs(count - mean) <= 1 for count in fixed.select(patches).sum(1).tolist())
    with pytest.raises(InputError, match="needs a tokenizer that was trained with it"):
        tokenizer().select(patches, KeepPolicy("dealt"))


@pytest.mark.parametrize("gathers", ["attend", "mean", "drop"])
@pytest.mark.parametrize("causal", [True, False])
def test_mergers_agree_in_both_forms(gathers: str, causal: bool) -> None:
    merger = loud(Merger(32, 2, 2, 2.0, gathers=gathers, causal=causal))
    patches, keep = torch.randn(3, 16, 32), torch.rand(3, 16) < 0.4
    keep[:, 0] = True
    rows, weight = merger.masked(patches, keep.float(), dense=False)
    packed = merger(patches, keep)
    torch.testing.assert_close(rows[weight > 0.5], packed, rtol=1e-4, atol=1e-4)
    # what dropped patches say comes through, and what stands behind, where it should
    other = patches.clone()
    other[0, ~keep[0]] += 1.0 * torch.randn(int((~keep[0]).sum()), 32)
    first = int(keep[0].sum())
    same = torch.allclose(merger(other, keep)[:first], packed[:first], atol=1e-5)
    assert same == (gathers == "drop")
    last = patches.clone()
    last[0, int(keep[0].nonzero()[-1])] += torch.randn(32)
    assert torch.allclose(merger(last, keep)[0], packed[0], atol=1e-5) == causal

"""Selector, merger, codebook, reconstructor: equivalences, inverses, what training must keep."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

import published
import ranks
from lavit.config import InputError, TokenizerConfig
from lavit.convert import names
from lavit.presets import PRESETS
from lavit.visual_tokenizer import codebook as codebook_module
from lavit.visual_tokenizer.codebook import Codebook
from lavit.visual_tokenizer.layers import Ragged
from lavit.visual_tokenizer.merger import Merger
from lavit.visual_tokenizer.selector import KeepPolicy, Selector, gumbel, select, straight_through
from lavit.visual_tokenizer.tokenizer import VisualTokenizer, cosine_distance

DIM, HEADS, DEPTH, RATIO, PATCHES = 32, 4, 3, 4.3637, 16


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loud(module: torch.nn.Module, std: float = 0.2) -> torch.nn.Module:
    """Weights large enough that every path matters."""
    generator = seeded(5)
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = std * torch.randn(value.shape, generator=generator)
            value.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)
    return module


@pytest.fixture
def merger() -> Merger:
    return loud(Merger(DIM, HEADS, DEPTH, RATIO))


@pytest.fixture
def patches() -> Tensor:
    return torch.randn(4, PATCHES, DIM, generator=seeded(1))


@pytest.fixture
def keep() -> Tensor:
    """Uneven counts; one picture keeps one patch, one keeps all."""
    keep = torch.rand(4, PATCHES, generator=seeded(2)) < 0.4
    keep[2] = torch.arange(PATCHES) == 7
    keep[3] = True
    assert len(set(keep.sum(1).tolist())) == 4
    return keep


def tokenizer(**changes: object) -> VisualTokenizer:
    sizes = {
        "dim": DIM,
        "patches": PATCHES,
        "heads": HEADS,
        "merger_depth": 2,
        "reconstructor_depth": 2,
    }
    config = TokenizerConfig(**(sizes | {"codes": 256, "code_dim": 8} | changes))
    torch.manual_seed(3)
    model = VisualTokenizer(config)
    loud(model)
    return model


def published_weights(merger: Merger) -> dict[str, Tensor]:
    """The merger's parameters under published names, still attached to the graph."""
    own = dict(merger.named_parameters())
    return {rename.theirs[0]: own[rename.ours] for rename in names.merger(DEPTH)}


# merger ------------------------------------------------------------------------------------------


def oracle(merger: Merger, patches: Tensor, keep: Tensor, smoothing: float = 1e-12) -> Tensor:
    """Kept rows of the dense masked form; without smoothing, 0 / 0 where all is kept."""
    weights = published_weights(merger)
    size = {"heads": HEADS, "depth": DEPTH, "smoothing": smoothing}
    return torch.cat(
        [published.merger(p, k, weights, **size)[k] for p, k in zip(patches, keep, strict=True)]
    )


def test_ragged_merger_is_the_dense_masked_form(merger, patches, keep):
    with torch.no_grad():
        ours = merger(patches, keep)
        rows, weight = merger.masked(patches, keep.float(), dense=True)
        few, few_weight = merger.masked(patches, keep.float(), dense=False)
        assert torch.equal(weight, keep.float())
        for theirs in (rows[keep], few[few_weight > 0.5], oracle(merger, patches, keep)):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_smoothing_is_the_published_one_and_small(merger, patches, keep):
    with torch.no_grad():
        rows, _ = merger.masked(patches, keep.float(), dense=True, smoothing=published.SMOOTHING)
        theirs = oracle(merger, patches, keep, published.SMOOTHING)
        torch.testing.assert_close(rows[keep], theirs, rtol=1e-5, atol=1e-5)
        loud(merger, std=0.1)
        theirs = oracle(merger, patches, keep, published.SMOOTHING)
        torch.testing.assert_close(merger(patches, keep), theirs, rtol=1e-5, atol=1e-5)


def gradients(merger: Merger, rows: Tensor, patches: Tensor) -> list[Tensor]:
    """Of weights and patches, for a loss that weighs every output differently."""
    loss = (rows * torch.randn(rows.shape, generator=seeded(9))).sum()
    return list(torch.autograd.grad(loss, [*merger.parameters(), patches]))


def test_ragged_merger_has_the_gradients_of_the_dense_form(merger, patches, keep):
    patches = patches.requires_grad_()
    ours = gradients(merger, merger(patches, keep), patches)
    dense = gradients(merger, merger.masked(patches, keep.float(), dense=True)[0][keep], patches)
    few, weight = merger.masked(patches, keep.float(), dense=False)
    ragged = gradients(merger, few[weight > 0.5], patches)
    naive = gradients(merger, oracle(merger, patches, keep), patches)
    for theirs in (dense, ragged, naive):
        for a, b in zip(ours, theirs, strict=True):
            assert float((a - b).norm()) <= 1e-5 * max(float(b.norm()), 1.0)


def test_merger_is_causal_among_kept_and_hears_every_dropped_patch(merger, patches, keep):
    places = keep[0].nonzero()[:, 0]
    last, dropped = int(places[-1]), int((~keep[0]).nonzero()[-1])
    one, mask = patches[:1], keep[:1]
    before = merger(one, mask)
    changed = one.clone()
    changed[0, last, 0] += 3.0
    after = merger(changed, mask)
    assert torch.equal(before[:-1], after[:-1])
    assert not torch.allclose(before[-1], after[-1])
    changed = one.clone()
    changed[0, dropped, 0] += 3.0
    assert ((merger(changed, mask) - before).abs().amax(1) > 1e-4).all()


def test_merger_gives_a_picture_the_same_rows_in_any_batch(merger, patches, keep):
    together = merger(patches, keep).split(keep.sum(1).tolist())
    for i, rows in enumerate(together):
        torch.testing.assert_close(
            rows, merger(patches[i : i + 1], keep[i : i + 1]), rtol=1e-5, atol=1e-5
        )


def test_everything_kept_attends_uniformly(merger, patches):
    everything = torch.ones(1, PATCHES, dtype=torch.bool)
    block = merger.blocks[0]
    cross = block.cross_attention
    context = merger.norm_patches(patches[:1])
    expected = cross.out(cross.value(context).mean(1))
    rows = Ragged(everything.sum(1))
    found = block._cross(patches[0], context[0], rows, rows, torch.tensor([False]))
    torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-5, atol=1e-5)


def test_padding_and_packing_are_inverses():
    for lengths in ([3, 1, 5], [4, 4]):
        rows = Ragged(torch.tensor(lengths))
        packed = torch.randn(sum(lengths), 6, generator=seeded())
        padded = rows.pad(packed)
        assert torch.equal(rows.pack(padded), packed)
        for i, part in enumerate(packed.split(lengths)):
            assert torch.equal(padded[i, : lengths[i]], part)
            assert not padded[i, lengths[i] :].any()


# selector ----------------------------------------------------------------------------------------


@pytest.fixture
def log_probs() -> Tensor:
    keep = torch.rand(5, PATCHES, generator=seeded(4)).clamp(0.02, 0.98)
    keep[3] = 0.01  # expects 0.16 patches
    keep[4] = 0.25  # all tied: expects 4
    return torch.stack([keep, 1 - keep], -1).log()


def test_auto_keeps_the_expected_count_of_best_patches(log_probs):
    mask = select(log_probs, KeepPolicy())
    p = log_probs[..., 0].exp()
    assert mask.sum(1).tolist() == [max(1, round(float(row.sum()))) for row in p]
    for row, kept in zip(p[:3], mask[:3], strict=True):
        assert row[kept].min() >= row[~kept].max()
    assert mask[3].sum() == 1
    assert mask[4].nonzero()[:, 0].tolist() == [0, 1, 2, 3]  # ties go to the earlier patch
    assert torch.equal(mask, select(log_probs, KeepPolicy()))


@pytest.mark.parametrize(
    ("keep", "counts"),
    [
        ("top_k:5", [5] * 5),
        (5, [5] * 5),
        (0.25, [4] * 5),
        ("rate:0.5", [8] * 5),
        ("all", [PATCHES] * 5),
    ],
)
def test_counting_policies(log_probs, keep, counts):
    mask = select(log_probs, KeepPolicy.parse(keep))
    assert mask.sum(1).tolist() == counts
    p = log_probs[..., 0].exp()
    for row, kept in zip(p, mask, strict=True):
        assert kept.all() or row[kept].min() >= row[~kept].max()


def test_threshold_and_bounds(log_probs):
    p = log_probs[..., 0].exp()
    above = p > 0.5
    mask = select(log_probs, KeepPolicy("threshold", 0.5))
    assert torch.equal(mask[:3], above[:3])
    assert mask[3:].sum(1).tolist() == [1, 1]  # nothing above, one kept all the same
    bounded = select(log_probs, KeepPolicy("threshold", 0.5, min_tokens=3, max_tokens=5))
    assert bounded.sum(1).tolist() == [min(max(int(n), 3), 5) for n in above.sum(1)]
    assert select(log_probs, KeepPolicy("top_k", 99)).all()


def test_random_policies_need_a_generator_and_repeat_with_it(log_probs):
    for policy in (KeepPolicy("sample"), KeepPolicy("random", 0.25)):
        with pytest.raises(InputError, match="generator"):
            select(log_probs, policy)
        first, again, other = (select(log_probs, policy, generator=seeded(s)) for s in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert (first.sum(1) >= 1).all()
    assert (
        select(log_probs, KeepPolicy("random", 0.25), generator=seeded()).sum(1).tolist() == [4] * 5
    )


def test_sampling_keeps_each_patch_with_its_probability(log_probs):
    some = log_probs[:1].expand(4000, -1, -1)
    share = select(some, KeepPolicy("sample"), generator=seeded()).float().mean(0)
    torch.testing.assert_close(share, log_probs[0, :, 0].exp(), rtol=0, atol=0.04)


def test_strided_and_norm_baselines(log_probs, patches):
    assert select(log_probs, KeepPolicy("strided", 0.25))[0].nonzero()[:, 0].tolist() == [
        0,
        5,
        10,
        15,
    ]
    mask = select(log_probs[:4], KeepPolicy("norm", 0.25), patches=patches)
    best = patches.norm(dim=-1).topk(4, 1).indices.sort(1).values
    assert torch.equal(mask.nonzero()[:, 1].view(4, 4), best)
    with pytest.raises(InputError, match="patches"):
        select(log_probs, KeepPolicy("norm", 0.25))


@pytest.mark.parametrize(
    "keep", ["top_k:0", "rate:0", "rate:2", "threshold:7", "nonsense", "top_k:x", True, 0, 1.5]
)
def test_wrong_policies_are_named(log_probs, keep):
    with pytest.raises(InputError):
        select(log_probs, KeepPolicy.parse(keep))


def test_masks_do_not_depend_on_the_batch(patches):
    model = tokenizer()
    for policy in ("auto", "threshold:0.5", 5, 0.3):
        policy = KeepPolicy.parse(policy)
        together = model.select(patches, policy)
        alone = torch.cat([model.select(patches[i : i + 1], policy) for i in range(len(patches))])
        assert torch.equal(together, alone)


def test_training_mask_is_hard_straight_through_and_never_empty(log_probs):
    leaf = log_probs.clone().requires_grad_()
    noise = gumbel((5, PATCHES, 2), seeded())
    noise[3] = torch.tensor([-50.0, 50.0])  # a draw that would drop everything
    mask = straight_through(leaf, noise)
    assert set(mask.detach().unique().tolist()) == {0.0, 1.0}
    drawn = ((leaf + noise)[..., 0] > (leaf + noise)[..., 1]).float()
    assert torch.equal(mask[:3].detach(), drawn[:3])
    assert mask[3].sum() == 1
    mask[0].sum().backward()
    soft = (log_probs + noise).softmax(-1)[0, :, 0]
    torch.testing.assert_close(leaf.grad[0, :, 0], soft * (1 - soft))


def test_selector_stays_in_fp32_under_autocast(patches):
    selector = Selector(DIM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = selector(patches)
    assert torch.equal(found, selector(patches))


# training form -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("dense", "quantise"), list(itertools.product([True, False], repeat=2)))
def test_reconstruction_alone_reaches_the_selector(patches, dense, quantise):
    model = tokenizer()
    noise = gumbel((4, PATCHES, 2), seeded(6))
    out = model(patches, noise, quantise=quantise, dense=dense)
    cosine_distance(out.features, patches).mean().backward()
    for name, value in model.selector.named_parameters():
        assert value.grad is not None and float(value.grad.abs().max()) > 1e-8, name


@pytest.mark.parametrize("quantise", [True, False])
@pytest.mark.parametrize("spatial", [True, False])
def test_training_forms_agree_forward(patches, quantise, spatial):
    model = tokenizer(spatial_positions=spatial)
    noise = gumbel((4, PATCHES, 2), seeded(6))
    options = {"quantise": quantise}
    dense = model(patches, noise, dense=True, **options)
    ragged = model(patches, noise, dense=False, **options)
    frozen = model(patches, noise, dense=True, train_selector=False, **options)
    inference = model.reconstruct(patches, dense.mask.detach() > 0.5, quantise=quantise)
    for other in (ragged.features, frozen.features, inference):
        torch.testing.assert_close(dense.features, other, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dense.vectors, ragged.vectors, rtol=1e-5, atol=1e-5)
    assert not frozen.mask.requires_grad


def swapped(i: int, j: int) -> Tensor:
    order = torch.arange(PATCHES)
    order[[i, j]] = order[[j, i]]
    return order


def test_swapping_two_patches_changes_the_codes_where_the_encoder_has_no_positions(patches):
    keep = torch.zeros(4, PATCHES, dtype=torch.bool)
    keep[:, ::3] = True
    with_code, without = (tokenizer(position_code=p, codes=8192) for p in (True, False))

    def codes(model: VisualTokenizer, order: Tensor) -> Tensor:
        return model.encode(patches[:, order], keep=keep).codes

    same, dropped, kept = torch.arange(PATCHES), swapped(1, 11), swapped(0, 9)
    # two dropped patches: without positions nobody can tell
    assert torch.equal(codes(without, same), codes(without, dropped))
    assert not torch.equal(codes(with_code, same), codes(with_code, dropped))
    assert not torch.equal(
        codes(with_code, same).sort().values, codes(with_code, kept).sort().values
    )


def test_encode_then_decode_is_the_reconstruction_of_the_same_mask(patches):
    model = tokenizer()
    tokens = model.encode(patches)
    assert tokens.lengths.tolist() == tokens.keep.sum(1).tolist()
    with torch.no_grad():
        found = model.decode(tokens.codes, tokens.lengths)
        expected = model.reconstruct(patches, tokens.keep, quantise=True)
    assert torch.equal(found, expected)
    with pytest.raises(InputError, match="codes"):
        model.decode(tokens.codes[:17], torch.tensor([17]))


# codebook ----------------------------------------------------------------------------------------


@pytest.fixture
def codebook() -> Codebook:
    torch.manual_seed(0)
    return Codebook(DIM, 64, 8)


def unit(count: int, dim: int = 8, seed: int = 7) -> Tensor:
    return F.normalize(torch.randn(count, dim, generator=seeded(seed)), dim=-1)


def test_index_and_vector_are_inverses_and_nearest(codebook):
    codes = torch.arange(64)
    assert torch.equal(codebook.index(codebook.vector(codes)), codes)
    vectors = unit(500)
    assert torch.equal(codebook.index(vectors), torch.cdist(vectors, codebook.vectors).argmin(-1))
    # foreign codes need not be unit vectors
    codebook.vectors.mul_(torch.linspace(0.5, 1.5, 64)[:, None])
    assert torch.equal(codebook.index(vectors), torch.cdist(vectors, codebook.vectors).argmin(-1))


def test_look_up_is_straight_through_and_commits(codebook):
    vectors = unit(20).requires_grad_()
    out = codebook.quantise(vectors)
    torch.testing.assert_close(out.vectors, codebook.vector(out.codes))
    weight = torch.randn(20, 8, generator=seeded())
    (gradient,) = torch.autograd.grad((out.vectors * weight).sum(), vectors, retain_graph=True)
    assert torch.equal(gradient, weight)
    (gradient,) = torch.autograd.grad(out.commitment, vectors)
    torch.testing.assert_close(gradient, 2 * (vectors.detach() - codebook.vector(out.codes)) / 20)


def test_update_is_the_running_average_of_assigned_vectors(codebook):
    vectors = unit(200)
    codes = codebook.index(vectors)
    mass, sums = codebook.mass.clone(), codebook.sums.clone()
    revived = codebook.update(vectors, codes, decay=0.9, patience=0, generator=seeded())
    assert revived == 0
    for code in range(64):
        mine = vectors[codes == code]
        torch.testing.assert_close(codebook.mass[code], 0.9 * mass[code] + 0.1 * len(mine))
        expected = 0.9 * sums[code] + 0.1 * mine.sum(0)
        torch.testing.assert_close(codebook.sums[code], expected)
        torch.testing.assert_close(codebook.vectors[code], F.normalize(expected, dim=0))
    assert torch.equal(codebook.idle, (torch.bincount(codes, minlength=64) == 0).long())


def test_revived_codes_start_anew(codebook):
    vectors = unit(1)[[0] * 40]  # one direction: nearly every code is idle
    codes = codebook.index(vectors)
    counts = [
        codebook.update(vectors, codes, decay=0.9, patience=3, generator=seeded(i))
        for i in range(3)
    ]
    assert counts[:2] == [0, 0] and counts[2] == 40  # 63 are dead, the batch has 40 vectors
    revived = (codebook.vectors - vectors[0]).norm(dim=1) < 1e-6
    revived[codes[0]] = False
    assert int(revived.sum()) >= 39
    typical = codebook.mass[revived][0]
    torch.testing.assert_close(codebook.sums[revived], vectors[: int(revived.sum())] * typical)
    assert (codebook.idle[revived] == 0).all()
    other = unit(30, seed=8)
    codebook.update(other, codebook.index(other), decay=0.99, patience=3, generator=seeded())
    unused = revived & (codebook.idle == 1)
    assert unused.any()
    # the old sums do not come back at the next update
    torch.testing.assert_close(
        codebook.vectors[unused], vectors[: int(unused.sum())], rtol=1e-5, atol=1e-5
    )


def test_k_means_draws_nearer_every_round_and_uses_every_code(codebook):
    vectors = unit(3000)
    nearness = []
    for rounds in range(6):
        codebook.k_means(vectors, rounds=rounds, generator=seeded())
        nearness.append(float((vectors @ codebook.vectors.T).amax(1).mean()))
    assert all(after > before for before, after in itertools.pairwise(nearness))
    assert len(codebook.index(vectors).unique()) == 64
    torch.testing.assert_close(codebook.vectors.norm(dim=1), torch.ones(64))
    torch.testing.assert_close(codebook.sums, codebook.vectors * codebook.mass[:, None])


def test_k_means_in_parts_is_k_means(codebook, monkeypatch):
    vectors, found = unit(700), []
    for chunk in (100, 10_000):
        monkeypatch.setattr(codebook_module, "CHUNK", chunk)
        codebook.k_means(vectors, rounds=4, generator=seeded())
        found.append(codebook.vectors.clone())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", PRESETS)
def test_k_means_sees_several_vectors_a_code(name):
    model, training = PRESETS[name]().model, PRESETS[name]().training
    assert training.tokenizer.k_means_vectors >= 10 * model.visual_tokenizer.codes


def test_k_means_fills_empty_clusters_and_takes_few_vectors(codebook):
    poles = torch.eye(8)
    crowd = torch.cat([poles[:1].expand(2000, -1), poles])  # one place holds nearly all
    codebook.k_means(crowd, rounds=10, generator=seeded())
    torch.testing.assert_close((poles @ codebook.vectors.T).amax(1), torch.ones(8))
    codebook.k_means(poles, rounds=2, generator=seeded())
    assert torch.isfinite(codebook.vectors).all()


def test_two_ranks_are_one_with_the_doubled_batch(tmp_path: Path):
    mp.start_processes(ranks.run_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    codebook = ranks.new_codebook()
    revived = ranks.train_codes(codebook, ranks.batches_of(None))
    assert sum(revived) > 0
    assert first["revived"] == second["revived"] == revived
    for name, value in codebook.state_dict().items():
        assert torch.equal(first["state"][name], second["state"][name]), name
        torch.testing.assert_close(first["state"][name], value, rtol=1e-5, atol=1e-6)

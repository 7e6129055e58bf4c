"""Parts of rivals against their formulae, and the seams that carry them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import toy_config
from lavit.baselines.emu import EmuDocuments, EmuReader
from lavit.baselines.registers import Registers
from lavit.baselines.regression import GoalReader, Regressing, hog, normalised_pixels
from lavit.baselines.selectors import Attended, ClusterMeans, Clusters, Leaders
from lavit.baselines.vqgan import (
    Vqgan,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    patch_discriminator,
)
from lavit.config import InputError, LanguageTraining
from lavit.evaluate.study import load_study
from lavit.generate.engine import Engine
from lavit.generate.request import Request
from lavit.generate.sampling import Sampling
from lavit.language.model import Language
from lavit.language.reader import MergerReader
from lavit.layout import drawing
from lavit.sequence import IGNORE, Image, Text, lay_out, pack
from lavit.train.encoded import check_reader
from lavit.visual_tokenizer.merger import Merger
from lavit.visual_tokenizer.selector import KeepPolicy
from lavit.visual_tokenizer.tokenizer import cosine_distance

STUDIES = Path(__file__).parent.parent / "recipes" / "studies"
WIDTH, DIM, CODES, TEXT = 48, 32, 32, 70


def loud(module: nn.Module) -> nn.Module:
    """Weights of a size that lets every part matter."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(std=0.3)
    return module.eval()


def language_of(reader: MergerReader | EmuReader, kind: type[Language]) -> Language:
    sizes = {**toy_config().language.architecture, "vocab_size": TEXT}
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**sizes))
    return loud(kind(lm, reader, codes=CODES, end=0))  # type: ignore[return-value]


# --- goals of MAE and MaskFeat


def test_hog_is_its_formula() -> None:
    pictures = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = hog(pictures, 2).unflatten(-1, (3, 2, 2, 9))  # patches of 16 pixels: 2 x 2 cells
    x = pictures.double().numpy()
    for image, patch, colour, cell in ((0, 0, 0, (0, 0)), (1, 3, 2, (1, 0)), (0, 1, 1, (1, 1))):
        histogram = np.zeros(9)
        top, left = 16 * (patch // 2) + 8 * cell[0], 16 * (patch % 2) + 8 * cell[1]
        for i in range(top, top + 8):
            for j in range(left, left + 8):
                plane = x[image, colour]
                down = plane[i + 1, j] - plane[i - 1, j] if 0 < i < 31 else 0.0
                right = plane[i, j + 1] - plane[i, j - 1] if 0 < j < 31 else 0.0
                angle = math.degrees(math.atan2(down, right)) % 180
                histogram[int(angle // 20) % 9] += math.hypot(down, right)
        expected = histogram / np.linalg.norm(histogram)
        assert np.allclose(found[image, patch, colour, *cell], expected, atol=1e-5)


def test_the_pixels_of_mae_have_mean_0_and_deviation_1_in_each_patch() -> None:
    pictures = torch.rand(2, 3, 12, 12)
    found = normalised_pixels(pictures, 3)
    patch = pictures[1, :, 4:8, 8:12].flatten()  # row 1, column 2
    expected = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
    torch.testing.assert_close(found[1, 5], expected)


# --- regression at image positions


def batch_of(language: Language, *documents: tuple[Text | Image, ...]) -> object:
    laid = [lay_out(document, language.vocabulary) for document in documents]
    return pack([laid], language.vocabulary)


@pytest.mark.parametrize("goals", ["features", "pixels", "hog"])
def test_image_positions_regress_and_words_stay_as_they_are(goals: str) -> None:
    merger = Merger(DIM, 2, 1, 2.0)
    reader = GoalReader(merger, WIDTH, goals=goals, picture=32, grid=4, weight=0.5)
    language = language_of(reader, Regressing)
    assert isinstance(language, Regressing)
    patches, keep = torch.randn(2, 16, DIM), torch.zeros(2, 16, dtype=torch.bool)
    keep[0, [1, 4, 9]], keep[1, [0, 2]] = True, True
    batch = batch_of(
        language,
        (Image((3, 5, 7), True, 0), Text((11, 12, 0))),
        (Text((13, 14)), Image((2, 9, 8, 1), False), Text((0,))),  # written: as codes
        (Image((4, 6), True, 1), Text((15, 0))),
    )
    given = torch.randn(5, reader.head.out_features)
    loss = language(batch, patches, keep, None, given)
    hidden, _ = language.states(batch, patches, keep)
    before = torch.zeros_like(batch.slots)
    before[:, :-1] = batch.slots[:, 1:]
    errors = (reader.head(hidden[before]) - given).square().mean(-1)
    rest = language.loss(hidden[~before & (batch.labels != IGNORE)],
                         batch.labels[~before & (batch.labels != IGNORE)])  # fmt: skip
    torch.testing.assert_close(loss.total, rest.total + 0.5 * errors.sum())
    assert int(loss.visual_tokens) == int(rest.visual_tokens) + 5
    # words and written codes are LaVIT's: only the targets before slots differ
    plain = Language(language.lm, reader, codes=CODES, end=0)
    plain.load_state_dict(language.state_dict())
    torch.testing.assert_close(plain(batch, patches, keep).text, loss.text)
    # a share of positions: those whose labels are left
    labels = batch.labels.clone()
    labels[before] = torch.where(torch.arange(5) % 2 == 0, labels[before], IGNORE)
    some = language(replace(batch, labels=labels), patches, keep, None, given)
    torch.testing.assert_close(some.total, rest.total + 0.5 * errors[::2].sum())


# --- Emu


def emu_reader(count: int = 4) -> EmuReader:
    sizes = {"patches": 16, "queries": count, "depth": 2, "heads": 2, "rebuild_depth": 1}
    return loud(EmuReader(DIM, WIDTH, **sizes))  # type: ignore[return-value]


def test_a_reader_with_documents_of_its_own_is_refused_where_others_are_made() -> None:
    reader = emu_reader()
    with pytest.raises(InputError, match="EmuReader learns from encoded pictures alone"):
        check_reader(language_of(reader, reader.language))


def test_rows_of_emu_do_not_see_those_behind_them() -> None:
    reader, patches = emu_reader(), torch.randn(3, 16, DIM)
    keep = torch.ones(3, 16, dtype=torch.bool)
    rows = reader(patches, keep).unflatten(0, (3, 4))
    with torch.no_grad():
        reader.queries[2] += 1.0
    again = reader(patches, keep).unflatten(0, (3, 4))
    torch.testing.assert_close(rows[:, :2], again[:, :2])
    assert not torch.allclose(rows[:, 2], again[:, 2]) and not torch.allclose(
        rows[:, 3], again[:, 3]
    )
    assert not torch.allclose(rows[0], rows[1])  # they see their picture
    assert reader.head.bias is None and reader.rows(7) == 4


def test_targets_of_emu_do_not_move_and_rebuilding_moves_no_row() -> None:
    reader, patches = emu_reader(), torch.randn(2, 16, DIM)
    rows = reader(patches, torch.ones(2, 16, dtype=torch.bool))
    assert not reader.goals(rows, patches).requires_grad
    reader.beside_loss(rows, patches).backward()
    moved = {name for name, weight in reader.named_parameters() if weight.grad is not None}
    assert moved and all(name.startswith("rebuild.") for name in moved)


def test_emu_feeds_back_what_it_predicts() -> None:
    """With a cache, lane by lane among text lanes, as from the whole sequence at once."""
    language = language_of(emu_reader(), Regressing)
    prompts = ((5, 6, 7), (9, 8))
    alone = Sampling(guidance=1.0, max_tokens=16)
    drawn = [Request(ids=ids, sampling=alone, mode="image") for ids in prompts]
    text = Request(ids=(4, 5), sampling=Sampling(temperature=0.0, max_tokens=6))
    first, words, second = Engine(language).complete([drawn[0], text, drawn[1]])
    assert len(words.text) > 0
    for ids, completion in zip(prompts, (first, second), strict=True):
        assert len(completion.embeddings) == 4 and completion.reason == "end"
        start = torch.tensor([[*ids, language.vocabulary.image_start]])
        read = language.embed(start)
        for embedding in completion.embeddings:
            places = torch.arange(read.shape[1])[None]
            how = {"documents": torch.zeros_like(places), "positions": places}
            expected = language.next_embedding(language.hidden(read, **how)[:, -1])
            torch.testing.assert_close(embedding, expected[0], rtol=1e-3, atol=1e-3)
            read = torch.cat([read, expected[None]], 1)
    guided = replace(drawn[0], sampling=Sampling(guidance=2.0, max_tokens=16))
    with pytest.raises(InputError, match="without guidance: use mode 'image' and guidance=1"):
        Engine(language).complete([guided])
    with pytest.raises(InputError, match="the prompt and its picture have 257 tokens"):
        Engine(language).complete([replace(drawn[0], ids=(5,) * 253)])


def test_all_pictures_of_emu_are_rows_and_written_ones_are_learnt_whole() -> None:
    vocabulary = language_of(emu_reader(), Regressing).vocabulary
    config = LanguageTraining(
        steps=1, rows=1, tokens=64, learning_rate=1.0, rows_rate=1.0, reader_rate=1.0,
        read_share=0.0,
    )  # fmt: skip
    documents = object.__new__(EmuDocuments)
    documents.vocabulary, documents.config = vocabulary, config
    documents.read_rows = lambda kept: 4
    rng = np.random.default_rng(0)
    drawn = documents.segments(drawing(None, 3), lambda picture: (1, 2, 3, 4, 5, 6))
    assert drawn == (Image((0,) * 4, True, 3), Text((0,)))
    blank = Image((0,) * 4, True, 3)
    written = documents.lay_out((Text((7, 8)), blank, Text((0,))), rng)
    read = documents.lay_out((blank, Text((7, 8, 0))), rng)
    for laid, learnt in ((written, 4), (read, 0)):
        inside = [label for label, slot in zip(laid.labels, (*laid.slots[1:], False), strict=True)
                  if slot]  # fmt: skip
        assert sum(laid.slots) == 4 and laid.images == (3,)
        assert sum(label != IGNORE for label in inside) == learnt


# --- selectors


def test_leaders_and_clusters_are_greedy() -> None:
    places = torch.zeros(1)
    patches, leaders = torch.randn(3, 16, 4), Leaders(places)
    found = leaders.leads(patches, 0.4)
    unit = patches / patches.norm(dim=-1, keepdim=True)
    for picture, leads in zip(unit, found, strict=True):
        known: list[int] = []
        for patch in range(16):
            if not any(float(picture[patch] @ picture[one]) >= 0.4 for one in known):
                known.append(patch)
        assert leads.nonzero()[:, 0].tolist() == known
    rows = ClusterMeans(4, places)(patches, found).split(found.sum(1).tolist())
    for picture, raw, leads, own in zip(unit, patches, found, rows, strict=True):
        at = leads.nonzero()[:, 0]
        nearest = (picture @ picture[at].T).argmax(-1)
        nearest[at] = torch.arange(len(at))
        for number, row in enumerate(own):
            torch.testing.assert_close(row, raw[nearest == number].mean(0))


def test_the_threshold_gives_the_wanted_number_of_clusters() -> None:
    config = replace(toy_config().visual_tokenizer, rival={"_class_name": "Clusters"})
    tokenizer = Clusters(config, rate=0.5)
    patches = torch.randn(64, 16, DIM)
    tokenizer.measure(patches)
    kept = tokenizer.select(patches).sum(1).float()
    assert abs(float(kept.mean()) - 8) < 1 and float(kept.std()) > 0
    assert torch.equal(tokenizer.encode(patches).lengths, kept.long())


def test_received_attention_is_its_formula() -> None:
    tokenizer = Attended(replace(toy_config().visual_tokenizer, keep="rate:0.25"))
    patches = torch.randn(2, 16, DIM)
    centred = patches - patches.mean(1, keepdim=True)
    for picture, keep in zip(centred, tokenizer.select(patches), strict=True):
        shares = (picture @ picture.T / math.sqrt(DIM)).softmax(-1)
        received = shares.sum(0)
        assert set(keep.nonzero()[:, 0].tolist()) == set(received.topk(4).indices.tolist())


def test_registers_are_prefixes_and_as_many_as_are_enough() -> None:
    config = replace(toy_config().visual_tokenizer, rival={"_class_name": "Registers"})
    tokenizer, patches = Registers(config, slack=0.0), torch.randn(6, 16, DIM)
    loud(tokenizer)
    keep = tokenizer.select(patches)
    counts = keep.sum(1).tolist()
    assert set(counts) <= {1, 2, 4, 8, 16} and len(set(counts)) > 1
    for picture, count in zip(patches.split(1), counts, strict=True):

        def far(first: int, picture: Tensor = picture) -> float:
            prefix = (torch.arange(16) < first)[None]
            found = tokenizer.reconstruct(picture, prefix, quantise=False)
            return float(cosine_distance(found, picture).detach())

        enough = far(16)
        assert far(count) <= enough + 1e-5
        assert all(far(fewer) > enough - 1e-5 for fewer in (1, 2, 4, 8) if fewer < count)
    assert torch.equal(keep, torch.arange(16) < keep.sum(1, keepdim=True))
    assert tokenizer.select(patches, KeepPolicy("top_k", 3)).nonzero()[:3, 1].tolist() == [0, 1, 2]
    # early rows do not change when the tail is dropped, and training drops it anywhere
    rows = tokenizer.merger(patches, keep)
    whole = tokenizer.merger(patches, torch.ones_like(keep))
    torch.testing.assert_close(rows, whole.unflatten(0, (6, 16))[keep])
    tokenizer.train()
    how = {"quantise": False, "dense": False, "train_selector": False}
    lengths = (tokenizer(patches, None, **how).mask > 0.5).sum(1)
    assert len(lengths.unique()) > 2


# --- VQGAN


def vqgan() -> Vqgan:
    config = replace(
        toy_config().visual_tokenizer, dim=3 * 8**2, patches=16, heads=1, keep="all", codes=16
    )
    torch.manual_seed(0)
    return Vqgan(config, width=8)


def test_losses_of_vqgan_are_their_formulae() -> None:
    true, made = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.5, 3.0])
    expected = (sum((0.0, 0.5, 2.0)) / 3 + sum((0.0, 1.5, 4.0)) / 3) / 2
    assert float(discriminator_loss(true, made)) == pytest.approx(expected)
    assert float(generator_loss(made)) == pytest.approx(-0.5)
    last = torch.tensor([3.0, 4.0], requires_grad=True)
    weight = adaptive_weight((2 * last).sum(), (last**2).sum() / 2, last)
    assert float(weight) == pytest.approx(0.8 * math.sqrt(8) / (5 + 1e-4), rel=1e-5)


def test_each_loss_of_the_pair_moves_its_own_side() -> None:
    judge = patch_discriminator(8)
    picture = torch.randn(1, 3, 32, 32, requires_grad=True)
    still = {name: weight.detach() for name, weight in judge.named_parameters()}
    generator_loss(functional_call(judge, still, (picture,))).backward()
    assert picture.grad is not None and all(p.grad is None for p in judge.parameters())
    # its logits are of patches: one pixel moves few of them
    other = picture.detach().clone()
    other[..., 0, 0] += 10
    logits: Tensor = judge(picture.detach())
    assert logits.shape[1] == 1 and logits.shape[2] > 1


def test_a_picture_of_vqgan_is_its_patches_and_every_patch_a_code() -> None:
    tokenizer = vqgan()
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    patches = tokenizer.unfold(pictures)
    assert torch.equal(tokenizer.fold(patches), pictures)
    tokens = tokenizer.encode(patches)
    assert tokens.lengths.tolist() == [16, 16]
    made = tokenizer.decode(tokens.codes, tokens.lengths)
    torch.testing.assert_close(made, tokenizer.reconstruct(patches, tokens.keep, quantise=True))
    assert tokenizer.encode(patches[1:]).codes.tolist() == tokens.split()[1].tolist()
    with pytest.raises(InputError, match="have 16 codes"):
        tokenizer.decode(tokens.codes[:3], torch.tensor([3]))


# --- what the decoder knows by itself


def test_painters_change_what_they_say(toy_run: Path) -> None:
    painters = {
        name: arm.exam(toy_run).pipe for name, arm in load_study(STUDIES / "prior.py").arms.items()
    }
    codes = [torch.tensor([n, n + 1, n + 2, n + 3]) for n in range(0, 24, 4)]
    how = {"seeds": list(range(6))}
    assert painters["true"].changed(codes, dict(how)) is codes
    assert painters["another"].changed(codes, dict(how))[0] is codes[4]
    moved = painters["permuted"].changed(codes, dict(how))
    assert all(sorted(a.tolist()) == b.tolist() for a, b in zip(moved, codes, strict=True))
    assert any(a.tolist() != b.tolist() for a, b in zip(moved, codes, strict=True))
    blank = painters["none"]
    with torch.no_grad():
        for model in (painters["true"].model, blank.model):
            assert model.pixels is None
    assert blank.changed(codes, how) is codes and how["guidance"] == 0.0

"""Drawing with a memory: what a prompt mentions, that it is laid out as in training, what the decoder is shown."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import lavit
from conftest import NAMES, toy_picture
from lavit.config import InputError
from lavit.data.chat import ChatPicture, ChatText
from lavit.generate.diffusion import PixelsPipeline
from lavit.generate.jobs import writing
from lavit.generate.protocols import protocol_of
from lavit.generate.remember import shown_before
from lavit.model import LaVIT
from lavit.modules.index import Index
from lavit.modules.memory import Memory, words
from lavit.modules.pixels import Pixels
from lavit.presets import folded_pixels, mini
from lavit.sequence import IGNORE, Image, Text, lay_out
from lavit.train.loop import Shard
from lavit.train.run import Run
from lavit.train.stages import NOTHING, OTHER, PixelsStage
from test_memory import SHOWN, config, run  # noqa: F401

TEXTS = ("cat", "cat", "dog face", "red heart", "box of letters", "man and woman and boy", "beer mug")


def memory(codes: list[list[int]] | None = None) -> Memory:
    """A memory of one picture a text, two of a cat; its descriptions do not matter here."""
    generator = torch.Generator().manual_seed(0)
    described = torch.randn(len(TEXTS), 6, generator=generator)
    return Memory.of(described, TEXTS, torch.zeros(0, 6), codes or [[n, n + 1] for n in range(len(TEXTS))])


def test_an_index_is_the_cosine_of_rare_tokens() -> None:
    bags = [["a", "b", "b"], ["a", "c"], ["a"], ["d", "e", "e", "e"]]
    index, asked = Index(bags), ["b", "c", "c", "unknown"]
    weight = {token: np.log1p(4 / sum(token in bag for bag in bags)) for token in "abcde"}

    def vector(bag: list[str]) -> np.ndarray:
        return np.array([bag.count(token) * weight[token] for token in "abcde"])

    def cosine(bag: list[str]) -> float:
        one, other = vector(bag), vector(asked)
        return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))

    np.testing.assert_allclose(index.alike(asked), [cosine(bag) for bag in bags], atol=1e-6)
    share = weight["c"] ** 2 / (weight["a"] ** 2 + weight["c"] ** 2)
    np.testing.assert_allclose(index.covered(["c", "x"]), [0, share, 0, 0], atol=1e-6)
    assert index.alike(["unknown"]).tolist() == [0] * 4 and index.alike([]).tolist() == [0] * 4
    assert Index([]).alike(["a"]).shape == (0,) and Index([[]]).alike(["a"]).tolist() == [0]


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("a Cat", ["cat", "cat"]),  # then its other picture
        ("a cat and a dog", ["cat", "dog face"]),
        ("the heart of a cat", ["cat", "red heart"]),  # half of a text is enough beside another
        ("beer for the man", ["beer mug"]),  # "man and woman and boy" is hardly mentioned
        ("letters", ["box of letters"]),
        ("letters of the sea", ["box of letters"]),  # half of it is the best there is
        ("nothing of the kind", []),  # "of" is no mention
    ],
)
def test_what_a_prompt_mentions(prompt: str, texts: list[str]) -> None:
    found = memory()
    assert [found.text_of(number) for number in found.mentioned(prompt, 2)] == texts


def test_what_is_hidden_or_has_no_codes_is_not_shown() -> None:
    shy = memory([[1], [], [3], [4], [5], [6], [7]])
    assert shy.mentioned("cat", 3) == [0] and shy.mentioned("cat", 3, without=[0]) == []
    assert memory().mentioned("cat", 3, without=[0]) == [1]
    assert memory().mentioned("cat", 1) == [0]
    assert words("It's a Cat, a cat!") == ["s", "cat", "cat 2"]
    families = ["family of man and boy", "family of man and man and boy", "family of man and boy and boy"]
    many = Memory.of(torch.randn(3, 6), families, torch.zeros(0, 6), [[1], [2], [3]])
    assert [many.text_of(many.mentioned(text, 1)[0]) for text in families] == families
    asked = Memory.of(torch.randn(2, 6), ["axe", "call me hand"], torch.zeros(0, 6), [[1], [2]])
    assert asked.mentioned("Could you draw an axe for me, please?", 2) == [0]  # who asks says nothing of what it is


def test_an_edit_is_shown_the_other_hand_then_what_its_words_make_of_it() -> None:
    texts = ["man running", "man running", "woman running", "woman running", "running shoe", "woman"]
    described = torch.tensor([[side, number // 2 * 0.1] for number, side in enumerate((0.0, 1.0) * 3)])
    found = Memory.of(described, texts, torch.zeros(0, 2), [[number] for number in range(6)])
    low, high = (float(manner) for manner in found.manners[:2])
    assert found.changed("man running", low, "as a woman", 3, without=[0]) == [1, 2]  # the other hand, then in its own
    assert found.changed("man running", high, "as a woman", 2, without=[1]) == [0, 3]
    assert found.changed("man running", low, "as a woman", 2, without=[0, 1, 2]) == [3]
    assert found.changed("man running", low, "in blue", 1) == [1]
    assert found.changed("cow", low, "as a bull", 3) == []


def test_the_likest_picture_shares_rare_codes() -> None:
    found = memory([[1, 1, 2], [1, 3], [1, 4], [1, 5], [1, 6], [1, 7], [1, 8]])
    assert [found.likest(codes) for codes in ([1, 4], [8, 1, 9], [3, 3])] == [2, 6, 1]
    assert found.likest([1, 4], without=[2]) != 2
    with pytest.raises(InputError, match="no picture that could be shown"):
        found.emptied().likest([1])


def test_copies_of_pictures_are_exact_and_codes_stay() -> None:
    found, pictures = memory(), [toy_picture(name, 16) for name in NAMES[: len(TEXTS)]]
    with pytest.raises(InputError, match="keeps no copies"):
        found.picture(0)
    found.keep_pictures(pictures)
    found.keep_pictures(pictures)  # takes the place of the others
    again = Memory(found.texts, dict(found.state_dict()))
    for number, picture in enumerate(pictures):
        assert again.picture(number).tobytes() == picture.tobytes()
        assert again.codes_of(number) == (number, number + 1)
    with pytest.raises(InputError, match="2 pictures for a memory of 7"):
        found.keep_pictures(pictures[:2])


def test_a_prompt_is_laid_out_behind_what_is_shown_as_training_did(run: Run) -> None:  # noqa: F811
    model = LaVIT.from_pretrained(run.folder)
    documents = run._language_stage(model.language, model.text).documents
    rng = np.random.default_rng(0)
    hidden = 0
    for number, name in enumerate(NAMES):
        (job,) = writing(
            model, protocol_of("default", 16), [[ChatText(name)]],
            out="image", n=1, seed=0, sampling=None, picture=None, guidance=None,
        )  # fmt: skip
        for _ in range(6):
            segments = tuple(documents._shown(name, number, rng))
            own = any(segment.index == -1 and segment.codes == documents.codes[number] for segment in segments[::2])
            sequence = lay_out((*segments, Image((1,), read=False)), model.language.vocabulary)
            ids = model.text(name, add_special_tokens=False)["input_ids"]
            if own:
                assert [*sequence.ids[:-3], *ids] == list(job.request.ids)
            hidden += not own
            assert 2 <= len(segments) <= 2 * SHOWN and not any(segment.target for segment in segments)
            assert all(label == IGNORE for label in sequence.labels[: -len(segments[-1].ids) - 3])
    assert 12 < hidden < 36  # about half


def test_an_edit_is_laid_out_behind_what_is_shown_as_training_did(run: Run) -> None:  # noqa: F811
    model = LaVIT.from_pretrained(run.folder)
    documents = run._language_stage(model.language, model.text).documents
    source, target = NAMES.index("red bar"), NAMES.index("blue bar")
    (job,) = writing(
        model, protocol_of("default", 16), [[ChatPicture(toy_picture("red bar"), read=False), ChatText("in blue")]],
        out="image", n=1, seed=0, sampling=None, picture=None, guidance=None,
    )  # fmt: skip
    laid = set()
    for seed in range(20):
        shown = tuple(documents._shown("in blue", target, np.random.default_rng(seed), source=source))
        own = [segment.codes == documents.codes[source] for segment in shown[::2]]
        assert not any(own)  # nobody is shown what they gave
        edit = (*shown, Image(documents.codes[source], read=False), Text(documents.ids("in blue")))
        laid.add(lay_out(edit, model.language.vocabulary).ids[:-1])
    assert len(laid) == 2 and job.request.ids in laid  # with the picture that is wanted, and without
    (best,) = model.memory.changed("red bar", 0.0, "in blue", 1, without=[documents.places[source]])
    assert model.memory.codes_of(best) == documents.codes[target]
    apart = [ChatPicture(toy_picture(name), read=False) for name in NAMES[:2]]
    assert shown_before(model, apart) == []  # two pictures: nothing to go by


def test_a_picture_that_is_remembered_can_be_drawn_from(run: Run) -> None:  # noqa: F811
    lv = lavit.load(run.folder)
    before = len(lv.model.memory)
    lv.remember(toy_picture("red bar").rotate(90), "pole")
    found = lv.model.memory.mentioned("a pole", 2)
    assert found[0] == before == len(lv.model.memory) - 1 and lv.model.memory.picture(before).size == (16, 16)
    assert lv.model.memory.codes_of(before) == tuple(lv.tokenize(toy_picture("red bar").rotate(90)).codes.tolist())
    (picture,) = lv.draw("a pole")
    assert picture.size == (16, 16) and lv.draw("a pole")[0].tobytes() == picture.tobytes()
    copy = lv.model.shown([torch.tensor(lv.model.memory.codes_of(before))])
    assert copy.shape == (1, 3, 16, 16) and -1 <= float(copy.min()) < float(copy.max()) <= 1


def decoder() -> Pixels:
    torch.manual_seed(0)
    pixels = Pixels.build(config().pixels)
    torch.nn.init.normal_(pixels.unet.conv_out.weight, std=0.2)
    return pixels.eval()


def test_a_decoder_listens_to_what_it_is_shown() -> None:
    pixels, features = decoder(), torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1))
    shown = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    together = pixels.sample(features, shown, seeds=[0, 1], steps=2)
    alone = pixels.sample(features[1:], shown[1:], seeds=[1], steps=2)
    torch.testing.assert_close(together[1:], alone, atol=2e-4, rtol=0)
    nothing = pixels.sample(features, seeds=[0, 1], steps=2)
    assert not together.allclose(nothing, atol=1e-3)
    assert nothing.equal(pixels.sample(features, torch.zeros_like(shown), seeds=[0, 1], steps=2))
    assert pixels.sample(features, shown, seeds=[0, 1], steps=1, size=(24, 16)).shape == (2, 3, 24, 16)
    pipe = PixelsPipeline.of(pixels)
    theirs = pipe(features, shown, seeds=[0, 1], num_inference_steps=2, output_type="pt").images
    torch.testing.assert_close(theirs, together / 2 + 0.5, atol=1e-5, rtol=0)
    with torch.no_grad():  # the last channel decides between the picture shown and what the network would paint
        pixels.unet.conv_out.weight[-1], pixels.unet.conv_out.bias[-1] = 0.0, 50.0
        assert pixels.sample(features, shown, seeds=[0, 1], steps=3, guidance=1.0).allclose(shown, atol=1e-5)
        pixels.unet.conv_out.bias[-1] = -50.0
        assert not pixels.sample(features, shown, seeds=[0, 1], steps=3, guidance=1.0).allclose(shown, atol=0.1)


def test_a_decoder_that_could_be_shown_nothing_is_refused() -> None:
    small = config().pixels
    with pytest.raises(InputError, match="latents have 12 and the map 20"):
        Pixels.build(replace(small, unet=small.unet | {"in_channels": 20}))
    with pytest.raises(InputError, match="gives 12 channels, expected 13"):
        Pixels.build(replace(small, unet=small.unet | {"out_channels": 12}))
    for wrong in ({"scheduler": {}}, {"condition": "cross"}):
        with pytest.raises(InputError, match='beside a "grid" condition, to a denoiser that answers the "sample"'):
            Pixels.build(replace(small, **wrong))
    with pytest.raises(InputError, match=r"language\.recall is 1 or more"):
        replace(config(), language=replace(config().language, recall=0, shown=0))
    with pytest.raises(InputError, match="shown is 2 with recall=0"):
        replace(config().language, recall=0)
    assert folded_pixels(mini().model.vision, channels=(64, 128), shown=True) == mini().model.pixels


def pixels_stage(run: Run, code_noise: float = 0.0) -> PixelsStage:  # noqa: F811
    shown = torch.tensor([[number, (number + 1) % len(NAMES)] for number in range(len(NAMES))])
    training = replace(run.training.pixels, code_noise=code_noise, batch=100)
    tokenizer = LaVIT.from_pretrained(run.folder).tokenizer
    return PixelsStage(decoder(), tokenizer, run.pictures, run.tokens, training, seed=0, shown=shown)


def test_training_shows_itself_another_or_nothing(run: Run) -> None:  # noqa: F811
    stage = pixels_stage(run)
    batch = stage.batch(0, Shard(0, 1))
    given = stage._remembered(batch, 0)

    def of(rows: Tensor) -> float:
        return float((given == stage.pictures[rows]).flatten(1).all(1).float().mean())

    nothing = float((given == 0).flatten(1).all(1).float().mean())
    own, other = of(batch.rows), of((batch.rows + 1) % len(NAMES))
    assert abs(nothing - NOTHING) < 0.1 and abs(other - OTHER) < 0.15 and abs(own + other + nothing - 1) < 1e-6
    halves = [stage._remembered(stage.batch(0, Shard(rank, 2)), 0) for rank in (0, 1)]
    assert torch.cat(halves).sort(0).values.equal(given.sort(0).values)  # whatever the number of ranks


def test_noise_on_codes_is_of_its_share_and_of_other_pictures(run: Run) -> None:  # noqa: F811
    stage = pixels_stage(run, code_noise=0.5)
    used = {code for codes in stage.codes for code in codes.tolist()}
    changed = []
    for place in range(200):
        row = torch.tensor(place % len(NAMES))
        codes = stage._erring(torch.tensor(place), row, 0)
        assert codes.equal(stage._erring(torch.tensor(place), row, 0)) and set(codes.tolist()) <= used
        changed.append(float((codes != stage.codes[int(row)]).float().mean()))
    assert 0.05 < np.mean(changed) < 0.25  # a quarter is drawn anew, and may be the same code
    assert pixels_stage(run)._erring(torch.tensor(0), torch.tensor(3), 0).equal(stage.codes[3])

"""Documents, packing and joint ids: inverses, and the checks that stop where streams meet."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lavit.config import InputError
from lavit.sequence import (
    IGNORE,
    Image,
    Text,
    attention_mask,
    fill_slots,
    lay_out,
    pack,
    slot_lengths,
    supervise_some,
    unpack,
)
from lavit.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text_size=100, codes=20, end=9)
READING = (Image((3, 4, 5), read=True, index=7), Text((1, 2, 9)))
WRITING = (Text((1, 2)), Image((6, 7), read=False))


def test_codes_and_ids_are_inverses() -> None:
    codes = torch.arange(VOCABULARY.codes)
    assert VOCABULARY.codes_of(VOCABULARY.ids(codes)).equal(codes)
    assert VOCABULARY.is_code(VOCABULARY.ids(codes)).all()
    with pytest.raises(InputError, match="not codes"):
        VOCABULARY.codes_of(torch.tensor([VOCABULARY.image_end]))


def test_a_share_of_the_codes_that_are_read_is_supervised() -> None:
    rng = np.random.default_rng(0)
    long = lay_out(
        (Image((3,) * 1000, read=True), Text((1, 2)), Image((6,) * 50, read=False)), VOCABULARY
    )
    assert (
        supervise_some(long, 1.0, rng) is long and rng.random() == np.random.default_rng(0).random()
    )
    some = supervise_some(long, 0.1, rng)
    inside, outside = slice(0, 1000), slice(1000, None)
    assert some.labels[outside] == long.labels[outside]
    assert 60 < sum(label != IGNORE for label in some.labels[inside]) < 140
    assert (some.ids, some.slots, some.images) == (long.ids, long.slots, long.images)
    assert {IGNORE, long.labels[0]} == set(some.labels[inside])
    assert supervise_some(lay_out(READING, VOCABULARY), 0.0, rng).labels == (IGNORE,) * 3 + (
        101,
        1,
        2,
        9,
        IGNORE,
    )


def test_reading_lays_out_start_slots_end_text_end() -> None:
    s = lay_out(READING, VOCABULARY)
    start, end, code = 100, 101, 102
    assert s.ids == (start, code + 3, code + 4, code + 5, end, 1, 2, 9)
    assert s.slots == (False, True, True, True, False, False, False, False)
    assert s.labels == (code + 3, code + 4, code + 5, end, 1, 2, 9, IGNORE)
    assert s.images == (7,)


def test_writing_ends_with_image_end() -> None:
    s = lay_out(WRITING, VOCABULARY)
    assert s.ids == (1, 2, 100, 108, 109, 101)
    assert s.labels == (2, 100, 108, 109, 101, IGNORE)


def test_unsupervised_images_and_prompts_give_no_loss() -> None:
    quiet = lay_out(READING, VOCABULARY, supervise_read_images=False)
    assert quiet.labels == (IGNORE, IGNORE, IGNORE, IGNORE, 1, 2, 9, IGNORE)
    edit = (
        Image((3,), read=False, target=False),
        Text((1,), target=False),
        Image((4,), read=False),
    )
    assert lay_out(edit, VOCABULARY).labels == (IGNORE, IGNORE, IGNORE, 100, 106, 101, IGNORE)


def test_unpack_inverts_pack() -> None:
    documents = [lay_out(d, VOCABULARY) for d in (READING, WRITING, (Text((5,)),), READING)]
    rows = [[documents[i] for i in row] for row in ((0, 1), (2, 3))]
    batch = pack(rows, VOCABULARY, tokens=16)
    assert unpack(batch, VOCABULARY) == rows
    assert batch.images.tolist() == [7, 7]
    assert slot_lengths(batch.slots) == [len(READING[0].codes)] * 2


def test_attention_stays_inside_documents() -> None:
    mask = attention_mask(torch.tensor([[0, 0, 1, -1]]))[0, 0].int().tolist()
    assert mask == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_slots_and_features_that_disagree_raise_with_both_counts() -> None:
    slots = torch.tensor([[False, True, True]])
    with pytest.raises(InputError, match=r"2 image slots but 3 image features"):
        fill_slots(torch.zeros(1, 3, 4), slots, torch.ones(3, 4))
    filled = fill_slots(torch.zeros(1, 3, 4), slots, torch.ones(2, 4))
    assert filled[0, :, 0].tolist() == [0, 1, 1]


def test_a_batch_without_targets_stops() -> None:
    document = lay_out((Text((1, 2), target=False), Text((3,), target=False)), VOCABULARY)
    with pytest.raises(InputError, match="every label"):
        pack([[document]], VOCABULARY)

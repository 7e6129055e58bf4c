"""Documents: mixtures by weight, texts cut into rows, full rows, batches by the step."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import toy_picture, toy_training
from lavit.config import InputError, Mixture
from lavit.data.corpus import Corpus, Picture, load_corpus, parse_mixture
from lavit.data.documents import Documents
from lavit.data.sources import Record, texts_of
from lavit.data.text import TextPieces, Texts, cut
from lavit.layout import answer_text, question_text
from lavit.sequence import Image, Text, exact_choice, fill_from_front, lay_out, unpack
from lavit.train.language import train_text_tokenizer
from lavit.vocabulary import Vocabulary

PROSE = "The tokenizer keeps the patches that matter. "
# length -> count, of 2,000 documents (captions, prompts, questions, edits) under a trained nano
LENGTHS = Path(__file__).parent / "data" / "document_lengths.json"


def documents_of(corpus: Corpus, **changes) -> Documents:
    config = replace(toy_training().language, **changes)
    text = train_text_tokenizer(corpus, 300)
    vocabulary = Vocabulary(text_size=len(text), codes=32, end=text.eos_token_id)
    codes = tuple(tuple(range(1 + n % 5)) for n in range(len(corpus)))
    return Documents(corpus, codes, text=text, vocabulary=vocabulary, config=config, seed=0)


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """A second source of pictures: two with a caption, one without that is asked about."""
    folder = tmp_path / "shapes"
    (folder / "train").mkdir(parents=True)
    rows = []
    for name, text in (("blue bar", "a bar."), ("red dot", "a dot."), ("green bar", "")):
        toy_picture(name).save(folder / "train" / f"{name}.png")
        rows.append({"file_name": f"{name}.png", "text": text})
    (folder / "train" / "metadata.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    asked = {"image": "train/green bar.png", "question": "is it green?", "answer": "yes"}
    (folder / "questions.jsonl").write_text(json.dumps(asked) + "\n")
    return folder


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    path = tmp_path / "prose.jsonl"
    path.write_text(
        "".join(json.dumps({"text": PROSE * n, "path": "a/b.py"}) + "\n" for n in (1, 40))
    )
    return path


def test_a_mixture_is_one_string(toy_data: Path, tmp_path: Path) -> None:
    assert parse_mixture("a,b:0.5, hub/name:2") == [("a", 1.0), ("b", 0.5), ("hub/name", 2.0)]
    strange = tmp_path / "a,b:2"
    strange.mkdir()
    assert parse_mixture(str(strange)) == [(str(strange), 1.0)]
    assert parse_mixture("C:/pictures") == [("C:/pictures", 1.0)]
    for bad in ("a:0", "a:-1", "a,", "a:nan"):
        with pytest.raises(InputError, match="positive weight"):
            parse_mixture(bad)


def test_sources_join_with_their_questions(toy_data: Path, shapes: Path, prose: Path) -> None:
    corpus = load_corpus(f"{toy_data},{shapes}:0.5,{prose}:0.2")
    assert [part.weight for part in corpus.parts] == [1.0, 0.5, 0.2]
    assert [len(part.pictures) for part in corpus.parts] == [8, 3, 0]
    (question,) = corpus.questions
    assert corpus.pictures[question.picture].record.name.endswith("green bar.png")
    assert list(corpus.parts[1].questions) == [0] and len(corpus.parts[2].texts) == 2
    with pytest.raises(InputError, match="texts alone"):
        load_corpus(prose)
    with pytest.raises(InputError, match="no split 'unseen'"):
        load_corpus(f"{toy_data},{prose}", ("unseen",))


def test_documents_come_by_the_weights_and_of_the_kinds_a_source_has(
    toy_data: Path, shapes: Path, prose: Path
) -> None:
    corpus = load_corpus(f"{toy_data},{shapes}:0.5,{prose}:0.5")
    documents = documents_of(
        corpus,
        mixture=Mixture(reading=1.0, writing=1.0, question=1.0, edit=1.0),
        unconditional_fraction=0.0,
    )
    rng = np.random.default_rng(0)
    counts: Counter[str] = Counter()
    for _ in range(4000):
        drawn = documents.draw(rng)
        images = [segment for segment in drawn if isinstance(segment, Image)]
        counts["prose"] += not images
        counts["question"] += len(drawn) == 3 and images[0].read
    assert counts["prose"] / 4000 == pytest.approx(0.25, abs=0.02)
    # the toy data has no questions
    assert counts["question"] / 4000 == pytest.approx(0.25 / 3, abs=0.02)
    only = documents_of(corpus, mixture=Mixture(reading=1.0))
    captions = {
        only.tokenizer.decode(document[1].ids[:-1])
        for _ in range(300)
        if len(document := only.draw(rng)) == 2
    }
    assert {"a bar.", "red square."} <= captions and "" not in captions


def test_a_picture_is_asked_several_questions_at_once(toy_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "asked"
    shutil.copytree(toy_data, folder)
    asked = [
        ("what is it?", "a bar"),
        ("is it green?", "yes"),
        ("is it red?", "no"),
        ("how many?", "one"),
        ("why?", "so"),
    ]
    image = {"split": "train", "image": "train/4.png"}
    lines = [
        json.dumps({**image, "question": question, "answer": answer}) for question, answer in asked
    ]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    documents = documents_of(load_corpus(folder), mixture=Mixture(question=1.0))
    said = {question_text(question): answer_text(answer) for question, answer in asked}
    seen: set[str] = set()
    for seed in range(20):
        drawn = documents.draw(np.random.default_rng(seed))
        sequence = lay_out(drawn, documents.vocabulary)
        ends = [label for label in sequence.labels if label == documents.vocabulary.end]
        assert isinstance(drawn[0], Image) and len(drawn) == 9 and len(ends) == 4
        texts = [
            documents.tokenizer.decode(part.ids, skip_special_tokens=True) for part in drawn[1:]
        ]
        assert len(set(texts[::2])) == 4 and all(
            said[q] == a for q, a in zip(texts[::2], texts[1::2], strict=True)
        )
        targets = [
            label for label in sequence.labels if label >= 0 and label != documents.vocabulary.end
        ]
        assert documents.tokenizer.decode(targets) == "".join(texts[1::2])
        seen |= set(texts[::2])
    assert len(seen) == 5


def test_an_edit_shows_all_its_sources_as_codes_before_the_words(shapes_data: Path) -> None:
    corpus = load_corpus(f"{shapes_data},{shapes_data}:0.5")
    assert [len(part.edits) for part in corpus.parts] == [30, 30]
    names = [picture.captions[0].removesuffix(".") for picture in corpus.pictures]
    for edit in corpus.edits:
        if edit.kind == "both":
            assert " and ".join(names[number] for number in edit.sources) == names[edit.target]
        else:
            assert len(edit.sources) == 1 and edit.prompt.split()[-1] in names[edit.target]
    documents = documents_of(corpus, mixture=Mixture(edit=1.0))
    seen: set[int] = set()
    for seed in range(60):
        *sources, words, target, end = documents.draw(np.random.default_rng(seed))
        assert end == Text((documents.vocabulary.end,))
        found = (
            tuple(image.index for image in sources),
            documents.tokenizer.decode(words.ids),
            target.index,
        )
        assert found in {(edit.sources, edit.prompt, edit.target) for edit in corpus.edits}
        assert not words.target and target.target and not target.read
        for image in sources:
            assert (image.codes, image.read, image.target) == (
                documents.codes[image.index],
                False,
                False,
            )
        seen.add(len(sources))
    assert seen == {1, 2}


def test_prompts_of_a_source_take_the_place_of_its_captions(
    shapes_data: Path, toy_data: Path
) -> None:
    corpus = load_corpus(f"{shapes_data},{toy_data}")
    assert all(
        p.prompts == (p.captions[0][:-1], f"draw {p.captions[0][:-1]}")
        for p in corpus.pictures[:30]
    )
    assert all(p.prompts == (p.captions[0][:-1],) for p in corpus.pictures[30:])


def test_questions_find_their_pictures_however_they_are_spelled(
    toy_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Through links, as the hub's cache has them; what names no picture is counted."""
    data, name = tmp_path / "linked", sorted((toy_data / "train").glob("*.png"))[0].name
    (data / "train").mkdir(parents=True)
    for path in (toy_data / "train").iterdir():
        (data / "train" / path.name).symlink_to(path.resolve())
    names = (f"./train/{name}", "train/no.png")
    lines = [{"image": one, "question": "what?", "answer": "a"} for one in names]
    (data / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with caplog.at_level("INFO"):
        corpus = load_corpus(data)
    assert [question.answer for question in corpus.questions] == ["a"]
    assert "1 of 2 lines" in caplog.text and "questions.jsonl name pictures" in caplog.text


def test_a_seed_of_scenes_is_no_weight() -> None:
    assert parse_mixture("scenes:5") == [("scenes:5", 1.0)]
    assert parse_mixture("scenes:0:2,prose:0.5") == [("scenes:0", 2.0), ("prose", 0.5)]


def test_a_text_that_is_no_text_is_refused() -> None:
    for cell in ({"raw": "a cat"}, [{"raw": "a cat"}], [["a cat"]]):
        with pytest.raises(InputError, match="give a text, or a list of texts"):
            texts_of(cell)


def test_a_conversation_that_cannot_be_laid_out_is_left_out_and_named(
    shapes: Path,
) -> None:
    long, seen = " ".join(["word"] * 60), {"type": "image", "image": "train/red dot.png"}
    asked: list[Any] = [{"type": "text", "text": long}, seen]
    talks = [
        [{"role": "user", "content": what}, {"role": "assistant", "content": "yes"}]
        for what in (asked, "a word?")
    ]
    lines = (json.dumps({"messages": talk}) for talk in talks)
    (shapes / "conversations.jsonl").write_text("\n".join(lines))
    documents = documents_of(load_corpus(shapes, talks=True), mixture=Mixture(conversation=1.0))
    assert len(documents.batch(0).ids) and len(documents.left_out) == 1
    (reason,) = documents.left_out.values()
    assert "picture stands behind" in reason


def test_a_source_that_gives_nothing_is_named(toy_data: Path) -> None:
    with pytest.raises(InputError, match="gives no document"):
        documents_of(load_corpus(toy_data), mixture=Mixture(question=1.0))


def test_a_text_ends_with_the_end_token_once_and_its_pieces_join_to_it() -> None:
    vocabulary = Vocabulary(text_size=100, codes=4, end=99)
    for length in (0, 1, 7, 8, 9, 15, 16, 17, 40):
        ids = tuple(range(length))
        pieces = [lay_out((piece,), vocabulary) for piece in cut(ids, 8, 99)]
        assert sum((piece.ids for piece in pieces), ()) == (*ids, 99)
        assert all(len(piece) <= 8 for piece in pieces) and all(
            len(piece) >= 7 for piece in pieces[:-1]
        )


def test_every_piece_of_a_source_comes_about_equally_often(prose: Path) -> None:
    texts = Texts([PROSE, PROSE * 40, ""], column=None, name="prose")
    tokenizer = documents_of(
        Corpus((Picture(Record("a.png", (PROSE,), "a.png"), (PROSE,), (PROSE,)),))
    ).tokenizer
    pieces = TextPieces(texts, tokenizer, 64, 9)
    rng = np.random.default_rng(0)
    counts = Counter(pieces.draw(rng) for _ in range(4000))
    long = [counts[piece] for piece in cut(tokenizer((PROSE * 40).strip())["input_ids"], 64, 9)]
    assert max(long) < 1.3 * np.mean(long) and sum(long) / 4000 == pytest.approx(40 / 41, abs=0.02)
    with pytest.raises(InputError, match="no text in it"):
        TextPieces(Texts(["", " "], column=None, name="nothing"), tokenizer, 64, 9)


def test_text_files_are_texts(toy_data: Path, tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    for name in ("a", "b"):
        (tmp_path / "books" / f"{name}.txt").write_text(f"{name} {PROSE}\n")
    corpus = load_corpus(f"{toy_data},{tmp_path / 'books'}")
    assert list(corpus.parts[1].texts) == [f"a {PROSE}".strip(), f"b {PROSE}".strip()]


def test_the_best_choice_of_a_few_is_exact() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths, room = rng.integers(1, 30, 9).tolist(), int(rng.integers(1, 90))
        sums = [sum(v for i, v in enumerate(lengths) if mask >> i & 1) for mask in range(2**9)]
        chosen = exact_choice(lengths, room)
        assert len(set(chosen)) == len(chosen)
        assert sum(lengths[i] for i in chosen) == max(total for total in sums if total <= room)


def test_rows_are_full_and_take_the_documents_as_they_come() -> None:
    table = json.loads(LENGTHS.read_text())
    lengths = np.repeat([int(length) for length in table], list(table.values()))
    lengths = np.random.default_rng(0).permutation(lengths).tolist()
    rows = fill_from_front(lengths, 64, 512)  # what two rows a step share
    placed = sorted(number for row in rows for number in row)
    assert placed == list(range(len(placed)))  # none is passed over for its length
    filled = [sum(lengths[number] for number in row) for row in rows]
    assert max(filled) <= 512 and sum(filled) / (64 * 512) >= 0.98
    means = [np.mean([lengths[number] for number in row]) for row in rows]
    assert np.std(means) < 0.5 * np.std(lengths)  # and one row is like another


@pytest.mark.usefixtures("whole_windows")
def test_two_rows_a_step_are_full_functions_of_the_step(toy_data: Path, prose: Path) -> None:
    corpus = load_corpus(f"{toy_data},{prose}:0.3")
    first, second = (documents_of(corpus, rows=2, tokens=128) for _ in range(2))
    useful = [first.batch(step).useful for step in range(40)]
    assert np.mean(useful) >= 0.98
    for step in (39, 3, 32):
        assert first.batch(step).ids.equal(second.batch(step).ids)
    assert not first.batch(3).ids.equal(first.batch(4).ids)
    rows = unpack(first.batch(3), first.vocabulary)
    assert len(rows) == 2 and all(rows)


def test_a_document_longer_than_a_row_is_left_out_and_named(
    toy_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(toy_data, tmp_path / "long")
    path = tmp_path / "long" / "train" / "metadata.jsonl"
    path.write_text(path.read_text().replace("red bar.", "red bar " * 80))
    corpus = load_corpus(tmp_path / "long")
    documents = documents_of(corpus, mixture=Mixture(reading=1.0, writing=1.0, text=0.25))
    said = ""
    for row in unpack(documents.batch(0), documents.vocabulary):
        for one in row:
            said += documents.tokenizer.decode([id for id in one.ids if id < 300])
    assert "blue dot" in said and "red bar" not in said
    text, name = sorted(documents.left_out, reverse=True)
    assert name.endswith("3.png") and text.startswith("a text, 'red bar")
    assert len(caplog.messages) == 2
    assert "more than a row of 96: use longer rows (1 so far)" in caplog.messages[0]
    with pytest.raises(
        InputError, match=r"next to no document fits: .* a row of 2: use longer rows"
    ):
        documents_of(corpus, tokens=2, unconditional_fraction=0.0).batch(0)

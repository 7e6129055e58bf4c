"""Conversations: targets, what enters how, what is left out and named, epochs, each once."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from conftest import NAMES, toy_picture, toy_training
from lavit.config import InputError
from lavit.data.conversation_documents import ConversationDocuments
from lavit.data.conversation_forms import holds_conversations
from lavit.data.conversations import load_conversations
from lavit.data.corpus import load_corpus
from lavit.sequence import IGNORE, unpack
from lavit.train.language import train_text_tokenizer
from lavit.vocabulary import Vocabulary

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CODES = tuple(tuple(range(n % 3 + 2)) for n in range(len(NAMES)))


def shown(name: str) -> dict:
    return {"type": "image", "image": f"{name}.png"}


def said(text: str) -> dict:
    return {"type": "text", "text": text}


def write(folder: Path, conversations: list) -> Path:
    """A file of conversations with pictures of all toy names beside it."""
    for name in NAMES:
        toy_picture(name).save(folder / f"{name}.png")
    path = folder / "conversations.jsonl"
    path.write_text(
        "".join(json.dumps({"messages": messages}) + "\n" for messages in conversations)
    )
    return path


def read(name: str) -> list[dict]:
    """A picture of the user's, words of the assistant's."""
    return [
        {"role": "user", "content": [shown(name), said("what is it?")]},
        {"role": "assistant", "content": name},
    ]


def drawn(name: str) -> list[dict]:
    """Words of the user's, a picture of the assistant's."""
    return [
        {"role": "user", "content": f"draw {name}"},
        {"role": "assistant", "content": [shown(name)]},
    ]


@pytest.fixture
def text(toy_data: Path) -> PreTrainedTokenizerBase:
    return train_text_tokenizer(load_corpus(toy_data), 300)


def documents_of(path: Path, text: PreTrainedTokenizerBase, **changes) -> ConversationDocuments:
    config = replace(toy_training().language, **changes)
    vocabulary = Vocabulary(text_size=len(text), codes=32, end=text.eos_token_id)
    conversations = load_conversations(path)
    codes = CODES[: len(conversations.pictures)]
    return ConversationDocuments(
        conversations, codes, text=text, vocabulary=vocabulary, config=config, seed=0
    )


def targets(documents: ConversationDocuments, number: int) -> str:
    """Text of the targets of one conversation; § for a picture's ids."""
    sequence, vocabulary = documents.sequences[number], documents.vocabulary
    labels = torch.tensor([label for label in sequence.labels if label != IGNORE])
    visual = vocabulary.is_visual(labels).tolist()
    words = (
        [documents.tokenizer.decode([label]) for label in labels.tolist()]
        if not any(visual)
        else None
    )
    if words is not None:
        return "".join(words)
    return "".join(
        "§" if is_visual else documents.tokenizer.decode([label])
        for label, is_visual in zip(labels.tolist(), visual, strict=True)
    )


def test_answers_alone_are_targets_without_a_template(
    tmp_path: Path, text: PreTrainedTokenizerBase
) -> None:
    documents = documents_of(write(tmp_path, [read("red dot"), drawn("blue bar")]), text)
    assert targets(documents, 0) == f" red dot{text.eos_token}"
    assert targets(documents, 1) == "§" * (2 + len(CODES[1])) + text.eos_token  # start, codes, end
    first, second = documents.sequences
    assert sum(first.slots) == len(CODES[0]) and first.images == (0,)
    assert not any(second.slots) and second.images == ()


def test_a_template_is_followed_up_to_its_end_of_turn(
    tmp_path: Path, text: PreTrainedTokenizerBase
) -> None:
    text.chat_template = CHATML
    more = [
        *read("red dot"),
        {"role": "user", "content": "and now?"},
        {"role": "assistant", "content": "still"},
    ]
    documents = documents_of(write(tmp_path, [more, drawn("blue bar")]), text, tokens=400)
    assert targets(documents, 0) == "red dot<|im_end|>\nstill<|im_end|>\n"
    assert targets(documents, 1).strip("§") == "<|im_end|>\n"
    whole = text.decode([i for i in documents.sequences[0].ids if i < len(text)])
    assert whole.startswith("<|im_start|>user\n") and text.eos_token not in whole


def test_what_cannot_be_used_is_left_out_and_named(
    tmp_path: Path, text: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    bad = [
        [{"role": "user", "content": "hello"}],
        read("no such thing"),
        [{"role": "user", "content": "hello"}, {"role": "assistant", "content": [said("")]}],
        [{"role": "user", "content": "x" * 4000}, {"role": "assistant", "content": "long"}],
    ]
    path = write(tmp_path, [read("red dot"), *bad])
    with path.open("a") as file:
        file.write("{broken\n")
    conversations = load_conversations(path)
    assert {name: len(reason) > 0 for name, reason in conversations.broken} == {
        f"conversations.jsonl:{line}": True for line in (2, 3, 4, 6)
    }
    assert (
        "no such thing.png' does not exist" in dict(conversations.broken)["conversations.jsonl:3"]
    )
    counts = conversations.counts()
    assert (counts["conversations"], counts["left out"], counts["pictures"]) == (2, 4, 1)
    text.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    documents = documents_of(path, text, tokens=400)
    reasons = dict(conversations.broken) | dict(documents.broken)
    assert "every label is masked" in reasons["conversations.jsonl:4"]
    assert "more than a row of 400" in reasons["conversations.jsonl:5"]
    assert len(documents.sequences) == 1 and "left out conversations.jsonl:4" in caplog.text


def test_nothing_usable_is_refused(tmp_path: Path, text: PreTrainedTokenizerBase) -> None:
    with pytest.raises(
        InputError, match=r"no conversation that can be used.*no turn of the assistant"
    ):
        load_conversations(write(tmp_path, [[{"role": "user", "content": "hello"}]]))
    silent = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": [said("")]}]
    text.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(InputError, match="every label is masked"):
        documents_of(write(tmp_path, [silent]), text)
    with pytest.raises(InputError, match="not a readable file"):
        load_conversations(tmp_path / "missing.jsonl")


def test_every_epoch_shows_each_conversation_once(
    tmp_path: Path, text: PreTrainedTokenizerBase
) -> None:
    conversations = [read(name) for name in NAMES] + [drawn(name) for name in NAMES]
    path = write(tmp_path, conversations)
    first, second = (documents_of(path, text, rows=3, tokens=96) for _ in range(2))
    rows = [row for step in range(40) for row in unpack(first.batch(step), first.vocabulary)]
    assert all(rows)
    seen = Counter(sequence.ids for row in rows[: first._epochs[4]] for sequence in row)
    assert set(seen.values()) == {4} and len(seen) == len(conversations)
    assert second.batch(17).ids.equal(first.batch(17).ids)
    assert not first.batch(0).ids.equal(first.batch(20).ids)


def test_files_of_conversations_are_told_apart(tmp_path: Path) -> None:
    assert holds_conversations(write(tmp_path, [read("red dot")]))
    (tmp_path / "prose.jsonl").write_text('{"text": "a"}\n')
    assert not holds_conversations(tmp_path / "prose.jsonl") and not holds_conversations(tmp_path)
    for data in (b"", bytes(64), b"PAR1" + bytes(64) + b"PAR1"):
        (tmp_path / "broken.parquet").write_bytes(data)
        with pytest.raises(InputError, match=r"broken\.parquet is not a readable parquet file"):
            holds_conversations(tmp_path / "broken.parquet")


def shared_forms(folder: Path) -> dict[str, Path]:
    """One conversation of two turns about one picture in each form that it is shared in."""
    toy_picture("red dot").save(folder / "a.png")
    texts = ["what is it?", "red dot", "big?", "no"]
    asked = list(zip(["user", "assistant"] * 2, texts, strict=True))

    def turns(mark: str, role: str, content: str, names: dict[str, str]) -> list[dict[str, str]]:
        said = zip(asked, [mark + texts[0], *texts[1:]], strict=True)
        return [{role: names.get(who, who), content: text} for (who, _), text in said]

    spoken = {"user": "human", "assistant": "gpt"}
    picture = {"type": "image", "image": "a.png"}
    parts = [{"role": who, "content": [{"type": "text", "text": text}]} for who, text in asked]
    placed = [{"role": "user", "content": [{"type": "image"}, *parts[0]["content"]]}, *parts[1:]]
    rows = {
        "own.jsonl": {
            "messages": [{"role": "user", "content": [picture, *parts[0]["content"]]}, *parts[1:]]
        },
        "llava.json": {
            "id": "1", "image": "a.png",
            "conversations": turns("<image>\n", "from", "value", spoken),
        },
        "sharegpt.json": {
            "images": ["a.png"], "conversations": turns("<image>", "from", "value", spoken)
        },
        "factory.jsonl": {
            "images": ["a.png"], "messages": turns("<image>", "role", "content", {})
        },
        "trl.parquet": {
            "images": [{"bytes": (folder / "a.png").read_bytes(), "path": None}], "messages": placed
        },
        "completion.jsonl": {
            "image": "a.png", "prompt": turns("", "role", "content", {})[:3],
            "completion": parts[3:],
        },
    }  # fmt: skip
    import pyarrow as pa
    from pyarrow import parquet

    for name, row in rows.items():
        if name.endswith(".parquet"):
            parquet.write_table(pa.Table.from_pylist([row]), folder / name)
        else:
            text = json.dumps([row] if name.endswith(".json") else row)
            (folder / name).write_text(text + "\n")
    return {name: folder / name for name in rows}


def test_every_form_gives_the_same_documents(tmp_path: Path, text: PreTrainedTokenizerBase) -> None:
    found = {name: documents_of(path, text) for name, path in shared_forms(tmp_path).items()}
    own = found.pop("own.jsonl")
    assert len(own.sequences) == 2
    for name, documents in found.items():
        assert holds_conversations(tmp_path / name), name
        for ours, theirs in zip(own.sequences, documents.sequences, strict=True):
            assert ours.ids == theirs.ids and ours.labels == theirs.labels, name


def test_marks_and_pictures_must_agree(tmp_path: Path) -> None:
    toy_picture("red dot").save(tmp_path / "a.png")
    answer = {"from": "gpt", "value": "x"}
    rows = [
        {
            "image": "a.png",
            "conversations": [{"from": "human", "value": "<image><image>?"}, answer],
        },
        {"image": "a.png", "conversations": [{"from": "tool", "value": "?"}, answer]},
        {"image": "b.png", "conversations": [{"from": "human", "value": "<image>?"}, answer]},
        {"image": "a.png", "conversations": [{"from": "human", "value": "?"}, answer]},
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    found = load_conversations(tmp_path / "data.json")
    reasons = [reason for _, reason in found.broken]
    assert [name for name, _ in found.broken] == ["data.json[0]", "data.json[1]", "data.json[2]"]
    assert "1 pictures for 2 marks" in reasons[0] and "from 'tool'" in reasons[1]
    assert "does not exist" in reasons[2]
    below = load_conversations(tmp_path / "data.json", tmp_path)
    assert below == found and found.counts()["pictures"] == 1


ASKED = {"role": "user", "content": "what is it?"}
ANSWER = {"role": "assistant", "content": [said("a bar")]}


def of_pictures(*parts: dict, images: list[str], said: str = "x") -> dict:
    """A row with pictures of its own column, and what its user's message holds."""
    content = [*parts, {"type": "text", "text": said}]
    return {"messages": [{"role": "user", "content": content}, ANSWER], "images": images}


def spoken(value: str, answer: str = "x", **more) -> dict:
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
    return {"conversations": turns, **more}


def seen(*parts, role: str = "user") -> dict:
    """A row with a content of these parts."""
    if role == "user":
        return {"messages": [{"role": "user", "content": [*parts]}, ANSWER]}
    return {"messages": [ASKED, {"role": "assistant", "content": [*parts]}]}


A = {"type": "image", "image": "a.png"}
UNUSABLE = {
    "0 pictures for 1 marks": [
        spoken("<image> what?"), spoken("<image>", image=None), spoken("<image>", images=[]),
        spoken("hi", "<image>"), seen({"type": "image"}),
    ],
    "turn of the assistant is empty": [
        spoken("x", ""), spoken("", ""), spoken("x", " \n"), seen(said(""), role="assistant"),
    ],
    "last message is not": [{"messages": [ASKED, ANSWER, ASKED]}],
    "a turn is from": [{"conversations": [{"from": ["human"], "value": "x"}, ANSWER]}],
    "a part of a message is": [
        seen("hello", {"type": "image"}) | {"images": ["a.png"]},
        seen(None, {"type": "image"}) | {"images": ["a.png"]},
    ],
    "half a character": [spoken("x \ud800"), spoken("x", "\ud800")],
    "picture of no codes": [
        seen({**A, "codes": codes}) for codes in (5, "abc", "12", [], [1.5], [None], [-5])
    ],
    "says keep": [seen({**A, "keep": keep}) for keep in ({"x": 1}, -4, 0.5)],
    "not a path": [seen({**A, "image": 3})],
    "neither a path nor a file": [spoken("<image>", image=3)],
    "leads out of": [
        spoken("<image>", image=f"{up}a.png") for up in ("../", "below/../../", "/etc/")
    ],
    "of 0..1|of 0..0": [
        of_pictures(*({"type": "image", "index": n} for n in numbers), images=images)
        for numbers, images in (
            ([0, 2], ["a.png", "b.png"]), ([0, -1], ["a.png", "b.png"]),
            ([0, 0], ["a.png", "b.png"]), ([[0]], ["a.png"]), (["0"], ["a.png"]),
            ([0.0], ["a.png"]),
        )
    ],
}  # fmt: skip


@pytest.mark.parametrize("why", UNUSABLE)
def test_a_bad_row_leaves_the_others(why: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        toy_picture("red dot").save(tmp_path / f"{name}.png")
    rows = [spoken("hello", "hi"), *UNUSABLE[why], spoken("<image>", image="a.png")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_conversations(tmp_path / "data.jsonl")
    assert [name for name, _ in found.broken] == [
        f"data.jsonl:{line}" for line in range(2, len(rows))
    ]
    for _, reason in found.broken:
        assert re.search(why, reason) and "\n" not in reason, reason
    assert found.counts()["left out"] == len(UNUSABLE[why])


def test_a_picture_stands_where_its_index_says(tmp_path: Path) -> None:
    toy_picture("red dot").save(tmp_path / "zero.png")
    toy_picture("blue bar").save(tmp_path / "one.png")
    marks = [{"type": "image", "index": number} for number in (1, 0, 1)]
    rows = [
        of_pictures(*marks, images=["zero.png", "one.png"]),
        of_pictures({"type": "image"}, {"type": "image"}, images=["zero.png", "one.png"]),
        seen({"type": "image", "path": "one.png"}),  # another name of "image"
    ]
    import pyarrow as pa
    from pyarrow import parquet

    (tmp_path / "data.json").write_text(json.dumps(rows))
    parquet.write_table(pa.Table.from_pylist(rows[:2]), tmp_path / "data.parquet")
    for path, last in (("data.json", [["one.png"]]), ("data.parquet", [])):
        found = load_conversations(tmp_path / path)
        names = [picture.name for picture in found.pictures]
        stood = [
            [names[part["image"]] for part in item.messages[0]["content"] if "image" in part]
            for item in found.items
        ]
        assert stood == [["one.png", "zero.png", "one.png"], ["zero.png", "one.png"], *last]


def test_a_picture_of_the_assistants_may_bring_its_codes(
    tmp_path: Path, text: PreTrainedTokenizerBase
) -> None:
    """They are what is learnt; codes that the model has not leave their conversation out."""
    own, wrong = ([ASKED, {"role": "assistant", "content": [{**shown("red dot"), "codes": codes}]}]
                  for codes in ([7, 7, 9], [99999999]))  # fmt: skip
    documents = documents_of(write(tmp_path, [own, wrong]), text)
    (learnt,) = documents.sequences
    codes = [label - len(text) - 2 for label in learnt.labels if label >= len(text) + 2]
    assert codes == [7, 7, 9]
    ((name, reason),) = documents.broken
    assert name == "conversations.jsonl:2" and "this model's are 0..31" in reason

"""The layout: what is asked begins as what was learnt, for every kind of document."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

import lavit
from conftest import toy_picture
from lavit.conversation import conversation, replies
from lavit.generate.pipeline import Pipeline
from lavit.generate.prompts import lay_prompt
from lavit.layout import Part, asking, drawing, editing, ids_of, mixed, reading, segments
from lavit.sequence import Sequence, lay_out

PICTURES = [toy_picture("red dot"), toy_picture("blue bar")]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def pipeline(toy_run: Path) -> Pipeline:
    return lavit.load(toy_run)


def learnt(pipeline: Pipeline, parts: list[Part]) -> Sequence:
    """A document as training lays it out, whose pictures are numbers of `PICTURES`."""
    model = pipeline.model
    codes = [tuple(pipeline.tokenize(picture).codes.tolist()) for picture in PICTURES]
    vocabulary = model.language.vocabulary
    ids = partial(ids_of, model.text_tokenizer)
    found = segments(parts, ids, lambda part: codes[part.image], vocabulary.end)
    return lay_out(found, vocabulary)


def assert_begins(pipeline: Pipeline, document: list[Part], prompt: list[Part]) -> None:
    """The prompt is the beginning of the document, and what is learnt begins where it ends."""
    whole, begun = learnt(pipeline, document), lay_prompt(pipeline.model, prompt)
    length = len(begun.ids)
    slots = begun.slots or (False,) * length
    assert whole.slots[:length] == slots
    # ids of slots are not looked at
    places = [place for place in range(length) if not slots[place]]
    assert [whole.ids[place] for place in places] == [begun.ids[place] for place in places]
    assert whole.labels[length - 1] == whole.ids[length] and length < len(whole)
    assert whole.labels[-2] == pipeline.model.language.vocabulary.end  # `auto` can stop


@pytest.mark.parametrize(
    ("document", "prompt"),
    [
        (reading(0, "red dot."), reading(PICTURES[0])),
        (asking(0, ("What is it?", "a dot")), asking(PICTURES[0], ("What is it?", None))),
        (drawing("a blue bar", 1), drawing("a blue bar")),
        (drawing("a blue bar", 1), mixed(["a blue bar"], read=False)),
        (editing([0], "as a bar", 1), editing([PICTURES[0]], "as a bar")),
        (editing([0, 1], "both", 1), mixed([*PICTURES, "both"], read=False)),
    ],
    ids=["reading", "asking", "drawing", "drawing as mixed", "editing", "composing as mixed"],
)
def test_a_prompt_is_the_beginning_of_its_document(
    pipeline: Pipeline, document: list[Part], prompt: list[Part]
) -> None:
    assert_begins(pipeline, document, prompt)


def talk(first: object, second: object) -> list[dict[str, object]]:
    """A question about a picture, an edit of it, and a question about the edit."""
    return [
        {
            "role": "user",
            "content": [{"type": "image", "image": first}, {"type": "text", "text": "What is it?"}],
        },
        {"role": "assistant", "content": "a dot"},
        {"role": "user", "content": "draw a blue bar"},
        {"role": "assistant", "content": [{"type": "image", "image": second}]},
        {"role": "user", "content": "is it blue?"},
        {"role": "assistant", "content": "yes"},
    ]


@pytest.mark.parametrize("template", [None, CHATML], ids=["plain", "template"])
def test_a_turn_is_asked_as_it_was_learnt(pipeline: Pipeline, template: str | None) -> None:
    text = pipeline.model.text_tokenizer
    text.chat_template = template
    try:
        *others, drawn, last = replies(talk(0, 1), text)
        documents = (others[0] if others else last, drawn, last)
        for document, upto, reply in zip(
            documents, (1, 3, 5), ("text", "image", "text"), strict=True
        ):
            prompt = conversation(talk(*PICTURES)[:upto], text, reply=reply)
            if template is None:
                assert_begins(pipeline, document, prompt)
            else:
                begun = lay_prompt(pipeline.model, prompt).ids
                whole = learnt(pipeline, document)
                assert len(begun) < len(whole) and whole.labels[len(begun) - 1] >= 0
    finally:
        text.chat_template = None


def test_a_conversation_of_one_turn_is_the_document_of_its_kind(pipeline: Pipeline) -> None:
    text = pipeline.model.text_tokenizer
    (asked,) = replies(talk(0, 1)[:2], text)
    assert learnt(pipeline, asked).ids == learnt(pipeline, asking(0, ("What is it?", "a dot"))).ids
    (drawn,) = replies(talk(0, 1)[2:4], text)
    drawing_of = learnt(pipeline, drawing("draw a blue bar", 1))
    assert learnt(pipeline, drawn).ids == drawing_of.ids

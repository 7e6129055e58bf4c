"""What people call, on a toy run: every verb, one or many inputs, alone as in a batch."""

from __future__ import annotations

import importlib
import inspect
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lavit
from conftest import NAMES, toy_picture
from lavit.config import InputError
from lavit.generate import protocols
from lavit.generate.packed import PackedDecoder
from lavit.generate.pipeline import Pipeline
from lavit.generate.prompts import lay_prompt
from lavit.generate.request import Request
from lavit.generate.runner import APART
from lavit.generate.sampling import Sampling
from lavit.generate.score import drawn_likelihood, likelihood, text_likelihood
from lavit.generate.stream import StreamedText
from lavit.layout import ids_of, normalised, reading
from lavit.sequence import Image as Shown
from lavit.sequence import Text, lay_out, pack
from lavit.visualize import kept_over, sheet


@pytest.fixture(scope="module")
def pipeline(toy_run: Path) -> Pipeline:
    return lavit.load(toy_run)


def test_tokens_are_the_same_twice_alone_and_in_a_batch(pipeline: Pipeline) -> None:
    images = [toy_picture(name) for name in NAMES]
    together = pipeline.tokenize(images)
    for image, codes, keep in zip(images, together.split(), together.keep, strict=True):
        for alone in (pipeline.tokenize(image), pipeline.tokenize(image)):
            assert alone.codes.equal(codes) and alone.keep[0].equal(keep)


@pytest.mark.parametrize(
    ("keep", "length"), [(5, 5), (0.5, 8), ("all", 16), ("top_k:3", 3), ("random:0.25", 4)]
)
def test_keep_sets_the_number_of_tokens(
    pipeline: Pipeline, keep: str | int | float, length: int
) -> None:
    assert pipeline.tokenize(toy_picture("red dot"), keep=keep).lengths.tolist() == [length]


def test_captions_of_one_and_of_many_agree(pipeline: Pipeline) -> None:
    images = [toy_picture(name) for name in NAMES[:3]]
    assert pipeline.caption(images) == [pipeline.caption(image) for image in images]


def test_a_loaded_caption_needs_no_pixel_decoder(toy_run: Path) -> None:
    reader = lavit.load(toy_run, parts=("vision", "visual_tokenizer", "language"))
    assert isinstance(reader.caption(toy_picture("red bar")), str)
    with pytest.raises(InputError, match="the part 'pixels' was left out"):
        reader.draw("red bar")
    blind = lavit.load(toy_run, parts=("visual_tokenizer", "language", "pixels"))
    for use in (
        lambda: blind.caption(toy_picture("red bar")),
        lambda: blind.draw("red", best_of=2),
    ):
        with pytest.raises(InputError, match="the part 'vision' was left out"):
            use()
    with pytest.raises(InputError, match="the part 'language' was left out"):
        lavit.load(toy_run, parts=("vision",)).chat([{"role": "user", "content": "hello"}])


def test_questions_are_answered_one_by_one(pipeline: Pipeline) -> None:
    image = toy_picture("red bar")
    assert pipeline.ask([image, image], ["What is it?", "Is it red?"]) == [
        pipeline.ask(image, "what is it?"),
        pipeline.ask(image, "is it red?"),
    ]
    with pytest.raises(InputError, match="2 pictures but 1 questions"):
        pipeline.ask([image, image], "what is it?")


def test_one_input_gives_one_result_and_a_list_gives_a_list(pipeline: Pipeline) -> None:
    picture, words = toy_picture("red bar"), ["red", "blue"]
    quick, short = {"steps": 1}, {"sampling": Sampling(temperature=0, max_tokens=6)}
    parts = [picture, "and", "a dot"]
    texts = [
        (pipeline.caption(picture, **short), pipeline.caption([picture], **short)),
        (pipeline.ask(picture, "what?", **short), pipeline.ask([picture], ["what?"], **short)),
        (pipeline.choose(picture, words), pipeline.choose([picture], words)),
        (pipeline.complete(parts, **short), pipeline.complete([parts], **short)),
        (pipeline.complete("red", **short), pipeline.complete([["red"]], **short)),
    ]
    assert all(isinstance(one, str) and several == [one] for one, several in texts)
    pictures = [
        (pipeline.draw("red", **quick), pipeline.draw(["red"], **quick)),
        (
            pipeline.edit(picture, "as a dot", **quick),
            pipeline.edit([picture], ["as a dot"], **quick),
        ),
        (pipeline.compose(parts, **quick), pipeline.compose([parts], **quick)),
        (pipeline.reconstruct(picture, **quick), pipeline.reconstruct([picture], **quick)),
    ]
    for one, several in pictures:
        assert isinstance(one, Image.Image) and isinstance(several, list) and len(several) == 1
        assert one.tobytes() == several[0].tobytes()
    ranked = pipeline.rank(picture, words)
    assert sorted(ranked) == sorted(words) and pipeline.rank([picture], words) == [ranked]
    reply = pipeline.chat(TALK, **short)
    assert reply["role"] == "assistant" and pipeline.chat([TALK], **short) == [reply]
    how = quick | short
    made, mades = pipeline.generate(parts, **how), pipeline.generate([parts], **how)
    assert isinstance(made, list) and len(mades) == 1 and len(mades[0]) == len(made)
    assert not any(isinstance(part, list) for part in made)


ASKED = [{"type": "text", "text": "what is it?"}]
TALK = [{"role": "user", "content": "hello"}]


def forms(picture: Image.Image, folder: Path) -> dict[str, object]:
    """The same picture in every form that can be given."""
    path = folder / "picture.png"
    picture.save(path)
    array = np.asarray(picture)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    return {
        "path": path,
        "name": str(path),
        "bytes": path.read_bytes(),
        "picture": picture,
        "array": array,
        "floats": array / 255,
        "single": (array / 255).astype(np.float32),
        "tensor": tensor,
        "tensor of floats": tensor / 255,
    }


def test_every_form_of_a_picture_gives_the_same_tokens(pipeline: Pipeline, tmp_path: Path) -> None:
    picture = toy_picture("red dot")
    short = {"sampling": Sampling(temperature=0, max_tokens=6)}
    codes, caption = pipeline.tokenize(picture).codes, pipeline.caption(picture, **short)
    edited = pipeline.edit(picture, "as a bar", steps=1)
    found = forms(picture, tmp_path)
    together = pipeline.tokenize(list(found.values())).split()
    for (name, form), own in zip(found.items(), together, strict=True):
        assert pipeline.tokenize(form).codes.equal(codes) and own.equal(codes), name
        assert pipeline.caption(form, **short) == caption
        if name != "name":  # a string is words there
            assert pipeline.compose([form, "as a bar"], steps=1).tobytes() == edited.tobytes(), name
    talks = [
        [{"role": "user", "content": [{"type": "image", "image": found[name]}, *ASKED]}]
        for name in ("array", "picture", "name")
    ]
    first, *others = pipeline.chat(talks, **short)
    assert others == [first] * 2


def test_drawing_is_a_function_of_the_seed(pipeline: Pipeline) -> None:
    four = pipeline.draw(["red square"] * 4, seed=3, steps=2)
    again = [pipeline.draw("red square", seed=3 + i, steps=2) for i in range(4)]
    assert_alike(four, again)
    assert four[0].size == (16, 16)
    assert len(set(codes_of(pipeline, ["red square"] * 4, seed=3, steps=2))) > 1


def bytes_of(pictures: list[Image.Image]) -> list[bytes]:
    return [picture.tobytes() for picture in pictures]


def codes_of(pipeline: Pipeline, prompts: object, **how: object) -> list[tuple[int, ...]]:
    images = [u for u in pipeline.stream_draw(prompts, **how) if u.kind == "image"]
    return [u.codes for u in sorted(images, key=lambda u: u.input)]


def assert_alike(found: list[Image.Image], expected: list[Image.Image]) -> None:
    """Equal up to what a batch of another size rounds otherwise."""
    for one, other in zip(found, expected, strict=True):
        assert abs(np.asarray(one, float) - np.asarray(other, float)).mean() < 1


def test_many_prompts_are_many_calls(pipeline: Pipeline) -> None:
    """A row does not depend on its batch, through the whole pipeline."""
    names = ["red square", "a blue dot, and more words than the other", "bar"]
    together = pipeline.draw(names, seed=3, steps=2)
    alone = [pipeline.draw(name, seed=3 + i, steps=2) for i, name in enumerate(names)]
    assert_alike(together, alone)
    codes = [codes_of(pipeline, name, seed=3 + i)[0] for i, name in enumerate(names)]
    assert codes_of(pipeline, names, seed=3) == codes
    sources = [toy_picture(name) for name in NAMES[:2]]
    edited = pipeline.edit(sources, ["as a dot", "bigger"], steps=2, seed=[4, 9])
    alone = [
        pipeline.edit(sources[0], "as a dot", steps=2, seed=4),
        pipeline.edit(sources[1], "bigger", steps=2, seed=9),
    ]
    assert_alike(edited, alone)
    how = {"steps": 2, "keep": "random:0.5"}
    alone = [pipeline.reconstruct(source, seed=4 + i, **how) for i, source in enumerate(sources)]
    assert_alike(pipeline.reconstruct(sources, seed=4, **how), alone)


def test_texts_of_several_seeds(pipeline: Pipeline) -> None:
    images = [toy_picture(name) for name in NAMES[:2]]
    how = {"sampling": Sampling(temperature=1.0, max_tokens=12)}
    four = pipeline.caption([images[0]] * 4, seed=7, **how)
    assert four == [pipeline.caption(images[0], seed=7 + i, **how) for i in range(4)]
    assert len(set(four)) > 1
    asked = pipeline.ask(images, ["what?", "where?"], seed=[3, 3], **how)
    assert asked == [
        pipeline.ask(images[0], "what?", seed=3, **how),
        pipeline.ask(images[1], "where?", seed=3, **how),
    ]


def test_a_stream_of_text_joins_to_the_answer(pipeline: Pipeline) -> None:
    images = [toy_picture(name) for name in NAMES[:3]]
    how = {"sampling": Sampling(min_tokens=6, max_tokens=12, temperature=2.0)}
    happening = list(pipeline.stream_caption(images, **how))
    for number, expected in enumerate(pipeline.caption(images, **how)):
        mine = [update for update in happening if update.input == number]
        assert "".join(update.text for update in mine) == expected
        assert [update.kind for update in mine] == ["text"] * (len(mine) - 1) + ["finished"]
    assert max(len([u for u in happening if u.input == number]) for number in range(3)) > 2
    question = pipeline.stream_ask(images[0], "what is it?")
    assert "".join(update.text for update in question) == pipeline.ask(images[0], "what is it?")


def test_a_stream_of_a_picture(pipeline: Pipeline) -> None:
    happening = list(pipeline.stream_draw("red square", seed=3, steps=3, previews=True))
    kinds = [update.kind for update in happening]
    codes = happening[-2].codes
    expected = ["image_start", *["code"] * len(codes), *["preview"] * 3, "image", "finished"]
    assert kinds == expected
    assert [update.codes for update in happening[1 : len(codes) + 1]] == [
        codes[: i + 1] for i in range(len(codes))
    ]
    assert [update.step for update in happening if update.kind == "preview"] == [0, 1, 2]
    blocking = pipeline.draw("red square", seed=3, steps=3)
    assert happening[-2].picture.tobytes() == blocking.tobytes()
    distances = [
        abs(np.asarray(u.picture, float) - np.asarray(blocking, float)).mean()
        for u in happening[-5:-2]
    ]
    assert distances[2] < distances[0]


def test_each_stream_ends_with_what_its_verb_gives(pipeline: Pipeline) -> None:
    picture, how = toy_picture("red bar"), {"seed": 1, "steps": 2}
    talk = [{"role": "user", "content": [{"type": "image", "image": picture}]}]
    edit, parts = (picture, "as a dot"), [picture, "as a dot"]
    drawn = pipeline.chat(talk, out="image", **how)["content"][0]["image"]
    for stream, expected in (
        (pipeline.stream_edit(*edit, **how), pipeline.edit(*edit, **how)),
        (pipeline.stream_compose(parts, **how), pipeline.compose(parts, **how)),
        (pipeline.stream_chat(talk, out="image", **how), drawn),
    ):
        assert list(stream)[-2].picture.tobytes() == expected.tobytes()
    short = {"sampling": Sampling(temperature=0, max_tokens=6)}
    said = "".join(update.text for update in pipeline.stream_chat(talk, **short))
    assert said == pipeline.chat(talk, **short)["content"][0]["text"]


def test_a_stream_may_be_left(pipeline: Pipeline) -> None:
    running = threading.active_count()
    happening = pipeline.stream_draw(["red", "blue"], steps=50, previews=True)
    assert next(update for update in happening if update.kind == "preview").picture.size == (16, 16)
    happening.close()
    assert threading.active_count() == running
    with pytest.raises(InputError, match="prompt is empty"):
        pipeline.stream_draw(" ")  # at the call, not at the first update


def candidates(pipeline: Pipeline, prompt: str, seed: int, count: int) -> list[Image.Image]:
    return pipeline.draw([prompt] * count, seed=[seed + APART * n for n in range(count)], steps=2)


def test_the_best_of_some(pipeline: Pipeline) -> None:
    asked = []

    def redness(prompt: str, picture: Image.Image) -> float:
        asked.append(prompt)
        return float(np.asarray(picture)[..., 0].mean())

    how = {"steps": 2, "best_of": 5, "scorer": redness}
    kept = pipeline.draw(["red square", "red dot"], seed=2, **how)
    assert asked == ["red square"] * 5 + ["red dot"] * 5
    for place, prompt in enumerate(["red square", "red dot"]):
        shown = candidates(pipeline, prompt, 2 + place, 5)
        best = max(shown, key=lambda picture: redness("", picture))
        assert_alike([kept[place]], [best])
    assert_alike([kept[1]], [pipeline.draw("red dot", seed=3, **how)])
    twice = pipeline.draw(["red square"] * 2, seed=2, **how)
    assert twice[0].tobytes() != twice[1].tobytes()  # they share no candidate


def test_a_choice_among_texts_is_the_likeliest_caption(pipeline: Pipeline) -> None:
    image, among = toy_picture("red bar"), ["a red bar", "blue", "a dot.", "green dot on the left"]

    def mean_times_length(text: str) -> float:
        ids = pipeline.model.text_tokenizer(text, add_special_tokens=False)["input_ids"]
        return likelihood(pipeline.model, text, image) * (len(ids) + 1)

    plain = [text.removesuffix(".") for text in among]
    expected = sorted(
        plain, key=lambda text: -max(mean_times_length(text), mean_times_length(f"{text}."))
    )
    assert pipeline.rank(image, among) == expected
    assert pipeline.choose([image, image], among) == expected[:1] * 2
    for bad, what in (
        (["red", "red."], "none twice"),
        ([], "one text or more"),
        (["red", " "], "none empty"),
    ):
        with pytest.raises(InputError, match=what):
            pipeline.choose(image, bad)


def test_the_likelihood_of_codes_and_of_texts(pipeline: Pipeline) -> None:
    """Together they are the loss of a prompt and its picture, both learnt."""
    model, codes = pipeline.model, (3, 1, 2)
    language, ids = model.language, ids_of(model.text_tokenizer, "red dot")
    laid = lay_out((Text(ids), Shown(codes, read=False)), language.vocabulary)
    with torch.no_grad():
        loss = language(pack([[laid]], language.vocabulary))
    drawn = -drawn_likelihood(model, "red dot", codes)
    assert drawn == pytest.approx(float(loss.visual / loss.visual_tokens), rel=1e-5)
    said = lay_out((Text((*ids, language.vocabulary.end)),), language.vocabulary)
    with torch.no_grad():
        loss = language(pack([[said]], language.vocabulary))
    alone = -text_likelihood(model, "red dot")
    assert alone == pytest.approx(float(loss.text / loss.text_tokens), rel=1e-5)


def test_the_likelihood_of_a_caption(pipeline: Pipeline) -> None:
    """The scorer of our own is the loss of the caption's document in training."""
    model, picture = pipeline.model, toy_picture("red dot")
    patches = model.patches([picture])
    tokens = model.visual_tokenizer.encode(patches)
    said = model.text_tokenizer("red dot.", add_special_tokens=False)["input_ids"]
    ids = (*said, model.language.vocabulary.end)
    document = (Shown(tuple(tokens.codes.tolist()), read=True, index=0, target=False), Text(ids))
    vocabulary = model.language.vocabulary
    batch = pack([[lay_out(document, vocabulary)]], vocabulary)
    with torch.no_grad():
        loss = model.language(batch, model.visual_tokenizer.prepare(patches), tokens.keep)
    expected = -float(loss.text) / int(loss.text_tokens)
    assert likelihood(model, "red dot.", picture) == pytest.approx(expected, rel=1e-4)
    four = candidates(pipeline, "red dot.", 1, 4)
    scores = [likelihood(model, "red dot.", each) for each in four]
    best = pipeline.draw("red dot.", seed=1, steps=2, best_of=4)
    assert best.tobytes() == four[scores.index(max(scores))].tobytes()


def test_weights_that_change_are_seen(toy_run: Path) -> None:
    pipe = lavit.load(toy_run)
    engine, before = pipe.engine, pipe.caption(toy_picture("red bar"))
    assert pipe.engine is engine and type(engine.decoder) is PackedDecoder  # which has copies
    with torch.no_grad():
        for parameter in pipe.model.language.lm.parameters():
            parameter.mul_(-1)
    fresh = Pipeline(pipe.model).caption(toy_picture("red bar"))
    assert pipe.caption(toy_picture("red bar")) == fresh != before


def test_a_watermark_that_cannot_be_is_refused_before_work(
    toy_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lavit.generate.safety.require", lambda *_, **__: None)
    pipe = lavit.load(toy_run, watermark="made by us")
    monkeypatch.setattr("lavit.generate.runner.updates", None)  # nothing is written
    with pytest.raises(InputError, match="a watermark needs 256 pixels"):
        pipe.draw("red bar")


def test_the_papers_protocol(toy_run: Path) -> None:
    paper = lavit.load(toy_run, protocol="paper")
    image = toy_picture("red bar")
    said = paper.caption(image)
    beams = paper.engine.complete(
        [Request(**vars(lay_prompt(paper.model, reading(image))), sampling=protocols.CAPTION)]
    )
    text = paper.model.text_tokenizer.decode(list(beams[0].text), skip_special_tokens=True)
    assert said == protocols.cut_before(text, protocols.CAPTION_ENDS)[0].strip()
    assert paper.protocol.answer == protocols.QUESTION and paper.protocol.drawing.guidance == 2.0
    how = {"seed": [APART * n for n in range(4)], "steps": 2, "sampling": paper.protocol.drawing}
    four = Pipeline(paper.model).draw(["red"] * 4, **how)
    scores = [likelihood(paper.model, "red", each) for each in four]
    assert paper.draw("red", steps=2).tobytes() == four[scores.index(max(scores))].tobytes()


def test_vizwiz_asks_first_whether_there_is_an_answer(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = toy_picture("red bar")
    answer = pipeline.ask(image, "What is it?")
    first = pipeline.ask(image, protocols.answerable("What is it?"))
    expected = protocols.UNANSWERABLE if protocols.refuses(first) else answer
    assert pipeline.ask(image, "What is it?", check_answerable=True) == expected
    monkeypatch.setattr("lavit.generate.pipeline.refuses", lambda said: said == first)
    assert pipeline.ask([image], ["What is it?"], check_answerable=True) == ["unanswerable"]
    for said in ("No.", "no, it is dark", "unanswerable"):
        assert protocols.refuses(said), said
    assert not protocols.refuses("nothing") and not protocols.refuses("yes")


def test_words_are_normalised_as_the_paper_does() -> None:
    assert normalised('What IS "this" (here)?') == "what is this here?"
    assert len(normalised("word " * 60).split()) == 50
    assert normalised("?!") == "?"  # in data: no reason to stop a training
    assert protocols.cut_before("red. green\nblue", ("\n", ".")) == ("red", True)
    assert protocols.cut_before("red", (".",)) == ("red", False)


@pytest.mark.parametrize(
    "text", ["  a red  dot. And more", "é ü 猫 …\n", "Long answ no", "x Long answer: y", "", " \n"]
)
def test_pieces_of_text_are_never_taken_back(text: str) -> None:
    ends = ("\n", "Long answer:", ".")
    # characters come in several pieces
    pieces = StreamedText(lambda ids: bytes(ids).decode(errors="replace"), ends)
    found = []
    ids = tuple(text.encode())
    for count in range(1, len(ids) + 1):
        found.append(pieces.add(ids[:count]))
        if pieces.cut:
            break
    found.append(pieces.close())
    assert "".join(found) == protocols.cut_before(text, ends)[0].strip()
    assert all("\ufffd" not in piece for piece in found)


def test_codes_may_be_read_instead_of_features(toy_run: Path) -> None:
    pipeline = lavit.load(toy_run)
    config = pipeline.model.config
    picture = toy_picture("red bar")
    pipeline.model.config = replace(config, language=replace(config.language, read_as="codes"))
    prompt = lay_prompt(pipeline.model, reading(picture))
    codes = pipeline.model.language.vocabulary.codes_of(torch.tensor(prompt.ids[1:-1]))
    assert prompt.features is None and codes.equal(pipeline.tokenize(picture).codes)
    assert (
        isinstance(pipeline.caption(picture), str)
        and likelihood(pipeline.model, "red", picture) < 0
    )


def test_pictures_and_words_may_be_mixed(pipeline: Pipeline) -> None:
    source = toy_picture("blue dot")
    edited = pipeline.edit(source, "as a bar", steps=2)
    mixed = pipeline.compose([source, "and", toy_picture("red bar"), "together"], steps=2)
    assert edited.size == mixed.size == (16, 16)


def test_reconstruction_needs_no_language_model(toy_run: Path) -> None:
    pipeline = lavit.load(toy_run, parts=("vision", "visual_tokenizer", "pixels"))
    assert pipeline.reconstruct(toy_picture("red bar"), steps=2).size == (16, 16)
    pictures = [toy_picture("red bar"), toy_picture("blue dot")]
    several = pipeline.reconstruct(pictures, steps=2)
    alone = [pipeline.reconstruct(one, seed=at, steps=2) for at, one in enumerate(pictures)]
    assert bytes_of(several) == bytes_of(alone)


def test_a_prompt_that_is_too_long_is_refused_before_the_decoder_is_needed(toy_run: Path) -> None:
    writer = lavit.load(toy_run, parts=("language",))
    for verb in (writer.draw, writer.stream_draw):
        with pytest.raises(
            InputError, match="has 32000 tokens but the language model attends to 256"
        ):
            verb("~" * 32_000)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.draw(" "), "prompt is empty"),
        (lambda p: p.ask(toy_picture("red dot"), "?!"), "question"),
        (lambda p: p.draw("red", guidance=-1.0), "guidance"),
        (lambda p: p.caption([]), "at least one picture"),
        (lambda p: p.caption("nowhere.png"), "nowhere.png"),
        (lambda p: p.draw("red", steps=-2), "steps"),
        (lambda p: p.tokenize(toy_picture("red dot"), keep="most"), "keep"),
        (lambda p: p.draw("red " * 300), "shorten"),
        (lambda p: p.draw("red", seed=True), "seed True is not a seed"),
        (lambda p: p.draw("red", seed=2**63), "is not a seed"),
        (lambda p: p.draw("red", seed=[1, 2]), "2 seeds for 1 inputs"),
        (lambda p: p.draw(["red", "blue"], seed=[1]), "1 seeds for 2 inputs"),
        (lambda p: p.draw([]), "at least one prompt"),
        (lambda p: p.draw(["red", " "]), "prompt is empty"),
        (lambda p: p.edit([toy_picture("red dot")], ["a", "b"]), "1 pictures but 2 instructions"),
        (lambda p: p.draw("red", best_of=0), "best_of is 0"),
        (lambda p: p.draw("red", scorer=lambda words, picture: 0.0), "give best_of=2 or more"),
        (lambda p: p.chat(TALK, steps=3), "'text' takes no steps"),
        (lambda p: p.stream_chat(TALK, previews=True), "no previews"),
        (lambda p: p.draw("red", sampling=Sampling(max_tokens=17)), "at most 16 codes"),
        (
            lambda p: p.draw("red", sampling=Sampling(min_tokens=0, max_tokens=16)),
            "at least one code",
        ),
        (lambda p: p.compose([]), "at least one picture or word"),
        (lambda p: p.caption(np.zeros((2, 4, 4, 3), np.uint8)), "give one picture, or a list"),
        (lambda p: p.paint([torch.tensor([], dtype=torch.long)], seeds=[0]), "1 to 16 codes"),
        (lambda p: p.reconstruct([]), "at least one picture"),
        (lambda p: Pipeline(p.model, protocol="secret"), "protocol 'secret' is not known"),
    ],
)
def test_bad_input_says_what_was_wrong(pipeline: Pipeline, call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(pipeline)


@pytest.mark.parametrize(
    "call",
    [
        lambda p: p.caption(toy_picture("red dot"), steps=3),
        lambda p: p.draw("red", image_sampling=Sampling()),
        lambda p: p.draw("red", previews=True),
        lambda p: p.stream_draw("red", best_of=4),
        lambda p: p.stream_ask(toy_picture("red dot"), "what?", check_answerable=True),
        lambda p: p.complete("red", guidance=3.0),
        lambda p: p.reconstruct(toy_picture("red dot"), sampling=Sampling()),
    ],
)
def test_an_option_that_a_verb_does_not_use_cannot_be_given(pipeline: Pipeline, call) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        call(pipeline)


ROOMS = ("pipeline", "runner", "options", "prompts", "score", "stream", "protocols", "sampling")
PUBLIC = ("", "images", *(f"generate.{room}" for room in ROOMS))


@pytest.mark.parametrize("room", PUBLIC)
def test_public_functions_say_what_they_return(room: str) -> None:
    module = importlib.import_module(f"lavit.{room}".removesuffix("."))
    for owner in [module, *(value for value in vars(module).values() if isinstance(value, type))]:
        for name, function in vars(owner).items():
            own = inspect.isfunction(function) and function.__module__ == module.__name__
            if own and not name.startswith("_"):
                said = inspect.get_annotations(function).get("return", "nothing")
                assert said not in ("nothing", "Any"), (owner, name)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, toy_run: Path) -> None:
    with pytest.raises(InputError, match="no model"):
        lavit.load(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"config\.json"):
        lavit.load(tmp_path)
    (tmp_path / "config.json").write_text((toy_run / "config.json").read_text())
    with pytest.raises(InputError, match=r"no vision yet: .* lavit train tokenizer"):
        lavit.load(tmp_path).tokenize(toy_picture("red dot"))


def test_pictures_about_pictures() -> None:
    keep = torch.zeros(16, dtype=torch.bool)
    keep[5] = True
    shown = kept_over(Image.new("RGB", (40, 30), (10, 200, 10)), keep, size=64)
    assert shown.size == (64, 64)
    assert shown.getpixel((24, 24)) == (10, 200, 10)
    assert shown.getpixel((40, 40)) != (10, 200, 10)
    assert sheet([[shown, "a text"], [shown]], cell=32).size == (2 * 38 + 6, 2 * 38 + 6)

"""The engine against plain loops over the same model: no cache, one row, one pass at a time."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from lavit.config import InputError
from lavit.generate import engine as engine_module
from lavit.generate import protocols
from lavit.generate import sampling as S
from lavit.generate.decoder import Decoder
from lavit.generate.engine import Engine
from lavit.generate.packed import PackedDecoder, decoder_for
from lavit.generate.request import Completion, Request, collect
from lavit.generate.sampling import Sampling
from lavit.language.model import Language
from lavit.language.reader import MergerReader
from lavit.sequence import Image, Text
from lavit.visual_tokenizer.merger import Merger

GREEDY = Sampling(temperature=0, max_tokens=12)
DRAW = Sampling(top_k=20, guidance=3.0, max_tokens=9, min_tokens=2)
SEED = 5
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
}


def llama(text: int = 61, **changes: object) -> LlamaConfig:
    sizes = (
        SIZES
        | {"intermediate_size": 96, "num_key_value_heads": 2, "initializer_range": 0.15}
        | changes
    )
    return LlamaConfig(vocab_size=text, **sizes)


def language(config: PreTrainedConfig | None = None, codes: int = 30) -> Language:
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config or llama())
    reader = MergerReader(Merger(32, 2, 1, 2.0), lm.config.hidden_size)
    return Language(lm, reader, codes=codes, end=2).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def toy() -> Language:
    return language()


@pytest.fixture(scope="module", params=["plain", "packed"])
def engine(toy: Language, request: pytest.FixtureRequest) -> Engine:
    return Engine(toy, decoder=Decoder(toy) if request.param == "plain" else PackedDecoder(toy))


def hidden_of(model: Language, ids: list[int]) -> torch.Tensor:
    return model.body(
        inputs_embeds=model.embed(torch.tensor([ids])), use_cache=False
    ).last_hidden_state[:, -1]


def slowly(
    model: Language,
    ids: tuple[int, ...],
    how: Sampling,
    mode: str,
    seed: int = SEED,
) -> list[int]:
    """Text ids or codes, one by one: the whole prefix again each time, guidance as two passes."""
    vocabulary = model.vocabulary
    generator = torch.Generator().manual_seed(seed)
    conditional = [*ids, vocabulary.image_start] if mode == "image" else list(ids)
    unconditional = [vocabulary.image_start]
    out: list[int] = []
    while len(out) < how.max_tokens:
        hidden = hidden_of(model, conditional)
        if mode == "image":
            logits = model.visual_logits(hidden)
            other = model.visual_logits(hidden_of(model, unconditional))
            logits = (other + how.guidance * (logits - other))[:, vocabulary.writing]
        else:
            logits = model.text_logits(hidden)
        end = 0 if mode == "image" else vocabulary.end
        if len(out) < how.min_tokens:
            logits[:, end] = -torch.inf
        index = int(S.choose(logits, how, [generator]))
        if index == end:
            break
        out.append(index - 1 if mode == "image" else index)
        joint = int(vocabulary.ids(torch.tensor(out[-1]))) if mode == "image" else index
        conditional.append(joint)
        unconditional.append(joint)
    return out


def written(completion: Completion) -> list[int]:
    return list(completion.images[0] if completion.images else completion.text)


# ---------------------------------------------------------------- equivalences


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cached_equals_uncached_text(engine: Engine, temperature: float) -> None:
    how = replace(GREEDY, temperature=temperature, top_p=0.9)
    (found,) = engine.complete([Request(ids=(5, 9, 7), sampling=how, seed=3)])
    assert written(found) == slowly(engine.language, (5, 9, 7), how, "text", seed=3)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
def test_batched_guidance_equals_two_passes(engine: Engine, guidance: float) -> None:
    how = replace(DRAW, guidance=guidance)
    for ids in ((5, 9, 7, 11), (4,)):
        (found,) = engine.complete([Request(ids=ids, sampling=how, seed=SEED, mode="image")])
        assert written(found) == slowly(engine.language, ids, how, "image")


def many() -> list[Request]:
    return [
        Request(ids=(5, 9, 7), sampling=GREEDY),
        Request(ids=(4, 4), sampling=DRAW, seed=1, mode="image"),
        Request(ids=(8, 3, 1, 6, 9), sampling=Sampling(top_p=0.8, max_tokens=5), seed=2),
        Request(ids=(8, 3), sampling=replace(DRAW, guidance=1.0, max_tokens=4), mode="image"),
        Request(ids=(12,), sampling=Sampling(temperature=0, beams=3, max_tokens=7)),
        Request(ids=(13, 5), sampling=Sampling(max_tokens=20), seed=4, picture=DRAW, mode="mixed"),
        Request(ids=(), sampling=replace(DRAW, max_tokens=15), seed=5, mode="image"),
        Request(ids=(), sampling=replace(DRAW, max_tokens=15), seed=6, mode="image"),
    ]


@pytest.mark.parametrize("lanes", [32, 5, 1])
def test_rows_do_not_depend_on_their_batch(toy: Language, engine: Engine, lanes: int) -> None:
    together = Engine(toy, lanes=lanes, decoder=engine.decoder).complete(many())
    alone = [engine.complete([request])[0] for request in many()]
    assert [(c.segments, c.reason) for c in together] == [(c.segments, c.reason) for c in alone]


@pytest.mark.parametrize("mode", ["text", "image"])
def test_seeds_give_different_completions_of_one_prompt(engine: Engine, mode: str) -> None:
    requests = [Request(ids=(5, 6), sampling=DRAW, seed=seed, mode=mode) for seed in (7, 8, 9, 7)]
    found = engine.complete(requests)
    assert found[0] == found[3] and len({c.segments for c in found}) > 1


def test_choices_of_one_prompt_read_it_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, int]] = []
    prefill = engine.decoder.prefill

    def counted(embeddings: torch.Tensor, lengths: list[int], columns: int) -> Any:
        read.append((len(lengths), max(lengths)))
        return prefill(embeddings, lengths, columns)

    monkeypatch.setattr(engine.decoder, "prefill", counted)
    alone = Request(ids=(7, 5, 9), sampling=GREEDY)
    asked = [Request(ids=(4, 5), mode="image", sampling=DRAW, seed=seed) for seed in range(3)]
    asked.append(alone)
    found = [one.segments for one in engine.complete(asked)]
    assert read == [(3, 3)]  # both prompts and the unconditional one
    assert found == [engine.complete([one])[0].segments for one in asked]
    monkeypatch.setattr(engine_module, "PREFILL", 8)
    read.clear()
    texts = [replace(alone, ids=tuple(range(3, 3 + n))) for n in (2, 3, 6, 2)]
    found = [one.segments for one in engine.complete(texts)]
    assert read == [(2, 3), (1, 6), (1, 2)]
    assert found == [engine.complete([one])[0].segments for one in texts]


def test_a_late_request_joins_a_running_batch(engine: Engine) -> None:
    first, second = many()[0], many()[1]
    session = engine.session()
    session.add(first)
    events = session.step() + session.step() + session.step()
    session.add(second)
    while session.busy:
        events += session.step()
    found = collect(events, engine.vocabulary)
    assert [found[0], found[1]] == [*engine.complete([first]), *engine.complete([second])]


def test_features_enter_at_their_slots(engine: Engine) -> None:
    model = engine.language
    prompt = (5, model.vocabulary.image_start, 70, 71, model.vocabulary.image_end, 9)
    features = model.embed(torch.tensor([[70, 71]]))[0]
    marks = (False, False, True, True, False, False)
    blank = (5, model.vocabulary.image_start, 66, 66, model.vocabulary.image_end, 9)
    plain, filled, other = (
        Request(ids=prompt, sampling=GREEDY),
        Request(ids=blank, slots=marks, features=features, sampling=GREEDY),
        Request(ids=blank, sampling=GREEDY),
    )
    found = engine.complete([other, filled, plain])
    assert found[1] == found[2] != found[0]


# ---------------------------------------------------------------- beams


@pytest.mark.parametrize(
    ("beams", "penalty", "stopping", "least"),
    [
        (2, 1.0, False, 8),
        (5, 0.0, True, 2),
        (3, 2.0, "never", 1),
        (4, -1.0, False, 1),
        (3, 0.0, "never", 1),
        (2, 1.0, True, 3),
    ],
)
def test_beams_equal_transformers(
    beams: int, penalty: float, stopping: bool | str, least: int
) -> None:
    model = language(llama(text=11, initializer_range=0.08))
    engine = Engine(model)
    how = Sampling(
        temperature=0,
        beams=beams,
        length_penalty=penalty,
        early_stopping=stopping,
        min_tokens=least,
        max_tokens=14,
    )
    prompts = [(5, 3), (4, 7, 9, 1), (6,), (1, 1, 8)]
    lengths = set()
    for prompt, found in zip(
        prompts, engine.complete([Request(ids=p, sampling=how) for p in prompts]), strict=True
    ):
        expected = model.lm.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False, num_beams=beams, length_penalty=penalty, early_stopping=stopping,
            eos_token_id=2, pad_token_id=2, min_new_tokens=least, max_new_tokens=14,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        theirs = expected.sequences[0, len(prompt) :].tolist()
        theirs = theirs[: theirs.index(2)] if 2 in theirs else theirs
        assert list(found.text) == theirs
        assert found.score == pytest.approx(float(expected.sequences_scores[0]), abs=1e-4)
        lengths.add(len(theirs))
    if penalty <= 0:
        assert len(lengths) > 1  # some answers ended by themselves


# ---------------------------------------------------------------- bounds and modes


def uniform(text: int = 5, codes: int = 4) -> Engine:
    """Every allowed id is equally likely: both heads are zero."""
    model = language(llama(text=text, tie_word_embeddings=False), codes)
    torch.nn.init.zeros_(model.lm.lm_head.weight)
    torch.nn.init.zeros_(model.head_rows)
    return Engine(model)


def several(count: int, how: Sampling, **options: object) -> list[Request]:
    """So many requests that differ in their seeds."""
    return [Request(ids=(1,), sampling=how, seed=seed, **options) for seed in range(count)]


def test_lengths_are_kept() -> None:
    engine, how = uniform(), Sampling(min_tokens=3, max_tokens=6)
    text = engine.complete(several(64, how))
    image = engine.complete(several(64, how, mode="image"))
    for found, lengths in (
        (text, [len(c.text) for c in text]),
        (image, [len(c.images[0]) for c in image]),
    ):
        assert min(lengths) == 3
        assert max(lengths) == 6
        assert all(
            (c.reason == "length") == (length == 6)
            for c, length in zip(found, lengths, strict=True)
        )


def test_text_writes_no_visual_id_and_images_no_text() -> None:
    engine = uniform()
    how = Sampling(max_tokens=9)
    events = list(engine.generate([*several(20, how), *several(20, how, mode="image")]))
    texts = {e.id for e in events if e.kind == "text"}
    codes = {e.id for e in events if e.kind == "code"}
    assert texts == {0, 1, 3, 4}
    assert codes == set(engine.vocabulary.ids(torch.arange(4)).tolist())


def test_stop_ids_end_the_text() -> None:
    found = uniform().complete(several(50, Sampling(max_tokens=30), stop=(4, 3)))
    assert {i for c in found for i in c.text} == {0, 1}
    assert any(c.reason == "end" for c in found)


def test_mixed_mode_opens_images_by_itself_and_goes_on() -> None:
    engine = uniform()
    picture = Sampling(guidance=2.0, min_tokens=2, max_tokens=5)
    how = Sampling(max_tokens=12, min_tokens=12)
    events = list(engine.generate(several(24, how, mode="mixed", picture=picture, images=2)))
    found = list(collect(events, engine.vocabulary).values())
    assert {len(c.images) for c in found} == {0, 1, 2}
    assert {len(codes) for c in found for codes in c.images} == {2, 3, 4, 5}
    assert all(len(c.text) == 12 for c in found)
    kinds = {tuple(type(segment) for segment in c.segments) for c in found}
    assert (Text, Image, Text, Image, Text) in kinds
    for number in range(24):
        inside = False
        for event in (event for event in events if event.request == number):
            assert inside == (event.kind in ("code", "image_end"))
            inside = (inside or event.kind == "image_start") and event.kind != "image_end"


def test_mixed_mode_continues_on_what_it_drew(engine: Engine) -> None:
    """A guided image inside mixed text equals that image alone; so does the text after it."""
    model = engine.language
    start = model.vocabulary.image_start
    row = model.head_rows[0].clone()
    first = slowly(model, (5, 9), replace(GREEDY, max_tokens=4), "text")
    hidden = hidden_of(model, [5, 9, *first])[0]
    model.head_rows[0] = 0.9 * hidden / hidden.norm()  # image start becomes likely there
    try:
        picture = replace(DRAW, temperature=0, max_tokens=6)
        request = Request(
            ids=(5, 9),
            mode="mixed",
            sampling=replace(GREEDY, max_tokens=8),
            picture=picture,
            images=1,
        )
        before, image, after = engine.complete([request])[0].segments
        prompt = (5, 9, *before.ids)
        assert list(image.codes) == slowly(model, prompt, picture, "image")
        codes = model.vocabulary.ids(torch.tensor(image.codes)).tolist()
        rest = replace(GREEDY, max_tokens=8 - len(before.ids))
        assert list(after.ids) == slowly(
            model, (*prompt, start, *codes, model.vocabulary.image_end), rest, "text"
        )
    finally:
        model.head_rows[0] = row


def test_a_full_context_ends_the_row(engine: Engine) -> None:
    prompt = tuple(i % 50 + 3 for i in range(90))
    text, image = engine.complete(
        [
            Request(ids=prompt, sampling=Sampling(max_tokens=50, min_tokens=50)),
            Request(ids=prompt, mode="image", sampling=Sampling(max_tokens=50, min_tokens=50)),
        ]
    )
    assert (text.reason, len(text.text)) == ("context", 7)  # the last one is not read any more
    assert (image.reason, len(image.images[0])) == ("context", 6)


def test_generation_stops_between_steps(engine: Engine) -> None:
    events = engine.generate([Request(ids=(5,), sampling=Sampling(max_tokens=30, min_tokens=30))])
    next(events)
    events.close()
    session = engine.session()
    keep, drop = (session.add(Request(ids=(5,), sampling=GREEDY, seed=i)) for i in range(2))
    seen = session.step()
    session.cancel(drop)
    while session.busy:
        seen += session.step()
    assert sum(e.request == drop for e in seen) == 1
    assert seen[-1].request == keep
    assert seen[-1].kind == "finished"


# ---------------------------------------------------------------- decoders


@pytest.mark.parametrize(
    "config",
    [
        llama(tie_word_embeddings=True),
        MistralConfig(
            vocab_size=61, intermediate_size=96, num_key_value_heads=1, sliding_window=None, **SIZES
        ),
        Qwen2Config(vocab_size=61, intermediate_size=96, num_key_value_heads=4, **SIZES),
        Qwen3Config(
            vocab_size=61, intermediate_size=96, num_key_value_heads=2, head_dim=12, **SIZES
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_packed_equals_plain(config: PreTrainedConfig, caplog: pytest.LogCaptureFixture) -> None:
    model = language(config)
    for name, parameter in model.lm.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.normal_(parameter)
    caplog.set_level(logging.INFO, "lavit")
    packed = decoder_for(model)
    assert isinstance(packed, PackedDecoder)
    assert caplog.messages == [f"{type(model.lm).__name__}: packed fp32 step on the CPU"]
    plain = Decoder(model)
    prompt = model.embed(torch.randint(61, (3, 7)))
    states = []
    for decoder in (plain, packed):
        memory, last = decoder.prefill(prompt, [7, 3, 5], 64)
        steps = [decoder.step(torch.tensor(ids), memory) for ids in ([5, 70, 9], [8, 61, 80])]
        states.append(
            [last, *steps, decoder.text_logits(steps[1]), decoder.writing_logits(steps[1])]
        )
    for found, expected in zip(*states, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_packed_merges_lora() -> None:
    peft = pytest.importorskip("peft")
    model = language()
    targets = ["q_proj", "v_proj", "down_proj"]
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False), model.lm
    )
    memories = [
        decoder.prefill(model.embed(torch.tensor([[5, 6]])), [2], 8)
        for decoder in (Decoder(model),) * 2
    ]
    ids = torch.tensor([7])
    plain, packed = (
        Decoder(model).step(ids, memories[0][0]),
        PackedDecoder(model).step(ids, memories[1][0]),
    )
    torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-4)
    with_lora = Engine(model).complete([Request(ids=(5,), sampling=GREEDY)])
    assert with_lora != Engine(language()).complete([Request(ids=(5,), sampling=GREEDY)])


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(
            vocab_size=61,
            n_embd=64,
            n_layer=2,
            n_head=4,
            n_positions=96,
            initializer_range=0.2,
            bos_token_id=2,
            eos_token_id=2,
        ),
        OPTConfig(vocab_size=61, ffn_dim=96, word_embed_proj_dim=64, init_std=0.2, **SIZES),
    ],
    ids=lambda config: config.model_type,
)
def test_any_causal_lm(config: PreTrainedConfig, caplog: pytest.LogCaptureFixture) -> None:
    model = language(config)
    caplog.set_level(logging.INFO, "lavit")
    engine = Engine(model)
    assert caplog.messages == [
        f"{type(model.lm).__name__}: step through transformers, growing, because "
        f"{type(model.lm).__name__} is not Llama-shaped"
    ]
    requests = [
        Request(ids=(5, 9, 7, 8), sampling=GREEDY),
        Request(ids=(4,), sampling=GREEDY),
        Request(ids=(4, 4), sampling=DRAW, seed=SEED, mode="image"),
    ]
    for request, found in zip(requests, engine.complete(requests), strict=True):
        assert written(found) == slowly(model, request.ids, request.sampling, request.mode)


def test_static_shapes_give_the_same(toy: Language) -> None:
    fixed = Engine(toy, decoder=Decoder(toy, static=True))
    found, expected = fixed.complete(many()), Engine(toy).complete(many())
    assert [c.segments for c in found] == [c.segments for c in expected]


def test_a_compiled_step_gives_the_same(toy: Language) -> None:
    compiled = Engine(toy, compile="eager")  # the graph is captured, its products stay torch's
    assert compiled.decoder.static
    requests = many()[:1]
    assert compiled.complete(requests) == Engine(toy).complete(requests)


# ---------------------------------------------------------------- sampling


def test_filters_keep_what_they_say() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4]]).log()

    def kept(filtered: torch.Tensor) -> list[list[int]]:
        return [row.isfinite().nonzero()[:, 0].tolist() for row in filtered]

    assert kept(S.top_k(logits, 2)) == [[0, 1], [2, 3]]
    assert kept(S.top_p(logits, 0.7)) == [[0, 1], [2, 3]]
    assert kept(S.top_p(logits, 0.01)) == [[0], [3]]
    assert kept(S.min_p(logits, 0.6)) == [[0], [2, 3]]
    assert S.top_k(logits, 0) is S.top_p(logits, 1.0) is S.min_p(logits, 0.0) is logits


def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([0.5, 0.0, 0.3, 0.2]).log().expand(4000, 4)
    uniforms = torch.linspace(0, 1, 4001, dtype=torch.float64)[1:]
    counts = S.draw(logits, uniforms).bincount(minlength=4)
    assert (counts - torch.tensor([2000, 0, 1200, 800])).abs().max() <= 1
    assert S.draw(logits[:1], torch.zeros(1)).tolist() == [0]
    only_last = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    assert [int(S.draw(only_last, torch.tensor([u], dtype=torch.float64))) for u in (0.0, 1.0)] == [
        1,
        1,
    ]


def test_guide_is_equation_7() -> None:
    conditional, unconditional, scale = (
        torch.randn(3, 8),
        torch.randn(3, 8),
        torch.tensor([0.0, 1.0, 4.0]),
    )
    expected = unconditional + scale[:, None] * (conditional - unconditional)
    torch.testing.assert_close(S.guide(conditional, unconditional, scale), expected)


def test_presets_are_the_protocols() -> None:
    caption, question = protocols.CAPTION, protocols.QUESTION
    assert (caption.beams, caption.min_tokens, caption.max_tokens) == (2, 8, 36)
    assert (question.beams, question.min_tokens, question.max_tokens) == (5, 2, 10)
    assert (question.length_penalty, question.early_stopping) == (0.0, True)
    assert (protocols.PUBLISHED.top_k, protocols.PUBLISHED.guidance) == (50, 4.0)
    assert (protocols.DRAW.top_k, protocols.DRAW.guidance, protocols.BEST_OF) == (200, 2.0, 4)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"guidance": -1.0}, "guidance -1.0 is below 0"),
        ({"temperature": -0.1}, "temperature -0.1 is below 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, r"top_p 0.0 is not in \(0, 1\]"),
        ({"top_k": 2.5}, "top_k is 2.5: give a whole number"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens 9 is not in 0..8"),
        ({"beams": 2}, "set temperature=0"),
        ({"early_stopping": "soon"}, "early_stopping is 'soon'"),
    ],
)
def test_wrong_sampling(wrong: dict[str, object], line: str) -> None:
    sampling = copy.copy(Sampling())
    for name, value in wrong.items():
        # past the type checker of the tests, as users are
        object.__setattr__(sampling, name, value)
    with pytest.raises(InputError, match=line):
        sampling.__post_init__()


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"ids": ()}, "the prompt is empty"),
        ({"ids": (500,)}, "outside the joint vocabulary of 93 ids"),
        ({"ids": (5,) * 96}, "the prompt has 96 tokens but the language model attends to 96"),
        ({"ids": (5, 61), "mode": "image"}, "leave it out, the engine opens the image"),
        ({"mode": "image", "sampling": Sampling(min_tokens=0)}, "an image needs at least one code"),
        ({"mode": "image", "sampling": protocols.CAPTION}, "beam search writes text only"),
        ({"slots": (True,)}, "each true slot takes one feature"),
        ({"images": -1, "mode": "mixed"}, "images is -1"),
    ],
)
def test_wrong_requests(engine: Engine, wrong: dict[str, object], line: str) -> None:
    with pytest.raises(InputError, match=line):
        engine.complete(
            [
                Request(ids=(5,), sampling=GREEDY),
                Request(**({"ids": (5,), "sampling": GREEDY} | wrong)),
            ]
        )


def test_an_lm_without_keys_and_values() -> None:
    config = MambaConfig(vocab_size=61, hidden_size=64, num_hidden_layers=1, state_size=4)
    with pytest.raises(InputError, match=r"MambaForCausalLM .*keys and values"):
        Engine(language(config)).complete([Request(ids=(5,), sampling=GREEDY)])

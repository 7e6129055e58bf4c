"""`lavit eval` on scenes: every figure has its name, what was stopped goes on, and what is wrong is
said in a line.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lavit
from conftest import NAMES, toy_picture
from lavit.cli import main
from lavit.config import InputError
from lavit.data.scenes import frozen, sample
from lavit.data.scenes.dataset import described
from lavit.data.scenes.language import prompt
from lavit.data.scenes.render import render
from lavit.data.scenes.sample import scene_at
from lavit.data.scenes.splits import Rules
from lavit.data.scenes.world import SHAPES, Scene, facts
from lavit.evaluate import (
    conversing,
    copies,
    evaluation,
    exam,
    judge,
    own,
    probes,
    reading,
    tokens,
)  # fmt: skip
from lavit.evaluate.drawing import draw_all, drawings, prompt_of
from lavit.evaluate.evaluation import FIGURES, evaluate
from lavit.evaluate.exam import Exam
from lavit.evaluate.examinee import Missing, chosen, predictions_path, weights_hash
from lavit.evaluate.folder import is_scenes
from lavit.evaluate.known import rules_of
from lavit.evaluate.minimal import renamed, write_minimal_pairs
from lavit.evaluate.own import load_items

COUNT = 3
NAMED = [
    "read_test_exact", "read_pairs_exact", "read_binding_exact", "read_number_exact",
    "read_style_exact", "read_noto_exact", "answer_test", "answer_blind", "draw_test_all",
    "draw_test_atoms", "draw_pairs_all", "draw_pairs_atoms", "draw_binding_all", "draw_swaps",
    "draw_copies", "edit_test_all", "edit_blind", "edit_oracle_all", "edit_source_copies",
    "compose_test_all", "reconstruct_test_all", "cycle_text_exact", "chat4_all", "own_read",
    "own_answer", "own_draw_atoms", "ladder_spearman", "ladder_blank", "allocation_gain",
    "tokenizer_distance", "identity_kept", "background_kept", "write_identity", "live_codes",
    "kept_share", "judge_test_all", "judge_false_accepts", "text_perplexity_ratio",
]  # fmt: skip
SOME = (
    "read_test_exact",
    "answer_test",
    "draw_test_all",
    "edit_test_all",
    "allocation_gain",
    "live_codes",
)


class Blind:
    """A judge that sees every picture as an empty white one."""

    def look(self, pictures):
        return [judge.Seen("white", "plain", ()) for _ in pictures]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little material for probes and the like, and a judge without weights."""
    for module, name, value in (
        (copies, "POOL", 12), (copies, "RENDERS", 3), (probes, "THINGS", 4000),
        (reading, "KNOWN", 400), (tokens, "PICTURES", 2000), (frozen, "COUNT", 1),
        (frozen, "MEASURING", ("test", "binding")),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(judge.Judge, "load", classmethod(lambda cls: Blind()))


@pytest.fixture
def run(toy_run: Path, tmp_path: Path) -> Path:
    """A toy run of its own, so that nothing is kept for other tests."""
    folder = tmp_path / "run"
    shutil.copytree(
        toy_run, folder, ignore=shutil.ignore_patterns("cache", "checkpoints", "tensorboard")
    )
    return folder


def test_figures_have_their_stable_names() -> None:
    assert list(FIGURES) == NAMED


def test_every_figure_is_there_or_says_why(run: Path) -> None:
    known = {name: make for name, make in FIGURES.items() if name != "read_number_exact"}
    found = evaluate(Exam(run, count=COUNT), figures=known)
    assert list(found["figures"]) == [name for name in NAMED if name != "read_number_exact"]
    for name, figure in found["figures"].items():
        assert {"value", "low", "high", "count", "floor", "ceiling"} <= set(figure), name
        if figure["value"] is None:
            assert figure["reason"], name
        else:
            assert figure["low"] <= figure["value"] <= figure["high"], name
    missing = {name for name, figure in found["figures"].items() if figure["value"] is None}
    assert missing <= {
        "chat4_all", "own_read", "own_answer", "own_draw_atoms", "text_perplexity_ratio",
        "read_noto_exact",
    }  # fmt: skip
    assert found["comparable"] is False and len(found["test_hash"]) == 64
    json.dumps(found, allow_nan=False)


def test_a_stopped_evaluation_goes_on_to_the_same_figures(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kept.jsonl"
    whole = json.dumps(evaluate(Exam(run, count=COUNT, kept=path), SOME))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: len(lines) // 2]) + lines[-1][:20])
    assert json.dumps(evaluate(Exam(run, count=COUNT, kept=path), SOME)) == whole

    def no_more(*_: object, **__: object) -> None:
        raise AssertionError("nothing is left to make")

    again = Exam(run, count=COUNT, kept=path)
    monkeypatch.setattr(again.pipe, "caption", no_more)
    monkeypatch.setattr(again.pipe, "paint", no_more)
    assert json.dumps(evaluate(again, SOME)) == whole
    assert Exam(run, count=COUNT, seed=1, kept=path).kept.found == {}


def test_drawings_are_the_pipelines(run: Path) -> None:
    one = Exam(run, count=2, seed=3)
    words = [prompt_of(one, "test", item) for item in range(2)]
    assert words[0] == prompt(one.scene("test", 0), one.rng(0), full=True)
    one.needs("pixels")
    pairs = zip(words, one.seeds(range(2)), strict=True)
    usual = [one.pipe.draw(text, seed=seed) for text, seed in pairs]
    assert [picture.tobytes() for picture in drawings(one, "test")] == [
        picture.tobytes() for picture in usual
    ]


def test_a_drawing_that_shows_its_scene_is_right(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Exam(run, count=4)

    def look(scene: Scene) -> judge.Seen:
        things = tuple(
            judge.SeenThing(thing.name, thing.colour, thing.size, thing.box, "flat", 1.0)
            for thing in scene.things
        )
        return judge.Seen(scene.background, scene.pattern, things)

    seen = [look(one.scene("test", n)) for n in range(4)]
    one.cache["seen", "draw test"] = seen
    one.cache["seen", "reconstruct test"] = [replace(seen[0], things=()), *seen[1:]]
    figure = draw_all(one, "test")
    assert figure.value == 1 and figure.floor[1] == 0 and figure.ceiling[1] == 0.75
    assert figure.details["of_1"] == 1 and figure.details["wrong_things"] == 0


def test_a_part_that_is_missing_gives_no_figure_and_no_crash(run: Path) -> None:
    shutil.rmtree(run / "pixels")
    one = Exam(run, count=2)
    found = evaluate(one, figures={name: FIGURES[name] for name in ("draw_test_all", "kept_share")})
    assert found["figures"]["draw_test_all"] == {
        "value": None, "low": None, "high": None, "count": 0, "floor": None, "ceiling": None,
        "reason": "this model has no pixels yet",
    }  # fmt: skip
    assert found["figures"]["kept_share"]["value"] > 0
    with pytest.raises(
        InputError, match="draw_test_all cannot be had: this model has no pixels yet"
    ):
        evaluate(Exam(run, count=2), ["draw_test_all"])


def test_other_weights_are_other_predictions(run: Path) -> None:
    before = weights_hash(run)
    assert before == weights_hash(run)
    path = run / "pixels" / "condition" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert weights_hash(run) != before


def test_the_rules_are_the_trainings_unless_they_are_given(run: Path) -> None:
    assert rules_of(run) == Rules()
    origin = {"scenes": {"objects": 96, "held_out_pairs": 0.2, "seed": 1}}
    (run / "training.json").write_text(json.dumps({"data": "gone", "origin": origin}))
    assert rules_of(run) == Rules(objects=96, held_out_pairs=0.2)
    assert rules_of(run, 48, 0.1) == Rules()
    (run / "origin.json").write_text(json.dumps(origin))
    assert is_scenes(str(run)) and is_scenes(f"{run}:0.5,other") and is_scenes("scenes")
    assert not is_scenes("pictures,prose:0.2")


def test_bad_input_is_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "language")
    for words, said in (
        (["--figures", "nope"], "there is no figure 'nope': choose from read_test_exact"),
        (["--count", "-1"], "count is -1"),
        (["--count", "0"], "count is 0"),
        (["--seed", "-1"], "seed is -1"),
        (["--objects", "1"], "scenes have 3 to"),
        (["--held-out-pairs", "2"], "held_out_pairs is 2"),
        (["--figures", "own_read"], "own_read cannot be had: no items were given"),
        (["--figures", "read_test_exact", "--count", "2"], "this model has no language yet"),
        (["--items", str(tmp_path / "none.jsonl")], "none.jsonl cannot be read"),
        (["--json", "."], ". is a folder"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["eval", str(run), "--data", "scenes", *words])
        assert stopped.value.code == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("lavit: ") and said in last


def test_the_command_writes_what_it_prints(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.json"
    words = [
        "eval",
        str(run),
        "--data",
        "scenes",
        "--count",
        "2",
        "--figures",
        "kept_share,read_test_exact",
    ]
    main([*words, "--json", str(out)])
    first = out.read_bytes()
    found = json.loads(first)
    assert list(found["figures"]) == ["read_test_exact", "kept_share"]
    printed = capsys.readouterr().out
    assert "kept_share" in printed and "NOT COMPARABLE" in printed
    assert (tmp_path / "figures.predictions.jsonl").exists()
    main([*words, "--json", str(out)])
    assert out.read_bytes() == first


def test_a_plain_world_is_described_in_words_that_training_has(run: Path) -> None:
    """They were worded freely, and rates of studies were chosen by words never learnt."""
    plain = Exam(run, count=COUNT, rules=Rules(24, plain=True))
    for item in range(COUNT):
        scene = plain.scene("pairs", item)
        said = described(scene, np.random.default_rng(item), plain.rules).texts
        assert reading.told(plain, scene, item) in said


def test_words_of_a_minimal_pair_differ_in_one_name() -> None:
    rules = Rules(24, plain=True)
    for item in range(60):
        scene = scene_at("pairs", item, rules=rules)
        other = renamed(scene, rules, np.random.default_rng(item))
        pairs = zip(scene.things, other.things, strict=True)
        changed = {(one.name, two.name) for one, two in pairs if one != two}
        assert len(changed) == 1 and len(other.names) == len(scene.names)
        (before, after), = changed  # fmt: skip
        assert before != after and after not in scene.names
        assert (before in SHAPES) == (after in SHAPES)
        kept = [name for name in scene.names if name != before]
        kinds = [one for one in (SHAPES if before in SHAPES else rules.objects_named)
                 if one not in scene.names]  # fmt: skip
        strange = {one for one in kinds if any(rules.pair_of(one, k) != "train" for k in kept)}
        assert not strange or after in strange  # both pairs are unseen
        assert all(replace(two, name=one.name) == one for one, two in zip(
            scene.things, other.things, strict=True))  # fmt: skip


def test_nano_finds_codes_likelier_behind_their_own_prompt() -> None:
    nano = Exam("nano", count=8)
    found = write_minimal_pairs(nano)
    assert found.value == 1 and found.floor == ("a guess", 0.5)
    codes = nano.true_codes("pairs")
    nano.true_codes = lambda split: codes[4:] + codes[:4]  # type: ignore[method-assign]
    assert write_minimal_pairs(nano).value < 1  # other pictures' codes say nothing of the pair


@pytest.fixture
def items(tmp_path: Path) -> Path:
    """One item of each kind."""
    toy_picture(NAMES[0]).save(tmp_path / "a.png")
    scene = {
        "background": "blue", "pattern": "plain", "style": "twemoji",
        "things": [{"name": "star", "colour": "red", "size": "small", "cell": [0, 1]}],
    }  # fmt: skip
    lines = [
        {"kind": "read", "pictures": ["a.png"], "facts": "a small red square"},
        {"kind": "read", "scene": scene},
        {"kind": "ask", "scene": scene, "question": "how many stars are there?",
         "answers": ["one"]},
        {"kind": "draw", "prompt": "a red star", "facts": "a red star"},
        {"kind": "edit", "pictures": "a.png", "prompt": "remove the square",
         "facts": "nothing on a white background"},
        {"kind": "chat", "turns": [
            {"text": "what is this?", "pictures": ["a.png"], "answers": "a square"},
            {"text": "draw a red star", "facts": "a red star"},
        ]},
    ]  # fmt: skip
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return path


def test_items_of_ones_own_are_judged(run: Path, items: Path) -> None:
    one, asked = Exam(run, count=2), []

    def chat(messages: list[dict], *, out: str, seed: int) -> dict:
        asked.append((len(messages), out))
        part = {"type": "image", "image": Image.new("RGB", (16, 16))}
        part = {"type": "text", "text": "The square."} if out == "text" else part
        return {"role": "assistant", "content": [part]}

    one.pipe.chat = chat  # the toy attends to fewer tokens than a talk has
    found = evaluate(one, ["own_read", "own_answer", "own_draw_atoms"], items=items)["figures"]
    assert {name: figure["count"] for name, figure in found.items()} == {
        "own_read": 2, "own_answer": 2, "own_draw_atoms": 3,
    }  # fmt: skip
    assert asked == [(1, "text"), (3, "image")]
    assert found["own_answer"]["value"] == 0.5  # "the square" is a square
    # the judge sees an empty white picture, and one item of three asks for that
    assert found["own_draw_atoms"]["value"] == pytest.approx(1 / 3)


def test_answers_about_another_picture_of_the_same_name_are_not_kept(
    run: Path, items: Path
) -> None:
    one = Exam(run, count=2)
    before = own._task(load_items(items), "ask")
    assert own._task(load_items(items), "ask") == before
    toy_picture("blue bar").save(items.parent / "a.png")
    assert own._task(load_items(items), "ask") != before and one.count == 2


def test_figures_compare_where_training_kept_to_the_rules(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        frozen, "frozen", lambda rules: {s: frozen.split_hash(s, rules) for s in frozen.MEASURING}
    )
    said = json.loads((run / "training.json").read_text())
    rules = {"objects": 48, "held_out_pairs": 0.1}
    for scenes, expected in (
        (None, False),
        ({"objects": 48, "held_out_pairs": 0.1}, True),
        ({"objects": 48, "held_out_pairs": 0.0}, False),  # it has seen every pair
        ({"objects": 48, "held_out_pairs": 0.1, "split": "test"}, False),
        (rules | {"others": [{"texts": "of packages"}, {"scenes": rules}]}, True),
        (rules | {"others": ["somebody's folder"]}, False),
        (rules | {"others": [{"scenes": rules | {"split": "pairs"}}]}, False),
        (rules | {"others": [{"scenes": rules | {"held_out_pairs": 0.0}}]}, False),
    ):
        origin = {} if scenes is None else {"scenes": scenes, "others": scenes.pop("others", [])}
        origin = {"origin": origin} if origin else {}
        (run / "training.json").write_text(json.dumps(said | origin))
        exam = Exam(run, count=1, rules=Rules(objects=48, held_out_pairs=0.1))
        assert evaluation.test_hash(exam)["comparable"] is expected


def test_a_split_without_scenes_is_missing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "TRIES", 20)
    every = Exam(run, count=1, rules=Rules(held_out_pairs=0.0))
    with pytest.raises(Missing, match="no scene of the split 'pairs'"):
        every.scene("pairs", 0)


def test_a_scene_that_is_written_out_has_its_facts(items: Path) -> None:
    known = load_items(items)
    (turn,) = known[1].turns
    assert isinstance(turn.pictures[0], Scene) and turn.facts == facts(turn.pictures[0])
    assert [item.kind for item in known] == ["read", "read", "ask", "draw", "edit", "chat"]


def written(name: str, colour: str | None) -> str:
    """An item whose scene holds one thing."""
    things = [{"name": name, "colour": colour, "cell": [0, 0]}]
    ground = {"background": "blue", "pattern": "plain", "style": "twemoji"}
    return json.dumps({"kind": "read", "scene": {**ground, "things": things}})


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "Expecting"),
        ("[]", "an item is an object"),
        ('{"kind": "sing"}', "kind is 'sing'"),
        ('{"kind": "ask", "pictures": ["a.png"], "answers": ["x"]}', "no 'question'"),
        ('{"kind": "ask", "pictures": ["a.png"], "question": "what?"}', "needs answers"),
        ('{"kind": "read", "pictures": ["b.png"], "facts": "an owl"}', "b.png.* does not exist"),
        (
            '{"kind": "draw", "prompt": "an owl", "facts": "something nice"}',
            "is not a sentence about a scene",
        ),
        ('{"kind": "draw", "prompt": 3, "facts": "an owl"}', "3 is not a text"),
        ('{"kind": "read", "scene": {"background": "mauve"}}', "background is 'mauve'"),
        ('{"kind": "edit", "pictures": ["a.png"], "prompt": "remove it"}', "needs facts"),
        ('{"kind": "read", "scene": "blue"}', "a scene is an object"),
        (written("wombat", None), "no thing 'wombat'"),
        (written("star", None), "no thing 'star' with colour None"),
        (written("star", "mauve"), "no thing 'star' with colour 'mauve'"),
    ],
)
def test_a_bad_item_is_named_by_its_line(items: Path, line: str, said: str) -> None:
    good = items.read_text().splitlines()[0]
    items.write_text(f"{good}\n{line}\n")
    with pytest.raises(InputError, match=f"line 2: .*{said}"):
        load_items(items)


def test_a_missing_font_is_a_reason(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def render(scene: Scene, size: int) -> Image.Image:
        if scene.style == "noto":
            raise InputError("no font")
        return Image.new("RGB", (size, size))

    monkeypatch.setattr(exam, "render", render)
    one = Exam(run, count=1)
    with pytest.raises(Missing, match="no font"):
        FIGURES["read_noto_exact"](one)


def test_figures_come_in_their_usual_order() -> None:
    assert chosen(["kept_share", "answer_test"], FIGURES) == ["answer_test", "kept_share"]
    assert chosen([], FIGURES) == NAMED
    assert predictions_path(Path("m"), None) == Path("m/evaluation/predictions.jsonl")


def test_all_replies_of_a_conversation_must_be_right(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Exam(run, count=3)
    with pytest.raises(Missing, match="was not trained on conversations"):
        FIGURES["chat4_all"](one)
    one.trained["training"]["language"]["mixture"]["conversation"] = 1.0
    talks = conversing.chat_items(one)
    turn = {}

    def chat(messages: list[list[dict]], *, out: str, seed: list[int]) -> list[dict]:
        given = []
        for talk in messages:
            number = turn.setdefault(id(talk), len(turn))
            wanted = talks[number].messages[len(talk)].parts[0]
            assert isinstance(wanted, Scene) == (out == "image")
            picture = {"type": "image", "image": Image.new("RGB", (8, 8))}
            part = {"type": "text", "text": wanted} if out == "text" else picture
            given.append({"role": "assistant", "content": [part]})
        return given

    one.pipe.chat = chat
    monkeypatch.setattr(judge, "all_right", lambda said, seen: True)
    assert FIGURES["chat4_all"](one).value == 1
    monkeypatch.setattr(judge, "all_right", lambda said, seen: False)
    drawn = [any(isinstance(m.parts[0], Scene) for m in talk.messages[1::2]) for talk in talks]
    assert FIGURES["chat4_all"](one).value == pytest.approx(1 - sum(drawn) / 3)


def test_what_is_chosen_is_chosen_on_valid_splits(run: Path) -> None:
    usual, choosing = Exam(run, count=COUNT), Exam(run, count=COUNT, valid=True)
    splits = ("test", "pairs", "ladder")
    for split, other in zip(splits, ("valid", "valid_pairs", "valid_ladder"), strict=True):
        assert choosing.scene(split, 1) == scene_at(other, 1) != usual.scene(split, 1)
    found = evaluate(choosing, ["read_pairs_exact", "edit_test_all", "ladder_blank"])
    assert found["valid"] and found["test_hash"] is None and not found["comparable"]
    with pytest.raises(InputError, match="read_binding_exact cannot be had: nothing is chosen by"):
        evaluate(choosing, ["read_binding_exact"])


def test_tokens_of_the_shipped_model_follow_content_outside_its_data() -> None:
    """A blank picture takes next to none; things beyond the four of training take more."""
    pipe = lavit.load("nano")
    size, patches = pipe.model.config.vision.image_size, pipe.model.config.vision.patches
    blank = [Image.new("RGB", (size, size), colour) for colour in ("white", "teal", "black")]
    assert max(pipe.tokenize(blank).lengths) <= 0.03 * patches
    lengths: dict[int, list[int]] = {}
    for index in range(40):
        scene = scene_at("ladder", index)
        length = int(pipe.tokenize(render(scene, size)).lengths[0])
        lengths.setdefault(len(scene.things), []).append(length)
    means = [float(np.mean(lengths[things])) for things in (0, 2, 4, 6, 8)]
    assert means == sorted(set(means)) and means[-1] > 2 * means[1]

"""Toy copies of each benchmark in its published layout give the score worked out by hand."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import toy_picture
from lavit.cli import main
from lavit.config import InputError
from lavit.evaluate.benchmarks import image_metrics
from lavit.evaluate.benchmarks.answer_metrics import exact_match, made_alike, vqa_accuracy
from lavit.evaluate.benchmarks.caption_metrics import (
    bleu,
    bleu_counts,
    caption_words,
    cider,
    rouge_l,
)
from lavit.evaluate.benchmarks.geneval2 import geneval2_figures
from lavit.evaluate.benchmarks.image_metrics import (
    frechet_distance,
    kernel_distances,
    squared_mmd,
)
from lavit.evaluate.benchmarks.layouts import BENCHMARKS, load_examples
from lavit.evaluate.benchmarks.run import Row, RowSettings
from lavit.evaluate.kept import Kept

PICTURES = ("red square", "blue dot", "green bar")


def saved(folder: Path, *names: str) -> None:
    """Pictures of a benchmark."""
    folder.mkdir(parents=True)
    for name, shown in zip(names, PICTURES, strict=False):
        toy_picture(shown).save(folder / name)


def write(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


CAPTIONS = (["a red dog"], ["the blue cat runs"])
SAID = ["A red dog.", "a cat"]
PEOPLE = (["yes"] * 10, ["two"] * 2 + ["2"] + ["3"] * 7)
ANSWERED = ["yes", "Two."]


def karpathy(folder: Path, file: str, pictures: str, **place: str) -> None:
    names = ("COCO_val2014_000000000042.jpg", "COCO_val2014_000000000073.jpg")
    saved(folder / pictures, *names)
    test = [
        {"filename": name, "split": "test", **place, "sentences": [{"raw": t} for t in texts]}
        for name, texts in zip(names, CAPTIONS, strict=True)
    ]
    other = {"filename": "none.jpg", "split": "train", **place, "sentences": [{"raw": "no"}]}
    write(folder / file, {"images": [other, *test], "dataset": "coco"})


def coco_vqa(folder: Path, before: str) -> None:
    saved(folder / "val2014", "COCO_val2014_000000000042.jpg", "COCO_val2014_000000000073.jpg")
    questions = [
        {"question_id": 420, "image_id": 42, "question": "Is it red?"},
        {"question_id": 730, "image_id": 73, "question": "How many dots?"},
    ]
    answers = [
        {
            "question_id": number,
            "answer_type": kind,
            "answers": [{"answer": said, "answer_id": n} for n, said in enumerate(people, 1)],
        }
        for number, kind, people in zip((420, 730), ("yes/no", "number"), PEOPLE, strict=True)
    ]
    write(folder / f"{before}OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    write(folder / f"{before}mscoco_val2014_annotations.json", {"annotations": answers[::-1]})


def make(name: str, folder: Path) -> None:
    """A toy copy of a benchmark as it is downloaded."""
    if name == "coco_caption":
        karpathy(folder, "dataset_coco.json", "val2014", filepath="val2014")
    elif name == "flickr30k":
        karpathy(folder, "dataset_flickr30k.json", "flickr30k-images")
    elif name == "nocaps":
        saved(folder / "val", "0013ea.jpg", "00aa.jpg")
        domains = ("in-domain", "out-domain")
        images = [
            {"id": n, "file_name": file, "domain": domain, "open_images_id": file[:-4]}
            for n, (file, domain) in enumerate(
                zip(("0013ea.jpg", "00aa.jpg"), domains, strict=True)
            )
        ]
        texts = [{"id": n, "image_id": n, "caption": c[0]} for n, c in enumerate(CAPTIONS)]
        write(folder / "nocaps_val_4500_captions.json", {"images": images, "annotations": texts})
    elif name in ("vqav2", "okvqa"):
        coco_vqa(folder, "v2_" if name == "vqav2" else "")
    elif name == "vizwiz":
        files = ("VizWiz_val_00000000.jpg", "VizWiz_val_00000001.jpg")
        saved(folder / "val", *files)
        rows = [
            {
                "image": file,
                "question": "What is it?",
                "answerable": 1,
                "answer_type": "other",
                "answers": [{"answer": said, "answer_confidence": "yes"} for said in people],
            }
            for file, people in zip(files, PEOPLE, strict=True)
        ]
        write(folder / "Annotations" / "val.json", rows)
    elif name == "gqa":
        saved(folder / "images", "n1.jpg", "n2.jpg")
        rows = {
            "201": {"imageId": "n1", "question": "Which side?", "answer": "left"},
            "202": {"imageId": "n2", "question": "Is it blue?", "answer": "yes"},
        }
        write(folder / "testdev_balanced_questions.json", rows)
    elif name == "coco_image":
        files = [f"COCO_val2014_{n:012d}.jpg" for n in (1, 2, 3)]
        saved(folder / "val2014", *files)
        images = [{"id": n, "file_name": file} for n, file in enumerate(files, 1)]
        texts = [{"image_id": n, "caption": shown} for n, shown in enumerate(PICTURES, 1)]
        write(
            folder / "annotations" / "captions_val2014.json",
            {"images": images, "annotations": texts},
        )
    else:
        lines = [{"tag": "colors", "prompt": f"a photo of a {shown}"} for shown in PICTURES[:2]]
        folder.mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "evaluation_metadata.jsonl").write_text(text)


# by hand: the first caption is its reference, which has no four words: 3/4 of 1000. The second
# shares "cat" of 2 and 4 words that no other picture has: 1 / (sqrt 2 * 2) on one of four orders,
# and is two pairs of words shorter
CIDER = (750.0, 1000 / 4 / (2 * math.sqrt(2)) * math.exp(-4 / 72))
# 4 of 5 words right, 5 words for 7
BLEU_1 = 100 * 0.8 * math.exp(1 - 7 / 5)
# second: precision 1/2, recall 1/4
ROUGE = (100.0, 100 * 2.44 * 0.125 / (0.25 + 1.44 * 0.5))
# second: three people said two, so one of them finds 2 of the other nine, the seven others 3
VQA = (100.0, 100 * (3 * 2 / 3 + 7) / 10)

BY_HAND: dict[str, tuple[list[str], dict[str, float]]] = {
    **dict.fromkeys(
        ("coco_caption", "flickr30k", "nocaps"),
        (
            SAID,
            {"cider": sum(CIDER) / 2, "bleu_1": BLEU_1, "bleu_4": 0.0, "rouge_l": sum(ROUGE) / 2},
        ),
    ),
    **dict.fromkeys(("vqav2", "okvqa", "vizwiz"), (ANSWERED, {"vqa_accuracy": sum(VQA) / 2})),
    "gqa": (["Left.", "no"], {"exact_match": 50.0}),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_each_benchmark_gives_the_score_worked_out_by_hand(
    name: str, toy_run: Path, tmp_path: Path
) -> None:
    make(name, tmp_path / "data")
    row = Row(toy_run, name, tmp_path / "data", RowSettings(), tmp_path / "kept.jsonl")
    said, wanted = BY_HAND[name]
    # predictions that a run made before it was killed
    Kept(tmp_path / "kept.jsonl", row.key).made(name, [0, 1], lambda _: said)
    found = row.run()
    assert found is not None
    for figure, value in wanted.items():
        assert found["figures"][figure]["value"] == pytest.approx(value, rel=1e-5), figure
    assert found["paper"]["LaVIT"] == BENCHMARKS[name].paper[0]
    if name == "nocaps":  # alone, a picture's words are in every picture: they weigh nothing
        assert found["figures"]["cider_in_domain"]["value"] == 0
    if name == "vqav2":
        details = found["figures"]["vqa_accuracy"]["details"]
        assert details == {"number": pytest.approx(VQA[1]), "yes/no": 100}


def test_the_model_itself_is_run_and_its_settings_are_written(
    toy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make("vqav2", tmp_path / "data")
    out = tmp_path / "row.json"
    command = ["eval", str(toy_run), "--task", "vqav2", "--data", str(tmp_path / "data")]
    main([*command, "--json", str(out)])
    row = json.loads(out.read_text())
    said = capsys.readouterr().out
    assert "Question: {question} Answer:" in said and "vqa_accuracy" in said
    assert row["protocol"]["sampling"]["beams"] == 5
    assert row["protocol"]["picture"] == "squashed to 32 px, bicubic, no crop"
    assert {"seed", "code_hash", "weights_hash", "data_hash", "versions"} <= row.keys()
    kept = (tmp_path / "row.predictions.jsonl").read_text()
    main([*command, "--json", str(out)])  # nothing is made again
    assert (tmp_path / "row.predictions.jsonl").read_text() == kept
    assert json.loads(out.read_text()) == row


def predictions(path: Path) -> dict[int, Any]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["item"]: row["made"] for row in rows}


def test_batches_change_no_prediction(toy_run: Path, tmp_path: Path) -> None:
    make("coco_caption", tmp_path / "data")
    found = []
    for batch in (32, 1):
        path = tmp_path / f"{batch}.jsonl"
        Row(toy_run, "coco_caption", tmp_path / "data", RowSettings(batch=batch), path).run()
        found.append(predictions(path))
    assert found[0] == found[1] and len(found[0]) == 2


def test_ranks_share_the_work(
    toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("okvqa", tmp_path / "data")

    def run(file: str) -> dict[str, Any] | None:
        return Row(toy_run, "okvqa", tmp_path / "data", RowSettings(batch=1), tmp_path / file).run()

    alone = run("alone.jsonl")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run("shared.jsonl") is None
    monkeypatch.setenv("RANK", "0")
    assert run("shared.jsonl") == alone
    files = [tmp_path / "shared.jsonl", tmp_path / "shared.1.jsonl"]
    assert [list(predictions(file)) for file in files] == [[0], [1]]


class Colours(torch.nn.Module):
    """Stands where Inception does: the mean colour of each picture."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return images.float().mean(dim=(2, 3)) / 255


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "colours.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(Colours()), str(path))
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of a few weights, with a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("clip")
    words = ["<pad>", "<end>", *sorted({word for name in PICTURES for word in name.split()})]
    ids = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<end>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "projection_dim": 8}  # fmt: skip
    text = {**small, "vocab_size": len(words), "max_position_embeddings": 8, "eos_token_id": 1}
    text |= {"pad_token_id": 0, "bos_token_id": 1}
    vision = {**small, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    return folder


def test_pictures_are_drawn_chosen_by_clip_and_compared(
    toy_run: Path, tmp_path: Path, inception: Path, clip: Path
) -> None:
    from PIL import Image

    make("coco_image", tmp_path / "data")
    settings = RowSettings(inception=inception, clip=clip, batch=2)
    found = Row(toy_run, "coco_image", tmp_path / "data", settings, tmp_path / "k.jsonl").run()
    assert found is not None
    assert found["protocol"]["candidates"] == 4
    drawn = sorted((tmp_path / "k.pictures").glob("*.png"))
    assert [path.name for path in drawn] == ["1.png", "2.png", "3.png"]

    def colours(paths: list[Path]) -> np.ndarray:
        squares = [image_metrics.centre_square(Image.open(p).convert("RGB"), 256) for p in paths]
        return np.stack([np.asarray(square).mean((0, 1)) / 255 for square in squares])

    real = colours(sorted((tmp_path / "data" / "val2014").glob("*.jpg")))
    fid = frechet_distance(colours(drawn), real)
    assert found["figures"]["fid"]["value"] == pytest.approx(fid, rel=1e-3)
    scores = [row["clip"] for row in predictions(tmp_path / "k.jsonl").values()]
    assert found["figures"]["clip_score"]["value"] == pytest.approx(np.mean(scores))
    # the best of four is at least as good as the first of them
    model = image_metrics.Clip(clip, torch.device("cpu"))
    import lavit

    pipe = lavit.load(toy_run, protocol="paper")
    first = pipe.draw(list(PICTURES), seed=[0, 1, 2], best_of=1)
    assert all(
        best >= one - 1e-4 for best, one in zip(scores, model.scores(PICTURES, first), strict=True)
    )


def test_geneval_gets_the_folders_it_reads(toy_run: Path, tmp_path: Path) -> None:
    make("geneval", tmp_path / "data")
    out = tmp_path / "samples"
    settings = RowSettings(out=out)
    Row(toy_run, "geneval", tmp_path / "data", settings, tmp_path / "kept.jsonl").run()
    files = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    one = ["metadata.jsonl", *(f"samples/{n:04d}.png" for n in range(4))]
    assert files == [f"{number:05d}/{file}" for number in range(2) for file in one]
    metadata = json.loads((out / "00001" / "metadata.jsonl").read_text())
    assert metadata == {"tag": "colors", "prompt": "a photo of a blue dot"}


def atoms_line(prompt: str, *atoms: tuple[str, str, str]) -> dict[str, Any]:
    """A line of GenEval 2's data: questions with their answers and skills."""
    asked = [[question, answer] for question, answer, _ in atoms]
    skills = [skill for _, _, skill in atoms]
    return {"prompt": prompt, "atom_count": 3, "vqa_list": asked, "skills": skills}


def test_geneval2_gets_its_files_and_the_judge_s_scores(toy_run: Path, tmp_path: Path) -> None:
    from lavit.data.scenes.render import render
    from lavit.data.scenes.world import Box, Scene, Thing

    owls = [Thing("owl", None, "small", (0, n), Box(x, 0.25, 0.25), 0.0)
            for n, x in enumerate((0.2, 0.5))]  # fmt: skip
    star = Thing("star", "red", "small", (2, 1), Box(0.35, 0.75, 0.2), 0.0)
    scene = Scene("white", "plain", "twemoji", (*owls, star))
    lines = [
        atoms_line(
            "two owls above a red star",
            ("How many owls are in the image?", "two", "count"),
            ("Are there any owls in the image?", "Yes", "object"),
            ("Are the owls above the star?", "Yes", "position"),
            ("Is the star red?", "Yes", "attribute"),
        ),
        atoms_line(
            "three sheeps and a blue star",
            ("How many sheeps are in the image?", "three", "count"),
            ("Are there any sheeps in the image?", "Yes", "object"),
            ("How many stars are in the image?", "one", "count"),
            ("Is the star blue?", "Yes", "attribute"),
        ),
        atoms_line("a wooden owl", ("Is the owl wooden?", "Yes", "attribute")),
    ]
    files = [tmp_path / f"{n}.png" for n in range(3)]
    for file in files:
        render(scene, 160).save(file)
    found = geneval2_figures(lines, files, tmp_path)
    assert found["geneval2_atoms"].value == 62.5 and found["geneval2_all"].value == 50  # 4/4, 1/4
    assert found["geneval2_atoms"].details == {
        "attribute": 50, "count": pytest.approx(200 / 3), "object": 50, "position": 100,
    }  # fmt: skip
    assert json.loads((tmp_path / "score_lists.json").read_text()) == [[1] * 4, [0, 0, 1, 0]]
    kept = [json.loads(line) for line in (tmp_path / "judged.jsonl").read_text().splitlines()]
    assert kept == lines[:2]  # the judge knows no wood

    (tmp_path / "data").mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "data" / "geneval2_data.jsonl").write_text(text)
    out = tmp_path / "drawn"
    row = Row(toy_run, "geneval2", tmp_path / "data", RowSettings(out=out), tmp_path / "k.jsonl")
    made = row.run()
    assert made["figures"]["geneval2_all"]["count"] == 2
    images = json.loads((out / "images.json").read_text())
    assert images == {line["prompt"]: str(out / f"{n:05d}.png") for n, line in enumerate(lines)}
    assert all(Path(file).is_file() for file in images.values())


def test_what_is_wrong_is_said_in_one_line(
    toy_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make("vqav2", tmp_path / "vqa")

    def refused(line: str, *arguments: str) -> None:
        with pytest.raises(SystemExit) as stop:
            main(["eval", str(toy_run), *arguments])
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert line in said and said.count("\n") == 1

    refused("no task", "--task", "vqa", "--data", str(tmp_path))
    refused("needs --data", "--task", "vqav2")
    refused("--clip is for", "--task", "vqav2", "--data", str(tmp_path / "vqa"), "--clip", "x")
    refused("belongs to a benchmark", "--clip", "x")
    with pytest.raises(InputError, match=r"/OpenEnded_mscoco_val2014_questions\.json is missing"):
        load_examples("okvqa", tmp_path / "vqa")
    (tmp_path / "vqa" / "val2014" / "COCO_val2014_000000000073.jpg").unlink()
    with pytest.raises(InputError, match=r"COCO_val2014_000000000073\.jpg is missing"):
        load_examples("vqav2", tmp_path / "vqa")
    write(tmp_path / "gqa" / "testdev_balanced_questions.json", {"1": {"question": "?"}})
    (tmp_path / "gqa" / "images").mkdir()
    with pytest.raises(InputError, match="not laid out as gqa is published: KeyError"):
        load_examples("gqa", tmp_path / "gqa")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A man's hat doesn't fit; he can't wear it.",
         "a man 's hat does n't fit he ca n't wear it"),
        ('A sign that says "STOP" on 5th St.', "a sign that says stop on 5th st."),
        ("Two dogs (one black) at 10:30!", "two dogs -lrb- one black -rrb- at 10:30"),
        ("A black-and-white T.V., 3,000 men & $5", "a black-and-white t.v. 3,000 men & $ 5"),
        ("It's O'Neil's pub at 5 o'clock, y'all", "it 's o'neil 's pub at 5 o'clock y' all"),
        ("'Twas the '90s: rock 'n' roll, ma'am!", "'t was the '90s rock 'n' roll ma'am"),
        ("Smith Bros. Inc. on 5th Ave., etc.", "smith bros. inc. on 5th ave. etc."),
        ("On Jan. 5 a 6ft. man, J. Crew", "on jan. 5 a 6ft man j. crew"),
        ("Stop!!! What?! No.", "stop !!! what ?! no"),
        ("1½ cups & a 3D R&B show", "1 1/2 cups & a 3d r&b show"),
        ("see https://a.b/c?d=e #tag @user #1", "see https://a.b/c?d=e #tag @user # 1"),
    ],
)  # fmt: skip
def test_words_are_those_of_the_treebank(text: str, words: str) -> None:
    assert caption_words(text) == words.split()


@pytest.mark.parametrize(
    ("answer", "alike"),
    [
        ("The dog.", "dog"), ("1,000", "1000"), ("red/blue", "red blue"), ("red, blue", "red blue"),
        ("dont", "don't"), ("3.5", "3.5"), ("None", "0"), ("yall'd've", "y'all'd've"),
    ],
)  # fmt: skip
def test_answers_are_made_alike(answer: str, alike: str) -> None:
    assert made_alike(answer) == alike


def test_where_people_agree_answers_are_taken_as_they_are() -> None:
    assert vqa_accuracy("the dog", ["the dog"] * 10) == 100
    assert vqa_accuracy("dog", ["the dog"] * 10) == 0
    assert vqa_accuracy("dog", ["the dog"] * 9 + ["cat"]) == 100
    assert exact_match("Left. ", "left") == 100


def test_distances_of_sets_worked_out_by_hand() -> None:
    # means 1 and 3, variances 2 and 8
    a, b = np.array([[0.0], [2.0]]), np.array([[1.0], [5.0]])
    assert frechet_distance(a, b) == pytest.approx(4 + 2 + 8 - 2 * 4)
    # (1 * 2 + 1)^3 within the first, 1 within the second and between them
    assert squared_mmd(np.array([[1.0], [2.0]]), np.zeros((2, 1))) == pytest.approx(27 + 1 - 2)


def test_frechet_distance_agrees_with_scipy() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, 6)), rng.normal(1, 2, size=(40, 6)) @ rng.normal(size=(6, 6))
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sum(covariances) - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(wanted)


def test_distances_agree_with_torchmetrics() -> None:
    kids = pytest.importorskip("torchmetrics.image.kid")
    fids = pytest.importorskip("torchmetrics.image.fid")
    rng = np.random.default_rng(0)
    a, b = rng.random((30, 8), dtype=np.float32), rng.random((30, 8), dtype=np.float32) ** 2
    warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save")
    network = torch.nn.Flatten()
    network.num_features = 8
    kid = kids.KernelInceptionDistance(network, subsets=1, subset_size=30)
    fid = fids.FrechetInceptionDistance(network, input_img_size=(1, 2, 4))
    for metric in (kid, fid):
        metric.update(torch.from_numpy(a).view(-1, 1, 2, 4), real=True)
        metric.update(torch.from_numpy(b).view(-1, 1, 2, 4), real=False)
    assert np.mean(kernel_distances(a, b)) == pytest.approx(float(kid.compute()[0]), rel=1e-3)
    assert frechet_distance(a, b) == pytest.approx(float(fid.compute()), rel=1e-3)


def test_captions_agree_with_pycocoevalcap() -> None:
    scorers = pytest.importorskip("pycocoevalcap.cider.cider")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.rouge.rouge import Rouge

    rng = np.random.default_rng(0)
    words = np.array(["a", "the", "man", "dog", "red", "ball", "plays", "on", "grass", "two"])
    texts = [
        [" ".join(rng.choice(words, rng.integers(3, 14))) for _ in range(6)] for _ in range(40)
    ]
    theirs = {n: each[1:] for n, each in enumerate(texts)}
    ours = {n: [each[0]] for n, each in enumerate(texts)}
    said = [each[0].split() for each in texts]
    references = [[text.split() for text in each[1:]] for each in texts]
    assert cider(said, references) == pytest.approx(
        100 * scorers.Cider().compute_score(theirs, ours)[1], abs=1e-6
    )
    wanted = Bleu(4).compute_score(theirs, ours, verbose=0)[0]
    counts = bleu_counts(said, references)
    assert [bleu(counts, n) for n in (1, 2, 3, 4)] == pytest.approx(100 * np.array(wanted))
    found = [rouge_l(*pair) for pair in zip(said, references, strict=True)]
    assert found == pytest.approx(100 * Rouge().compute_score(theirs, ours)[1])

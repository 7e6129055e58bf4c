"""The benchmarks' folders as they are downloaded and unpacked, read into examples.

    coco_caption   dataset_coco.json (Karpathy's splits)          val2014/
    flickr30k      dataset_flickr30k.json (the same)              flickr30k-images/
    nocaps         nocaps_val_4500_captions.json                  val/ (or images/)
    vqav2          v2_OpenEnded_mscoco_val2014_questions.json     val2014/
                   v2_mscoco_val2014_annotations.json
    okvqa          OpenEnded_mscoco_val2014_questions.json        val2014/
                   mscoco_val2014_annotations.json
    vizwiz         Annotations/val.json (or val.json)             val/
    gqa            testdev_balanced_questions.json                images/
    coco_image     annotations/captions_val2014.json              val2014/
    geneval        evaluation_metadata.jsonl                      no pictures
    geneval2       geneval2_data.jsonl                            no pictures

Files of questions may lie in `annotations/`, `Annotations/` or `questions1.2/` too. Whatever is
missing is named before a model is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lavit.config import InputError

DRAWN = 30_000  # captions of `coco_image`
BELOW = ("", "annotations", "Annotations", "questions1.2")  # where files of questions may lie
TaskKind = Literal["caption", "vqa", "match", "picture", "export", "atoms"]


@dataclass(frozen=True)
class Example:
    """One item of a benchmark."""

    name: str  # as the benchmark numbers it
    image: Path | None  # what is read, or whose caption is drawn
    references: tuple[str, ...] = ()  # captions, or what people answered
    text: str = ""  # the question, or the words to draw
    group: str = ""  # NoCaps' domain, VQA's kind of answer
    raw: Any = None  # the line of GenEval or GenEval 2


@dataclass(frozen=True)
class Benchmark:
    """One row of the paper's table."""

    kind: TaskKind
    split: str
    read: Callable[[Folder], Iterable[Example]]
    paper: tuple[float, ...] = ()  # of LaVIT (LLaMA-1), v1 and v2 (LLaMA-2)


class Folder:
    """A benchmark's folder; what is asked of it is checked, and its files are hashed."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise InputError(f"there is no folder {path}: give the one a benchmark is unpacked in")
        self.path = path
        self.digest = hashlib.sha256()

    def json(self, *names: str) -> Any:
        """A JSON file of one of these names."""
        data = self._bytes(names)
        try:
            return json.loads(data)
        except ValueError as error:
            raise InputError(f"{self.path / names[0]} is not JSON ({error})") from error

    def lines(self, *names: str) -> list[Any]:
        """A file of JSON lines."""
        try:
            return [json.loads(line) for line in self._bytes(names).splitlines() if line.strip()]
        except ValueError as error:
            raise InputError(f"{self.path / names[0]} is not of JSON lines ({error})") from error

    def _bytes(self, names: tuple[str, ...]) -> bytes:
        for name in names:
            for below in BELOW:
                if (path := self.path / below / name).is_file():
                    data = path.read_bytes()
                    self.digest.update(data)
                    return data
        raise InputError(f"{self.path / names[0]} is missing: is this the folder as downloaded?")

    def pictures(self, *names: str) -> Path:
        """The folder of pictures, by one of these names."""
        for name in names:
            if (path := self.path / name).is_dir():
                return path
        raise InputError(f"{self.path / names[0]}/ is missing: unpack the pictures there")


def _karpathy(name: str, *pictures: str) -> Callable[[Folder], Iterable[Example]]:
    """The test split of a file of Karpathy's; `filepath` is the folder of a picture, if given."""

    def read(folder: Folder) -> Iterable[Example]:
        for image in folder.json(name)["images"]:
            if image["split"] == "test":
                below = folder.pictures(image["filepath"] if "filepath" in image else pictures[0],
                                        *pictures)  # fmt: skip
                said = tuple(sentence["raw"] for sentence in image["sentences"])
                yield Example(image["filename"], below / image["filename"], said)

    return read


def _nocaps(folder: Folder) -> Iterable[Example]:
    data = folder.json("nocaps_val_4500_captions.json")
    below = folder.pictures("val", "images", "validation")
    said = _grouped(data["annotations"], "image_id", lambda one: one["caption"])
    for image in data["images"]:
        domain = image.get("domain", "")
        place = below / Path(image["file_name"]).name
        yield Example(str(image["id"]), place, said[image["id"]], group=domain)


def _vqa(questions: str, annotations: str) -> Callable[[Folder], Iterable[Example]]:
    def read(folder: Folder) -> Iterable[Example]:
        asked = folder.json(questions)["questions"]
        told = {one["question_id"]: one for one in folder.json(annotations)["annotations"]}
        below = folder.pictures("val2014")
        for one in asked:
            if one["question_id"] not in told:
                raise InputError(f"{annotations} has no answers to question {one['question_id']}")
            answers = told[one["question_id"]]
            people = tuple(answer["answer"] for answer in answers["answers"])
            image = below / f"COCO_val2014_{one['image_id']:012d}.jpg"
            group = answers.get("answer_type", "")
            yield Example(str(one["question_id"]), image, people, one["question"], group)

    return read


def _vizwiz(folder: Folder) -> Iterable[Example]:
    below = folder.pictures("val")
    for one in folder.json("val.json"):
        people = tuple(answer["answer"] for answer in one["answers"])
        group = one.get("answer_type", "")
        yield Example(one["image"], below / one["image"], people, one["question"], group)


def _gqa(folder: Folder) -> Iterable[Example]:
    below = folder.pictures("images")
    for number, one in folder.json("testdev_balanced_questions.json").items():
        image = below / f"{one['imageId']}.jpg"
        yield Example(number, image, (one["answer"],), one["question"])


def _coco_image(folder: Folder) -> Iterable[Example]:
    """One caption of each of 30,000 pictures, drawn once and for all."""
    data = folder.json("captions_val2014.json")
    below = folder.pictures("val2014")
    said = _grouped(data["annotations"], "image_id", lambda one: one["caption"])
    images = sorted((one for one in data["images"] if one["id"] in said), key=lambda i: i["id"])
    rng = np.random.default_rng(0)
    for place in sorted(rng.permutation(len(images))[:DRAWN].tolist()):
        image = images[place]
        captions = said[image["id"]]
        text = captions[int(rng.integers(len(captions)))].strip()
        yield Example(str(image["id"]), below / image["file_name"], (text,), text)


def _geneval(folder: Folder) -> Iterable[Example]:
    for number, line in enumerate(folder.lines("evaluation_metadata.jsonl")):
        yield Example(f"{number:05d}", None, text=line["prompt"], group=line["tag"], raw=line)


def _geneval2(folder: Folder) -> Iterable[Example]:
    for number, line in enumerate(folder.lines("geneval2_data.jsonl")):
        atoms = line["vqa_list"]
        if not atoms or len(atoms) != len(line["skills"]) or {len(atom) for atom in atoms} != {2}:
            raise InputError(f"prompt {number} has not a skill and an answer for each question")
        answers = tuple(answer for _, answer in atoms)
        yield Example(f"{number:05d}", None, answers, line["prompt"], str(line["atom_count"]), line)


def _grouped(
    rows: Iterable[Mapping[str, Any]], key: str, value: Callable[[Mapping[str, Any]], str],
) -> dict[Any, tuple[str, ...]]:  # fmt: skip
    found: dict[Any, list[str]] = {}
    for row in rows:
        found.setdefault(row[key], []).append(value(row))
    return {one: tuple(values) for one, values in found.items()}


_COCO_VQA = ("OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json")
BENCHMARKS: Mapping[str, Benchmark] = {
    "coco_caption": Benchmark(
        "caption", "Karpathy test", _karpathy("dataset_coco.json", "val2014"), (134.0, 134.6, 133.3)
    ),
    "nocaps": Benchmark("caption", "val", _nocaps, (114.2, 113.1, 112.0)),
    "flickr30k": Benchmark(
        "caption",
        "Karpathy test",
        _karpathy("dataset_flickr30k.json", "flickr30k-images", "flickr30k_images"),
        (83.0, 83.2, 81.4),
    ),
    "vqav2": Benchmark(
        "vqa", "val2014", _vqa(*(f"v2_{name}" for name in _COCO_VQA)), (66.0, 68.2, 68.3)
    ),
    "okvqa": Benchmark("vqa", "val2014", _vqa(*_COCO_VQA), (54.6, 55.7, 55.9)),
    "vizwiz": Benchmark("vqa", "val", _vizwiz, (38.5, 45.3, 41.0)),
    "gqa": Benchmark("match", "testdev balanced", _gqa, (46.8, 48.0, 47.9)),
    "coco_image": Benchmark("picture", "val2014, 30k captions", _coco_image, (7.4, 7.2, 7.1)),
    "geneval": Benchmark("export", "553 prompts", _geneval),
    "geneval2": Benchmark("atoms", "800 prompts", _geneval2),
}


def benchmark(name: str) -> Benchmark:
    """The benchmark of a name; an unknown one raises `InputError`."""
    if name not in BENCHMARKS:
        raise InputError(f"there is no task {name!r}: choose from {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def load_examples(name: str, data: Path, count: int | None = None) -> tuple[list[Example], str]:
    """The examples of a benchmark's folder and a hash of them; `count` of them, drawn evenly.

    Raises `InputError` for files that are missing or of another form.
    """
    known, folder = benchmark(name), Folder(data)
    try:
        found = list(known.read(folder))
    except (KeyError, TypeError, AttributeError) as error:
        said = f"{data} is not laid out as {name} is published"
        raise InputError(f"{said}: {error!r} is missing or of another kind") from error
    if not found:
        raise InputError(f"{data} has no example of {name} ({known.split})")
    if count is not None and count < len(found):
        found = [found[n * len(found) // count] for n in range(count)]
    for example in found:
        if example.image is not None and not example.image.is_file():
            raise InputError(f"{example.image} is missing: unpack all pictures of {known.split}")
        if not example.references and known.kind != "export":
            raise InputError(f"{name} has nothing to compare {example.name} with")
    folder.digest.update(repr([example.name for example in found]).encode())
    return found, folder.digest.hexdigest()[:16]

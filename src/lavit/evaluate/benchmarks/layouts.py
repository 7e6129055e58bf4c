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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lavit.config import InputError
from lavit.evaluate.kept import Progress
from lavit.files import sha256

LONGEST = 60  # letters of a wrong value that are shown
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


class Entry:
    """One object of a file. A field of another kind raises `InputError`, one that is not there
    `KeyError`.
    """

    def __init__(self, value: Any, where: str) -> None:
        self.value, self.where = value, where
        if not isinstance(value, dict):
            raise _wrong(where, value, "an object")

    def text(self, key: str, default: str | None = None) -> str:
        """A text."""
        value = self.value[key] if default is None else self.value.get(key, default)
        return as_text(value, f"{self.where}: {key}")

    def number(self, key: str) -> int:
        """A whole number from 0."""
        value = self.value[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise _wrong(f"{self.where}: {key}", value, "a whole number")
        return value

    def file(self, key: str) -> str:
        """The name of a file, perhaps in a folder below."""
        value = self.text(key)
        if not value or Path(value).is_absolute() or ".." in Path(value).parts:
            raise _wrong(f"{self.where}: {key}", value, "the name of a file")
        return value

    def many(self, key: str) -> list[Any]:
        """A list."""
        value = self.value[key]
        if not isinstance(value, list):
            raise _wrong(f"{self.where}: {key}", value, "a list")
        return value

    def entries(self, key: str) -> list[Entry]:
        """A list of objects."""
        return [Entry(one, f"{self.where}: {key}") for one in self.many(key)]

    def texts(self, key: str, of: str) -> tuple[str, ...]:
        """A text of each object of a list."""
        return tuple(one.text(of) for one in self.entries(key))


def as_text(value: Any, where: str) -> str:
    """A value that is a text of whole characters; raises `InputError` for others."""
    if not isinstance(value, str):
        raise _wrong(where, value, "a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _wrong(where, value, "a text without halves of characters") from error
    return value


def _wrong(where: str, value: Any, wanted: str) -> InputError:
    said = repr(value)
    said = said if len(said) <= LONGEST else f"{said[:LONGEST]}…"
    return InputError(f"{where} is {said}, expected {wanted}")


class Folder:
    """A benchmark's folder; what is asked of it is checked, and its files are hashed."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise InputError(f"there is no folder {path}: give the one a benchmark is unpacked in")
        self.path = path
        self.digest = hashlib.sha256()

    def json(self, name: str) -> Any:
        """A JSON file."""
        with self._decoding(name, "JSON"):
            return json.loads(self._bytes(name))

    def entry(self, name: str) -> Entry:
        """A JSON file that is an object."""
        return Entry(self.json(name), str(self.path / name))

    def lines(self, name: str) -> list[Entry]:
        """A file of JSON lines."""
        with self._decoding(name, "of JSON lines"):
            found = [json.loads(line) for line in self._bytes(name).splitlines() if line.strip()]
        return [Entry(one, f"{self.path / name}: {n}") for n, one in enumerate(found, 1)]

    @contextmanager
    def _decoding(self, name: str, form: str) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.path / name} is not {form} ({error})") from error

    def _bytes(self, name: str) -> bytes:
        for below in BELOW:
            if (path := self.path / below / name).is_file():
                data = path.read_bytes()
                self.digest.update(data)
                return data
        raise InputError(f"{self.path / name} is missing: is this the folder as downloaded?")

    def pictures(self, *names: str) -> Path:
        """The folder of pictures, by one of these names."""
        for name in names:
            if (path := self.path / name).is_dir():
                return path
        raise InputError(f"{self.path / names[0]}/ is missing: unpack the pictures there")


def _karpathy(name: str, *pictures: str) -> Callable[[Folder], Iterable[Example]]:
    """The test split of a file of Karpathy's; `filepath` is the folder of a picture, if given."""

    def read(folder: Folder) -> Iterable[Example]:
        for image in folder.entry(name).entries("images"):
            if image.text("split") == "test":
                first = image.file("filepath") if "filepath" in image.value else pictures[0]
                file = image.file("filename")
                place = folder.pictures(first, *pictures) / file
                yield Example(file, place, image.texts("sentences", "raw"))

    return read


def _nocaps(folder: Folder) -> Iterable[Example]:
    data = folder.entry("nocaps_val_4500_captions.json")
    below = folder.pictures("val", "images", "validation")
    said = _captions(data)
    for image in data.entries("images"):
        place = below / Path(image.file("file_name")).name
        number, domain = image.number("id"), image.text("domain", "")
        yield Example(str(number), place, said[number], group=domain)


def _vqa(questions: str, annotations: str) -> Callable[[Folder], Iterable[Example]]:
    def read(folder: Folder) -> Iterable[Example]:
        asked = folder.entry(questions).entries("questions")
        told: dict[int, Entry] = {}
        for one in folder.entry(annotations).entries("annotations"):
            if told.setdefault(one.number("question_id"), one) is not one:
                number = one.number("question_id")
                raise InputError(f"{annotations} answers question {number} twice: take one out")
        below = folder.pictures("val2014")
        for one in asked:
            number = one.number("question_id")
            if number not in told:
                raise InputError(f"{annotations} has no answers to question {number}")
            people = told[number].texts("answers", "answer")
            image = below / f"COCO_val2014_{one.number('image_id'):012d}.jpg"
            group = told[number].text("answer_type", "")
            yield Example(str(number), image, people, one.text("question"), group)

    return read


def _vizwiz(folder: Folder) -> Iterable[Example]:
    below = folder.pictures("val")
    for number, value in enumerate(folder.json("val.json"), 1):
        one = Entry(value, f"{folder.path / 'val.json'}: {number}")
        file, group = one.file("image"), one.text("answer_type", "")
        yield Example(
            file, below / file, one.texts("answers", "answer"), one.text("question"), group
        )


def _gqa(folder: Folder) -> Iterable[Example]:
    below, name = folder.pictures("images"), "testdev_balanced_questions.json"
    for number, value in folder.entry(name).value.items():
        one = Entry(value, f"{folder.path / name}: {number}")
        image = below / f"{one.file('imageId')}.jpg"
        yield Example(number, image, (one.text("answer"),), one.text("question"))


def _coco_image(folder: Folder) -> Iterable[Example]:
    """One caption of each of 30,000 pictures, drawn once and for all."""
    data = folder.entry("captions_val2014.json")
    below = folder.pictures("val2014")
    said = _captions(data)
    images = {one.number("id"): one for one in data.entries("images")}
    if len(images) < len(data.entries("images")):
        raise InputError("captions_val2014.json names a picture twice: take one out")
    numbers = sorted(images.keys() & said.keys())
    rng = np.random.default_rng(0)
    for place in sorted(rng.permutation(len(numbers))[:DRAWN].tolist()):
        number = numbers[place]
        captions = said[number]
        text = captions[int(rng.integers(len(captions)))].strip()
        yield Example(str(number), below / images[number].file("file_name"), (text,), text)


def _geneval(folder: Folder) -> Iterable[Example]:
    for number, line in enumerate(folder.lines("evaluation_metadata.jsonl")):
        words, tag = line.text("prompt"), line.text("tag")
        yield Example(f"{number:05d}", None, text=words, group=tag, raw=line.value)


def _geneval2(folder: Folder) -> Iterable[Example]:
    for number, line in enumerate(folder.lines("geneval2_data.jsonl")):
        atoms, skills = line.many("vqa_list"), line.many("skills")
        if not atoms or len(atoms) != len(skills) or {len(atom) for atom in atoms} != {2}:
            raise InputError(f"prompt {number} has not a skill and an answer for each question")
        for one in chain(skills, *atoms):
            as_text(one, line.where)
        answers = tuple(answer for _, answer in atoms)
        count, words = line.number("atom_count"), line.text("prompt")
        yield Example(f"{number:05d}", None, answers, words, str(count), line.value)


def _captions(data: Entry) -> dict[int, tuple[str, ...]]:
    """Captions by picture of a file as COCO has them."""
    found: dict[int, list[str]] = {}
    for one in data.entries("annotations"):
        found.setdefault(one.number("image_id"), []).append(one.text("caption"))
    return {number: tuple(texts) for number, texts in found.items()}


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


def load_examples(
    name: str,
    data: Path,
    count: int | None = None,
    progress: Progress = lambda task, done, count: None,
) -> tuple[list[Example], str]:
    """The examples of a benchmark's folder and a hash of them; `count` of them, drawn evenly.

    The hash is of the files, of the names of the examples and of the bytes of their pictures.
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
    twice = [one for one, times in Counter(example.name for example in found).items() if times > 1]
    if twice:
        said = f"{data} has {len(twice)} examples of {name} more than once"
        raise InputError(f"{said} ({', '.join(twice[:3])}): take the others out")
    if count is not None and count < len(found):
        found = [found[n * len(found) // count] for n in range(count)]
    for example in found:
        if example.image is not None and not example.image.is_file():
            raise InputError(f"{example.image} is missing: unpack all pictures of {known.split}")
        if known.kind != "caption" and not any(map(str.isalnum, example.text)):
            said = f"{example.name} of {name} asks {example.text!r}, which has no words"
            raise InputError(f"{said}: take it out of the file")
        if not example.references and known.kind != "export":
            raise InputError(f"{name} has nothing to compare {example.name} with")
    folder.digest.update(repr([example.name for example in found]).encode())
    images = sorted({example.image for example in found if example.image is not None})
    for number, image in enumerate(images, 1):
        folder.digest.update(bytes.fromhex(sha256(image)))
        progress("pictures hashed", number, len(images))
    return found, folder.digest.hexdigest()[:16]

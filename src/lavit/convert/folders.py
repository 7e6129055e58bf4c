"""Whole folders of the published model: copied, pickles made safetensors, every file noted.

The manifest (`published/manifest.json`) lists each published file: tensors with their shapes, in
order, and where they went; plain files and where they lie. What feeds nothing in ours is kept
next to it, so that the published folder can be written again to the bit.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lavit.config import InputError, read_json, write_json
from lavit.convert.tensors import read_pickle
from lavit.files import load_tensors, save_tensors

KEPT = "published"
# rotary tables of old LLaMA files, computed today; and the trainer's own pickle, never opened
INVERSE_FREQUENCIES = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
NEVER_OPENED = ("training_args.bin",)
WEIGHT_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".safetensors")


@dataclass
class Manifest:
    """What became of each published file; `new` is the folder that is written or read back."""

    new: Path
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)  # shapes, aside, ours
    files: dict[str, str] = field(default_factory=dict)  # published path → ours

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a converted folder; one of another form raises `InputError`."""
        noted = read_json(folder / KEPT / "manifest.json")
        tensors: Any = noted.get("tensors")
        files: Any = noted.get("files")
        if not (
            _entries(tensors)
            and _paths(tensors)
            and isinstance(files, dict)
            and _paths([*files, *files.values()])
        ):
            raise InputError(f"{folder / KEPT}/manifest.json is not what a conversion wrote")
        return cls(folder, tensors, files)

    def write(self) -> None:
        """Inverse of `read`."""
        noted = {"tensors": self.tensors, "files": self.files}
        write_json(self.new / KEPT / "manifest.json", noted)

    def unknown(self, published: Path, part: str = ".") -> Iterator[tuple[Path, str]]:
        """Published files below `part` that were not dealt with; not those in hidden folders."""
        for path in sorted((published / part).rglob("*")):
            relative = path.relative_to(published)
            hidden = any(name.startswith(".") for name in relative.parent.parts)
            known = self.tensors | self.files
            if path.is_file() and not hidden and relative.as_posix() not in known:
                yield path, relative.as_posix()

    def keep_tensors(
        self,
        path: str,
        tensors: Mapping[str, Tensor],
        *,
        aside: set[str],
        ours: str | None = None,
    ) -> None:
        """Note a published tensor file, and write aside what has no place in ours.

        `ours` is the file of ours that has the rest under the same names, if there is one.
        """
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        self.tensors[path] = {"shapes": shapes, "aside": sorted(aside), "ours": ours}
        if aside:
            save_tensors({name: tensors[name] for name in sorted(aside)}, self._aside(path))

    def aside(self, path: str) -> dict[str, Tensor]:
        """Tensors of a published file that were kept aside."""
        return load_tensors(self._aside(path)) if self.tensors[path]["aside"] else {}

    def copy(self, source: Path, path: str, ours: str) -> None:
        """Copy a published file to its place in ours, and note it."""
        copy_file(source, self.new / ours)
        self.files[path] = ours

    def _aside(self, path: str) -> Path:
        return self.new / KEPT / f"{path}.safetensors"


def _paths(found: Any) -> bool:
    """Are these paths below a folder?"""
    if not isinstance(found, Iterable):
        return False
    paths = [Path(path) if isinstance(path, str) else Path("/") for path in found]
    return not any(path.is_absolute() or ".." in path.parts for path in paths)


def _entries(tensors: Any) -> bool:
    """Are these files with the shapes of their tensors?"""
    return isinstance(tensors, dict) and all(
        isinstance(entry, dict)
        and entry.keys() == {"shapes", "aside", "ours"}
        and isinstance(entry["shapes"], dict)
        and all(isinstance(shape, list) for shape in entry["shapes"].values())
        and isinstance(entry["aside"], list)
        and _paths([entry["ours"] or ""])
        for entry in tensors.values()
    )


def convert_folder(folder: Path, theirs: str, ours: str, manifest: Manifest) -> None:
    """Copy a transformers or diffusers folder; pickles become safetensors under today's names."""
    for path, relative in manifest.unknown(folder, theirs):
        place = Path(ours) / path.relative_to(folder / theirs)
        if path.name in NEVER_OPENED:
            manifest.copy(path, relative, f"{KEPT}/{relative}")
        elif path.suffix == ".bin":
            _convert_pickle(path, relative, place.with_name(safe_name(path)).as_posix(), manifest)
        elif path.name.endswith(".bin.index.json"):
            manifest.copy(path, relative, f"{KEPT}/{relative}")
            _write_index(path, (manifest.new / place).with_name(safe_name(path)))
        else:
            manifest.copy(path, relative, place.as_posix())


def copy_rest(folder: Path, manifest: Manifest) -> None:
    """Keep readme and licence aside."""
    for path, relative in manifest.unknown(folder):
        manifest.copy(path, relative, f"{KEPT}/{relative}")


def safe_name(path: Path) -> str:
    """Name of the safetensors file: transformers drops "pytorch_", diffusers keeps its prefix."""
    return re.sub(r"^pytorch_", "", path.name).replace(".bin", ".safetensors")


def folder_tensors(folder: Path) -> dict[str, Tensor]:
    """Tensors of all safetensors files in a folder, mapped."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_tensors(file).items()}


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, making its folder; failures raise `InputError`."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    except OSError as error:
        raise InputError(f"cannot copy {source} to {target}: {error.strerror}") from error


def _convert_pickle(path: Path, relative: str, ours: str, manifest: Manifest) -> None:
    if path.with_name(safe_name(path)).exists():
        raise InputError(f"{relative} and {safe_name(path)} hold the same weights: remove one")
    tensors = read_pickle(path)
    aside = {name for name in tensors if INVERSE_FREQUENCIES.fullmatch(name)}
    rest = {name: tensors[name] for name in tensors if name not in aside}
    save_tensors(rest, manifest.new / ours)
    manifest.keep_tensors(relative, tensors, aside=aside, ours=ours)


def _write_index(path: Path, target: Path) -> None:
    index = read_json(path)
    if not isinstance(index.get("weight_map"), dict):
        raise InputError(f"{path} has no weight_map: is it downloaded whole?")
    index["weight_map"] = {
        name: safe_name(Path(str(file)))
        for name, file in index["weight_map"].items()
        if not INVERSE_FREQUENCIES.fullmatch(name)
    }
    write_json(target, index)

"""The published folder ⇄ ours: strict, in the memory of one tensor, reversible to the bit.

    language_model/ (LLaMA, joint rows)            ⇄  language/
    language_model/visual_weight.bin               ⇄  reader/
    visual_tokenizer/eva_vitg_psz14.bin            ⇄  vision/
    visual_tokenizer/tokenizer_encoder.bin         ⇄  visual_tokenizer/ (but the reconstructor)
    visual_tokenizer/tokenizer_decoder.bin         ⇄  its reconstructor, pixels/condition/
    pixel_decoding/                                ⇄  pixels/
    visual_tokenizer/highres_tokenizer_decoder.bin ⇄  the same below highres/
    highres_pixel_decoding/                        ⇄  highres/pixels/
    pixel_decoding/safety_checker/                 ⇄  safety_checker/

The 1024-px decoder has a reconstructor of its own, so `highres/` is a model folder too; it links to
the parts that it shares. What feeds nothing in ours is kept aside under `published/`, with a list
of every file and tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lavit.config import InputError, ModelConfig, read_config, write_config, write_json
from lavit.convert import names, sizes
from lavit.convert.checks import check_language, check_pixels
from lavit.convert.folders import (
    WEIGHT_SUFFIXES,
    Manifest,
    convert_folder,
    copy_file,
    copy_rest,
    folder_tensors,
)
from lavit.convert.tensors import read_pickle, write_pickle
from lavit.files import load_tensors, replacing, save_tensors
from lavit.vision.encoder import load_vision

EVA = "visual_tokenizer/eva_vitg_psz14.bin"
ENCODER = "visual_tokenizer/tokenizer_encoder.bin"
DECODER = "visual_tokenizer/tokenizer_decoder.bin"
HIGHRES_DECODER = "visual_tokenizer/highres_tokenizer_decoder.bin"
READER = "language_model/visual_weight.bin"
HIGHRES_PIXELS = "highres_pixel_decoding"
NULL = "pixel_decoding/uncond_embeddings.bin"
FOLDERS = {
    "language_model": "language",
    "pixel_decoding/safety_checker": "safety_checker",
    "pixel_decoding": "pixels",
    "highres_pixel_decoding": "highres/pixels",
}
WEIGHTS = "model.safetensors"
TOKENIZER = f"visual_tokenizer/{WEIGHTS}"
CONDITION = f"pixels/condition/{WEIGHTS}"
HIGHRES = "highres/"
LINKED = ("vision", "language", "reader", "safety_checker")
REQUIRED = (
    "language_model/config.json",
    "pixel_decoding/unet/config.json",
    "pixel_decoding/vae/config.json",
    "pixel_decoding/scheduler/scheduler_config.json",
)


@dataclass(frozen=True)
class Route:
    """Which tensors of a published file go into which of our files."""

    theirs: str
    ours: str
    renames: names.Renames


@dataclass(frozen=True)
class Converted:
    """What a conversion did: files, tensors, and the names of tensors kept aside."""

    files: int
    tensors: int
    aside: tuple[str, ...]


def routes(files: Mapping[str, Collection[str]]) -> list[Route]:
    """Every route between the published files and ours; tensors' names of each file tell depths."""

    def merger(file: str) -> names.Renames:
        depth = names.depth_of(files[file], "causal_encoder.")
        return names.under(names.merger(depth), "causal_encoder.", "merger.")

    encoder = (
        *names.under(names.selector(), "token_predictor.", "selector."),
        *merger(ENCODER),
        *names.under(names.codebook(), "quantize.", "codebook."),
        *names.under(names.to_code(), "encode_task_layer.", "codebook.to_code."),
    )
    reader = (*merger(READER), *names.pairs({"vit_proj": "to_language"}))
    null = names.Rename(tuple(files[NULL]), "null_context", "squeeze")
    found = [
        Route(EVA, f"vision/{WEIGHTS}", names.vision(names.depth_of(files[EVA]))),
        Route(ENCODER, TOKENIZER, encoder),
        Route(READER, f"reader/{WEIGHTS}", reader),
        Route(NULL, CONDITION, (null,)),
    ]
    for file, kind, below in ((DECODER, "cross", ""), (HIGHRES_DECODER, "pooled", HIGHRES)):
        if file in files:
            renames = names.reconstructor(names.depth_of(files[file]))
            renames = names.under(renames, "", "reconstructor.")
            found.append(Route(file, below + TOKENIZER, renames))
            found.append(Route(file, f"{below}{CONDITION}", names.condition(kind)))
    return found


def used(file: str, files: Mapping[str, Collection[str]]) -> set[str]:
    """Names of a published file's tensors that feed something in ours."""
    every = (names.published(route.renames) for route in routes(files) if route.theirs == file)
    return set().union(*every)


def allowed_aside(file: str, files: Mapping[str, Collection[str]]) -> set[str]:
    """Names that a published file may hold and that feed nothing in ours.

    The ViT's head, and a copy of the whole ViT in the tokenizer's file.
    """
    if file == EVA:
        return set(names.VISION_ASIDE)
    if file == ENCODER:
        theirs = names.published(names.vision(names.depth_of(files[EVA])))
        return {f"encoder.{name}" for name in theirs | set(names.VISION_ASIDE)}
    return set()


def map_tensors(files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Tensors of our files from those of the published ones, names checked, still on disk.

    `highres/` gets the same selector, merger and codebook.
    """
    ours: dict[str, dict[str, Tensor]] = {}
    for file, found in files.items():
        aside = allowed_aside(file, files)
        names.check_names(found, used(file, files), where=file, aside=aside)
    for route in routes(files):
        found, part = files[route.theirs], ours.setdefault(route.ours, {})
        for rename in route.renames:
            part[rename.ours] = names.theirs_to_ours(rename, found, where=route.theirs)
    tokenizer = ours[TOKENIZER]
    started = names.started_codebook(tokenizer["codebook.vectors"])
    tokenizer |= {f"codebook.{name}": value for name, value in started.items()}
    if HIGHRES_DECODER in files:
        shared = {n: t for n, t in tokenizer.items() if not n.startswith("reconstructor.")}
        ours[HIGHRES + TOKENIZER] |= shared
    return ours


def configs(
    files: Mapping[str, Mapping[str, Tensor]], ours: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, ModelConfig]:
    """Configurations by place ("" or "highres/"), held against our modules."""
    shared = files[EVA], files[ENCODER]
    found = {"": sizes.model_config(*shared, files[DECODER], files[NULL])}
    if HIGHRES_DECODER in files:
        found[HIGHRES] = sizes.model_config(*shared, files[HIGHRES_DECODER], None)
    for below, config in found.items():
        parts = {
            "vision": ours[f"vision/{WEIGHTS}"],
            "visual_tokenizer": ours[below + TOKENIZER],
            "reader": ours[f"reader/{WEIGHTS}"],
            "condition": ours[f"{below}{CONDITION}"],
        }
        sizes.check_parts(config, parts)
    return found


def convert_published(folder: Path | str, out: Path | str) -> Converted:
    """Write the published folder in our form; `out` must not exist or be empty.

    Raises `InputError` for a missing file, a tensor that is missing or unknown, or a
    pickle that holds code; `out` is then as it was.
    """
    folder, out = Path(folder), Path(out)
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}")
    _check_free(out)
    files = _open_published(folder)
    ours = map_tensors(files)
    found = configs(files, ours)
    with replacing(out) as new:
        manifest = Manifest(new)
        for _, relative in manifest.unknown(folder):  # before gigabytes are written
            placed = relative in files or any(relative.startswith(f"{one}/") for one in FOLDERS)
            if relative.endswith(WEIGHT_SUFFIXES) and not placed:
                raise InputError(f"{relative} is an unknown weight file: move it away")
        for path, tensors in ours.items():
            save_tensors(tensors, new / path)
        for path, tensors in files.items():
            manifest.keep_tensors(path, tensors, aside=set(tensors) - used(path, files))
        for theirs, place in FOLDERS.items():
            convert_folder(folder, theirs, place, manifest)
        width = len(ours[f"reader/{WEIGHTS}"]["to_language.weight"])
        check_language(new / "language", width, found[""].visual_tokenizer.codes)
        for below, config in found.items():
            place = f"{'highres_' if below else ''}pixel_decoding"
            check_pixels(new / below / "pixels", config.pixels, place)
        copy_rest(folder, manifest)
        _write_configs(new, found)
        manifest.write()
    return _summary(manifest)


def convert_encoder(path: Path, out: Path) -> None:
    """Write the published encoder alone (`eva_vitg_psz14.bin`) as a transformers folder.

    Raises `InputError` for a tensor that is missing, unknown or of another shape.
    """
    eva = read_pickle(path)
    renames = names.vision(names.depth_of(eva))
    tensors = names.convert_all(eva, renames, where=path.name, aside=names.VISION_ASIDE)
    config = sizes.vision_config(eva)
    with torch.device("meta"):
        expected = load_vision(replace(config, source="random")).encoder.state_dict()
    sizes.check_shapes(tensors, expected, where=path.name)
    with replacing(out) as new:
        save_tensors(tensors, new / WEIGHTS)
        write_json(new / "config.json", config.architecture)


def convert_reverse(folder: Path | str, out: Path | str) -> Converted:
    """Write the published form of a folder that `convert_published` made, equal to the bit.

    What was trained since is written with its new values; `out` must not exist or be empty.
    """
    folder, out = Path(folder), Path(out)
    _check_free(out)
    manifest = Manifest.read(folder)
    if lost := sorted({EVA, ENCODER, DECODER, READER, NULL} - manifest.tensors.keys()):
        raise InputError(f"the manifest of {folder} does not know {lost[0]}: convert it again")
    read_config(folder)  # refuses another format
    with replacing(out) as new:
        for path, entry in manifest.tensors.items():
            tensors = _published_tensors(folder, path, manifest)
            missing = sorted(set(entry["shapes"]) - set(tensors))
            if missing:
                raise InputError(f"{folder} no longer has {missing[:3]} of {path}")
            try:
                shaped = {n: tensors[n].reshape(shape) for n, shape in entry["shapes"].items()}
            except RuntimeError as error:
                raise InputError(f"{folder}: tensors of {path} have changed: {error}") from error
            write_pickle(new / path, shaped)
        for path, place in manifest.files.items():
            copy_file(folder / place, new / path)
    return _summary(manifest)


def _check_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not empty: choose another place")


def _summary(manifest: Manifest) -> Converted:
    entries = manifest.tensors.items()
    return Converted(
        files=len(manifest.tensors) + len(manifest.files),
        tensors=sum(len(entry["shapes"]) for _, entry in entries),
        aside=tuple(f"{path}: {name}" for path, entry in entries for name in entry["aside"]),
    )


def _open_published(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The files that need a new form, mapped."""
    for path in REQUIRED:
        if not (folder / path).is_file():
            raise InputError(f"{folder / path} is missing: is this the whole published folder?")
    files = {path: read_pickle(folder / path) for path in (EVA, ENCODER, DECODER, READER, NULL)}
    if len(files[NULL]) != 1:
        raise InputError(f"{NULL} holds {len(files[NULL])} tensors, expected one null text")
    present = [(folder / HIGHRES_DECODER).exists(), (folder / HIGHRES_PIXELS).is_dir()]
    if any(present) and not all(present):
        raise InputError(f"{folder} has only one of {HIGHRES_DECODER} and {HIGHRES_PIXELS}/")
    if all(present):
        files[HIGHRES_DECODER] = read_pickle(folder / HIGHRES_DECODER)
    return files


def _write_configs(new: Path, found: Mapping[str, ModelConfig]) -> None:
    """Configurations, which ask for the safety check, and links of `highres/` to shared parts."""
    write_json(new / "vision" / "config.json", found[""].vision.architecture)
    for below, config in found.items():
        vision = replace(config.vision, architecture={})
        config = replace(config, vision=vision, pixels=replace(config.pixels, safety=True))
        write_config(new / below, config)
        for part in LINKED if below else ():
            if (new / part).is_dir():
                (new / below / part).symlink_to(Path("..") / part, target_is_directory=True)


def _published_tensors(folder: Path, path: str, manifest: Manifest) -> dict[str, Tensor]:
    """Tensors of a published file, from ours and from what was kept aside."""
    tensors, same = manifest.aside(path), manifest.tensors[path]["ours"]
    if same:
        return tensors | folder_tensors((folder / same).parent)
    files = {file: list(entry["shapes"]) for file, entry in manifest.tensors.items()}
    for route in routes(files):
        if route.theirs == path:
            ours = load_tensors(folder / route.ours)
            for rename in route.renames:
                if rename.ours not in ours:
                    raise InputError(f"{folder / route.ours} has no {rename.ours}")
                parts = names.ours_to_theirs(rename, ours[rename.ours])
                # halves of one storage would be written whole, both times
                tensors |= {n: p.clone() if len(parts) > 1 else p for n, p in parts.items()}
    return tensors

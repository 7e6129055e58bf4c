"""Are tokens where the content is? 500 pictures with 0 to 9 things, and pictures without any.

Beside the model's selection stand four that know nothing of the tokenizer, at the same mean number
of tokens: random patches, patches at even distances, and the patches with long features or many
edges that exceed one threshold for all pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from lavit.data.scenes.render import background, render, sprite
from lavit.data.scenes.world import BACKGROUNDS, Scene, objects
from lavit.evaluate.distance import jpeg_bytes
from lavit.evaluate.exam import Exam
from lavit.evaluate.examinee import BATCH
from lavit.evaluate.figures import Figure, average, bootstrapped, mean, spearman

AREA_SIZE = 64  # pixels at which the covered area is measured
OTHERS = 16  # pictures of each other kind
OUTSIDE = 100  # drawings that the world does not hold


def ladder_spearman(exam: Exam) -> Figure:
    """Rank correlation of the number of things with the number of tokens."""
    count = exam.count
    features, tokens = exam.encoded("ladder", count)
    scenes = [exam.scene("ladder", n) for n in range(count)]
    pictures = [exam.picture(scene) for scene in scenes]
    things = np.array([len(scene.things) for scene in scenes])
    areas = [covered(scene) for scene in scenes]
    area = np.array([found.mean() for found in areas])
    lengths = tokens.lengths.cpu().numpy().astype(np.float64)
    grid = exam.model.config.vision.grid
    others = other_lengths(features, pictures, grid, float(lengths.mean()))
    details = {"same_area": spearman(lengths, things, area), **on_things(areas, tokens.keep, grid)}
    for number in sorted(set(things.tolist())):
        details[f"tokens_of_{number}"] = float(lengths[things == number].mean())
    for name, own in others.items():
        details[name] = spearman(own, things)
        details[f"{name}_same_area"] = spearman(own, things, area)
    return bootstrapped(
        lambda at: spearman(lengths[at], things[at]),
        count,
        floor=("random patches", details["random"]),
        ceiling=("tokens in the order of things", 1.0),
        details=details | outside(exam),
    )


def ladder_blank(exam: Exam) -> Figure:
    """Mean share of the patches that are kept of pictures of one colour, the world's first."""
    size, grid = exam.model.config.vision.image_size, exam.model.config.vision.grid
    rng = np.random.default_rng(0)
    plain = [background(colour, "plain", size) for colour in BACKGROUNDS]
    while len(plain) < exam.count:
        plain.append(Image.new("RGB", (size, size), tuple(int(x) for x in rng.integers(0, 256, 3))))
    noise = [rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(OTHERS)]
    whole = [exam.picture(exam.scene("ladder", 10 * n + 5)) for n in range(OTHERS)]
    kinds = {
        "blank": plain,
        "striped": [background(colour, "striped", size) for colour in BACKGROUNDS],
        "dotted": [background(colour, "dotted", size) for colour in BACKGROUNDS],
        "noise": [Image.fromarray(pixels) for pixels in noise],
        "five_things": whole,
        "five_things_shuffled": [shuffled_patches(picture, grid, rng) for picture in whole],
    }
    shares: dict[str, list[float]] = {}
    for name, pictures in kinds.items():
        for at in range(0, len(pictures), BATCH):
            tokens = exam.tokenizer.encode(exam.features(pictures[at : at + BATCH]))
            kept = tokens.lengths.double() / tokens.keep.shape[1]
            shares.setdefault(name, []).extend(kept.tolist())
    blank = shares.pop("blank")[: exam.count]
    details = {name: average(found) for name, found in shares.items()}
    floor = ("one patch", 1 / grid**2)
    return mean(blank, floor=floor, details=details, within=(0.0, 1.0))


def covered(scene: Scene) -> np.ndarray:
    """Where a picture is covered by its things, [AREA_SIZE, AREA_SIZE] of bool."""
    empty = np.asarray(background(scene.background, scene.pattern, AREA_SIZE), dtype=np.int16)
    shown = np.asarray(render(scene, AREA_SIZE), dtype=np.int16)
    return np.abs(shown - empty).max(-1) > 8


def on_things(areas: Sequence[np.ndarray], keep: Tensor, grid: int) -> dict[str, float]:
    """Share of the kept patches that touch a thing, and of all patches, over all pictures.

    keep: [pictures, grid * grid], in raster order.
    """
    side = np.arange(AREA_SIZE) * grid // AREA_SIZE
    touched = np.zeros((len(areas), grid, grid), dtype=bool)
    for area, found in zip(areas, touched, strict=True):
        rows, columns = np.nonzero(area)
        found[side[rows], side[columns]] = True
    flat, kept = touched.reshape(len(areas), -1), keep.cpu().numpy().astype(bool)
    return {"kept_on_things": float(flat[kept].mean()), "patches_on_things": float(flat.mean())}


def other_lengths(
    features: Tensor, pictures: Sequence[Image.Image], grid: int, kept: float
) -> Mapping[str, np.ndarray]:
    """Numbers of tokens, `kept` in the mean, under selections that know no tokenizer."""
    patches, count = grid * grid, len(pictures)
    by_chance = np.random.default_rng(0).binomial(patches, min(1.0, kept / patches), size=count)
    edges = np.stack([edge_energy(picture, grid) for picture in pictures])
    return {
        "random": by_chance.astype(np.float64),
        "strided": np.full(count, round(kept), dtype=np.float64),
        "feature_norm": above(features.float().norm(dim=-1).cpu().numpy(), kept),
        "edge_energy": above(edges, kept),
    }


def above(values: np.ndarray, kept: float) -> np.ndarray:
    """How many values of each row exceed the threshold at which `kept` do in the mean."""
    ordered = np.sort(values.ravel())[::-1]
    place = min(len(ordered) - 1, max(0, round(kept * len(values))))
    return (values > ordered[place]).sum(1).astype(np.float64)


def edge_energy(picture: Image.Image, grid: int) -> np.ndarray:
    """Summed squared differences of neighbouring pixels in each patch, in raster order."""
    side = 16 * grid
    grey = np.asarray(picture.convert("L").resize((side, side)), dtype=np.float64)
    energy = np.zeros_like(grey)
    energy[:, 1:] += np.diff(grey, axis=1) ** 2
    energy[1:, :] += np.diff(grey, axis=0) ** 2
    return energy.reshape(grid, 16, grid, 16).sum((1, 3)).ravel()


def shuffled_patches(picture: Image.Image, grid: int, rng: np.random.Generator) -> Image.Image:
    """The picture with its patches in another order."""
    side = picture.width // grid
    pixels = np.asarray(picture)[: side * grid, : side * grid]
    blocks = pixels.reshape(grid, side, grid, side, 3).swapaxes(1, 2)
    blocks = blocks.reshape(grid * grid, side, side, 3)
    mixed = blocks[rng.permutation(len(blocks))].reshape(grid, grid, side, side, 3).swapaxes(1, 2)
    return Image.fromarray(np.ascontiguousarray(mixed.reshape(side * grid, side * grid, 3)))


def outside(exam: Exam) -> dict[str, float]:
    """Single drawings that no scene holds, large on white: do tokens follow their bytes?"""
    size = exam.model.config.vision.image_size
    pictures = []
    for kind in objects()[exam.rules.objects :][: exam.scaled(OUTSIDE)]:
        drawing = sprite(kind.name, None, "twemoji").resize((size * 3 // 4, size * 3 // 4))
        picture = Image.new("RGBA", (size, size), "white")
        picture.alpha_composite(drawing, (size // 8, size // 8))
        pictures.append(picture.convert("RGB"))
    if len(pictures) < 3:
        return {}
    lengths = exam.tokenizer.encode(exam.features(pictures)).lengths.double().tolist()
    sizes = [jpeg_bytes(picture) for picture in pictures]
    return {
        "outside_spearman_with_bytes": spearman(lengths, sizes),
        "outside_tokens": average(lengths),
        "outside_pictures": len(pictures),
    }

"""Two studies of the pixel decoder on held-out pictures (`lavit eval RUN --study steps`, `--study attribution`).

steps         DPM-Solver++ at few steps against 50 of DDIM: same codes, same seeds, same run
attribution   what the tokens contribute beyond the decoder's own prior (asked for by the paper's reviewers): true codes,
              another picture's codes, own codes in another order, and the null condition

Cosine is Eq. 4's: the encoder's patches of the written picture against those of the original. The kernel distance is
KID's (arXiv 1801.01401: polynomial kernel, unbiased) on the frozen encoder's mean patch; it bears the encoder's name and
must not be read as the usual KID or FID, whose Inception weights are not at hand. Intervals are over pictures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

import lavit
from lavit.config import InputError
from lavit.evaluate.evaluation import Evaluation, Progress, trained_on
from lavit.evaluate.figures import Figure, mean, share
from lavit.evaluate.image import hits, pooled, shrink
from lavit.evaluate.words import name_of
from lavit.images import to_image

PICTURES = 200  # at most, of a study
BATCH = 16
SOLVERS = (("dpm", 4), ("dpm", 8), ("dpm", 12), ("dpm", 25), ("ddim", 50))
SOLVER_NAMES = {"dpm": "DPM-Solver++", "ddim": "DDIM"}
ENCODER_NAMES = {"efficientnet-lite0": "EfficientNet-Lite0"}


def kernel_distances(
    written: Float[Tensor, "pictures dim"], real: Float[Tensor, "pictures dim"]
) -> Float[Tensor, "pictures"]:
    """Jackknife values of the squared kernel distance, one per picture; their mean is the unbiased estimate.

    Row i of both is the same picture: the pairs (i, i) stay out of all three sums (Gretton et al. 2012, Lemma 6).
    """

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.double() @ b.double().T / a.shape[1] + 1) ** 3

    pairs = kernel(written, written) + kernel(real, real) - kernel(written, real) - kernel(real, written)
    rows, n = pairs.fill_diagonal_(0).sum(1), len(pairs)
    if n < 3:
        raise InputError(f"a kernel distance needs 3 pictures or more, not {n}: raise the limit")
    return (rows.sum() / (n - 1) - (rows.sum() - 2 * rows) / (n - 2)).float()


def cosines(
    written: Float[Tensor, "pictures patches dim"], real: Float[Tensor, "pictures patches dim"]
) -> Float[Tensor, "pictures"]:
    """Mean cosine over the patches of each picture."""
    return F.cosine_similarity(written.float(), real.float(), dim=-1).mean(1)


@dataclass(frozen=True)
class HeldOut:
    """The pictures of a study: names, encoder features, codes, and the features of the same at the decoder's size."""

    names: tuple[str, ...]
    patches: Float[Tensor, "pictures patches dim"]
    codes: tuple[Tensor, ...]
    ceiling: Float[Tensor, "pictures patches dim"]

    @property
    def elsewhere(self) -> list[int]:
        """Another picture for each, of another name as far as that goes: all shifted by one number."""
        count = len(self.names)
        shift = max(range(1, count), key=lambda s: sum(self.names[i] != self.names[i - s] for i in range(count)))
        return [(i - shift) % count for i in range(count)]


@dataclass(frozen=True)
class Written:
    """What one way of painting gave: encoder features of its pictures, and seconds per picture of the decoder alone."""

    patches: Float[Tensor, "pictures patches dim"]
    seconds: tuple[float, ...]  # of each batch


def held_out(e: Evaluation) -> HeldOut:
    """Up to `PICTURES` held-out pictures, a fixed random choice."""
    pictures = [e.held_out.pictures[i] for i in e.some(PICTURES, len(e.held_out))]
    if len(pictures) < 3:
        raise InputError(f"a study needs 3 held-out pictures or more, not {len(pictures)}")
    model, patches, small = e.pipeline.model, [], []
    for number, picture in enumerate(pictures):
        image = picture.record.open()
        patches.append(model.patches([image]))
        small.append(model.patches([shrink(image, model.config.pixels.size)]))
        _tell(e, "features, held out", number + 1, len(pictures))
    codes = tuple(model.tokenizer.encode(rows).codes for rows in patches)
    return HeldOut(tuple(name_of(p) for p in pictures), torch.cat(patches), codes, torch.cat(small))


# features, what the decoder is shown of a memory (None: it has none), seeds
Way = Callable[[Float[Tensor, "images patches dim"], Tensor | None, range], Float[Tensor, "images 3 height width"]]


def painted(e: Evaluation, codes: Sequence[Tensor], ways: dict[str, Way], what: str) -> dict[str, Written]:
    """The pictures of codes painted in every way; ways take turns batch by batch, so that a busy machine is fair."""
    model = e.pipeline.model
    patches: dict[str, list[Tensor]] = {name: [] for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for start in range(0, len(codes), BATCH):
        part = codes[start : start + BATCH]
        features, shown = model.features(part), model.shown(part)
        seeds = range(start, start + len(features))
        for name, way in ways.items():
            started = time.perf_counter()
            pictures = way(features, shown, seeds)
            seconds[name].append((time.perf_counter() - started) / len(features))
            images: list[Image.Image] = [to_image(picture) for picture in pictures]
            patches[name] += [model.patches([image]) for image in images]
        _tell(e, what, start + len(features), len(codes))
    return {name: Written(torch.cat(patches[name]), tuple(seconds[name])) for name in ways}


def steps_study(e: Evaluation) -> Iterator[Figure]:
    """Kernel distance, cosine and time of each solver, and each few-step solver against the last one of `SOLVERS`."""
    held, pixels = held_out(e), e.pipeline.model.pixels
    ways: dict[str, Way] = {
        f"{SOLVER_NAMES[sampler]}, {steps} steps": lambda features, shown, seeds, sampler=sampler, steps=steps: (
            pixels.sample(features, shown, seeds=seeds, steps=steps, sampler=sampler)
        )
        for sampler, steps in SOLVERS
    }
    found = painted(e, held.codes, ways, "solvers")
    for name, written in found.items():
        yield _kernel_figure(e, name, held, written.patches)
        yield _cosine_figure(name, held, written.patches)
        yield mean(f"{name}: seconds a picture", written.seconds, note=f"batches of {BATCH}, the decoder alone")
    yield from _differences(e, held, {name: written.patches for name, written in found.items()}, list(found)[-1])


def attribution_study(e: Evaluation) -> Iterator[Figure]:
    """Retrieval, cosine and kernel distance under true, another's, permuted and no codes."""
    held, pixels = held_out(e), e.pipeline.model.pixels
    rng = np.random.default_rng(0)
    orders = [torch.from_numpy(rng.permutation(len(codes))) for codes in held.codes]

    def told(features: Tensor, shown: Tensor | None, seeds: range) -> Tensor:
        return pixels.sample(features, shown, seeds=seeds)

    def untold(features: Tensor, shown: Tensor | None, seeds: range) -> Tensor:
        return pixels.sample(features, seeds=seeds, guidance=0.0)  # what is left is the null condition's prediction

    found = {}
    for name, codes, way in (
        ("true codes", held.codes, told),
        ("another picture's codes", [held.codes[i] for i in held.elsewhere], told),
        ("own codes permuted", [codes[order] for codes, order in zip(held.codes, orders, strict=True)], told),
        ("null condition", held.codes, untold),
    ):
        found[name] = painted(e, codes, {name: way}, name)[name].patches
    best = e.gallery.nearest(pooled(held.ceiling))
    for top in (1, 5):
        ceiling = ("real picture at the decoder's size", float(np.mean(hits(best, held.names, top=top))))
        for name, patches in found.items():
            right = hits(e.gallery.nearest(pooled(patches)), held.names, top=top)
            note = f"among {len(set(e.gallery.names))} names"
            yield share(f"{name}: nearest real picture, top-{top}", right, ceiling=ceiling, note=note)
    yield from (_cosine_figure(name, held, patches) for name, patches in found.items())
    yield from (_kernel_figure(e, name, held, patches) for name, patches in found.items())
    yield from _differences(e, held, found, "true codes")


STUDIES = {"steps": steps_study, "attribution": attribution_study}


def run_study(
    name: str, run: str | Path, *, data: str | None = None, limit: int | None = None, progress: Progress | None = None
) -> list[Figure]:
    """All figures of a study; `data` defaults to what the run was trained on, `limit` bounds the pictures."""
    if name not in STUDIES:
        raise InputError(f"there is no study {name!r}: choose from {', '.join(STUDIES)}")
    pipeline = lavit.load(run)
    return list(STUDIES[name](Evaluation(pipeline, data or trained_on(run), limit, progress)))


def _kernel_name(e: Evaluation) -> str:
    config = e.pipeline.model.config
    return f"KID, {ENCODER_NAMES.get(config.vision.source, f'encoder of {config.name}')}"


def _kernel_figure(e: Evaluation, name: str, held: HeldOut, patches: Tensor) -> Figure:
    real = held.patches.mean(1)
    best = float(kernel_distances(held.ceiling.mean(1), real).mean())
    values = kernel_distances(patches.mean(1), real)
    return mean(f"{name}: {_kernel_name(e)}", values.tolist(), ceiling=("real picture at the decoder's size", best))


def _cosine_figure(name: str, held: HeldOut, patches: Tensor) -> Figure:
    floor = ("another real picture", float(cosines(held.patches[held.elsewhere], held.patches).mean()))
    ceiling = ("real picture at the decoder's size", float(cosines(held.ceiling, held.patches).mean()))
    return mean(f"{name}: cosine", cosines(patches, held.patches).tolist(), floor=floor, ceiling=ceiling)


def _differences(e: Evaluation, held: HeldOut, found: dict[str, Tensor], first: str) -> Iterator[Figure]:
    """Each against `first`, picture by picture: an interval that leaves out zero sets the two apart."""
    real = held.patches.mean(1)
    for name, patches in found.items():
        if name != first:
            cosine = cosines(patches, held.patches) - cosines(found[first], held.patches)
            distance = kernel_distances(patches.mean(1), real) - kernel_distances(found[first].mean(1), real)
            yield mean(f"{name} minus {first}: cosine", cosine.tolist())
            yield mean(f"{name} minus {first}: {_kernel_name(e)}", distance.tolist())


def _tell(e: Evaluation, what: str, done: int, of: int) -> None:
    if e.progress:
        e.progress(what, done, of)

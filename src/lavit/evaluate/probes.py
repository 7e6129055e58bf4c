"""What survives in features: a logistic probe names the thing in a box, or the background around
the things.

A probe is fitted on 6,000 things of scenes like training's, each the mean feature of the patches
whose centres lie in its box, and asked about test scenes. Encoder features have a probe of their
own and features rebuilt from codes another: a figure is the ratio of their accuracies.

`write_identity` asks about features rebuilt from codes that were written freely from a prompt. As
the places of its things are unknown, the probe (fitted also on boxes that hold nothing) looks at
all cells of the grid in the sizes that the prompt names; a name's score is its highest probability
anywhere. The figure is the share of the prompt's names among as many likeliest ones, over the same
for encoder features of the true pictures.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lavit.data.scenes.sample import nominal, scene_at
from lavit.data.scenes.world import BACKGROUNDS, CELLS, PATTERNS, SHAPES, Box, Facts, Scene
from lavit.evaluate.drawing import prompt_of, wanted, written
from lavit.evaluate.exam import Exam
from lavit.evaluate.examinee import BATCH
from lavit.evaluate.figures import Figure, average, ratio, turned
from lavit.evaluate.tokens import OTHER_SEED
from lavit.visual_tokenizer.layers import Patches

THINGS = 6_000  # that a probe is fitted on
DECAY = 1e-4  # of a probe's weights
ROUNDS = 150  # of its fitting, at most
GROUNDS = tuple(itertools.product(BACKGROUNDS, PATTERNS))


@dataclass(frozen=True)
class Probe:
    """Multinomial logistic regression on standardised rows."""

    mean: Float[Tensor, "dim"]
    deviation: Float[Tensor, "dim"]
    weight: Float[Tensor, "dim classes"]
    bias: Float[Tensor, "classes"]

    def probabilities(self, rows: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows classes"]:
        """Of each class, row by row."""
        return (((rows - self.mean) / self.deviation) @ self.weight + self.bias).softmax(-1)

    def right(self, rows: Float[Tensor, "rows dim"], labels: Int[Tensor, "rows"]) -> list[bool]:
        """Is the likeliest class the true one?"""
        return (self.probabilities(rows).argmax(-1) == labels).tolist()


def fit(rows: Float[Tensor, "rows dim"], labels: Int[Tensor, "rows"], classes: int) -> Probe:
    """The probe of labelled rows: L-BFGS from zero, the same every time."""
    rows = rows.float()
    mean, deviation = rows.mean(0), rows.std(0, unbiased=False).clamp(min=1e-6)
    standard = (rows - mean) / deviation
    weight = torch.zeros(rows.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=ROUNDS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(standard @ weight + bias, labels) + DECAY * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)
    return Probe(mean, deviation, weight.detach(), bias.detach())


def patches_in(box: Box, grid: int) -> list[int]:
    """Raster numbers of the patches whose centres lie in a box; the nearest if there is none."""
    centres = (np.arange(grid) + 0.5) / grid
    x, y = np.meshgrid(centres, centres)
    far = np.maximum(abs(x - box.x), abs(y - box.y)).ravel()
    inside = np.flatnonzero(far <= box.side / 2)
    return inside.tolist() or [int(far.argmin())]


@dataclass
class LabelledRows:
    """Mean features of boxes, "seen" by the encoder and "rebuilt" from codes; what is in them."""

    classes: int
    features: dict[str, list[Tensor]] = field(default_factory=dict)
    labels: list[int] = field(default_factory=list)
    pictures: list[int] = field(default_factory=list)  # number of the picture of each row

    def add(
        self, patches: list[int], label: int, picture: int, features: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        """One box of a picture."""
        for kind, one in features.items():
            self.features.setdefault(kind, []).append(one[patches].mean(0))
        self.labels.append(label)
        self.pictures.append(picture)

    def probe(self, kind: str) -> Probe:
        """The probe fitted on one kind of features."""
        rows = torch.stack(self.features[kind]).cpu()
        return fit(rows, torch.tensor(self.labels), self.classes)

    def right(self, probe: Probe, kind: str) -> list[float]:
        """Share of right answers in each picture that has rows, in the order of pictures."""
        rows = torch.stack(self.features[kind]).cpu()
        found: dict[int, list[bool]] = {}
        hits = probe.right(rows, torch.tensor(self.labels))
        for picture, hit in zip(self.pictures, hits, strict=True):
            found.setdefault(picture, []).append(hit)
        return [average(of) for _, of in sorted(found.items())]


class SceneRows:
    """Rows of things, of grounds, and of things with empty boxes ("cells"), of many scenes."""

    def __init__(self, exam: Exam) -> None:
        self.exam, self.names = exam, (*exam.rules.objects_named, *SHAPES)
        self.things, self.grounds = LabelledRows(len(self.names)), LabelledRows(len(GROUNDS))
        self.cells = LabelledRows(len(self.names) + 1)
        self.count = 0  # pictures

    def add(self, scenes: Sequence[Scene], features: Patches) -> None:
        """The rows of pictures with these encoder features."""
        tokenizer, grid = self.exam.tokenizer, self.exam.model.config.vision.grid
        seen, again = tokenizer.standard(features), self.exam.rebuilt(features)
        for number, scene in enumerate(scenes):
            at = (self.count, {"seen": seen[number], "rebuilt": again[number]})
            free = set(range(grid * grid))
            for thing in scene.things:
                inside = patches_in(thing.box, grid)
                free -= set(inside)
                for rows in (self.things, self.cells):
                    rows.add(inside, self.names.index(thing.name), *at)
            ground = GROUNDS.index((scene.background, scene.pattern))
            self.grounds.add(sorted(free) or list(range(grid * grid)), ground, *at)
            for place, box in enumerate(empty(scene)):
                if (self.count + place) % 3 == 0:
                    self.cells.add(patches_in(box, grid), len(self.names), *at)
            self.count += 1


def empty(scene: Scene) -> list[Box]:
    """Boxes of cells in which nothing stands."""

    def touches(a: Box, b: Box) -> bool:
        return max(abs(a.x - b.x), abs(a.y - b.y)) < (a.side + b.side) / 2

    size = scene.things[0].size if scene.things else "small"
    boxes = [nominal(cell, size) for cell in CELLS]
    return [box for box in boxes if not any(touches(box, thing.box) for thing in scene.things)]


def fitted_rows(exam: Exam) -> SceneRows:
    """Rows of scenes like training's, until there are 6,000 things."""
    if "fitted" not in exam.cache:
        goal, into = exam.scaled(THINGS), SceneRows(exam)
        while (count := len(into.things.labels)) < goal:
            exam.progress("things of probes", count, goal)
            numbers = range(into.count, into.count + BATCH)
            scenes = [scene_at("train", n, seed=OTHER_SEED + 1, rules=exam.rules) for n in numbers]
            into.add(scenes, exam.features([exam.picture(scene) for scene in scenes]))
        exam.progress("things of probes", goal, goal)
        exam.cache["fitted"] = into
    return exam.cache["fitted"]


def asked(exam: Exam) -> SceneRows:
    """Rows of test scenes."""
    if "asked" not in exam.cache:
        features, _ = exam.encoded("test", exam.count)
        scenes, into = [exam.scene("test", n) for n in range(exam.count)], SceneRows(exam)
        for at in range(0, exam.count, BATCH):
            into.add(scenes[at : at + BATCH], features[at : at + BATCH])
        exam.cache["asked"] = into
    return exam.cache["asked"]


def _kept(known: LabelledRows, test: LabelledRows) -> Figure:
    """Accuracy on rebuilt features over that on the encoder's."""
    seen, again = (test.right(known.probe(kind), kind) for kind in ("seen", "rebuilt"))
    best = average(seen)
    commonest = np.bincount(known.labels).argmax()
    guessed = average(np.equal(test.labels, commonest))
    return ratio(
        again,
        seen,
        floor=("the commonest", guessed / best if best else 0.0),
        ceiling=("the encoder's features", 1.0),
        details={"encoder": best, "rebuilt": average(again), "rows_fitted": len(known.labels)},
    )


def identity_kept(exam: Exam) -> Figure:
    """How well things are named in features rebuilt from true codes, relative to the encoder's."""
    return _kept(fitted_rows(exam).things, asked(exam).things)


def background_kept(exam: Exam) -> Figure:
    """How well colour and pattern of the background are named there."""
    return _kept(fitted_rows(exam).grounds, asked(exam).grounds)


def found_names(
    probe: Probe,
    features: Float[Tensor, "patches dim"],
    said: Facts,
    names: Sequence[str],
    grid: int,
) -> float:
    """Share of a prompt's names among the likeliest names anywhere, as many as the prompt has."""
    asked_for = {group.name for group in said.groups}
    sizes = sorted({group.size or "small" for group in said.groups})
    boxes = [patches_in(nominal(cell, size), grid) for size in sizes for cell in CELLS]
    rows = torch.stack([features[inside].mean(0) for inside in boxes]).cpu()
    best = probe.probabilities(rows)[:, : len(names)].amax(0)  # without what is nothing
    top = best.argsort(descending=True, stable=True)[: len(asked_for)].tolist()
    return len(asked_for & {names[n] for n in top}) / len(asked_for)


def write_identity(exam: Exam) -> Figure:
    """How well the things of a prompt are named in features rebuilt from freely written codes."""
    items, grid = range(exam.count), exam.model.config.vision.grid
    codes = written(exam, "test", items, lambda item: [prompt_of(exam, "test", item)])
    features, _ = exam.encoded("test", exam.count)
    known, said = fitted_rows(exam), wanted(exam, "test")
    sees, rebuilds = known.cells.probe("seen"), known.cells.probe("rebuilt")
    scores: dict[str, list[float]] = {"written": [], "another": [], "true": [], "seen": []}
    for at in range(0, exam.count, BATCH):
        here = slice(at, at + BATCH)
        part = features[here]
        from_codes = exam.model.decode([torch.tensor(one) for one in codes[here]])
        for kind, probe, rows, prompts in (
            ("written", rebuilds, from_codes, said),
            ("another", rebuilds, from_codes, turned(said)),
            ("true", rebuilds, exam.rebuilt(part), said),
            ("seen", sees, exam.tokenizer.standard(part), said),
        ):
            pairs = zip(rows, prompts[here], strict=True)
            for one, prompt in pairs:
                scores[kind].append(found_names(probe, one, prompt, known.names, grid))
    means = {kind: average(values) for kind, values in scores.items()}
    best = means["seen"] or 1.0
    return ratio(
        scores["written"],
        scores["seen"],
        floor=("codes of another prompt", means["another"] / best),
        ceiling=("true codes", means["true"] / best),
        details=means,
    )

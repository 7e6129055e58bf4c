"""What survives in features: a logistic probe names the thing in a box, or the background around
the things.

A probe is fitted on 6,000 things of scenes like training's (which no training is likely to have
seen), each the mean feature of the patches whose centres lie in its box, and asked about test
scenes. Encoder features have a probe of their own and features rebuilt from codes another. A figure
is the ratio of their accuracies: what the tokens keep of what the encoder sees.

`write_identity` asks about features rebuilt from codes that were written freely from a prompt.
Where the things of a prompt stand is not known, so the probe (fitted on rebuilt features, and also
on boxes that hold nothing) looks at the nine cells of the grid in the sizes that the prompt names;
a name's score is its highest probability anywhere. As many names as the prompt has are taken from
the top, and the figure is the share of the prompt's names among them, over the same for encoder
features of the true pictures.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lavit.data.scenes.sample import nominal, scene_at
from lavit.data.scenes.world import BACKGROUNDS, CELLS, PATTERNS, SHAPES, Box, Facts, Scene, facts
from lavit.evaluate.drawing import turned, written
from lavit.evaluate.exam import BATCH, Exam, decoded, tokens_of
from lavit.evaluate.figures import Figure, ratio
from lavit.evaluate.tokens import OTHER_SEED

THINGS = 6_000  # that a probe is fitted on
DECAY = 1e-4  # of a probe's weights
ROUNDS = 150  # of its fitting, at most
NOTHING = "nothing"
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
class Rows:
    """Mean features of boxes and grounds, as the encoder sees them and as they are rebuilt, with
    what they are.
    """

    names: tuple[str, ...]
    seen: list[Tensor] = field(default_factory=list)
    rebuilt: list[Tensor] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    pictures: list[int] = field(default_factory=list)  # number of the picture of each row

    def add(self, patches: Sequence[int], label: int, picture: int, seen: Tensor, rebuilt: Tensor) -> None:
        """One box of a picture."""
        self.seen.append(seen[patches].mean(0))
        self.rebuilt.append(rebuilt[patches].mean(0))
        self.labels.append(label)
        self.pictures.append(picture)

    def probe(self, *, rebuilt: bool) -> Probe:
        """The probe fitted on one kind of features."""
        rows = torch.stack(self.rebuilt if rebuilt else self.seen).cpu()
        return fit(rows, torch.tensor(self.labels), len(self.names))

    def right(self, probe: Probe, *, rebuilt: bool) -> list[float]:
        """Share of right answers in each picture that has rows, in the order of pictures."""
        rows = torch.stack(self.rebuilt if rebuilt else self.seen).cpu()
        hits = probe.right(rows, torch.tensor(self.labels))
        found: dict[int, list[bool]] = {}
        for picture, hit in zip(self.pictures, hits, strict=True):
            found.setdefault(picture, []).append(hit)
        return [float(np.mean(of)) for _, of in sorted(found.items())]

    def commonest(self, among: Rows) -> float:
        """Share of the commonest label of other rows here."""
        label = int(np.bincount(among.labels).argmax())
        return float(np.mean([one == label for one in self.labels]))


@dataclass
class Material:
    """Things, grounds, and things beside empty boxes of many scenes."""

    things: Rows
    grounds: Rows
    cells: Rows


def names_of(exam: Exam) -> tuple[str, ...]:
    """Everything that a thing may be."""
    return (*exam.rules.objects_named, *SHAPES)


def material(exam: Exam, scenes: Sequence[Scene], seen: Tensor, rebuilt: Tensor, into: Material, first: int) -> None:
    """Add the rows of pictures, whose numbers begin with `first`."""
    grid = exam.model.config.vision.grid
    names = names_of(exam)
    for number, scene in enumerate(scenes):
        at = (first + number, seen[number], rebuilt[number])
        free = set(range(grid * grid))
        for thing in scene.things:
            inside = patches_in(thing.box, grid)
            free -= set(inside)
            for rows in (into.things, into.cells):
                rows.add(inside, names.index(thing.name), *at)
        ground = GROUNDS.index((scene.background, scene.pattern))
        into.grounds.add(sorted(free) or list(range(grid * grid)), ground, *at)
        for place, box in enumerate(empty(scene)):
            if (first + number + place) % 3 == 0:
                into.cells.add(patches_in(box, grid), len(names), *at)


def empty(scene: Scene) -> list[Box]:
    """Boxes of cells in which nothing stands."""
    size = scene.things[0].size if scene.things else "small"
    boxes = [nominal(cell, size) for cell in CELLS]
    return [box for box in boxes if not any(_touch(box, thing.box) for thing in scene.things)]


def _touch(a: Box, b: Box) -> bool:
    return max(abs(a.x - b.x), abs(a.y - b.y)) < (a.side + b.side) / 2


def fitted(exam: Exam) -> Material:
    """Rows of scenes like training's, until there are 6,000 things."""
    if "fitted" not in exam.cache:
        wanted, into, first = exam.scaled(THINGS), _material(exam), 0
        while len(into.things.labels) < wanted:
            numbers = range(first, first + BATCH)
            scenes = [scene_at("train", n, seed=OTHER_SEED + 1, rules=exam.rules) for n in numbers]
            features = exam.features([exam.picture(scene) for scene in scenes])
            _both(exam, scenes, features, into, first)
            first += BATCH
            if exam.progress:
                exam.progress("things of probes", min(wanted, len(into.things.labels)), wanted)
        exam.cache["fitted"] = into
    return exam.cache["fitted"]


def asked(exam: Exam) -> Material:
    """Rows of test scenes."""
    if "asked" not in exam.cache:
        features, _ = exam.encoded("test", exam.count)
        into = _material(exam)
        scenes = [exam.scene("test", n) for n in range(exam.count)]
        for at in range(0, exam.count, BATCH):
            _both(exam, scenes[at : at + BATCH], features[at : at + BATCH], into, at)
        exam.cache["asked"] = into
    return exam.cache["asked"]


def _material(exam: Exam) -> Material:
    names = names_of(exam)
    grounds = tuple(" ".join(ground) for ground in GROUNDS)
    return Material(Rows(names), Rows(grounds), Rows((*names, NOTHING)))


def _both(exam: Exam, scenes: Sequence[Scene], features: Tensor, into: Material, first: int) -> None:
    tokenizer = exam.tokenizer
    rebuilt = decoded(tokenizer, tokens_of(tokenizer, features))
    material(exam, scenes, tokenizer.standard(features), rebuilt, into, first)


def _kept(name: str, known: Rows, test: Rows) -> Figure:
    """Accuracy on rebuilt features over that on the encoder's."""
    seen = test.right(known.probe(rebuilt=False), rebuilt=False)
    rebuilt = test.right(known.probe(rebuilt=True), rebuilt=True)
    best = float(np.mean(seen))
    floor = ("the commonest", test.commonest(known) / best if best else 0.0)
    details = {
        "encoder": best,
        "rebuilt": float(np.mean(rebuilt)),
        "rows_fitted": len(known.labels),
    }
    return ratio(name, rebuilt, seen, floor=floor, ceiling=("the encoder's features", 1.0), details=details)


def identity_kept(exam: Exam) -> Figure:
    """How well things are named in features rebuilt from true codes, beside the encoder's."""
    return _kept("identity_kept", fitted(exam).things, asked(exam).things)


def background_kept(exam: Exam) -> Figure:
    """How well colour and pattern of the background are named there."""
    return _kept("background_kept", fitted(exam).grounds, asked(exam).grounds)


def found_names(
    probe: Probe,
    features: Float[Tensor, "patches dim"],
    wanted: Facts,
    names: Sequence[str],
    grid: int,
) -> float:
    """Share of a prompt's names among the likeliest names anywhere, as many as the prompt has."""
    asked_for = {group.name for group in wanted.groups}
    sizes = sorted({group.size or "small" for group in wanted.groups})
    boxes = [patches_in(nominal(cell, size), grid) for size in sizes for cell in CELLS]
    rows = torch.stack([features[inside].mean(0) for inside in boxes]).cpu()
    best = probe.probabilities(rows)[:, : len(names)].amax(0)  # without "nothing"
    top = best.argsort(descending=True, stable=True)[: len(asked_for)].tolist()
    return len(asked_for & {names[n] for n in top}) / len(asked_for)


def write_identity(exam: Exam) -> Figure:
    """How well the things of a prompt are named in features rebuilt from freely written codes."""
    exam.needs("language")
    codes = written(exam, "test", range(exam.count))
    features, _ = exam.encoded("test", exam.count)
    known, names, grid = fitted(exam).cells, names_of(exam), exam.model.config.vision.grid
    sees, rebuilds = known.probe(rebuilt=False), known.probe(rebuilt=True)
    wanted = [facts(exam.scene("test", n)) for n in range(exam.count)]
    scores: dict[str, list[float]] = {"written": [], "true": [], "seen": [], "another": []}
    for at in range(0, exam.count, BATCH):
        part = features[at : at + BATCH]
        from_codes = exam.model.features([torch.tensor(one) for one in codes[at : at + BATCH]])
        kinds = {
            "written": (rebuilds, from_codes),
            "true": (rebuilds, decoded(exam.tokenizer, tokens_of(exam.tokenizer, part))),
            "seen": (sees, exam.tokenizer.standard(part)),
        }
        for kind, (probe, rows) in kinds.items():
            pairs = zip(rows, wanted[at : at + BATCH], strict=True)
            scores[kind] += [found_names(probe, one, said, names, grid) for one, said in pairs]
        pairs = zip(from_codes, turned(wanted)[at : at + BATCH], strict=True)
        scores["another"] += [found_names(rebuilds, one, said, names, grid) for one, said in pairs]
    best = float(np.mean(scores["seen"])) or 1.0
    return ratio(
        "write_identity",
        scores["written"],
        scores["seen"],
        floor=("codes of another prompt", float(np.mean(scores["another"])) / best),
        ceiling=("true codes", float(np.mean(scores["true"])) / best),
        details={kind: float(np.mean(values)) for kind, values in scores.items()},
    )

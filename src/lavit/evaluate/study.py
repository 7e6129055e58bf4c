"""What a study is: arms that differ in one thing, the figures they are judged by, and a claim.

A study is a Python file that defines `STUDY`; nothing in this package knows any. An arm is a
function from a preset to a preset; where it needs a part that another arm makes, it names the arm.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lavit.config import InputError
from lavit.data.scenes.splits import Rules
from lavit.evaluate.exam import Exam
from lavit.evaluate.figures import Figure
from lavit.presets import Preset, pico
from lavit.train.encoded import Encoded

MakeSelector = Callable[["Study", Preset, int], dict[str, Tensor]]  # the last is the seed
RowFilter = Callable[[Iterable[dict[str, Any]]], Iterable[dict[str, Any]]]


@dataclass(frozen=True)
class Arm:
    """One arm: what it changes, and what it takes from other arms of the same seed."""

    change: Callable[[Preset], Preset] = lambda preset: preset
    selector_of: str = ""  # the arm whose selector it has from the start
    selector: MakeSelector | None = None  # makes the weights of the one that it has from the start
    lm_of: str = ""  # the arm whose language model it begins with, without what knows pictures
    goes_on: str = ""  # the arm whose whole language part it trains further
    share: float = 1.0  # of the study's target tokens
    rates: bool = False  # whether its learning rate is chosen from the study's
    pixels: bool = False  # whether a decoder is trained
    # what it learns from, where that is not codes, by the folder of stage 2 and what is encoded
    conditioned: Callable[[Path, Encoded], Encoded] | None = None
    measured: bool = True  # False: it is there for other arms
    tokenizer_alone: bool = False  # without language: figures of tokenizer and decoder alone
    exam: type[Exam] = Exam  # what measures it
    texts: float = 0.0  # documents of the study's texts for each one of pictures
    rules: Rules | None = None  # of its training scenes, where they are not the study's
    rows: RowFilter | None = None  # of its pool's metadata, what is left of them, and how


@dataclass(frozen=True)
class Comparison:
    """Two arms and a figure; `claimed` is the sign of the difference by the paper, 0 without."""

    arm: str
    against: str
    figure: str
    claimed: int = 0


@dataclass(frozen=True)
class Study:
    """Arms by name, the first of which sets the budget: the target tokens of the preset's steps.

    `figures` are names of `lavit eval` or of the study's `own`; all arms are measured by `rules`
    on `count` items.
    """

    name: str
    claim: str  # what the paper says
    at_scale: str  # what could change the answer at scale
    arms: Mapping[str, Arm]
    figures: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    seeds: int = 3
    preset: Callable[[], Preset] = pico
    rules: Rules = field(default_factory=lambda: Rules(objects=24, plain=True))
    pictures: int = 6000
    count: int = 200
    rates: tuple[float, ...] = ()  # a multiple of all the preset's rates of stage 2
    # on the validation splits, by seed 0
    chosen_by: str = "read_pairs_likelihood"
    own: Mapping[str, Callable[[Exam], Figure]] = field(default_factory=dict)
    texts: Callable[[], Sequence[str]] = tuple  # without pictures, that arms may mix in

    def __post_init__(self) -> None:
        for name, arm in self.arms.items():
            for other in filter(None, (arm.selector_of, arm.lm_of, arm.goes_on)):
                if other not in self.arms or other == name:
                    raise InputError(f"the arm {name!r} of {self.name} takes from {other!r}")
            if arm.rates and not self.rates:
                raise InputError(f"the arm {name!r} of {self.name} has no rates to choose from")
        for one in self.comparisons:
            if {one.arm, one.against} - set(self.arms) or one.figure not in self.figures:
                raise InputError(f"{self.name} compares what it does not measure: {one}")

    def preset_of(self, name: str) -> Preset:
        """An arm's preset."""
        arm, found = self.arms[name], self.preset()
        if arm.selector_of or arm.selector:
            found = in_training(found, "tokenizer", given_selector=True)
        return arm.change(found)

    def rules_of(self, name: str) -> Rules:
        """Rules of an arm's training scenes."""
        return self.arms[name].rules or self.rules


def load_study(path: Path) -> Study:
    """The study of a file; raises `InputError` if it has none."""
    said = f"{path} is no study"
    if path.suffix != ".py" or not path.is_file():
        raise InputError(f"{said}: give a Python file that defines STUDY")
    spec = importlib.util.spec_from_file_location(f"lavit_study_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise InputError(f"{path}, line {error.lineno}: {error.msg}") from error
    found = getattr(module, "STUDY", None)
    if not isinstance(found, Study):
        raise InputError(f"{said}: it defines no STUDY")
    return found


def retuned(preset: Preset, factor: float) -> Preset:
    """A preset with all rates of stage 2 multiplied."""
    language = preset.training.language
    names = ("learning_rate", "rows_rate", "reader_rate")
    rates = {name: factor * getattr(language, name) for name in names}
    return in_training(preset, "language", **rates)


def in_training(preset: Preset, stage: str, **fields: Any) -> Preset:
    """A preset with other settings of a stage's training."""
    new = replace(getattr(preset.training, stage), **fields)
    return replace(preset, training=replace(preset.training, **{stage: new}))


def in_model(preset: Preset, part: str, **fields: Any) -> Preset:
    """A preset with other settings of a part of the model."""
    new = replace(getattr(preset.model, part), **fields)
    return replace(preset, model=replace(preset.model, **{part: new}))

"""What a study costs before it starts: single steps are timed on a few scenes, and multiplied."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median

from lavit.config import TrainConfig
from lavit.data.scenes.dataset import write_pool
from lavit.evaluate.compare import Bench
from lavit.evaluate.study import Study
from lavit.generate.pipeline import Pipeline
from lavit.model import LaVIT
from lavit.train.loop import Report
from lavit.train.run import open_run, train_stages

SCENES, TIMED = 48, 8  # drawn for the timing; encoded and described
STEPS = 4


@dataclass(frozen=True)
class Pace:
    """Seconds on this machine, as it is now: a picture, a step of each stage, a caption."""

    picture: float
    tokenizer: float
    language: float
    pixels: float
    caption: float


@dataclass(frozen=True)
class PlanLine:
    """So many of something, of so many minutes each."""

    what: str
    count: int
    minutes: float

    @property
    def total(self) -> float:
        """Minutes of all."""
        return self.count * self.minutes


def pace_of(study: Study) -> Pace:
    """Time single steps of the study's preset; all that is made is thrown away."""
    preset = study.preset()
    t = preset.training
    training: TrainConfig = replace(
        t,
        log_every=1,
        sample_every=0,
        tokenizer=replace(t.tokenizer, steps_a=STEPS, steps_b=STEPS, k_means_vectors=500),
        language=replace(t.language, steps=STEPS),
        pixels=replace(t.pixels, steps=STEPS),
    )
    at: dict[str, list[float]] = {}

    def watch(report: Report) -> None:
        at.setdefault(report.stage, []).append(time.perf_counter())

    with tempfile.TemporaryDirectory() as place:
        data, folder = Path(place) / "data", Path(place) / "run"
        size = preset.model.vision.image_size

        def draw() -> None:
            write_pool(data, pictures=SCENES, rules=study.rules, size=size)

        picture = _seconds(draw) / SCENES
        run = open_run(folder, data, preset.model, training, watch=watch, trackers=())
        encoded = train_stages(run)
        pipe = Pipeline(LaVIT.from_pretrained(folder))
        images = [one.record.open() for one in encoded.corpus.pictures[:TIMED]]
        picture += _seconds(lambda: pipe.model.patches(images)) / TIMED
        caption = _seconds(lambda: pipe.caption(images)) / TIMED
    # the middle step: the first ones warm up, and one starts the codes
    steps = {name: median(b - a for a, b in pairwise(times)) for name, times in at.items()}
    return Pace(picture, steps["tokenizer"], steps["language"], steps["pixels"], caption)


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def plan_study(study: Study, seeds: int, pace: Pace) -> list[PlanLine]:
    """What `compare` makes, and how long that takes at a pace; shared parts count once."""
    bench, preset = Bench(study, Path()), study.preset()
    t, arms = preset.training, study.arms
    pools = {str((study.rules_of(name).options(), arm.rows)) for name, arm in arms.items()}
    stage_1 = {bench.tokenizer_key(name): study.preset_of(name).training for name in arms}
    steps_1 = max(one.tokenizer.steps for one in stage_1.values())
    trained = [arm for arm in arms.values() if not arm.tokenizer_alone]
    share = sum(arm.share for arm in trained) / max(1, len(trained))
    language = t.language.steps * pace.language / 60
    measured = sum(arm.measured for arm in arms.values())
    tried = sum(arm.rates for arm in trained) * len(study.rates)
    item = study.count * pace.caption / 60
    return [
        PlanLine("pools and features", len(pools), study.pictures * pace.picture / 60),
        PlanLine("tokenizers", len(stage_1) * seeds, steps_1 * pace.tokenizer / 60),
        PlanLine("language models, equal tokens", len(trained) * seeds, share * language),
        PlanLine("language models, equal FLOPs, most", (len(trained) - 1) * seeds, language),
        PlanLine("quarter runs that choose rates", tried, language / 4 + item),
        PlanLine(
            "decoders",
            sum(arm.pixels for arm in trained) * seeds,
            t.pixels.steps * pace.pixels / 60,
        ),
        PlanLine("measurements", measured * seeds, item * len(study.figures)),
    ]

"""What a study costs before it starts: single steps are timed on a few scenes, and multiplied."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from lavit.config import TrainConfig
from lavit.data.scenes.dataset import write_pool
from lavit.evaluate.compare import Bench
from lavit.evaluate.study import Study
from lavit.generate.pipeline import Pipeline
from lavit.model import LaVIT
from lavit.train.loop import Report
from lavit.train.run import open_run, train_stages

SCENES = 48  # of the timing
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
    reports: list[Report] = []
    with tempfile.TemporaryDirectory() as place:
        data, folder, started = Path(place) / "data", Path(place) / "run", time.perf_counter()
        size = preset.model.vision.image_size
        write_pool(data, pictures=SCENES, rules=study.rules, size=size)
        options = {"watch": reports.append, "trackers": ()}
        run = open_run(folder, data, preset.model, training, **options)  # type: ignore[arg-type]
        encoded = train_stages(run, ("tokenizer",))
        picture = (time.perf_counter() - started) / SCENES
        train_stages(run, ("language", "pixels"))
        rates = {report.stage: report.rate for report in reports}
        picture -= (2 * STEPS) / rates["tokenizer"] / SCENES
        pipe = Pipeline(LaVIT.from_pretrained(folder))
        images = [one.record.open() for one in encoded.corpus.pictures[:8]]
        started = time.perf_counter()
        pipe.caption(images)
        caption = (time.perf_counter() - started) / len(images)
    stages = (1 / rates[name] for name in ("tokenizer", "language", "pixels"))
    return Pace(max(0.0, picture), *stages, caption)


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

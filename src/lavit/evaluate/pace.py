"""What a study costs before it starts: single steps are timed on a few scenes, and multiplied."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median

from lavit.config import TrainConfig, to_json
from lavit.data.scenes.dataset import write_pool
from lavit.evaluate.bench import Bench
from lavit.evaluate.budget import targets_per_step
from lavit.evaluate.measure import key_of
from lavit.evaluate.study import Study
from lavit.generate.pipeline import Pipeline
from lavit.model import LaVIT
from lavit.presets import Preset
from lavit.train.encoded import language_stage
from lavit.train.loop import Report
from lavit.train.run import open_run, train_stages

SCENES, TIMED = 48, 8  # drawn for the timing; encoded and described
STEPS = 4
# figures for which each item is described or drawn, which is most of what measuring costs
WORDY = ("read_", "answer_", "draw_", "write_", "edit_", "compose_", "cycle_", "chat")


@dataclass(frozen=True)
class Pace:
    """Seconds on this machine, as it is now: a picture, a step of each stage, a caption.

    `targets` are the target tokens of a step of stage 2.
    """

    picture: float
    tokenizer: float
    language: float
    pixels: float
    caption: float
    targets: float


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


def paces_of(study: Study) -> dict[str, Pace]:
    """The pace of the study's preset, "", and those of arms that a rival's part or other kinds of
    documents make others.
    """
    usual = study.preset()
    found, known = {"": pace_of(usual, study)}, dict[str, Pace]()
    for name in study.arms:
        preset = study.preset_of(name)
        model, base = preset.model, preset.model.language
        mixed = preset.training.language.mixture != usual.training.language.mixture
        if model.visual_tokenizer.rival or base.reader or mixed:
            key = key_of([to_json(model), to_json(preset.training)])
            if key not in known:
                known[key] = pace_of(preset, study)
            found[name] = known[key]
    return found


def pace_of(preset: Preset, study: Study) -> Pace:
    """Time single steps of a preset on the study's scenes; all that is made is thrown away."""
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
        model = LaVIT.from_pretrained(folder)
        pipe = Pipeline(model)
        stage = language_stage(run, encoded, model.language, model.text_tokenizer)
        images = [one.record.open() for one in encoded.corpus.pictures[:TIMED]]
        picture += _seconds(lambda: pipe.model.patches(images)) / TIMED
        caption = _seconds(lambda: pipe.caption(images)) / TIMED
        targets = targets_per_step(stage)
    # the middle step: the first ones warm up, and one starts the codes
    steps = {name: median(b - a for a, b in pairwise(times)) for name, times in at.items()}
    return Pace(picture, caption=caption, targets=targets, **steps)


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def plan_study(study: Study, seeds: int, paces: Mapping[str, Pace]) -> list[PlanLine]:
    """What `compare` makes, and how long that takes at a pace; shared parts count once.

    `paces` are those of `paces_of`; an arm without its own has that of "".
    """
    bench, arms, usual = Bench(study, Path()), study.arms, paces[""]
    pools = {str((study.rules_of(name).options(), arm.rows)) for name, arm in arms.items()}
    stage_1 = {bench.tokenizer_key(name): name for name in arms}

    def of_arm(name: str, stage: str) -> float:
        """Minutes of a stage with the preset's steps; of stage 2, with as many target tokens."""
        pace = paces.get(name, usual)
        steps = getattr(study.preset_of(name).training, stage).steps
        if stage == "language":
            steps *= usual.targets / pace.targets
        return steps * getattr(pace, stage) / 60

    trained = {name: arm for name, arm in arms.items() if not arm.tokenizer_alone}
    language = [arm.share * of_arm(name, "language") for name, arm in trained.items()]
    others = [of_arm(name, "language") for name in list(trained)[1:]]
    item = study.count * usual.caption / 60
    tries = [
        arm.share * of_arm(name, "language") + item for name, arm in trained.items() if arm.rates
    ]
    # arms that only what measures them sets apart share their decoder
    painting = {(bench.tokenizer_key(n), _later(study, n)): n for n, a in arms.items() if a.pixels}
    measured = sum(arm.measured for arm in arms.values())
    wordy = sum(name.startswith(WORDY) for name in study.figures)

    def line(what: str, minutes: Sequence[float], times: int) -> PlanLine:
        each = sum(minutes) / max(1, len(minutes))
        return PlanLine(what, len(minutes) * times, each)

    return [
        PlanLine("pools and features", len(pools), study.pictures * usual.picture / 60),
        line("tokenizers", [of_arm(name, "tokenizer") for name in stage_1.values()], seeds),
        line("language models, equal tokens", language, seeds),
        line("language models, equal FLOPs, most", others, seeds),
        line("language models at other rates", tries, max(0, len(study.rates) - 1)),
        line("decoders", [of_arm(name, "pixels") for name in painting.values()], seeds),
        PlanLine("measurements", measured * seeds, item * max(1, wordy)),
    ]


def _later(study: Study, name: str) -> str:
    """What an arm's stages 2 and 3 depend on."""
    preset = study.preset_of(name)
    return repr((preset.model.language, preset.model.pixels, preset.training))

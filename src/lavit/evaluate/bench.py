"""The parts of a study's arms, each made once; see compare.py for where they lie."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lavit.config import InputError, read_config, read_json, to_json, write_json
from lavit.evaluate.budget import Cost, cost_of
from lavit.evaluate.measure import Say, figures_key, key_of, measure, source_of
from lavit.evaluate.study import Study, in_model, in_training, retuned
from lavit.evaluate.study_data import StudyData, made_at
from lavit.files import replacing, save_tensors
from lavit.presets import Preset
from lavit.storage import export_lm, load_language, load_visual_tokenizer
from lavit.train.encoded import Encoded
from lavit.train.health import Alarm
from lavit.train.loop import Report
from lavit.train.run import Run, open_run, take_tokenizer, train_stages

TOLERANCE = 0.05  # of FLOPs, below which a second run would be the same
TRAINING = 2  # raised where the same settings come to other weights: 2, rows of codes from codebook
COUNTING = 2  # raised where budgets are counted otherwise: 2, rows a step, weights of the head


@dataclass(frozen=True)
class Trained:
    """A finished run of an arm."""

    folder: Path
    cost: Cost
    rate: float  # the multiple of the preset's rates


class Bench:
    """Makes the parts of a study's arms, each where its key says."""

    def __init__(
        self,
        study: Study,
        out: Path,
        *,
        watch: Callable[[Report], None] | None = None,
        progress: Say = lambda what, done, of: None,
    ) -> None:
        self.study, self.out, self.watch, self.progress = study, out.resolve(), watch, progress
        self.data = StudyData(study, self.out, progress)
        self._tried: dict[str, dict[float, float | None]] = {}
        self._encoded: tuple[tuple[Path, str], Encoded] | None = None  # the last tokenizer's

    def tokenizer(self, name: str, seed: int) -> Path:
        """Stage 1 of an arm."""
        arm, preset = self.study.arms[name], self.study.preset_of(name)
        given = self.tokenizer(arm.selector_of, seed) if arm.selector_of else None
        folder = self.out / "tokenizers" / f"{self.tokenizer_key(name)}-{seed}"
        with made_at(self.out, folder):
            if (folder / "visual_tokenizer" / "done").exists():
                return folder
            weights: dict[str, Any] = {}
            if arm.selector is not None:
                weights = arm.selector(self.study, preset, seed)
            elif given is not None:
                weights = load_visual_tokenizer(read_config(given), given).selector.state_dict()
            if weights and not (folder / "selector").exists():
                with replacing(folder / "selector") as new:
                    save_tensors(weights, new / "model.safetensors")
            encoded = Encoded(self._run(folder, name, preset, seed, texts=False))
            with made_at(self.out, (folder / "cache").resolve()):  # which all seeds share
                _ = encoded.features
            train_stages(encoded.run, ("tokenizer",), encoded)
        return folder

    def tokenizer_key(self, name: str) -> str:
        """A hash of all that stage 1 of an arm depends on, but for the seed."""
        arm, preset = self.study.arms[name], self.study.preset_of(name)
        given = self.tokenizer_key(arm.selector_of) if arm.selector_of else ""
        given += "" if arm.selector is None else source_of(arm.selector)
        parts: list[Any] = [to_json(preset.model.vision), to_json(preset.model.visual_tokenizer)]
        parts += [to_json(preset.training.tokenizer), given, *self._shared(name)]
        return key_of(parts)

    def _shared(self, name: str) -> list[Any]:
        """What all stages of an arm depend on."""
        rules, rows = self.study.rules_of(name), self.study.arms[name].rows
        source = [TRAINING] if rows is None else [TRAINING, source_of(rows), rows.__qualname__]
        training = self.study.preset_of(name).training
        return [rules.options(), source, self.study.pictures, training.clip, training.precision]

    def _run(
        self,
        folder: Path,
        name: str,
        preset: Preset,
        seed: int,
        *,
        texts: bool = True,
        **options: Any,
    ) -> Run[Any]:
        """A run on an arm's data, which shares the cache of all runs on them."""
        data = self.data.folder(name)
        training = replace(preset.training, seed=seed, sample_every=0)
        source = self.data.source(name, data) if texts else str(data)
        shared = [data.name, to_json(preset.model.vision), training.text_vocabulary]
        shared += [source] * (source != str(data))
        cache = self.out / "caches" / key_of(shared)
        cache.mkdir(parents=True, exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "cache").exists():
            (folder / "cache").symlink_to(cache.resolve())
        options |= {"watch": self.watch, "prepare": self.progress, "trackers": ()}
        start = options.get("start")
        model = preset.model if start is None else read_config(start)
        return open_run(folder, source, model, training, **options)

    def encoded(self, name: str, seed: int) -> Encoded:
        """Data, features and tokens of an arm; those of the last tokenizer stay in memory."""
        folder = self.tokenizer(name, seed)
        key = folder, self.data.source(name, self.data.folder(name))
        if self._encoded is None or self._encoded[0] != key:
            run = self._run(folder, name, self.study.preset_of(name), seed, texts=False)
            self._encoded = key, Encoded(replace(run, data=key[1]))
            with made_at(self.out, (folder / "cache").resolve()):
                _ = self._encoded[1].tokens
        return self._encoded[1]

    def rate(self, name: str) -> float:
        """The multiple of the preset's rates that seed 0 of an arm reads validation pictures best
        with; of equals the one that is nearest to 1.
        """
        if not self.study.arms[name].rates:
            return 1.0
        found = self.tried(name)
        best = {rate: value for rate, value in found.items() if value is not None}
        if not best:
            said = f"the arm {name!r} of {self.study.name} trains with none of its rates"
            raise InputError(f"{said} ({', '.join(map(str, found))}): give the study smaller ones")
        return max(best, key=lambda rate: (best[rate], -abs(math.log(rate))))

    def tried(self, name: str) -> dict[float, float | None]:
        """What an arm reaches with each rate; None for one that fails to train."""
        if name in self._tried:
            return self._tried[name]
        found: dict[float, float | None] = {}
        for rate in self.study.rates if self.study.arms[name].rates else ():
            try:
                run = self._language(name, 0, rate, share=self.study.arms[name].share)
            except Alarm:
                found[rate] = None
                continue
            seen = self.measured(name, run.folder, (self.study.chosen_by,), valid=True)
            found[rate] = seen["figures"][self.study.chosen_by]["value"]
        self._tried[name] = found
        return found

    def model(self, name: str, seed: int, column: str = "tokens") -> Trained | None:
        """A finished arm; None where the column's run would be that of equal tokens.

        An arm that others begin with has one run, which they begin with in both columns.
        """
        arm, rate = self.study.arms[name], self.rate(name)
        if arm.tokenizer_alone:
            return self._alone(name, seed) if column == "tokens" else None
        trained = self._language(name, seed, rate, share=arm.share)
        if column == "flops":
            first = next(iter(self.study.arms))
            wanted = self._language(first, seed, self.rate(first), share=1.0).cost.flops
            wanted *= arm.share
            base = any(other.lm_of == name for other in self.study.arms.values())
            if base or abs(trained.cost.flops / wanted - 1) <= TOLERANCE:
                return None
            steps = max(1, round(wanted / trained.cost.flops_per_step))
            trained = self._language(name, seed, rate, share=arm.share, steps=steps, column=column)
        if arm.pixels:
            preset = self._preset(name, rate, trained.cost.steps)
            start = self._start(name, seed, column)
            self._train(name, seed, trained.folder, preset, ("language", "pixels"), start=start)
        return trained

    def _alone(self, name: str, seed: int) -> Trained:
        """An arm's tokenizer, or a run that has it and a decoder."""
        if not self.study.arms[name].pixels:
            return Trained(self.tokenizer(name, seed), Cost(), 1.0)
        preset = self.study.preset_of(name)
        parts = [to_json(preset.model.pixels), to_json(preset.training.pixels)]
        key = key_of([self.tokenizer_key(name), *parts])
        folder = self.out / "models" / f"{key}-{seed}"
        self._train(name, seed, folder, preset, ("pixels",))
        return Trained(folder, Cost(), 1.0)

    def _preset(self, name: str, rate: float, steps: int) -> Preset:
        preset = retuned(self.study.preset_of(name), rate)
        if self.study.arms[name].lm_of:
            preset = in_model(preset, "language", source="folder", architecture={})
        return in_training(preset, "language", steps=steps, rows=self._rows(name))

    def _budget(self, seed: int) -> float:
        """Target tokens of the first arm in its preset's steps."""
        first = next(iter(self.study.arms))
        steps = self.study.preset_of(first).training.language.steps
        return steps * self._cost(first, seed).targets_per_step

    def _rows(self, name: str) -> int:
        """Rows a step, which bring an arm's target tokens nearest to the first arm's."""
        first, own = next(iter(self.study.arms)), self.study.preset_of(name).training.language.rows
        ratio = self._counted(first, 0).targets_per_step / self._counted(name, 0).targets_per_step
        return max(1, round(own * ratio))

    def _cost(self, name: str, seed: int) -> Cost:
        """What a step of stage 2 costs an arm."""
        more = self._rows(name) / self.study.preset_of(name).training.language.rows
        one = self._counted(name, seed)
        return Cost(more * one.targets_per_step, more * one.flops_per_step)

    def _counted(self, name: str, seed: int) -> Cost:
        """The same with the rows of its preset: counted on its documents and kept.

        An LM that another arm trains counts as a new one of its size.
        """
        key = f"cost-{COUNTING}-{self._language_key(name)}.json"
        path = self.tokenizer(name, seed) / key
        if not path.exists():
            preset, encoded = self.study.preset_of(name), self.encoded(name, seed)
            with tempfile.TemporaryDirectory() as scratch:
                start = self._start(name, seed)
                run = self._run(Path(scratch), name, preset, seed, start=start)
                write_json(path, to_json(cost_of(run, encoded)))
        return Cost(**read_json(path))

    def _language_key(self, name: str) -> str:
        arm, preset = self.study.arms[name], self.study.preset_of(name)
        before = [one for one in (arm.lm_of, arm.goes_on) if one]
        others = [[self._language_key(one), self.study.arms[one].share] for one in before]
        parts = [to_json(preset.model.language), to_json(preset.training.language), others]
        texts = [arm.texts, *self.study.texts()] if arm.texts else []
        return key_of([*parts, *texts, preset.training.text_vocabulary, *self._shared(name)])

    def _language(
        self,
        name: str,
        seed: int,
        rate: float,
        *,
        share: float,
        steps: int | None = None,
        column: str = "tokens",
    ) -> Trained:
        """Stage 2 of an arm, of so many steps or for its share of the budget; where it goes on from
        another arm, from that one's run in the column.
        """
        cost = self._cost(name, seed)
        steps = steps or max(1, round(share * self._budget(seed) / cost.targets_per_step))
        cost = replace(cost, steps=steps)
        preset, arm = self.study.preset_of(name), self.study.arms[name]
        parts = [self.tokenizer_key(name), self._language_key(name), self._rows(name), steps, rate]
        parts += [to_json(preset.training.pixels), to_json(preset.model.pixels)]
        parts += [source_of(arm.conditioned)] if arm.conditioned else []
        start = self._start(name, seed, column)
        parts += [] if start is None else [start.name]
        folder = self.out / "models" / f"{key_of(parts)}-{seed}"
        preset = self._preset(name, rate, steps)
        self._train(name, seed, folder, preset, ("language",), start)
        kept = folder / "seconds.json"  # not there where a run was taken up after its last step
        seconds = float(read_json(kept)["language"]) if kept.exists() else 0.0
        cost = replace(cost, seconds=seconds)
        write_json(folder / "cost.json", to_json(cost))
        return Trained(folder, cost, rate)

    def _train(
        self,
        name: str,
        seed: int,
        folder: Path,
        preset: Preset,
        stages: tuple[str, ...],
        start: Path | None = None,
    ) -> None:
        """Train stages of a run on an arm's tokenizer, unless the last of them is done."""
        last: list[Report] = []

        def watch(report: Report) -> None:
            last.append(report)
            if self.watch:
                self.watch(report)

        with made_at(self.out, folder):
            if (folder / stages[-1] / "done").exists():
                return
            encoded, tokenizer = self.encoded(name, seed), self.tokenizer(name, seed)
            if "pixels" in stages and (conditioned := self.study.arms[name].conditioned):
                encoded = conditioned(folder, encoded)
            self._take_base(name, seed, folder)
            run = self._run(folder, name, preset, seed, start=start)
            run.watch = watch
            if start is None:
                take_tokenizer(run, tokenizer)
            train_stages(run, stages, encoded)
            if took := [one.steps / one.rate for one in last if one.stage == "language"]:
                write_json(folder / "seconds.json", {"language": took[-1]})

    def _take_base(self, name: str, seed: int, folder: Path) -> None:
        """Put the language model that an arm begins with where its run looks for it."""
        other = self.study.arms[name].lm_of
        if other and not (folder / "base").exists():
            trained = self.model(other, seed)
            assert trained is not None
            with replacing(folder / "base") as new:
                export_lm(*load_language(read_config(trained.folder), trained.folder), new)

    def _start(self, name: str, seed: int, column: str = "tokens") -> Path | None:
        """The model that an arm goes on from."""
        other = self.study.arms[name].goes_on
        trained = (self.model(other, seed, column) or self.model(other, seed)) if other else None
        return None if trained is None else trained.folder

    def row_key(self, name: str, column: str) -> str:
        """A hash of all that an arm's figures depend on, but for the seed."""
        study, arm, preset = self.study, self.study.arms[name], self.study.preset_of(name)
        first = next(iter(study.arms))
        parts: list[Any] = [figures_key(study, name, study.figures), column, arm.share, COUNTING]
        parts += [self.tokenizer_key(name), self.tokenizer_key(first), self._language_key(first)]
        parts += [study.rates, study.chosen_by] * arm.rates
        if not arm.tokenizer_alone:
            parts += [self._language_key(name)]
        if arm.pixels:
            parts += [to_json(preset.model.pixels), to_json(preset.training.pixels)]
            parts += [source_of(arm.conditioned)] if arm.conditioned else []
        return key_of(parts)

    def measured(
        self, name: str, folder: Path, names: tuple[str, ...], *, valid: bool = False
    ) -> dict[str, Any]:
        """Figures of an arm's model; see `measure`."""
        with made_at(self.out, folder):
            return measure(self.study, name, folder, names, valid=valid, progress=self.progress)

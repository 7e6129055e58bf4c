"""What survives kill -9, SIGTERM, a full disk, damaged files and a second process.

Command   python recipes/faults.py [--kills 20] [--seed 0] [--only tokenizer,eval]
Data      toy pictures and a toy model (tests/conftest.py), made on the spot
Cost      20 minutes of two CPU cores; --kills 2 takes a minute and is a test
Score     every line of the three tables ends in yes (LOG.md)

Each command of `lavit` runs in a fork of this process, which has the imports behind it. It is
killed at a moment drawn evenly from the time that it takes, runs again as it was, and must leave
the same losses and files, to the byte, as where nobody disturbed it.
"""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import tyro
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
# what a command imports, once for all forks
import lavit.data.bulk
import lavit.evaluate.evaluation
import lavit.evaluate.folder
import lavit.generate.pipeline
import lavit.pixels.decoder
import lavit.train.finetune  # noqa: F401
from conftest import NAMES, toy_config, toy_picture, toy_training
from lavit.cli import main as command_line
from lavit.presets import PRESETS, Preset

PICTURES = 48
MANY = 1200  # pictures of the feature cache, which is marked every 512
STEPS = 12
OTHER = "first stage of a stream"  # what the second starts from
LOCKS = shutil.ignore_patterns("*.lock")
UNLIKE = ("tensorboard", ".lock", ".eval.predictions.jsonl.lock")  # times in them, or empty
SOONEST = 0.002  # seconds


@dataclass(frozen=True)
class Work:
    """One command: its words, where OUT is a folder that begins as what `start` leaves behind."""

    name: str
    words: tuple[str, ...]
    start: str | None = None


@dataclass(frozen=True)
class End:
    """How a command ended: exit code (negative: signal), what it printed, seconds."""

    code: int
    said: str
    seconds: float

    @property
    def line(self) -> str:
        """Its last line."""
        return (self.said.strip().splitlines() or [""])[-1]

    def is_one_line(self, *codes: int) -> bool:
        """Did it end with one of these codes, an error of one line and no traceback?"""
        errors = re.findall(r"^lavit: ", self.said, re.MULTILINE)
        return self.code in codes and len(errors) == 1 and "Traceback" not in self.said


class Bench:
    """A folder for toy data, toy models and what becomes of them."""

    def __init__(self, place: Path, many: int = MANY) -> None:
        self.place, self.runs = place, 0
        training = toy_training(STEPS)
        one = replace(training.tokenizer, steps_a=1, steps_b=1)
        PRESETS["toy"] = lambda: Preset(toy_config(), training, minutes=1)
        PRESETS["toy-short"] = lambda: Preset(
            toy_config(), replace(training, tokenizer=one), minutes=1
        )
        self.data, self.many = place / "data", place / "many"
        self.tars, self.talks = place / "tars", place / "talks.jsonl"
        self._write_data(many)
        data, model = str(self.data), str(place / "made" / "pixels")
        out = ("--preset", "toy", "--data", data, "--out", "OUT")
        tars = ("--preset", "toy", "--data", str(self.tars), "--out", "OUT")
        many = ("--preset", "toy-short", "--data", str(self.many), "--out", "OUT")
        talks = ("--data", str(self.talks), "--model", model, "--steps", str(STEPS), "--out", "OUT")
        shards = ("--model", model, "--workers", "0", "--shard-size", "8", "--out", "OUT")
        self.works = {
            "tokenizer": Work("tokenizer", ("train", "tokenizer", *out)),
            "language": Work("language", ("train", "language", *out), "tokenizer"),
            "pixels": Work("pixels", ("train", "pixels", *out), "language"),
            OTHER: Work(OTHER, ("train", "tokenizer", *tars)),
            "stream": Work("stream", ("train", "language", *tars, "--stream"), OTHER),
            "feature cache": Work("feature cache", ("train", "tokenizer", *many)),
            "finetune": Work("finetune", ("train", "finetune", *talks)),
            "tokenize-corpus": Work("tokenize-corpus", ("tokenize-corpus", data, *shards)),
            "eval": Work(
                "eval", ("eval", "OUT", "--data", data, "--json", "OUT/eval.json"), "pixels"
            ),
        }
        self.known: dict[str, tuple[dict[str, bytes], float]] = {}

    def _write_data(self, many: int) -> None:
        for folder, count, size in ((self.data, PICTURES, 48), (self.many, many, 32)):
            (folder / "train").mkdir(parents=True)
            lines = []
            for number in range(count):
                name = NAMES[number % len(NAMES)]
                file = folder / "train" / f"{number}.png"
                toy_picture(name, size).rotate(number % 31).save(file)
                lines.append(json.dumps({"file_name": file.name, "text": f"{name}."}) + "\n")
            (folder / "train" / "metadata.jsonl").write_text("".join(lines))
        self.tars.mkdir()
        for shard in range(2):
            with tarfile.open(self.tars / f"{shard}.tar", "w") as tar:
                for number in range(shard, PICTURES, 2):
                    tar.add(self.data / "train" / f"{number}.png", f"{number:03}.png")
                    text = self.place / "text"
                    text.write_text(f"{NAMES[number % len(NAMES)]}.")
                    tar.add(text, f"{number:03}.txt")
        with self.talks.open("w") as file:
            for number, name in enumerate(NAMES):
                picture = {"type": "image", "image": f"data/train/{number}.png"}
                asked = [picture, {"type": "text", "text": "what is it?"}]
                turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": name}]
                file.write(json.dumps({"messages": turns}) + "\n")

    def folder(self, work: Work) -> Path:
        """A new folder as a command finds it."""
        self.runs += 1
        out = self.place / "runs" / str(self.runs)
        if work.start is not None:
            shutil.copytree(self.place / "made" / work.start, out, ignore=LOCKS)
        return out

    def begin(self, work: Work, out: Path, *, largest: int = 0) -> tuple[int, int]:
        """Start a command in a fork, of which no file may become larger than `largest` bytes, if
        given; its number, and where to read what it prints (less than a pipe holds).
        """
        words = [word.replace("OUT", str(out)) for word in work.words]
        said, speak = os.pipe()
        pid = os.fork()
        if pid:
            os.close(speak)
            return pid, said
        code = 70
        try:
            os.dup2(speak, 1), os.dup2(speak, 2)
            sys.stdout = sys.stderr = os.fdopen(1, "w", closefd=False)  # tests replace them
            datasets.config.HF_DATASETS_CACHE = self.place / "cache" / out.name
            if largest:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
            command_line(words)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)

    def end(self, begun: tuple[int, int], at: float) -> End:
        """Wait for a fork that began at a time."""
        code = os.waitstatus_to_exitcode(os.waitpid(begun[0], 0)[1])
        with open(begun[1], "rb") as said:
            return End(code, said.read().decode(errors="replace"), time.perf_counter() - at)

    def run(self, work: Work, out: Path, **options: int) -> End:
        """A command from beginning to end."""
        began = time.perf_counter()
        return self.end(self.begin(work, out, **options), began)

    def disturbed(self, work: Work, out: Path, after: float, number: int) -> End:
        """A command that gets a signal after so many seconds."""
        began = time.perf_counter()
        begun = self.begin(work, out)
        time.sleep(after)
        os.kill(begun[0], number)  # a zombie, where it has ended: then nothing happens
        return self.end(begun, began)

    def undisturbed(self, work: Work) -> tuple[dict[str, bytes], float]:
        """Files and seconds of a command that nobody disturbs, which others start from."""
        if work.name not in self.known:
            needs = work.start or (
                "pixels" if str(self.place / "made" / "pixels") in work.words else ""
            )
            if needs:
                self.undisturbed(self.works[needs])
            out = self.folder(work)
            end = self.run(work, out)
            if end.code:
                raise SystemExit(f"{work.name} fails undisturbed:\n{end.said}")
            shutil.copytree(out, self.place / "made" / work.name)
            self.known[work.name] = files_of(out), end.seconds
        return self.known[work.name]

    def finished(self, work: Work, out: Path) -> str:
        """Run to the end: "yes" if all is as undisturbed, else what is not."""
        end = self.run(work, out)
        if end.code:
            return f"exit code {end.code}: {end.line}"
        return unlike(self.undisturbed(work)[0], files_of(out)) or "yes"


def files_of(folder: Path) -> dict[str, bytes]:
    """Files of a run but what holds times, memory or the folder's own name."""
    found, old = {}, set()
    for stage in (folder / "checkpoints").glob("*"):  # SIGTERM leaves one more
        old |= {str(path) for path in sorted(stage.glob("[0-9]*"), key=lambda p: int(p.name))[:-1]}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder)
        if not set(UNLIKE).intersection(name.parts) and str(path.parent) not in old:
            memory = rb'(peak_gib|"peak_gib":) [0-9.e-]+'
            text = path.suffix in (".jsonl", ".md")
            data = path.read_bytes()
            found[str(name)] = re.sub(memory, b"", data) if text else data
    return found


def unlike(wanted: dict[str, bytes], found: dict[str, bytes]) -> str:
    """What differs, in words."""
    names = sorted(wanted.keys() | found.keys())
    return ", ".join(name for name in names if wanted.get(name) != found.get(name))[:200]


def say(rows: list[list], *row: object) -> None:
    """One more row of a table, printed at once."""
    rows.append(list(row))
    print("  ".join(map(str, row)), flush=True)


def kill_all(bench: Bench, works: list[Work], kills: int, rng: np.random.Generator) -> list[list]:
    """Rows: command, seconds, kills (and how many came in time), the same in the end."""
    rows = []
    for number, named in ((signal.SIGKILL, "kill -9"), (signal.SIGTERM, "SIGTERM")):
        for work in works:
            seconds = bench.undisturbed(work)[1]
            in_time, wrong = 0, []
            for _ in range(kills if number == signal.SIGKILL else max(1, kills // 4)):
                out = bench.folder(work)
                moment = rng.uniform(SOONEST, seconds)
                end = bench.disturbed(work, out, moment, number)
                in_time += end.code != 0
                tidy = end.code in (0, -number) or end.is_one_line(128 + number)
                result = bench.finished(work, out) if tidy else end.said
                if result != "yes":
                    wrong.append(f"at {moment:.2f} s: {result}")
                    continue
                shutil.rmtree(out)
            say(rows, f"{named}, {work.name}", f"{seconds:.1f} s", in_time, wrong or "yes")
    return rows


def fill_disk(bench: Bench, works: list[Work], times: int, rng: np.random.Generator) -> list[list]:
    """No file may grow beyond a size below the largest: one line, and nothing is lost."""
    rows = []
    for work in works:
        made, out = bench.undisturbed(work)[0], bench.folder(work)
        before = files_of(out) if out.exists() else {}
        largest = max(len(data) for name, data in made.items() if before.get(name) != data)
        stopped, wrong = 0, []
        for _ in range(times):
            out, most = bench.folder(work), int(np.exp(rng.uniform(np.log(100), np.log(largest))))
            end = bench.run(work, out, largest=most)
            stopped += end.code != 0
            tidy = end.code == 0 or end.is_one_line(1, 2)
            result = bench.finished(work, out) if tidy else end.said
            if result != "yes":
                wrong.append(f"files of {most} bytes: {result}")
        say(rows, f"full disk, {work.name}", times, stopped, wrong or "yes")
    return rows


def cut(path: Path) -> None:
    """A file that ends in its middle."""
    os.truncate(path, path.stat().st_size // 2)


def rename(path: Path) -> None:
    """The largest tensor by another name."""
    tensors = load_file(path)
    name = max(tensors, key=lambda one: tensors[one].numel())
    tensors[f"{name}_"] = tensors.pop(name)
    save_file(tensors, path)


def resize(path: Path) -> None:
    """The largest tensor without its last row."""
    tensors = load_file(path)
    name = max(tensors, key=lambda one: tensors[one].numel())
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, path)


def damage_all(bench: Bench) -> list[list]:
    """A damaged file is named in one line; without it, the command goes on to the same files."""
    rows, works = [], bench.works

    def row(what: str, work: Work, out: Path, file: Path, spoil: Callable[[Path], None]) -> None:
        spoil(file)
        end = bench.run(work, out)
        named = file.name in end.line or file.parent.name in end.line
        result = end.said if not (end.is_one_line(2) and named) else ""
        if not result:
            shutil.rmtree(file.parent) if file.parent.name.isdigit() else file.unlink()
            result = bench.finished(work, out)
        say(rows, what, f"{spoil.__name__} {file.name}", "", result)

    language = works["language"]
    names = [(name, how) for name in ("module", "optimizer") for how in (cut, rename, resize)]
    for name, spoil in [*names, ("state", cut), ("random", cut), ("random", rename)]:
        bench.undisturbed(language)
        out = bench.place / "runs" / f"{name} {spoil.__name__}"
        shutil.copytree(bench.place / "made" / "language", out)
        for part in ("language", "reader"):  # as killed after the last checkpoint
            shutil.rmtree(out / part)
        file = out / "checkpoints" / "language" / str(STEPS) / f"{name}.safetensors"
        row("checkpoint", language, out, file, spoil)
    corpus = works["tokenize-corpus"]
    bench.undisturbed(corpus)
    out = bench.folder(corpus)
    shutil.copytree(bench.place / "made" / corpus.name, out)
    row("shard of tokens", corpus, out, out / "shard-00002.parquet", cut)
    bench.undisturbed(works["stream"])
    tar, out = bench.tars / "1.tar", bench.folder(works["stream"])
    kept = tar.read_bytes()
    cut(tar)
    end = bench.run(works["stream"], out)
    result = end.said if not (end.is_one_line(2) and tar.name in end.line) else ""
    tar.write_bytes(kept)
    say(rows, "shard of a stream", "cut 1.tar", "", result or bench.finished(works["stream"], out))
    cache, out = works["feature cache"], bench.folder(works["feature cache"])
    bench.undisturbed(cache)
    shutil.copytree(bench.place / "made" / cache.name / "cache", out / "cache")
    cut(next(path for path in (out / "cache").glob("*.npy") if ".done" not in path.name))
    say(rows, "feature cache", "cut features.npy", "", bench.finished(cache, out))
    return rows


def two_at_once(bench: Bench, names: tuple[str, ...]) -> list[list]:
    """The second process on a folder is refused in one line, and the first goes on."""
    rows = []
    for work in (bench.works[name] for name in names):
        bench.undisturbed(work)
        out = bench.folder(work)
        began = time.perf_counter()
        first = bench.begin(work, out)
        while not (out / ".lock").exists():
            time.sleep(SOONEST)
        time.sleep(0.05)
        os.kill(first[0], signal.SIGSTOP)
        second = bench.run(work, out)
        os.kill(first[0], signal.SIGCONT)
        done = bench.end(first, began)
        refused = second.is_one_line(2) and "another process" in second.line
        result = second.said if not refused else done.code and done.said
        result = result or unlike(bench.undisturbed(work)[0], files_of(out)) or "yes"
        say(rows, f"two at once, {work.name}", "", "", result)
    return rows


def main(kills: int = 20, seed: int = 0, only: str = "") -> None:
    """Disturb every command and print a line for each; exit code 1 if one differs in the end."""
    rng = np.random.default_rng(seed)
    gc.freeze()  # forks need not look through what was imported
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place), MANY if "feature cache" in only or not only else 0)
        names = only.split(",") if only else [name for name in bench.works if name != OTHER]
        chosen = [bench.works[name] for name in names]
        rows = kill_all(bench, chosen, kills, rng)
        rows += fill_disk(bench, chosen, max(1, kills // 4), rng)
        if not only:
            rows += damage_all(bench)
            rows += two_at_once(bench, ("language", "finetune", "tokenize-corpus"))
    wrong = [row for row in rows if row[-1] != "yes"]
    print(f"{len(rows)} lines, {len(rows) - len(wrong)} of them end in yes")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    tyro.cli(main)

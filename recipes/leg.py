"""One leg of a training, where a machine is lent for minutes: take up the state, train, pack it.

Starts a training command of `lavit` on what STATE holds, ends it by SIGTERM (which saves the step;
one that comes to the leg ends it too), and writes what the next leg needs back to STATE: at most 8
files of 16 MiB for nano and mini. All is over after so many minutes, imports included. Of STATE and
RUN, the one that is farther goes on. Features and codes of a corpus are not packed: they are made
again, or, with --stream, in each step. Nothing is fetched: `--data scenes --stream` is drawn from
seeds.

Command   python recipes/leg.py STATE RUN --minutes 9 -- train all --preset mini --data scenes
              --stream        (any `lavit train` without --out, which is RUN)
Cost      the minutes
Expected  losses of a training in legs are those of one in a piece; "goes on" or "done" at the end
"""

from __future__ import annotations

import io
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import psutil
import tyro

from lavit.config import InputError, read_json
from lavit.files import replacing
from lavit.train.checkpoint import latest_checkpoint
from lavit.train.settings import PART_OF

PIECE, PIECES = 16 * 2**20, 8  # bytes of a file, files
GRACE = 20.0  # seconds before the end that a step and its checkpoint may take
PACKING = 10.0  # seconds behind it for the state
MADE_AGAIN = ("tensorboard",)
SETTINGS = ("finetune.json", "training.json")  # what a run is; a fine-tuning ends with both
CARRIED = ("cache/text",)  # of the cache: a text tokenizer that was trained is no function of it


def settings_of(run: Path) -> Path | None:
    """The file that says what a run is, if one has begun."""
    return next((run / name for name in SETTINGS if (run / name).is_file()), None)


def kept(run: Path) -> list[Path]:
    """Files of a run that its next leg needs, without finished stages' and older checkpoints."""
    found: list[Path] = []
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run)
        top = name.parts[0]
        hidden = any(part.startswith(".") for part in name.parts)  # a lock, what a kill left
        if not path.is_file() or hidden or top in MADE_AGAIN:
            continue
        if top == "cache" and not str(name).startswith(CARRIED):
            continue
        if top == "checkpoints":
            stage = run / top / name.parts[1]
            done = (run / PART_OF.get(stage.name, "language") / "done").exists()
            newest = latest_checkpoint(stage)
            if done or newest is None or newest not in path.parents:
                continue
        found.append(name)
    return found


def pack(run: Path, state: Path) -> int:
    """Write the state of a run as files of at most `PIECE` bytes; returns how many.

    The state before stays, as .STATE.old in the end, until the new one is in its place. Raises
    `InputError` for more than `PIECES`, a run that has not begun, and a STATE of something else.
    """
    packed(state)
    if settings_of(run) is None:
        raise InputError(f"{run} holds no training yet: give the leg more --minutes")
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=1) as tar:
        for name in kept(run):
            tar.add(run / name, arcname=str(name), recursive=False)
    data = stream.getvalue()
    pieces = [data[at : at + PIECE] for at in range(0, len(data), PIECE)]
    if len(pieces) > PIECES:
        said = f"the state of {run} takes {len(data) / 2**20:.0f} MiB"
        raise InputError(f"{said}, more than {PIECES} files of {PIECE // 2**20} MiB: use --lora")
    with replacing(state) as new:
        for number, piece in enumerate(pieces):
            (new / f"{number}-of-{len(pieces)}").write_bytes(piece)
    return len(pieces)


def reached(run: Path) -> tuple[int, int]:
    """How far a run is: stages that are done, and the newest step of one that is not."""
    done = {stage for stage, part in PART_OF.items() if (run / part / "done").exists()}
    going = [path for path in run.glob("checkpoints/*") if path.name not in done]
    newest = filter(None, map(latest_checkpoint, going))
    return len(done), max((int(path.name) for path in newest), default=0)


def packed(state: Path) -> bytes:
    """What a state holds, nothing where there is none; what is no state raises `InputError`."""
    before = state.with_name(f".{state.name}.old")
    if not state.exists() and before.exists():  # stopped between the state before and its next
        before.rename(state)
    if not state.exists():
        return b""
    names = [path.name for path in state.iterdir()] if state.is_dir() else [state.name]
    if foreign := sorted(name for name in names if not re.fullmatch(r"\d+-of-\d+", name)):
        said = f"{state} is no state of a training: it holds {foreign[0]}"
        raise InputError(f"{said}; give STATE, then RUN, or another folder")
    wanted = int(names[0].rsplit("-", 1)[1]) if names else 0
    whole = [f"{number}-of-{wanted}" for number in range(wanted)]
    if sorted(names) != sorted(whole):
        raise InputError(f"{state} holds {len(names)} files of {wanted}: a part is missing")
    return b"".join((state / name).read_bytes() for name in whole)


def unpack(state: Path, run: Path) -> None:
    """Take up a state, in the place of a run that is not as far; one that is as far stays.

    Raises `InputError` for folders that hold something else, or another training than each other.
    """
    state, run = state.resolve(), run.resolve()
    if state == run or state in run.parents or run in state.parents:
        raise InputError(f"STATE ({state}) and RUN ({run}) lie in each other: give two folders")
    data, settings = packed(state), settings_of(run)
    there = {path.name for path in run.iterdir() if path.name[0] != "."} if run.exists() else set()
    if settings is None and there - {"cache"}:  # which may come before the settings
        raise InputError(f"{run} holds no training but something else: give RUN another folder")
    if not data:
        return
    with replacing(run) as new:
        try:
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as tar:
                tar.extractall(new, filter="data")
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise InputError(f"{state} is damaged: {error}") from error
        if settings is None:
            return
        packed_settings = settings_of(new)
        if packed_settings is None or read_json(packed_settings) != read_json(settings):
            raise InputError(f"{run} and {state} are of two trainings: give another RUN")
        if reached(run) >= reached(new):
            shutil.rmtree(new)
            new.mkdir()  # empty: the run stays


def leg(command: list[str], seconds: float) -> int:
    """Run a training and end it by SIGTERM, in time or when SIGTERM comes to this process, which
    from then on lets none disturb the packing; its exit code, 143 for one that goes on.
    """
    came: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    end = time.monotonic() + max(1.0, seconds - GRACE)
    job = subprocess.Popen(command)
    while job.poll() is None and not came and time.monotonic() < end:
        time.sleep(0.1)
    if job.poll() is None:
        job.send_signal(signal.SIGTERM)
    try:
        code = job.wait(GRACE)
    except subprocess.TimeoutExpired:
        job.kill()  # its last checkpoint is what the next leg goes on from
        job.wait()
        return 128 + signal.SIGTERM
    return 128 + signal.SIGTERM if code == -signal.SIGTERM else code


def running() -> float:
    """Seconds since this process began."""
    return time.time() - psutil.Process().create_time()


def main(
    state: tyro.conf.Positional[Path],
    run: tyro.conf.Positional[Path],
    words: tyro.conf.Positional[tuple[str, ...]],
    minutes: float = 9.0,
) -> None:
    """Take up STATE in RUN, train for so many minutes, pack STATE: at most 8 files of 16 MiB.

    words: the training behind --, e.g. -- train all --preset mini --data scenes --stream
    minutes: of all, imports too; the last 30 seconds are for saving and packing.
    """
    if words[:1] != ("train",):
        raise InputError(f"a leg is a training: write -- train STAGE ..., not {' '.join(words)}")
    unpack(state, run)
    command = [sys.executable, "-m", "lavit", *words, "--out", str(run)]
    code = leg(command, 60 * minutes - PACKING - running())
    if code not in (0, 128 + signal.SIGTERM):
        raise SystemExit(code)
    count = pack(run, state)
    done, step = reached(run)
    said = f"goes on with {done} stages done and step {step} of the next" if code else "done"
    print(f"{state}: {count} files, {said}")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

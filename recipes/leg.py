"""One leg of a training, where a machine is lent for minutes: take up the state, train, pack it.

Starts a training command of `lavit` on what STATE holds, ends it after so many minutes by SIGTERM
(which saves the step), and writes what the next leg needs back to STATE: at most 8 files of 16 MiB
for nano and mini. Features and codes of a corpus are not packed: they are made again, or, with
--stream, in each step. Nothing is fetched: `--data scenes --stream` is drawn from seeds.

Command   python recipes/leg.py STATE RUN --minutes 9 -- train all --preset mini --data scenes
              --stream        (any `lavit train` without --out, which is RUN)
Cost      the minutes, and the time that the last step and its checkpoint take
Expected  losses of a training in legs are those of one in a piece; "goes on" or "done" at the end
"""

from __future__ import annotations

import io
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import tyro

from lavit.config import InputError
from lavit.train.checkpoint import latest_checkpoint
from lavit.train.settings import PART_OF

PIECE, PIECES = 16 * 2**20, 8  # bytes of a file, files
GRACE = 20.0  # seconds before the end that a step and its checkpoint may take
MADE_AGAIN = ("tensorboard", ".lock")
CARRIED = ("cache/text",)  # of the cache: a text tokenizer that was trained is no function of it


def kept(run: Path) -> list[Path]:
    """Files of a run that its next leg needs, without finished stages' and older checkpoints."""
    found: list[Path] = []
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run)
        top = name.parts[0]
        if not path.is_file() or top in MADE_AGAIN:
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

    The state before stays until the new one is whole. Raises `InputError` for more than `PIECES`.
    """
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=1) as tar:
        for name in kept(run):
            tar.add(run / name, arcname=str(name), recursive=False)
    data = stream.getvalue()
    pieces = [data[at : at + PIECE] for at in range(0, len(data), PIECE)]
    if len(pieces) > PIECES:
        said = f"the state of {run} takes {len(data) / 2**20:.0f} MiB"
        raise InputError(f"{said}, more than {PIECES} files of {PIECE // 2**20} MiB: use --lora")
    new = state.with_name(f".{state.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for number, piece in enumerate(pieces):
        (new / f"{number}-of-{len(pieces)}").write_bytes(piece)
    shutil.rmtree(state, ignore_errors=True)
    new.rename(state)
    return len(pieces)


def unpack(state: Path, run: Path) -> None:
    """Take up a state; a run that is there already is newer or the same, and stays."""
    if run.exists() or not state.exists():
        return
    pieces = sorted(state.iterdir(), key=lambda path: int(path.name.split("-")[0]))
    wanted = int(pieces[0].name.rsplit("-", 1)[1]) if pieces else 0
    if len(pieces) != wanted:
        raise InputError(f"{state} holds {len(pieces)} files of {wanted}: a part is missing")
    data = b"".join(path.read_bytes() for path in pieces)
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as tar:
        tar.extractall(run, filter="data")


def leg(command: list[str], seconds: float) -> int:
    """Run a training and end it by SIGTERM in time; its exit code, 143 for one that goes on."""
    job = subprocess.Popen(command)
    try:
        return job.wait(max(1.0, seconds - GRACE))
    except subprocess.TimeoutExpired:
        job.send_signal(signal.SIGTERM)
    try:
        return job.wait(GRACE)
    except subprocess.TimeoutExpired:
        job.kill()  # its last checkpoint is what the next leg goes on from
        job.wait()
        return 128 + signal.SIGTERM


def main(
    state: tyro.conf.Positional[Path],
    run: tyro.conf.Positional[Path],
    words: tyro.conf.Positional[tuple[str, ...]],
    minutes: float = 9.0,
) -> None:
    """Unpack, train, pack."""
    started = time.monotonic()
    if words[:1] != ("train",):
        raise InputError(f"a leg is a training: write -- train STAGE ..., not {' '.join(words)}")
    unpack(state, run)
    command = [sys.executable, "-m", "lavit", *words, "--out", str(run)]
    code = leg(command, 60 * minutes - (time.monotonic() - started))
    if code not in (0, 128 + signal.SIGTERM):
        raise SystemExit(code)
    count = pack(run, state)
    print(f"{state}: {count} files, {'goes on' if code else 'done'}")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except InputError as error:
        sys.exit(f"error: {error}")

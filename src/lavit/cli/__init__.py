"""The command line: every verb of the package, one function each. The only room that prints.

Bad input ends with one line on stderr and exit code 2, a failing training (`Alarm`), a full disk or
another rank that ended with code 1, SIGTERM with 143.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tyro

from lavit.cli import compare as studies
from lavit.cli import convert as foreign
from lavit.cli import data as sets
from lavit.cli import eval as measure
from lavit.cli import make, serving, use
from lavit.config import InputError, Terminated

MAKE_ROOM = ": make room on the disk, then the same command goes on"
STOPPED = "stopped by SIGTERM: a run goes on where it was, with the same command"
LOST = re.compile(r"gloo/transport|NCCL error|ncclRemoteError")  # what torch says of a dead rank
VERBS: dict[str, Callable[..., Any]] = {
    "caption": use.caption,
    "choose": use.choose,
    "ask": use.ask,
    "chat": use.chat,
    "draw": use.draw,
    "edit": use.edit,
    "reconstruct": use.reconstruct,
    "tokenize": use.tokenize,
    "tokenize-corpus": use.tokenize_corpus,
    "inspect": use.inspect,
    "gallery": use.gallery,
    "words": use.words,
    "demo": use.demo,
    "serve": serving.serve,
    "train": make.train,
    "train-finetune": make.finetune,
    "eval": measure.evaluate,
    "compare": studies.compare,
    "export": make.export,
}
GROUPS: dict[str, dict[str, Callable[..., Any]]] = {
    "data": {"scenes": sets.scenes, "check": sets.check},
    "convert": {"check": foreign.check, "published": foreign.published, "reverse": foreign.reverse},
}


def data() -> None:
    """Scenes, the default data, and checks of any data set (lavit data scenes, check)."""
    _group("data")


def convert() -> None:
    """Published weights to ours and back, and parity (lavit convert check, published, reverse)."""
    _group("convert")


def _group(name: str) -> None:
    raise InputError(
        "a verb is missing: " + ", ".join(f"lavit {name} {verb}" for verb in GROUPS[name])
    )


def _is_full(error: BaseException) -> bool:
    """Is this a disk without room, or a file larger than allowed? Rust says so in words alone."""
    said = re.search(r"os error (\d+)", str(error))
    number = getattr(error, "errno", None) or (said and int(said[1]))
    return number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def exits() -> Iterator[None]:
    """What is raised within, and SIGTERM, as a line on stderr and an exit code; recipes too."""
    came: list[Terminated] = []

    def stop(*_: object) -> None:
        came.append(Terminated(STOPPED))
        raise came[0]

    before = signal.signal(signal.SIGTERM, stop)
    try:
        try:
            yield
        except Exception:
            if came:  # safetensors and torch make errors of their own of what a handler raises
                raise came[0] from None
            raise
        finally:
            sys.stdout.flush()  # `lavit --help | head`: that the reader has left shows here
    except BrokenPipeError as gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more
        raise SystemExit(141) from gone  # as the shell has it for SIGPIPE
    except InputError as error:
        full = error.__cause__ is not None and _is_full(error.__cause__)
        print(f"lavit: {error}{MAKE_ROOM if full else ''}", file=sys.stderr)
        raise SystemExit(1 if full else 2) from error
    except Terminated as end:
        print(f"lavit: {end}", file=sys.stderr)
        raise SystemExit(128 + signal.SIGTERM) from end
    except KeyboardInterrupt as end:
        print("lavit: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from end
    except Exception as error:
        # not imported for this: it brings torch, and --help is to be quick
        health = sys.modules.get("lavit.train.health")
        said = " ".join(str(error).split())
        if LOST.search(said):
            line = f"another process of this command has ended ({said[:200]})"
            line += ": see its last line; the same command goes on from the last checkpoint"
        elif health is not None and isinstance(error, health.Alarm):
            line = said
        elif _is_full(error):
            line = said + MAKE_ROOM
        else:
            raise
        print(f"lavit: {line}", file=sys.stderr)
        raise SystemExit(1) from error
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `lavit`."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("lavit").setLevel(logging.INFO)
    # threads that wait soon give their core away, or two processes spin in each other's way:
    # libgomp reads this when torch is first imported (placement.py has what works later)
    if not {"OMP_WAIT_POLICY", "torch"} & {*os.environ, *sys.modules}:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    for library in ("HF_HUB", "HF_DATASETS"):  # this command line has bars of its own
        os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    words = list(sys.argv[1:] if arguments is None else arguments)
    verbs, prog = {**VERBS, "data": data, "convert": convert}, "lavit"
    if words[:2] == ["train", "finetune"]:
        words = ["train-finetune", *words[2:]]
    if len(words) > 1 and words[0] in GROUPS:
        verbs, prog, words = GROUPS[words[0]], f"lavit {words[0]}", words[1:]
    about = "LaVIT: images as a foreign language."
    with exits():
        tyro.extras.subcommand_cli_from_dict(verbs, prog=prog, description=about, args=words)

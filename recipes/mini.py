"""Mini: scenes in free English, from SmolLM2-135M, in pictures of 160 px; RUN/mini is what ships.

One command draws the data from seeds, collects prose of the installed packages for replay, trains
the three stages and writes the weights in half precision. The same command goes on where it was
stopped; `--minutes` ends a leg by itself, so legs of nine minutes on a GPU are that command again
and again (exit code 3 while more is to do).

Command   python recipes/mini.py RUN [--hours 20] [--minutes 9]
          OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 recipes/mini.py RUN     (a process a core;
                                                     torchrun ends with 1 where a process has 3)
          lavit eval RUN/mini                        (every figure, own_* of the package's items)
Data      made on the spot: scenes of all 160 objects and 48 coloured shapes, conversations of up to
          four turns, prompts and questions in free words; documentation of installed packages
Cost      CPU seconds of one busy core, and hours of two, each with a process of its own:

              what                       each     --hours 20          --hours 2
              a picture drawn, encoded   0.025    84,000    0.3 h      8,400   0.03 h
              tokenizer, phase a / b     0.93, 0.70
              (32 pictures a step)                8,000     0.9 h        800   0.09 h
              language, 2 x 512 tokens   11.9     9,000    14.9 h        900   1.5 h
              pixels, 16 pictures        3.1      9,000     3.9 h        900   0.4 h
              all                                          20.0 h              2.0 h

          9.2 million tokens in 20 hours, 0.9 in two; shipped: 25 MB (language 11.2, tokenizer and
          reader 5.5, pixels 8.0), at most 34
Score     not trained at length yet: LOG.md
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import tyro
from nano import SAID as OF_NANO
from nano import ship
from prose import build_prose

from lavit.cli.output import ProgressBar
from lavit.config import Terminated
from lavit.data.scenes.dataset import write_pool
from lavit.data.scenes.splits import Rules
from lavit.presets import mini, scaled
from lavit.train.run import open_run, train_stages
from lavit.train.spread import make_accelerator

RULES = Rules(objects=160)
PICTURES, TALKS = 60_000, 12_000  # of the whole training; a shorter one has fewer
FEWEST = 400  # pictures
TEXT = 0.015  # documents of prose for one of pictures: they fill rows, the others a tenth of one
MORE = 3  # exit code: the leg is over, the training is not
SAID = OF_NANO | {
    "limits": "It knows scenes: 160 objects of two styles and 6 shapes in 8 colours on 24 "
    "backgrounds (`lavit words`). Photographs and other things get an answer all the same, in "
    "those words. Its language model is small, and knows little beyond them.",
}


def main(run: Path, /, hours: float = 20.0, minutes: float | None = None) -> None:
    """Train mini in a folder, or go on with it.

    hours: of two idle CPU cores, for all legs together; steps and data are scaled to it.
    minutes: of this leg, from the moment that the data are there.
    """
    preset, share = mini(), hours / 20
    training = scaled(preset.training, share)
    training = replace(training, checkpoint_every=50, sample_every=0)
    scenes, texts = run / "scenes", run / "prose.jsonl"
    with make_accelerator().main_process_first():
        collect(scenes, texts, min(1.0, share))
    signal.signal(signal.SIGTERM, end_leg)
    try:
        if minutes is not None:
            leg = threading.Timer(60 * minutes, os.kill, (os.getpid(), signal.SIGTERM))
            leg.daemon = True
            leg.start()
        with ProgressBar() as progress:
            how = {"watch": progress.report, "prepare": progress.count}
            data = f"{scenes},{texts}:{TEXT}"
            begun = open_run(run, data, preset.model, training, **how)
            train_stages(begun)
    except Terminated as stop:
        print(stop, file=sys.stderr)
        raise SystemExit(MORE) from stop
    if begun.main and not (run / "mini" / "README.md").exists():  # written last; it stays
        print(f"{run / 'mini'}: {ship(run, run / 'mini', SAID):.1f} MB")


def end_leg(*_: object) -> None:
    """What SIGTERM does between the stages, which save what they have by themselves."""
    raise Terminated("the leg is over: the same command goes on from there")


def collect(scenes: Path, texts: Path, share: float) -> None:
    """Draw this share of the scenes, and collect prose; what is there already stays."""
    with ProgressBar() as progress:
        write_pool(
            scenes,
            pictures=max(FEWEST, round(share * PICTURES)),
            conversations=max(FEWEST // 5, round(share * TALKS)),
            free_words=True,
            rules=RULES,
            processes=min(4, os.cpu_count() or 1),
            progress=partial(progress.count, "pictures"),
        )
    if not texts.with_suffix(".origin.json").exists():  # written last
        build_prose(texts)


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.PositionalRequiredArgs,))

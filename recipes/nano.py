"""Nano: all three stages from scratch on two CPU cores.

Command   python recipes/nano.py DATA RUN [MINUTES]     (the same as lavit train all --preset nano)
Data      lavit data starter --out DATA --families 400 --tones dark      (982 training pictures, 557 names)
Cost      about 15 minutes on two idle cores, or MINUTES
Score     LOG.md has what `lavit eval RUN` printed

Change a field by replacing it: `replace(preset.training, views=1)`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lavit.presets import nano, scaled
from lavit.train.run import Run


def main(data: str, out: str, minutes: str | None = None) -> None:
    """Train nano on `data` into `out`."""
    preset = nano()
    training = scaled(preset.training, float(minutes) / preset.minutes) if minutes else preset.training
    Run(Path(out), data, preset.model, training).train()


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What runs on a second device (on_device.py), in a process of its own: torch keeps a backend."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_training_and_use_run_on_a_second_device() -> None:
    cases = str(Path(__file__).with_name("on_device.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", cases]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]

"""Freeze the test sets of scenes as they are now; figures of before are then not comparable.

Command   python recipes/freeze_scenes.py
Cost      two minutes on one core
Score     src/lavit/data/scenes/frozen.json, and the hash of each split on the screen
"""

from __future__ import annotations

from lavit.data.scenes.frozen import PATH, renew

if __name__ == "__main__":
    renew(lambda line: print(line, flush=True))
    print(PATH)

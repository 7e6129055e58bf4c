"""Folders that are written again: there is always a whole one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lavit.files import replacing


def test_a_folder_that_is_written_again_is_never_missing(tmp_path: Path) -> None:
    folder = tmp_path / "vision"

    def write(number: int) -> None:
        with replacing(folder) as new:
            (new / "number").write_text(str(number))

    def write_many() -> None:
        for number in range(1, 200):
            write(number)

    write(0)
    seen = 0
    with ThreadPoolExecutor() as threads:
        writing = threads.submit(write_many)
        while not writing.done():
            assert folder.is_dir()
            seen += 1
        writing.result()
    assert seen > 0 and (folder / "number").read_text() == "199"
    assert [path.name for path in tmp_path.iterdir()] == ["vision"]  # nothing of before stays

"""The README's Python blocks run, on a toy run in the place of the trained one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from conftest import toy_picture

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run(
    toy_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    monkeypatch.chdir(tmp_path)
    for path in {text for block in blocks for text in re.findall(r'"([^"]+\.png)"', block)}:
        if "/" in path:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            toy_picture("red dot").save(tmp_path / path)
    for block in blocks:
        exec(re.sub(r'lavit\.load\("[^"]+"\)', f'lavit.load("{toy_run}")', block), {})
    assert (tmp_path / "owl.png").exists()
    assert capsys.readouterr().out


def test_the_tree_names_every_room() -> None:
    package = Path(__file__).parent.parent / "src" / "lavit"
    tree = README.split("## The tree")[1]
    for path in package.glob("*.py"):
        assert path.name.startswith("__") or path.name in tree, path.name
    for path in package.iterdir():
        assert not path.is_dir() or path.name.startswith("__") or f"{path.name}/" in tree, path.name

"""What mypy proves of a user's script: each public verb has one precise type."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = """
import lavit
from lavit import LaVIT, LaVITProcessor
from lavit.generate.options import ChatMessage

reveal_type(lavit.load("nano"))  # Pipeline
pipe = lavit.load("nano")
reveal_type(pipe.caption("a.png"))  # str
reveal_type(pipe.caption(["a.png", "b.png"]))  # list[str]
reveal_type(pipe.ask("a.png", "what is this?", check_answerable=True))  # str
reveal_type(pipe.ask(["a.png"], ["what is this?"]))  # list[str]
reveal_type(pipe.rank("a.png", ["an owl", "a key"]))  # list[str]
reveal_type(pipe.rank(["a.png"], ["an owl", "a key"]))  # list[list[str]]
reveal_type(pipe.choose("a.png", ["an owl", "a key"]))  # str
reveal_type(pipe.complete(["a photo of"]))  # str
reveal_type(pipe.draw("an owl", seed=3, best_of=4))  # Image
reveal_type(pipe.draw(["an owl", "a key"]))  # list[Image]
reveal_type(pipe.edit("a.png", "remove the owl"))  # Image
reveal_type(pipe.compose([["an owl"], ["a key"]]))  # list[Image]
reveal_type(pipe.generate(["an owl"]))  # list[str | Image]
reply: ChatMessage = pipe.chat([{"role": "user", "content": "draw"}], out="image")
replies: list[ChatMessage] = pipe.chat([[reply], [reply]])
reveal_type(reply["role"])  # Literal['assistant']
reveal_type(pipe.stream_draw("an owl", previews=True))  # Iterator[Update]
reveal_type(pipe.tokenize(["a.png"]))  # VisualTokens
reveal_type(pipe.reconstruct("a.png"))  # Image
model = LaVIT.from_pretrained("nano", parts=("vision",))
reveal_type(model)  # LaVIT
reveal_type(model.encode_images([]))  # VisualTokens
reveal_type(model.decode([]))  # Tensor
reveal_type(model.visual_tokenizer)  # VisualTokenizer
reveal_type(model.text_tokenizer)  # PreTrainedTokenizerBase
reveal_type(model.push_to_hub("org/name"))  # CommitInfo
processor = LaVITProcessor.from_pretrained("nano")
reveal_type(processor)  # LaVITProcessor
reveal_type(processor.batch_decode([[1]]))  # list[str]
reveal_type(processor.pack([]))  # Batch
"""
WRONG = ("pipe.draw(3)", 'pipe.draw("an owl", sed=3)', 'lavit.load("nano", protocol=4)')


def check(script: Path) -> list[str]:
    """What mypy says of a script, with the repository's own configuration and cache."""
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--no-pretty", "--no-error-summary", str(script)]
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr + done.stdout
    return done.stdout.splitlines()


def test_a_users_checker_proves_the_types_of_the_public_verbs(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + "".join(f"{line}\n" for line in WRONG))
    lines = SCRIPT.splitlines()
    expected = {
        number: line.split("  # ")[1]
        for number, line in enumerate(lines, 1)
        if line.startswith("reveal_type")
    }
    revealed: dict[int, str] = {}
    wrong: set[int] = set()
    for line in check(script):
        assert "script.py" in line, f"an error outside of the script: {line}"
        number = int(line.split(":")[1])
        if found := re.search(r'Revealed type is "(.*)"', line):
            revealed[number] = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", found[1])
        elif ": error: " in line:
            wrong.add(number)
    assert revealed == expected
    assert wrong == set(range(len(lines) + 1, len(lines) + 1 + len(WRONG)))


def test_the_package_says_that_it_has_types() -> None:
    assert (ROOT / "src" / "lavit" / "py.typed").exists()

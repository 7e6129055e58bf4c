"""English prose from the documentation of installed packages: text for replay, no download.

Of every installed distribution: its long description (README) and the docstrings at the head of its
modules, read as files, never imported. Markup is taken out, and only paragraphs that read as
English sentences stay. Packages, never texts, are split into train and held out, by a hash of their
names. (The paper mixes RedPajama in; this stands for it on a laptop.)

Command   python recipes/prose.py OUT.jsonl
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

from rich.console import Console

from lavit.config import InputError

HELD_OUT = 0.1  # share of the packages
DOCSTRING = re.compile(
    r'\A(?:[ \t]*(?:#[^\n]*)?\n)*[ \t]*([rRuU]?(?:"""(?:.|\n)*?"""|\'\'\'(?:.|\n)*?\'\'\'))'
)
COMMON = re.compile(  # a fifth of the words of English text is one of these
    r"(?i)\b(?:the|an?|of|to|and|in|is|for|with|that|it|this|on|be|are|as|by|or|from|at|if|you|can|"
    r"not|will|we|which|when)\b"
)
MARKUP = (
    (re.compile(r"(?ms)^(```|~~~).*?^\1[^\n]*$"), "\n\n"),  # code
    # code, directives, rules, tables
    (re.compile(r"(?m)^(?: {4}|\t|>>> |\.\. |\s*[|+=\-*~^#]{3,}).*$"), ""),
    (re.compile(r"<!--.*?-->|<[^>\n]{1,200}>", re.S), " "),
    (re.compile(r"!\[[^\]]*\](?:\([^)]*\)|\[[^\]]*\])"), " "),  # pictures
    (re.compile(r"\[([^\]]+)\](?:\([^)]*\)|\[[^\]]*\])"), r"\1"),  # links
    (re.compile(r"`([^`<]+)\s*<[^>]*>`_+"), r"\1"),
    (re.compile(r":[\w:]+:`~?([^`]+)`"), r"\1"),
    (re.compile(r"(?m)^\s*(?:#+|[-*+•]|\d+\.|>)\s+"), ""),  # headings, items, quotations
    (re.compile(r"`+|\*\*|__(?=\w)|(?<=\w)__"), ""),
)
SENTENCE = re.compile(r"[A-Z0-9\"'(].*[.!?:)\"']$")


def build_prose(out: Path, *, progress: Callable[[int, int], None] | None = None) -> dict[str, int]:
    """Write `out` (train), STEM.held_out.jsonl, STEM.packages.json (licences) and STEM.origin.json;
    return counts.

    A line is {"text", "package", "kind"}. `progress` is called with (packages done, of all). Raises
    `InputError` where nothing is found or nothing can be written.
    """
    out = Path(out)
    if out.suffix != ".jsonl":
        raise InputError(f"prose is written as JSON lines: give --out FILE.jsonl, not {out}")
    installed = {d.metadata["Name"].lower(): d for d in distributions() if d.metadata["Name"]}
    lines: dict[str, list[str]] = {"train": [], "held out": []}
    packages: dict[str, dict[str, Any]] = {"train": {}, "held out": {}}
    counts = {
        f"{split} {what}": 0 for split in lines for what in ("packages", "texts", "characters")
    }
    seen: set[str] = set()  # a paragraph that many files share stands once
    for done, name in enumerate(sorted(installed), 1):
        split = "held out" if _fraction(name) < HELD_OUT else "train"
        texts = list(_texts(installed[name], seen))
        if progress:
            progress(done, len(installed))
        if texts:
            found = installed[name].metadata
            licence = (
                found.get("License-Expression")
                or str(found.get("License") or "not stated").splitlines()[0]
            )
            characters = sum(len(text) for _, text in texts)
            packages[split][name] = {
                "version": found["Version"],
                "licence": licence[:80],
                "characters": characters,
            }
            lines[split] += [
                json.dumps({"text": text, "package": name, "kind": kind}) for kind, text in texts
            ]
            for what, count in (("packages", 1), ("texts", len(texts)), ("characters", characters)):
                counts[f"{split} {what}"] += count
    if not lines["train"] or not lines["held out"]:
        raise InputError(
            "too few of the installed packages have documentation: install some (extra train)"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("\n".join(lines["train"]) + "\n")
        out.with_suffix(".held_out.jsonl").write_text("\n".join(lines["held out"]) + "\n")
        out.with_suffix(".packages.json").write_text(json.dumps(packages, indent=1) + "\n")
        out.with_suffix(".origin.json").write_text('{"texts": "of installed packages"}\n')
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}") from error
    return counts


def _fraction(name: str) -> float:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def _texts(package: Distribution, seen: set[str]) -> Iterator[tuple[str, str]]:
    """(kind, text) of a package: its description, and a docstring for each module that has one."""
    readme = prose(
        str(package.metadata.get_payload() or package.metadata.get("Description") or ""), seen
    )
    if readme:
        yield "readme", readme
    for file in sorted(package.files or (), key=str):
        if file.suffix == ".py":
            text = prose(_docstring(Path(str(file.locate()))), seen)
            if text:
                yield "docstring", text


def _docstring(path: Path) -> str:
    """The docstring at the head of a module, without running it."""
    try:
        with path.open(encoding="utf-8") as file:
            found = DOCSTRING.match(file.read(20_000))
        return str(ast.literal_eval(found[1])) if found else ""
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError):
        return ""  # an installed file that is no module of today's Python has no prose for us


def prose(text: str, seen: set[str]) -> str:
    """Paragraphs of English sentences, without markup, that are not in `seen` (which grows)."""
    text = text.replace("\r\n", "\n")
    for pattern, replacement in MARKUP:
        text = pattern.sub(replacement, text)
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        line = " ".join(paragraph.split())
        if line not in seen and is_english(line):
            seen.add(line)
            kept.append(line)
    return "\n\n".join(kept)


def is_english(line: str) -> bool:
    """Eight words or more, a fifth of them common ones, nearly all letters, a sentence's end."""
    words = re.findall(r"[A-Za-z']+", line)
    if len(words) < 8 or not line.isascii() or not SENTENCE.match(line) or "://" in line:
        return False
    letters = sum(character.isalpha() or character == " " for character in line) / len(line)
    return letters > 0.9 and len(COMMON.findall(line)) / len(words) > 0.2


if __name__ == "__main__":
    for name, count in build_prose(Path(sys.argv[1])).items():
        Console().print(f"{name:>28} {count}")

"""Verbs about the published weights: check, published, reverse."""

from __future__ import annotations

from pathlib import Path

from lavit.cli.output import Words, answer_with


def check(fixture: Words[Path], /, json: bool = False) -> None:
    """Run our modules on a parity fixture and compare; exit code 1 if an output differs."""
    from lavit.convert import check_fixture

    results = check_fixture(fixture)
    for result in results:
        text = f"{result.name:<36} {result.error:9.2e}  {'ok' if result.ok else 'DIFFERS'}"
        answer_with(json, text, name=result.name, error=result.error, ok=result.ok)
    if not all(result.ok for result in results):
        raise SystemExit(1)


def published(folder: Words[Path], /, out: Path) -> None:
    """Turn the published weights into our on-disk format, every tensor once."""
    from lavit.convert import convert_published

    done = convert_published(folder, out)
    print(f"{out}: {done.files} files, {done.tensors} tensors, {len(done.aside)} kept aside")


def reverse(folder: Words[Path], /, out: Path) -> None:
    """Turn a converted folder back into the published one, equal to the bit."""
    from lavit.convert import convert_reverse

    done = convert_reverse(folder, out)
    print(f"{out}: {done.files} files, {done.tensors} tensors, {len(done.aside)} taken from aside")

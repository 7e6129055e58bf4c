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


def published(folder: Words[Path], /, out: Path, pictures: tuple[Path, ...] = ()) -> None:
    """Turn the published weights into our on-disk format, every tensor once.

    --pictures A.jpg B.jpg prints what the published softmax's smoothing would change on them.
    """
    from lavit.convert import convert_published
    from lavit.images import open_image

    for picture in pictures:
        open_image(picture)
    done = convert_published(folder, out)
    print(f"{out}: {done.files} files, {done.tensors} tensors, {len(done.aside)} kept aside")
    if pictures:
        from lavit.convert.smoothing import smoothing_effect

        print(f"{'smoothing of 1e-6':<32} {'kept':>5} {'written':>9} {'read':>9} {'codes':>6}")
        for picture, effect in zip(pictures, smoothing_effect(out, pictures), strict=True):
            differences = f"{effect.written:9.1e} {effect.read:9.1e}"
            print(f"{picture.name:<32} {effect.kept:5d} {differences} {effect.codes:6d}")


def reverse(folder: Words[Path], /, out: Path) -> None:
    """Turn a converted folder back into the published one, equal to the bit."""
    from lavit.convert import convert_reverse

    done = convert_reverse(folder, out)
    print(f"{out}: {done.files} files, {done.tensors} tensors, {len(done.aside)} taken from aside")

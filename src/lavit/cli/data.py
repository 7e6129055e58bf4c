"""Verbs that build data sets from what is installed and look into any data set: mini, easy-vqa, prose, third, check."""

from __future__ import annotations

from pathlib import Path

from lavit.cli.output import ProgressBar, Words, answer_with


def mini(out: Path = Path("data")) -> None:
    """Build the three sources of `mini` under OUT: every emoji of two artists, easy-VQA, English prose."""
    from lavit.data.mini import build_mini

    with ProgressBar() as progress:
        print(build_mini(out, progress=progress.count))


def easy_vqa(out: Path, pictures: int | None = None) -> None:
    """Write easy-VQA (package easy-vqa): 5,000 pictures of one coloured shape, 48,248 questions, its own train and test.

    --pictures N takes only N of the 4,000 of train.
    """
    from lavit.data.easy_vqa import build_easy_vqa

    with ProgressBar() as progress:
        counts = build_easy_vqa(out, pictures=pictures, progress=lambda done, of: progress.count("pictures", done, of))
    for name, count in counts.items():
        print(f"{name:>28} {count}")


def prose(out: Path) -> None:
    """Collect English prose from the documentation of installed packages into OUT.jsonl; a tenth of them is held out."""
    from lavit.data.prose import build_prose

    with ProgressBar() as progress:
        counts = build_prose(out, progress=lambda done, of: progress.count("packages", done, of))
    for name, count in counts.items():
        print(f"{name:>28} {count}")


def third(
    font: Path = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"),
    out: Path = Path("data/third"),
    like: Path = Path("data/mini"),
) -> None:
    """Draw the emoji of a colour font, an artist whom nobody trained on, for `lavit eval` to find beside its data.

    --font is Noto Color Emoji where the Debian package fonts-noto-color-emoji puts it; --like is the starter data whose
    training names are asked for.
    """
    from lavit.data.third import build_third

    with ProgressBar() as progress:
        counts = build_third(out, font=font, like=like, progress=lambda done, of: progress.count("emoji", done, of))
    for name, count in counts.items():
        print(f"{name:>28} {count}")


def check(data: Words[tuple[str, ...]], /, split: str = "train", workers: int = 1, json: bool = False) -> None:
    """Read data and report counts, what is broken, text lengths and licences, source by source.

    Several sources, SOURCE:0.5 for a weight, are reported as the mixture that --data of `lavit train` makes of them; a file
    of conversations is reported as such. --workers N says whether the shards of a stream suffice for N processes.
    """
    from lavit.data.inspect import inspect_data

    for report in inspect_data(",".join(data), split, workers=workers):
        text = "\n".join(f"{name:>16} {value}" for name, value in report.items())
        answer_with(json, text, **report)

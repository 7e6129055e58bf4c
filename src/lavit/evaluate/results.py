"""What a study found, as a page, a plot and plain data: docs/results.md holds a part of each study.

Every value of every seed is said. A claim is stated only where all seeds agree in sign and the
interval excludes 0 (differences.py); a result against the paper is said like any other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from lavit.config import write_whole
from lavit.evaluate.differences import Difference, paired_difference
from lavit.evaluate.study import Comparison, Study

Outcome = Mapping[str, Mapping[str, list[dict[str, Any] | None]]]  # column, arm, seed
TITLES = {"tokens": "Equal target tokens", "flops": "Equal FLOPs"}
COUNTED = (
    "Tokens, FLOPs and seconds are of stage 2, and of the last part of an arm that goes on from "
    "another; stage 1 is not counted."
)
HEAD = """# Results

Written by `lavit compare`, a part for each study of recipes/studies/; the values of all items and
the hashes of all weights are in the JSON files beside this page. A difference is stated as settled
only if all seeds agree in sign and the 95 % interval (two-level bootstrap over seeds and items)
excludes 0. Beside figures of `lavit eval` there are two that tell young models apart:
`read_pairs_likelihood`, nats a token of true descriptions, and `write_minimal_pairs`, the share of
pictures whose codes are likelier behind their prompt than behind one with another name in it.
"""


def row_of(found: Outcome, column: str, arm: str, seed: int) -> dict[str, Any]:
    """An arm's run in a column; where that of equal tokens is the same, this one."""
    return found[column][arm][seed] or found["tokens"][arm][seed] or {}


def values_of(found: Outcome, column: str, arm: str, figure: str) -> np.ndarray | None:
    """Values [seeds items] of an arm: of items where they are kept, else the figure's alone; None
    where a seed has none, or as many as no other.
    """
    rows = []
    for seed in range(len(found["tokens"][arm])):
        entry = row_of(found, column, arm, seed)["figures"][figure]
        if entry["value"] is None:
            return None
        rows.append(entry["items"] or [entry["value"]])
    same = len({len(row) for row in rows}) == 1
    return np.array(rows, dtype=np.float64) if same else None


def differences(study: Study, found: Outcome, column: str) -> list[Difference | None]:
    """The study's comparisons; None where an arm lacks the figure, or has it of other items."""
    made: list[Difference | None] = []
    for one in study.comparisons:
        pair = [values_of(found, column, arm, one.figure) for arm in (one.arm, one.against)]
        both = [values for values in pair if values is not None]
        alike = len(both) == 2 and both[0].shape == both[1].shape
        made.append(paired_difference(both[0], both[1]) if alike else None)
    return made


def at_floor(found: Outcome, column: str, arm: str, figure: str) -> bool:
    """Whether an arm's figure may be what a trivial answer gets: its interval of all seeds, a
    half-width from their mean, holds the mean floor.
    """
    entries = [
        row_of(found, column, arm, seed)["figures"][figure]
        for seed in range(len(found["tokens"][arm]))
    ]
    if any(entry["value"] is None or entry.get("floor") is None for entry in entries):
        return False
    value = float(np.mean([entry["value"] for entry in entries]))
    floor = float(np.mean([entry["floor"] for entry in entries]))
    wide = float(np.mean([entry["high"] - entry["low"] for entry in entries])) / 2
    return abs(value - floor) <= wide / len(entries) ** 0.5


def write_results(study: Study, found: Outcome, docs: Path, command: str) -> Path:
    """Write a study's part of docs/results.md, its JSON and its plot; returns the page."""
    data: dict[str, Any] = {"study": study.name, "command": command, "runs": found}
    data["differences"] = {
        column: [
            {"arm": one.arm, "against": one.against, "figure": one.figure}
            | (
                {}
                if apart is None
                else vars(apart) | {"verdict": verdict(found, column, one, apart)}
            )
            for one, apart in zip(study.comparisons, differences(study, found, column), strict=True)
        ]
        for column in found
    }
    write_whole(docs / f"results.{study.name}.json", json.dumps(data) + "\n")
    plot(study, found).save(docs / f"results.{study.name}.png")
    page, begin = docs / "results.md", f"<!-- {study.name} -->"
    end = f"<!-- end of {study.name} -->"
    text = page.read_text(encoding="utf-8") if page.exists() else HEAD
    shown = f"![differences and their intervals](results.{study.name}.png)"
    part = f"{begin}\n{section(study, found, command)}\n\n{shown}\n{end}"
    old = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    new = old.sub(lambda _: part, text) if old.search(text) else f"{text.rstrip()}\n\n{part}\n"
    write_whole(page, new)
    return page


def section(study: Study, found: Outcome, command: str) -> str:
    """A study in words and tables."""
    seeds = len(next(iter(found["tokens"].values())))
    items = f"{seeds} seeds, at most {study.count} items a figure, {study.pictures:,} pictures"
    lines = [
        f"## {study.name}",
        "",
        f"    {command}",
        "",
        *wrap(f"Claimed: {study.claim}", 100),
        *_found(study, found),
        "",
        items + ".",
    ]
    lines += ["", *wrap(f"{COUNTED} In brackets: each seed.", 100)]
    for column in found:
        lines += ["", f"### {TITLES[column]}", "", *_values(study, found, column)]
        lines += ["", *_compared(study, found, column)]
    return "\n".join([*lines, "", *wrap(f"At scale: {study.at_scale}", 100)])


def _found(study: Study, found: Outcome) -> list[str]:
    """What comparisons came to: each verdict at equal tokens, and what changes at equal FLOPs."""
    by_column: dict[str, dict[tuple[str, str], str]] = {}
    for column in found:
        for one, apart in zip(study.comparisons, differences(study, found, column), strict=True):
            said = "missing" if apart is None else verdict(found, column, one, apart)
            key = f"{one.arm} against {one.against}", one.figure
            by_column.setdefault(column, {})[key] = said
    first = by_column.pop("tokens", {})
    lines = [f"- {said}: {_listed(first, said)}" for said in dict.fromkeys(first.values())]
    for column, own in by_column.items():
        others = {key: said for key, said in own.items() if said != first[key]}
        end = "the same" if not others else "the same, but for these"
        lines.append(f"- {TITLES[column].replace('Equal', 'at equal')}: {end}")
        lines += [f"  - {said}: {_listed(others, said)}" for said in dict.fromkeys(others.values())]
    more = {"-": "  ", " ": "    "}  # how far a line's next lines go in
    wrapped = (wrap(line, 100, subsequent_indent=more[line[0]]) for line in lines)
    return ["", "Found:", "", *chain.from_iterable(wrapped)] if lines else []


def _listed(verdicts: Mapping[tuple[str, str], str], wanted: str) -> str:
    """Comparisons of one verdict, the figures of a pair together."""
    pairs: dict[str, list[str]] = {}
    for (pair, figure), said in verdicts.items():
        if said == wanted:
            pairs.setdefault(pair, []).append(figure)
    return "; ".join(f"{pair} ({', '.join(figures)})" for pair, figures in pairs.items())


def _values(study: Study, found: Outcome, column: str) -> list[str]:
    """Arms and their figures: the mean, and each seed; what it cost; why a cell is empty."""
    head = ["arm", *study.figures, "tokens", "FLOPs", "seconds", "rate"]
    lines = [_line(head), _line(["---"] * len(head))]
    notes: dict[str, int] = {}
    for arm, own in found["tokens"].items():
        rows = [row_of(found, column, arm, seed) for seed in range(len(own))]
        cells = [arm + ("" if column == "tokens" else _star(found[column][arm]))]
        for figure in study.figures:
            values = [row["figures"][figure]["value"] for row in rows]
            if None in values:
                entries = (row["figures"][figure] for row in rows)
                reason = next(entry["reason"] for entry in entries if entry["value"] is None)
                notes[reason] = notes.get(reason, len(notes) + 1)
                cells.append(f"none ({notes[reason]})")
                continue
            each = ", ".join(f"{value:.3f}" for value in values)
            floors = [row["figures"][figure].get("floor") for row in rows]
            floor = "" if None in floors else f"; floor {float(np.mean(floors)):.3f}"
            cells.append(f"**{float(np.mean(values)):.3f}** ({each}{floor})")
        costs = [row["cost"] for row in rows]
        tokens = np.mean([cost["steps"] * cost["targets_per_step"] for cost in costs])
        flops = np.mean([cost["steps"] * cost["flops_per_step"] for cost in costs])
        seconds = np.mean([cost["seconds"] for cost in costs])
        cells += [f"{tokens:,.0f}", f"{flops:.3g}", f"{seconds:.0f}", f"{rows[0]['rate']:g}"]
        lines.append(_line(cells))
    if column != "tokens":
        lines += ["", "\\* within 5 % of the first arm's FLOPs already: the run of equal tokens."]
    lines += [f"\n({number}) {reason}." for reason, number in notes.items()]
    for arm, runs in found["tokens"].items():
        if column == "tokens" and (tried := (runs[0] or {}).get("tried")):
            each = ", ".join(f"{rate}: {_reached(value)}" for rate, value in tried.items())
            lines += ["", f"Rates of {arm}, by {study.chosen_by} on validation: {each}."]
    return lines


def _reached(value: float | None) -> str:
    return "failed" if value is None else f"{value:.3f}"


def _star(runs: list[dict[str, Any] | None]) -> str:
    """Marks an arm whose runs are those of equal tokens, or the seeds of which they are."""
    same = [str(seed) for seed, run in enumerate(runs) if run is None]
    if same and len(same) < len(runs):
        return f" (of seed {', '.join(same)}: *)"
    return "*" if same else ""


def _compared(study: Study, found: Outcome, column: str) -> list[str]:
    """The study's comparisons, each with its verdict."""
    head = ["comparison", "figure", "difference [95 %]", "each seed", "verdict"]
    lines = [_line(head), _line(["---"] * len(head))]
    for one, apart in zip(study.comparisons, differences(study, found, column), strict=True):
        cells = [f"{one.arm} against {one.against}", one.figure]
        if apart is None:
            missing = "an arm has no such figure (above), or it is of other items"
            lines.append(_line([*cells, "none", "none", missing]))
            continue
        interval = f"{apart.value:+.3f} [{apart.low:+.3f}, {apart.high:+.3f}]"
        each = ", ".join(f"{value:+.3f}" for value in apart.seeds)
        lines.append(_line([*cells, interval, each, verdict(found, column, one, apart)]))
    return lines


def verdict(found: Outcome, column: str, one: Comparison, apart: Difference) -> str:
    """What a difference says of a claim; nothing where both arms do no better than a floor."""
    if all(at_floor(found, column, arm, one.figure) for arm in (one.arm, one.against)):
        return "both at the floor"
    return apart.verdict(one.claimed)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def plot(study: Study, found: Outcome) -> Image.Image:
    """Differences of both columns with their intervals, and a dot for each seed."""
    rows = [
        (column, one, apart)
        for column in found
        for one, apart in zip(study.comparisons, differences(study, found, column), strict=True)
        if apart is not None
    ]
    left, width, step = 460, 900, 26
    image = Image.new("RGB", (width, step * (len(rows) + 2)), "white")
    draw = ImageDraw.Draw(image)
    ends = [abs(v) for _, _, apart in rows for v in (apart.low, apart.high, *apart.seeds)]
    reach = max([*ends, 1e-6]) * 1.05

    def across(value: float) -> float:
        return left + (width - left - 20) * (0.5 + value / reach / 2)

    draw.line((across(0), step, across(0), step * (len(rows) + 1)), fill="gray")
    for number, (column, one, apart) in enumerate(rows, 1):
        y, colour = number * step + step // 2, "black" if apart.settled else "gray"
        words = f"{one.arm} - {one.against}: {one.figure} ({column})"
        draw.text((8, y - 6), words, fill=colour)
        draw.line((across(apart.low), y, across(apart.high), y), fill=colour, width=2)
        for value in apart.seeds:
            draw.ellipse((across(value) - 3, y - 3, across(value) + 3, y + 3), outline=colour)
    draw.text((left, 6), f"-{reach:.3g}", fill="gray")
    draw.text((width - 60, 6), f"+{reach:.3g}", fill="gray")
    return image

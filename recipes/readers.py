"""Readers: do those who see drawings alone see in them what the judge sees?

Command   python recipes/readers.py sheets MODEL OUT        (100 drawings, ten a sheet, no prompts)
          python recipes/readers.py compare OUT READINGS    (what a reader wrote, and the judge)
Data      prompts of `valid_pairs`, and of OUT/reading.md, which says how to write a reading
Cost      a minute to draw; a reader takes half an hour
Score     LOG.md

Every drawing is shown large, with a number and nothing else. A reader writes for each which things
stand in it, how many, and the colours of shapes; the words are given, and "?" is allowed. The
groups of a drawing's prompt are then right or wrong by the reading and by the judge.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import tyro
from PIL import Image, ImageDraw

import lavit
from lavit.config import InputError
from lavit.data.scenes.language import plainly
from lavit.data.scenes.sample import scene_at
from lavit.data.scenes.splits import Rules
from lavit.data.scenes.world import COLOURS, SHAPES, facts
from lavit.evaluate.judge import Judge

COUNT, ACROSS, SIDE, MARGIN = 100, 5, 240, 24
HOW = """# How to write a reading

sheet-0.png to sheet-9.png hold {count} drawings, each under its number. Write one JSON object a
line: {{"number": 7, "things": {{"owl": 2, "red star": 1}}}}. Count what you see; a shape is named
with its colour. Where something is there that you cannot name, write "?". Guess from the
drawing alone.

Things: {things}.
Shapes: {shapes}. Colours: {colours}.
"""


def sheets(model: str, out: Path, /) -> None:
    """Draw the prompts, and write sheets for readers and what the judge sees."""
    out.mkdir(parents=True)
    scenes = [scene_at("valid_pairs", index) for index in range(COUNT)]
    prompts = [plainly(scene) for scene in scenes]
    drawings = lavit.load(model).draw(prompts)
    seen = Judge.load().look(drawings)
    with (out / "judged.jsonl").open("w", encoding="utf-8") as file:
        for number, (scene, look) in enumerate(zip(scenes, seen, strict=True)):
            wanted = {_called(g.name, g.colour): g.number for g in facts(scene).groups}
            things = Counter(_called(thing.name, thing.colour) for thing in look.things)
            line = {"number": number, "wanted": wanted, "things": dict(things)}
            file.write(json.dumps(line) + "\n")
    for first in range(0, COUNT, 2 * ACROSS):
        sheet = Image.new("RGB", (ACROSS * SIDE, 2 * (SIDE + MARGIN)), "white")
        for place, drawing in enumerate(drawings[first : first + 2 * ACROSS]):
            x, y = place % ACROSS * SIDE, place // ACROSS * (SIDE + MARGIN)
            sheet.paste(drawing.resize((SIDE, SIDE), Image.Resampling.BICUBIC), (x, y + MARGIN))
            ImageDraw.Draw(sheet).text((x + 4, y + 4), str(first + place), "black", font_size=16)
        sheet.save(out / f"sheet-{first // (2 * ACROSS)}.png")
    words = {"things": Rules().objects_named, "shapes": SHAPES, "colours": COLOURS}
    listed = {name: ", ".join(each) for name, each in words.items()}
    (out / "reading.md").write_text(HOW.format(count=COUNT, **listed), encoding="utf-8")


def compare(out: Path, readings: Path, /) -> None:
    """Print how often reading and judge agree about the groups of the prompts."""
    judged = [json.loads(line) for line in (out / "judged.jsonl").open(encoding="utf-8")]
    found = [json.loads(line) for line in readings.open(encoding="utf-8")]
    read = {line["number"]: line["things"] for line in found}
    if missing := [line["number"] for line in judged if line["number"] not in read]:
        raise InputError(f"{readings}: no reading of {missing[:10]}, expected all {len(judged)}")
    table: Counter[tuple[bool, bool]] = Counter()
    for line in judged:
        for name, number in line["wanted"].items():
            said = read[line["number"]]
            table[line["things"].get(name, 0) == number, said.get(name, 0) == number] += 1
    groups = sum(table.values())
    agreed = table[True, True] + table[False, False]
    print(
        f"groups of {len(judged)} prompts: {groups}; both agree on {agreed} ({agreed / groups:.1%})"
    )
    print(f"right by both {table[True, True]}, wrong by both {table[False, False]}")
    print(
        f"right by the judge alone {table[True, False]}, by the reader alone {table[False, True]}"
    )


def _called(name: str, colour: str | None) -> str:
    return name if colour is None else f"{colour} {name}"


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"sheets": sheets, "compare": compare})

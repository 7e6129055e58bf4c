"""GenEval 2 (arXiv 2512.16853): each atom of a prompt is a question with one right answer.

What its scripts take: a JSON object of prompts and their pictures' files (evaluation.py), and a
JSON list of a list of scores, one an atom, for each line of the data (soft_tifa_analysis.py). Its
judge is a VQA model, and a score the probability of the right answer. Ours (evaluate/judge.py)
scores 0 or 1, and knows the things of scenes alone: their number, the colours of shapes, and four
relations. So it scores the prompts of which it knows every atom, and no others:

    images.json        prompts and pictures, of all prompts
    judged.jsonl       lines of the data that our judge scores
    score_lists.json   their scores
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lavit.config import write_whole
from lavit.data.scenes.lexicon import NUMBERS, OPPOSITE, PLACES, Noun, nouns, split, tokens
from lavit.data.scenes.world import COLOURS, SHAPES, Relation, Side
from lavit.evaluate.figures import Figure, average, averages, mean, nothing
from lavit.evaluate.judge import Judge, Seen, holds
from lavit.images import open_image

POINTS = 100


def is_right(question: str, answer: str, seen: Seen) -> bool | None:
    """Is this answer right of what is seen? None: the judge knows no such question."""
    words, answer = split(question, strictly=False) or [], answer.lower()
    match tokens([_singular(word) for word in words]):
        case ["how", "many", Noun(name=name), "are", "in", "the", "image", "?"]:
            return len(seen.of(name)) == NUMBERS.index(answer) if answer in NUMBERS else None
        case ["are", "there", "any", Noun(name=name), "in", "the", "image", "?"]:
            found = bool(seen.of(name))
        case ["is" | "are", "the", Noun(name=name), str(colour), "?"]:
            if name not in SHAPES or colour not in COLOURS:
                return None
            found = {thing.colour for thing in seen.of(name)} == {colour}
        case ["is" | "are", "the", Noun(name=first), *place, "the", Noun(name=second), "?"]:
            said = " ".join(map(str, place)).removeprefix("to the ")
            kind = PLACES.get(said, said)
            if kind not in OPPOSITE:
                return None
            if kind in ("right of", "below"):
                first, second = second, first
            side: Side = "left of" if kind in ("left of", "right of") else "above"
            found = holds(Relation(side, first, second), seen)
        case _:
            return None
    return found == (answer == "yes") if answer in ("yes", "no") else None


def _singular(word: str) -> str:
    """A noun of the list for a plural that is none ("sheeps")."""
    bare = word.removesuffix("s")
    return bare if (word,) not in nouns() and (bare,) in nouns() else word


def geneval2_figures(
    lines: Sequence[dict[str, Any]], pictures: Sequence[Path], out: Path
) -> dict[str, Figure]:
    """`geneval2_atoms`, the mean share of right atoms, and `geneval2_all`, of prompts all right.

    Both in points, of the prompts that the judge knows; writes the three files into `out`.
    """
    files = {
        line["prompt"]: str(path.resolve()) for line, path in zip(lines, pictures, strict=True)
    }
    write_whole(out / "images.json", json.dumps(files, indent=1))
    looks = Judge.load().look([open_image(path) for path in pictures])
    known, scores = [], []
    for line, seen in zip(lines, looks, strict=True):
        atoms = [is_right(question, answer, seen) for question, answer in line["vqa_list"]]
        if None not in atoms:
            known.append(line)
            scores.append([float(bool(atom)) for atom in atoms])
    write_whole(out / "judged.jsonl", "".join(json.dumps(line) + "\n" for line in known))
    write_whole(out / "score_lists.json", json.dumps(scores))
    note = f"{len(known)} of {len(lines)} prompts: our judge knows no other"
    if not known:
        return dict.fromkeys(("geneval2_atoms", "geneval2_all"), nothing(note))
    skills = [skill for line in known for skill in line["skills"]]
    each = averages(skills, [POINTS * score for one in scores for score in one])
    counts = [f"of_{line['atom_count']}" for line in known]
    whole = [POINTS * float(all(one)) for one in scores]
    within = (0.0, float(POINTS))
    shares = [POINTS * average(one) for one in scores]
    return {
        "geneval2_atoms": mean(shares, within=within, note=note, details=each),
        "geneval2_all": mean(whole, within=within, note=note, details=averages(counts, whole)),
    }

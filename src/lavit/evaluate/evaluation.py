"""`lavit eval`: every figure of a model by its stable name, as plain data.

A figure that the model cannot have (a part is missing, or a font) has no value and says why; where
none of them can be had, `InputError` is raised. The same arguments give the same bytes. What
the model said and drew is kept item by item, so a stopped evaluation goes on to the same figures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lavit.config import InputError
from lavit.data.scenes import frozen
from lavit.data.scenes.splits import Rules
from lavit.data.scenes.world import objects
from lavit.evaluate.allocation import allocation_gain
from lavit.evaluate.conversing import chat_all
from lavit.evaluate.copies import draw_copies
from lavit.evaluate.drawing import draw_all, draw_atoms, draw_swaps, reconstruct_all
from lavit.evaluate.edits import compose_all, edit_all, edit_blind, edit_oracle, source_copies
from lavit.evaluate.exam import Exam
from lavit.evaluate.examinee import config_hash, hash_of, measured
from lavit.evaluate.figures import Figure
from lavit.evaluate.judge import FOLDER as JUDGE
from lavit.evaluate.judging import false_accepts, judge_test
from lavit.evaluate.known import trained_rules
from lavit.evaluate.ladder import ladder_blank, ladder_spearman
from lavit.evaluate.own import OWN, OWN_ITEMS, load_items
from lavit.evaluate.probes import background_kept, identity_kept, write_identity
from lavit.evaluate.reading import READING, answer_blind, answer_test, cycle_text
from lavit.evaluate.text import text_ratio
from lavit.evaluate.tokens import kept_share, live_codes, tokenizer_distance

T = TypeVar("T")

FIGURES: dict[str, Callable[[Exam], Figure]] = {
    **READING,
    "answer_test": answer_test,
    "answer_blind": answer_blind,
    "draw_test_all": partial(draw_all, split="test"),
    "draw_test_atoms": partial(draw_atoms, split="test"),
    "draw_pairs_all": partial(draw_all, split="pairs"),
    "draw_pairs_atoms": partial(draw_atoms, split="pairs"),
    "draw_binding_all": partial(draw_all, split="binding"),
    "draw_swaps": draw_swaps,
    "draw_copies": draw_copies,
    "edit_test_all": edit_all,
    "edit_blind": edit_blind,
    "edit_oracle_all": edit_oracle,
    "edit_source_copies": source_copies,
    "compose_test_all": compose_all,
    "reconstruct_test_all": reconstruct_all,
    "cycle_text_exact": cycle_text,
    "chat4_all": chat_all,
    **OWN,
    "ladder_spearman": ladder_spearman,
    "ladder_blank": ladder_blank,
    "allocation_gain": allocation_gain,
    "tokenizer_distance": tokenizer_distance,
    "identity_kept": identity_kept,
    "background_kept": background_kept,
    "write_identity": write_identity,
    "live_codes": live_codes,
    "kept_share": kept_share,
    "judge_test_all": judge_test,
    "judge_false_accepts": false_accepts,
    "text_perplexity_ratio": text_ratio,
}


def evaluate(
    exam: Exam,
    names: Sequence[str] = (),
    *,
    items: Path | None = None,
    figures: Mapping[str, Callable[[Exam], Figure]] = FIGURES,
) -> dict[str, Any]:
    """Figures of a model on scenes as plain data; `items` is a file of a user's own (default: the
    package's own, for a model that knows everything they name).
    """
    if items is None and exam.rules.objects == len(objects()):
        items = OWN_ITEMS
    exam.items = None if items is None else load_items(items)
    apart = exam.valid or (len(names) > 0 and set(names) <= set(OWN))  # from the test sets
    return {
        "figures": measured(figures, names, exam),
        "config_hash": config_hash(exam.folder),
        "weights_hash": exam.weights,
        "judge_hash": hash_of(sorted(JUDGE.iterdir())),
        "device": f"{exam.model.device.type} {str(exam.model.dtype).removeprefix('torch.')}",
        **({"test_hash": None, "comparable": False} if apart else test_hash(exam)),
        "valid": exam.valid,
        "seed": exam.seed,
        "items": exam.count,
        "objects": exam.rules.objects,
        "held_out_pairs": exam.rules.held_out_pairs,
    }


def test_hash(exam: Exam) -> dict[str, Any]:
    """The hash of the test sets, what drew them, and whether published figures compare.

    They do where test sets and packages are those of this version, and training kept to the rules
    of these test sets, as far as its folder says.
    """
    made_by = frozen.versions()
    task = "hash " + hashlib.sha256(json.dumps(made_by).encode()).hexdigest()[:12]
    splits = frozen.MEASURING

    def make(numbers: list[int]) -> list[str]:
        return [_split_hash(splits[number], exam.rules) for number in numbers]

    made = exam.made(task, range(len(splits)), make, together=1)
    hashes = dict(zip(splits, made, strict=True))
    return {
        "test_hash": frozen.joint_hash(hashes),
        "comparable": frozen.frozen(exam.rules) == hashes
        and trained_rules(exam.folder) == exam.rules,
        "packages": made_by,
    }


def _split_hash(split: str, rules: Rules) -> str:
    """The hash of a split, or why there is none (no pair is held out)."""
    try:
        return frozen.split_hash(split, rules)
    except InputError as error:
        return str(error)

"""Merger: what should become of dropped patches, and should kept ones see those behind them?

Command   lavit compare recipes/studies/merger.py
Cost      lavit compare recipes/studies/merger.py --plan
Score     docs/results.md

`mean` gives every kept patch the mean of the dropped ones in place of what it attends to, `drop`
nothing of them; `bidirectional` merges as LaVIT does, without the causal mask.
"""

from __future__ import annotations

from functools import partial

from lavit.evaluate.study import Arm, Comparison, Study, in_model

FIGURES = (
    "tokenizer_distance",
    "read_pairs_exact",
    "read_pairs_likelihood",
    "write_minimal_pairs",
)
OTHERS = {"mean": {"gathers": "mean"}, "drop": {"gathers": "drop"}}
OTHERS |= {"bidirectional": {"causal": False}}

STUDY = Study(
    name="merger",
    claim="merging keeps what dropping loses, and causal self-attention beats bidirectional "
    "(Sec. 4.4)",
    at_scale="twelve blocks over 256 patches leave more to merge than two over 100",
    arms={
        "merged": Arm(),
        **{
            name: Arm(partial(in_model, part="visual_tokenizer", **fields))
            for name, fields in OTHERS.items()
        },
    },
    figures=FIGURES,
    comparisons=tuple(
        Comparison("merged", name, figure, -1 if figure == "tokenizer_distance" else 1)
        for figure in FIGURES
        for name in OTHERS
    ),
)

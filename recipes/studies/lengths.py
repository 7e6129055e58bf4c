"""Lengths: is it worth something that a picture decides how many tokens it gets?

Command   lavit compare recipes/studies/lengths.py
Cost      lavit compare recipes/studies/lengths.py --plan
Score     docs/results.md, once it is run whole

At each of three budgets (the wanted share of patches) a selector is learned, and given to three
arms, which learn everything else from nothing: `dynamic` with the lengths it asks for, `permuted`
with those of other pictures, `fixed` with their mean. `all` keeps every patch. So no arm learns
under the noise of a selector that still learns.

Writing is judged before it is painted (`write_minimal_pairs`), since a decoder for each arm would
double the cost. `tflop_to_read` is the training of the LM, in 10^12 FLOP, until its loss of text,
the mean of every tenth of 100 steps, is LEVEL: seconds to equal reading, but for what else the
machine does. An arm that never gets there counts with its whole run. For as many target tokens
`all` sees half as many descriptions, since its codes are targets too.
"""

from __future__ import annotations

from functools import partial

from lavit.config import read_json
from lavit.evaluate.exam import Exam
from lavit.evaluate.figures import Figure, average, plain
from lavit.evaluate.study import Arm, Comparison, Study, in_model, in_training
from lavit.presets import Preset
from lavit.train.metrics import read_lines

MIDDLE = 0.25
RATES = (0.15, MIDDLE, 0.4)
KEEP = {"dynamic": "auto", "permuted": "dealt", "fixed": "mean"}
SMALLER = ("tokenizer_distance", "tflop_to_read")  # is better
FIGURES = (
    *SMALLER,
    "kept_share",
    "read_pairs_exact",
    "read_pairs_likelihood",
    "write_minimal_pairs",
)
LEVEL, LOGGED = 0.5, 10  # nats a token of text; reports, of 10 steps each, that are averaged


def tflop_to_read(exam: Exam) -> Figure:
    """10^12 FLOP of stage 2 until the LM reads as well as LEVEL says."""
    said = [line for line in read_lines(exam.folder / "metrics.jsonl") if "text_loss" in line]
    losses, steps = [one["text_loss"] for one in said], [one["step"] for one in said]
    ends = range(LOGGED, len(losses) + 1)
    there = (steps[n - 1] for n in ends if average(losses[n - LOGGED : n]) <= LEVEL)
    a_step = float(read_json(exam.folder / "cost.json")["flops_per_step"])
    return plain(next(there, steps[-1]) * a_step / 1e12, 1)


def kept(preset: Preset, rate: float, keep: str) -> Preset:
    """Another share of patches and another keep policy."""
    return in_model(in_training(preset, "tokenizer", rate=rate), "visual_tokenizer", keep=keep)


def arms() -> dict[str, Arm]:
    """All arms, those of the middle budget first."""
    found, selectors = {}, {}
    for rate in sorted(RATES, key=lambda rate: rate != MIDDLE):
        learned = f"selector {rate:g}"
        change = partial(kept, rate=rate, keep="auto")
        selectors[learned] = Arm(change, tokenizer_alone=True, measured=False)
        for name, keep in KEEP.items():
            change = partial(kept, rate=rate, keep=keep)
            found[f"{name} {rate:g}"] = Arm(change, selector_of=learned)
    found["all"] = Arm(partial(kept, rate=MIDDLE, keep="all"))
    return found | selectors


def comparisons() -> tuple[Comparison, ...]:
    """Lengths by content against each other way."""
    found = []
    for figure in (name for name in FIGURES if name != "kept_share"):
        better = -1 if figure in SMALLER else 1
        for rate in RATES:
            for name in ("permuted", "fixed"):
                pair = f"dynamic {rate:g}", f"{name} {rate:g}"
                found.append(Comparison(*pair, figure, better))
        claimed = better if figure != "tokenizer_distance" else 0
        found.append(Comparison(f"dynamic {MIDDLE:g}", "all", figure, claimed))
    return tuple(found)


STUDY = Study(
    name="lengths",
    claim="dynamic lengths beat a fixed length, with 36 % of the tokens and 40 % less LM training "
    "time than all patches (Sec. 4.4)",
    at_scale="photographs differ more in content than scenes of at most four things do, and a "
    "longer training decides the selector better",
    arms=arms(),
    figures=FIGURES,
    comparisons=comparisons(),
    seeds=5,
    own={"tflop_to_read": tflop_to_read},
)

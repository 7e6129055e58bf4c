"""What training.json says of a run: its data, its model's settings and those of its training.

A stage has settings of both kinds. Those of its part of the model go by the part's name: stage 1,
"tokenizer", trains `visual_tokenizer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lavit.config import InputError, ModelConfig, TrainConfig, from_json

PART_OF = {"tokenizer": "visual_tokenizer", "language": "language", "pixels": "pixels"}
STAGES = tuple(PART_OF)
Settings = dict[str, Any]
FREE = ("checkpoint_every", "keep_last", "log_every")  # of the loop: they change no figure


def with_stage(settings: Settings, stage: str, other: Settings) -> Settings:
    """The settings with those of one stage taken from another run's."""
    found = dict(settings)
    for key, name in (("model", PART_OF[stage]), ("training", stage)):
        found[key] = found[key] | {name: other[key][name]}
    return found


def with_free(settings: Settings, other: Settings) -> Settings:
    """The settings with those of another's that change no figure."""
    free = {name: other["training"][name] for name in FREE}
    return settings | {"training": settings["training"] | free}


def same_run(saved: Settings, mine: Settings, stages: Sequence[str]) -> bool:
    """Whether two descriptions of a run agree in these stages, and in all that is of no stage and
    changes a figure.

    A setting that the older lacks is its default.
    """
    if any(saved.get(name) != mine.get(name) for name in ("data", "start")):
        return False
    try:
        saved = with_free(saved, mine)
        for stage in set(STAGES).difference(stages):
            saved = with_stage(saved, stage, mine)
        return all(
            from_json(kind, saved[key]) == from_json(kind, mine[key])
            for key, kind in (("model", ModelConfig), ("training", TrainConfig))
        )
    except (InputError, KeyError, TypeError):  # of a file that was edited
        return False

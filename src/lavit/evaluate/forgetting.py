"""What a fine-tuning costs: captions, drawings and texts before and after, on other data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lavit.evaluate.examinee import Examinee
from lavit.evaluate.figures import mean
from lavit.evaluate.folder import (
    OwnPictures,
    caption_losses,
    drawing_losses,
    held_out,
    text_losses,
)
from lavit.evaluate.kept import Progress

COMPARED = {"captions": caption_losses, "drawings": drawing_losses, "texts": text_losses}
WORSE = 0.05  # a loss that has grown by this share is reported
PICTURES = 100  # that are compared


@dataclass(frozen=True)
class LossChange:
    """A loss per token before and after, and the 95 % interval of their difference."""

    what: str
    before: float
    after: float
    low: float
    high: float

    @property
    def forgotten(self) -> bool:
        """Whether the loss has grown, by more than WORSE and by more than chance."""
        return self.low > 0 and self.after > (1 + WORSE) * self.before


def changes(
    before: str | Path,
    after: str | Path,
    data: str,
    *,
    count: int = PICTURES,
    progress: Progress = lambda task, done, count: None,
) -> tuple[list[LossChange], str]:
    """Losses of two models on the same held-out pictures, and which pictures these are.

    Raises `InputError` where the data cannot be read or no picture of them has a text.
    """
    corpus, said = held_out(data)
    losses: dict[str, list[np.ndarray]] = {what: [] for what in COMPARED}
    for model in (before, after):
        material = OwnPictures(Examinee(model, count=count, progress=progress), corpus)
        for what, of in COMPARED.items():
            losses[what].append(np.array(of(material)))
    found = []
    for what, (old, new) in losses.items():
        moved = mean(new - old)
        assert moved.low is not None and moved.high is not None
        found.append(LossChange(what, float(old.mean()), float(new.mean()), moved.low, moved.high))
    return found, said

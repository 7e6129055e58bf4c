"""What the tokenizer loses and uses on scenes: distance, live codes, kept share."""

from __future__ import annotations

import torch

from lavit.data.scenes.sample import scene_at
from lavit.evaluate.distance import distance_figure, distances
from lavit.evaluate.exam import Exam
from lavit.evaluate.figures import Figure, average, mean, plain

PICTURES = 20_000  # in which a live code is used at least once
TOGETHER = 100  # pictures that are kept together
OTHER_SEED = 7_700_017  # of scenes like training's that no training is likely to have seen


def tokenizer_distance(exam: Exam) -> Figure:
    """Mean 1 - cos on test scenes."""
    features, tokens = exam.encoded("test", exam.count)
    others, _ = exam.encoded("valid", min(exam.count, 100))
    every = average(distances(exam.tokenizer, features, torch.ones_like(tokens.keep)))
    details = {"all_patches_kept": every}
    return distance_figure(exam.tokenizer, features, tokens.keep, others, details=details)


def kept_share(exam: Exam) -> Figure:
    """Share of the patches of test scenes that are kept."""
    _, tokens = exam.encoded("test", exam.count)
    patches = tokens.keep.shape[1]
    kept = tokens.lengths.double()
    spread = float(kept.std() / kept.mean()) if len(kept) > 1 else 0.0
    details = {"patches": patches, "spread": spread}
    return mean((kept / patches).tolist(), details=details, within=(0.0, 1.0))


def live_codes(exam: Exam) -> Figure:
    """Share of the codebook used at least once in 20,000 pictures like training's, unseen by it;
    fewer pictures (`--count`) use fewer codes.
    """
    size, pictures = exam.tokenizer.config.codes, exam.scaled(PICTURES)

    def make(numbers: list[int]) -> list[list[int]]:
        scenes = [scene_at("train", n, seed=OTHER_SEED, rules=exam.rules) for n in numbers]
        features = exam.features([exam.picture(scene) for scene in scenes])
        return [codes.tolist() for codes in exam.tokenizer.encode(features).split()]

    used = len(set().union(*exam.made("codes", range(pictures), make, together=TOGETHER)))
    return plain(used / size, pictures, note=f"{used} of {size} codes")

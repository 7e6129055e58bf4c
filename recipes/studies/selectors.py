"""Selectors: what is the learnt choice of patches worth against choices by a rule?

Command   lavit compare recipes/studies/selectors.py
Cost      lavit compare recipes/studies/selectors.py --plan
Score     docs/results.md, once it is run whole

Merger, codebook, reconstructor and LM are LaVIT's and trained alike; what chooses differs:

    learned     LaVIT's, which wants a quarter of the patches on average
    given       the selector of `learned`, from the start
    random      as many as `given` keeps of the picture, anywhere
    strided     a quarter, evenly in raster order
    norm        the quarter with the largest features
    attention   the quarter that receives most attention (EfficientNet has none: see `Attended`)
    leaders     greedy clustering by cosine, a quarter of leaders on average (DiVT's idea)
    clusters    the same, and a cluster's mean in place of the merger, as there
    oracle      a selector of LaVIT's form, fitted to the true places of things: patches on them

    registers   no patches at all: learnt queries under nested dropout, and a rule of how many are
                enough (One-D-Piece, KARL; see `Registers`)

`learned` learns under the noise of a selector that learns, the others do not: claims are judged by
`given`. All have LaVIT's rate in stage 1; that of stage 2 is for each the best of 0.5, 1 and 2
times the preset's, by the likelihood of validation descriptions in seed 0.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lavit.data.scenes.render import render
from lavit.data.scenes.sample import scene_at
from lavit.evaluate.probes import patches_in
from lavit.evaluate.study import Arm, Comparison, Study, in_model
from lavit.evaluate.tokens import OTHER_SEED
from lavit.presets import Preset
from lavit.vision.encoder import load_vision
from lavit.visual_tokenizer.tokenizer import VisualTokenizer

RATE = 0.25
SHARE, STEPS, BATCH, SPEED = 4, 400, 64, 2e-3  # scenes the oracle sees: a quarter of the pool
ARMS = {
    "strided": {"keep": f"strided:{RATE}"},
    "norm": {"keep": f"norm:{RATE}"},
    "attention": {"keep": f"rate:{RATE}", "rival": {"_class_name": "Attended"}},
    "leaders": {"rival": {"_class_name": "Clusters", "rate": RATE, "pooled": False}},
    "clusters": {"rival": {"_class_name": "Clusters", "rate": RATE}},
    "registers": {"rival": {"_class_name": "Registers"}},
}
# the oracle knows the scene; registers choose no patches, and how many they are
UNCLAIMED = ("learned", "registers", "oracle")
FIGURES = (
    "kept_share",
    "tokenizer_distance",
    "identity_kept",
    "read_pairs_exact",
    "read_pairs_likelihood",
    "write_minimal_pairs",
)


def oracle(study: Study, preset: Preset, seed: int) -> dict[str, Tensor]:
    """Weights of a selector that keeps the patches whose centres lie on things, fitted to scenes
    like training's.
    """
    vision, size = load_vision(preset.model.vision), preset.model.vision.image_size
    torch.manual_seed(seed)
    tokenizer = VisualTokenizer(preset.model.visual_tokenizer)
    count, grid = max(1, study.pictures // SHARE), preset.model.vision.grid
    scenes = [scene_at("train", n, seed=OTHER_SEED + 3, rules=study.rules) for n in range(count)]
    features = vision.encode([render(scene, size) for scene in scenes])
    on_things = torch.zeros(count, grid * grid, dtype=torch.long)
    for number, scene in enumerate(scenes):
        for thing in scene.things:
            on_things[number, patches_in(thing.box, grid)] = 1
    tokenizer.measure(features)
    optimizer = torch.optim.AdamW(tokenizer.selector.parameters(), lr=SPEED)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(min(STEPS, count)):
        chosen = torch.randint(count, (BATCH,), generator=generator)
        log_probs = tokenizer.selector(tokenizer.prepare(features[chosen]))
        loss = F.nll_loss(log_probs.flatten(0, 1), 1 - on_things[chosen].flatten())  # 0 is keep
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return tokenizer.selector.state_dict()


def scattered(preset: Preset) -> Preset:
    """As many patches as the selector keeps, anywhere."""
    return in_model(preset, "visual_tokenizer", keep="scattered")


STUDY = Study(
    name="selectors",
    claim="patches that the selector learns to keep are worth more than others (Sec. 3.1; a "
    "reviewer asked for the comparison)",
    at_scale="an encoder with attention has a better rule than its stand-in here, and photographs "
    "hide their objects better than scenes do",
    arms={
        "learned": Arm(rates=True),
        "given": Arm(selector_of="learned", rates=True),
        "random": Arm(scattered, selector_of="learned", rates=True),
        **{
            name: Arm(partial(in_model, part="visual_tokenizer", **fields), rates=True)
            for name, fields in ARMS.items()
        },
        "oracle": Arm(selector=oracle, rates=True),
    },
    figures=FIGURES,
    comparisons=tuple(
        Comparison("given", name, figure, 0 if name in UNCLAIMED else better)
        for figure, better in zip(FIGURES[1:], (-1, 1, 1, 1, 1), strict=True)
        for name in ("learned", "random", *ARMS, "oracle")
    ),
    rates=(0.5, 1.0, 2.0),
)

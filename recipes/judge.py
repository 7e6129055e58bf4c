"""The judge: a detector of 0.4 M weights, trained on renders alone; two processes, one thread each.

Command   python recipes/judge.py RUN [--minutes 30]
              trains, sets the thresholds on `valid`, writes RUN/judge
          python recipes/judge.py RUN --start RUN/network.pt --minutes 0
              only the thresholds, and the names that are in the list now
          python recipes/judge.py RUN --ship      copies RUN/judge into the package
          python recipes/judge.py --table         the errors of the shipped judge (LOG.md has them)
          python recipes/judge.py --confusions    which objects it takes for which, at 64 pixels
Data      scenes of any things anywhere, both styles, turned by up to 15 degrees, blurred, noisy,
          JPEG, drawn for 64 to 128 px; among them drawings that are spoiled, and parts of
          backgrounds (src/lavit/evaluate/spoil.py), which are to be called "unknown"
Cost      30 minutes of two cores
Score     LOG.md has the table
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path

import judge_errors
import numpy as np
import torch
import tyro
from judge_pictures import Pictures
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lavit.data.scenes.world import SHAPES, objects
from lavit.evaluate.detector import CELLS, Detector, Maps, fused
from lavit.evaluate.judge import FOLDER, UNKNOWN, Judge, sizes
from lavit.train.muon import Muon

RATE = 3e-3  # at most; half of it for what was trained before
NEAR = 0.95  # cells from a centre that learn its answer


def losses(maps: Maps, things: Tensor, ground: Tensor) -> dict[str, Tensor]:
    """What the network still gets wrong, by kind."""
    pictures = len(things)
    there = things[..., 3] >= 0
    at = things[..., :2] * CELLS
    middle = torch.arange(CELLS) + 0.5
    right = at[..., 0, None, None] - middle  # [pictures things rows columns], broadcast
    down = at[..., 1, None, None] - middle[:, None]
    far = right.square() + down.square()
    far = far.masked_fill(~there[..., None, None], 1e9)
    nearest, which = far.min(dim=1)
    sigma = 0.35 + things[..., 2].gather(1, which.flatten(1)).view_as(nearest) * CELLS / 10
    target = torch.exp(-nearest / (2 * sigma.square()))
    hot = maps.heat.sigmoid().clamp(1e-4, 1 - 1e-4)
    centre = far.flatten(2).argmin(-1)  # the cell of each thing
    is_centre = torch.zeros(pictures, CELLS * CELLS).scatter_add_(1, centre, there.float()) > 0
    is_centre = is_centre.view_as(hot)
    positive = -(1 - hot).square() * hot.log() * is_centre
    negative = -((1 - target) ** 4) * hot.square() * (1 - hot).log() * ~is_centre
    count = there.sum().clamp(min=1)
    found = {"heat": (positive.sum() + negative.sum()) / count}
    picture, row, column = (nearest < NEAR**2).nonzero(as_tuple=True)
    thing = which[picture, row, column]
    weight = torch.exp(-nearest[picture, row, column])
    weight = weight / weight.sum().clamp(min=1e-6)
    x, y, side, name, colour, style = things[picture, thing].T

    def loss_of(logits: Tensor, answer: Tensor) -> Tensor:
        said = logits[picture, :, row, column]
        each = F.cross_entropy(said, answer.long(), ignore_index=-1, reduction="none")
        return (each * weight).sum()

    found["name"] = loss_of(maps.name, name)
    found["colour"] = loss_of(maps.colour, colour)
    found["style"] = 0.2 * loss_of(maps.style, style)
    wanted = torch.stack([x * CELLS - column - 0.5, y * CELLS - row - 0.5, 3 * side.log()], dim=1)
    place = maps.place[picture, :, row, column] * torch.tensor([1.0, 1.0, 3.0])
    found["place"] = ((place - wanted).abs().sum(dim=1) * weight).sum()
    found["ground"] = F.cross_entropy(maps.ground, ground[:, 0], ignore_index=-1)
    found["pattern"] = F.cross_entropy(maps.pattern, ground[:, 1], ignore_index=-1)
    return found


def train(
    names: tuple[str, ...], minutes: float, seed: int, start: Path | None, run: Path
) -> Detector:
    """The detector after `minutes`; the rate falls with the clock."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    network = Detector(sizes(names), norm=True).to(memory_format=torch.channels_last)
    if start is not None:
        _begin_from(network, names, torch.load(start, weights_only=True))
    heads = {*network.things.parameters(), *network.vote.parameters()}
    convolutions = [w for w in network.parameters() if w.ndim == 4 and w not in heads]
    others = [w for w in network.parameters() if w.ndim != 4 or w in heads]
    optimizer = Muon(
        [
            {"params": convolutions, "muon": True, "share": 0.5, "weight_decay": 0.1},
            {"params": others, "share": 1.0, "weight_decay": 0.01},
        ],
        lr=RATE,
    )
    batches = iter(DataLoader(Pictures(names, seed), batch_size=None, num_workers=1))
    begin, step, mean = time.monotonic(), 0, {}
    top = RATE if start is None else RATE / 2
    while minutes and (done := (time.monotonic() - begin) / 60 / minutes) < 1:
        rate = top * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * np.cos(np.pi * done)) + 1e-6
        for group in optimizer.param_groups:
            group["lr"] = rate * group["share"]
        pixels, things, ground = next(batches)
        pixels = pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1)
        parts = losses(
            network(pixels.contiguous(memory_format=torch.channels_last)), things, ground
        )
        loss = sum(parts.values())
        network.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        step += 1
        for key, value in parts.items():
            mean[key] = 0.98 * mean.get(key, value.item()) + 0.02 * value.item()
        if step % 50 == 0:
            torch.save({"names": names, "weights": network.state_dict()}, run / "network.pt")
            said = " ".join(f"{key} {value:.3f}" for key, value in mean.items())
            print(f"{step} {done:.3f} {said}", flush=True)
    return network


def _begin_from(network: Detector, names: tuple[str, ...], saved: dict) -> None:
    """Take over what was trained, for the names that are still there."""
    weights, known = saved["weights"], list(saved["names"])
    rows = [0, *(1 + known.index(name) for name in names)]
    rows += list(range(1 + len(known), len(weights["things.bias"])))
    for key in ("things.weight", "things.bias"):
        weights[key] = weights[key][rows]
    network.load_state_dict(weights)


def write(network: Detector, names: tuple[str, ...], folder: Path) -> Judge:
    """Ship in half precision, with thresholds set on `valid`."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value.half().contiguous() for key, value in fused(network).state_dict().items()}
    weights = folder / "judge.safetensors"
    save_file(state, weights)
    said = {
        "recipe": "recipes/judge.py",
        "license": "CC-BY-SA-4.0",  # as are the OpenMoji drawings that it was trained on
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "heat": 0.3,
        "sure": 0.5,
        "names": list(names),
    }
    where = folder / "judge.json"
    where.write_text(json.dumps(said, indent=1) + "\n", "utf-8")
    said["heat"], said["sure"] = judge_errors.thresholds(Judge.load(folder))
    where.write_text(json.dumps(said, indent=1) + "\n", "utf-8")
    return Judge.load(folder)


def main(
    run: Path = Path("runs/judge"),
    /,
    minutes: float = 30.0,
    seed: int = 0,
    start: Path | None = None,
    ship: bool = False,
    table: bool = False,
    confusions: bool = False,
    judge: Path = FOLDER,
) -> None:
    """Train the judge into `run`, ship it, or say how it errs."""
    if ship:
        shutil.copytree(run / "judge", FOLDER, dirs_exist_ok=True)
    elif table:
        print(judge_errors.table(Judge.load(judge), report=lambda line: print(line, flush=True)))
    elif confusions:
        for line in judge_errors.confusions(Judge.load(judge)):
            print(line)
    else:
        names = (*(kind.name for kind in objects()), *SHAPES, UNKNOWN)
        run.mkdir(parents=True, exist_ok=True)
        network = train(names, minutes, seed, start, run)
        torch.save({"names": names, "weights": network.state_dict()}, run / "network.pt")
        write(network, names, run / "judge")


if __name__ == "__main__":
    tyro.cli(main)

"""Checkpoints: whole, atomic, kept in number; random states and moments come back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lavit.config import InputError
from lavit.train import checkpoint as room
from lavit.train.checkpoint import (
    drop_all_but,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)


class Weights:
    """A stage of one layer with a state of its own."""

    name, steps = "weights", 10

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
        self.module[2].weight = self.module[2].weight  # a plain parameter
        self.module[0].bias.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.module.parameters() if p.requires_grad], fused=True
        )
        self.window = torch.randn(5)
        self.accelerator = Accelerator()

    def step(self) -> Tensor:
        """One step on random numbers: shows weights, moments and random state at once."""
        self.optimizer.zero_grad()
        loss = self.module(torch.randn(8, 4)).square().mean()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def state(self) -> dict[str, Tensor]:
        return {"window": self.window}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.window = state["window"]

    def save(self, folder: Path, step: int, **options: Any) -> None:
        save_checkpoint(
            folder, step, self.module, self.optimizer, self, accelerator=self.accelerator, **options
        )

    def load(self, path: Path) -> int:
        return load_checkpoint(
            path, self.module, self.optimizer, self, accelerator=self.accelerator
        )


def test_a_loaded_run_goes_on_as_the_saved_one(tmp_path: Path) -> None:
    first = Weights()
    for _ in range(3):
        first.step()
    first.save(tmp_path, 3)
    expected = [first.step() for _ in range(4)]
    second = Weights(seed=1)
    second.module[0].bias.data.copy_(first.module[0].bias)  # frozen: not the checkpoint's to keep
    assert second.load(latest_checkpoint(tmp_path)) == 3
    assert second.window.equal(first.window)
    assert [second.step() for _ in range(4)] == expected


def test_the_newest_are_kept(tmp_path: Path) -> None:
    stage = Weights()
    for step in (1, 2, 10, 9):
        stage.save(tmp_path, step, keep=2)
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [9, 10]
    assert latest_checkpoint(tmp_path).name == "10"


@pytest.mark.parametrize(
    "file", ["module.safetensors", "optimizer.safetensors", "random.safetensors"]
)
def test_a_failure_while_saving_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """The disk is full in the middle of a file."""
    stage = Weights()
    stage.save(tmp_path, 1, keep=1)

    def failing(writer: Callable[..., None]) -> Callable[..., None]:
        def fail(*given: Any) -> None:
            if (path := given[-1]).name == file:
                path.write_bytes(b"half")
                raise OSError(28, "No space left on device")
            writer(*given)

        return fail

    for name in ("save_tensors", "write_tensors"):
        monkeypatch.setattr(room, name, failing(getattr(room, name)))
    with pytest.raises(OSError, match="No space"):
        stage.save(tmp_path, 2, keep=1)
    assert latest_checkpoint(tmp_path).name == "1"
    assert Weights(seed=2).load(latest_checkpoint(tmp_path)) == 1


# Python 3.12 on forks of a process with threads
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_kill_while_saving_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process dies inside its second save, with no chance to tidy up."""
    whole = room.save_tensors

    def die(tensors: dict[str, torch.Tensor], path: Path) -> None:
        whole(tensors, path)
        if path.name == "state.safetensors":
            os.kill(os.getpid(), signal.SIGKILL)

    Weights().save(tmp_path, 1, keep=1)
    if (child := os.fork()) == 0:
        try:
            monkeypatch.setattr(room, "save_tensors", die)
            Weights().save(tmp_path, 2, keep=1)
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert latest_checkpoint(tmp_path).name == "1"
    stage = Weights(seed=2)
    assert stage.load(latest_checkpoint(tmp_path)) == 1
    stage.save(tmp_path, 2, keep=1)  # what the dead one left half-written is no obstacle
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    Weights().save(tmp_path, 1)
    other = Weights()
    other.module[0] = nn.Linear(5, 3)
    with pytest.raises(InputError, match="another configuration"):
        other.load(latest_checkpoint(tmp_path))


def test_a_checkpoint_takes_the_memory_of_one_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that are gathered from ranks are written one after the other and dropped."""
    gathered: list[weakref.ref[Tensor]] = []
    most: list[int] = []

    def whole(tensor: Tensor) -> Tensor:
        most.append(sum(one() is not None for one in gathered))
        full = tensor.clone()
        gathered.append(weakref.ref(full))
        return full

    monkeypatch.setattr(room, "whole", whole)
    stage = Weights()
    stage.step()
    stage.save(tmp_path, 3)
    assert len(most) > 10 and max(most) <= 1  # the one before
    written = load_file(tmp_path / "3" / "module.safetensors")
    wanted = {n: t for n, t in stage.module.state_dict().items() if n != "0.bias"}
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in wanted.items())


def not_a_number(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name].view(-1)[0] = float("nan")


def of_integers(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].long()


def halved(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].half()


def missing(tensors: dict[str, Tensor], name: str) -> None:
    """With all moments of its weight."""
    for key in [key for key in tensors if key.split("/")[-1] == name.split("/")[-1]]:
        del tensors[key]


@pytest.mark.parametrize("spoil", [not_a_number, of_integers, halved, missing])
@pytest.mark.parametrize("file", ["module", "optimizer", "state"])
def test_tensors_that_are_not_as_saved_are_refused(
    tmp_path: Path, file: str, spoil: Callable[[dict[str, Tensor], str], None]
) -> None:
    stage = Weights()
    stage.step()
    stage.save(tmp_path, 1)
    path = tmp_path / "1" / f"{file}.safetensors"
    tensors = load_file(path)
    spoil(tensors, max(tensors, key=lambda name: tensors[name].numel()))
    save_file(tensors, path)
    with pytest.raises(InputError, match=f"or damaged .{file}.safetensors.*delete it to go on"):
        Weights().load(tmp_path / "1")


@pytest.mark.parametrize(
    "said",
    [{"step": None}, {"step": 1.5}, {"step": 2}, {"stage": "pixels"}, {"step": 1}],
)
def test_a_checkpoint_of_another_step_or_stage_is_refused(tmp_path: Path, said: dict) -> None:
    Weights().save(tmp_path, 1)
    path = tmp_path / "1"
    if said == {"step": 1}:  # past the end of the stage
        path = path.rename(tmp_path / "11")
        said = {"step": 11}
    about = json.loads((path / "step.json").read_text())
    (path / "step.json").write_text(json.dumps(about | said))
    with pytest.raises(InputError, match=r"step.json says step"):
        Weights().load(path)


def test_a_half_copied_one_is_named_with_its_cure(tmp_path: Path) -> None:
    Weights().save(tmp_path, 1)
    (tmp_path / "1" / "module.safetensors").unlink()
    with pytest.raises(InputError, match=r"module\.safetensors is missing.*delete it to go on"):
        Weights().load(tmp_path / "1")


def test_what_is_no_checkpoint_is_left_alone(tmp_path: Path) -> None:
    """Stray files and folders, copies that lack a part; what a crash left goes."""
    stage = Weights()
    stage.save(tmp_path, 1)
    (tmp_path / ".DS_Store").touch()
    (tmp_path / "7").touch()
    (tmp_path / "latest").symlink_to("1")
    for name in ("1.bak", "007", "\N{SUPERSCRIPT TWO}", ".9.new", ".8.old"):
        shutil.copytree(tmp_path / "1", tmp_path / name)
    shutil.copytree(tmp_path / "1", tmp_path / "55", ignore=lambda *_: ["step.json"])
    stage.save(tmp_path, 2, keep=1)
    strays = {".DS_Store", "7", "latest", "1.bak", "007", "\N{SUPERSCRIPT TWO}", "55"}
    assert {path.name for path in tmp_path.iterdir()} == strays | {"2"}
    assert {path.name for path in drop_all_but(tmp_path, 1)} == strays
    assert latest_checkpoint(tmp_path) == tmp_path / "2"


def test_a_half_removed_one_does_not_pass_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Weights()
    for step in (1, 2):
        stage.save(tmp_path, step)

    def die(path: Path) -> None:
        (path / "module.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            drop_all_but(tmp_path, 1)
    shutil.rmtree(tmp_path / "2")
    assert latest_checkpoint(tmp_path) is None

"""Training, evaluation and generation on a second device (device.py): the values of the CPU.

A fork alone knows the device, for torch keeps a backend as long as it runs. It begins before any
test, because autograd makes a queue for each device when it first runs.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM

import lavit
from conftest import NAMES, short_streams, toy_config, toy_training
from lavit.config import TrainConfig
from lavit.evaluate.examinee import Examinee, measured
from lavit.evaluate.folder import FIGURES, OwnPictures, held_out
from lavit.generate.pipeline import Pipeline
from lavit.generate.sampling import Sampling
from lavit.language.model import Language
from lavit.language.reader import MergerReader
from lavit.model import LaVIT
from lavit.train import loop
from lavit.train.finetune import finetune, finetune_training
from lavit.train.run import open_run, train_stages
from lavit.train.spread import WAIT, sharded_precision
from lavit.visual_tokenizer.codebook import Codebook
from lavit.visual_tokenizer.merger import Merger
from test_conversations import drawn, read, write


@contextlib.contextmanager
def on_device() -> Iterator[None]:
    """Trainings run on the second device, in bf16 autocast over fp32 weights as on a GPU."""
    from device import DEVICE

    def accelerator(precision: str = "auto", *, fsdp: bool = False) -> Accelerator:
        AcceleratorState._reset_state(True)
        PartialState(cpu=True).device = DEVICE
        return Accelerator(mixed_precision="bf16" if precision == "bf16" else "no")

    with pytest.MonkeyPatch.context() as patch:
        for module in ("run", "finetune"):
            patch.setattr(f"lavit.train.{module}.make_accelerator", accelerator)
        yield
    AcceleratorState._reset_state(True)


def serve(pipe: Connection) -> None:
    """Run the tests that are asked for, say what is wrong with them."""
    gc.freeze()
    with contextlib.suppress(EOFError):
        while True:
            name, fixtures = pipe.recv()
            said = ""
            try:
                with on_device():
                    globals()[name].__wrapped__(**fixtures)
            except BaseException:
                said = traceback.format_exc()
            pipe.send(said)


def begin_fork() -> Connection:
    """Start the process that has the device; it ends with this one."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def run() -> None:
        ours.close()
        serve(theirs)

    with warnings.catch_warnings():  # Python 3.12 on forks of a process with threads
        warnings.simplefilter("ignore", DeprecationWarning)
        context.Process(target=run, daemon=True).start()
    theirs.close()
    return ours


def forked(test: Callable[..., None]) -> Callable[..., None]:
    """The test in the fork."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        FORK.send((test.__name__, fixtures))
        if said := FORK.recv():
            pytest.fail(said, pytrace=False)

    return run


@forked
def test_the_device_refuses_what_cuda_refuses() -> None:
    from device import DEVICE, NAME, waits

    here, there = torch.ones(3), torch.ones(3, device=DEVICE)
    for wrong in (
        lambda: here + there,
        lambda: here[torch.ones(3, dtype=torch.bool, device=DEVICE)],
        lambda: there.numpy(),
        lambda: torch.cat([here, there]),
        lambda: torch.nn.Linear(3, 3)(there),
    ):
        with pytest.raises((RuntimeError, TypeError)):
            wrong()
    assert (there + torch.tensor(1.0)).cpu().tolist() == [2.0] * 3  # a scalar may enter
    layer = torch.nn.Linear(3, 3).to(DEVICE)
    with torch.autocast(NAME, torch.bfloat16):
        assert layer(there).dtype == torch.bfloat16
        assert torch.nn.functional.layer_norm(layer(there), (3,)).dtype == torch.float32
    with torch.device("meta"):
        assert torch.tensor([]).is_meta  # by which transformers sees that it makes no weights yet
    layer(there).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.device == DEVICE
    with waits() as found:
        float(there.sum())
    assert not found  # no line of the package


def streaming(training: TrainConfig) -> TrainConfig:
    """All stages on streams."""
    names = ("tokenizer", "language", "pixels")
    return replace(training, **{n: replace(getattr(training, n), stream=True) for n in names})


@pytest.mark.parametrize(("stream", "precision"), [(False, "bf16"), (True, "fp32")])
@forked
def test_all_stages_train_on_it(
    toy_data: Path,
    tmp_path: Path,
    stream: bool,
    precision: Any,
) -> None:
    """With samples of stage 2; `lavit caption` and the like then run there too."""
    from device import DEVICE

    training = replace(toy_training(1), precision=precision, sample_every=1)
    training = streaming(training) if stream else training
    with pytest.MonkeyPatch.context() as patch:
        short_streams(patch)
        run = open_run(tmp_path / "run", toy_data, toy_config(), training, trackers=())
        assert run.accelerator.device == DEVICE
        train_stages(run)


@forked
def test_the_pipeline_gives_on_it_what_it_gives_on_the_cpu(toy_run: Path) -> None:
    """Text, codes and pictures."""
    from device import DEVICE

    picture = Image.new("RGB", (32, 32), (200, 30, 30))
    words = Sampling(temperature=0.0, min_tokens=4, max_tokens=8)
    found = []
    for device in ("cpu", DEVICE):
        pipe = Pipeline(LaVIT.from_pretrained(toy_run, device=device))
        drawn = pipe.draw("a red square", seed=3, steps=2)
        codes = pipe.tokenize(picture).codes.cpu().tolist()
        found.append((pipe.caption(picture, sampling=words), codes, np.asarray(drawn, dtype=int)))
    assert found[0][:2] == found[1][:2]
    assert np.abs(np.subtract(found[0][2], found[1][2])).max() <= 1


@forked
def test_products_of_a_step_are_bf16_but_not_those_that_choose_codes() -> None:
    """Under autocast the head's products are bf16, its logits fp32; codes are those of fp32."""
    from device import DEVICE, NAME

    torch.manual_seed(0)
    codebook = Codebook(8, 64, 4)
    vectors = torch.nn.functional.normalize(torch.randn(4000, 4), dim=-1)
    wanted = codebook.index(vectors)
    codebook, seen = codebook.to(DEVICE), []
    language = toy_language()
    language.loss(torch.randn(5, 48), torch.arange(5))
    language.to(DEVICE)
    monkey = pytest.MonkeyPatch()
    plain = torch.mm

    def product(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(args[0].dtype)
        return plain(*args, **kwargs)

    with monkey.context() as patched, torch.autocast(NAME, torch.bfloat16):
        patched.setattr("lavit.language.head.torch.mm", product)
        found = codebook.index(vectors.to(DEVICE))
        hidden = torch.randn(5, 48).to(DEVICE).requires_grad_()
        loss = language.loss(hidden, torch.arange(5).to(DEVICE)).total
    loss.backward()
    assert torch.equal(found.cpu(), wanted)
    assert set(seen) == {torch.bfloat16}
    assert loss.dtype == hidden.grad.dtype == torch.float32


def toy_language() -> Language:
    """The toy's language part, random."""
    torch.manual_seed(0)
    config = toy_config()
    options = {**config.language.architecture, "vocab_size": 300}
    lm = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(options.pop("model_type"), **options)
    )
    reader = MergerReader(Merger(32, 2, 1, 2.0), 48)
    return Language(lm, reader, codes=32, end=0)


def test_sharded_training_sums_in_fp32() -> None:
    policy = sharded_precision("bf16")
    assert policy.param_dtype == torch.bfloat16
    assert policy.reduce_dtype == policy.output_dtype == torch.float32
    assert timedelta(hours=1) <= WAIT  # NCCL's ten minutes are less than an encoding takes


def test_one_switch_compiles_the_step(toy_run: Path) -> None:
    """A static cache and a compiled step say and write what the plain one does."""
    model = LaVIT.from_pretrained(toy_run)
    picture = Image.new("RGB", (32, 32), (200, 30, 30))
    words = Sampling(temperature=0.0, min_tokens=4, max_tokens=8)
    plain, compiled = Pipeline(model), Pipeline(model, compile="eager")
    assert compiled.engine.decoder.static
    said = [pipe.caption(picture, sampling=words) for pipe in (plain, compiled)]
    assert said[0] == said[1]


@forked
def test_parts_that_diffusers_offloads_work_on_it(toy_run: Path) -> None:
    from device import DEVICE
    from lavit.integrations.diffusers import LaVITPipeline

    found = []
    for offloaded in (False, True):
        pipe = LaVITPipeline.from_pretrained(toy_run)
        pipe.set_progress_bar_config(disable=True)
        if offloaded:
            pipe.enable_model_cpu_offload(device=DEVICE)
        seeded = torch.Generator().manual_seed(1)
        how: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np"}
        found.append(pipe("red bar", generator=seeded, **how).images)
        assert all(p.device.type == "cpu" for p in pipe.lavit.parameters())
    np.testing.assert_allclose(*found, atol=1e-5)


@forked
def test_fine_tuning_and_evaluation_run_on_it(
    toy_run: Path, toy_data: Path, tmp_path: Path
) -> None:
    """Conversations with pictures on both sides; the figures of any data are those of the CPU."""
    from device import DEVICE

    data = write(tmp_path, [read(name) for name in NAMES[:4]] + [drawn(name) for name in NAMES[4:]])
    training = finetune_training(toy_run, steps=2)
    finetune(tmp_path / "new", data, toy_run, training, trackers=())
    assert (tmp_path / "new" / "language" / "done").exists()
    corpus, _ = held_out(str(toy_data))
    found = []
    for device in ("cpu", DEVICE):
        exam = Examinee(toy_run)
        exam.pipe = Pipeline(LaVIT.from_pretrained(toy_run, device=device))
        exam.model = exam.pipe.model
        found.append(measured(FIGURES, (), OwnPictures(exam, corpus)))
    for name, figure in found[0].items():
        near = 1e-5 if name in ("tokenizer_distance", "caption_loss") else 0.0  # features: 8e-6
        assert found[1][name]["value"] == pytest.approx(figure["value"], rel=0, abs=near), name


SAID = re.compile(r"#.*the host waits")  # of a line, or of one of the three above it


@pytest.mark.parametrize("stream", [False, True])
@forked
def test_a_step_says_why_where_the_host_waits_for_the_device(
    toy_data: Path, tmp_path: Path, stream: bool
) -> None:
    """Of what runs in every step: forward, backward, what follows the optimiser, and encoding."""
    from device import waits

    found: set[tuple[str, int]] = set()
    plain = loop.step_once

    def watched(*args: Any, **options: Any) -> Any:
        with waits() as here:
            done = plain(*args, **options)
        found.update(here)
        return done

    training = replace(toy_training(2), precision="bf16")
    training = streaming(training) if stream else training
    with pytest.MonkeyPatch.context() as patch:
        short_streams(patch)
        patch.setattr(loop, "step_once", watched)
        train_stages(open_run(tmp_path / "run", toy_data, toy_config(), training, trackers=()))
    silent = []
    for file, number in sorted(found):
        lines = (Path(lavit.__file__).parent / file).read_text().splitlines()
        if not any(SAID.search(line) for line in lines[max(0, number - 4) : number]):
            silent.append(f"{file}:{number} {lines[number - 1].strip()}")
    assert found and not silent, "\n".join(silent)


FORK = begin_fork()  # it knows what stands above

"""Loading: where and how coarse the parts are, what is read when, and what a platform cannot do."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import peft
import pytest
import torch

import lavit
from conftest import toy_picture
from lavit import placement
from lavit.config import TO_READ, InputError
from lavit.generate.decoder import Decoder
from lavit.generate.packed import obstacle

LIBRARIES = ("diffusers", "datasets")  # seconds of import


class Blocked:
    """What lies under these names cannot be imported."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.startswith(self.names):
            raise ImportError(f"{name} is not there")


def without(run: Path, data: Path, picture: Path) -> None:
    """Import lavit anew, and use it: a caption without `LIBRARIES`, all without scenes."""
    warnings.simplefilter("ignore")
    modules = sys.modules.copy()
    for name in modules:
        if name.split(".")[0] in ("lavit", *LIBRARIES):
            del sys.modules[name]
    sys.meta_path.insert(0, Blocked("lavit.data.scenes", *LIBRARIES))
    pipeline = importlib.import_module("lavit").load(run, parts=TO_READ)
    pipeline.caption(picture)
    assert pipeline.model.pixels is None and not {*LIBRARIES} & sys.modules.keys()
    sys.meta_path[0] = Blocked("lavit.data.scenes")
    sys.modules |= {n: found for n, found in modules.items() if n.split(".")[0] in LIBRARIES}
    rooms = "model", "train.run", "train.finetune", "generate.pipeline", "data.stream", "cli"
    for room in (*rooms, "evaluate.folder"):
        importlib.import_module(f"lavit.{room}")
    sys.modules["lavit.cli"].main(["data", "check", str(data), "--json"])


# Python 3.12 on forks of a process with threads
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_caption_reads_no_pixels_and_no_diffusers_and_nothing_else_needs_scenes(
    toy_run: Path, toy_data: Path, tmp_path: Path
) -> None:
    """Neither the decoder's weights nor the library that they need."""
    toy_picture("red bar").save(tmp_path / "picture.png")
    if (child := os.fork()) == 0:
        code = 1
        try:
            with (tmp_path / "said").open("w") as sys.stdout:
                without(toy_run, toy_data, tmp_path / "picture.png")
            code = 0
        except BaseException:
            (tmp_path / "said").write_text(traceback.format_exc())
        finally:
            os._exit(code)
    code, said = os.waitpid(child, 0)[1], (tmp_path / "said").read_text()
    assert code == 0 and '"records": 8' in said, said


def test_one_line_says_where(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "lavit")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert placement.place() == (torch.device("cpu"), torch.float32)
    assert placement.place("cpu", "bf16") == (torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    assert placement.place() == (torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    assert placement.place("cuda:1") == (torch.device("cuda", 1), torch.float16)
    assert caplog.messages == [
        "running on cpu in float32",
        "running on cpu in bfloat16",
        "running on cuda in bfloat16",
        "running on cuda:1 in float16",
    ]


def test_importing_leaves_the_environment_as_it_is() -> None:
    code = "import os; before = dict(os.environ); import lavit; assert os.environ == before"
    settings = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    subprocess.run([sys.executable, "-c", code], env=settings, check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is the OpenMP of torch on Linux")
def test_waiting_threads_give_their_core_away_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """libgomp spins briefly with more threads than cores: one that sleeps holds some."""

    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    before, settings = threads(), dict(os.environ)
    torch.set_num_threads(2)
    try:
        placement.share_cores.__wrapped__()
        until = time.monotonic() + 5
        while threads() < before + 2 and time.monotonic() < until:
            time.sleep(0.01)
        found = threads()
        monkeypatch.setenv("OMP_WAIT_POLICY", "active")
        placement.share_cores.__wrapped__()
        assert threads() == found == before + 2
    finally:
        torch.set_num_threads(1)
    monkeypatch.undo()
    assert dict(os.environ) == settings


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"device": "gpu"}, "device 'gpu' is not known: use 'auto'"),
        ({"device": "cuda"}, "no CUDA GPU can be used here"),
        ({"device": "mps"}, "no Apple GPU can be used here"),
        ({"dtype": "int4"}, "dtype 'int4' is not known"),
        ({"quantization": "int3"}, "quantization 'int3' is not known"),
        ({"protocol": "mine"}, "protocol 'mine' is not known"),
    ],
)
def test_what_cannot_be_done(
    wrong: dict[str, object], line: str, toy_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match=line):
        lavit.load(toy_run, **({"device": "cpu"} | wrong))


@pytest.mark.parametrize(
    ("quantization", "names"), [("int8", "bitsandbytes \\(or torchao\\)"), ("nf4", "bitsandbytes:")]
)
def test_quantisers_that_are_not_installed(
    quantization: str, names: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement.importlib.util, "find_spec", lambda name: None)
    for device in ("cuda", "cpu"):
        with pytest.raises(InputError, match=f"{quantization} weights need the package {names}"):
            placement.quantizer(quantization, torch.device(device), torch.bfloat16)
    with pytest.raises(InputError, match="need CUDA or the CPU, this runs on mps: leave"):
        placement.quantizer(quantization, torch.device("mps"), torch.bfloat16)


def test_nf4_is_the_language_model_of_the_rounded_weights(toy_run: Path) -> None:
    """In an environment that has bitsandbytes, which runs on a CPU too."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.functional import dequantize_4bit

    rounded = lavit.load(toy_run, device="cpu", quantization="nf4").model.language
    exact = lavit.load(toy_run, device="cpu").model.language
    ids, before = torch.tensor([[5, 9, 7, 3]]), exact.lm.model.layers[0].mlp.up_proj.weight.clone()
    for name, linear in rounded.lm.named_modules():
        if hasattr(getattr(linear, "weight", None), "quant_state"):
            weights = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
            exact.lm.get_submodule(name).weight.data = weights
    assert not torch.equal(before, exact.lm.model.layers[0].mlp.up_proj.weight)
    with torch.no_grad():
        found, wanted = (one.body(inputs_embeds=one.embed(ids))[0] for one in (rounded, exact))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("package", ["bitsandbytes", "torchao"])
def test_int8_hardly_differs(package: str, toy_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(package)
    found = placement.importlib.util.find_spec
    monkeypatch.setattr(
        placement.importlib.util, "find_spec", lambda name: found(name) if name == package else None
    )
    ids, outs = torch.tensor([[5, 9, 7, 3]]), []
    for quantization in ("int8", None):
        language = lavit.load(toy_run, device="cpu", quantization=quantization).model.language
        with torch.no_grad():
            outs.append(language.body(inputs_embeds=language.embed(ids))[0])
    difference = (outs[0] - outs[1]).norm() / outs[1].norm()
    assert 0 < difference < 0.05


def test_other_number_types_speak_too(toy_run: Path) -> None:
    pipeline = lavit.load(toy_run, device="cpu", dtype="bf16")
    assert isinstance(pipeline.caption(toy_picture("red bar")), str)
    assert pipeline.model.language.rows.dtype == torch.bfloat16


def test_layers_may_lie_elsewhere(toy_run: Path) -> None:
    """Two layers, one of them on disk: accelerate loads it for each step, nothing else changes."""
    images = [toy_picture("red bar"), toy_picture("blue dot")]
    expected = lavit.load(toy_run, device="cpu")
    places = {
        name: "cpu"
        for name in (
            "lm_head",
            "model.embed_tokens",
            "model.layers.0",
            "model.norm",
            "model.rotary_emb",
        )
    }
    spread = lavit.load(toy_run, device="cpu", device_map=places | {"model.layers.1": "disk"})
    assert spread.caption(images) == expected.caption(images)
    assert spread.draw("red", steps=2).tobytes() == expected.draw("red", steps=2).tobytes()
    lm = spread.model.language.lm
    assert (
        lm.model.layers[1].mlp.up_proj.weight.device.type == "meta"
        and type(spread.engine.decoder) is Decoder
    )
    automatic = lavit.load(toy_run, device="cpu", device_map="auto")
    assert automatic.caption(images) == expected.caption(images)


def test_a_quantiser_gets_merged_weights_and_the_rest_stays(toy_run: Path) -> None:
    """The way of weights to a quantiser, here none: LM rebuilt, LoRA merged, rows, reader kept."""
    language = lavit.load(toy_run, device="cpu").model.language
    targets = ["q_proj", "down_proj"]
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False), language.lm
    )
    language.eval()
    ids = torch.tensor([[5, 9, 280, 7]])
    with torch.no_grad():
        before = language.visual_logits(
            language.body(inputs_embeds=language.embed(ids)).last_hidden_state
        )
        old = language.lm
        new = placement.quantized(language, None, torch.device("cpu"), torch.float32, {"": "cpu"})
        after = new.visual_logits(new.body(inputs_embeds=new.embed(ids)).last_hidden_state)
    assert new.lm is not old and not any("lora" in name for name, _ in new.named_parameters())
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert obstacle(new) is None
    new.lm.hf_quantizer = object()  # what a quantiser leaves there
    assert obstacle(new) == "its weights are rounded already"


def test_a_model_without_a_reader_says_so(toy_run: Path, tmp_path: Path) -> None:
    shutil.copytree(
        toy_run, tmp_path / "run", ignore=shutil.ignore_patterns("reader", "cache", "checkpoints")
    )
    with pytest.raises(InputError, match="no reader for pictures"):
        lavit.load(tmp_path / "run").caption(toy_picture("red bar"))

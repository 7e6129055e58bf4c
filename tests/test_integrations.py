"""Adapters for other frameworks give what the pipeline gives."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lavit
from conftest import toy_picture
from lavit.config import InputError

PROMPTS = ["red square", "blue dot"]


@pytest.fixture(scope="module")
def pipe(toy_run: Path) -> Any:
    from lavit.integrations.diffusers import LaVITPipeline

    pipe = LaVITPipeline.from_pretrained(toy_run)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_diffusers_pipeline_draws_what_the_pipeline_draws(toy_run: Path, pipe: Any) -> None:
    images = pipe(PROMPTS, generator=seeded(3, 4), num_inference_steps=3).images
    seeds = [int(torch.randint(2**31, (1,), generator=one)) for one in seeded(3, 4)]
    wanted = lavit.load(toy_run).draw(PROMPTS, seed=seeds, steps=3)
    assert all(
        np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(images, wanted, strict=True)
    )
    again = pipe(PROMPTS[1], generator=seeded(4)[0], num_inference_steps=3, return_dict=False)
    assert np.array_equal(np.asarray(again[0][0]), np.asarray(images[1]))


def test_diffusers_forms_schedulers_and_callbacks(pipe: Any) -> None:
    from diffusers import DDIMScheduler

    how: dict[str, Any] = {"prompt": "red bar", "num_inference_steps": 4}
    steps = []

    def watch(own: Any, step: int, time: torch.Tensor, kwargs: dict[str, torch.Tensor]) -> Any:
        steps.append((step, int(time), tuple(kwargs["latents"].shape)))
        return {"latents": torch.zeros_like(kwargs["latents"])} if step == 3 else None

    grey = pipe(**how, generator=seeded(0)[0], callback_on_step_end=watch, output_type="pt").images
    assert [step for step, _, _ in steps] == [0, 1, 2, 3]
    assert torch.equal(grey, torch.full_like(grey, 0.5))  # the latents that it gave
    two = pipe(**how, generator=seeded(0)[0], num_images_per_prompt=2, output_type="np").images
    assert two.shape == (2, 16, 16, 3) and not np.array_equal(two[0], two[1])
    latents = pipe(**how, generator=seeded(0)[0], output_type="latent").images
    pictures = (pipe.lavit.pixels.decode(latents).clamp(-1, 1) + 1) / 2
    assert np.allclose(pictures.permute(0, 2, 3, 1).numpy(), two[:1], atol=1e-6)
    usual, pipe.scheduler = pipe.scheduler, DDIMScheduler.from_config(pipe.scheduler.config)
    other = pipe(**how, generator=seeded(0)[0], output_type="np").images
    pipe.scheduler = usual
    assert not np.allclose(other, two[:1], atol=1e-3)
    assert set(pipe.components) == {"lavit", "scheduler"}


def test_diffusers_offload_keeps_the_picture(toy_run: Path, pipe: Any) -> None:
    from lavit.integrations.diffusers import LaVITPipeline

    moved = LaVITPipeline.from_pretrained(toy_run)
    moved.set_progress_bar_config(disable=True)
    moved.enable_model_cpu_offload(device="cpu")
    how: dict[str, Any] = {"prompt": PROMPTS, "num_inference_steps": 2, "output_type": "np"}
    a, b = (one(**how, generator=seeded(1, 2)).images for one in (moved, pipe))
    assert np.array_equal(a, b)


def test_the_page_s_example_runs(toy_run: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "integrations.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    found: dict[str, Any] = {}
    exec(block.replace('"nano"', repr(str(toy_run))), found)
    assert found["image"].size == (16, 16)


def test_diffusers_refuses_in_one_line(pipe: Any) -> None:
    for wrong in (
        {"output_type": "jpg"}, {"height": 16}, {"generator": seeded(1, 2)},
        {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]},
    ):  # fmt: skip
        with pytest.raises(InputError):
            pipe("red bar", **wrong)


def entry() -> EntryPoint:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    ((name, value),) = project["project"]["entry-points"]["lmms_eval.models"].items()
    return EntryPoint(name, value, "lmms_eval.models")


def test_lmms_eval_manifest_imports_nothing() -> None:
    module = entry().value.split(":")[0]
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_lmms_eval_runs_a_task(toy_run: Path, tmp_path: Path) -> None:
    """In an environment of its own, since lmms-eval needs filelock < 4 (docs/evaluation.md)."""
    pytest.importorskip("lmms_eval")
    questions = ["what is it?", "is it red?", "which shape?"]
    for number, name in enumerate(("red square", "blue dot", "green bar")):
        toy_picture(name).save(tmp_path / f"{number}.png")
    lines = [
        {"file": str(tmp_path / f"{n}.png"), "question": question, "answer": "red"}
        for n, question in enumerate(questions)
    ]
    (tmp_path / "toy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "utils.py").write_text(
        "from PIL import Image\n"
        "def visual(doc):\n    return [Image.open(doc['file']).convert('RGB')]\n"
        "def text(doc, kwargs=None):\n    return doc['question']\n"
    )
    (tmp_path / "toy.yaml").write_text(
        f"task: toy\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tmp_path}/toy.jsonl\ntest_split: test\noutput_type: generate_until\n"
        "doc_to_visual: !function utils.visual\ndoc_to_text: !function utils.text\n"
        "doc_to_target: answer\ngeneration_kwargs:\n  max_new_tokens: 6\n  temperature: 0\n"
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    command = [sys.executable, "-m", "lmms_eval", "--model", "lavit", "--tasks", "toy"]
    command += ["--model_args", f"pretrained={toy_run}", "--include_path", str(tmp_path)]
    command += ["--batch_size", "2", "--log_samples", "--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (tmp_path / "out").rglob("*samples_toy.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    said = {row["doc_id"]: row["filtered_resps"] for row in rows}
    pipe = lavit.load(toy_run)
    from lavit.generate.sampling import Sampling

    how = Sampling(temperature=0, max_tokens=6)
    files = [str(tmp_path / f"{n}.png") for n in range(3)]
    assert [said[n] for n in range(3)] == pipe.ask(files, questions, sampling=how)

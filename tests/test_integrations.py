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
from PIL import Image

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


def test_the_page_s_examples_run(toy_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parent.parent
    page = (root / "docs" / "integrations.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    saved: list[Any] = []
    monkeypatch.setattr(Image.Image, "save", lambda image, name: saved.append((name, image.size)))
    monkeypatch.chdir(root)
    found: dict[str, Any] = {}
    for block in blocks:
        exec(block.replace('"nano"', repr(str(toy_run))), found)
    assert found["image"].size == (16, 16) and saved == [("star.png", (16, 16))]


def test_diffusers_refuses_in_one_line(pipe: Any) -> None:
    for wrong in (
        {"output_type": "jpg"}, {"height": 16}, {"generator": seeded(1, 2)},
        {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]},
    ):  # fmt: skip
        with pytest.raises(InputError):
            pipe("red bar", **wrong)


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ({"negative_prompt": "blue"}, "takes no negative_prompt='blue'"),
        ({"eta": 0.5}, "takes no eta=0.5"),
        ({"height": 100000, "width": 100000}, "at most [0-9]+ pixels"),
        ({"prompt": None}, "prompt is None"),
        ({"prompt": []}, "empty list"),
        ({"prompt": ["a", 3]}, "prompt is"),
        ({"generator": 3}, "generator is 3"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"callback_on_step_end": lambda *_: 5}, "a callback returned int"),
        ({"callback_on_step_end": lambda *_: {"latents": torch.ones(1)}}, "returned dict"),
        ({"callback_on_step_end_tensor_inputs": None}, "a callback gets latents"),
    ],
)
def test_diffusers_arguments_are_refused_by_name(pipe: Any, how: Any, line: str) -> None:
    with pytest.raises(InputError, match=line):
        pipe(**{"prompt": "red bar", "num_inference_steps": 1, **how})


def test_diffusers_arguments_that_change_nothing_are_taken(toy_run: Path) -> None:
    from lavit.integrations.diffusers import LaVITPipeline

    usual: dict[str, Any] = {"safety_checker": None, "use_safetensors": True, "variant": None}
    pipe = LaVITPipeline.from_pretrained(toy_run, torch_dtype="bfloat16", **usual)
    assert pipe.lavit.dtype == torch.bfloat16 and pipe.runner.safety is False
    wrongs: list[dict[str, Any]] = [{"variant": "fp16"}, {"torch_dtype": torch.int8}]
    for wrong in (*wrongs, {"torch_dtype": "int3"}, {"dtype": torch.bfloat16}):
        with pytest.raises(InputError, match=r"variant|dtype"):
            LaVITPipeline.from_pretrained(toy_run, **wrong)


def test_diffusers_keeps_the_scheduler(toy_run: Path, tmp_path: Path) -> None:
    from diffusers import EulerDiscreteScheduler

    from lavit.integrations.diffusers import LaVITPipeline

    pipe = LaVITPipeline.from_pretrained(toy_run)
    usual = pipe.scheduler
    for scheduler in (EulerDiscreteScheduler.from_config(usual.config), usual):
        pipe.scheduler = scheduler
        pipe.save_pretrained(tmp_path / "saved")
        again = LaVITPipeline.from_pretrained(tmp_path / "saved")
        assert type(again.scheduler) is type(scheduler)
        images = []
        for one in (pipe, again):
            one.set_progress_bar_config(disable=True)
            how: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np"}
            images.append(one("red bar", generator=seeded(0)[0], **how).images)
        assert np.array_equal(*images)


def test_diffusers_callback_may_end_the_steps(pipe: Any) -> None:
    """What is painted then are the latents of that step, as in diffusers."""
    seen: list[Any] = []

    def stop(own: Any, step: int, time: torch.Tensor, kwargs: dict[str, torch.Tensor]) -> Any:
        seen.append(kwargs["latents"])
        own._interrupt = step == 1
        return kwargs

    how: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 2.0, "output_type": "pt"}
    found = pipe("red bar", generator=seeded(0)[0], callback_on_step_end=stop, **how).images
    assert len(seen) == 2 and pipe.interrupt
    assert (pipe.num_timesteps, pipe.guidance_scale) == (5, 2.0)
    assert torch.equal(found, (pipe.lavit.pixels.pictures(seen[-1]) + 1) / 2)
    pipe("red bar", num_inference_steps=1)
    assert not pipe.interrupt and pipe.num_timesteps == 1


@pytest.fixture(scope="module")
def any_to_any(toy_run: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    import lavit.integrations.transformers  # noqa: F401

    processor = AutoProcessor.from_pretrained(toy_run)
    return processor, AutoModelForMultimodalLM.from_pretrained(toy_run)


def image_of(any_to_any: tuple[Any, Any], seed: list[int], **inputs: Any) -> list[bytes]:
    processor, model = any_to_any
    ids = model.generate(**processor(**inputs), generation_mode="image", seed=seed)
    painted = model.decode_image_tokens(ids, seed=seed, steps=3)
    images = processor.post_process_multimodal_output(painted, generation_mode="image")
    return [image.tobytes() for image in images]


def test_any_to_any_draws_what_the_pipeline_draws(toy_run: Path, any_to_any: Any) -> None:
    pipe, seeds = lavit.load(toy_run), [3, 4]
    wanted = [image.tobytes() for image in pipe.draw(PROMPTS, seed=seeds, steps=3)]
    assert image_of(any_to_any, seeds, text=PROMPTS) == wanted
    assert image_of(any_to_any, [4], text=PROMPTS[1]) == wanted[1:]
    shown = toy_picture("red bar")
    edited = pipe.compose([shown, "blue"], seed=5, steps=3).tobytes()
    assert image_of(any_to_any, [5], text="blue", images=shown) == [edited]


def test_any_to_any_writes_what_the_pipeline_writes(toy_run: Path, any_to_any: Any) -> None:
    from lavit.generate.sampling import Sampling

    (processor, model), pipe = any_to_any, lavit.load(toy_run)
    images = [toy_picture("red bar"), toy_picture("blue dot")]
    texts = ["a <image> and <image> are", "a <image> of"]
    inputs = processor(text=texts, images=[*images, images[0]])
    assert inputs["attention_mask"].tolist()[1][0] == 0  # padded on the left
    ids = model.generate(**inputs, max_new_tokens=6)
    prompt = inputs["input_ids"].shape[1]
    said = processor.post_process_multimodal_output(ids[:, prompt:])
    pieces = [["a ", images[0], " and ", images[1], " are"], ["a ", images[0], " of"]]
    how = Sampling(temperature=0, max_tokens=6)
    assert [text.strip() for text in said] == pipe.complete(pieces, sampling=how)
    assert torch.equal(ids[:, :prompt], inputs["input_ids"])

    inputs = processor(images=images[0])
    drawn = {"do_sample": True, "temperature": 2.0, "top_k": 9, "max_new_tokens": 12, "seed": 7}
    how = Sampling(temperature=2.0, top_k=9, max_tokens=12)
    found = processor.batch_decode(model.generate(**inputs, **drawn))
    assert found[0].strip() == pipe.complete([images[0]], sampling=how, seed=7)

    talk = [{"role": "user", "content": [{"type": "image", "image": images[0]},
                                         {"type": "text", "text": "what is it?"}]}]  # fmt: skip
    inputs = processor.apply_chat_template(
        talk, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    (said,) = processor.batch_decode(model.generate(**inputs)[:, inputs["input_ids"].shape[1] :])
    assert said.strip() == pipe.chat(talk)["content"][0]["text"].strip()
    reply = pipe.chat(talk, out="image", seed=2, steps=3)
    inputs = processor.apply_chat_template(talk, generation_mode="image")
    ids = model.generate(**inputs, generation_mode="image", seed=2)
    (image,) = model.decode_image_tokens(ids, seed=2, steps=3)
    assert np.array_equal(image, np.asarray(reply["content"][0]["image"]))
    # before a picture the codes of the reply stand in the conversation, before words it is read
    more = [*talk, reply, {"role": "user", "content": "and now?"}]
    inputs = processor.apply_chat_template(more)
    (said,) = processor.batch_decode(model.generate(**inputs)[:, inputs["input_ids"].shape[1] :])
    assert len(inputs["pixel_values"]) == 2
    assert said.strip() == pipe.chat(more)["content"][0]["text"].strip()
    inputs = processor.apply_chat_template(more, generation_mode="image")
    assert len(inputs["pixel_values"]) == 1
    ids = model.generate(**inputs, generation_mode="image", seed=2)
    (image,) = model.decode_image_tokens(ids, seed=2, steps=3)
    reply = pipe.chat(more, out="image", seed=2, steps=3)
    assert np.array_equal(image, np.asarray(reply["content"][0]["image"]))


def test_any_to_any_is_saved_and_refuses_in_one_line(any_to_any: Any, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForMultimodalLM, GenerationConfig

    from lavit.storage import model_folder

    processor, model = any_to_any
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForMultimodalLM.from_pretrained(tmp_path / "again", dtype="auto")
    assert image_of((processor, again), [1], text="red") == image_of(any_to_any, [1], text="red")
    assert AutoConfig.from_pretrained(model_folder("nano")).model_type == "lavit"
    inputs = processor(text="red")
    for line, call in (
        ("2 pictures for 1 places", lambda: processor("a <image>", [toy_picture("red bar")] * 2)),
        ("padding='max_length' is not", lambda: processor("red", padding="max_length")),
        ("generation_mode is 'audio'", lambda: model.generate(**inputs, generation_mode="audio")),
        ("generate takes no num_return", lambda: model.generate(**inputs, num_return_sequences=2)),
        (
            "generate takes no max_length",
            lambda: model.generate(**inputs, generation_config=GenerationConfig(max_length=9)),
        ),
    ):
        with pytest.raises(InputError, match=line):
            call()


def test_any_to_any_looks_at_what_it_is_given(any_to_any: Any, tmp_path: Path, caplog: Any) -> None:
    processor, model = any_to_any
    known = model.lavit.language.vocabulary
    array = np.asarray(toy_picture("red bar").resize((16, 16)))
    inputs = dict(processor(text="<image>", images=array))
    ids, values = inputs["input_ids"], inputs["pixel_values"]
    assert model.generate(**inputs, max_new_tokens=2).shape == (1, ids.shape[1] + 2)
    open_end = torch.tensor([[1, known.image_start, 2]])
    turned = torch.tensor([[known.image_end, known.image_start]])
    nothing = torch.zeros_like(ids)
    for line, changes in (
        ("pixel_values are of 0 pictures, input_ids have places for 1", {"pixel_values": None}),
        ("pixel_values are of 2 pictures", {"pixel_values": torch.cat([values, values])}),
        ("not finite", {"pixel_values": values * float("nan")}),
        ("without the other", {"input_ids": open_end, "attention_mask": None}),
        ("without the other", {"input_ids": turned, "attention_mask": None}),
        (r"input_ids are \[2\]", {"input_ids": ids[0]}),
        (r"input_ids are \[0, 2\]", {"input_ids": ids[:0], "attention_mask": None}),
        (r"input_ids are \[1, 2\] of torch.float32", {"input_ids": ids.float()}),
        (r"attention_mask is \[1, 1\]", {"attention_mask": torch.ones(1, 1)}),
        ("row 0 has no token", {"attention_mask": nothing}),
        ("this model's are 0", {"input_ids": nothing - 7}),
        ("this model's are 0", {"input_ids": nothing + known.size}),
    ):
        with pytest.raises(ValueError, match=line):
            model.generate(**(inputs | changes), max_new_tokens=2)
    for line, wrong in (
        ("this model's are 0", [[known.size]]), ("this model's are 0", [[-1]]),
        ("row 1 holds no code", [[known.size - 1], [3]]), (r"image_tokens are \[0\]", []),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=line):
            model.decode_image_tokens(torch.tensor(wrong), steps=1)
    processor.save_pretrained(tmp_path)
    assert "model.save_pretrained writes" in caplog.text


def test_transformers_own_pipeline_takes_it(toy_run: Path, any_to_any: Any) -> None:
    pytest.importorskip("torchvision")  # which that pipeline wants
    from transformers import pipeline

    own, pipe = pipeline("any-to-any", model=str(toy_run)), lavit.load(toy_run)
    (found,) = own(text="red bar", generation_mode="image")
    assert found["generated_image"].tobytes() == pipe.draw("red bar").tobytes()
    (found,) = own(text="a", return_full_text=False, max_new_tokens=6)
    from lavit.generate.sampling import Sampling

    assert found["generated_text"] == pipe.complete(
        "a", sampling=Sampling(temperature=0, max_tokens=6)
    )


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


def test_vlmevalkit_asks_what_the_pipeline_answers(
    toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own dataset, prompts and loop, in an environment that has it."""
    pytest.importorskip("vlmeval")
    from vlmeval.dataset import build_dataset
    from vlmeval.inference import infer_data
    from vlmeval.smp import encode_image_file_to_base64, load

    from lavit.integrations.vlmeval import LaVITModel

    files = [str(tmp_path / f"{n}.png") for n in range(2)]
    toy_picture("red bar").save(files[0])
    toy_picture("blue dot").save(files[1])
    pipe, model = lavit.load(toy_run), LaVITModel(str(toy_run))
    asked = "is it red?"
    picture, words = {"type": "image", "value": files[0]}, {"type": "text", "value": asked}
    assert model.generate([files[0], asked]) == pipe.ask(files[0], asked)
    assert model.generate([picture, words], dataset="GQA_TestDev_Balanced") == pipe.ask(
        files[0], asked
    )
    assert model.generate([picture, words], dataset="COCO_VAL") == pipe.caption(files[0])
    both = [*files, "what are they?"]
    assert model.generate(both) == pipe.complete([*map(Path, files), both[-1]])
    talk = [{"role": "user", "content": [{"type": "image", "image": files[0]},
                                         {"type": "text", "text": asked}]}]  # fmt: skip
    said = pipe.chat(talk)["content"][0]["text"]
    assert LaVITModel(str(toy_run), layout="chat").generate([picture, words]) == said

    monkeypatch.setenv("LMUData", str(tmp_path))
    rows = ["index\timage\tquestion\tanswer"]
    rows += [f"{n}\t{encode_image_file_to_base64(f)}\t{asked}\tyes" for n, f in enumerate(files)]
    (tmp_path / "toyvqa.tsv").write_text("\n".join(rows) + "\n")
    out = tmp_path / "out.pkl"
    infer_data(model, "lavit", str(tmp_path), build_dataset("toyvqa"), str(out))
    assert load(str(out)) == dict(enumerate(pipe.ask(files, [asked] * 2)))

"""The memory plan of stage 2: exact bytes of weights, a total near the measured peak, the 7B."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoConfig, AutoModelForCausalLM, Blip2VisionModel

from conftest import toy_config, toy_training
from lavit.cli import main
from lavit.config import InputError, Mixture, ModelConfig, TrainConfig
from lavit.language.model import Language
from lavit.language.reader import MergerReader
from lavit.presets import lavit_7b
from lavit.sequence import IGNORE, Batch
from lavit.train import activations
from lavit.train import plan as plan_room
from lavit.train.activations import kept, language_bytes, numbers_of, tokenizer_bytes
from lavit.train.plan import CONTEXT, GIB, TEXT, plan_stage
from lavit.train.run import open_run, train_stages
from lavit.visual_tokenizer.attention import group_documents
from lavit.visual_tokenizer.tokenizer import VisualTokenizer, cosine_distance, merger_of

sys.path.insert(0, str(Path(__file__).parent.parent / "recipes"))
import lavit_7b as lavit_7b_recipe


@pytest.fixture(scope="module", autouse=True)
def read_once() -> Iterator[None]:
    """What a reader keeps is measured once for its sizes, not in each plan."""
    known: dict[str, np.ndarray] = {}

    def measured(*sizes: Any) -> np.ndarray:
        if repr(sizes) not in known:
            known[repr(sizes)] = activations.reader_bytes(*sizes)
        return known[repr(sizes)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_room, "reader_bytes", measured)
        yield


def sizes(rows: int, *, recompute: bool = False, wide: int = 8) -> tuple[ModelConfig, TrainConfig]:
    """The toy, wider and deeper, so that its step outweighs small change."""
    model, training = toy_config(), toy_training()
    shape = {
        **model.language.architecture,
        "hidden_size": 32 * wide,
        "intermediate_size": 64 * wide,
    }
    shape |= {"num_hidden_layers": 4, "vocab_size": 2000}
    model = replace(model, language=replace(model.language, architecture=shape))
    return model, replace(
        training, language=replace(training.language, rows=rows, recompute=recompute)
    )


def build(model: ModelConfig) -> Language:
    """The model of stage 2 in memory."""
    options, tokenizer = dict(model.language.architecture), model.visual_tokenizer
    lm = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(options.pop("model_type"), **options)
    )
    reader = MergerReader(merger_of(tokenizer), lm.config.hidden_size)
    return Language(lm, reader, codes=tokenizer.codes, end=0).train()


def step(
    language: Language,
    optimizer: torch.optim.Optimizer,
    rows: int,
    tokens: int,
    patches: int,
    dim: int,
) -> None:
    """Rows of images of five kept patches and a text of 32 tokens, as the plan takes them to be."""
    length = 5 + 2 + 32
    documents = torch.arange(tokens).expand(rows, -1) // length
    place = torch.arange(tokens).expand(rows, -1) % length
    reading = documents % 3 < 2  # 1.5 of 2.25 documents of the mixture read
    slots = (place >= 1) & (place <= 5) & reading & ((documents + 1) * length <= tokens)
    ids = torch.randint(language.vocabulary.text_size, (rows, tokens))
    images = int(slots.sum()) // 5
    labels = ids.clone()
    labels[:, -1] = IGNORE
    batch = Batch(ids, labels, place, documents, slots, torch.zeros(images, dtype=torch.long))
    keep = (torch.arange(patches) < 5).expand(images, -1)
    optimizer.zero_grad(set_to_none=True)
    (language(batch, torch.randn(images, patches, dim), keep).total / labels.numel()).backward()
    optimizer.step()


def test_parameters_are_counted_to_the_last_one() -> None:
    model, training = sizes(2)
    plan = plan_stage("language", model, training, precision="fp32")
    language = build(model)
    real = sum(parameter.numel() for parameter in language.parameters())
    assert sum(part.trains + part.frozen for part in plan.parts) == real
    assert plan.gib["weights"] * GIB == plan.gib["gradients"] * GIB == 4 * real
    assert plan.gib["moments"] * GIB == 8 * real


@pytest.mark.parametrize(
    ("rows", "wide", "apart"), [(16, 8, 0.25), pytest.param(24, 24, 0.1, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("recompute", [False, True])
def test_the_total_is_near_the_measured_peak(
    recompute: bool, rows: int, wide: int, apart: float
) -> None:
    """In fp32; small, and of a GB."""
    tokens = 128
    model, training = sizes(rows, recompute=recompute, wide=wide)
    training = replace(training, language=replace(training.language, tokens=tokens))
    plan = plan_stage("language", model, training, precision="fp32")
    language = build(model)
    language.recompute(recompute)
    optimizer = torch.optim.AdamW(language.parameters(), fused=True)
    size = (rows, tokens, model.visual_tokenizer.patches, model.visual_tokenizer.dim)
    step(language, optimizer, *size)  # makes the moments
    tracker = MemTracker()
    tracker.track_external(language, optimizer)
    with tracker:
        step(language, optimizer, *size)
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] / GIB
    assert plan.total - CONTEXT == pytest.approx(peak, rel=apart), plan.gib


@pytest.mark.parametrize("numbers", ["fp32", "autocast", "bf16"])
def test_a_language_model_of_any_width_keeps_what_small_ones_say(
    numbers: str,
) -> None:
    """LLaMA's width and two blocks of it, in tensors without values: some GB."""
    shape = lavit_7b().model.language.architecture | {"num_hidden_layers": 2, "vocab_size": 64}
    config = AutoConfig.for_model(**shape)
    document, documents = 64, 40
    base = lavit_7b().model.language
    place = torch.arange(documents * document)[None]
    groups = group_documents(place // document)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
        reader = MergerReader(merger_of(toy_config().visual_tokenizer), config.hidden_size)
        language = Language(lm, reader, codes=8, end=0).train()
        language.to(torch.bfloat16 if numbers == "bf16" else torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        language.to_empty(device="cpu")

        def count() -> np.ndarray:
            ids = torch.zeros(1, documents * document, dtype=torch.long)
            packed = {"documents": ids, "positions": place % document, "groups": groups}

            def forward() -> torch.Tensor:
                with numbers_of(numbers):
                    return language.hidden(language.embed(ids), **packed)

            return kept(forward, list(lm.model.layers))

        measured = count()
    size = 4 if numbers == "fp32" else 2  # bytes of a weight, which is kept too
    block = size * sum(p.numel() for p in lm.model.layers[0].parameters())
    measured = measured - block * np.array([2, 1])
    assert measured[0] > 1e9
    planned = documents * document * language_bytes(config, base, document, numbers)
    np.testing.assert_allclose(planned, measured, rtol=0.1)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("numbers", ["fp32", "autocast"])
def test_a_tokenizer_of_any_size_keeps_what_small_ones_say(dense: bool, numbers: str) -> None:
    """Wider and deeper than what is measured, and of more heads."""
    small = replace(toy_config().visual_tokenizer, heads=5)
    config = replace(small, dim=5 * 40, merger_depth=3, reconstructor_depth=4)
    planned = tokenizer_bytes(config, 5, dense=dense, numbers=numbers)
    own = activations.SMALL
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations, "_of_heads", lambda measure, heads, width: measure(heads, 40))
        measured = tokenizer_bytes(config, 5, dense=dense, numbers=numbers)
    assert own == activations.SMALL
    np.testing.assert_allclose(planned, measured, rtol=0.02)


def test_the_largest_unit_is_that_of_the_size_planned() -> None:
    """A merger's block in small copies, at the paper's channels a head one of the reconstructor."""
    preset = lavit_7b().model.visual_tokenizer
    config = replace(preset, heads=1, dim=88, merger_depth=1, reconstructor_depth=1, codes=8)
    planned = tokenizer_bytes(config, 85, dense=False, numbers="fp32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations, "_drawn_out", lambda measure, width: measure(88))
        measured = tokenizer_bytes(config, 85, dense=False, numbers="fp32")
    np.testing.assert_allclose(planned, measured, rtol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("dense", [True, False])
def test_stage_1_at_full_width_keeps_what_small_ones_say(dense: bool) -> None:
    """The 7B preset's width and two blocks each, of real tensors: a GB and more."""
    config = lavit_7b().model.visual_tokenizer
    config = replace(config, merger_depth=2, reconstructor_depth=2, codes=8)
    tokenizer, pictures, held = VisualTokenizer(config).train(), 6 if dense else 10, 85
    patches = torch.randn(pictures, config.patches, config.dim)
    noise = torch.full((pictures, config.patches, 2), -99.0)
    noise[:, :held, 0], noise[:, held:, 1] = 99.0, 99.0
    blocks = [*tokenizer.merger.blocks, *tokenizer.reconstructor.blocks]

    def forward() -> torch.Tensor:
        out = tokenizer(patches, noise, quantise=False, dense=dense)
        return cosine_distance(out.features, patches).mean()

    weights = [sum(p.nbytes for p in block.parameters()) for block in blocks]
    every = sum(p.nbytes for p in tokenizer.parameters())
    measured = kept(forward, blocks) - np.array([every, every - sum(weights) + max(weights)])
    planned = pictures * tokenizer_bytes(config, held, dense=dense, numbers="fp32")
    assert measured[0] > 1e9
    np.testing.assert_allclose(planned, measured, rtol=0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_layouts_divide_what_they_say(precision: Literal["fp32", "bf16"]) -> None:
    model, training = sizes(8)
    document = 5 + 2 + TEXT
    config = replace(
        training.language, tokens=2 * document, mixture=Mixture(reading=1.0, writing=1.0)
    )
    training = replace(training, language=config)
    alone, ddp, fsdp = (
        plan_stage("language", model, training, gpus=gpus, layout=layout, precision=precision)
        for gpus, layout in ((1, "single"), (4, "ddp"), (4, "fsdp2"))
    )
    for name in ("weights", "gradients", "moments"):
        assert ddp.gib[name] == alone.gib[name]
        assert fsdp.gib[name] == pytest.approx(alone.gib[name] / 4)
    assert (alone.rows, ddp.rows, fsdp.rows) == (8, 2, 2)
    assert "fsdp2 (--fsdp) on 4" in "".join(fsdp.lines())  # a training without it is DDP
    assert ddp.gib["activations"] == pytest.approx(alone.gib["activations"] / 4)
    # FSDP2 casts weights, autocast products alone: with bf16 weights norms keep bf16 too
    language = build(model).to(torch.bfloat16 if precision == "bf16" else torch.float32)

    def count(rows: int) -> float:
        """Of rows of two documents, one of which reads a picture."""
        tokens = torch.arange(config.tokens).expand(rows, -1)
        packed = {"documents": tokens // document, "positions": tokens % document}
        keep = (torch.arange(model.visual_tokenizer.patches) < 5).expand(rows, -1)
        patches = torch.randn(*keep.shape, model.visual_tokenizer.dim).to(language.rows.dtype)

        def forward() -> None:
            language.hidden(language.embed(torch.zeros_like(tokens)), **packed)
            language.read(patches, keep)

        return kept(forward, [])[0]

    measured = count(2 * fsdp.rows) - count(fsdp.rows)
    assert fsdp.gib["activations"] * GIB == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("stage", ["tokenizer", "pixels"])
def test_the_other_stages_of_the_paper_fit_too(stage: str) -> None:
    """On eight GPUs of 80 GB as the recipe divides them, encoding in line."""
    training = lavit_7b_recipe.settings()
    plan = plan_stage(stage, lavit_7b().model, training, gpus=8, memory=80 * 1e9 / GIB)
    assert plan.fits and plan.accumulate == getattr(training, stage).accumulate
    assert plan.gib["buckets of DDP"] == plan.gib["gradients"]


@pytest.mark.parametrize(("gpus", "memory", "lora"), [(8, 80.0, None), (1, 24.0, 16)])
def test_the_papers_model_fits_where_it_is_said_to(
    gpus: int, memory: float, lora: int | None
) -> None:
    preset = lavit_7b()
    plan = plan_stage(
        "language", preset.model, preset.training, gpus=gpus, memory=memory, lora=lora
    )
    base = sum(part.trains + part.frozen for part in plan.parts if part.name == "language model")
    assert base == 6_738_415_616  # LLaMA-7B with its own 32,000 ids
    assert plan.fits and plan.recompute
    assert plan.merger == (lora is None)


def test_a_plan_that_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="at least one GPU"):
        plan_stage("language", *sizes(2), gpus=0)
    with pytest.raises(InputError, match="cannot be shared by 7 GPUs"):
        plan_stage("language", *sizes(2), gpus=7)


def of_checkpoint(run: Path, stage: str) -> int:
    """Bytes of the last one."""
    last = max((run / "checkpoints" / stage).iterdir(), key=lambda at: int(at.name))
    return sum(path.stat().st_size for path in last.rglob("*"))


@pytest.mark.parametrize("stage", ["tokenizer", "language", "pixels"])
def test_a_checkpoint_takes_the_room_that_was_said(stage: str, toy_run: Path) -> None:
    """Headers, random states and the codebook's sums are the rest of a toy's."""
    said = plan_stage(stage, toy_config(), toy_training()).disk * GIB
    assert said == pytest.approx(of_checkpoint(toy_run, stage), rel=0, abs=45_000)


def test_muon_keeps_one_moment_of_a_matrix(toy_run: Path, toy_data: Path, tmp_path: Path) -> None:
    for part in ("vision", "visual_tokenizer"):
        shutil.copytree(toy_run / part, tmp_path / part)
    training = toy_training(1)
    training = replace(training, pixels=replace(training.pixels, optimizer="muon"))
    train_stages(open_run(tmp_path, toy_data, toy_config(), training), ("pixels",))
    less = [plan_stage("pixels", toy_config(), t).disk for t in (toy_training(1), training)]
    fewer = of_checkpoint(toy_run, "pixels") - of_checkpoint(tmp_path, "pixels")
    assert (less[0] - less[1]) * GIB == pytest.approx(fewer, rel=0.05)


def test_what_does_not_fit_says_what_helps() -> None:
    """Stage 2 can be shared or made smaller; a denoiser is whole on each GPU."""

    def said(stage: str, **how: Any) -> str:
        return plan_stage(stage, *sizes(2), memory=0.01, **how).lines()[-2]

    pixels, language, lora = said("pixels"), said("language"), said("language", lora=4)
    assert all("what helps: GPUs of 2 GiB" in line for line in (pixels, language, lora))
    assert ["--gpus" in line for line in (pixels, language, lora)] == [False, True, True]
    assert ["--lora" in line for line in (pixels, language, lora)] == [False, True, False]


def test_the_command_prints_parts_and_verdict(capsys: pytest.CaptureFixture) -> None:
    """Of all three stages."""
    main(["train", "all", "--plan", "--preset", "nano", "--memory", "24"])
    said = capsys.readouterr().out
    assert "visual rows" in said and "moments" in said and said.count("fits into 24") == 3
    assert all(name in said for name in ("selector", "reconstructor", "denoiser"))


def test_a_plan_says_its_number_type_and_is_of_the_one_asked_for(
    capsys: pytest.CaptureFixture,
) -> None:
    """Without bf16 nothing is cast, activations are larger, and a GPU has its context too."""
    words = ["train", "language", "--plan", "--preset", "nano", "--memory", "24"]
    said = {}
    for name, more in (("bf16", []), ("fp32", ["--precision", "fp32"])):
        main([*words, *more])
        said[name] = capsys.readouterr().out
        assert f"single on 1, {name}," in said[name] and "context" in said[name]
    assert "cast weights" in said["bf16"] and "cast weights" not in said["fp32"]
    model, training = sizes(4)
    whole = plan_stage("language", model, replace(training, precision="fp32"))
    assert whole.precision == "fp32"
    assert whole.gib["activations"] > plan_stage("language", model, training).gib["activations"]


def test_the_memory_table_of_the_published_model_is_counted() -> None:
    """docs/published.md: GiB of weights in use, each part counted on the meta device."""
    model = lavit_7b().model
    parts = plan_stage("language", model, lavit_7b().training).parts
    counts = {part.name: part.trains + part.frozen for part in parts}
    with torch.device("meta"):
        encoder = AutoConfig.for_model(**model.vision.architecture)
        exact = [Blip2VisionModel(encoder), VisualTokenizer(model.visual_tokenizer)]
        decoder = [
            UNet2DConditionModel(cross_attention_dim=model.pixels.condition_dim),
            AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                latent_channels=4,
            ),
        ]

    def count(modules: list[torch.nn.Module]) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    lm = counts.pop("language model")
    visual = counts.pop("visual rows")
    shape = model.language.architecture
    kept = 2 * (shape["vocab_size"] * shape["hidden_size"] - visual)  # rows and head, not rounded
    own = sum(counts.values()) + visual
    written = (Path(__file__).parent.parent / "docs" / "published.md").read_text()
    for name, each in {"bf16": 2, "int8": 1, "nf4": 0.5}.items():
        language = 2 * (own + kept) + each * (lm - kept)
        gib = [4 * count(exact), language, 2 * count(decoder)]
        cells = " | ".join(f"{value / GIB:.1f}" for value in [*gib, sum(gib)])
        assert f"| {name} | {cells} |" in written, cells

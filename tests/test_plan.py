"""The memory plan of stage 2: exact bytes of weights, a total near the measured peak, the 7B."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoConfig, Blip2VisionModel

from conftest import toy_config, toy_training
from lavit.cli import main
from lavit.config import InputError, ModelConfig, TrainConfig
from lavit.language.model import Language
from lavit.language.reader import MergerReader
from lavit.presets import lavit_7b
from lavit.sequence import IGNORE, Batch
from lavit.train.plan import GIB, plan_language
from lavit.visual_tokenizer.tokenizer import VisualTokenizer, merger_of


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
    from transformers import AutoConfig, AutoModelForCausalLM

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
    plan = plan_language(model, training, precision="fp32")
    language = build(model)
    real = sum(parameter.numel() for parameter in language.parameters())
    assert sum(part.trains + part.frozen for part in plan.parts) == real
    assert plan.gib["weights"] * GIB == plan.gib["gradients"] * GIB == 4 * real
    assert plan.gib["moments of AdamW"] * GIB == 8 * real


@pytest.mark.parametrize("recompute", [False, True])
def test_the_total_is_near_the_measured_peak(recompute: bool) -> None:
    rows, tokens = 16, 128
    model, training = sizes(rows, recompute=recompute)
    training = replace(training, language=replace(training.language, tokens=tokens))
    plan = plan_language(model, training, precision="fp32")
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
    assert plan.total == pytest.approx(peak, rel=0.25), plan.gib


def test_layouts_divide_what_they_say() -> None:
    model, training = sizes(8)
    alone, ddp, fsdp = (
        plan_language(model, training, gpus=gpus, layout=layout)
        for gpus, layout in ((1, "single"), (4, "ddp"), (4, "fsdp2"))
    )
    for name in ("weights", "gradients", "moments of AdamW"):
        assert ddp.gib[name] == alone.gib[name]
        assert fsdp.gib[name] == pytest.approx(alone.gib[name] / 4)
    assert (alone.rows, ddp.rows, fsdp.rows) == (8, 2, 2)
    assert fsdp.gib["activations"] == pytest.approx(alone.gib["activations"] / 4)


@pytest.mark.parametrize(("gpus", "memory", "lora"), [(8, 80.0, None), (1, 24.0, 16)])
def test_the_papers_model_fits_where_it_is_said_to(
    gpus: int, memory: float, lora: int | None
) -> None:
    preset = lavit_7b()
    plan = plan_language(preset.model, preset.training, gpus=gpus, memory=memory, lora=lora)
    base = sum(part.trains + part.frozen for part in plan.parts if part.name == "language model")
    assert base == 6_738_415_616  # LLaMA-7B with its own 32,000 ids
    assert plan.fits and plan.recompute
    assert plan.merger == (lora is None)


def test_a_plan_that_cannot_be_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(InputError, match="at least one GPU"):
        plan_language(*sizes(2), gpus=0)
    with pytest.raises(SystemExit) as stop:
        main(["train", "pixels", "--plan"])
    assert stop.value.code == 2 and "language --plan" in capsys.readouterr().err


def test_the_command_prints_parts_and_verdict(capsys: pytest.CaptureFixture) -> None:
    main(["train", "language", "--plan", "--preset", "nano", "--memory", "24"])
    said = capsys.readouterr().out
    assert "visual rows" in said and "moments of AdamW" in said and "fits into 24" in said


def test_the_memory_table_of_the_published_model_is_counted() -> None:
    """docs/published.md: GiB of weights in use, each part counted on the meta device."""
    model = lavit_7b().model
    parts = plan_language(model, lavit_7b().training).parts
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

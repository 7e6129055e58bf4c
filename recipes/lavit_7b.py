"""LaVIT 7B: the paper's model (arXiv 2309.04669), stages 1 to 3, on GPUs.

Command   torchrun --nproc-per-node 8 recipes/lavit_7b.py --stage tokenizer --out RUN
              --pairs PAIRS --text TEXT --vision EVA --language LLAMA --pixels SD
          then the same with --stage language (FSDP2) and --stage pixels (DDP); killed, each goes on
Rehearsal python recipes/lavit_7b.py --rehearse OUT: all of it in small on two processes of a CPU,
          in some minutes (recipes/rehearsal.py)
Start     folders of your own, whose licences bind: EVA-CLIP ViT-g/14 as eva_vitg_psz14.bin in its
          published names or as a folder of transformers, LLaMA-7B of transformers, Stable
          Diffusion 1.5 of diffusers. Sizes are read from them
Data      PAIRS, pictures with texts, and TEXT alone: tars, parquet, hub names. Text is drawn so
          that 2 : 1 of the tokens are text, by the lengths of each source's first 10,000 texts
Memory    lavit train STAGE --preset lavit_7b --stream --plan --gpus 8 --memory 80
          (and language --lora 16 --gpus 1 --memory 24, without --stream: the encoder is not there)
Cost      stage 2 alone is 30,000 steps of 2,048 rows of 2,048 tokens: 126 G tokens, 5e21 FLOPs,
          10,500 A100-hours at 45 % MFU, a third more with recomputing: two months of eight. It was
          not run here; what the paper's run took is not known to us. A checkpoint of stage 2 is
          81 GiB (weights and moments in fp32), the last three are kept, one comes every 50 steps
Score     the paper's: COCO captions 134.0 CIDEr, NoCaps 114.2, Flickr30k 83.0, VQAv2 66.0, OK-VQA
          54.6, GQA 46.8, VizWiz 38.5, MS-COCO FID 7.4, zero-shot (LLaMA-1). Not reproduced by us

What each number rests on: P the paper, A its authors' answers, V the same group's Video-LaVIT,
ours where nobody says.

    stage 1   50,000 steps of 2,048 pictures                        P
              halves a and b, rate 1e-4, weight decay 1e-3          ours, V
              ρ = 1/3, λ = 2                                        P
              decay of the codes 0.995                              V
    stage 2   packed to 2,048 tokens                                P
              30,000 steps of 2,048 rows                            V
              rates 1e-5 for the LM, 1e-4 for what is visual        A (order of size)
              weight decay 0.1, betas 0.9 and 0.95, clip 1, bf16    V
              2,000 steps of warm-up                                V
              text : pairs about 2 : 1 in tokens, pairs both ways  A
              10 % of drawings lose their prompt                    ours
    stage 3   20,000 steps from Stable Diffusion 1.5, ε             P
              rate 1e-4, 10 % lose their condition                  ours

One pass does not hold 256 rows or pictures on a GPU: `accumulate` and `recompute` below are no
more than the plan finds for 8 x 80 GB. All stages read streams; nothing of their data is kept.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import tyro
from transformers import AutoTokenizer

from lavit.cli import exits
from lavit.config import (
    InputError,
    Mixture,
    ModelConfig,
    PixelsConfig,
    TrainConfig,
    VisionConfig,
    read_json,
)
from lavit.convert import convert_encoder, sizes
from lavit.convert.tensors import read_pickle
from lavit.data.corpus import parse_mixture
from lavit.data.sources import stream_source
from lavit.data.stream import stream_texts
from lavit.files import replacing
from lavit.presets import lavit_7b
from lavit.train.run import open_run, train_stages
from lavit.vision.encoder import encoder_at

TEXT_TO_PAIRS = 2.0  # tokens of text for each of pairs


def settings(*, small: bool = False) -> TrainConfig:
    """The preset's training, divided for 8 GPUs of 80 GB; `small`: its rehearsal on two CPUs."""
    training = lavit_7b().training
    tokenizer = replace(training.tokenizer, accumulate=8, recompute=True, stream=True)
    pixels = replace(training.pixels, accumulate=32, recompute=True, stream=True)
    language = replace(
        training.language,
        stream=True,
        warmup=2_000 / training.language.steps,
        mixture=Mixture(reading=1.0, writing=1.0),
        accumulate=8,
        recompute=True,
    )
    if small:
        few: dict[str, Any] = {"accumulate": 2, "warmup": 0.1}
        pictures = {**few, "batch": 8}
        tokenizer = replace(tokenizer, steps_a=6, steps_b=6, k_means_vectors=200, **pictures)
        language = replace(language, steps=10, rows=8, tokens=128, **few)
        pixels = replace(pixels, steps=10, **pictures)
    stages = {"tokenizer": tokenizer, "language": language, "pixels": pixels}
    loop: dict[str, Any] = {"checkpoint_every": 50, "precision": "bf16"}
    if small:
        loop = {"checkpoint_every": 2, "precision": "fp32", "log_every": 1}
    return replace(training, **stages, keep_last=3, **loop)


def encoder_of(vision: Path) -> VisionConfig:
    """The encoder's sizes, of a folder of transformers or of a file in the published names."""
    if vision.is_file():
        tensors = read_pickle(vision)
        try:
            return replace(sizes.vision_config(tensors), architecture={})
        except (KeyError, ValueError) as error:
            raise InputError(f"{vision} is no encoder in EVA's published names: {error}") from error
    found, preset = encoder_at(str(vision)), lavit_7b().model.vision
    sees = {name: getattr(found, name) for name in ("image_size", "grid", "dim", "mean", "std")}
    return replace(preset, architecture={}, **sees)


def decoder_of(pixels: Path, preset: PixelsConfig) -> PixelsConfig:
    """The decoder's sizes, of a diffusers folder whose UNet predicts the noise (Eq. 5)."""
    unet, vae, text = (
        read_json(pixels / part / "config.json") for part in ("unet", "vae", "text_encoder")
    )
    scheduler = pixels / "scheduler" / "scheduler_config.json"
    said = read_json(scheduler) if scheduler.exists() else {}
    if (predicts := said.get("prediction_type", "epsilon")) != "epsilon":
        raise InputError(f"{pixels} predicts {predicts}, expected epsilon: give another --pixels")
    try:
        return replace(
            preset,
            size=unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1),
            condition_dim=unet["cross_attention_dim"],
            null_tokens=text["max_position_embeddings"],
        )
    except KeyError as error:
        raise InputError(f"{pixels} is no Stable Diffusion: it does not say {error}") from error


def model_of(vision: Path, pixels: Path, *, small: bool = False) -> ModelConfig:
    """The preset around the parts that are given."""
    preset, encoder = lavit_7b().model, encoder_of(vision)
    tokenizer = replace(preset.visual_tokenizer, dim=encoder.dim, patches=encoder.patches)
    tied = {"features_dim": encoder.dim, "patches": encoder.patches}
    if small:
        tokenizer = replace(tokenizer, merger_depth=2, reconstructor_depth=2, codes=64)
    decoder = decoder_of(pixels, replace(preset.pixels, **tied))
    language = replace(preset.language, architecture={})
    parts = {"vision": encoder, "visual_tokenizer": tokenizer, "pixels": decoder}
    return replace(preset, **parts, language=language)


def mixed(pairs: str, text: str, language: Path, config: ModelConfig, rate: float) -> str:
    """All sources, those of text weighed so that their tokens are `TEXT_TO_PAIRS` times those of
    the pairs; weights that are given say what part of either a source is.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(language)
    except Exception as error:  # folders fail in ways of their own
        said = " ".join(str(error).split())[:200]
        raise InputError(f"no tokenizer of a language model at {language}: {said}") from error

    def tokens(data: str, option: str, picture: float) -> float:
        """Tokens of a draw from sources, times the sum of their weights."""
        found = 0.0
        for part in stream_texts(data).parts:
            if (stream_source(part.name).image is not None) != (picture > 0):
                holds = "no pictures" if picture else "pictures"
                raise InputError(f"{part.name!r} of {option} has {holds}: PAIRS and TEXT swapped?")
            if not part.texts:
                raise InputError(f"{part.name!r} has no texts among its first records")
            ids = tokenizer(list(part.texts), add_special_tokens=False).input_ids
            found += part.weight * (sum(map(len, ids)) / len(ids) + 1 + picture)  # with its end
        return found

    picture = rate * config.vision.patches + 2  # with image start and end
    share = TEXT_TO_PAIRS * tokens(pairs, "--pairs", picture) / tokens(text, "--text", 0.0)
    weighed = [
        f"{name}:{factor * weight:.4g}"
        for data, factor in ((pairs, 1.0), (text, share))
        for name, weight in parse_mixture(data)
    ]
    return ",".join(weighed)


def place(run: Path, vision: Path, language: Path, pixels: Path) -> None:
    """Put the parts that training begins with where a run looks for them, once.

    Raises `InputError` where the run has begun with another of them.
    """
    run.mkdir(parents=True, exist_ok=True)
    for name, given in (("base", language), ("decoder", pixels), ("encoder", vision)):
        link, given = run / name, given.resolve()
        if not link.exists() and not link.is_symlink():
            link.symlink_to(given, target_is_directory=True)
        if link.resolve() != given:
            said = f"{run} has begun with {link.resolve()}, not {given}"
            raise InputError(f"{said}: give that one, or another --out")
    if not (run / "vision").exists():
        if vision.is_file():
            convert_encoder(vision, run / "vision")
        else:
            with replacing(run / "vision") as new:
                shutil.copytree(vision, new, dirs_exist_ok=True)


def main(
    stage: Literal["tokenizer", "language", "pixels"] = "tokenizer",
    out: Path | None = None,
    pairs: str = "",
    text: str = "",
    vision: Path | None = None,
    language: Path | None = None,
    pixels: Path | None = None,
    small: bool = False,
    rehearse: Path | None = None,
) -> None:
    """Train one stage on this process's GPU, or rehearse all of them."""
    if rehearse is not None:
        from rehearsal import rehearsal

        return rehearsal(rehearse)
    if not (out and pairs and text and vision and language and pixels):
        raise InputError("a training needs --out, --pairs, --text, --vision, --language, --pixels")
    training, config = settings(small=small), model_of(vision, pixels, small=small)
    data = mixed(pairs, text, language, config, training.tokenizer.rate)
    run = open_run(out, data, config, training, fsdp=stage == "language", trackers=())
    with run.accelerator.main_process_first():
        place(out, vision, language, pixels)
    train_stages(run, (stage,))
    return None


if __name__ == "__main__":
    with exits():
        tyro.cli(main)

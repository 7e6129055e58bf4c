"""LaVIT 7B: the paper's model (arXiv 2309.04669), stages 1 to 3, on GPUs.

Command   torchrun --nproc-per-node 8 recipes/lavit_7b.py DATA RUN tokenizer          (DDP)
          torchrun --nproc-per-node 8 recipes/lavit_7b.py DATA RUN language           (FSDP2)
          torchrun --nproc-per-node 8 recipes/lavit_7b.py DATA RUN pixels             (DDP)
Start     folders of your own, whose licences bind: RUN/vision (EVA-CLIP ViT-g/14) and RUN/base
          (LLaMA-7B) of transformers, RUN/decoder (Stable Diffusion 1.5) of diffusers
Data      PAIRS,TEXT:0.12, pictures with texts and text alone. A document of text fills a row and
          one of a pair has some 120 tokens, so 0.12 of them to 1 is 2 : 1 in tokens
Memory    lavit train language --preset lavit_7b --plan --gpus 8 --memory 80
          (and --lora 16 --gpus 1 --memory 24)
Cost      stage 2 alone is 30,000 steps of 2,048 rows of 2,048 tokens: 126 G tokens, 5e21 FLOPs,
          10,500 A100-hours at 45 % MFU, a third more with recomputing. It was not run here; what
          the paper's run took is not known to us
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
              text : pairs about 2 : 1 (DATA), pairs both ways      A
              10 % of drawings lose their prompt                    ours
    stage 3   20,000 steps from Stable Diffusion 1.5, ε             P
              rate 1e-4, 10 % lose their condition                  ours

One pass does not hold 256 rows or pictures on a GPU: `accumulate` and `recompute` below are what
the plan finds for stage 2 on 8 × 80 GB, and for stages 1 and 3 estimates. All stages read DATA as a
stream (tars, parquet, hub names); nothing of it is kept.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from lavit.config import Mixture, TrainConfig
from lavit.presets import lavit_7b
from lavit.train.run import open_run, train_stages


def settings() -> TrainConfig:
    """The preset's training, divided for 8 GPUs of 80 GB."""
    training = lavit_7b().training
    tokenizer = replace(training.tokenizer, accumulate=4, recompute=True, stream=True)
    pixels = replace(training.pixels, accumulate=32, recompute=True, stream=True)
    language = replace(
        training.language,
        stream=True,
        warmup=2_000 / training.language.steps,
        mixture=Mixture(reading=1.0, writing=1.0),
        accumulate=8,
        recompute=True,
    )
    stages = {"tokenizer": tokenizer, "language": language, "pixels": pixels}
    return replace(training, **stages, checkpoint_every=500, keep_last=3, precision="bf16")


def main(data: str, out: str, stage: str) -> None:
    """Train one stage on this process's GPU."""
    run = open_run(Path(out), data, lavit_7b().model, settings(), fsdp=stage == "language")
    train_stages(run, (stage,))


if __name__ == "__main__":
    main(*sys.argv[1:])

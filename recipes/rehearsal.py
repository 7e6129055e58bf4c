"""The rehearsal of `lavit_7b`: every step of it in small, from folders in the published names.

Makes an EVA file, a LLaMA folder, a Stable Diffusion folder and streams of pairs and text; trains
the three stages on two processes, once without a stop and once with each stage killed (SIGKILL)
behind its first checkpoint and started again; compares the losses; evaluates, exports and draws.

Command   python recipes/lavit_7b.py --rehearse OUT
Cost      three minutes of CPU time and more, most of it for starting processes
Expected  losses of both runs are equal, and every command ends with 0
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pyarrow
import pyarrow.parquet
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image, ImageDraw
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lavit.config import InputError, read_json, write_json
from lavit.convert import names
from lavit.train.metrics import read_lines
from lavit.train.settings import STAGES

RECIPE = Path(__file__).with_name("lavit_7b.py")
DIM, GRID, PATCH, DEPTH = 64, 4, 14, 2  # of the encoder; 16 heads, as the published one
SHARDS, PAIRS = 4, 24  # tars, and pairs in each
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 60, 220)}
SHAPES = ("square", "disc", "bar")
WORDS = "a the is of and on with one two picture word model reads writes what it sees here"
NULL = 8  # tokens of the decoder's null text
console = Console(width=100)


def eva(path: Path) -> None:
    """The encoder under its published names, in half precision."""
    generator, hidden = torch.Generator().manual_seed(1), int(4.3637 * DIM)
    sizes = {
        "cls_token": (1, 1, DIM),
        "pos_embed": (1, GRID**2 + 1, DIM),
        "patch_embed.proj.weight": (DIM, 3, PATCH, PATCH),
        "attn.qkv.weight": (3 * DIM, DIM),
        "attn.proj.weight": (DIM, DIM),
        "mlp.fc1.weight": (hidden, DIM),
        "mlp.fc1.bias": (hidden,),
        "mlp.fc2.weight": (DIM, hidden),
    }
    tensors: dict[str, Tensor] = {}
    for name in sorted(names.published(names.vision(DEPTH))):
        end = name.split(".", 2)[2] if name.startswith("blocks.") else name
        tensor = 0.1 * torch.randn(sizes.get(end, (DIM,)), generator=generator)
        is_norm = "norm" in end and end.endswith("weight")
        tensors[name] = (tensor + 1 if is_norm else tensor).half()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, path)


def llama(folder: Path) -> None:
    """LLaMA in half precision, with a tokenizer of whole words."""
    torch.manual_seed(2)
    words = ["<unk>", "<s>", "</s>", ".", *COLOURS, *SHAPES, *WORDS.split()]
    words = list(dict.fromkeys(words))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(vocab_size=len(words), num_attention_heads=4, **sizes, **ends)
    LlamaForCausalLM(config).half().save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def stable_diffusion(folder: Path) -> None:
    """Stable Diffusion 1.5's blocks with few channels, at 64 px."""
    torch.manual_seed(3)
    down = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32, 32),
        down_block_types=down,
        up_block_types=up,
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    ).save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=8,
    ).save_pretrained(folder / "vae")
    sizes = {"vocab_size": 3, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPTextConfig(**sizes, **ids, num_attention_heads=2, max_position_embeddings=NULL)
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")
    said = {"tokenizer_class": "CLIPTokenizer", "model_max_length": NULL}
    write_json(
        folder / "tokenizer" / "tokenizer_config.json", said | {"pad_token": "<|endoftext|>"}
    )
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}
    write_json(folder / "tokenizer" / "vocab.json", vocabulary)
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")


def picture(number: int) -> tuple[str, bytes]:
    """A coloured shape at a place of its own, and its words."""
    colour, shape = list(COLOURS)[number % 3], SHAPES[number // 3 % 3]
    image = Image.new("RGB", (72, 72), "white")
    left, top = 4 + 5 * (number % 7), 4 + 5 * (number % 6)
    low = 12 if shape == "bar" else 28
    draw = ImageDraw.Draw(image)
    paint = draw.ellipse if shape == "disc" else draw.rectangle
    paint((left, top, left + 28, top + low), fill=COLOURS[colour])
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return f"a {colour} {shape}", stream.getvalue()


def data(folder: Path) -> None:
    """Pairs as WebDataset tars, texts as parquet."""
    (folder / "pairs").mkdir(parents=True)
    (folder / "text").mkdir()
    generator = torch.Generator().manual_seed(4)
    words = WORDS.split()
    for shard in range(SHARDS):
        with tarfile.open(folder / "pairs" / f"train-{shard}.tar", "w") as tar:
            for number in range(shard * PAIRS, (shard + 1) * PAIRS):
                said, png = picture(number)
                for suffix, content in (("png", png), ("txt", said.encode())):
                    member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        drawn = torch.randint(len(words), (PAIRS, 60), generator=generator).tolist()
        texts = pyarrow.table({"text": [" ".join(words[i] for i in text) for text in drawn]})
        pyarrow.parquet.write_table(texts, folder / "text" / f"train-{shard}.parquet")


def environment() -> dict[str, str]:
    """Two processes share two cores."""
    source = str(RECIPE.parents[1] / "src")
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def training(out: Path, run: Path, stage: str) -> list[str]:
    """The command of a stage."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    given = {"pairs": "data/pairs", "text": "data/text", "vision": "eva/eva_vitg_psz14.bin"}
    given |= {"language": "llama", "pixels": "sd"}
    options = [word for name, path in given.items() for word in (f"--{name}", str(out / path))]
    command = [*torchrun, "--nproc-per-node", "2", str(RECIPE), "--small", "--stage", stage]
    return [*command, "--out", str(run), *options]


@contextlib.contextmanager
def started(command: Sequence[str], log: int) -> Iterator[subprocess.Popen[str]]:
    """A command that ends here with all its processes; torchrun's have sessions of their own."""
    with subprocess.Popen(command, stdout=log, stderr=log, text=True, env=environment()) as job:
        try:
            yield job
        finally:
            if job.poll() is None:
                first = psutil.Process(job.pid)
                for process in (first, *first.children(recursive=True)):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()


def finish(command: Sequence[str]) -> str:
    """Output of a command; raises where it does not end with 0."""
    with started(command, subprocess.PIPE) as job:
        said, complaint = job.communicate()
    if job.returncode:
        raise InputError(f"{' '.join(command)}: {complaint.strip()[:3000]}")
    return said


def kill_behind_a_checkpoint(command: Sequence[str], checkpoints: Path) -> int:
    """Start a stage and kill all its processes behind its first checkpoint; returns its step."""
    with started(command, subprocess.DEVNULL) as job:
        while not (found := sorted(checkpoints.glob("[0-9]*/step.json"))):
            if job.poll() is not None:
                raise InputError(f"{' '.join(command)} ended with {job.returncode}")
            time.sleep(0.01)
    return int(found[0].parent.name)


def losses(run: Path, stage: str) -> list[float]:
    """Losses of each step of a stage."""
    return [line["loss"] for line in read_lines(run / "metrics.jsonl") if line["stage"] == stage]


def rehearsal(out: Path) -> None:
    """Make everything, train twice, compare, use."""
    if out.exists():
        raise InputError(f"{out} exists already: give another folder")
    eva(out / "eva" / "eva_vitg_psz14.bin")
    llama(out / "llama")
    stable_diffusion(out / "sd")
    data(out / "data")
    whole, stopped = out / "whole", out / "stopped"
    for stage in STAGES:
        finish(training(out, whole, stage))
        command = training(out, stopped, stage)
        step = kill_behind_a_checkpoint(command, stopped / "checkpoints" / stage)
        finish(command)
        ours, theirs = losses(whole, stage), losses(stopped, stage)
        same = "equal" if ours == theirs else "NOT EQUAL"
        console.print(
            f"{stage}: killed at step {step} of {len(ours)}, losses {same}: {ours[-1]:.6f}"
        )
        if ours != theirs:
            raise InputError(f"{stage}: {ours} without a stop, {theirs} with one")
    lavit, figures = [sys.executable, "-m", "lavit"], out / "figures.json"
    finish(
        [*lavit, "eval", str(stopped), "--data", str(out / "data/pairs"), "--json", str(figures)]
    )
    found = read_json(figures)["figures"]
    values = {name: one["value"] for name, one in found.items() if one["value"] is not None}
    console.print("evaluated:", {name: round(value, 3) for name, value in values.items()})
    finish([*lavit, "export", str(stopped), "--out", str(out / "exported")])
    lm = AutoModelForCausalLM.from_pretrained(out / "exported")
    console.print(f"exported: {type(lm).__name__} of {lm.config.vocab_size} joint ids")
    drawing = out / "drawn.png"
    words = ["draw", "a red square", "--model", str(stopped), "--no-safety", "--out", str(drawing)]
    finish([*lavit, *words])
    size = Image.open(drawing).size
    (out / "picture.png").write_bytes(picture(0)[1])
    said = finish([*lavit, "caption", str(out / "picture.png"), "--model", str(stopped)]).strip()
    console.print(f"drawn: {size[0]}x{size[1]}; captioned: {said!r}")

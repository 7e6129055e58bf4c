"""Work of one of two gloo ranks, for tests of the codebook and stage 1."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from torch import Tensor

from lavit.visual_tokenizer.codebook import Codebook

SIZES = (32, 64, 8)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def new_codebook() -> Codebook:
    torch.manual_seed(0)
    return Codebook(*SIZES)


def batches_of(rank: int | None) -> list[Tensor]:
    """Batches of one rank of two, with different numbers of rows; None: both, in rank order."""
    found = []
    for step in range(6):
        narrow = torch.randn(90, SIZES[2], generator=seeded(step))
        narrow[:, : step % 4 + 1] = 0.05  # so that some codes fall out of use
        parts = F.normalize(narrow, dim=-1).split([50, 40])
        found.append(torch.cat(parts) if rank is None else parts[rank])
    return found


def train_codes(codebook: Codebook, batches: list[Tensor]) -> list[int]:
    """k-means on the first batch, then updates with revival; how many each update revived."""
    codebook.k_means(batches[0], rounds=3, generator=seeded(1))
    generator = seeded(2)
    return [
        codebook.update(b, codebook.index(b), decay=0.8, patience=2, generator=generator)
        for b in batches
    ]


def run_rank(rank: int, folder: str) -> None:
    """Train the codes on this rank's share, save what came out."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    codebook = new_codebook()
    revived = train_codes(codebook, batches_of(rank))
    torch.save({"state": codebook.state_dict(), "revived": revived}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def train_stage(folder: Path, *, cpu: bool = True, accumulate: int = 1) -> dict[str, object]:
    """Stage 1 through both phases by the loop, on the environment's ranks; losses and codebook."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    from lavit.config import TokenizerConfig, TokenizerTraining
    from lavit.data.features import Features
    from lavit.train.feeds import CorpusFeatures
    from lavit.train.loop import Report, train
    from lavit.train.tokenizer import TokenizerStage
    from lavit.visual_tokenizer.tokenizer import VisualTokenizer

    # without broadcasts of the codebook at every forward: ranks must agree by themselves
    alone = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    accelerator = Accelerator(cpu=cpu, kwargs_handlers=[alone])
    features = np.random.default_rng(0).standard_normal((24, 16, 32)).astype(np.float16)
    sizes = {
        "dim": 32,
        "patches": 16,
        "heads": 2,
        "merger_depth": 1,
        "reconstructor_depth": 1,
        "mlp_ratio": 2.0,
    }
    torch.manual_seed(0)
    tokenizer = VisualTokenizer(TokenizerConfig(**sizes, codes=32, code_dim=8))
    config = TokenizerTraining(
        steps_a=4,
        steps_b=5,
        batch=8,
        accumulate=accumulate,
        learning_rate=1e-3,
        k_means=3,
        k_means_vectors=150,
        patience=2,
    )
    feed = CorpusFeatures(Features(features), batch=config.batch, seed=1)
    stage = TokenizerStage(tokenizer, feed, config, seed=1)
    reports: list[Report] = []
    watch = {"log_every": 1, "watch": reports.append}
    train(
        stage, folder, accelerator=accelerator, clip=1.0, warmup=0.05, checkpoint_every=100, **watch
    )
    return {
        "codebook": tokenizer.codebook.state_dict(),
        "weights": {name: p.detach() for name, p in tokenizer.named_parameters()},
        "figures": [report.figures for report in reports],
        "ranks": accelerator.num_processes,
    }


def free_port() -> int:
    """A port where ranks can meet."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def join_ranks(rank: int, port: int) -> None:
    """Be one of two ranks, as torchrun would say."""
    torch.set_num_threads(1)
    meeting = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "LOCAL_WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "ACCELERATE_USE_CPU": "true",
    }
    os.environ |= {name: str(value) for name, value in meeting.items()}
    AcceleratorState._reset_state(reset_partial_state=True)  # a fork begins with its parent's


def run_stage(rank: int, folder: str, port: int) -> None:
    """Train stage 1 as one of two ranks, save what came out."""
    join_ranks(rank, port)
    torch.save(train_stage(Path(folder) / "run"), f"{folder}/{rank}.pt")
    dist.destroy_process_group()

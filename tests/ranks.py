"""Work of one of two gloo ranks, for the test of the codebook; apart, so that ranks start fast."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lavit.modules.codebook import Codebook

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
    return [codebook.update(b, codebook.index(b), decay=0.8, patience=2, generator=generator) for b in batches]


def run_rank(rank: int, folder: str) -> None:
    """Train the codes on this rank's share, save what came out."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    codebook = new_codebook()
    revived = train_codes(codebook, batches_of(rank))
    torch.save({"state": codebook.state_dict(), "revived": revived}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()

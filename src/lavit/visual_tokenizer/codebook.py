"""Codebook: merged rows become discrete codes (paper Sec. 3.1, Eq. 3).

    row ─ Linear ─ tanh ─ Linear ─ z/‖z‖ ─ nearest of K unit vectors ─ code

Codes move by exponential averages of the vectors assigned to them, not by gradients; k-means on
gathered vectors starts them. Dead codes are revived from the current batch and their sums are reset
with them (else the old sums overwrite the revived code at the next update). All statistics are
fp32, count kept tokens only, and are summed over ranks. Decay is not published; 0.995 is the
sibling's (Video-LaVIT). Codes are renormalised after each update.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lavit.visual_tokenizer.layers import initialise

Vectors = Float[Tensor, "total code_dim"]
CHUNK = 8192  # vectors that k-means compares with all codes at a time


@dataclass(frozen=True)
class Quantised:
    """After the look-up: straight-through `vectors`, their `codes`, the commitment loss."""

    vectors: Vectors
    codes: Int[Tensor, "total"]
    commitment: Float[Tensor, ""]


def gather_rows(rows: Float[Tensor, "total dim"]) -> Float[Tensor, "all_rows dim"]:
    """Rows of every rank, in rank order; ranks may hold different numbers of rows."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    padded = F.pad(rows, (0, 0, 0, int(max(counts)) - len(rows)))
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded.contiguous())
    return torch.cat([part[: int(n)] for part, n in zip(gathered, counts, strict=True)])


def _nearest(
    vectors: Vectors, centres: Float[Tensor, "codes code_dim"]
) -> tuple[Float[Tensor, "total"], Int[Tensor, "total"]]:
    """Cosine of each vector and its nearest centre, and that one's number."""
    parts = [(part @ centres.T).max(-1) for part in vectors.split(CHUNK)]
    cosines, numbers = zip(*parts, strict=True)
    return torch.cat(cosines), torch.cat(numbers)


class Codebook(nn.Module):
    """K unit vectors of `code_dim`, and the projection that leads to them."""

    vectors: Tensor
    mass: Tensor
    sums: Tensor
    idle: Tensor

    def __init__(self, dim: int, codes: int, code_dim: int) -> None:
        super().__init__()
        self.to_code = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, code_dim))
        initialise(self)
        self.register_buffer("vectors", F.normalize(torch.randn(codes, code_dim), dim=-1))
        # averages over steps of the number and the sum of assigned vectors; steps without any
        self.register_buffer("mass", torch.ones(codes))
        self.register_buffer("sums", self.vectors.clone())
        self.register_buffer("idle", torch.zeros(codes, dtype=torch.long))

    @property
    def size(self) -> int:
        """Number of codes K."""
        return len(self.vectors)

    def embed(self, rows: Float[Tensor, "*shape dim"]) -> Float[Tensor, "*shape code_dim"]:
        """Vectors in code space, of any length, fp32."""
        return self.to_code(rows).float()

    def project(self, rows: Float[Tensor, "*shape dim"]) -> Float[Tensor, "*shape code_dim"]:
        """Unit vectors in code space."""
        return F.normalize(self.embed(rows), dim=-1)

    def index(self, vectors: Vectors) -> Int[Tensor, "total"]:
        """Nearest code of each unit vector; inverse of `vector`. Ties go to the lower code.

        The distance is the true one: published codes need not be of length one to the last bit.
        Autocast is off: products of bf16 would flip codes.
        """
        with torch.autocast(vectors.device.type, enabled=False):
            near = vectors.float() @ self.vectors.T
        return (near - self.vectors.square().sum(-1) / 2).argmax(-1)

    def vector(self, codes: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape code_dim"]:
        """Vectors of codes."""
        return self.vectors[codes]

    def quantise(self, vectors: Vectors) -> Quantised:
        """Look up, straight-through ẑ = z + sg(c - z), commitment = mean ‖z - sg(c)‖²."""
        codes = self.index(vectors.detach())
        chosen = self.vector(codes).detach()
        commitment = (vectors - chosen).square().sum(-1).mean()
        return Quantised(vectors + (chosen - vectors).detach(), codes, commitment)

    @torch.no_grad()
    def k_means(self, vectors: Vectors, *, rounds: int, generator: torch.Generator) -> None:
        """Start the codes by spherical k-means on the vectors of all ranks.

        Starting points are random vectors, distinct as far as there are enough; an empty cluster
        takes the vector that is farthest from its code.
        """
        vectors = gather_rows(vectors.float())
        pick = torch.randperm(len(vectors), generator=generator)[: self.size]
        if (short := self.size - len(pick)) > 0:
            again = torch.randint(len(vectors), (short,), generator=generator)
            pick = torch.cat([pick, again])
        centres = vectors[pick].clone()
        for _ in range(rounds):
            nearest, codes = _nearest(vectors, centres)
            mass = torch.bincount(codes, minlength=self.size).float()
            sums = torch.zeros_like(centres).index_add_(0, codes, vectors)
            empty = (mass == 0).nonzero()[:, 0]  # the host waits: how many is data
            farthest = nearest.argsort()[: len(empty)]
            sums[empty[: len(farthest)]] = vectors[farthest]
            found = sums.norm(dim=-1, keepdim=True) > 0
            centres = F.normalize(torch.where(found, sums, centres), dim=-1)
        self.vectors.copy_(centres)
        _, codes = _nearest(vectors, centres)
        mass = torch.bincount(codes, minlength=self.size).float().clamp(min=1.0)
        self.mass.copy_(mass / mass.mean())
        self.sums.copy_(self.vectors * self.mass[:, None])
        self.idle.zero_()

    @torch.no_grad()
    def update(
        self,
        vectors: Vectors,
        codes: Int[Tensor, "total"],
        *,
        decay: float,
        patience: int,
        generator: torch.Generator,
    ) -> int:
        """Move the codes to their vectors; revive and count those unused for `patience` steps.

        The sums over ranks make every rank's codebook the same; revival draws from the vectors of
        all ranks, so `generator` must be in the same state everywhere. `patience` 0 revives none.
        """
        vectors = vectors.float()
        mass = torch.bincount(codes, minlength=self.size).float()
        sums = torch.zeros_like(self.sums).index_add_(0, codes, vectors)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(mass)
            dist.all_reduce(sums)
        self.mass.lerp_(mass, 1 - decay)
        self.sums.lerp_(sums, 1 - decay)
        self.idle.copy_(torch.where(mass > 0, 0, self.idle + 1))
        placed = self.sums.norm(dim=-1, keepdim=True) > 1e-8
        moved = torch.where(placed, F.normalize(self.sums, dim=-1), self.vectors)
        self.vectors.copy_(moved)
        # the host waits: whether and how many are revived is data
        dead = (self.idle >= patience).nonzero()[:, 0] if patience else self.idle[:0]
        if len(dead):
            pool = gather_rows(vectors)
            pick = torch.randperm(len(pool), generator=generator)[: len(dead)]
            dead = dead[: len(pick)]
            self.vectors[dead] = pool[pick]
            typical = self.mass.mean()
            self.mass[dead] = typical
            self.sums[dead] = pool[pick] * typical
            self.idle[dead] = 0
        return len(dead)

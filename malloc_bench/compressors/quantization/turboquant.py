"""Rotated vectors in few bits: what levels suit is known beforehand."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from malloc_bench.compressors.base import Encoder, Sources, grows, map_vectors
from malloc_bench.compressors.sizing import Layout
from malloc_bench.registry import register
from malloc_bench.state import Coded, Segment, Table, UserState, coded


@register("turboquant")
@dataclass(frozen=True)
class TurboQuant(Encoder):
    """Turns every vector by one fixed random rotation, after which its numbers are nearly Gaussian, and rounds them to
    the levels that are best for a Gaussian (Lloyd and Max); a vector's norm is kept.

    bits: 1 to 4. seed: of the rotation, the same for all users, layers and heads. The paper's second stage for unbiased
    products (QJL) is left out: it costs a bit and makes single products noisier.
    """

    bits: int = 4
    seed: int = 0

    family = "quantization"
    paper = "TurboQuant, Zandieh et al., arXiv 2504.19874"
    formula = "code = nearest level of sqrt(d) R x / |x|; q.x is read as (R q).levels[code] |x| / sqrt(d)"
    growth = grows(compress="n L d^2", read="n L d")
    stores = "bit-packed codes and a bfloat16 norm per vector; the rotation follows from its seed"

    def __post_init__(self) -> None:
        if self.bits not in (1, 2, 3, 4):
            raise ValueError(f"turboquant: bits 1 to 4 are needed, not {self.bits}")

    def encode(self, state: UserState) -> UserState:
        levels, edges = lloyd_max(self.bits)

        def vectors(name: str, segment: Segment) -> Coded:
            x = segment.fields[name].dense().float()
            table = Table(levels, rotation(x.shape[3], self.seed))
            return coded(x, x.norm(dim=-1, keepdim=True) / x.shape[3] ** 0.5, table, edges, self.bits)

        return map_vectors(state, vectors)

    def cost(self, layout: Layout, n: Tensor, length: Tensor) -> Tensor:
        per_slot = sum(heads * (-(-width * self.bits // 8) + 2) for _, heads, width in layout.vectors)
        return layout.beside(n, length) + n * per_slot

    def flops(self, state: UserState, of: Sources) -> int:
        """One rotation a vector."""
        made = {id(v): v for s in state.segments() for v in s.fields.values() if isinstance(v, Coded)}
        return sum(v.dense_flops() for v in made.values())


@lru_cache(maxsize=64)
def rotation(width: int, seed: int) -> Tensor:
    """A random orthogonal matrix [D, D], uniform: the Q of a Gaussian matrix whose R has a positive diagonal."""
    x = torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(x)
    return (q * r.diagonal().sign()).float()


@lru_cache(maxsize=8)
def lloyd_max(bits: int) -> tuple[Tensor, Tensor]:
    """Levels [2^bits] and the edges between them that round a standard Gaussian with the least squared error.

    Lloyd's iteration: an edge lies halfway between levels, a level is the mean of what falls between its edges.
    """
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    levels, far = torch.linspace(-2, 2, 2**bits, dtype=torch.float64), torch.tensor([torch.inf], dtype=torch.float64)
    for _ in range(400 * bits):
        edges = (levels[1:] + levels[:-1]) / 2
        bounds = torch.cat([-far, edges, far])
        density, below = torch.exp(-(bounds**2) / 2) / (2 * torch.pi) ** 0.5, normal.cdf(bounds)
        levels = (density[:-1] - density[1:]) / (below[1:] - below[:-1])
    return levels.float(), ((levels[1:] + levels[:-1]) / 2).float()

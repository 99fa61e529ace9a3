"""Eight bits on a power law: fine near zero, where most numbers are."""

from dataclasses import dataclass

import torch
from torch import Tensor

from malloc_bench.compressors.base import Encoder, map_vectors
from malloc_bench.compressors.sizing import Layout
from malloc_bench.registry import register
from malloc_bench.state import Coded, Segment, Table, UserState, coded


@register("transact")
@dataclass(frozen=True)
class TransAct(Encoder):
    """Writes every number in 8 bits after bending it by a power below 1, as Pinterest stores embeddings of actions.

    power: 1 would be `int8`. Ours: a vector's largest number is kept as its scale, since states are not within 1.
    """

    power: float = 0.65

    grid = {"power": (0.5, 0.65, 0.8, 1.0)}
    family = "quantization"
    paper = "TransAct V2, Xia et al., arXiv 2506.02267"
    formula = "code = sign(x) round(127 (|x| / max|x|)^0.65)"
    stores = "8-bit codes and a bfloat16 maximum per vector"

    def __post_init__(self) -> None:
        if not 0 < self.power <= 1:
            raise ValueError(f"transact: a power above 0 and at most 1 is needed, not {self.power}")

    def encode(self, state: UserState) -> UserState:
        steps = torch.arange(-127, 128, dtype=torch.float64) / 127
        halfway = torch.arange(-126.5, 127, dtype=torch.float64) / 127  # rounding happens on the bent scale
        levels, edges = (x.sign() * x.abs() ** (1 / self.power) for x in (steps, halfway))
        table = Table(levels.float())

        def vectors(name: str, segment: Segment) -> Coded:
            x = segment.fields[name].dense().float()
            return coded(x, x.abs().amax(-1, keepdim=True), table, edges.float(), 8)

        return map_vectors(state, vectors)

    def cost(self, layout: Layout, n: Tensor, length: Tensor) -> Tensor:
        return layout.beside(n, length) + n * sum(heads * (width + 2) for _, heads, width in layout.vectors)

"""What stands out of the noise by optimally shrunk singular values, the rest in few bits."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from malloc_bench.compressors.base import Compressor, Sources, grows, map_vectors
from malloc_bench.compressors.low_rank.shrinkage import shrunk
from malloc_bench.compressors.quantization.turboquant import TurboQuant
from malloc_bench.compressors.sizing import Budget
from malloc_bench.registry import register
from malloc_bench.state import Dense, LowRank, Prefill, Segment, Summed, UserState


@register("eoptshrink")
@dataclass(frozen=True)
class EOptShrink(Compressor):
    """Each head's keys, and values, as a low-rank part whose rank the singular values choose, and a residual in `bits`
    bits by `turboquant`.

    The paper was known to us by its abstract alone; the rule here is the one for white noise of unknown size (Gavish
    and Donoho), not its own for separable noise. A slot pays for r numbers beside its codes: pays where n is large.
    """

    bits: int = 2
    seed: int = 0

    family = "low-rank"
    paper = "eOptShrinkQ, 2026 (abstract only); Gavish and Donoho, Optimal Shrinkage of Singular Values, 2017"
    formula = (
        "s -> sqrt((s^2 - (b + 1) t^2)^2 - 4 b t^4) / s above (1 + sqrt b) t; b = n / D or D / n, t from the median"
    )
    growth = grows(compress="n L d^2", read="n L d")
    stores = "float16 factors of the rank found, a rank a head; codes and a bfloat16 norm of every residual"

    def __post_init__(self) -> None:
        TurboQuant(self.bits, self.seed)

    @property
    def takes_budget(self) -> bool:
        return False

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> UserState:
        plain = {id(v): (v, s) for s in prefill.state.segments() for v in s.fields.values()}
        thin = {key: shrunk(v.dense(), segment.real(v.dense())) for key, (v, segment) in plain.items()}
        rest = map_vectors(prefill.state, lambda name, s: Dense(_rest(s, name, thin[id(s.fields[name])])))
        coded = iter(TurboQuant(self.bits, self.seed).encode(rest).segments())
        made: dict[int, Summed] = {}
        for segment in prefill.state.segments():
            other = next(coded)
            made |= {id(v): Summed(thin[id(v)], other.fields[name]) for name, v in segment.fields.items()}
        return map_vectors(prefill.state, lambda name, s: made[id(s.fields[name])])

    def flops(self, state: UserState, of: Sources) -> int:
        """Gram matrix, eigenvectors, projection and product of each head, and the rotation of the residual."""
        total = 0
        for v in {id(v): v for s in state.segments() for v in s.fields.values()}.values():
            assert isinstance(v, Summed) and isinstance(v.first, LowRank)
            _, h, slots, width = v.shape
            ranks = v.first.left.shape[3]
            total += h * (2 * slots * width * (width + 2 * ranks) + 9 * width**3) + v.second.dense_flops()
        return total


def _rest(segment: Segment, name: str, thin: LowRank) -> Tensor:
    x = segment.fields[name].dense().float()
    return (x - thin.dense()).masked_fill(~segment.real(x).unsqueeze(-1), 0)

"""KIVI as its paper runs it: the newest slots stay as they are."""

from dataclasses import dataclass

from malloc_bench.compressors.quantization.kivi import KIVI
from malloc_bench.registry import register


@register("kivi_tail")
@dataclass(frozen=True)
class KIVITail(KIVI):
    """`kivi` with the paper's own settings: 2 bits, groups of 32, the newest 32 slots in full precision.

    The paper's residual is 32 to 128 of thousands of tokens; of a history of 100 events it is a third, which is why
    `kivi` leaves it out.
    """

    bits: int = 2
    group: int | None = 32
    tail: int = 32

    grid = {"group": (32, None), "tail": (8, 16, 32, 64)}

    version = 1

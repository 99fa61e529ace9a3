"""Keys of all layers share one factor, and values another."""

from dataclasses import dataclass
from typing import ClassVar

from malloc_bench.compressors.base import grows
from malloc_bench.compressors.low_rank.svd import SVD, Share
from malloc_bench.registry import register


@register("xkv")
@dataclass(frozen=True)
class XKV(SVD):
    """`svd` with keys and values apart, as in the paper: each user's keys of all layers side by side are two thin
    factors, the one with a row a slot shared, and so are the values.

    Ours: all layers are one group (the paper: four neighbours of 32), and keys and values have the same rank (the
    paper: 2 to 3). `svd` lets keys and values share as well, which is better at equal bytes wherever they are made of
    the same input.
    """

    share: Share = "field"

    paper = "xKV, Chang et al., 2025, arXiv 2503.18893"
    formula = "[K1 K2 ...] = U [W1 W2 ...] with rank r, [V1 V2 ...] likewise: q.K1' is read as (q W1') U'"
    growth = grows(memory="r n + r L d", compress="n L^2 d^2 + L^3 d^3", read="r n L + r L d")
    stores = (
        "an n x r factor for the keys of all layers, one for the values, an r x d one for each; int8: a scale a rank"
    )
    version = 1
    grid = {"dtype": ("float16", "int8", "int4")}
    shares: ClassVar[tuple[str, ...]] = ("field",)

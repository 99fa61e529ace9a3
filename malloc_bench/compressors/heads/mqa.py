"""Multi-query attention: all query heads share one head of keys and values."""

from dataclasses import dataclass

from malloc_bench.compressors.base import grows
from malloc_bench.compressors.heads.gqa import FewerHeads
from malloc_bench.registry import register


@register("mqa")
@dataclass(frozen=True)
class MQA(FewerHeads):
    """A single head of keys and values (Shazeer, 2019): vectors take as many times less as there are heads."""

    n_kv_heads = 1

    paper = "Fast Transformer Decoding: One Write-Head is All You Need, Shazeer 2019, arXiv 1911.02150"
    formula = "every query head reads the same keys and values"
    growth = grows(memory="n L d / h", read="n L d")
    stores = "keys and values of every event in one head"

"""Compressors: one folder a family, one file a method."""

from malloc_bench.compressors.base import Budget, Compressor, Encoder, Layout, Structural, get_compressor
from malloc_bench.compressors.selection import Eviction, TokenMethod

__all__ = ["Budget", "Compressor", "Encoder", "Eviction", "Layout", "Structural", "TokenMethod", "get_compressor"]

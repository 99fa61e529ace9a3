"""Compressors: one folder a family, one file a method."""

from malloc_bench.compressors.base import Compressor, Encoder, Structural, get_compressor
from malloc_bench.compressors.selection import Eviction, TokenMethod
from malloc_bench.compressors.sizing import Budget, Layout

__all__ = ["Budget", "Compressor", "Encoder", "Eviction", "Layout", "Structural", "TokenMethod", "get_compressor"]

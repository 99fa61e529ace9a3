"""Backbones, one file each."""

from malloc_bench.backbones.base import Backbone, get_backbone, spelt_out

__all__ = ["Backbone", "get_backbone", "spelt_out"]

"""Backbones, one file each."""

from malloc_bench.backbones.base import Backbone, Batch, get_backbone

__all__ = ["Backbone", "Batch", "get_backbone"]

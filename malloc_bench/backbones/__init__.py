"""Backbones, one file each."""

from malloc_bench.backbones.base import Backbone, get_backbone

__all__ = ["Backbone", "get_backbone"]

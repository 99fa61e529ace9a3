"""Backbones, one file each: a class with `@register`, found by its name.

What they share: base (the four calls), items (sizes, embedding, head, loss), attention and block (stacks over per-event
keys and values), losses, statistics. `lsrm.py` is the shortest to begin with; `testing.check_backbone` holds it to all
promises.
"""

from malloc_bench.backbones.base import Backbone, get_backbone, spelt_out

__all__ = ["Backbone", "get_backbone", "spelt_out"]

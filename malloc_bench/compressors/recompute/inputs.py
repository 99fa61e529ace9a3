"""What methods that keep a layer's inputs have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from malloc_bench.state import Prefill

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone


def refusal(name: str, backbone: Backbone, smaller: bool = True) -> str | None:
    """Why keys and values cannot be rebuilt from a layer's inputs; smaller: or why that would save nothing."""
    if not {"keys", "values"} <= set(backbone.fields):
        return f"{name} rebuilds keys and values, {backbone.name} stores {backbone.fields[0]}"
    maps = [getattr(block, "projection", lambda: None)() for block in getattr(backbone, "blocks", ())]
    if not maps or any(each is None for each in maps):
        return f"{name} rebuilds keys and values by a layer's map, and {backbone.name} tells of none"
    for each in filter(None, maps):
        (heads, wide, keys), values = each["keys"].shape, each["values"].shape[2]
        if smaller and heads * (keys + values) <= wide:
            return f"{name} keeps {wide} numbers an event, its keys and values are {heads * (keys + values)}"
    return None


def normed(prefill: Prefill, layer: int) -> Tensor:
    """What a layer's map takes of every event, [B, 1, S, d]; raises MissingStatistic."""
    return prefill.projection(layer).normed(prefill.layer_input(layer)).unsqueeze(1)

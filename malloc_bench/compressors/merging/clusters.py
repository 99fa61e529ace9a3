"""Slots become clusters: what methods share that say, head by head, which slots go together."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from malloc_bench.compressors.selection import TokenMethod
from malloc_bench.compressors.sizing import Layout, dense_layout
from malloc_bench.state import Dense, Prefill, Segment, Slots, Stats, UserState, grouped

WINDOW = 64  # newest queries that `placed` makes use of, however many are there for other methods
ASKED = Stats(queries=WINDOW)


class Clusters(TokenMethod):
    """Folds slots into k clusters a head; a subclass names each slot's cluster, and maybe its share in it.

    A cluster's mass is the events in it: + log mass in the logits of softmax, x mass for SiLU. Its position and time
    are the rounded means of its events'. Each of 0 ... k - 1 must have a slot; number them as they come in time, for a
    later method of a chain takes the last one for the newest.
    per_head False: `owners` are the same for all heads, [B, 1, S], and so is what is stored of a cluster.
    """

    per_head: ClassVar[bool] = True

    @abstractmethod
    def owners(self, prefill: Prefill, layer: int, k: Tensor) -> Tensor:
        """The cluster of every slot, [B, H or 1, S] int64; k [B] <= count. Beyond a user's count nothing is read."""

    def shares(self, prefill: Prefill, layer: int, owners: Tensor, mass: Tensor) -> Tensor:
        """How much each slot counts in its cluster's vectors, [B, H, S] >= 0, here its mass; need not come to 1."""
        return mass

    def layout(self, prefill: Prefill) -> Layout:
        return dense_layout(prefill, "head" if self.per_head else "layer", mass=True)

    def keep(self, prefill: Prefill, k: Tensor) -> UserState:
        layers = []
        for layer in prefill.layers:
            segment, old = prefill.segment(layer), prefill.slots(layer)
            kept = k.minimum(old.count.amin(1))
            size = int(kept.max()) if len(k) else 0
            heads = next(iter(segment.fields.values())).shape[1]
            real = prefill.mask(layer).expand(-1, heads, -1)
            owners = self._owned(prefill, layer, kept, size).expand(-1, heads, -1)
            mass = real.to(torch.float32) if old.mass is None else torch.where(real, old.mass, 0.0)
            share = torch.where(real, self.shares(prefill, layer, owners, mass), 0.0)
            total = grouped(share.unsqueeze(-1), owners, size).clamp(min=1e-30)
            share = share / total.squeeze(-1).gather(2, owners.clamp(max=max(size - 1, 0))) if size else share
            lists = heads if self.per_head else 1
            slots = self._folded(prefill, old, owners[:, :lists], mass[:, :lists], kept, size)
            whole = {name: v.dense() for name, v in segment.fields.items()}
            fields = {name: Dense(grouped(x, owners, size, share).to(x.dtype)) for name, x in whole.items()}
            layers.append((Segment(fields, slots),))
        return UserState(tuple(layers), prefill.state.length)

    def _owned(self, prefill: Prefill, layer: int, k: Tensor, size: int) -> Tensor:
        """`owners`, held against what they must be; `size`, the largest k, where there is no slot."""
        b, h, s, _ = next(iter(prefill.segment(layer).fields.values())).shape
        owners = self.owners(prefill, layer, k)
        if list(getattr(owners, "shape", ())) not in [[b, n, s] for n in (h, 1)] or owners.dtype != torch.int64:
            given = f"{list(owners.shape)} {owners.dtype}" if isinstance(owners, Tensor) else type(owners).__name__
            raise ValueError(f"{self.name}: owners must be whole numbers [B, H or 1, S], here {[b, h, s]}, not {given}")
        real, owners = torch.broadcast_tensors(prefill.mask(layer), owners)
        most = k[:, None, None]
        outside = real & ((owners < 0) | (owners >= most))
        if bool(outside.any()):
            raise ValueError(f"{self.name}: owners names clusters outside 0 ... k - 1 for {int(outside.sum())} slots")
        owners = torch.where(real, owners, size)
        found = owners.new_zeros(b, owners.shape[1], size + 1, dtype=torch.bool).scatter_(2, owners, True)
        missing = ~found[..., :size] & (torch.arange(size, device=k.device) < most)
        if bool(missing.any()):
            raise ValueError(f"{self.name}: owners leaves {int(missing.sum())} of the clusters without a slot")
        return owners

    def _folded(self, prefill: Prefill, old: Slots, owners: Tensor, mass: Tensor, k: Tensor, size: int) -> Slots:
        total = grouped(mass.unsqueeze(-1), owners, size).squeeze(-1)

        def mean(x: Tensor) -> Tensor:  # integers; float32 would round seconds to minutes
            sums = grouped(x.double().unsqueeze(-1), owners, size, mass.double()).squeeze(-1)
            return (sums / total.double().clamp(min=1e-30)).round().to(x.dtype)

        places = old.places(mass.shape[2], prefill.state.length[:, None]).to(torch.int32)
        times = None if old.timestamps is None else mean(old.timestamps)
        return Slots(k.to(torch.int32)[:, None], mean(places) if prefill.uses_positions else None, times, total)


def compared_shapes(state: UserState) -> list[tuple[int, int, int]]:
    """(heads, kept slots, width) of what `placed` gives of each layer; an encoder's first segment is as wide as all."""
    found = []
    for segment, *_ in state.layers:
        _, heads, kept, width = segment.fields.get("keys", next(iter(segment.fields.values()))).shape
        read_by_place = segment.slots is not None and segment.slots.positions is not None
        found.append((heads, kept, width + read_by_place))
    return found


def compared(prefill: Prefill, layer: int) -> Tensor:
    """What slots are compared by, [B, H, S, D]: keys, or the only field that a state has; zeros beyond the count."""
    fields = prefill.segment(layer).fields
    vectors = fields.get("keys", next(iter(fields.values())))
    return torch.where(prefill.mask(layer).unsqueeze(-1), vectors.dense().float(), 0.0)


def placed(prefill: Prefill, layer: int) -> Tensor:
    """`compared`, and where the backbone has a bias of where slots stand a column more, [B, H, S, D + 1]: that bias.

    A slot that stands for events near and far is read as if all stood between. The logits of two slots differ by the
    queries' size along their keys' difference, and by that of their biases: the column is the bias by the queries' root
    mean square, halved, for keys differ most where queries are large. Keys alone where nobody can tell, as behind
    another method.
    """
    x = compared(prefill, layer)
    if prefill.standing is None or prefill.queries is None:
        return x
    queries, heads = prefill.queries[layer][:, :, -WINDOW:].float(), x.shape[1]
    known = (queries != 0).any(3).any(1).sum(1).clamp(min=1)  # [B] queries; what a user lacks is zeros
    size = (queries.square().sum((2, 3)) / (known[:, None] * queries.shape[3])).sqrt().clamp(min=1e-12)  # [B, Hq]
    column = (prefill.standing[layer] / (2 * size.unsqueeze(-1))).unflatten(1, (heads, -1)).mean(2)
    return torch.cat([x, torch.where(prefill.mask(layer), column, 0.0).unsqueeze(-1)], dim=-1)


def unit(x: Tensor) -> Tensor:
    """Rows of length 1, in float32 at least; rows of zeros stay."""
    return torch.nn.functional.normalize(x.float(), dim=-1)


def spread(count: Tensor, k: Tensor, size: int) -> Tensor:
    """k [B] slots evenly spaced over count [B], the newest among them: [B, size] int64, the rest repeats the last."""
    step = torch.arange(1, size + 1, device=k.device)
    count, k = count[:, None], k[:, None]
    return ((step.minimum(k) * count + k - 1) // k.clamp(min=1) - 1).clamp(min=0)

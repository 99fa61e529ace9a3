"""Keys and values as a map of what is stored: fewer bytes, a dearer read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from malloc_bench.state.named import Named
from malloc_bench.state.user_state import Segment
from malloc_bench.state.vectors import Ragged, Read, Vectors, all_rows

_ROWS = 1024  # slots rebuilt at a time


class Map:
    """act(x W + b) for every head, x [B, 1, S, N]: weight [H, N, D], bias [H, D] or None, act SiLU or nothing.

    A plain class: no user has a part in it. Where x is narrower than N, the rows of W beyond it count nothing.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, silu: bool = False) -> None:
        self.weight, self.bias, self.silu = weight, bias, silu

    def like(self, x: Tensor, rank: int) -> tuple[Tensor, Tensor | None]:
        """weight [H, rank, D] and bias [H, 1, D] on the device and in the dtype of x."""
        bias = None if self.bias is None else self.bias.unsqueeze(1).to(x.device, x.dtype)
        return self.weight[:, :rank].to(x.device, x.dtype), bias

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.like(x, x.shape[-1])
        made = x @ weight
        made = made if bias is None else made + bias
        return F.silu(made) if self.silu else made


class Projection(Named):
    """How a layer makes what it stores of its input x [..., d]: act(norm(x) W + b).

    Tensors: each field's weight [H, d, D] under its name, and its bias [H, D], if any, under `name.bias`; the layer
    norm's `norm.weight` and `norm.bias` [d], if any. silu: act is SiLU, else nothing. eps: of the norm; None: there is
    none, norm(x) is x.
    """

    def __init__(self, tensors: dict[str, Tensor], silu: bool = False, eps: float | None = 1e-5) -> None:
        super().__init__(tensors)
        self.silu, self.eps = silu, eps

    def __reduce__(self) -> tuple[type, tuple[dict[str, Tensor], bool, float | None]]:  # type: ignore[override]
        return type(self), (dict(self.tensors), self.silu, self.eps)

    def normed(self, x: Tensor) -> Tensor:
        if self.eps is None:
            return x
        weight, bias = (
            None if y is None else y.to(x.device, x.dtype) for y in map(self.get, ("norm.weight", "norm.bias"))
        )
        return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)

    def map(self, field: str) -> Map:
        return Map(self[field], self.get(f"{field}.bias"), self.silu)

    def rebuilt(self, segment: Segment, base: Vectors) -> Segment:
        """The segment with all fields as maps of `base`, [B, 1, S, d] normed inputs."""
        return Segment({name: Rebuilt(base, self.map(name)) for name in segment.fields}, segment.slots)


@dataclass(frozen=True, eq=False)
class Derived(Vectors):
    """Vectors that store nothing of their own, only what they are made of."""

    def made_of(self) -> tuple[Vectors, ...]:
        raise NotImplementedError

    def shared(self) -> tuple[Vectors, ...]:
        return tuple(part for own in self.made_of() for part in (*own.shared(), own))

    def parts(self, count: Tensor | None) -> Iterator[Ragged]:
        yield from ()

    def load(self, read: Read, count: Tensor | None) -> Derived:
        return self


@dataclass(frozen=True, eq=False)
class Rebuilt(Derived):
    """map(base), base [B, 1, S, R], which several fields and layers may share.

    A linear map is absorbed, (W q).base + q.b and W'(w base) + b sum(w), where that takes less than rebuilding: few
    queries. Else vectors are rebuilt, a block of slots at a time.
    """

    base: Vectors
    map: Map

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, _, s, _ = self.base.shape
        return b, self.map.weight.shape[0], s, self.map.weight.shape[2]

    def made_of(self) -> tuple[Vectors, ...]:
        return (self.base,)

    def over(self, shared: tuple[Vectors, ...]) -> Rebuilt:
        return replace(self, base=shared[-1])

    def dense(self) -> Tensor:
        return self.map(self.base.dense())

    def dot(self, q: Tensor) -> Tensor:
        if not self._absorbs(q.shape[2]):
            return torch.cat([q @ x.to(q.dtype).mT for x in self._blocks()], -1)
        weight, bias = self.map.like(q, self.base.shape[3])
        found = _by_head(self.base.dot(_in_a_row(q @ weight.mT)), q)
        return found if bias is None else found + (q * bias).sum(-1, keepdim=True)

    def mix(self, w: Tensor) -> Tensor:
        if not self._absorbs(w.shape[2]):
            blocks = zip(w.split(_ROWS, -1), self._blocks())
            return torch.stack([part @ x.to(w.dtype) for part, x in blocks]).sum(0)
        weight, bias = self.map.like(w, self.base.shape[3])
        found = _by_head(self.base.mix(_in_a_row(w)), w) @ weight
        return found if bias is None else found + w.sum(-1, keepdim=True) * bias

    def _blocks(self) -> Iterator[Tensor]:
        return (self.map(x) for x in self.base.dense().split(_ROWS, 2))

    def _absorbs(self, queries: int) -> bool:
        _, _, slots, width = self.shape
        rank = self.base.shape[3]
        return not self.map.silu and queries * rank * (slots + width) <= slots * width * (queries + rank)

    def flops(self, queries: int) -> int:
        _, heads, slots, width = self.shape
        if self._absorbs(queries):
            return 2 * queries * heads * self.base.shape[3] * width + self.base.flops(queries * heads)
        return self.dense_flops() + 2 * queries * heads * slots * width

    def dense_flops(self) -> int:
        _, heads, slots, width = self.shape
        return self.base.dense_flops() + 2 * heads * slots * self.base.shape[3] * width


@dataclass(frozen=True, eq=False)
class Normed(Derived):
    """A layer's inputs, base [B, 1, S, d], as its map takes them: normed, which happens at every read."""

    base: Vectors
    projection: Projection

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.base.shape

    def made_of(self) -> tuple[Vectors, ...]:
        return (self.base,)

    def over(self, shared: tuple[Vectors, ...]) -> Normed:
        return replace(self, base=shared[-1])

    def dense(self) -> Tensor:
        return self.projection.normed(self.base.dense())

    def flops(self, queries: int) -> int:
        return super().flops(queries) + self.base.dense_flops()

    def dense_flops(self) -> int:
        return self.base.dense_flops()


@dataclass(frozen=True, eq=False)
class Summed(Derived):
    """first + second, [B, H, S, D] each."""

    first: Vectors
    second: Vectors

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.first.shape

    def made_of(self) -> tuple[Vectors, ...]:
        return self.first, self.second

    def over(self, shared: tuple[Vectors, ...]) -> Summed:
        return replace(self, first=shared[len(self.first.shared())], second=shared[-1])

    def dense(self) -> Tensor:
        return self.first.dense() + self.second.dense()

    def dot(self, q: Tensor) -> Tensor:
        return self.first.dot(q) + self.second.dot(q)

    def mix(self, w: Tensor) -> Tensor:
        return self.first.mix(w) + self.second.mix(w)

    def flops(self, queries: int) -> int:
        return self.first.flops(queries) + self.second.flops(queries)

    def dense_flops(self) -> int:
        return self.first.dense_flops() + self.second.dense_flops()


@dataclass(frozen=True, eq=False)
class Embedded(Vectors):
    """What the lowest layer gets of events, from their ids [B, 1, S, 1] int32 and places [B, 1, S, 1] int32 (None: row
    i is event i): a row of `items` plus one of `positions` in `tables`."""

    ids: Tensor
    places: Tensor | None
    tables: Named

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, _, s, _ = self.ids.shape
        return b, 1, s, self.tables["items"].shape[1]

    def dense(self) -> Tensor:
        items, positions = self.tables["items"], self.tables["positions"]
        at = (
            torch.arange(self.ids.shape[2], device=self.ids.device)
            if self.places is None
            else self.places[..., 0].long()
        )
        ids = self.ids[..., 0].long().clamp(0, len(items) - 1)  # padding is garbage
        return items[ids] + positions[at.clamp(0, len(positions) - 1)]

    def parts(self, count: Tensor | None) -> Iterator[Ragged]:
        for what, x in (("ids", self.ids), ("positions", self.places)):
            if x is not None:
                yield Ragged(x, all_rows(x) if count is None else count, None, what)

    def load(self, read: Read, count: Tensor | None) -> Embedded:
        ids, places = (
            None if x is None else read(x, all_rows(x) if count is None else count) for x in (self.ids, self.places)
        )
        assert ids is not None
        return replace(self, ids=ids, places=places)


def _in_a_row(x: Tensor) -> Tensor:
    """All heads' queries as one head's: [B, H, M, N] -> [B, 1, H M, N]."""
    return x.reshape(len(x), 1, -1, x.shape[3])


def _by_head(x: Tensor, like: Tensor) -> Tensor:
    """And back."""
    return x.view(*like.shape[:3], x.shape[3])

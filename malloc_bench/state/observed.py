"""Attention statistics of plain tensors, worked out when asked for: no map of all pairs is ever held."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import overload

import torch
from torch import Tensor

from malloc_bench.state.vectors import unhalved

_CELLS = 1 << 23  # weights at a time: 32 MB
_CACHED = 1 << 18  # weights that a core's cache holds

#: (layer, first, last) -> weights of the queries first ... last - 1 over all slots, [B, Hq, last - first, S]
Rows = Callable[[int, int, int], Tensor]


@dataclass(frozen=True, eq=False)
class Observed:
    """Attention weights of B users, a block of queries at a time.

    rows: see `Rows`; Hq is a multiple of a layer's heads. count: [B] events. slots: S. heads: stored heads H of each
    layer; where several query heads share one, statistics are means of their absolute weights.
    """

    rows: Rows
    count: Tensor
    slots: int
    heads: tuple[int, ...]
    made: dict[tuple[str, int, int | None], Tensor] = field(default_factory=dict)

    def blocks(self, layer: int, first: int = 0) -> Iterator[tuple[Tensor, int, int]]:
        """(weights, first, last) from query `first` on, 0 where query or slot is padding."""
        real = torch.arange(self.slots, device=self.count.device) < self.count[:, None]  # [B, S]
        last, ragged = int(self.count.max()) if len(self.count) else 0, not bool(real.all())
        step = max(1, _CELLS // max(1, self.heads[layer] * real.numel()))  # more query heads are not known of yet
        while first < last:
            stop = min(first + step, last)
            weights = self.rows(layer, first, stop)
            want = (len(real), weights.shape[1], stop - first, self.slots)
            if weights.shape != want or weights.shape[1] % self.heads[layer]:
                raise ValueError(
                    f"attention({layer}, {first}, {stop}): expected {list(want)}, a multiple of {self.heads[layer]} "
                    f"heads, not {list(weights.shape)}"
                )
            both = real[:, None, first:stop, None] & real[:, None, None, :] if ragged else None
            yield weights if both is None else torch.where(both, weights, 0.0), first, stop
            first, step = stop, max(1, _CELLS // (weights[:, :, 0].numel() or 1))

    def received(self, layer: int) -> Tensor:
        """Total |weight| that each slot received, [B, H, S]."""
        total: Tensor | float = 0.0
        for weights, _, _ in self.blocks(layer):
            total = total + absolute_sums(weights)
        if not isinstance(total, Tensor):
            return torch.zeros(len(self.count), self.heads[layer], self.slots, device=self.count.device)
        return total.unflatten(1, (self.heads[layer], -1)).mean(2)

    def newest(self, layer: int, window: int) -> Tensor:
        """Weights of each user's newest `window` queries, oldest first, [B, H, window, S]; 0 where there is none."""
        at = self.count.long()[:, None] - window + torch.arange(window, device=self.count.device)  # [B, W]
        start, newest = (int(at[:, 0].min()), int(at[:, 0].max())) if at.numel() else (0, 0)
        if at.numel() and start == newest >= 0:  # histories of one length: the blocks themselves
            found = [self._stored(layer, weights) for weights, *_ in self.blocks(layer, start)]
            whole = found[0] if len(found) == 1 else torch.cat(found, dim=2)
            return whole.to(torch.promote_types(whole.dtype, torch.float32))
        out = torch.zeros(len(at), self.heads[layer], window, self.slots, device=at.device)
        for weights, first, last in self.blocks(layer, max(0, start)):
            weights = self._stored(layer, weights)
            here = ((at >= first) & (at < last))[:, None, :, None]
            index = (at - first).clamp(0, last - first - 1)[:, None, :, None].expand(*out.shape[:3], self.slots)
            out = torch.where(here, weights.gather(2, index), out)
        return out

    def newest_sums(self, layer: int, window: int) -> Tensor:
        """Total |weight| that each slot received of each user's newest `window` queries, [B, H, S]."""
        if isinstance(self.rows, SoftmaxRows) and len(self.count) and int(self.count.min()) == self.slots:
            return self.rows.sums(layer, min(window, self.slots))
        return absolute_sums(self.newest(layer, window))

    def _stored(self, layer: int, weights: Tensor) -> Tensor:
        """[B, Hq, M, S] over the query heads that share a stored one -> [B, H, M, S]."""
        heads = self.heads[layer]
        return weights if weights.shape[1] == heads else weights.unflatten(1, (heads, -1)).abs().mean(2)


@dataclass(frozen=True, eq=False)
class Lazy(Sequence[Tensor]):
    """A statistic of each layer, made when it is first read: the column sums, or (`all_rows`) every query's weights."""

    observed: Observed
    all_rows: bool = False

    def __len__(self) -> int:
        return len(self.observed.heads)

    @overload
    def __getitem__(self, layer: int) -> Tensor: ...
    @overload
    def __getitem__(self, layer: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, layer: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(layer, slice):
            return [self[i] for i in range(*layer.indices(len(self)))]
        return self.newest(range(len(self))[layer], self.observed.slots if self.all_rows else None)

    def newest(self, layer: int, window: int | None) -> Tensor:
        """The column sums (None), or the newest `window` queries' weights."""
        known = self.observed
        return self._once(
            "rows", layer, window, known.received if window is None else partial(known.newest, window=window)
        )

    def newest_sums(self, layer: int, window: int) -> Tensor:
        """`Observed.newest_sums`, once."""
        return self._once("sums", layer, window, partial(self.observed.newest_sums, window=window))

    def _once(self, what: str, layer: int, window: int | None, make: Callable[[int], Tensor]) -> Tensor:
        made = self.observed.made
        if (what, layer, window) not in made:
            made[what, layer, window] = make(layer)
        return made[what, layer, window]


def by_heads(make: Callable[..., Tensor], *given: Tensor) -> Tensor:
    """make(*given), tensors [B, H, ...] on either side, but a few heads [n, ...] at a time, so that what it works with
    stays in a core's cache."""
    b, h = given[0].shape[:2]
    flat, step = [x.flatten(0, 1) for x in given], max(1, b * h)
    if given[0].device.type == "cpu":
        step = max(1, min(step, _CACHED // max([1, *(x[0].numel() for x in flat if len(x))])))
    made = [make(*(x[i : i + step] for x in flat)) for i in range(0, max(1, b * h), step)]
    return (made[0] if len(made) == 1 else torch.cat(made)).unflatten(0, (b, h))


def absolute_sums(weights: Tensor) -> Tensor:
    """Sum over queries of |weights|, [B, H, M, S] -> [B, H, S]."""
    return by_heads(lambda x: x.abs().sum(1), weights)


def newest_rows(x: Tensor, count: Tensor, window: int) -> Tensor:
    """Of x [B, H, S, D] each user's newest `window` rows, oldest first, [B, H, window, D]; 0 where there is none."""
    b, h, s, d = x.shape
    if not s:
        return x.new_zeros(b, h, window, d)
    if b and x.device.type == "cpu" and window <= int(count.min()) == int(count.max()):
        return x[:, :, int(count[0]) - window : int(count[0])].clone()
    at = count.long()[:, None] - window + torch.arange(window, device=x.device)  # [B, W]
    found = x.gather(2, at.clamp(min=0)[:, None, :, None].expand(-1, h, -1, d))
    return found * (at >= 0)[:, None, :, None]


@dataclass(frozen=True, eq=False)
class Asked(Sequence[Tensor]):
    """Queries [B, Hq, S, D] of each layer's slots as they multiply `keys`: divided by the root of their width."""

    given: Sequence[Tensor]
    keys: Sequence[Tensor]
    events: Tensor  # [B], of each user

    def __len__(self) -> int:
        return len(self.given)

    @overload
    def __getitem__(self, layer: int) -> Tensor: ...
    @overload
    def __getitem__(self, layer: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, layer: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(layer, slice):
            return Asked(self.given[layer], self.keys[layer], self.events)
        return self.newest(layer, self.given[layer].shape[2])

    def newest(self, layer: int, window: int) -> Tensor:
        """Of each user's newest `window`, see `newest_rows`."""
        return newest_rows(self.given[layer], self.events, window) / self.keys[layer].shape[-1] ** 0.5


@dataclass(frozen=True, eq=False)
class SoftmaxRows:
    """`Rows` of causal softmax attention: keys [B, H, S, D], queries [B, Hq, S, D] of each layer, at least float32."""

    keys: Sequence[Tensor]
    queries: Sequence[Tensor]

    def __call__(self, layer: int, first: int, last: int) -> Tensor:
        k, grouped = self._given(layer, first, last)
        return _causal(k, grouped, first).flatten(1, 2)

    def sums(self, layer: int, window: int) -> Tensor:
        """Total weight that each slot received of the newest `window` queries, [B, H, S]; every slot is real.

        The mean over query heads that share a stored one. A few heads at a time: their weights never leave the cache.
        """
        k, grouped = self._given(layer, self.keys[layer].shape[2] - window, None)

        def received(k: Tensor, q: Tensor) -> Tensor:
            return _causal(k, q, k.shape[1] - window).flatten(1, 2).sum(1) / q.shape[1]

        return by_heads(received, k.detach(), grouped.detach())

    def _given(self, layer: int, first: int, last: int | None) -> tuple[Tensor, Tensor]:
        k, q = self.keys[layer], self.queries[layer][:, :, first:last]
        k, q = unhalved(k), unhalved(q)
        return k, (q / k.shape[-1] ** 0.5).unflatten(1, (k.shape[1], q.shape[1] // k.shape[1]))


def _causal(keys: Tensor, queries: Tensor, first: int) -> Tensor:
    """Weights of queries [..., group, rows, D], those from `first` on, over keys [..., S, D]: [..., group, rows, S]."""
    rows = queries.shape[-2]
    logits = (queries.flatten(-3, -2) @ keys.mT).unflatten(-2, queries.shape[-3:-1])
    at = torch.arange(first, keys.shape[-2], device=keys.device)
    logits[..., first:].masked_fill_(at > at[:rows, None], -torch.inf)
    return torch.softmax(logits, -1, out=None if logits.requires_grad else logits)  # one buffer: it stays in cache

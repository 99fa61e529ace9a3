"""Each user's keys and values as products of thin matrices that share one factor."""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from malloc_bench.compressors.base import Encoder, Sources, grows, map_vectors
from malloc_bench.compressors.sizing import COUNT_BYTES, Budget, Layout, dense_layout, slots_within
from malloc_bench.registry import register
from malloc_bench.state import LowRank, Prefill, Segment, UserState, Vectors, low_ranks, principal, side_by_side

Share = Literal["all", "layer", "none", "field"]
Number = Literal["float16", "float32", "int8", "int4"]
CODES = {"int8": 8, "int4": 4}  # bits


def _made(key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    return make()


@register("svd")
@dataclass(frozen=True)
class SVD(Encoder):
    """Stores keys and values as two thin factors, the one with a row a slot shared: a truncated SVD of each user's
    fields side by side (Eckart and Young, 1936).

    rank None: the largest rank that fits the budget. A number: that rank (at most the number of slots), the size
    follows. share: what lies side by side: every layer, head and field over the same slots, those of one layer, or
    nothing. Layers or heads that are known to keep slots of their own share with nobody else; where positions are not
    stored, heads' slots are matched in their order. dtype: of the factors; codes of 8 or 4 bits have a scale a rank. Of
    a memory without slots the matrix itself is factored.
    """

    rank: int | None = None
    share: Share = "all"
    dtype: Number = "int8"

    grid = {"share": ("all", "layer"), "dtype": ("float16", "int8", "int4")}
    family = "low-rank"
    paper = "Eckart and Young 1936; shared over layers as in xKV, arXiv 2503.18893; absorbed as in arXiv 2405.04434"
    formula = "[K1 V1 K2 V2 ...] = U [W1 W2 ...] with rank r: q.K1' is read as (q W1') U'"
    growth = grows(memory="r n + r L d", compress="n L^2 d^2 + L^3 d^3", read="r n L + r L d")
    stores = "one n x r factor for all layers, heads and fields, an r x d one for each; int8: a float16 a rank for both"
    version = 2
    shares: ClassVar[tuple[str, ...]] = ("all", "layer", "none")

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"{self.name}: rank >= 1 is needed, not {self.rank}")
        if self.share not in self.shares or self.dtype not in get_args(Number):
            known = f"share {', '.join(self.shares)}, dtype {', '.join(get_args(Number))}"
            raise ValueError(f"{self.name}: {known} are needed, not {self}")

    @property
    def takes_budget(self) -> bool:
        return self.rank is None

    @property
    def by_field(self) -> bool:  # type: ignore[override]
        return self.share in ("none", "field")

    def accepts(self, budget: Budget) -> str | None:
        return (
            None if budget.slots is None else f"{self.name} keeps every slot: give its budget as a fraction or in bytes"
        )

    def compress(self, prefill: Prefill, budget: Budget | None = None, fitted: Any = None) -> UserState:
        if self.rank is not None:
            return self.encode(prefill.state)
        if budget is None:
            raise ValueError(f"{self.name} needs a budget or a rank")
        if budget.fraction is not None and budget.fraction >= 1:
            return prefill.state
        target = budget.target(prefill.full_bytes())
        if target is None:
            raise ValueError(self.accepts(budget))
        return self._factor(prefill.state, self._rank(prefill, target), prefill.remember)

    def encode(self, state: UserState) -> UserState:
        assert self.rank is not None
        return self._factor(state, torch.full_like(state.length, self.rank).long())

    def _factor(self, state: UserState, rank: Tensor, once: Callable[..., Tensor] = _made) -> UserState:
        made: dict[int, LowRank] = {}
        for group, segment, own in self._groups(state):
            fields = [vectors.dense() for vectors in group]
            mask = segment.real(fields[0])
            mask = mask if own else mask[:, :1]
            x = side_by_side(fields, own)
            key = ("principal", own, *map(id, group))
            fits = rank[:, None].minimum(mask.sum(-1)).clamp(max=x.shape[3])
            basis = once(key, lambda: principal(x, mask))  # noqa: B023
            dtype, bits = getattr(torch, self.dtype, torch.float32), CODES.get(self.dtype)
            parts = low_ranks(fields, mask, fits, own, basis, dtype, bits)
            made |= {id(vectors): part for vectors, part in zip(group, parts)}
        return map_vectors(state, lambda name, segment: made[id(segment.fields[name])])

    def _groups(self, state: UserState) -> Iterator[tuple[list[Vectors], Segment, bool]]:
        """Fields that share a left factor, a segment over their slots, and whether each head has its own."""
        groups: dict[Hashable, tuple[dict[int, Vectors], Segment, bool]] = {}
        seen: set[int] = set()
        for number, segment in enumerate(state.segments()):
            slots = segment.slots
            known = [] if slots is None else [slots.count, slots.positions, slots.timestamps, slots.mass]
            own = slots is None or any(x is not None and x.shape[1] > 1 for x in known)
            for name, vectors in segment.fields.items():
                if id(vectors) in seen:
                    continue
                seen.add(id(vectors))
                place = {"all": (), "layer": (number,), "none": (number, name), "field": (name,)}[self.share]
                key = (number, name) if slots is None else (id(slots), own and vectors.shape[1], *place)
                alone = own or self.share == "none"
                groups.setdefault(key, ({}, segment, alone))[0][id(vectors)] = vectors
        for fields, segment, alone in groups.values():
            yield list(fields.values()), segment, alone

    def _lefts(self, layout: Layout) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """Of every left factor that such a state has: how many heads it has, and (heads, width) of what it serves."""
        own = max(layout.positions, layout.mass, layout.times) > layout.counts
        if self.share == "none" or layout.counts == 0:
            yield from ((heads, [(heads, width)]) for _, heads, width in layout.vectors)
            return
        layers: list[dict[str, tuple[int, int]]] = [{}]
        for name, heads, width in layout.vectors:
            if name in layers[-1]:
                layers.append({})
            layers[-1][name] = heads, width
        together = [layers] if self.share != "layer" and layout.counts == 1 else [[layer] for layer in layers]
        if self.share == "field":
            each = [(group, sorted({name for layer in group for name in layer})) for group in together]
            together = [[{n: x[n]} for x in group if n in x] for group, fields in each for n in fields]
        for group in together:
            fields = [field for layer in group for field in layer.values()]
            for same in sorted({heads for heads, _ in fields}) if own else [0]:
                yield same or 1, [field for field in fields if same in (0, field[0])]

    def _bytes(self, layout: Layout, n: Tensor, length: Tensor, rank: Tensor) -> Tensor:
        """Bytes [B] of n [B] slots at a rank [B]."""
        total, coded = layout.beside(n, length), self.dtype in CODES
        bits = CODES[self.dtype] if coded else 8 * getattr(torch, self.dtype).itemsize
        for own, fields in self._lefts(layout):
            fits = rank.minimum(n).clamp(max=sum(heads * width for heads, width in fields) // own)
            left = own * (n * -(-fits * bits // 8) + 2 * coded * fits)
            right = fits * sum(heads * -(-width * bits // 8) for heads, width in fields)
            total = total + 2 * COUNT_BYTES + left + right  # with a rank and a scale
        return total

    def _sizes(self, prefill: Prefill) -> Callable[[Tensor], Tensor]:
        """rank [B] -> bytes [B] of the state."""
        length = prefill.state.length.long()
        stacks = [(dense_layout(view, "state", consecutive=True), view.rows(0)) for view in prefill.apart()]

        def bytes_of(rank: Tensor) -> Tensor:
            total = torch.zeros_like(rank) - COUNT_BYTES * (len(stacks) - 1)  # one length for all stacks
            return sum((self._bytes(layout, n, length, rank) for layout, n in stacks), total)

        return bytes_of

    def _rank(self, prefill: Prefill, target: Tensor) -> Tensor:
        rows = torch.stack([view.rows(0) for view in prefill.apart()]).amax(0)
        return slots_within(target, rows, self._sizes(prefill))

    def floor(self, prefill: Prefill) -> Tensor:
        return self._sizes(prefill)(torch.ones_like(prefill.state.length, dtype=torch.long))

    def cost(self, layout: Layout, n: Tensor, length: Tensor) -> Tensor:
        assert self.rank is not None
        return self._bytes(layout, n, length, torch.full_like(n, self.rank))

    def flops(self, state: UserState, of: Sources) -> int:
        """Gram matrix, eigenvectors (about 9 d^3: tridiagonal QR, Golub and Van Loan) and projection, each left factor:
        of the smaller side of its matrix."""
        lefts = {id(v.left): v.left for s in state.segments() for v in s.fields.values() if isinstance(v, LowRank)}
        total = 0
        for left in lefts.values():
            _, h, slots, rank = left.shape
            side = min(slots, left.most)
            total += h * (2 * slots * left.most * (side + rank) + 9 * side**3)
        return total

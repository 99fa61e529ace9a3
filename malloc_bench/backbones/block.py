"""One attention layer: what it stores of an event, how a token weighs slots, what becomes of the mixture."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from malloc_bench.backbones.sums import Weigher
from malloc_bench.state import Dense, Projection, Segment, Slots

BLOCK = 256  # queries at a time in the plain pass


@dataclass(frozen=True)
class Places:
    """Where tokens or slots stand: positions [B, H or 1, S] and times [B, H or 1, S] (None without times).

    items: of tokens, what they are, [B, 1, M]; for look-ups.
    """

    positions: Tensor
    times: Tensor | None
    items: Tensor | None = None

    def rows(self, part: slice | Tensor) -> Places:
        times, items = (None if x is None else x[..., part] for x in (self.times, self.items))
        return Places(self.positions[..., part], times, items)


class Block(nn.Module):
    """One layer: what is stored of an event, how a token weighs the slots, what becomes of the mixture.

    A structural compressor swaps this module for one of its own. It can where `fused` names the linear map from which
    queries, fields to store and gate all come: `parts` are their widths, in the map's order.
    """

    heads: int  # of the queries
    stored_heads: int  # of the fields that `split` gives
    channels: int = 1  # query heads of one query, the first of which alone asks keys
    normalised: bool = True  # a token's weights come to 1: a softmax
    weighing: Literal["softmax", "silu"] | None = None  # over q.k and `bias`, SiLU over `normaliser`; None: another way
    normaliser: float = 1.0
    biased: bool = False  # logits have a part that is of where a slot stands, not of its key
    fused: str | None = None
    parts: dict[str, int]
    parts_before: dict[str, int]  # once narrowed

    def __init_subclass__(cls) -> None:
        if "weighing" not in vars(cls) and {"logits", "weigh", "mix"} & vars(cls).keys():
            cls.weighing = None  # its own way, which no kernel knows

    @abstractmethod
    def project(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """x [B, M, d] -> queries [B, H, M, D], fields to store [B, H, M, D] each, and a gate for `combine`."""

    def split(self, mapped: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """What `project` gives, from the outputs [B, M, sum of widths] of the fused map."""
        part = dict(zip(self.parts, mapped.split(list(self.parts.values()), -1)))
        q, gate = _by_head(part.pop("queries"), self.heads), part.pop("gate", None)
        return q, {name: _by_head(part[name], self.stored_heads).contiguous() for name in sorted(part)}, gate

    @abstractmethod
    def combine(self, x: Tensor, mixed: Tensor, gate: Tensor | None) -> Tensor:
        """The layer's output [B, M, d] from its input and the mixed values [B, H, M, D]."""

    @abstractmethod
    def weigh(self, logits: Sequence[Tensor], masks: Sequence[Tensor], masses: Sequence[Tensor | None]) -> list[Tensor]:
        """Attention weights over several sources that are attended together; logits [B, H, M, S_i], 0 where masked."""

    def logits(self, q: Tensor, segment: Segment, queries: Places, slots: Places) -> Tensor:
        """[B, H, M, S] before masking; queries' times are those at which the prediction is asked for."""
        found, bias = segment.fields["keys"].dot(q), self.bias(queries, slots)
        return found if bias is None else found + bias

    def bias(self, queries: Places, slots: Places) -> Tensor | None:
        """What logits have beside q.k, [B or 1, H or 1, M, S]; None: nothing."""
        return None

    def asking(self, q: Tensor, asked: Places) -> Tensor:
        """Queries such that q.k is the logit, a bias apart."""
        return q

    def outputs(self) -> Tensor | None:
        """[H, D, d]: what a unit of each head's mixture adds to the layer's output; None where nothing linear does."""
        out = getattr(self, "out", None)
        return out.weight.T.unflatten(0, (self.heads, -1)) if isinstance(out, nn.Linear) else None

    def projection(self) -> Projection | None:
        """How what is stored comes from the layer's input; None where it is no map of its norm."""
        return None

    def _projected(
        self, linear: nn.Linear, norm: dict[str, Tensor | None], silu: bool, eps: float | None
    ) -> Projection:
        """The rows of the fused map that make what is stored; norm: `weight` and `bias` of a norm before it."""
        found = {f"norm.{name}": x for name, x in norm.items() if x is not None}
        widths = list(self.parts.values())
        for name, rows in zip(self.parts, torch.arange(sum(widths)).split(widths)):
            if name in ("queries", "gate"):
                continue
            found[name] = linear.weight[rows].unflatten(0, (self.stored_heads, -1)).mT
            if linear.bias is not None:
                found[f"{name}.bias"] = linear.bias[rows].unflatten(0, (self.stored_heads, -1))
        return Projection(found, silu, eps)

    def each(self, x: Tensor) -> Tensor:
        """What is known of the slots of each stored head, [B, H', ...], for each query head; one for all stays one."""
        return x

    def mix(self, weights: Tensor, segment: Segment) -> Tensor:
        """[B, H, M, S] -> [B, H, M, D]"""
        return segment.fields["values"].mix(weights)

    def causal(self, q: Tensor, own: dict[str, Tensor], places: Places, asked: Places) -> Tensor:
        """Plain causal attention of a left-aligned batch onto itself, [B, H, S, D]; subclasses have faster ones."""
        return torch.cat([self.mix(w, part) for w, part, _ in self.causal_blocks(q, own, places, asked)], dim=2)

    def in_tiles(self, own: dict[str, Tensor], places: Places, asked: Places) -> tuple[Tensor, Tensor, Weigher] | None:
        """Keys, values [B, H, S, D] and the weigher by which `sums.tiled` does what `causal` does; None: it cannot."""
        return None

    def causal_blocks(
        self, q: Tensor, own: dict[str, Tensor], places: Places, asked: Places
    ) -> Iterator[tuple[Tensor, Segment, slice]]:
        """Weights of `BLOCK` queries at a time over the keys they may see: (weights, segment of keys, query rows)."""
        b, _, s, _ = q.shape
        count = torch.full((b, 1), s, dtype=torch.int32, device=q.device)
        for start in range(0, max(s, 1), BLOCK):
            rows = slice(start, min(start + BLOCK, s))
            part = Segment({k: Dense(v[:, :, : rows.stop]) for k, v in own.items()}, Slots(count))
            keys = torch.arange(rows.stop, device=q.device)
            mask = (keys <= keys[rows, None])[None, None]  # left-aligned: no real query sees padding
            logits = self.logits(q[:, :, rows], part, asked.rows(rows), places.rows(slice(0, rows.stop)))
            (weights,) = self.weigh([logits], [mask], [None])
            yield weights, part, rows

    def linear_flops(self, tokens: int) -> int:
        """Of `project` and `combine`: each linear map sees each token once."""
        return 2 * tokens * sum(m.in_features * m.out_features for m in self.modules() if isinstance(m, nn.Linear))

    def logit_flops(self, queries: int, segment: Segment) -> int:
        """Of `logits` over a segment, per user."""
        return segment.fields["keys"].flops(queries)

    def attend_flops(self, queries: int, segment: Segment) -> int:
        """Of `logits` and `mix` over a segment, per user."""
        return sum(vectors.flops(queries) for vectors in segment.fields.values())

    def causal_pairs(self, slots: int) -> int:
        """Pairs of query and key that `causal` multiplies."""
        return block_pairs(slots)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """[B, M, heads x D] -> [B, heads, M, D]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def each_stores(blocks: Iterable[Block], table: Tensor) -> Iterator[tuple[Block, Segment]]:
    """Each layer and what it stores of one token; table [n, d]: of embeddings."""
    for block in blocks:
        own = block.project(table.new_zeros(1, 1, table.shape[1]))[1]
        yield block, Segment({k: Dense(v) for k, v in own.items()}, None)


def block_pairs(slots: int) -> int:
    """Pairs of query and key that `causal_blocks` multiplies."""
    ends = [min(start + BLOCK, slots) for start in range(0, slots, BLOCK)]
    return sum((end - start) * end for start, end in zip([0, *ends], ends))


class Known(dict[Block, tuple[Tensor, dict[str, Tensor], Tensor | None]]):
    """What blocks make of the same tokens, whatever state they read: those that nothing was read before."""

    def __call__(self, block: Block, x: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """`block.project` of x [B, M, d], the same at each call."""
        if block not in self:
            self[block] = block.project(x)
        return self[block]

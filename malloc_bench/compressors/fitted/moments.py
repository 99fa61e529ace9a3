"""Slots that another method keeps, and the moments of those that it does not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from malloc_bench.compressors.base import Sources, as_compressor, grows
from malloc_bench.compressors.fitted.fitting import Asking, pair, split, without_slots
from malloc_bench.compressors.fitted.solving import rows_of
from malloc_bench.compressors.selection import TokenMethod
from malloc_bench.compressors.sizing import Layout
from malloc_bench.registry import register
from malloc_bench.state import Dense, MicroScaled, Prefill, Probes, Segment, Stats, UserState, Vectors, microscaled

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone

About = Literal["query", "zero"]
_NOTHING = -1e4  # a logit
_LEAST = 1e-9  # of all weight: of less a difference of sums says nothing, and nothing is read
_SCALE = 2  # bytes of a vector, beside one a head and field


class Part(NamedTuple):
    """Some slots: logits where they are expanded and how many events each is, [B, H, 1, S], keys and values."""

    logits: Tensor
    counts: Tensor
    keys: Tensor
    values: Tensor


@register("moments")
@dataclass(frozen=True)
class Moments(Asking, TokenMethod):
    """Beside the slots that `inner` keeps a memory of all others, as they answer to first order in the query.

    inner: a method that keeps slots as they are, a name or {name: {parameter: value}}. rank: of the matrix that answers
    to the query. about: where it is expanded, at the mean "query" of probes, or at "zero" as in the paper, whose
    moments are those of plain means. With SiLU, which no count normalises, the mixture itself is expanded. The memory
    is written in 8 bits, whatever writes the slots. probes, which, horizon: as in `fit_recent`.
    """

    inner: Any = "snapkv"
    rank: int = 2
    about: About = "query"
    probes: int = 16
    which: str = "drawn"
    horizon: int | tuple[int, ...] = (0,)

    grid = {"rank": (0, 1, 2, 4), "about": get_args(About)}
    family = "fitted"
    paper = "MomentKV, arXiv 2606.01563; about the mean query: ours"
    formula = (
        "rest: weight n exp(a.mu_k), answer mu_v + S_vk a, S_vk = E (v - mu_v)(k - mu_k)' to rank r; about q0 events "
        "count by exp(q0.k), and a - q0 stands for a; SiLU: sum of silu(z0) v + silu'(z0) v k'(a - q0)"
    )
    growth = grows(compress="p n L d + n L d^2")
    stores = "what the inner method keeps; a layer and head one vector, r pairs of vectors and, with softmax, a key"
    remembers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        inner = as_compressor(self.inner)
        object.__setattr__(self, "inner", inner)
        plain = isinstance(inner, TokenMethod) and inner.even and inner.family in ("eviction", "windowing")
        if not plain or self.rank < 0 or self.about not in get_args(About):
            raise ValueError(
                "moments: an inner method that keeps slots as they are and divides nothing, rank >= 0 and about "
                f"{' or '.join(get_args(About))} are needed, not {self}"
            )

    @property
    def needs(self) -> Stats:
        return super().needs | self.inner.needs

    def supports(self, backbone: "Backbone") -> str | None:
        if getattr(backbone.config, "search", "none") != "none":
            return f"moments are of all that is not kept, {backbone.name} reads what it has searched for"
        return self.inner.supports(backbone) or without_slots(backbone)

    def layout(self, prefill: Prefill) -> Layout:
        plain, weighs = self.inner.layout(prefill), prefill.probes(0, self.ask).normalised
        fixed = 0
        for (_, heads, depth), (_, _, wide) in split(plain.vectors):
            rank = min(self.rank, depth)
            fixed += heads * ((weighs + rank) * (depth + _SCALE) + (1 + rank) * (wide + _SCALE))
            fixed += heads * (5 * weighs + 1 + 2 * (self.rank > 0))
        return replace(plain, fixed=fixed)

    def keep(self, prefill: Prefill, k: Tensor) -> UserState:
        kept = self.inner.keep(prefill, k)
        layers = ((*own, self._memory(prefill, layer, own[0])) for layer, own in enumerate(kept.layers))
        return replace(kept, layers=tuple(layers))

    def _memory(self, prefill: Prefill, layer: int, kept: Segment) -> Segment:
        """Of a layer's slots that are not among the kept ones, and of what an earlier memory stands for."""
        probes, whole = prefill.probes(layer, self.ask), prefill.segment(layer)
        heads = pair(whole)[0].shape[1]
        before = next((segment.fields for segment in prefill.state.layers[layer] if segment.slots is None), None)
        asking = rows_of(probes.asking().double(), heads).mean(2, keepdim=True)  # [B, H, 1, D]
        centre = asking if self.about == "query" else torch.zeros_like(asking)
        assert whole.slots is not None and kept.slots is not None
        some = (whole.slots.count > kept.slots.count).expand(-1, heads)[..., None, None] | (before is not None)
        parts = [self._part(probes, segment, asking) for segment in (whole, kept)]
        if probes.normalised:
            answer, matrix, fields = _tilted(parts, centre, before)
            some = some & (fields["part"] > _LEAST)
        else:
            (answer, matrix), fields = _bent(parts, centre, before, probes.normaliser), {}
        made: dict[str, Vectors] = {}
        if self.rank:
            made["asks"], made["answers"] = _factors(torch.where(some, matrix, 0.0), self.rank)
            answer = answer - centre @ made["asks"].dense().double().mT @ made["answers"].dense().double()
        if fields:
            made["key"] = _coded(torch.where(some, fields["key"], 0.0))
            logit = fields["logit"] - centre @ made["key"].dense().double().mT
            made["weight"] = Dense(torch.where(some, logit, _NOTHING).float())
        return Segment({"constant": _coded(torch.where(some, answer, 0.0)), **made}, None)

    def _part(self, probes: Probes, segment: Segment, asking: Tensor) -> Part:
        """asking: [B, H, 1, D], the probes' mean query."""
        assert segment.slots is not None
        keys, values = (x.dense().double() for x in pair(segment))
        logits = rows_of(probes.logits(segment).double(), keys.shape[1]).mean(2, keepdim=True)
        if self.about == "zero":
            logits = logits - asking @ keys.mT  # a bias is left
        counts = segment.slots.mask(segment.width).double()
        if segment.slots.mass is not None:
            counts = counts * segment.slots.mass
        return Part(logits, counts.unsqueeze(2).expand(-1, keys.shape[1], -1, -1), keys, values)

    def flops(self, state: UserState, of: Sources) -> int:
        """Logits of probes over all slots and kept ones, the sums of both, and the factors."""
        total = super().flops(state, of)
        for x, (kept, *_, memory) in zip(of, state.layers):
            (_, h, k, d), (_, _, _, wide) = (each.shape for each in pair(kept))
            slots, softmax = x.events + k, "weight" in memory.fields
            total += 2 * self.probes * x.asking * slots * d
            total += 2 * h * slots * (d * wide + wide + d * softmax)
            total += 2 * h * slots * d * (self.about == "zero") + 2 * h * d * wide * softmax
            if self.rank:
                total += h * (2 * wide * d * d + 9 * d**3 + 2 * min(self.rank, d) * (wide * d + d + wide))
            total += 2 * h * d * softmax
        return total


def _tilted(
    parts: Sequence[Part], centre: Tensor, before: Mapping[str, Vectors] | None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Of slots that are in the first part and not in the second, of softmax: the mean of values [B, H, 1, D'], that of
    value x key' about both means [B, H, D', D], `key`, the mean of keys, `logit`, that of all at the centre, and
    `part`, theirs of the weight of all slots.

    before: a memory that counts too. Sums are of all less those of the kept.
    """
    whole = parts[0]
    most = torch.where(whole.counts > 0, whole.logits, -1e30).amax(-1, keepdim=True) if whole.logits.numel() else 0.0
    if before is not None:
        key, weight = (before[name].dense().double() for name in ("key", "weight"))
        earlier = weight + centre @ key.mT
        most = earlier.maximum(most if isinstance(most, Tensor) else earlier)
    sums = []
    for part in parts:
        w = part.counts * (part.logits - most).clamp(max=80).exp()
        sums.append((w.sum(-1, keepdim=True), w @ part.keys, w @ part.values, (part.values * w.mT).mT @ part.keys))
    total, keys, values, both = (all_of_it - of_kept for all_of_it, of_kept in zip(*sums))
    if before is not None:
        known, told, matrix = (earlier - most).exp(), *_first_order(before, centre)
        total, keys, values = total + known, keys + known * key, values + known * told
        both = both + known * (matrix + told.mT @ key)
    part, total = total / sums[0][0].clamp(min=1e-300), total.clamp(min=1e-300)
    key, value = keys / total, values / total
    return value, both / total - value.mT @ key, {"key": key, "logit": most + total.log(), "part": part}


def _bent(
    parts: Sequence[Part], centre: Tensor, before: Mapping[str, Vectors] | None, normaliser: float
) -> tuple[Tensor, Tensor]:
    """As `_tilted`, of SiLU: the sum of silu(z) v, and of its slopes, value x key'."""
    sums = []
    for z, counts, keys, values in parts:
        gate = torch.sigmoid(z)
        slopes = counts * gate * (1 + z * (1 - gate)) / normaliser
        sums.append((counts * z * gate / normaliser @ values, (values * slopes.mT).mT @ keys))
    answer, matrix = (all_of_it - of_kept for all_of_it, of_kept in zip(*sums))
    if before is not None:
        told, slope = _first_order(before, centre)
        answer, matrix = answer + told, matrix + slope
    return answer, matrix


def _first_order(memory: Mapping[str, Vectors], centre: Tensor) -> tuple[Tensor, Tensor]:
    """What a memory answers at the centre, [B, H, 1, D'], and its slope [B, H, D', D]."""
    known = {name: x.dense().double() for name, x in memory.items()}
    constant = known["constant"]
    if "asks" not in known:
        return constant, constant.mT @ torch.zeros_like(centre)
    matrix = known["answers"].mT @ known["asks"]
    return constant + centre @ matrix.mT, matrix


def _factors(matrix: Tensor, rank: int) -> tuple[MicroScaled, MicroScaled]:
    """asks [B, H, R, D] and answers [B, H, R, D'] of which matrix [B, H, D', D] is answers' asks, as near as can be."""
    basis = torch.linalg.eigh(matrix.mT @ matrix)[1][..., -rank:].flip(-1)  # [B, H, D, R]
    return _coded(basis.mT), _coded((matrix @ basis).mT)


def _coded(x: Tensor) -> MicroScaled:
    """Vectors [B, H, R, D] in 8 bits each, with scales of their own."""
    every = torch.ones_like(x[..., 0], dtype=torch.bool)
    return microscaled(x.float(), every, 8)

"""All layers and heads of an event turned together, rounded to one step and entropy coded."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from malloc_bench.compressors.base import Encoder, Sources, grows
from malloc_bench.compressors.sizing import Budget, Layout
from malloc_bench.registry import register
from malloc_bench.state import (
    Basis,
    Codebook,
    Fitted,
    Frequencies,
    FromCodebook,
    Prefill,
    Sample,
    Segment,
    Turned,
    UserState,
    frequencies,
    streamed,
)

if TYPE_CHECKING:
    from malloc_bench.backbones import Backbone


@register("kvtc")
@dataclass(frozen=True)
class KVTC(Encoder):
    """Transform coding: principal components over all layers and heads, keys and values apart, fitted to training
    users; coefficients are rounded to a common step and sent through a range coder.

    bits: the mean length of a number's code among training users. An equal step for all coefficients is the best
    division of bits behind an entropy coder; the paper divides fixed widths by dynamic programming before DEFLATE, and
    exempts sinks and the newest 128 tokens, more than most histories have. Where layers or heads keep slots of their
    own, these are coded side by side in their order. Codes lie within 127 steps of the mean.
    """

    bits: float = 1.0

    family = "quantization"
    paper = "KVTC, Staniszewski and Lancucki, KV Cache Transform Coding, arXiv 2511.01815"
    formula = "code_j = round(u_j.(x - mean) / step), x all layers' and heads' keys (or values) of a slot"
    growth = grows(memory="r n + r L d", compress="r n L d", read="r n L + r L d")
    stores = "one stream of 32-bit words for the keys of all layers and one for values; fixed bytes: bases and tables"
    measured: ClassVar[bool] = True
    fit_fields = ("bits",)

    def __post_init__(self) -> None:
        if not 0 < self.bits <= 6:
            raise ValueError(f"kvtc: bits above 0 and at most 6 are needed, not {self.bits}")

    def supports(self, backbone: "Backbone") -> str | None:
        return None if backbone.has_slots else f"kvtc turns all layers of a slot together, {backbone.name} has none"

    def fit(self, sample: Any, budget: Budget | None = None) -> Fitted:
        assert isinstance(sample, Sample)
        found: dict[str, Tensor] = {}
        for stack, (layers, names) in enumerate(_stacks(next(iter(sample)))):
            for name in names:
                x = torch.cat([each for i in layers for each in sample.vectors[i, name]], 1).double()  # [N, sum of D]
                mean = x.mean(0) if len(x) else x.sum(0)
                rows = torch.linalg.eigh((x - mean).T @ (x - mean)).eigenvectors.flip(-1).T
                codes, step = _rounded((x - mean) @ rows.T, self.bits * x.shape[1])
                rank = int((codes != 0).any(0).nonzero().max()) + 1 if bool(codes.any()) else 1
                most = int(codes[:, :rank].abs().max()) + 1 if len(x) else 1
                seen = torch.stack([(codes[:, :rank] == c).sum(0) for c in range(-most, most + 1)], -1)
                parts = {"mean": mean, "rows": rows[:rank], "step": step, "shares": frequencies(seen)}
                found |= {f"{stack}.{name}.{part}": value.float() for part, value in parts.items()}
        return Fitted(found)

    def write(self, prefill: Prefill) -> UserState:
        assert prefill.fitted is not None
        made: dict[tuple[int, str], Turned] = {}
        for stack, (layers, names) in enumerate(_stacks(prefill)):
            counts = [prefill.slots(i).count for i in layers]
            if any(bool((c != counts[0][:, :1]).any()) for c in counts):
                raise ValueError("kvtc needs as many slots in every layer and head")
            for name in names:
                fit = {part: prefill.fitted.of(stack, name, f".{part}") for part in ("mean", "rows", "step", "shares")}
                fields = [prefill.segment(i).fields[name].dense().float() for i in layers]
                wide = torch.cat([x.transpose(1, 2).flatten(2) for x in fields], -1)
                coefficients = ((wide - fit["mean"].to(wide)) @ fit["rows"].to(wide).T).unsqueeze(1)
                made |= self._turned(fields, coefficients, counts[0][:, :1], fit, layers, name)
        state = prefill.state
        layers_ = (
            (Segment({name: made[i, name] for name in prefill.segment(i).fields}, prefill.slots(i)),)
            for i in prefill.layers
        )
        return UserState(tuple(layers_), state.length, state.events)

    def _turned(
        self, fields: list[Tensor], x: Tensor, count: Tensor, fit: dict[str, Tensor], layers: list[int], name: str
    ) -> dict[tuple[int, str], Turned]:
        rank, size = fit["shares"].shape
        most, step = size // 2, fit["step"].to(x)
        levels = (torch.arange(size, device=x.device) - most) * step
        book = Codebook(levels.view(1, 1, size, 1).expand(1, rank, size, 1), 8, rank, added=False)
        codes = (x / step).round().clamp(-most, most) + most
        left = streamed(FromCodebook(codes.byte(), book), count, Frequencies(fit["shares"][None]))
        out, at = {}, 0
        for layer, field in zip(layers, fields):
            _, heads, _, width = field.shape
            part = slice(at, at + heads * width)
            at += heads * width
            rows = fit["rows"][:, part].unflatten(1, (heads, width)).transpose(0, 1).contiguous()
            out[layer, name] = Turned(left, Basis(fit["mean"][part].view(heads, width), rows))
        return out

    def cost(self, layout: Layout, n: Tensor, length: Tensor) -> Tensor:
        numbers = sum(heads * width for _, heads, width in layout.vectors)
        return layout.beside(n, length) + (n * numbers * self.bits / 8).long()

    def flops(self, state: UserState, of: Sources) -> int:
        """Every coefficient a product with all of a slot's numbers."""
        return sum(2 * h * s * d * v.basis.rows.shape[1] for v in _fields(state) for _, h, s, d in [v.shape])


def _fields(state: UserState) -> Iterator[Turned]:
    yield from (v for s in state.segments() for v in s.fields.values() if isinstance(v, Turned))


def _stacks(prefill: Prefill) -> Iterator[tuple[list[int], list[str]]]:
    """The layers of each stack, and the fields that they have."""
    depth = len(prefill.layers) // prefill.stacks
    for first in range(0, len(prefill.layers), depth):
        yield list(range(first, first + depth)), list(prefill.segment(first).fields)


def _rounded(x: Tensor, bits: float) -> tuple[Tensor, Tensor]:
    """Coefficients [N, R] as integers, and the step that makes a row's codes `bits` long in the mean."""
    low = (x.abs().amax() if x.numel() else x.new_ones(())).clamp(min=1e-30) / 126  # codes of training users fit
    high = 1e3 * low
    for _ in range(50):
        step = (low * high).sqrt()
        codes = (x / step).round().clamp(-126, 126)
        low, high = (step, high) if _length(codes) > bits else (low, step)
    return (x / high).round().clamp(-126, 126), high


def _length(codes: Tensor) -> float:
    """Entropy of a row of codes [N, R] in bits, each column by itself."""
    places = 253 * torch.arange(codes.shape[1], device=codes.device)
    seen = torch.bincount((codes.long() + 126 + places).flatten()).double()
    share = seen[seen > 0] / max(len(codes), 1)
    return -float((share * share.log2()).sum())

"""Codes that come often get short words."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from malloc_bench.compressors.base import Encoder, Sources, as_compressor, map_layers, together
from malloc_bench.compressors.sizing import Budget, Layout
from malloc_bench.registry import register
from malloc_bench.state import (
    Fitted,
    Frequencies,
    Prefill,
    Sample,
    Segment,
    Stats,
    Streamed,
    UserState,
    coding,
    frequencies,
    integers,
    streamed,
    under,
)

if TYPE_CHECKING:
    from torch import Tensor

    from malloc_bench.backbones import Backbone


@register("entropy")
@dataclass(frozen=True)
class Entropy(Encoder):
    """Sends the integer codes of another encoder through a range coder: smaller, and read alike to the last bit.

    inner: an encoder that writes codes. The coder's tables, one for each layer, field, head and place in the vector,
    are how often training users have each code. Bytes are the coder's own, so they differ from user to user: behind a
    token method the number of slots that fits is found by coding. A read decodes all codes first, one after another.
    """

    inner: Any = "int4_token"

    family = "quantization"
    paper = "range coding, Martin 1979, by the library constriction (Bamler, arXiv 2201.01741)"
    formula = "a code of share p among training users takes -log2 p bits"
    stores = "a stream of 32-bit words and its length for each layer and field, and the inner encoder's scales"
    measured: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "inner", as_compressor(self.inner))
        if not isinstance(self.inner, Encoder) or self.inner.takes_budget:
            raise ValueError(f"entropy: an inner encoder is needed, not {self.inner}")

    @property
    def by_field(self) -> bool:  # type: ignore[override]
        return self.inner.by_field

    @property
    def needs(self) -> Stats:
        return self.inner.needs

    def supports(self, backbone: "Backbone") -> str | None:
        return self.inner.supports(backbone)

    def fit(self, sample: Any, budget: Budget | None = None) -> Fitted:
        assert isinstance(sample, Sample)
        parts = {"inner": self.inner.fit(sample, budget)} if self.inner.fit_parts() else {}
        seen: dict[str, Tensor] = {}
        for prefill in sample:
            state = together(self.inner.write(prefill.given(parts.get("inner"))))
            for layer, (segment,) in enumerate(state.layers):
                for name, vectors in segment.fields.items():
                    codes, size = integers(vectors), 2 ** coding(vectors)[0]
                    real = segment.real(codes).expand(codes.shape[:3])
                    each = torch.stack([_counts(codes[:, h][real[:, h]], size) for h in range(codes.shape[1])])
                    seen[f"{layer}.{name}"] = seen.get(f"{layer}.{name}", 0) + each
        tables = Fitted({name: frequencies(counts) for name, counts in seen.items()})
        return Fitted.joined({**parts, "tables": tables})

    def write(self, prefill: Prefill) -> UserState:
        assert prefill.fitted is not None
        tables = prefill.fitted.part("tables")
        inner = prefill.fitted.part("inner") if self.inner.fit_parts() else None

        def vectors(layer: int, name: str, segment: Segment) -> Streamed:
            x = segment.fields[name]
            count = segment.real(x.dense()).sum(-1) if segment.slots is None else segment.slots.count
            return streamed(x, count, Frequencies(tables.of(layer, name)))

        return map_layers(together(self.inner.write(prefill.given(inner))), vectors)

    def flops(self, state: UserState, of: Sources) -> int:
        """What the inner encoder costs."""
        return super().flops(map_layers(state, lambda layer, name, s: under(s.fields[name], Streamed)), of)

    def cost(self, layout: Layout, n: "Tensor", length: "Tensor") -> "Tensor":
        """What the inner encoder takes: about the most; `measured` says that it is not exact."""
        return self.inner.cost(layout, n, length)


def _counts(codes: "Tensor", size: int) -> "Tensor":
    """How often each of `size` codes comes in each column of codes [N, M]: [M, size]."""
    return torch.zeros(codes.shape[1], size, dtype=torch.long, device=codes.device).scatter_add_(
        1, codes.T.long(), torch.ones_like(codes.T, dtype=torch.long)
    )

"""Not one bit lost: what a general-purpose coder makes of the bytes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from malloc_bench.compressors.base import Encoder, Sources, as_compressor, map_layers
from malloc_bench.compressors.sizing import Layout
from malloc_bench.registry import register
from malloc_bench.state import Prefill, Segment, Stats, UserState, Vectors, Zipped, zipped

if TYPE_CHECKING:
    from torch import Tensor

    from malloc_bench.backbones import Backbone


@register("zstd")
@dataclass(frozen=True)
class Zstd(Encoder):
    """Sends the stored vectors through zstd: the anchor of what is free, for nothing is read otherwise.

    inner: an encoder whose arrays go through it; None: float32. level: of zstd, 1 to 22. Bytes are the coder's own, so
    they differ from user to user, and from one of its releases to the next; a read unpacks all vectors first.
    """

    inner: Any = None
    level: int = 3

    family = "quantization"
    paper = "Zstandard, RFC 8878, as pyarrow has it"
    formula = "zstd of an array's bytes, the first bytes of all its numbers first, then the second ones ..."
    stores = "for each layer and field a frame and its length (int32) an array, and the length of all (int32)"
    grid: ClassVar = {"level": [3, 19]}
    measured: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 1 <= self.level <= 22:
            raise ValueError(f"zstd: level must be 1 to 22, not {self.level}")
        if self.inner is not None:
            object.__setattr__(self, "inner", as_compressor(self.inner))
            if not isinstance(self.inner, Encoder) or self.inner.takes_budget or self.inner.fit_parts():
                raise ValueError(f"zstd: an inner encoder that learns nothing is needed, not {self.inner}")

    @property
    def by_field(self) -> bool:  # type: ignore[override]
        return self.inner is None or self.inner.by_field

    @property
    def needs(self) -> Stats:
        return Stats() if self.inner is None else self.inner.needs

    def supports(self, backbone: "Backbone") -> str | None:
        return None if self.inner is None else self.inner.supports(backbone)

    def write(self, prefill: Prefill) -> UserState:
        def vectors(layer: int, name: str, segment: Segment) -> Zipped:
            count = None if segment.slots is None else segment.slots.count
            return zipped(segment.fields[name], count, self.level)

        return map_layers(prefill.state if self.inner is None else self.inner.write(prefill), vectors)

    def flops(self, state: UserState, of: Sources) -> int:
        """What the inner encoder costs."""
        return super().flops(map_layers(state, lambda layer, name, s: _bare(s.fields[name])), of)

    def cost(self, layout: Layout, n: "Tensor", length: "Tensor") -> "Tensor":
        """What is sent through it: about the most; `measured` says that it is not exact."""
        return layout.dense(n, length) if self.inner is None else self.inner.cost(layout, n, length)


def _bare(vectors: Vectors) -> Vectors:
    return vectors.bare if isinstance(vectors, Zipped) else vectors

"""Few bits a number and two bytes a vector beside them, for states of few slots."""

from dataclasses import dataclass, field, replace

from torch import Tensor

from malloc_bench.compressors.base import Encoder, map_vectors, shortened
from malloc_bench.compressors.sizing import Layout
from malloc_bench.registry import register
from malloc_bench.state import MicroScaled, Segment, UserState, microscaled


@register("mxint")
@dataclass(frozen=True)
class MXInt(Encoder):
    """Writes every vector in `bits` bits a number, a byte of scale and one of zero point; positions in 16 bits,
    masses in bfloat16 and times in 32 bits.

    Where a state keeps few slots, what stands beside the codes weighs as much as they do: `int4_token` pays 4 bytes a
    vector, 4 for each position and mass, and 8 for a time. The formats that this is named after have blocks of 32
    numbers, powers of two and no zero point; here a block is a vector of a head, a scale has 8 steps an octave below an
    exponent that a head's vectors share, and of four the best is taken for each vector. value_bits: of values, where
    they are not the same as those of keys.

    Raises ValueError for histories of more than 32,768 events, and for times before 1970 or after 2106.
    """

    bits: int = 4
    value_bits: int | None = field(default=None, metadata={"unsaid": None})

    version_placed = 2
    grid = {"bits": (2, 3, 4, 8), "value_bits": (None, 4)}
    family = "quantization"
    paper = "Rouhani et al., OCP Microscaling Formats (MX), 2023, and arXiv 2310.10537; finer scales are ours"
    formula = "x ~ s (code - (2^bits - 1 - zero) / 2), s = 2^(top - byte / 8) of the least squared error"
    stores = "codes and 2 bytes a vector, 1 a head and field; positions in int16, masses in bfloat16, times in uint32"

    def __post_init__(self) -> None:
        for bits in (self.bits, self._bits("values")):
            if not 1 <= bits <= 8:
                raise ValueError(f"mxint: 1 to 8 bits are needed, not {bits}")

    def _bits(self, name: str) -> int:
        return self.bits if name != "values" or self.value_bits is None else self.value_bits

    def encode(self, state: UserState) -> UserState:
        def vectors(name: str, segment: Segment) -> MicroScaled:
            x = segment.fields[name].dense()
            return microscaled(x, segment.real(x), self._bits(name))

        return shortened(map_vectors(state, vectors))

    def cost(self, layout: Layout, n: Tensor, length: Tensor) -> Tensor:
        slot = sum(heads * (-(-width * self._bits(name) // 8) + 2) for name, heads, width in layout.vectors)
        tops = sum(heads for _, heads, _ in layout.vectors)
        return replace(layout, index=2, moment=4).beside(n, length) + tops + n * slot

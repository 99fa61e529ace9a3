"""Four bits a number, one scale a vector."""

from dataclasses import dataclass

from torch import Tensor

from malloc_bench.compressors.base import Encoder, map_vectors
from malloc_bench.compressors.sizing import Layout
from malloc_bench.registry import register
from malloc_bench.state import Quantized, Segment, UserState, quantize


@register("int4_token")
@dataclass(frozen=True)
class Int4Token(Encoder):
    """Writes every key and value vector in 4 bits with a scale and a zero point of its own.

    Where few slots are kept this is far cheaper than `kivi`, whose keys share scales along slots: a group of slots that
    is not full still pays for a scale and a zero point a channel.
    """

    family = "quantization"
    paper = "per-token asymmetric rounding, as KIVI (arXiv 2402.02750) has it for values; for keys too"
    formula = "code = round(15 (x - min) / (max - min)), min and max over one slot and head"
    stores = "4-bit codes, a float16 scale and zero point per vector (float32 where that loses digits)"

    def encode(self, state: UserState) -> UserState:
        def vectors(name: str, segment: Segment) -> Quantized:
            x = segment.fields[name].dense()
            return quantize(x, segment.real(x), 4, x.shape[3], "width")

        return map_vectors(state, vectors)

    def cost(self, layout: Layout, n: Tensor, length: Tensor) -> Tensor:
        per_slot = sum(heads * (-(-width // 2) + 4) for _, heads, width in layout.vectors)
        flags = sum(heads for _, heads, _ in layout.vectors)
        return layout.beside(n, length) + flags + n * per_slot

"""Eight bits a number, one scale a vector."""

from dataclasses import dataclass

from torch import Tensor

from malloc_bench.compressors.base import Encoder, map_vectors
from malloc_bench.compressors.sizing import Layout
from malloc_bench.registry import register
from malloc_bench.state import Quantized, Segment, UserState, quantize


@register("int8")
@dataclass(frozen=True)
class Int8(Encoder):
    """Writes every key and value vector in 8 bits with one scale: symmetric absmax rounding."""

    family = "quantization"
    paper = "vector-wise int8 as in LLM.int8(), Dettmers et al., NeurIPS 2022, arXiv 2208.07339"
    formula = "code = round(127 x / max|x|), one scale per slot and head"
    stores = "int8 codes and a float16 scale per vector (float32 where that loses digits)"

    def encode(self, state: UserState) -> UserState:
        def vectors(name: str, segment: Segment) -> Quantized:
            x = segment.fields[name].dense()
            return quantize(x, segment.real(x), 8, x.shape[3], "width", symmetric=True)

        return map_vectors(state, vectors)

    def cost(self, layout: Layout, n: Tensor, length: Tensor) -> Tensor:
        per_slot = sum(heads * (width + 2) for _, heads, width in layout.vectors)
        flags = sum(heads for _, heads, _ in layout.vectors)
        return layout.beside(n, length) + flags + n * per_slot

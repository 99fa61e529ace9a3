"""A vector is a size in one byte and a shape in a few codes, for states of few slots."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from malloc_bench.compressors.base import Sources, grows, shortened
from malloc_bench.compressors.quantization.rvq import RVQ
from malloc_bench.compressors.sizing import Layout
from malloc_bench.registry import register
from malloc_bench.state import Codebook, FromCodebook, Prefill, Scaled, UserState, checked, sized


@register("gain_shape")
@dataclass(frozen=True)
class GainShape(RVQ):
    """Gain-shape vector quantization: of each vector a byte of size, 8 steps an octave below an exponent that a head's
    vectors share, and the sum of `stages` entries, one from each codebook of unit vectors.

    The codebooks are `rvq`'s, of training users' events brought to one size: slots that stand for many events, as those
    of `fitted` methods behind a backbone without a normaliser, hold what is far larger than an event. beam: sums that
    are held after each stage, each tried with its two nearest entries; the nearest in the end is taken, and the size
    then is what makes it nearest. Positions take 16 bits, masses and times what they take with `mxint`.

    Raises ValueError as `mxint` for histories and times that have no room.
    """

    stages: int = 12
    beam: int = 4

    each: ClassVar[int] = 128  # late stages learn little of few vectors that other users have a use for
    grid = {"stages": (4, 8, 12, 16)}
    paper = (
        "Gersho and Gray, Vector Quantization and Signal Compression, 1992, chapter 12; beams as in Babenko and "
        "Lempitsky, Additive Quantization, CVPR 2014"
    )
    formula = "x ~ 2^(top - byte / 8) * sum over stages of an entry; the shape nearest to x / |x| among those held"
    growth = grows(memory="n L", compress="b c n L d", read="n L d")
    stores = "`stages` codes of `bits` bits and 1 byte a vector, 1 a head and field; fixed bytes: the codebooks"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beam < 1:
            raise ValueError(f"gain_shape: a beam of at least 1 is needed, not {self.beam}")

    def tables(self, x: Tensor) -> Tensor:
        return super().tables(_unit(x))

    def write(self, prefill: Prefill) -> UserState:
        return shortened(super().write(prefill))

    def written(self, x: Tensor, mask: Tensor, book: Codebook) -> Scaled:
        x = torch.where(mask.unsqueeze(-1), checked(x.float(), mask), 0.0)
        most = x.abs().amax(3, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        shape = FromCodebook.of(_unit(x), mask, book, self.beam)
        read = shape.dense()
        gain = (x / most * read).sum(3, keepdim=True) / read.square().sum(3, keepdim=True).clamp(min=1e-12)
        scale, top = sized(most * gain.clamp(min=0), mask)
        return Scaled(shape, scale, top)

    def cost(self, layout: Layout, n: Tensor, length: Tensor) -> Tensor:
        heads = sum(heads for _, heads, _ in layout.vectors)
        return super().cost(replace(layout, index=2, moment=4), n, length) + heads * (n + 1)

    def flops(self, state: UserState, of: Sources) -> int:
        """All sums that are held after a stage against each entry of the next."""
        shapes = (v.shape for segment in state.segments() for v in segment.fields.values())
        tried = 1 + (self.stages - 1) * self.beam
        return sum(2 * h * s * tried * d * 2**self.bits for _, h, s, d in shapes)


def _unit(x: Tensor) -> Tensor:
    """Rows with a root mean square of 1; of nothing nothing."""
    x = x / x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    return x / x.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6)

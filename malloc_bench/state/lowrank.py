"""Vectors as the product of two thin factors, absorbed into the query: they are never multiplied out to be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from malloc_bench.kernels import Affine, Thin
from malloc_bench.state.quantized import pack_bits, unpack_bits
from malloc_bench.state.vectors import Ragged, Read, Vectors, all_rows


@dataclass(frozen=True, eq=False)
class Factor(Vectors):
    """The factor with a row for each slot, which several `LowRank` may share: scale times data.

    data: [B, H', S, R] float16 or float32, or codes of `bits` bits packed along the ranks, with bytes behind them up to
        a whole vector (see `_filled`); H' = 1 where all heads share it.
    rank: [B, H' or 1] int32, how many columns count, at most `most`.
    scale: [B, H' or 1] float32: data lies within -1 and 1, so that float16 holds it.
    size: [B, H', 1, R] float16, what a column of codes, and the row of codes that it meets, is multiplied by.
    """

    data: Tensor
    rank: Tensor
    scale: Tensor
    most: int
    bits: int | None = None
    size: Tensor | None = None

    @property
    def columns(self) -> int:
        return self.data.shape[3] if self.size is None else self.size.shape[3]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, h, s, _ = self.data.shape
        return b, h, s, self.columns

    def real(self, x: Tensor) -> Tensor:
        """x [B, H, M, R] with zeros at and beyond each user's rank: what stands there in the other factor counts 0."""
        ranks = torch.arange(self.columns, device=x.device) < self.rank[..., None, None]
        return torch.where(ranks, x, 0.0)

    def numbers(self) -> Tensor:
        """What `scale` multiplies, [B, H', S, R] float."""
        if self.size is None or self.bits is None:
            return self.data
        return _decoded(self.data, self.bits, self.columns) * self.size.float()

    def written(self) -> Affine | None:
        """The rows, 0 at and beyond each user's rank, where they are codes."""
        if self.size is None or self.bits is None:
            return None
        step = self.real(self.size.float()) * (self.scale[..., None, None] / (2 ** (self.bits - 1) - 1))
        return Affine(self.data, self.bits, self.columns, step, None, max(1, self.data.shape[2]), 1)

    def dense(self) -> Tensor:
        return self._scaled(self.numbers().float())

    def _dot(self, q: Tensor) -> Tensor:
        return self._scaled(q) @ self.numbers().mT.to(q.dtype)

    def _mix(self, w: Tensor) -> Tensor:
        return self._scaled(w @ self.numbers().to(w.dtype))

    def _scaled(self, x: Tensor) -> Tensor:
        return self.real(x) * self.scale[..., None, None].to(x.dtype)

    def parts(self, count: Tensor | None) -> Iterator[Ragged]:
        one = torch.ones(len(self.rank), 1, dtype=torch.long, device=self.rank.device)
        yield Ragged(self.rank[..., None, None], one, None, "scales")
        yield Ragged(self.scale[..., None, None], one, None, "scales")
        if self.size is not None:
            yield Ragged(self.size, one, self.rank, "scales")
        yield Ragged(self.data, all_rows(self.data) if count is None else count, self._stored(self.rank))

    def load(self, read: Read, count: Tensor | None) -> Factor:
        rank = read.numbers(self.rank, self.most, f"has a rank below 0 or above {self.most}")
        one = torch.ones(1, 1, dtype=torch.long)
        scale = read(self.scale[..., None, None], one).view(len(rank), self.scale.shape[1])
        size = None if self.size is None else read(self.size, one, rank)
        data = read(self.data, all_rows(self.data) if count is None else count, self._stored(rank))
        data = data if self.bits is None else _filled(data)
        return replace(self, data=data, rank=rank, scale=scale, size=size)

    def _stored(self, rank: Tensor) -> Tensor:
        """How many columns of data hold so many ranks."""
        return rank if self.bits is None else (rank * self.bits + 7) // 8


@dataclass(frozen=True, eq=False)
class LowRank(Vectors):
    """x = left @ right; left [B, H or 1, S, R], a part that others may share.

    right: [B, H, R, D], or codes of as many bits as the left factor's, packed along the width.
    """

    left: Factor
    right: Tensor
    width: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        b, h, _, _ = self.right.shape
        return b, h, self.left.shape[2], self.width

    @property
    def rank(self) -> Tensor:
        return self.left.rank

    def shared(self) -> tuple[Vectors, ...]:
        return (self.left,)

    def over(self, shared: tuple[Vectors, ...]) -> LowRank:
        (left,) = shared
        assert isinstance(left, Factor)
        return replace(self, left=left)

    def _right(self) -> Tensor:
        bits = self.left.bits
        return self.right if bits is None else _decoded(self.right, bits, self.width)

    def dense(self) -> Tensor:
        return self.left.dense() @ self._right().float()

    def written(self) -> Thin | None:
        left, bits = self.left.known(), self.left.bits
        if not isinstance(left, Affine) or bits is None:
            return None
        step = torch.full((1, 1, self.right.shape[2], 1), 1 / (2 ** (bits - 1) - 1), device=self.right.device)
        return Thin(left, Affine(self.right, bits, self.width, step, None, 1, self.width))

    def _dot(self, q: Tensor) -> Tensor:
        return self._each(q @ self._right().mT.to(q.dtype), self.left.dot)

    def _mix(self, w: Tensor) -> Tensor:
        return self._each(w, self.left.mix) @ self._right().to(w.dtype)

    def _each(self, x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        """x [B, H, M, K] times the left factor; where heads share it their queries lie in a row: no copies."""
        b, h, m, k = x.shape
        heads = self.left.shape[1]
        found = product(x.reshape(b, heads, h // heads * m, k))
        return found.reshape(b, h, m, found.shape[3])

    def flops(self, queries: int) -> int:
        _, heads, slots, width = self.shape
        return 2 * queries * heads * self.left.shape[3] * (slots + width)

    def dense_flops(self) -> int:
        _, heads, slots, width = self.shape
        return 2 * heads * slots * self.left.shape[3] * width

    def parts(self, count: Tensor | None) -> Iterator[Ragged]:
        yield Ragged(self.right, self.rank)

    def load(self, read: Read, count: Tensor | None) -> LowRank:
        return replace(self, right=read(self.right, self.rank))


def factor(x: Tensor, mask: Tensor, rank: Tensor, most: int, dtype: torch.dtype) -> Factor:
    """Rows x [B, H, S, R] as a factor of numbers of `dtype`; mask [B, H or 1, S], rank [B, H or 1], R <= most."""
    columns = torch.arange(x.shape[3], device=x.device) < rank[..., None, None]
    x = x.masked_fill(~(mask.unsqueeze(-1) & columns), 0)
    scale = x.abs().flatten(1).amax(1, keepdim=True) if x[0:1].numel() else x.new_ones(len(x), 1)
    scale = torch.where(scale > 0, scale, 1.0).float()
    return Factor((x / scale[..., None, None]).to(dtype), rank.to(torch.int32), scale, most)


def _filled(codes: Tensor) -> Tensor:
    """Bytes that count for nothing, up to a whole vector of them: a loop is compiled for each number of bytes."""
    return F.pad(codes, (0, -codes.shape[3] % 16))


def _encoded(x: Tensor, bits: int) -> Tensor:
    """x [..., D] within -1 and 1 as codes, packed."""
    half = 2 ** (bits - 1)
    return pack_bits((x * (half - 1)).round().add(half).byte(), bits)


def _decoded(codes: Tensor, bits: int, width: int) -> Tensor:
    half = 2 ** (bits - 1)
    return (unpack_bits(codes, bits, width).float() - half) / (half - 1)


def low_rank(
    x: Tensor, mask: Tensor, rank: Tensor, basis: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> LowRank:
    """Best approximation of x [B, H, S, D] of at most `rank` [B, H or 1] per user and head (Eckart-Young).

    basis: `principal(x, mask)` if it is known already, since it serves every rank.
    """
    return low_ranks([x], mask, rank, own=True, basis=basis, dtype=dtype)[0]


def low_ranks(
    fields: Sequence[Tensor],
    mask: Tensor,
    rank: Tensor,
    own: bool,
    basis: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    bits: int | None = None,
) -> list[LowRank]:
    """Best approximation of several fields, [B, H, S, D] each over the same slots, that share their left factor.

    own: each head has a left factor of its own (of all fields), else all heads share one.
    mask: [B, H or 1, S]. rank: [B, 1 or H]. basis: `principal(side_by_side(fields, own), mask)` if it is known.
    bits: of codes for both factors, None for numbers of `dtype`.
    """
    x = torch.where(mask.unsqueeze(-1), side_by_side(fields, own), 0.0)
    basis = principal(x, mask) if basis is None else basis
    width = min(max(int(rank.max()), 1) if rank.numel() else 1, basis.shape[3])
    basis, rank = basis[..., :width], rank.clamp(max=width)
    if basis.shape[2] == x.shape[3]:
        left, right = x @ basis, basis.mT
    else:  # the basis is of slots: rows of `right` are made as long as those of the other way, 1
        right = basis.mT @ x
        size = right.norm(dim=-1, keepdim=True)
        left, right = basis * size.mT, right / torch.where(size > 0, size, 1.0)
    columns = torch.arange(width, device=x.device) < rank[..., None, None]
    scale = (
        left.abs().masked_fill(~columns, 0).flatten(2).amax(2) if left.numel() else x.new_ones(len(x), rank.shape[1])
    )
    scale = scale.amax(1, keepdim=True) if rank.shape[1] == 1 else scale
    scale = torch.where(scale > 0, scale, 1.0).float()
    left = (left / scale[..., None, None]).masked_fill(~columns, 0)
    size = None
    if bits is not None:  # each column of `left` and row of `right` within -1 and 1; one number for both
        tall, long = left.abs().amax(2, keepdim=True) if left.numel() else left.new_ones(()), right.abs().amax(3, True)
        left, right = left / torch.where(tall > 0, tall, 1.0), right / torch.where(long > 0, long, 1.0)
        size = (tall * long.mT).half()
    rank, most = rank.to(torch.int32), x.shape[3]
    data = left.to(dtype) if bits is None else _filled(_encoded(torch.where(columns, left, -1.0), bits))
    shared = Factor(data, rank, scale, most, bits, size)
    out, at = [], 0
    for field in fields:
        _, heads, _, d = field.shape
        wide = d if own else heads * d
        part = right[..., at : at + wide]
        at += wide
        if not own:
            part = part[:, 0].unflatten(2, (heads, d)).transpose(1, 2)
        out.append(LowRank(shared, part.to(dtype).contiguous() if bits is None else _encoded(part, bits), d))
    return out


def side_by_side(fields: Sequence[Tensor], own: bool) -> Tensor:
    """Fields [B, H, S, D] as one matrix a user, [B, 1, S, sum of H D], or one for each head, [B, H, S, sum of D]."""
    wide = [x if own else x.transpose(1, 2).flatten(2).unsqueeze(1) for x in fields]
    return torch.cat(wide, -1).double()  # eigenvectors in float32 would round otherwise in another batch


def principal(x: Tensor, mask: Tensor) -> Tensor:
    """Singular vectors of x [B, H, S, D] as columns, the leading one first: right ones [B, H, D, D], or, where slots
    are fewer than channels, left ones [B, H, S, S].

    They are the eigenvectors of x'x or xx', cheaper than an SVD of x.
    """
    x = torch.where(mask.unsqueeze(-1), x, 0.0)
    gram = x @ x.mT if 0 < x.shape[2] < x.shape[3] else x.mT @ x
    gram = gram / gram.diagonal(dim1=-2, dim2=-1).amax(-1).clamp(min=1e-30)[..., None, None]
    return torch.linalg.eigh(gram).eigenvectors.flip(-1)  # eigenvalues come in rising order

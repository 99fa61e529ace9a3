"""Integer codes through an entropy coder: what is stored are the bytes that it wrote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from malloc_bench.state.codebook import FromCodebook
from malloc_bench.state.coded import Coded
from malloc_bench.state.patched import Over
from malloc_bench.state.quantized import Quantized, pack_bits, unpack_bits
from malloc_bench.state.vectors import Ragged, Read, Vectors, all_rows

WORD = 4  # bytes that the coder writes at a time


class Frequencies:
    """How often each code comes at each place of a vector, [H, M, K] float32, for all users: the coder's tables."""

    def __init__(self, shares: Tensor) -> None:
        self.shares = shares

    def __reduce__(self) -> tuple[type, tuple[Tensor]]:
        return Frequencies, (self.shares,)

    @cached_property
    def _models(self) -> list[list[Any]]:
        import constriction  # here: a coder is needed by few, and takes a moment to load

        kind = constriction.stream.model.Categorical
        return [[kind(row, perfect=False) for row in head] for head in self.shares.float().cpu().numpy()]

    def write(self, codes: Sequence[np.ndarray]) -> np.ndarray:
        """Codes of one user, [M, n] int32 a head -> words."""
        import constriction

        coder = constriction.stream.queue.RangeEncoder()
        for head, models in zip(codes, self._models):
            for row, model in zip(head, models):
                coder.encode(row, model)
        return coder.get_compressed().view(np.int32)

    def read(self, words: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
        """The inverse: counts, the vectors of each head; [M, n] a head."""
        import constriction

        coder = constriction.stream.queue.RangeDecoder(words.view(np.uint32))
        return [np.stack([coder.decode(model, n) for model in models]) for models, n in zip(self._models, counts)]


@dataclass(frozen=True, eq=False)
class Streamed(Over):
    """`base` with its codes in a stream, and decoded anew at each read.

    base: its codes have no columns. words: [B, 1, R, 1] int32, of which size [B, 1] int32 are a user's.
    count: [B, H] vectors of each head; not stored, the slots know it.
    """

    base: Vectors
    words: Tensor
    size: Tensor
    count: Tensor
    table: Frequencies

    def dense(self) -> Tensor:
        return self.decoded().dense()

    def decoded(self) -> Vectors:
        """`base` with its codes."""
        bits, many = coding(self.base)
        b, h, s, _ = self.shape
        codes = torch.zeros(b, h, s, many, dtype=torch.uint8)
        words, size, count = self.words[:, 0, :, 0].cpu().numpy(), self.size[:, 0].tolist(), self.count.tolist()
        for user in range(b):
            for head, found in enumerate(self.table.read(words[user, : size[user]], count[user])):
                codes[user, head, : count[user][head]] = torch.from_numpy(found.T.astype(np.uint8))
        return replace(self.base, codes=pack_bits(codes, bits).to(self.words.device))  # type: ignore[type-var]

    def parts(self, count: Tensor | None) -> Iterator[Ragged]:
        one = torch.ones(1, 1, dtype=torch.long, device=self.words.device)
        yield Ragged(self.size[..., None, None], one.expand(len(self.size), 1), None, "sizes")
        yield Ragged(self.words, self.size)

    def load(self, read: Read, count: Tensor | None) -> Streamed:
        most = torch.iinfo(torch.int32).max // WORD
        size = read.numbers(self.size, most, "has a stream of negative length").int()
        words = read(self.words, size)
        count = all_rows(self.words.new_zeros(1, 1, self.base.shape[2], 1)) if count is None else count
        made = replace(self, words=words, size=size, count=count.expand(len(size), self.shape[1]))
        try:
            made.decoded()
        except (AssertionError, ValueError) as error:
            raise ValueError(f"a packed state has a stream that no coder wrote: {error}") from None
        return made


def coding(vectors: Vectors) -> tuple[int, int]:
    """Bits of a code and codes of a vector; raises ValueError where there are no codes."""
    if isinstance(vectors, Quantized | Coded):
        return vectors.bits, vectors.width
    if isinstance(vectors, FromCodebook):
        return vectors.book.bits, vectors.book.tables.shape[1]
    raise ValueError(f"an encoder that writes integer codes is needed, not one of {type(vectors).__name__}")


def integers(vectors: Vectors) -> Tensor:
    """The codes of vectors, [B, H, S, M] uint8."""
    bits, many = coding(vectors)
    return unpack_bits(vectors.codes, bits, many)  # type: ignore[attr-defined]


def streamed(vectors: Vectors, count: Tensor, table: Frequencies) -> Streamed:
    """Vectors with codes, those of the first count [B, H or 1] slots through a coder."""
    codes = integers(vectors)
    b, h, _, _ = codes.shape
    count = count.expand(b, h)
    columns = codes.permute(0, 1, 3, 2).int().contiguous().cpu().numpy()  # [B, H, M, S]
    many = count.tolist()
    found = [
        table.write([np.ascontiguousarray(columns[user, head, :, : many[user][head]]) for head in range(h)])
        for user in range(b)
    ]
    size = torch.tensor([[len(words)] for words in found], dtype=torch.int32).view(b, 1)
    words = torch.zeros(b, 1, max(map(len, found), default=0), 1, dtype=torch.int32)
    for user, each in enumerate(found):
        words[user, 0, : len(each), 0] = torch.from_numpy(each.copy())
    bare = replace(vectors, codes=vectors.codes[..., :0])  # type: ignore[type-var, attr-defined]
    return Streamed(bare, words.to(codes.device), size.to(codes.device), count, table)


def frequencies(counts: Tensor) -> Tensor:
    """Shares [H, M, K] from how often codes came; half a time is added to each, so that none is impossible."""
    counts = counts.double() + 0.5
    return (counts / counts.sum(-1, keepdim=True)).float()

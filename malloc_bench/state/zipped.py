"""Stored arrays through zstd: not one bit lost, and what is stored are the bytes that it wrote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from malloc_bench.state.packing import Reader, stored_bytes
from malloc_bench.state.user_state import map_tensors
from malloc_bench.state.vectors import Ragged, Read, Vectors, all_rows

_HEAD = 4  # bytes of a frame's length
_MOST = 1 << 15  # times that zstd can shrink anything: a block of 128 KB takes 4 bytes at least


@dataclass(frozen=True, eq=False)
class Zipped(Vectors):
    """`bare` with its stored arrays in a stream of zstd frames, one an array, which each read unpacks anew.

    bare: vectors of the encoding and shape, whose numbers are all 0. frames: [B, 1, R, 1] uint8, of which size [B, 1]
    int32 are a user's. count: [B, H or 1] vectors, None: all rows; not stored, the slots know it.
    """

    bare: Vectors
    frames: Tensor
    size: Tensor
    count: Tensor | None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.bare.shape

    def unzipped(self) -> Vectors:
        """The vectors as they were written down, as many slots as someone has."""
        blobs = [
            row[:size].tobytes() for row, size in zip(self.frames[:, 0, :, 0].cpu().numpy(), self.size[:, 0].tolist())
        ]
        read = _Unzip(blobs)
        found = self.bare.load(read, self.count)
        read.finish()
        return found

    def dense(self) -> Tensor:
        return self._padded(self.unzipped().dense().mT).mT

    def dot(self, q: Tensor) -> Tensor:
        return self._padded(self.unzipped().dot(q))

    def mix(self, w: Tensor) -> Tensor:
        found = self.unzipped()
        return found.mix(w[..., : found.shape[2]])

    def _padded(self, x: Tensor) -> Tensor:
        """[..., slots that someone has] as wide as the padded state."""
        return F.pad(x, (0, self.shape[2] - x.shape[-1]))

    def flops(self, queries: int) -> int:
        return self.bare.flops(queries)

    def dense_flops(self) -> int:
        return self.bare.dense_flops()

    def parts(self, count: Tensor | None) -> Iterator[Ragged]:
        yield Ragged(self.size[..., None, None], all_rows(self.size[..., None, None]), None, "sizes")
        yield Ragged(self.frames, self.size)

    def load(self, read: Read, count: Tensor | None) -> Zipped:
        size = read.numbers(self.size, torch.iinfo(torch.int32).max, "has frames of negative size").int()
        made = replace(self, frames=read(self.frames, size), size=size, count=count)
        return replace(made, bare=map_tensors(torch.zeros_like, made.unzipped()))


class _Unzip(Reader):
    """Reads arrays out of frames; each is unpacked only if it can be what its counts say."""

    def __call__(self, like: Tensor, rows: Tensor, cols: Tensor | None = None) -> Tensor:
        heads, item = like.shape[1], like.element_size()
        wide = torch.tensor([[like.shape[3]]]) if cols is None else cols.cpu()
        cells = (rows.cpu().double() * wide.double()).expand(len(self.blobs), heads).sum(1, keepdim=True)
        self.refuse((rows.cpu() < 0) | (wide < 0), "has arrays of negative size")
        need = (cells * item).tolist()
        return Reader([self._frame(user, size, item) for user, (size,) in enumerate(need)])(like, rows, cols)

    def finish(self) -> None:
        """What is left over can only be what brought a user to a byte a slot."""
        rest = [bool(blob[at:].strip(b"\0")) for blob, at in zip(self.blobs, self.at)]
        self.refuse(torch.tensor(rest).view(-1, 1), "is longer than its own counts say")

    def _frame(self, user: int, size: float, item: int) -> bytes:
        """One user's next array, of `size` bytes, `item` a number."""
        import pyarrow as pa  # here: it takes a moment to load, and few need it

        blob, at = self.blobs[user], self.at[user] + _HEAD
        end = at + int.from_bytes(blob[at - _HEAD : at], "little")
        self.at[user] = end
        if end > len(blob) or size > _MOST * (end - at):
            raise ValueError(f"packed state of user {user} has a frame that is shorter than its counts say")
        try:
            found = pa.decompress(blob[at:end], int(size), codec="zstd", asbytes=True) if size else b""
        except (OSError, ValueError) as error:
            raise ValueError(f"packed state of user {user} has a frame that no coder wrote: {error}") from None
        return np.frombuffer(found, np.uint8).reshape(item, -1).T.tobytes()


def zipped(vectors: Vectors, count: Tensor | None, level: int) -> Zipped:
    """Vectors, those of the first count [B, H or 1] slots through zstd; raises ValueError where several share them.

    A user takes a byte a slot at least: no packed state may claim more slots than it has bytes. The first bytes of all
    numbers of an array come first, then all second ones: exponents are alike, so they shrink.
    """
    import pyarrow as pa

    if vectors.shared():
        raise ValueError(f"an encoder that writes each field by itself is needed, not {type(vectors).__name__}")
    users, codec = range(vectors.shape[0]), pa.Codec("zstd", compression_level=level)
    blobs = [b""] * len(users)
    for part in vectors.parts(count):
        item = part.data.element_size()
        for user, raw in enumerate(stored_bytes(part, users)):
            planes = np.frombuffer(raw, np.uint8).reshape(-1, item).T.tobytes()
            frame = codec.compress(planes, asbytes=True) if raw else b""
            blobs[user] += len(frame).to_bytes(_HEAD, "little") + frame
    if count is not None:
        least = count.expand(len(users), -1).amax(1).tolist() if len(users) else []
        blobs = [blob.ljust(most, b"\0") for blob, most in zip(blobs, least)]
    device = next(vectors.parts(count)).data.device
    frames, size = (x.to(device) for x in _rows(blobs))
    return Zipped(map_tensors(torch.zeros_like, vectors), frames, size, count)


def _rows(blobs: Sequence[bytes]) -> tuple[Tensor, Tensor]:
    """[B, 1, R, 1] uint8, and how many of each user are real, [B, 1] int32."""
    size = torch.tensor([[len(blob)] for blob in blobs], dtype=torch.int32).view(-1, 1)
    out = torch.zeros(len(blobs), 1, max(map(len, blobs), default=0), 1, dtype=torch.uint8)
    for user, blob in enumerate(blobs):
        out[user, 0, : len(blob), 0] = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
    return out, size

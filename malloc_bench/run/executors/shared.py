"""A value in a file, whose arrays many processes map into their memory: it is there once, however many read it."""

from __future__ import annotations

import mmap
import pickle
import struct
from typing import Any, BinaryIO

_ALIGNED = 64  # bytes
_LENGTH = struct.Struct("<Q")


def dump(value: Any, file: BinaryIO) -> None:
    """Write a value: lengths, what `pickle` says of it, and each array as it lies in memory."""
    arrays: list[pickle.PickleBuffer] = []
    head = memoryview(pickle.dumps(value, protocol=5, buffer_callback=arrays.append))
    for block in [head, *(array.raw() for array in arrays)]:
        file.write(_LENGTH.pack(len(block)))
        file.write(b"\0" * (-file.tell() % _ALIGNED))
        file.write(block)
        file.write(b"\0" * (-file.tell() % _ALIGNED))
    file.flush()


def load(descriptor: int) -> Any:
    """The value of an open file; what is written into its arrays stays in this process."""
    whole = memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY))
    blocks, at = [], 0
    while at < len(whole):
        (length,) = _LENGTH.unpack_from(whole, at)
        at += _ALIGNED
        blocks.append(whole[at : at + length])
        at += length + -length % _ALIGNED
    head, *arrays = blocks
    return pickle.loads(head, buffers=arrays)

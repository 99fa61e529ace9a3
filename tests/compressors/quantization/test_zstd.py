"""zstd: the same numbers to the last bit, in as many bytes as zstd writes."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional as F

from malloc_bench.compressors import get_compressor
from malloc_bench.state import Prefill, Segment, Slots, UserState
from malloc_bench.state.packing import stored_bytes

COUNTS = (0, 1, 9, 40)


def prefill_of(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(4, 2, 40, 6, generator=generator).to(dtype) for _ in range(2))
    return Prefill.from_tensors([keys], [values], lengths=torch.tensor(COUNTS))


@pytest.mark.parametrize(
    "inner", [None, "int8", "mxint", "float16", {"kivi": {"bits": 2, "tail": 4}}, {"turboquant": {"bits": 3}}]
)
def test_what_is_unpacked_is_the_inner_encoders_state_to_the_last_bit(inner):
    full = prefill_of()
    want = full.state if inner is None else get_compressor("zstd", inner=inner).inner.compress(full)
    state = get_compressor("zstd", inner=inner).compress(full)
    back = state.take(torch.tensor([1])).unpack([state.pack(user) for user in range(4)])
    layers = tuple(
        tuple(Segment({k: v.unzipped() for k, v in s.fields.items()}, s.slots) for s in layer) for layer in back.layers
    )
    again = UserState(layers, back.length)
    assert again.packed(range(4)) == want.packed(range(4))
    for got, plain in zip(back.segments(), want.segments()):
        for name in plain.fields:
            x, y = got.fields[name].dense(), plain.fields[name].dense()
            mask = plain.slots.mask(y.shape[2])[..., None]
            assert torch.equal((x * mask[:, :, : x.shape[2]]), (y * mask)[:, :, : x.shape[2]])


def test_bytes_are_those_that_zstd_wrote():
    full, state = prefill_of(), get_compressor("zstd", level=19).compress(prefill_of())
    (segment,) = full.state.layers[0]
    codec, want = pa.Codec("zstd", compression_level=19), full.state.nbytes().tolist()
    for field in segment.fields.values():
        (part,) = field.parts(segment.slots.count)
        for user, raw in enumerate(stored_bytes(part, range(4))):
            planes = np.frombuffer(raw, np.uint8).reshape(-1, 4).T.tobytes()
            frame = len(codec.compress(planes, asbytes=True)) if raw else 0
            want[user] += 4 + 4 + frame - len(raw)
    assert state.nbytes().tolist() == want == [len(state.pack(user)) for user in range(4)]
    assert want[3] < full.state.nbytes()[3]  # normal numbers' exponents are alike


def test_what_repeats_costs_next_to_nothing():
    same = torch.ones(1, 2, 4000, 8)
    state = get_compressor("zstd").compress(Prefill.from_tensors([same], [same]))
    assert int(state.nbytes()) == 2 * 4000 + 4 * 4  # a byte a slot and field, a length, a count and two sizes
    assert torch.equal(state.unpack([state.pack(0)]).layers[0][0].fields["keys"].dense(), same)


def test_a_frame_that_cannot_be_is_refused_before_anything_large_is_made():
    state = get_compressor("zstd").compress(prefill_of())
    (segment,) = state.layers[0]
    wide = {name: replace(x, frames=F.pad(x.frames, (0, 0, 0, 9000))) for name, x in segment.fields.items()}
    wide = {name: replace(x, size=torch.full_like(x.size, x.frames.shape[2])) for name, x in wide.items()}
    lies = UserState(((Segment(wide, Slots(torch.full((4, 1), 9000))),),), torch.full((4,), 9000, dtype=torch.int32))
    with pytest.raises(ValueError, match="a frame that"):
        state.unpack(lies.packed(range(4)))
    blob = bytearray(state.pack(3))
    blob[40] ^= 255
    with pytest.raises(ValueError, match="packed state of user 0"):
        state.unpack([bytes(blob)])


@pytest.mark.parametrize("inner", ["recent", "entropy", {"zstd": {"inner": "entropy"}}])
def test_an_inner_method_is_an_encoder_that_learns_nothing(inner):
    with pytest.raises(ValueError, match="zstd: an inner encoder that learns nothing"):
        get_compressor("zstd", inner=inner)
    with pytest.raises(ValueError, match="zstd: level must be 1 to 22, not 0"):
        get_compressor("zstd", level=0)


def test_fields_that_share_vectors_are_refused_in_one_line():
    with pytest.raises(ValueError, match="writes each field by itself"):
        get_compressor("zstd", inner="gear").compress(prefill_of())

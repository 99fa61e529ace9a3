"""Encodings: bits, scales, factors, against definitions in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from malloc_bench.state import (
    Dense,
    Quantized,
    Segment,
    Slots,
    UserState,
    low_rank,
    pack_bits,
    quantize,
    unpack_bits,
    zipped,
)
from malloc_bench.testing.worlds import close


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mask_of(counts, width):
    return (torch.arange(width) < torch.tensor(counts)[:, None])[:, None]


@given(st.data(), st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 19))
def test_bits_survive_packing(data, bits, width):
    codes = torch.tensor(data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=2 * width, max_size=2 * width)))
    codes = codes.view(2, width).to(torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (2, -(-width * bits // 8))
    assert torch.equal(unpack_bits(packed, bits, width), codes)


def test_first_code_lies_in_the_lowest_bits():
    assert pack_bits(torch.tensor([[1, 2, 3, 0, 1]], dtype=torch.uint8), 2).tolist() == [[0b00111001, 1]]
    codes = torch.tensor([[1, 2, 7, 0, 5, 3, 4, 6]], dtype=torch.uint8)  # 8 codes of 3 bits in 3 bytes
    number = sum(int(code) << 3 * i for i, code in enumerate(codes[0]))
    assert bytes(pack_bits(codes, 3)[0].tolist()) == number.to_bytes(3, "little")


def half_steps(x, count, bits, group, along, symmetric):
    """Half the step of each cell's group, for one user's and head's x [S, D], spelled out in float64."""
    bound, d = torch.zeros_like(x, dtype=torch.float64), x.shape[1]
    blocks = (
        [(slice(i, min(i + group, count)), slice(j, j + 1)) for i in range(0, count, group) for j in range(d)]
        if along == "slots"
        else [(slice(i, i + 1), slice(j, min(j + group, d))) for i in range(count) for j in range(0, d, group)]
    )
    for block in blocks:
        y = x[block].double()
        if symmetric:
            scale = y.abs().max() / (2 ** (bits - 1) - 1)
        else:
            scale = (y.max() - y.min()) / (2**bits - 1)
        bound[block] = scale / 2
    return bound


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("along", ["slots", "width"])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_error_is_at_most_half_a_step(bits, along, symmetric):
    counts, x = (0, 1, 5, 11), noise(4, 2, 11, 7)
    got = quantize(x, mask_of(counts, 11), bits, 4, along, symmetric).dense()
    for user, count in enumerate(counts):
        for head in range(2):
            bound = half_steps(x[user, head], count, bits, 4, along, symmetric)
            error = (got[user, head].double() - x[user, head]).abs()[:count]
            # float16 keeps 11 bits of the scale (times up to 2^bits codes) and of the zero point
            slack = bound[:count] * 2**bits * 2**-10 + x.abs().max() * 2**-11
            assert bool((error <= bound[:count] + slack).all())


def test_asymmetric_formula_on_numbers_that_float16_holds():
    x = torch.tensor([[0.0, 1.0], [0.5, 3.0], [1.5, 2.0]])[None, None]
    got = quantize(x, mask_of([3], 3), 2, 32, "slots")
    assert got.scale[0, 0].tolist() == [[0.5, pytest.approx(2 / 3, rel=1e-3)]]
    assert got.zero[0, 0].tolist() == [[0.0, 1.0]]
    assert unpack_bits(got.codes, 2, 2)[0, 0].tolist() == [[0, 0], [1, 3], [3, 2]]


def test_symmetric_formula():
    x = torch.tensor([[-127.0, 63.5, 127.0]])[None, None]
    got = quantize(x, mask_of([1], 1), 8, 3, "width", symmetric=True)
    assert got.scale.item() == 1.0 and got.zero is None
    assert got.dense().tolist() == [[[[-127.0, 64.0, 127.0]]]]  # half to even


@pytest.mark.parametrize("along", ["slots", "width"])
def test_constant_vectors_come_back_exactly(along):
    x = torch.full((2, 1, 9, 4), 0.375)
    assert torch.equal(quantize(x, mask_of([9, 4], 9), 2, 4, along).dense()[0], x[0])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("along", ["slots", "width"])
@pytest.mark.parametrize("size", [1e6, 1e9])
def test_outliers_take_wide_scales(size, along, symmetric):
    x = noise(2, 1, 8, 4)
    x[0, 0, 0, 0] = size
    x[0, 0, 1, 1] = -size
    got = quantize(x, mask_of([8, 8], 8), 4, 4, along, symmetric)
    assert got.wide.flatten().tolist() == [1, 0]  # float16 ends at 65504, and the other user keeps it
    assert bool(got.dense().isfinite().all())
    close(got.dense()[0], x[0], "outlier", 0.08 if symmetric else 0.05)  # half a step of the outlier's range


def test_denormals_stay_finite_and_near():
    x = noise(1, 1, 8, 4) * 1e-40
    got = quantize(x, mask_of([8], 8), 8, 8, "slots")
    assert bool(got.dense().isfinite().all())
    assert float((got.dense() - x).abs().max()) <= 2e-42


def test_padding_does_not_enter_a_scale():
    x = noise(2, 2, 10, 4)
    spoiled = torch.where(mask_of([3, 7], 10).unsqueeze(-1), x, 1e4)
    for along in ("slots", "width"):
        clean, other = (quantize(y, mask_of([3, 7], 10), 4, 4, along).dense() for y in (x, spoiled))
        for user, n in enumerate((3, 7)):
            assert torch.equal(clean[user, :, :n], other[user, :, :n])


@pytest.mark.parametrize("make", ["quantized", "low rank"])
def test_dot_and_mix_read_what_dense_says(make):
    x, mask = noise(3, 2, 9, 6), mask_of([9, 4, 1], 9)
    ranks = torch.tensor([[3], [2], [1]])
    vectors = quantize(x, mask, 4, 4, "slots") if make == "quantized" else low_rank(x, mask, ranks)
    q, w = noise(3, 2, 5, 6, seed=1), noise(3, 2, 5, 9, seed=2).masked_fill(~mask.unsqueeze(2), 0)
    dense = vectors.dense()
    for user, n in enumerate((9, 4, 1)):
        close(vectors.dot(q)[user, ..., :n], (q @ dense.transpose(-1, -2))[user, ..., :n], "dot", 1e-5)
        close(vectors.mix(w)[user], w[user, ..., :n] @ dense[user, :, :n], "mix", 1e-5)


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
def test_low_rank_is_the_best_approximation(rank):
    """Eckart and Young: no matrix of this rank is nearer than the truncated SVD."""
    counts, x = (0, 1, 5, 40), noise(4, 2, 40, 6)
    fits = torch.tensor(counts)[:, None].clamp(max=rank)
    got = low_rank(x, mask_of(counts, 40), fits)
    for user, n in enumerate(counts):
        for head in range(2):
            y = x[user, head, :n].double()
            optimal = torch.linalg.svdvals(y)[rank:].square().sum().sqrt()
            error = (got.dense()[user, head, :n].double() - y).norm()
            assert abs(float(error - optimal)) <= 1e-4 * max(float(y.norm()), 1.0)


def test_low_rank_of_something_of_that_rank_loses_nothing():
    x = noise(2, 1, 30, 2) @ noise(2, 1, 2, 8, seed=1)
    close(low_rank(x, mask_of([30, 12], 30), torch.tensor([[2], [2]])).dense()[1, :, :12], x[1, :, :12], "rank 2", 1e-3)
    close(low_rank(x, mask_of([30, 30], 30), torch.tensor([[8], [8]])).dense(), x, "full rank", 1e-5)


def test_low_rank_of_more_ranks_than_slots_has_as_many_as_slots():
    x = noise(2, 1, 3, 8)
    mask = mask_of([3, 3], 3)
    some, full = (low_rank(x, mask, torch.tensor([[most], [2]])) for most in (7, 3))
    assert torch.equal(some.dense(), full.dense())
    assert torch.equal(some.left.rank, full.left.rank)


def test_low_rank_ignores_numbers_beyond_a_users_rank():
    x, mask = noise(2, 1, 9, 6), mask_of([9, 9], 9)
    both = low_rank(x, mask, torch.tensor([[5], [2]]))
    alone = low_rank(x[1:], mask[1:], torch.tensor([[2]]))
    close(both.dense()[1], alone.dense()[0], "rank 2 beside rank 5", 1e-5)
    assert both.left.shape[3] == 5


def test_dense_keeps_its_dtype():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        vectors = Dense(noise(1, 1, 4, 2).to(dtype))
        assert vectors.dense().dtype == dtype
        assert vectors.dot(noise(1, 1, 3, 2)).dtype == torch.float32


def test_flops_of_factors_fall_with_the_rank():
    x, mask = noise(1, 2, 20, 8), mask_of([20], 20)
    assert Dense(x).flops(3) == 2 * 3 * 2 * 20 * 8
    assert low_rank(x, mask, torch.tensor([[2]])).flops(3) == 2 * 3 * 2 * 2 * (20 + 8)


def test_quantized_without_slots_stores_all_rows():
    vectors = quantize(noise(2, 1, 4, 4), mask_of([4, 4], 4), 4, 4, "width")
    assert isinstance(vectors, Quantized)
    assert sum(int(part.nbytes()[0]) for part in vectors.parts(None)) == 1 + 4 * 2 + 4 * 2 * 2


def test_joined_segments_read_alike(trained):
    """What was kept and what was appended, in one segment: the same reads, bytes but for the lists, and positions."""
    from malloc_bench.compressors import get_compressor
    from malloc_bench.state import Stats, joined
    from malloc_bench.testing import World
    from malloc_bench.testing.worlds import LENGTHS, close, histories

    for case in ("hstu-times-2-heads", "sasrec-2-heads", "climber-times-2-heads"):
        world, (_, new) = World(case, trained(case)), histories(trained(case), LENGTHS)
        for name in ("knorm", "recent", "merge_adjacent"):
            state = get_compressor(name).compress(world.prefill(Stats()), 0.4)
            grown = world.backbone.append(state, new)
            one = joined(grown)
            assert all(len(layer) == 1 for layer in one.layers)
            close(world.read(one), world.read(grown), f"{name} on {case}", 1e-5)
            close(world.read(one.unpack([one.pack(u) for u in range(len(LENGTHS))])), world.read(one), "unpacked", 1e-5)


def test_scales_of_one_user_change_nothing_for_another_behind_zstd():
    """A frame is written of each array, empty ones too: that some user has wide scales must not add one."""
    torch.manual_seed(0)
    x = torch.randn(2, 1, 8, 4)
    x[1] = 1 + x[1] * 1e-3  # nearly equal values, whose scale float16 cannot hold
    count, mask = torch.full((2, 1), 8, dtype=torch.int32), torch.ones(2, 1, 8, dtype=torch.bool)

    def state(i):
        coded = quantize(x[i], mask[i], 8, 4, "slots")
        assert coded.wide.flatten().tolist() == i
        segment = Segment({"keys": zipped(coded, count[i].long(), 3)}, Slots(count[i]))
        return UserState(((segment,),), count[i][:, 0])

    both, alone = state([0, 1]), [state([0]), state([1])]
    blobs = [each.pack(0) for each in alone]
    assert [both.pack(0), both.pack(1)] == blobs and both.nbytes().tolist() == list(map(len, blobs))
    dense = both.layers[0][0].fields["keys"].dense()
    for template in (both, *alone):
        again = template.unpack(blobs).layers[0][0].fields["keys"].dense()
        assert torch.equal(again, dense)

"""Merging, encodings and raw events against their definitions, spelled out in float64 on small inputs."""

import math
from itertools import pairwise

import pytest
import torch

from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.state import Dense, Prefill, Segment, Slots, Stats, UserState, microscaled
from malloc_bench.testing import World, histories
from malloc_bench.testing.worlds import LENGTHS, close

COUNTS = (1, 3, 9, 14)


def prefill_of():
    generator = torch.Generator().manual_seed(0)
    keys, values = ([torch.randn(4, 2, 14, 4, generator=generator) for _ in range(2)] for _ in range(2))
    return Prefill.from_tensors(keys, values, lengths=torch.tensor(COUNTS), positions=True)


@pytest.mark.parametrize("k", [1, 2, 4, 7, 20])
def test_merge_adjacent(k):
    prefill = prefill_of()
    state = get_compressor("merge_adjacent").compress(prefill, Budget(slots=k))
    for layer in prefill.layers:
        (segment,) = state.layers[layer]
        for user, n in enumerate(COUNTS):
            size = min(k, n)
            runs = [[i for i in range(n) if i * size // n == run] for run in range(size)]
            lengths = [len(run) for run in runs]
            assert sum(lengths) == n and max(lengths) - min(lengths) <= 1
            assert segment.slots.mass[user, 0, :size].tolist() == lengths
            for slot, run in enumerate(runs):
                assert segment.slots.positions[user, 0, slot] == round(sum(run) / len(run))  # half to even
                for name, x in (("keys", prefill.keys(layer)), ("values", prefill.values(layer))):
                    want = x[user, :, run].double().mean(1)
                    close(segment.fields[name].dense()[user, :, slot].double(), want, name, 1e-6)


def test_merged_times_are_means_to_the_second(trained):
    """Float32 would round unix seconds to two minutes."""
    backbone = trained("hstu-times")
    history, _ = histories(backbone, LENGTHS)
    state = get_compressor("merge_adjacent").compress(backbone.prefill(history), Budget(slots=7))
    times = state.layers[0][0].slots.timestamps
    for user, n in enumerate(LENGTHS):
        size = min(n, 7)
        for slot in range(size):
            run = [int(history.times[user, i]) for i in range(n) if i * size // n == slot]
            assert abs(int(times[user, 0, slot]) - sum(run) / len(run)) <= 0.5


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_kivi_groups_keys_along_slots_and_values_along_channels(bits):
    prefill = prefill_of()
    state = get_compressor("kivi", bits=bits, group=3).compress(prefill)
    for name, x in (("keys", prefill.keys(0)), ("values", prefill.values(0))):
        got = state.layers[0][0].fields[name].dense()
        for user, n in enumerate(COUNTS):
            y = x[user, :, :n].double()
            for start in range(0, n if name == "keys" else 4, 3):
                part = (slice(None), slice(start, start + 3)) if name == "keys" else (..., slice(start, start + 3))
                block, axis = y[part], 1 if name == "keys" else 2
                low, high = block.amin(axis, keepdim=True), block.amax(axis, keepdim=True)
                scale = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
                want = ((block - low) / scale).round() * scale + low
                error = (got[user, :, :n][part].double() - want).abs()
                # float16 moves scale and zero point a little, and with them a code at the edge by one step
                assert float((error - 4e-3).clamp(min=0).div(scale).max()) <= 1
                assert float((error < 4e-3).double().mean()) > 0.85


@pytest.mark.parametrize("bits, codes", [(8, 50), (4, 25), (3, 19), (2, 13), (1, 7)])
def test_kivi_bytes(bits, codes):
    """90 slots of width 50: keys in two groups of slots a channel, values in one group a slot, codes to whole bytes."""
    prefill = Prefill.from_tensors([torch.randn(1, 1, 90, 50)], [torch.randn(1, 1, 90, 50)])
    keys, values = 1 + 90 * codes + 2 * 50 * 4, 1 + 90 * codes + 90 * 4
    assert get_compressor("kivi", bits=bits).compress(prefill).nbytes().tolist() == [8 + keys + values]


def test_kivi_tail_is_exact():
    prefill = prefill_of()
    body, tail = get_compressor("kivi", bits=2, tail=4).compress(prefill).layers[0]
    for user, n in enumerate(COUNTS):
        assert int(tail.slots.count[user]) == min(n, 4) and int(body.slots.count[user]) == max(n - 4, 0)
        newest = prefill.keys(0)[user, :, max(n - 4, 0) : n]
        assert torch.equal(tail.fields["keys"].dense()[user, :, : min(n, 4)], newest)


def test_int8():
    prefill = prefill_of()
    got = get_compressor("int8").compress(prefill).layers[0][0].fields["values"].dense()
    x = prefill.values(0).double()
    scale = x.abs().amax(-1, keepdim=True) / 127
    for user, n in enumerate(COUNTS):
        error = (got[user, :, :n] - (x / scale).round()[user, :, :n] * scale[user, :, :n]).abs()
        assert bool((error <= scale[user, :, :n] * 1.07).all()) and float(error.mean()) < float(scale.mean()) / 10


def best(matrix, rank):
    """The nearest matrix of a rank, by Eckart and Young."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize(
    "share, dtype", [("all", "float32"), ("all", "float16"), ("layer", "float32"), ("none", "float32")]
)
def test_svd(share, dtype, rank):
    prefill = prefill_of()
    state = get_compressor("svd", rank=rank, share=share, dtype=dtype).compress(prefill)
    for user, n in enumerate(COUNTS):
        full = [x[user, :, :n].double() for i in prefill.layers for x in (prefill.keys(i), prefill.values(i))]
        if share == "none":
            want = [best(x, rank) for x in full]
        else:
            wide = [x.transpose(0, 1).reshape(n, 8) for x in full]
            groups = [torch.cat(wide, 1)] if share == "all" else [torch.cat(wide[i : i + 2], 1) for i in (0, 2)]
            near = torch.cat([best(x, rank) for x in groups], 1)
            want = [x.reshape(n, 2, 4).transpose(0, 1) for x in near.split(8, 1)]
        got = [v.dense()[user, :, :n].double() for s in state.segments() for v in s.fields.values()]
        for x, y in zip(got, want, strict=True):
            close(x, y, f"user {user}", 1e-4 if dtype == "float32" else 2e-3)


def test_svd_bytes():
    """14 slots of 2 layers, 2 fields, 2 heads, width 4: one factor for all, one for each layer, one for each head."""
    prefill = prefill_of()
    size = {"all": 8 + 8 + 6 * (14 + 32), "layer": 8 + 2 * (8 + 6 * (14 + 16)), "none": 8 + 4 * (8 + 6 * 2 * (14 + 4))}
    for share, expected in size.items():
        assert (
            int(get_compressor("svd", rank=3, share=share, dtype="float16").compress(prefill).nbytes()[3]) == expected
        )


@pytest.mark.parametrize("share", ["all", "none"])
def test_a_shared_factor_is_loaded_once_and_read_by_all(share):
    prefill = prefill_of()
    state = get_compressor("svd", rank=3, share=share).compress(prefill)
    back = state.take(torch.tensor([0])).unpack([state.pack(u) for u in range(4)])
    lefts = {id(v.left) for s in back.segments() for v in s.fields.values()}
    assert len(lefts) == (1 if share == "all" else 4)
    q = torch.randn(4, 2, 5, 4, generator=torch.Generator().manual_seed(1))
    for one, other in zip(state.segments(), back.segments(), strict=True):
        for name, vectors in one.fields.items():
            read, dense = other.fields[name].dot(q), q @ vectors.dense().mT
            for user, n in enumerate(COUNTS):
                close(read[user, ..., :n], dense[user, ..., :n], name, 1e-5)


@pytest.mark.parametrize("dtype, bits", [("int8", 8), ("int4", 4)])
def test_codes_of_factors_are_within_half_a_step(dtype, bits):
    """Of the largest number of their column or row; 14 slots, 2 layers, 2 fields, 2 heads of width 4."""
    prefill = prefill_of()
    state = get_compressor("svd", rank=3, dtype=dtype).compress(prefill)
    left, right = 14 * ((3 * bits + 7) // 8), 3 * 8 * (4 * bits // 8)
    assert int(state.nbytes()[3]) == 8 + 8 + 3 * 2 + left + right
    exact = get_compressor("svd", rank=3, dtype="float32").compress(prefill)
    for one, other in zip(state.segments(), exact.segments(), strict=True):
        for name, vectors in one.fields.items():
            u, v = other.fields[name].left.dense().double(), other.fields[name].right.double()
            half = 0.5 / (2 ** (bits - 1) - 1)
            for user, n in enumerate(COUNTS):
                left, tall = u[user, 0, :n], u[user, 0, :n].abs().amax(0)
                long = torch.stack([x.fields[k].right[user] for x in exact.segments() for k in x.fields])
                long = long.abs().amax((0, 1, 3)).double()
                near = half * (tall * v[user].abs().amax(2) + left.abs().amax(0) * long + half * tall * long).sum(-1)
                error = (vectors.dense()[user, :, :n].double() - left @ v[user]).abs().amax((1, 2))
                assert bool((error <= near * 1.01 + 1e-3).all())


def test_svd_of_heads_that_keep_slots_of_their_own_shares_over_fields_only():
    prefill = prefill_of()
    kept = get_compressor("knorm").compress(prefill, Budget(slots=5))
    state = get_compressor("svd", rank=2, dtype="float32").encode(kept)
    for full, segment in zip(kept.segments(), state.segments(), strict=True):
        for user, n in enumerate(COUNTS):
            n = min(n, 5)
            wide = torch.cat([full.fields[name].dense()[user, :, :n].double() for name in ("keys", "values")], -1)
            got = torch.cat([segment.fields[name].dense()[user, :, :n] for name in ("keys", "values")], -1)
            close(got.double(), best(wide, 2), f"user {user}", 1e-4)


def test_errors_fall_with_bits_and_rank():
    prefill = prefill_of()
    x, real = prefill.keys(0), prefill.mask(0).unsqueeze(-1)

    def error(name, **params):
        got = get_compressor(name, **params).compress(prefill).layers[0][0].fields["keys"].dense()
        return float(((got - x) * real).norm())

    for errors in (
        [error("kivi", bits=b) for b in (2, 4, 8)],
        [error("svd", rank=r, share="none") for r in (1, 2, 3, 4)],
    ):
        assert all(a > b for a, b in pairwise(errors)) and errors[-1] < 0.01 * float((x * real).norm())


@pytest.mark.parametrize("case", ["sasrec", "hstu", "hstu-times"])
def test_recompute_is_the_full_state(case, trained):
    world = World(case, trained(case))
    prefill = world.prefill(Stats())
    state = get_compressor("recompute").compress(prefill)
    assert torch.equal(world.read(state), world.read(prefill.state))
    assert state.nbytes().tolist() == [4 + n * (12 if case == "hstu-times" else 4) for n in LENGTHS]


@pytest.mark.parametrize("case", ["sasrec", "hstu", "hstu-times"])
def test_truncate_is_the_prefill_of_the_last_events(case, trained):
    world = World(case, trained(case))
    prefill = world.prefill(Stats())
    short = world.backbone.prefill(prefill.events.last(torch.full((len(LENGTHS),), 5))).state
    state = get_compressor("truncate").compress(prefill, Budget(slots=5))
    assert state.length.tolist() == [min(n, 5) for n in LENGTHS]
    close(world.read(state), world.read(short), "read", 1e-6)


def test_none_is_a_new_user(trained):
    world = World("hstu", trained("hstu"))
    state = get_compressor("none").compress(world.prefill(Stats()))
    nobody = world.backbone.prefill(histories(world.backbone, (0,) * len(LENGTHS))[0]).state
    close(world.read(state), world.read(nobody), "read", 1e-6)
    assert state.nbytes().tolist() == [4] * len(LENGTHS)


@pytest.mark.parametrize("bits, published", [(1, 0.3634), (2, 0.1175), (3, 0.0345), (4, 0.0095)])
def test_turboquant_has_the_published_error(bits, published):
    """Of Gaussian data; nearest of brute force; read in the rotated frame as in the plain one."""
    x = torch.randn(2, 1, 1500, 64, generator=torch.Generator().manual_seed(0))
    prefill = Prefill.from_tensors([x], [x])
    vectors = get_compressor("turboquant", bits=bits).compress(prefill).layers[0][0].fields["keys"]
    error = (vectors.dense() - x).square().sum() / x.square().sum()
    assert float(error) == pytest.approx(
        published, rel=0.04
    )  # a vector of known norm is a little easier than a Gaussian one
    turn, levels = vectors.table.rotation.double(), vectors.table.levels.double()
    close(turn @ turn.mT, torch.eye(64).double(), "rotation", 1e-6)
    turned = x[0, 0, :20].double() @ turn / vectors.size[0, 0, :20].double()
    want = levels[(turned.unsqueeze(-1) - levels).abs().argmin(-1)] * vectors.size[0, 0, :20].double() @ turn.mT
    close(vectors.dense()[0, 0, :20].double(), want, "definition", 1e-5)
    q, w = x[:, :, :5], torch.rand(2, 1, 5, 1500)
    close(vectors.dot(q), q @ vectors.dense().mT, "dot", 1e-5)
    close(vectors.mix(w), w @ vectors.dense(), "mix", 1e-5)


def test_transact():
    prefill = prefill_of()
    vectors = get_compressor("transact").compress(prefill).layers[0][0].fields["values"]
    x, size = prefill.values(0).double(), vectors.size.double()
    code = x.sign() * (127 * (x.abs() / size) ** 0.65).round().clamp(max=127)
    want = code.sign() * (code.abs() / 127) ** (1 / 0.65) * size
    for user, n in enumerate(COUNTS):
        close(vectors.dense()[user, :, :n].double(), want[user, :, :n], f"user {user}", 1e-5)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_mxint_takes_the_best_of_four_scales(bits):
    prefill, levels = prefill_of(), 2**bits - 1
    for field, x in (("keys", prefill.keys(0)), ("values", prefill.values(0))):
        vectors = get_compressor("mxint", bits=bits).compress(prefill).layers[0][0].fields[field]
        for user, n in enumerate(COUNTS):
            for head in range(2):
                rows = x[user, head, :n].double()
                need = [max(float(r.max() - r.min()) / levels, abs(float(r.max() + r.min())) / 126) for r in rows]
                top = math.ceil(math.log2(max(need)))
                assert int(vectors.top[user, head]) == top
                for row, least, got in zip(rows, need, vectors.dense()[user, head].double()):
                    fits, tries = math.floor((top - math.log2(least)) * 8), []
                    for scale in range(fits, fits + 4):
                        size = 2.0 ** (top - scale / 8)
                        zero = round((float(row.min()) + float(row.max())) / size)
                        first = (min(max(zero, -127), 127) - levels) / 2
                        codes = (row / size - first).round().clamp(0, levels)
                        tries.append(float((size * (codes + first) - row).square().sum()))
                    assert float((got - row).square().sum()) == pytest.approx(min(tries), rel=1e-3, abs=1e-9)
                    assert float((got - row).abs().max()) <= 1.3 * least * 2**0.125


def test_mxint_of_extreme_numbers():
    x = torch.randn(1, 2, 6, 8) * torch.tensor([0.0, 1e-38, 1e-6, 1.0, 1e6, 1e36])[:, None]
    for rows in (
        x,
        x[:, :, :1],
        x[:, :, 5:],
        x[:, :, 3:4],
        torch.full((1, 2, 3, 8), 7.0),
        100 + torch.rand(1, 2, 3, 8),
    ):
        vectors = microscaled(rows, torch.ones(1, 1, rows.shape[2], dtype=torch.bool), 4)
        got, most = vectors.dense(), rows.abs().amax(-1, keepdim=True)
        assert bool(got.isfinite().all())
        near = most >= rows.abs().amax((2, 3), keepdim=True) / 2**20  # others are next to nothing beside them
        assert bool((((got - rows).abs() <= 0.11 * most) | ~near).all())
        assert bool((got.abs() <= 1.1 * rows.abs().amax((2, 3), keepdim=True) + 1e-36).all())


def test_mxint_writes_positions_and_masses_in_two_bytes():
    state = get_compressor("compose", steps=("merge_adjacent", "mxint")).compress(prefill_of(), Budget(slots=5))
    count = [min(n, 5) for n in COUNTS]
    whole = [n <= 5 for n in COUNTS]  # neither is stored
    want = [4 + 4 + 8 + 2 * 2 * 2 * k * (2 + 2) + (0 if w else 4 * k) for k, w in zip(count, whole)]
    assert state.nbytes().tolist() == want
    assert [len(state.pack(u)) for u in range(4)] == want
    back = state.unpack([state.pack(u) for u in range(4)])
    for old, new in zip(state.segments(), back.segments()):
        for name in ("positions", "mass"):
            one, two = getattr(old.slots, name)[3], getattr(new.slots, name)[3]
            assert one.dtype == two.dtype and one.tolist() == two.tolist()
    far = Slots(torch.ones(1, 1, dtype=torch.int32), torch.full((1, 1, 1), 40_000, dtype=torch.int32))
    with pytest.raises(ValueError, match="32767"):
        far.shortened()
    padding = Slots(torch.zeros_like(far.count), far.positions).shortened()  # may hold anything
    assert padding.short and int(padding.positions.max()) > 32767


def test_mxint_writes_times_in_four_bytes():
    """Seconds from 1970 to 2106 come back as they were; padding is nobody's."""
    times = torch.tensor([[[0, 2**31, 2**32 - 1]], [[1_700_000_000, -(2**62), 2**62]]])
    count = torch.tensor([[3], [1]], dtype=torch.int32)
    segment = Segment({"keys": Dense(torch.ones(2, 1, 3, 8))}, Slots(count, None, times))
    state = UserState(((segment,),), torch.tensor([5, 5], dtype=torch.int32))
    short = get_compressor("mxint").encode(state)
    assert short.nbytes_by_part()["times"].tolist() == [12, 4] and state.nbytes_by_part()["times"].tolist() == [24, 8]
    blobs = [short.pack(user) for user in range(2)]
    assert [len(blob) for blob in blobs] == short.nbytes().tolist()
    back = next(short.unpack(blobs[::-1]).segments()).slots.timestamps
    assert back.dtype is torch.int64 and back[1, 0].tolist() == times[0, 0].tolist()
    assert int(back[0, 0, 0]) == int(times[1, 0, 0])
    for wrong in (-1, 2**32):
        with pytest.raises(ValueError, match="seconds from 0 to 4294967295"):
            Slots(count, None, times.masked_fill(times == 0, wrong)).shortened()


def test_by_age_rounds_each_part_as_its_bits_say():
    prefill = prefill_of()
    old, new = get_compressor("by_age", bits=8, old_bits=2, newest=0.3).compress(prefill).layers[0]
    for user, n in enumerate(COUNTS):
        fresh = -(-3 * n // 10)  # rounded up
        assert int(new.slots.count[user]) == fresh and int(old.slots.count[user]) == n - fresh
        x = prefill.keys(0)[user, :, :n]
        step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) * 0.51
        for part, rows, bits in ((old, slice(n - fresh), 2), (new, slice(n - fresh, n), 8)):
            got = part.fields["keys"].dense()[user, :, : int(part.slots.count[user])]
            assert bool(((got - x[:, rows]).abs() <= step[:, rows] / (2**bits - 1) + 4e-3).all())

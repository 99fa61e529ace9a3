"""Exact bytes: what is counted is what is packed, and unpacking gives it back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from malloc_bench.state import Dense, Events, Segment, Slots, UserState, low_rank, quantize
from malloc_bench.state.lowrank import low_ranks
from malloc_bench.testing import check_packs, poisoned

COUNTS = (0, 1, 2, 3, 12)
KINDS = [
    "float32", "float16", "bfloat16", "low rank",
    *(f"{bits} bits {way}" for bits in (8, 4, 2) for way in ("slots plain", "slots symmetric", "width plain")),
    "8 bits width symmetric",
]  # fmt: skip


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def encode(kind, x, count, group=4):
    """x [B, H, S, D] written down as `kind` says; one user with an outlier that asks for wide scales."""
    mask = torch.arange(x.shape[2]) < count.unsqueeze(-1)
    if kind == "low rank":
        return low_rank(x, mask, count.clamp(max=1 + count % 3))
    if kind.startswith(("8", "4", "2")):
        bits, _, along, sign = kind.split()
        x = x.clone()
        x[-1:, :1, :1, :1] = 1e8
        return quantize(x, mask, int(bits), group, along, sign == "symmetric")
    return Dense(x.to(getattr(torch, kind)))


def softmax_read(state):
    out = []
    for layer in state.layers:
        for segment in layer:
            q = noise(len(state), segment.fields["keys"].shape[1], 2, segment.fields["keys"].shape[3], seed=9)
            mask = segment.slots.mask(segment.width).unsqueeze(2)
            weights = segment.fields["keys"].dot(q).float().sigmoid().masked_fill(~mask, 0)
            if segment.slots.mass is not None:
                weights = weights * segment.slots.mass.unsqueeze(2)
            out.append(segment.fields["values"].mix(weights).flatten())
    return torch.cat(out)


def state_of(
    kind, counts=COUNTS, heads=2, per_head=False, positions=False, times=False, mass=False, layers=2, shared=True
):
    count = torch.tensor(counts, dtype=torch.int32)[:, None]
    if per_head:
        count = torch.cat([(count - h).clamp(min=0) for h in range(heads)], 1)
    b, s, rows = len(counts), max(counts), count.shape[1]
    length = torch.tensor(counts, dtype=torch.int32) + 2

    def slots():
        where = torch.arange(s, dtype=torch.int32).expand(b, rows, s).contiguous()
        when = 1_700_000_000 + torch.arange(s).expand(b, rows, s) * 977
        weight = 1 + noise(b, rows, s).abs()
        return Slots(count, where if positions else None, when if times else None, weight if mass else None)

    one = slots()
    made = []
    for layer in range(layers):
        fields = {
            f: encode(kind, noise(b, heads, s, 5, seed=2 * layer + i), count) for i, f in enumerate(("keys", "values"))
        }
        made.append((Segment(fields, one if shared else slots()),))
    return UserState(tuple(made), length)


def check_bits(state, back):
    """Every stored array of the unpacked state has the bits of the first one's."""
    for user in range(len(state)):
        assert back.pack(user) == state.pack(user)
    assert torch.equal(back.length, state.length)
    for got, want in zip(back.segments(), state.segments()):
        assert torch.equal(got.slots.count, want.slots.count)
        for name in ("positions", "timestamps", "mass"):
            a, b = getattr(got.slots, name), getattr(want.slots, name)
            assert (a is None) == (b is None)
            if a is not None:
                mask = want.slots.mask(b.shape[2])[:, :, : a.shape[2]]
                assert a.dtype == b.dtype and torch.equal(a[mask], b[:, :, : a.shape[2]][mask])
        for name in want.fields:
            a, b = got.fields[name].dense(), want.fields[name].dense()
            mask = want.slots.mask(b.shape[2])[:, :, : a.shape[2]].expand(-1, b.shape[1], -1)
            if type(want.fields[name]).__name__ == "LowRank":  # the products' last bits follow the padded rank
                assert torch.allclose(a[mask], b[:, :, : a.shape[2]][mask], atol=1e-6)
            else:
                assert torch.equal(a[mask], b[:, :, : a.shape[2]][mask])


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_encoding(kind, per_head):
    state = state_of(kind, per_head=per_head, positions=True, times=True, mass=True)
    check_bits(state, check_packs(state, softmax_read))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_reads_padding(kind):
    state = state_of(kind, positions=True, times=True, mass=True)
    bad = poisoned(state)
    assert torch.equal(softmax_read(bad), softmax_read(state))
    assert [bad.pack(u) for u in range(len(bad))] == [state.pack(u) for u in range(len(state))]


def test_poison_gets_in():
    state = state_of("float32")
    assert float(poisoned(state).layers[0][0].fields["keys"].dense()[0].abs().min()) == 1e4


def test_users_of_no_events_beside_one_of_500():
    state = state_of("4 bits slots plain", counts=(0, 1, 2, 3, 500), times=True)
    check_bits(state, check_packs(state, softmax_read))


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=4),
    st.sampled_from(KINDS),
    st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.integers(1, 3), st.booleans(),
)  # fmt: skip
def test_any_state(counts, kind, per_head, positions, times, mass, heads, shared):
    state = state_of(kind, counts, heads, per_head, positions, times, mass, 2, shared)
    check_bits(state, check_packs(state, softmax_read))


def test_bytes_by_hand():
    state = state_of("float32", counts=(3,), heads=2, positions=True, times=True, mass=True)
    length, count, index = 4, 4, 3 * (4 + 8 + 4)
    assert state.nbytes().tolist() == [length + count + index + 2 * 2 * 3 * 2 * 5 * 4]


def test_bytes_by_what_they_hold():
    """Two heads of 3 slots of 5 numbers, 4 bits; groups of 4 have a scale and a zero, of the first head in float32."""
    state = state_of("4 bits width plain", counts=(3,), heads=2, positions=True, mass=True, layers=1)
    found = {name: each.tolist() for name, each in state.nbytes_by_part().items()}
    codes, scales = [2 * 3 * 3], [2 + 3 * 2 * 2 * (4 + 2)]
    rest = {"length": [4], "counts": [4], "positions": [12], "masses": [12]}
    assert found == {"keys": codes, "keys scales": scales, "values": codes, "values scales": scales, **rest}


def test_what_fields_share_is_told_apart_from_what_is_their_own():
    """Keys and values with one left factor of 3 slots; tied keys and values; and the ids and times of 3 events."""
    count = torch.tensor([[3]], dtype=torch.int32)
    fields = low_ranks(
        [noise(1, 1, 3, 5), noise(1, 1, 3, 5, seed=1)], count.bool().expand(1, 3)[:, None], count - 1, True
    )
    keys, values = fields
    slots, length = Slots(count), torch.tensor([3], dtype=torch.int32)
    state = UserState(((Segment({"keys": keys, "values": values}, slots),),), length)
    factor = {"shared": 3 * 2 * 4, "shared scales": 4 + 4, "keys": 2 * 5 * 4, "values": 2 * 5 * 4}
    assert {k: int(v) for k, v in state.nbytes_by_part().items()} == {"length": 4, "counts": 4, **factor}
    one = Dense(noise(1, 1, 3, 5))
    tied = UserState(((Segment({"keys": one, "values": one}, slots),),), length)
    assert {k: int(v) for k, v in tied.nbytes_by_part().items()} == {"length": 4, "counts": 4, "shared": 3 * 5 * 4}
    items = torch.ones(1, 3, dtype=torch.int32)
    raw = UserState((), length, Events(items, length, items.long(), items.long(), items.byte()))
    assert {k: int(v) for k, v in raw.nbytes_by_part().items()} == {"length": 4, "ids": 12, "times": 24, "kinds": 3}


def test_complete_lists_of_positions_are_not_stored():
    state = state_of("float32", counts=(3, 5), positions=True, mass=True)
    whole = UserState(state.layers, torch.tensor([3, 9], dtype=torch.int32))
    assert (state.nbytes() - whole.nbytes()).tolist() == [3 * 8, 0]
    back = check_packs(whole)
    assert back.layers[0][0].slots.positions[0, 0, :3].tolist() == [0, 1, 2]
    assert back.layers[0][0].slots.mass[0, 0, :3].tolist() == [1, 1, 1]


def test_wide_scales_cost_two_bytes_more():
    count = torch.tensor([[8]], dtype=torch.int32)
    x = noise(1, 1, 8, 4)
    sizes = []
    for factor in (1.0, 1e8):
        vectors = quantize(x * factor, torch.ones(1, 1, 8, dtype=torch.bool), 4, 4, "slots")
        sizes.append(int(sum(p.nbytes() for p in vectors.parts(count))))
    assert sizes == [1 + 16 + 2 * 2 * 4 * 2, 1 + 16 + 2 * 2 * 4 * 4]


def test_shared_objects_are_packed_once_and_stay_shared():
    state = state_of("float32")
    tied = UserState((state.layers[0], state.layers[0]), state.length)
    once = UserState((state.layers[0],), state.length)
    assert tied.nbytes().tolist() == once.nbytes().tolist()
    for made in (check_packs(tied), tied.take(torch.tensor([4, 0])), tied.map(torch.clone)):
        first, second = (layer[0] for layer in made.layers)
        assert first.slots is second.slots and first.fields["keys"] is second.fields["keys"]


def test_slots_shared_by_layers_are_counted_once():
    shared, apart = state_of("float32", times=True), state_of("float32", times=True, shared=False)
    assert (apart.nbytes() - shared.nbytes()).tolist() == [4 + 8 * n for n in COUNTS]


def test_take_picks_rows():
    state = state_of("2 bits width plain", times=True)
    taken = state.take(torch.tensor([4, 1, 1]))
    assert [taken.pack(i) for i in range(3)] == [state.pack(u) for u in (4, 1, 1)]


def test_several_segments():
    state = state_of("4 bits slots plain", times=True)
    tail = state_of("float32", counts=(1, 2, 0, 1, 3), times=True)
    both = UserState(tuple(a + b for a, b in zip(state.layers, tail.layers)), state.length + 5)
    check_bits(both, check_packs(both, softmax_read))
    assert (both.nbytes() - state.nbytes()).tolist() == (tail.nbytes() - 4).tolist()


@pytest.mark.parametrize(
    "kind, stored",
    [
        ("float32", 2 * 4 * 4 * 4),
        ("8 bits width symmetric", 2 * (1 + 4 * (4 + 2))),  # a flag, and for each row its codes and a scale
        ("4 bits slots plain", 2 * (1 + 4 * 2 + 2 * 2 * 4)),  # one group of four rows: a scale and a zero a column
        ("low rank", 4 + 4 + 2 * 2 * 4 * (4 + 4)),
    ],
)
def test_matrix_memory_without_slots(kind, stored):
    memory = encode(kind, noise(3, 2, 4, 4), torch.full((3, 1), 4))
    state = UserState(((Segment({"memory": memory}, None),),), torch.tensor([5, 0, 2], dtype=torch.int32))
    assert state.nbytes().tolist()[:2] == [4 + stored] * 2  # the third user's outlier asks for wide scales
    assert torch.equal(check_packs(state).layers[0][0].fields["memory"].dense(), memory.dense())
    assert torch.equal(poisoned(state).layers[0][0].fields["memory"].dense(), memory.dense())
    assert state.take(torch.tensor([2, 0])).pack(1) == state.pack(0)


@pytest.mark.parametrize("kinds", [False, True])
@pytest.mark.parametrize("times", [False, True])
def test_raw_events(times, kinds):
    count = torch.tensor([0, 2, 4], dtype=torch.int32)
    items = torch.arange(12, dtype=torch.int32).view(3, 4)
    when = torch.arange(12).view(3, 4) + 1_700_000_000
    did = torch.arange(12, dtype=torch.uint8).view(3, 4) + 240
    events = Events(items, count, when if times else None, when + 1, did if kinds else None)
    state = UserState((), count, events)
    assert state.nbytes().tolist() == [4 + n * (4 + 8 * times + kinds) for n in (0, 2, 4)]
    back = check_packs(state)
    assert back.events.items[1, :2].tolist() == [4, 5]
    if times:
        assert back.events.times[2].tolist() == when[2].tolist()
    if kinds:
        assert back.events.kinds[2].tolist() == [248, 249, 250, 251]
    assert set(back.events.columns()) == {"items", *["times"] * times, *["kinds"] * kinds}


def test_events_are_taken_with_all_that_is_known_of_them():
    items, count = torch.tensor([[1, 2, 3], [4, 5, 0]], dtype=torch.int32), torch.tensor([3, 2], dtype=torch.int32)
    events = Events(items, count, items * 10, None, items.to(torch.uint8))
    some = events.take(torch.tensor([[2, 0], [1, 1]]), torch.tensor([2, 1], dtype=torch.int32))
    assert some.items.tolist() == some.kinds.tolist() == [[3, 1], [5, 5]] and some.count.tolist() == [2, 1]
    assert some.times.tolist() == [[30, 10], [50, 50]] and some.next_times is None
    assert events.last(torch.tensor([1, 5])).kinds.tolist()[0][0] == 3


@given(st.binary(max_size=80))
def test_any_wrong_blob_is_refused_or_valid(blob):
    """Bytes from elsewhere: a ValueError, or a state that packs to the same bytes; never a huge allocation."""
    state = state_of("float32", counts=(1,), heads=1, layers=1)
    try:
        back = state.unpack([blob])
    except ValueError:
        return
    assert back.pack(0) == blob


def test_a_huge_count_is_refused_before_anything_is_allocated():
    state = state_of("float32", counts=(2,))
    blob = bytearray(state.pack(0))
    for value in (2**31 - 1, -1):
        blob[4:8] = value.to_bytes(4, "little", signed=True)
        with pytest.raises(ValueError):
            state.unpack([bytes(blob)])


def test_devices_are_left_alone():
    state = state_of("4 bits slots plain")
    assert [state.to("cpu").pack(u) for u in range(len(state))] == [state.pack(u) for u in range(len(state))]

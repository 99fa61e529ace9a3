"""States that keep what keys and values are made of, against what the backbone made, in float64 where it rounds."""

import pytest
import torch
from torch.nn import functional as F

from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.state import Stats
from malloc_bench.testing import World
from malloc_bench.testing.worlds import LENGTHS, close

BACKBONES = [
    "sasrec-2-heads",
    "sasrec-paper-2-heads",
    "hstu-times-2-heads",
    "climber-times-2-heads",
    "lsrm-2-heads",
    "sasrec-gqa",
    "hstu-mla",
]


def place(name, trained):
    return World(name, trained(name))


def real(prefill, layer):
    """(user, slots) of every user of a layer."""
    return enumerate(prefill.rows(layer).tolist())


@pytest.mark.parametrize("name", BACKBONES)
def test_projections_make_what_is_stored(name, trained):
    prefill = place(name, trained).prefill(Stats(inputs=True, projections=True))
    for layer in prefill.layers:
        projection, x = prefill.projection(layer), prefill.layer_input(layer)
        h, weights = x, (projection.get("norm.weight"), projection.get("norm.bias"))
        if "paper" not in name:  # whose keys and values are of the plain input
            h = F.layer_norm(x, x.shape[-1:], *weights, projection.eps)
        for field, vectors in prefill.segment(layer).fields.items():
            made = torch.einsum("bsd,hde->bhse", h, projection[field])
            made = made + projection.get(f"{field}.bias", torch.zeros(1, 1)).unsqueeze(1)
            made = F.silu(made) if projection.silu else made
            for user, n in real(prefill, layer):
                close(made[user, :, :n], vectors.dense()[user, :, :n], field, 1e-5)


@pytest.mark.parametrize(
    "name", ["sasrec-2-heads", "sasrec-paper-2-heads", "hstu-times-2-heads", "climber-times-2-heads"]
)
def test_hidden_is_exact_in_half_of_the_bytes(name, trained):
    world, method = place(name, trained), get_compressor("hidden")
    prefill = world.prefill(method.needs)
    state = method.compress(prefill)
    close(world.read(state), world.read(prefill.state), "read", 1e-5)
    vectors = sum(4 * 2 * 16 * prefill.rows(layer) for layer in prefill.layers)
    assert (prefill.full_bytes() - state.nbytes()).tolist() == (vectors // 2).tolist()


def rounded(x, bits):
    """A vector to 2^bits levels between its ends, scale and end in float16."""
    low, scale = x.min().half().double(), ((x.max() - x.min()) / (2**bits - 1)).half().double()
    return low + scale * ((x - low) / scale).round().clamp(0, 2**bits - 1)


@pytest.mark.parametrize(("bits", "across"), [(4, False), (3, False), (4, True)])
def test_xquant_rounds_inputs(bits, across, trained):
    world, method = place("sasrec-2-heads", trained), get_compressor("xquant", bits=bits, across=across)
    prefill = world.prefill(method.needs)
    state, below = method.compress(prefill), {}
    for layer in prefill.layers:
        projection = prefill.projection(layer)
        x = prefill.layer_input(layer)
        x = (x if across else projection.normed(x)).double()
        for user, n in real(prefill, layer):
            for slot in range(n):
                under = below.get((user, slot), 0.0) if across else 0.0
                below[user, slot] = got = under + rounded(x[user, slot] - under, bits)
                h = got.float()
                h = (projection.normed(h) if across else h).double()
                for field, vectors in state.layers[layer][0].fields.items():
                    want = h @ projection[field].double() + projection[f"{field}.bias"].double()
                    close(vectors.dense()[user, :, slot].double(), want, field, 2e-2)  # a code at an edge may differ


def test_xquant_bytes(trained):
    """Two layers of one vector of width 16: 8 bytes of codes and two numbers a slot, a flag a layer."""
    method = get_compressor("xquant", bits=4)
    prefill = place("sasrec-2-heads", trained).prefill(method.needs)
    assert method.compress(prefill).nbytes().tolist() == [8 + 2 * (1 + 12 * n) for n in LENGTHS]


@pytest.mark.parametrize(
    "name", ["sasrec-2-heads", "sasrec-paper-2-heads", "hstu-times-2-heads", "climber-times-2-heads"]
)
def test_ids_stand_for_the_lowest_layer(name, trained):
    world, method = place(name, trained), get_compressor("ids_below")
    prefill = world.prefill(method.needs)
    state = method.compress(prefill)
    close(world.read(state), world.read(prefill.state), "read", 1e-5)
    depth = len(prefill.layers) // prefill.stacks
    saved = sum(4 * (2 * 16 - 1) * prefill.rows(layer) for layer in prefill.layers[::depth])
    if prefill.slots(0).positions is not None:
        saved = saved - sum(4 * prefill.rows(layer) for layer in prefill.layers[::depth])
    assert (prefill.full_bytes() - state.nbytes()).tolist() == saved.tolist()


def test_what_ids_leave_goes_to_the_inner_method(trained):
    world, budget = place("sasrec-2-heads", trained), Budget(0.3)
    method = get_compressor("ids_below", inner="recent")
    prefill = world.prefill(method.needs)
    state = method.compress(prefill, budget)
    target = budget.target(prefill.full_bytes())
    kept = state.layers[1][0].slots.count[:, 0].tolist()
    for user, n in enumerate(LENGTHS):
        left = int(target[user]) - (8 + 4 * n) - 4  # length and count, ids; the upper layer's own count
        assert kept[user] == max(min(n, left // (4 * 2 * 16)), min(n, 1))


def test_where_inputs_save_nothing():
    from malloc_bench.backbones import get_backbone

    thin = get_compressor("mqa").adapted(get_backbone("sasrec", 9, heads=4, dim=16))
    assert get_compressor("hidden").supports(thin) == "hidden keeps 16 numbers an event, its keys and values are 8"
    marm = get_backbone("marm", 9, dim=16)
    assert get_compressor("ids_below").supports(marm) == "ids_below rebuilds keys and values, marm stores hidden"
    delta = get_backbone("gated_delta", 9, dim=16)
    assert get_compressor("xquant").supports(delta) is not None


@pytest.mark.parametrize("name", ["sasrec-2-heads", "sasrec-paper-2-heads", "hstu-times-2-heads"])
def test_coded_ids_are_those_of_recompute(name, trained):
    world, method = place(name, trained), get_compressor("ids_coded")
    world = world.fit(method)
    prefill = world.prefill(method.needs)
    state, raw = method.compress(prefill), get_compressor("recompute").compress(prefill)
    back = state.take(torch.tensor([1])).unpack([state.pack(user) for user in range(len(LENGTHS))])
    assert torch.equal(back.events.items, raw.events.items)
    close(world.read(back), world.read(prefill.state), "read", 1e-5)
    assert int(state.nbytes()[-1]) < int(raw.nbytes()[-1]) - 2 * LENGTHS[-1]
    counts = prefill.items["popularity"] + 1
    sample = world.sample(method).events
    for item in sample.items[sample.mask()].tolist():
        counts[item - 1] += 1
    assert world.fitted["counts"].tolist() == counts.tolist()

"""Searches against their definitions, slot by slot; what they cost to read, and that they touch nothing else."""

from dataclasses import replace

import pytest
import torch

from malloc_bench.backbones import get_backbone
from malloc_bench.compressors import get_compressor
from malloc_bench.measure import Workload, closed_form
from malloc_bench.measure.latency import _make
from malloc_bench.state import Dense, Segment, Slots, Stats, UserState
from malloc_bench.state.lookup import _planes
from malloc_bench.testing import World
from malloc_bench.testing.worlds import LENGTHS, POISON, close, histories

TOP = 4
METHODS = {
    "sim_soft": {},
    "sim_hard": {},
    "eta": {"bits": 16},
    "sdim": {"bits": 16, "run": 4},
}


def method(name):
    return get_compressor(name, top=TOP, **METHODS[name])


@pytest.fixture(params=["sasrec", "hstu"])
def world(request):
    torch.manual_seed(0)
    backbone = get_backbone(request.param, 60, request.param == "hstu", layers=1, heads=2, dim=16, max_length=64)
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return World(request.param, backbone.eval().requires_grad_(False))


def asked(world, tokens, length):
    """The only layer's queries [B, H, M, D], what tokens are, and the logits of keys at places."""
    positions = length.long()[:, None].expand(-1, tokens.items.shape[1])
    places = world.backbone._places(tokens, positions)[1]
    return world.backbone.blocks[0].project(world.backbone._embed(tokens, positions))[0], places


def hashes(x, bits):
    return (x @ _planes(x.shape[-1], bits).double() > 0).int().tolist()


def wanted(name, world, prefill, tokens):
    """The slots that each token and head should read, {(user, head, token): set}, by definition."""
    segment, block = prefill.segment(0), world.backbone.blocks[0]
    q, places = asked(world, tokens, prefill.state.length)
    own = segment.slots.places(segment.width, prefill.state.length[:, None])
    logits = block.logits(q, segment, places, replace(places, positions=own, times=segment.slots.timestamps))
    categories = prefill.items["categories"]
    found = {}
    for user, n in enumerate(prefill.state.length.tolist()):
        for head in range(2):
            keys = prefill.keys(0)[user, head, :n].double()
            for m in range(tokens.items.shape[1]):
                if name == "sim_soft":
                    rated = {i: (float(logits[user, head, m, i]), i) for i in range(n)}
                elif name == "sim_hard":
                    mine = categories[int(tokens.items[user, m]) - 1]
                    events = prefill.events.items[user, :n].tolist()
                    rated = {i: (i,) for i in range(n) if categories[events[i] - 1] == mine}
                else:
                    codes = hashes(keys - keys.mean(0), 16) if n else []
                    mine, run = hashes(q[user, head, m].double(), 16), METHODS[name].get("run", 1)
                    runs = range(0, 16, run)
                    same = [sum(c[r : r + run] == mine[r : r + run] for r in runs) for c in codes]
                    rated = {i: (same[i], i) for i in range(n) if same[i] or name == "eta"}
                found[user, head, m] = set(sorted(rated, key=rated.get)[-TOP:])
    return found


@pytest.mark.parametrize("name", METHODS)
def test_a_token_reads_the_slots_of_the_definition_and_no_other(name, world):
    prefill, (_, tokens) = world.prefill(Stats(categories=True)), histories(world.backbone, LENGTHS)
    (segment,) = method(name).compress(prefill).layers[0]
    q, places = asked(world, tokens, prefill.state.length)
    found = wanted(name, world, prefill, tokens)
    own = segment.slots.places(segment.width, prefill.state.length[:, None])
    seen = replace(places, positions=own, times=segment.slots.timestamps)
    logits = world.backbone.blocks[0].logits(q, segment, places, seen)
    index, there = segment.lookup.find(q, tokens.items, segment.slots.mask(segment.width), logits)
    index, there = (x.expand(-1, 2, -1, -1) for x in (index, there))
    assert index.shape[-1] == TOP
    for (user, head, m), want in found.items():
        assert set(index[user, head, m][there[user, head, m]].tolist()) == want
    assert name != "sim_hard" or any(len(want) < TOP for (user, _, _), want in found.items() if LENGTHS[user] > TOP)

    # the read is that of a state of these slots alone, whatever stands in the others
    for user, m in ((user, m) for user, head, m in found if head == 0 and LENGTHS[user] > 20):
        touched = torch.zeros(2, segment.width, 1, dtype=torch.bool)
        for h in range(2):
            touched[h, sorted(found[user, h, m])] = True
        read = {"values"} if name == "sim_soft" else {"keys", "values"}  # a search by logits reads all keys
        fields = {
            k: Dense(torch.where(touched, v.dense(), POISON) if k in read else v.dense())
            for k, v in segment.fields.items()
        }
        spoilt = UserState(((Segment(fields, segment.slots, segment.lookup),),), prefill.state.length)
        got = world.backbone.read(tokens, spoilt)[user, m]
        few = [sorted(found[user, h, m]) for h in range(2)]
        close(got, by_definition(world, prefill, tokens, user, m, few), name, 1e-5)


def by_definition(world, prefill, tokens, user, m, few):
    """The output of token m over a state of few[h] slots in each head h alone, their places written down."""
    rows, size = torch.tensor([user]), max(map(len, few))
    one = tokens.take(torch.full((len(LENGTHS), 1), m), torch.ones(len(LENGTHS), dtype=torch.int32))
    one = one.each(lambda x: x[rows], one.count[rows])
    index = torch.tensor([[each + [0] * (size - len(each)) for each in few]])  # [1, H, size]
    segment = prefill.segment(0)
    fields = {k: Dense(v.dense()[rows].gather(2, index[..., None].expand(-1, -1, -1, v.shape[3])))
              for k, v in segment.fields.items()}  # fmt: skip
    times = segment.slots.timestamps
    times = None if times is None else times[rows].expand(-1, 2, -1).gather(2, index)
    slots = Slots(torch.tensor([[len(each) for each in few]], dtype=torch.int32), index.int(), times)
    return world.backbone.read(one, UserState(((Segment(fields, slots),),), prefill.state.length[rows]))[0, 0]


@pytest.mark.parametrize("name", ["sim_soft", "eta"])
def test_what_finds_every_slot_reads_the_full_state(name, world):
    prefill = world.prefill(get_compressor(name).needs)
    state = get_compressor(name, top=64).compress(prefill)
    close(world.read(state), world.read(prefill.state), name, 1e-5)


def test_bytes_are_those_of_the_full_state_and_the_codes(world):
    prefill = world.prefill(get_compressor("sim_hard").needs)
    n, full = prefill.state.length.long(), prefill.state.nbytes()
    more = {"sim_soft": 0, "sim_hard": 1, "eta": 2 * 2, "sdim": 2 * 2}  # a slot: its category, or 16 bits of each head
    for name, each in more.items():
        assert (method(name).compress(prefill).nbytes() - full).tolist() == (each * n).tolist()


def test_categories_are_stored_once_for_all_layers():
    backbone = get_backbone("sasrec", 60, False, layers=3, heads=2, dim=16, max_length=64).eval()
    prefill = World("sasrec", backbone).prefill(get_compressor("sim_hard").needs)
    state = get_compressor("sim_hard").compress(prefill)
    assert (state.nbytes() - prefill.state.nbytes()).tolist() == list(LENGTHS)


@pytest.mark.parametrize("backbone", ["sasrec", "hstu"])
def test_reads_cost_less_and_the_cheaper_the_search(backbone):
    backbone, work = (
        get_backbone(backbone, 60, False, layers=2, heads=2, dim=64, max_length=501).eval(),
        Workload(1, 500),
    )
    with torch.inference_mode():
        read = {}
        for name in ("full", "recent", *METHODS):
            each = get_compressor(name)
            state = each.compress(work.prefill(backbone, each.needs), {"slots": 32} if each.takes_budget else None)
            read[name] = closed_form(backbone, each, state, work)["read_flops"]
    assert read["sim_hard"] == read["recent"] < read["eta"] == read["sdim"] < read["sim_soft"] < read["full"]


def test_new_events_are_read_whatever_they_are(world):
    prefill, (_, new) = world.prefill(get_compressor("sim_hard").needs), histories(world.backbone, LENGTHS)
    for name in METHODS:
        state = method(name).compress(prefill)
        grown = world.backbone.append(state, new)
        first, second = grown.layers[0]
        assert first.lookup is state.layers[0][0].lookup and second.lookup is None
        assert second.slots.count.flatten().tolist() == [2] * len(LENGTHS)


def test_their_latency_is_their_own(world):
    """Bytes are those of the full state; what is read of them is not."""
    prefill = world.prefill(Stats())
    made = [get_compressor("sim_soft", top=top).compress(prefill) for top in (4, 8, 8)]
    full, four, eight, again = (_make(None, state) for state in (prefill.state, *made))
    assert len({full, four, eight}) == 3 and eight == again


@pytest.mark.parametrize(
    "name, params", [("eta", {"top": 0}), ("eta", {"bits": 12}), ("sdim", {"run": 3}), ("sim_soft", {"top": 0})]
)
def test_parameters_out_of_range(name, params):
    with pytest.raises(ValueError, match=name):
        get_compressor(name, **params)

"""Methods that fold slots together against their definitions, spelled out slot by slot in float64."""

from dataclasses import replace

import pytest
import torch

from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.compressors.eviction.random import hashed
from malloc_bench.compressors.merging import clusters
from malloc_bench.state import Dense, Events, Named, Prefill, Segment, Slots, Stats, UserState
from malloc_bench.testing import World, histories
from malloc_bench.testing.worlds import close

COUNTS = (1, 4, 9, 21)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[False, True], ids=["", "placed"])
def prefill(request):
    shape = (len(COUNTS), 2, max(COUNTS), 4)
    keys, values, queries, bias = (noise(*shape, seed=i) for i in range(4))
    given = Prefill.from_tensors([keys], [values], [queries], None, torch.tensor(COUNTS), positions=request.param)
    return replace(given, standing=[bias[..., 0]]) if request.param else given


def cosine(a, b):
    return float(a @ b / (a @ a).sqrt() / (b @ b).sqrt())


def placed(prefill, user, head, keys):
    """Keys [n, D] and a column more: the bias of each slot over twice the root mean square of the queries' numbers."""
    queries = prefill.queries[0][user, head, -len(keys) :].double()
    bias = prefill.standing[0][user, head, : len(keys), None].double()
    return torch.cat([keys, bias / 2 / queries.square().mean().sqrt()], 1)


def check(prefill, method, k, define, by_place=True):
    """Each head's clusters: define(user, head, keys) -> [{slot: weight}], in time order; weights need not come to 1.

    by_place: where positions are read the keys that it gets are `placed`.
    """
    state = method.compress(prefill, Budget(slots=k))
    (segment,) = state.layers[0]
    for user, n in enumerate(COUNTS):
        for head in range(2):
            keys, values = (x[user, head, :n].double() for x in (prefill.keys(0), prefill.values(0)))
            groups = define(user, head, placed(prefill, user, head, keys) if by_place and prefill.standing else keys)
            assert int(segment.slots.count[user, 0]) == len(groups) == min(k, n)
            for at, weights in enumerate(groups):
                total = sum(weights.values())
                for name, rows in (("keys", keys), ("values", values)):
                    want = sum(weight * rows[slot] for slot, weight in weights.items()) / total
                    close(
                        segment.fields[name].dense()[user, head, at].double(), want, f"{name} {user} {head} {at}", 1e-4
                    )
                assert float(segment.slots.mass[user, head, at]) == len(weights)
                mean = sum(weights) / len(weights)
                assert not prefill.uses_positions or abs(int(segment.slots.positions[user, head, at]) - mean) <= 0.5


@pytest.mark.parametrize("prefill", [True], indirect=True, ids=["placed"])
@pytest.mark.parametrize("mass", [True, False])
@pytest.mark.parametrize("k, merge", [(1, 4), (4, 2), (9, 3), (20, 1)])
def test_cam(prefill, k, merge, mass):
    """Values alone change: by those of evicted slots, in equal shares, where the lot falls on them."""
    inner = {"recent": 0.25}
    state = get_compressor("cam", inner={"h2o": inner}, merge=merge, mass=mass).compress(prefill, Budget(slots=k))
    plain, (segment,), lots = get_compressor("h2o", **inner).compress(prefill, Budget(slots=k)), state.layers[0], []
    assert torch.equal(segment.fields["keys"].dense(), plain.layers[0][0].fields["keys"].dense())
    more = [4 * 2 * k * mass * (n > k) for n in COUNTS]
    assert state.nbytes().tolist() == [n + m for n, m in zip(plain.nbytes().tolist(), more)]
    for user, n in enumerate(COUNTS):
        for head in range(2):
            values = prefill.values(0)[user, head, :n].double()
            received = prefill.attention_received(0)[user, head, :n].double() / torch.arange(n, 0, -1)
            kept = segment.slots.positions[user, head, : min(k, n)].tolist()
            want, counts = values[kept].clone(), torch.ones(len(kept), 1).double()
            for i in set(range(n)) - set(kept):
                follow = [at for at, slot in enumerate(kept) if slot > i][:merge]
                if not follow:
                    continue
                chance = float(received[i] / received[[kept[at] for at in follow]].mean())
                lot = float(hashed(prefill, 0, torch.tensor([[[2 * i + head]]]))[user])
                lots.append(lot < chance)
                want[follow] += lots[-1] * values[i] / len(follow)
                counts[follow] += lots[-1] / len(follow)
            got = segment.fields["values"].dense()[user, head, : len(kept)].double()
            close(got, want / counts if mass else want, f"values {user} {head}", 1e-5)
            if mass:
                close(segment.slots.mass[user, head, : len(kept)].double(), counts[:, 0], "mass", 1e-5)
    assert k in (1, 20) or 0 < sum(lots) < len(lots)


@pytest.mark.parametrize("k", [1, 2, 5, 20])
def test_kvmerger(prefill, k):
    def define(user, head, keys):
        n = len(keys)
        alike = sorted((cosine(keys[i], keys[i - 1]), i) for i in range(1, n))
        cuts = sorted(i for _, i in alike[: min(k, n) - 1])
        runs = [range(a, b) for a, b in zip([0, *cuts], [*cuts, n])]
        found = []
        for run in runs:
            mean = sum(keys[i] / (keys[i] @ keys[i]).sqrt() for i in run)
            near = {i: cosine(keys[i], mean) for i in run}
            pivot = max(i for i in run if near[i] >= max(near.values()) - 1e-5)  # two slots are equally near
            gaps = {i: float((keys[i] - keys[pivot]).norm()) for i in run}
            sigma = sum(gaps.values()) / len(gaps)
            weigh = {i: float(torch.tensor(-(g**2) / 2 / sigma**2).exp()) if sigma else 1.0 for i, g in gaps.items()}
            found.append(weigh)
        return found

    check(prefill, get_compressor("kvmerger"), k, define, by_place=False)


@pytest.mark.parametrize("k", [1, 2, 5, 20])
def test_d2o(prefill, k):
    scores = get_compressor("value_norm").scores(prefill, 0)

    def define(user, head, keys):
        n = len(keys)
        kept = sorted(sorted(range(n), key=lambda i: -float(scores[user, head, i]))[: min(k, n)])
        found = [{slot: 1.0} for slot in kept]
        for i in set(range(n)) - set(kept):
            near = max(range(len(kept)), key=lambda j: cosine(keys[i], keys[kept[j]]))
            found[near][i] = float(torch.tensor(cosine(keys[i], keys[kept[near]]) - 1.0).exp())
        return found

    check(prefill, get_compressor("d2o", inner="value_norm"), k, define)


@pytest.mark.parametrize("k", [1, 2, 5, 20])
def test_tome(prefill, k):
    def define(user, head, keys):
        slots = [({i}, keys[i]) for i in range(len(keys))]
        while len(slots) > min(k, len(keys)):
            n = len(slots)
            first = [i for i in range(n) if (n - 1 - i) % 2 == 1]
            others = [i for i in range(n) if i not in first]
            pairs = {a: max((cosine(slots[a][1], slots[b][1]), b) for b in others) for a in first}
            for a in sorted(first, key=lambda a: -pairs[a][0])[: min(n - min(k, len(keys)), n // 2)]:
                b = pairs[a][1]
                members = slots[b][0] | slots[a][0]
                slots[b] = (members, sum(keys[i] for i in members) / len(members))
                slots[a] = None
            slots = [slot for slot in slots if slot]
        return [dict.fromkeys(members, 1.0) for members, _ in slots]

    check(prefill, get_compressor("tome"), k, define)


@pytest.mark.parametrize("k", [1, 2, 5, 20])
def test_kmeans(prefill, k):
    def define(user, head, keys):
        n, size = len(keys), min(k, len(keys))
        seeds = [-(-(j + 1) * n // size) - 1 for j in range(size)]
        centres = [keys[s] for s in seeds]
        for _ in range(5):
            owner = [min(range(size), key=lambda j: float((x - centres[j]).square().sum())) for x in keys]
            for j, s in enumerate(seeds):
                owner[s] = j
            centres = [torch.stack([x for x, o in zip(keys, owner) if o == j]).mean(0) for j in range(size)]
        return [{i: 1.0 for i, o in enumerate(owner) if o == j} for j in range(size)]

    check(prefill, get_compressor("kmeans"), k, define)


def test_planted_clusters_are_found():
    centres = torch.tensor([[10.0, 0], [0, 10], [-10, -10]])
    which = torch.tensor([0, 1, 2] * 7)
    keys = (centres[which] + 0.1 * noise(21, 2)).view(1, 1, 21, 2)
    prefill = Prefill.from_tensors([keys], [keys])
    for name in ("kmeans", "tome"):
        (segment,) = get_compressor(name).compress(prefill, Budget(slots=3)).layers[0]
        found = segment.fields["keys"].dense()[0, 0]
        assert segment.slots.mass[0, 0].tolist() == [7, 7, 7], name
        assert torch.cdist(found, centres).amin(1).max() < 0.2, name


@pytest.mark.parametrize("k", [1, 2, 5, 20])
def test_resets(prefill, k):
    scores = get_compressor("value_norm").scores(prefill, 0)

    def define(user, head, keys):
        n, size = len(keys), min(k, len(keys))
        kept = sorted(range(n), key=lambda i: -float(scores[user, head, i]))[: size // 2]
        rest = [i for i in range(n) if i not in kept]
        more = size - len(kept)
        seeds = [rest[-(-(j + 1) * len(rest) // more) - 1] for j in range(more)]
        centres = [keys[s] for s in seeds]
        for _ in range(5):
            near = {i: min(range(more), key=lambda j: float((keys[i] - centres[j]).square().sum())) for i in rest}
            near |= {s: j for j, s in enumerate(seeds)}
            centres = [torch.stack([keys[i] for i in rest if near[i] == j]).mean(0) for j in range(more)]
        found = {s: {i: 1.0 for i in rest if near[i] == j} for j, s in enumerate(seeds)} | {i: {i: 1.0} for i in kept}
        return [found[seed] for seed in sorted(found)]

    check(prefill, get_compressor("resets", inner="value_norm"), k, define)


@pytest.mark.parametrize("k", [1, 2, 3, 20])
def test_category_merge(prefill, k):
    """One slot a category where there are as many slots as categories, which are 3 here; the same for all heads."""
    categories = torch.randint(0, 3, (4, 21), generator=torch.Generator().manual_seed(4))
    events = Events(categories.int() + 1, torch.tensor(COUNTS, dtype=torch.int32))
    prefill = replace(prefill, events=events, items=Named({"categories": torch.arange(3)}))
    state = get_compressor("category_merge").compress(prefill, Budget(slots=k))
    (segment,) = state.layers[0]
    for user, n in enumerate(COUNTS):
        kinds = categories[user, :n].tolist()
        newer = [kinds[i + 1 :].count(kinds[i]) for i in range(n)]
        lead = sorted(sorted(range(n), key=lambda i: (newer[i], -i))[:k])
        groups = {i: [] for i in lead}
        for i in range(n):
            mine = [j for j in lead if j >= i and kinds[j] == kinds[i]]
            groups[min(mine, default=lead[0])].append(i)
        assert segment.slots.mass[user, 0, : len(lead)].tolist() == [len(g) for g in groups.values()]
        for slot, group in enumerate(groups.values()):
            want = prefill.keys(0)[user, :, group].double().mean(1)
            close(segment.fields["keys"].dense()[user, :, slot].double(), want, f"{user} {slot}", 1e-5)


@pytest.mark.parametrize("prefill", [True], indirect=True, ids=["placed"])
def test_vql(prefill):
    method = get_compressor("vql", codes=5)
    fitted = method.fit(prefill)
    (segment,) = method.compress(prefill, None, fitted).layers[0]
    for user, n in enumerate(COUNTS):
        for head in range(2):
            keys, values = (x[user, head, :n].double() for x in (prefill.keys(0), prefill.values(0)))
            table = fitted["0"][head, 0].double()
            near = [int((table - x).square().sum(-1).argmin()) for x in keys]
            used = sorted(set(near), key=lambda c: sum(i for i in range(n) if near[i] == c) / near.count(c))
            assert int(segment.slots.count[user, head]) == len(used)
            for slot, code in enumerate(used):
                group = [i for i in range(n) if near[i] == code]
                assert float(segment.slots.mass[user, head, slot]) == len(group)
                close(segment.fields["keys"].dense()[user, head, slot].double(), table[code], "key", 1e-6)
                close(segment.fields["values"].dense()[user, head, slot].double(), values[group].mean(0), "value", 1e-5)
                assert abs(int(segment.slots.positions[user, head, slot]) - sum(group) / len(group)) <= 0.5


def test_the_size_of_vql_does_not_grow_with_the_history():
    keys = [noise(1, 2, n, 4, seed=n) for n in (40, 400)]
    fitted = get_compressor("vql", codes=4).fit(Prefill.from_tensors(keys[:1], keys[:1]))
    sizes = [
        get_compressor("vql", codes=4).compress(Prefill.from_tensors([k], [k]), None, fitted).nbytes() for k in keys
    ]
    assert sizes[0] == sizes[1]


def test_a_state_of_vql_that_goes_on_is_that_of_all_events(trained):
    """In the lowest layer, where what is stored of an event hangs on the event alone; a slot counts for its events."""
    backbone, method = trained("sasrec"), get_compressor("vql", codes=5)
    with torch.no_grad():
        fitted = method.fit(World("sasrec", backbone).sample(method))
        history, _ = histories(backbone, (12, 25))
        before = history.each(lambda x: x, history.count - 3)
        grown = backbone.prefill(before).given(fitted)
        for left in (3, 2, 1):
            event = history.last(torch.full_like(history.count, left)).each(
                lambda x: x[:, :1], torch.ones_like(before.count)
            )
            state = method.compress(grown, None, fitted)
            grown = backbone.go_on(grown, state, event, method.needs)
        (state,), (want,) = (method.compress(x, None, fitted).layers[0] for x in (grown, backbone.prefill(history)))
    for user in range(2):
        for head in range(state.slots.count.shape[1]):
            found = []
            for each in (state, want):
                n = int(each.slots.count[user, head])
                code = each.fields["keys"].codes[user, head, :n, 0].argsort()  # they lie in another order
                found.append([x[user, head, :n][code] for x in (each.slots.mass, each.fields["values"].dense())])
            assert torch.equal(found[0][0], found[1][0]) and found[0][0].sum() == history.count[user]
            close(found[0][1], found[1][1], f"{user} {head}", 1e-5)


@pytest.mark.parametrize("method", ["merge_adjacent", "kmeans", "tome"])
def test_slots_that_count_for_less_than_an_event_merge_to_a_mean(method):
    """As those that were fitted may: was a sum over less than 1, and a place near the start."""
    one = torch.ones(1, 1, 6, 4)
    slots = Slots(torch.tensor([[6]], dtype=torch.int32), torch.arange(10, 16).int()[None, None], None, one[..., 0] / 8)
    kept = UserState(((Segment({"keys": Dense(one), "values": Dense(one)}, slots),),), torch.tensor([20]).int())
    prefill = Prefill.from_tensors([noise(1, 1, 20, 4)], [noise(1, 1, 20, 4)], positions=True).over(kept)
    (segment,) = get_compressor(method).compress(prefill, Budget(slots=2)).layers[0]
    assert torch.allclose(segment.fields["keys"].dense(), one[:, :, :2]) and segment.slots.mass.sum() == 6 / 8
    assert 10 <= int(segment.slots.positions.min()) <= int(segment.slots.positions.max()) <= 15


def test_alike_keys_merge_by_where_they_stand():
    """Keys that are all the same, a bias of the newest alone: it stays by itself."""
    same, bias = torch.ones(1, 1, 32, 4), torch.zeros(1, 1, 32)
    bias[..., -1] = 3.0
    prefill = replace(Prefill.from_tensors([same], [same], [same], positions=True), standing=[bias])
    for name in ("kmeans", "tome"):
        state = get_compressor(name).compress(prefill, Budget(slots=4))
        assert state.layers[0][0].slots.mass[0, 0, -1] == 1, name


@pytest.mark.parametrize("name", ["kmeans", "tome", "d2o", "resets"])
def test_clusters_do_not_depend_on_what_others_ask(trained, name, monkeypatch):
    """In a run with methods that ask for more queries all are gathered once: each still looks at its own."""
    monkeypatch.setattr(clusters, "WINDOW", 4)
    states = []
    for queries in (4, 40):
        prefill = World("hstu", trained("hstu")).prefill(Stats(column_sum=True, queries=queries))
        states.append(get_compressor(name).compress(prefill, Budget(slots=5)))
    for layer, (one, other) in enumerate(zip(*(state.layers for state in states))):
        close(one[0].fields["keys"].dense(), other[0].fields["keys"].dense(), f"layer {layer}", 1e-6)


def test_behind_another_method_clusters_go_by_keys_alone(trained):
    """There nobody knows what the next token asks: kmeans may still come second."""
    backbone = trained("hstu")
    chain = get_compressor("compose", steps=("recent", "kmeans"))
    prefill = World("hstu", backbone).prefill(chain.needs)
    assert prefill.standing is not None and chain.compress(prefill, Budget(slots=2)).layers


@pytest.mark.parametrize("method", ["kmeans", "tome", "expected_attention", "keyformer", "capkv"])
@pytest.mark.parametrize("before", ["beacon", "longformer"])
def test_behind_what_drops_slots_each_slot_has_its_own_bias(trained, before, method):
    """Of what stays, each slot the bias of its own distance."""
    structural = get_compressor(before, **({"chunk": 4} if before == "beacon" else {"window": 4, "globals": 1}))
    backbone = structural.adapted(trained("hstu")).eval()
    prefill = World("hstu", backbone).prefill(Stats(queries=64))
    for layer in prefill.layers:
        slots, length = prefill.slots(layer), prefill.state.length.long()
        far = length[:, None, None] - slots.places(prefill.segment(layer).width, length[:, None])
        want = backbone.blocks[layer].position_bias[far.clamp(0, backbone.max_length)]
        near = (prefill.standing[layer] - want).masked_fill(~prefill.mask(layer), 0.0)
        assert float(near.detach().abs().max()) < 1e-5
    state = get_compressor(method).compress(prefill, Budget(slots=3))
    assert all(segment.slots.count.max() <= 3 for (segment,) in state.layers)


@pytest.mark.parametrize("case", ["climber", "climber-times-2-heads"])
def test_clusters_go_on_where_nobody_knows_what_new_events_asked(case, trained):
    """By keys alone: `update` and drift do not stop for want of what they can do without."""
    backbone, method = trained(case), get_compressor("kmeans")
    history, _ = histories(backbone, (6, 9, 23))
    prefill = backbone.prepare(history.each(lambda x: x, history.count - 2), stats=method.needs)
    assert prefill.standing is not None
    state = method.compress(prefill, Budget(slots=3))
    grown = backbone.go_on(prefill, state, history.last(torch.full_like(history.count, 2)), method.needs)
    assert grown.standing is None and method.update(grown, Budget(slots=3)).length.tolist() == history.count.tolist()

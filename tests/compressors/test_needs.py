"""What methods ask of a prefill beside keys and values: that it is what it says, and what methods make of it."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.state import Dense, Events, MissingStatistic, Named, Prefill, Stats
from malloc_bench.testing import World, histories
from malloc_bench.testing.worlds import LENGTHS, close

COUNTS = (1, 3, 9, 23)
ATTENTION = [
    "sasrec-2-heads",
    "hstu-times-2-heads",
    "lsrm-2-heads",
    "sasrec-gqa",
    "climber-times-2-heads",
    "sasrec-mla",
]
EVERYTHING = Stats(queries=5, inputs=True, outputs=True, events=True)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def prefill():
    """Two stored heads, each of two query heads."""
    shape = (len(COUNTS), 2, max(COUNTS), 4)
    items = torch.randint(1, 13, (len(COUNTS), max(COUNTS)), generator=torch.Generator().manual_seed(3))
    count = torch.tensor(COUNTS, dtype=torch.int32)
    items = items.int() * (torch.arange(max(COUNTS)) < count[:, None])
    facts = Named({"categories": torch.arange(12) % 5, "popularity": torch.arange(12) ** 2 % 7})
    keys, values = noise(*shape, seed=0), noise(*shape, seed=1)
    more = {"events": Events(items, count), "items": facts, "outputs": [noise(4, 4, 6, seed=5)]}
    queries = noise(len(COUNTS), 4, max(COUNTS), 4, seed=2)
    return Prefill.from_tensors([keys], [values], [queries], lengths=count, positions=True, **more)


def check(prefill, name, define, **params):
    """define(user, head, keys [n, D], values [n, D]) -> scores [n], in float64."""
    scores = get_compressor(name, **params).scores(prefill, 0)
    for user, n in enumerate(COUNTS):
        for head in range(scores.shape[1]):
            keys, values = (x(0)[user, head, :n].double() for x in (prefill.keys, prefill.values))
            close(scores[user, head, :n].double(), define(user, head, keys, values), f"{name} of user {user}", 1e-4)


def asked(user, window):
    """Queries of a user's newest `window` events, [4 heads, W, D], float64, over the root of their width."""
    n = COUNTS[user]
    return noise(len(COUNTS), 4, max(COUNTS), 4, seed=2).double()[user, :, max(0, n - window) : n] / 2


@pytest.mark.parametrize("window", [4, 64])
def test_expected_attention(prefill, window):
    def define(user, head, keys, values):
        total = torch.zeros(len(keys), dtype=torch.float64)
        for q in asked(user, window)[2 * head : 2 * head + 2]:
            mean = q.mean(0)
            cov = sum(torch.outer(x - mean, x - mean) for x in q) / len(q)
            total += torch.stack([k @ mean + k @ cov @ k / 2 for k in keys]).softmax(0) / 2
        return total * torch.stack([v.norm() for v in values])

    check(prefill, "expected_attention", define, window=window)


def test_capkv(prefill):
    def define(user, head, keys, values):
        total = torch.zeros(len(keys), dtype=torch.float64)
        for q in asked(user, 6)[2 * head : 2 * head + 2]:
            anchor = q.mean(0) / q.mean(0).norm()
            cos = torch.stack([k @ anchor / k.norm() for k in keys])
            weight = (5 * (cos - cos.max())).exp()
            matrix = torch.eye(4).double() + sum(w * torch.outer(v, v) for w, v in zip(weight, values))
            total += torch.stack([w * (v @ matrix.inverse() @ v) for w, v in zip(weight, values)]) / 2
        return total

    check(prefill, "capkv", define, window=6)


@pytest.mark.parametrize("inner", ["knorm", {"expected_attention": {"window": 4}}, {"snapkv": {"window": 2}}], ids=str)
@pytest.mark.parametrize("k", [1, 2, 5, 12, 22])
def test_critical(prefill, inner, k):
    method = get_compressor("critical", inner=inner)
    state, maps = method.compress(prefill, Budget(slots=k)), noise(4, 4, 6, seed=5).double()
    first = method.inner
    scores = first.scores(prefill, 0).double()
    for user, n in enumerate(COUNTS):
        early = first.compress(prefill, Budget(slots=max(1, min(k, n) // 2))).layers[0][0].slots
        for head in range(2):
            want = set(early.positions[user, head, : early.count[user, 0]].tolist()) if k < n else set(range(n))
            rest = []
            for slot in range(n):
                value = prefill.values(0)[user, head, slot].double()
                size = sum((value @ maps[h]).abs().sum() for h in (2 * head, 2 * head + 1)) / 2
                rest.append(((scores[user, head, slot] + 1e-4) * size, slot))
            for _, slot in sorted(rest, reverse=True):
                if len(want) < min(k, n):
                    want.add(slot)
            slots = state.layers[0][0].slots
            assert set(slots.positions[user, head, : slots.count[user, 0]].tolist()) == want


def test_keyformer(prefill):
    """Noise aside: its own test shows that it is Gumbel's, and no user's or slot's another's."""
    from malloc_bench.compressors.eviction.random import hashed

    prefill = replace(prefill, seed=3)
    tau = [1 + i / 5 for i in range(6)]

    def define(user, head, keys, values):
        n, total = len(keys), torch.zeros(len(keys), dtype=torch.float64)
        for q in asked(user, 6)[2 * head : 2 * head + 2]:
            for at, query in enumerate(q, start=n - len(q)):
                what = torch.arange(max(COUNTS)) + (1 << 20) * at
                noise = -(-hashed(prefill, 0, what.expand(len(COUNTS), 1, -1))[user, 0].double().log()).log()
                logits = (keys[: at + 1] @ query + noise[: at + 1]) / tau[6 - (n - at)]
                total[: at + 1] += logits.softmax(0) / 2
        return total

    def mean(user, head, keys, values):
        n = len(keys)
        return define(user, head, keys, values) / torch.tensor([min(6, n - i) for i in range(n)])

    check(prefill, "keyformer", define, window=6, normalise=False)
    check(prefill, "keyformer", mean, window=6)
    noise = -(-hashed(prefill, 0, torch.arange(40_000).view(1, 1, -1)).log()).log()
    assert abs(float(noise.mean()) - 0.5772) < 0.02 and abs(float(noise.std()) - 1.2825) < 0.02


def test_rastp(prefill):
    prefill = Prefill.from_tensors(
        [prefill.keys(0)], [prefill.values(0)], [noise(4, 4, 23, 4, seed=2)], lengths=torch.tensor(COUNTS)
    )
    prefill = replace(prefill, inputs=[noise(4, 23, 6, seed=8)])

    def define(user, head, keys, values):
        n, total = len(keys), torch.zeros(len(keys), dtype=torch.float64)
        queries = noise(4, 4, 23, 4, seed=2).double()[user, :, :n] / 2
        for h in range(4):  # the mean over query heads that share a stored one
            logits = (queries[h] @ prefill.keys(0)[user, h // 2, :n].double().T).masked_fill(
                torch.ones(n, n).triu(1).bool(), -torch.inf
            )
            total += logits.softmax(-1).sum(0) / 2
        return total * torch.stack([x.abs().sum() for x in noise(4, 23, 6, seed=8)[user, :n].double()])

    check(prefill, "rastp", define, normalise=False)
    check(prefill, "rastp", lambda *at: define(*at) / torch.arange(COUNTS[at[0]], 0, -1))


@pytest.mark.parametrize("k", [1, 2, 5, 7, 9, 12, 22])
def test_session_window(prefill, k):
    """Sessions of 4, 1, 7, 6, 2, 3 events, oldest first; the other users' newest ends where theirs do."""
    sizes = [4, 1, 7, 6, 2, 3]
    session = [s for s, size in enumerate(sizes) for _ in range(size)]
    times = torch.tensor([60 * i + 5000 * s for i, s in enumerate(session)]).repeat(4, 1)
    prefill = replace(prefill, events=replace(prefill.events, times=times))
    state = get_compressor("session_window").compress(prefill, Budget(slots=k))
    for user, n in enumerate(COUNTS):
        mine, size = session[:n], min(k, n)
        last = [i == n - 1 or mine[i + 1] != mine[i] for i in range(n)]
        starts = [mine.index(s) for s in mine]
        rank = [(2 if s == mine[-1] or n - starts[i] <= size else int(last[i]), i) for i, s in enumerate(mine)]
        want = sorted(i for _, i in sorted(rank, reverse=True)[:size])
        slots = state.layers[0][0].slots
        assert slots.positions[user, 0, :size].tolist() == want and int(slots.count[user, 0]) == size


def test_sessions_without_times_are_recent(prefill):
    state = get_compressor("session_window").compress(prefill, Budget(slots=5))
    assert state.layers[0][0].slots.positions[3, 0].tolist() == [18, 19, 20, 21, 22]


@pytest.mark.parametrize("case", [*ATTENTION, "marm-2-heads"])
def test_the_reader_is_what_a_read_weighs(case, trained):
    """Of candidates: the mean of what each weighs alone; of the state itself, where the newest event asked last."""
    backbone = trained(case)
    history, tokens = histories(backbone, LENGTHS)
    prefill = backbone.prefill(history)
    both = backbone.reading(tokens, prefill.state)
    for layer in prefill.layers:
        slots, weights = prefill.slots(layer), both[layer]
        assert weights.shape == prefill.segment(layer).fields[backbone.fields[0]].shape[:3]
        assert not bool(weights.masked_fill(slots.mask(weights.shape[-1]), 0).any())
    alone = [backbone.reading(tokens.each(lambda x: x[:, m : m + 1], torch.ones_like(tokens.count)), prefill.state)  # noqa: B023
             for m in range(2)]  # fmt: skip
    for layer in prefill.layers:
        close(both[layer], (alone[0][layer] + alone[1][layer]) / 2, "mean over tokens", 1e-6)


@pytest.mark.parametrize("case", ["sasrec-2-heads", "sasrec-gqa", "hstu-2-heads"])
def test_the_reader_is_the_next_query(case, trained):
    """An event that reads the state before it weighs as it does in a prefill that it is part of."""
    backbone = trained(case)
    history, _ = histories(backbone, LENGTHS)
    own, before = (
        history.last(torch.ones_like(history.count)),
        history.each(lambda x: x, (history.count - 1).clamp(min=0)),
    )
    read = backbone.reading(own, backbone.prefill(before).state)
    seen = backbone.prefill(history, stats=Stats(window=1)).window
    for user, n in enumerate(LENGTHS):
        for layer in range(len(read)):
            if n > 1:
                close(read[layer][user, :, : n - 1], seen[layer][user, :, 0, : n - 1].abs(), "weights", 1e-5)


@pytest.mark.parametrize("case", ["sasrec-2-heads", "climber-times-2-heads"])
def test_likeness_is_of_what_goes_in_and_what_comes_out(case, trained):
    view = World(case, trained(case)).prefill(Stats(inputs=True, alike=True)).apart()[0]
    for user, n in enumerate(view.rows(0).tolist()):
        a, b = (view.layer_input(i)[user, :n].double() for i in (0, 1))
        want = (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)
        close(view.likeness(0)[user, :n].double(), want, "cosines", 1e-6)


def test_scores_of_items(prefill):
    items = [prefill.events.items[user, :n].tolist() for user, n in enumerate(COUNTS)]
    category = lambda item: (item - 1) % 5  # noqa: E731

    def newer(alike):
        return lambda user, *_: torch.tensor(
            [-float(sum(alike(x) == alike(y) for y in items[user][i + 1 :])) for i, x in enumerate(items[user])]
        )

    def decayed(user, *_):
        kinds = [category(x) for x in items[user]]
        n = len(kinds)
        return torch.tensor([math.log2(kinds.count(x) / n) - (n - 1 - i) / 8 for i, x in enumerate(kinds)])

    check(prefill, "dedup", newer(lambda item: item))
    check(prefill, "category_cover", newer(category))
    check(prefill, "popularity", lambda user, *_: torch.tensor([-float((x - 1) ** 2 % 7) for x in items[user]]))
    check(prefill, "interest_decay", decayed, half_life=8.0)


def test_category_cover_is_the_greedy_cover(prefill):
    """Of a sum over categories of sqrt(kept events): each step takes what gains most, of equals the newest."""
    state = get_compressor("category_cover").compress(prefill, Budget(slots=7))
    categories = [(x - 1) % 5 for x in prefill.events.items[3].tolist()]
    kept: list[int] = []
    for _ in range(7):
        held = [sum(categories[j] == c for j in kept) for c in categories]
        gains = [(math.sqrt(h + 1) - math.sqrt(h), i) for i, h in enumerate(held) if i not in kept]
        kept.append(max((round(gain, 9), i) for gain, i in gains)[1])
    assert state.layers[0][0].slots.positions[3, 0].tolist() == sorted(kept)


@pytest.mark.parametrize("case", ATTENTION)
def test_what_is_observed_is_what_the_layers_do(case, trained):
    """From inputs: keys and values as stored. From queries: the logits that the layer itself gives, a bias apart. From
    outputs: what the mixture adds to the layer's output."""
    backbone = trained(case)
    prefill = World(case, backbone).prefill(EVERYTHING)
    users = range(len(LENGTHS))
    for view, part in zip(prefill.apart(), range(prefill.stacks)):
        blocks = list(backbone.blocks)[part * len(view.layers) : (part + 1) * len(view.layers)]
        for layer, block in enumerate(blocks):
            q, own, _ = block.project(view.layer_input(layer))
            for name, vectors in view.segment(layer).fields.items():
                close(own[name], vectors.dense(), name, 1e-6)
            asking, there = view.newest_queries(layer, 5)
            counts = view.rows(layer).tolist()
            for user, n in enumerate(counts):
                assert there[user, 0].tolist() == [age <= n for age in range(5, 0, -1)]
                assert not bool(asking[user][:, : max(0, 5 - n)].any())
            if not case.startswith("climber"):  # whose temperatures divide what follows
                for user, n in enumerate(counts):
                    w = min(n, 5)
                    close(asking[user, :, 5 - w :], q[user, :, n - w : n], "queries", 1e-6)
            maps = view.output_map(layer)
            if not case.startswith("hstu"):  # a norm and a gate stand before
                mixed = noise(2, q.shape[1], 3, maps.shape[1])
                x = torch.zeros(2, 3, maps.shape[2])
                block_out = torch.einsum("bhmd,hde->bme", mixed, maps)
                flat = mixed
                if case.endswith("mla"):
                    flat = torch.einsum("bhmr,hdr->bhmd", mixed, block._by_head(block.up_values))
                bias = 0 if block.out.bias is None else block.out.bias
                close(block_out + bias + x, block.out(flat.transpose(1, 2).flatten(2)), "outputs", 1e-5)
    assert len(prefill.users) == len(users)


@pytest.mark.parametrize("case", ["hstu", "hstu-times-2-heads"])
def test_standing_is_the_bias_of_the_token_that_comes_next(case, trained):
    """By distance from behind the end, and by the gap to when the newest event asks: without a key."""
    backbone = copy.deepcopy(trained(case))
    prefill = World(case, backbone).prefill(Stats(queries=1))
    for layer, block in enumerate(backbone.blocks):
        for user, n in enumerate(prefill.rows(layer).tolist()):
            want = block.position_bias[torch.arange(n, 0, -1)]
            if block.time_bias is not None and n:
                gaps = prefill.events.next_times[user, n - 1] - prefill.events.times[user, :n]
                octaves = (gaps.abs().clamp(min=1).double().log() / 0.301).long().clamp(max=len(block.time_bias) - 1)
                want = want + block.time_bias[octaves]
            close(prefill.standing[layer][user, :, :n], want.expand(block.heads, n), "standing", 1e-6)


def test_expected_attention_knows_where_slots_stand(trained):
    """Keys and values that are all alike: what is kept is what the bias favours."""
    prefill = World("hstu", trained("hstu")).prefill(Stats(queries=64))
    (segment,) = prefill.state.layers[0]
    alike = {name: Dense(torch.ones_like(x.dense())) for name, x in segment.fields.items()}
    flat = replace(prefill, state=replace(prefill.state, layers=((replace(segment, fields=alike),),)))
    scores = get_compressor("expected_attention").scores(flat, 0)
    n = int(prefill.rows(0)[-1])
    assert scores[-1, 0, :n].argsort().tolist() == prefill.standing[0][-1, 0, :n].argsort().tolist()


def test_climber_asks_with_its_temperature(trained):
    """q.k is the logit without its bias."""
    backbone = copy.deepcopy(trained("climber-times-2-heads"))
    block, user = backbone.blocks[0], len(LENGTHS) - 1
    for bias in (block.position_bias, block.time_bias):
        bias.data.zero_()
    view = World("climber", backbone).prefill(Stats(queries=1, window=1)).apart()[0]
    n = int(view.rows(0)[user])
    logits = torch.einsum("hd,hsd->hs", view.newest_queries(0, 1)[0][user, :, 0], view.keys(0)[user, :, :n])
    close(logits.softmax(-1), view.newest_attention(0, 1)[user, :, 0, :n], "weights without bias", 1e-5)


def test_marm_maps_hidden_vectors_through_both_maps(trained):
    backbone = trained("marm-2-heads")
    prefill = World("marm", backbone).prefill(Stats(outputs=True))
    block, mixed = backbone.blocks[0], noise(1, 2, 3, 16)
    got = torch.einsum("bhmd,hde->bme", mixed, prefill.output_map(0))
    w_v = block.qkv.weight.chunk(3)[2].unflatten(0, (2, -1))
    want = block.out((mixed @ w_v.mT).transpose(1, 2).flatten(2)) - block.out.bias
    close(got, want, "outputs", 1e-5)


@pytest.mark.parametrize("case", ["hstu-times", "climber-times-2-heads", "climber-stride"])
def test_slots_know_their_items(case, trained):
    prefill = World(case, trained(case)).prefill(Stats(events=True, categories=True, popularity=True))
    for view in prefill.apart():
        for layer in view.layers:
            slots, width = view.slots(layer), view.segment(layer).width
            places = slots.places(width, prefill.state.length[:, None])[:, 0]
            for user, n in enumerate(view.rows(layer).tolist()):
                want = [int(prefill.events.items[user, int(p)]) for p in places[min(user, len(places) - 1), :n]]
                assert view.slot_items(layer)[user, 0].tolist() == want + [0] * (width - n)
                assert view.slot_categories(layer)[user, 0, :n].tolist() == [(x - 1) % 7 for x in want]
                assert view.slot_popularity(layer)[user, 0, :n].tolist() == [(x - 1) ** 2 % 11 for x in want]


def test_what_was_not_asked_for_is_said_in_a_line(prefill, trained):
    bare = World("sasrec", trained("sasrec")).prefill(Stats(queries=3))
    ways = (
        lambda: bare.newest_queries(0, 9), lambda: bare.layer_input(0), lambda: bare.output_map(0),
        lambda: bare.slot_categories(0), lambda: bare.slot_popularity(0),
        lambda: prefill.over(prefill.state).slot_items(0), lambda: prefill.over(prefill.state).newest_queries(0, 1),
    )  # fmt: skip
    for way in ways:
        with pytest.raises(MissingStatistic) as caught:
            way()
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="dedup needs statistics or events, so it must come first"):
        get_compressor("compose", steps=("recent", "dedup"))


def test_needs_add_up():
    one, other = Stats(column_sum=True, queries=3), Stats(queries=7, window=2, popularity=True)
    assert one | other == other | one == Stats(column_sum=True, queries=7, window=2, popularity=True)
    assert (one | other).column_sum is True and not one.of_items and other.of_items


@pytest.mark.parametrize("lengths", [None, [9, 4, 1]])
@pytest.mark.parametrize("window", [1, 4, 30])
def test_sums_of_the_newest_are_those_of_their_weights(lengths, window):
    """Made head by head where every slot is real, from the weights themselves where not: with shared heads, too."""
    noise = [torch.randn(3, h, 9, 8, generator=torch.Generator().manual_seed(h)) for h in (2, 2, 4)]
    lengths = lengths and torch.tensor(lengths)
    made = [Prefill.from_tensors([noise[0]], [noise[1]], [noise[2]], lengths=lengths) for _ in range(2)]
    want = made[0].newest_attention(0, min(window, 9)).abs().sum(2)
    close(made[1].newest_received(0, window), want, "sums", 1e-5)

"""Plain tensors as a Prefill: any dtype, grouped queries, statistics worked out block by block, faults in one line."""

import numpy as np
import pytest
import torch

from malloc_bench import Budget, Prefill, get_compressor
from malloc_bench.compressors import Compressor
from malloc_bench.measure import peak_memory
from malloc_bench.registry import names
from malloc_bench.state import Events, MissingStatistic, Named, observed

B, H, S, D = 3, 2, 40, 8
LENGTHS = torch.tensor([40, 17, 0])


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tensors(dtype=torch.float32, heads=H):
    return [noise(B, H, S, D, seed=i, dtype=dtype) for i in (0, 1)], [noise(B, heads, S, D, seed=9, dtype=dtype)] * 2


def maps(keys, queries):
    """Whole causal softmax maps [B, Hq, S, S] by definition."""
    group = queries.shape[1] // keys.shape[1]
    logits = queries.double() @ keys.double().repeat_interleave(group, 1).mT / keys.shape[3] ** 0.5
    return logits.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["recent", "h2o", "snapkv", "merge_adjacent", "random"])
def test_half_of_the_bytes_is_half_of_the_slots_in_any_dtype(name, dtype):
    x = [noise(B, H, 400, 16, seed=i, dtype=dtype) for i in (0, 1)]
    state = get_compressor(name).compress(Prefill.from_tensors(x, x, x), 0.5)
    (segment,) = state.layers[0]
    assert 0.45 <= float(segment.slots.count.float().mean()) / 400 <= 0.5
    assert {v.dense().dtype for v in segment.fields.values()} == {dtype}
    full = 2 * 2 * H * 400 * 16 * x[0].element_size()
    assert bool((state.nbytes() <= full // 2 + 8).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", sorted(names("compressors")))
def test_every_budget_holds_in_every_dtype(name, dtype):
    try:
        method = get_compressor(name)
    except ValueError:  # a chain of nothing
        method = get_compressor(name, steps=("knorm", {"kivi": {"bits": 4, "tail": 3}}))
    if method.structural is not None or method.family == "recompute":
        return
    keys, queries = tensors(dtype)
    prefill = Prefill.from_tensors(keys, keys, queries, lengths=LENGTHS, positions=True)
    try:
        if method.fit_parts():
            prefill = prefill.given(method.fit(prefill))
        state = method.compress(prefill, 0.5 if method.takes_budget else None)
    except MissingStatistic as error:  # of items, events or layers that plain tensors do not have
        pytest.skip(str(error))
    assert state.nbytes().tolist() == [len(state.pack(user)) for user in range(B)]
    if method.takes_budget:
        target = Budget(0.5).target(prefill.full_bytes())
        assert bool((state.nbytes() <= target.maximum(method.floor(prefill))).all())


@pytest.mark.parametrize("heads", [H, 3 * H])
@pytest.mark.parametrize("given", ["queries", "attention", "function"])
def test_statistics_are_those_of_the_whole_map(heads, given, monkeypatch):
    monkeypatch.setattr(observed, "_CELLS", 7 * B * heads * S)  # blocks of 7 queries
    keys, queries = tensors(heads=heads)
    whole = [maps(k, q) for k, q in zip(keys, queries)]
    signed = [w.float() * (1 - 2 * (i % 2)) for i, w in enumerate(whole)]  # SiLU weights may be negative

    def rows(layer, first, last):
        return signed[layer][:, :, first:last]

    ways = {"queries": {"queries": queries}, "attention": {"attention": signed}, "function": {"attention": rows}}
    prefill = Prefill.from_tensors(keys, keys, lengths=LENGTHS, **ways[given])
    for layer in range(2):
        received, newest = prefill.attention_received(layer), prefill.newest_attention(layer, 5)
        assert received.shape == (B, H, S) and newest.shape == (B, H, 5, S)
        by_head = whole[layer].unflatten(1, (H, -1)).mean(2)
        sign = -1 if given != "queries" and layer == 1 and heads == H else 1
        for user, n in enumerate(LENGTHS.tolist()):
            own = by_head[user, :, :n, :n]
            torch.testing.assert_close(received[user, :, :n].double(), own.sum(1), atol=1e-5, rtol=1e-5)
            assert not received[user, :, n:].any() and not newest[user, :, :, n:].any()
            there = min(n, 5)
            want = sign * own[:, n - there :]
            torch.testing.assert_close(newest[user, :, 5 - there :, :n].double(), want, atol=1e-5, rtol=1e-5)
            assert not newest[user, :, : 5 - there].any()


def test_snapkv_never_holds_a_whole_map():
    """A map of 2,048 slots and 2 heads is 34 MB."""
    x = [noise(1, H, 2048, 16)]
    state, peak = peak_memory(lambda: get_compressor("snapkv").compress(Prefill.from_tensors(x, x, x), 0.25))
    assert int(state.layers[0][0].slots.count[0, 0]) > 0
    assert peak < 8 << 20


def test_what_is_not_asked_for_is_not_worked_out():
    def rows(*_):
        raise AssertionError("nobody asked")

    keys, _ = tensors()
    get_compressor("recent").compress(Prefill.from_tensors(keys, keys, attention=rows), {"slots": 8})


def events(users, slots):
    """Of item 9 alone."""
    return Events(torch.full((users, slots), 9, dtype=torch.int32), torch.full((users,), slots, dtype=torch.int32))


K = torch.zeros(B, H, S, D)
WRONG = {
    "keys: expected a list of one tensor a layer, one or more, not 0": {"keys": []},
    "keys: expected a list of one tensor a layer, one or more, not NoneType": {"keys": None},
    "keys[0]: expected floating point numbers [B, H, S, D], not torch.float32 [2, 40, 8]": {"keys": [K[0]]},
    "keys[0]: expected floating point numbers [B, H, S, D], not torch.int64 [3, 2, 40, 8]": {"keys": [K.long()]},
    "keys[0]: expected floating point numbers [B, H, S, D], not str": {"keys": ["x"]},
    "keys[1]: expected [3, 2, 40, 8], not [3, 2, 39, 8]": {"keys": [K, K[:, :, :39]], "values": [K, K]},
    "values: expected a list of one tensor a layer, 1, not 2": {"values": [K, K]},
    "values[0]: expected [3, 2, 40, 8], not [3, 1, 40, 8]": {"values": [K[:, :1]]},
    "values[0]: expected torch.float32 on cpu, as keys[0], not torch.float16 on cpu": {"values": [K.half()]},
    "queries[0]: expected [3, a multiple of 2, 40, 8], not [3, 3, 40, 8]": {"queries": [torch.zeros(B, 3, S, D)]},
    "queries[0]: expected [3, a multiple of 2, 40, 8], not [3, 2, 40, 9]": {"queries": [torch.zeros(B, H, S, 9)]},
    "attention[0]: expected [3, a multiple of 2, 40, 40], not [3, 2, 40, 8]": {"attention": [K]},
    "attention: expected a list of one tensor a layer, 1, not int": {"attention": 3},
    "lengths: expected whole numbers [3], one a user, not torch.int64 [2]": {"lengths": torch.tensor([1, 2])},
    "lengths: expected whole numbers [3], one a user, not torch.float32 [3]": {"lengths": torch.ones(3)},
    "lengths: expected 0 to 40, the slots of keys, not 1 to 41": {"lengths": torch.tensor([1, 2, 41])},
    "users: expected whole numbers [3], one a user, not list": {"users": [1, 2, 3]},
    "probes[0]: expected [3, a multiple of 2, 1, 8], not [3, 2, 0, 8]": {"probes": [K[:, :, :0]]},
    "outputs: expected a list of one tensor a layer, 1, not 2": {"outputs": [K[0], K[0]]},
    "outputs[0]: expected [a multiple of 2, 8, d], not [3, 8, 16]": {"outputs": [torch.zeros(3, 8, 16)]},
    "outputs[0]: expected [a multiple of 2, 8, d], not [2, 9, 16]": {"outputs": [torch.zeros(2, 9, 16)]},
    "outputs[0]: expected [a multiple of 2, 8, d], not [2, 8]": {"outputs": [torch.zeros(2, 8)]},
    "events: expected Events, not list": {"events": [1]},
    "events.items: expected whole numbers [3, 40], one a slot, not torch.int32 [3, 5]": {"events": events(B, 5)},
    "events.items: expected whole numbers [3, 40], one a slot, not torch.int32 [2, 40]": {"events": events(2, S)},
    "items: expected Named, not dict": {"items": {"popularity": torch.ones(9)}},
    "items.popularity: expected one for each of 9 items, whose ids begin at 1, not [8]": {
        "events": events(B, S),
        "items": Named({"popularity": torch.ones(8)}),
    },
    "values[0]: expected torch.float32 on cpu, as keys[0], not torch.float32 on meta": {"values": [K.to("meta")]},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_named_in_one_line(message):
    with pytest.raises(ValueError) as error:
        Prefill.from_tensors(**{"keys": [K], "values": [K], **WRONG[message]})
    assert str(error.value) == message


def test_a_function_of_the_wrong_shape_is_named():
    prefill = Prefill.from_tensors([K], [K], attention=lambda layer, first, last: K[:, :, first:last])
    with pytest.raises(ValueError, match=r"attention\(0, 0, 40\): expected \[3, 2, 40, 40\]"):
        prefill.attention_received(0)


@pytest.mark.parametrize(("plain", "budget"), [(0.25, Budget(0.25)), ({"slots": 8}, Budget(slots=8)), (1, Budget(1.0))])
@pytest.mark.parametrize("name", ["recent", "svd", "compose"])
def test_a_budget_may_be_written_as_in_a_suite(name, plain, budget):
    if name == "svd" and budget.slots:
        return
    method = get_compressor(name, **({"steps": ("recent", "int8")} if name == "compose" else {}))
    keys, _ = tensors()
    prefill = Prefill.from_tensors(keys, keys)
    a, b = method.compress(prefill, plain), method.compress(prefill, budget=budget)
    assert [a.pack(user) for user in range(B)] == [b.pack(user) for user in range(B)]


def test_a_class_of_ones_own_gets_a_budget_too():
    class Mine(Compressor):
        def compress(self, prefill, budget=None):
            self.__dict__["got"] = budget
            return prefill.state

    mine, (keys, _) = Mine(), tensors()
    mine.compress(Prefill.from_tensors(keys, keys), {"bytes": 100})
    assert mine.got == Budget(bytes=100)
    with pytest.raises(ValueError, match="a budget is a fraction above 0"):
        mine.compress(Prefill.from_tensors(keys, keys), "half")


@pytest.mark.parametrize("name", ["fit_keys", "fit_constant", "keydiff", "kmeans", "svd", "h2o"])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_padding_may_be_no_number(name, wrong):
    def bytes_with(fill):
        x = [torch.randn(2, 2, 12, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
        for each in x[:3]:
            each[0, :, 5:] = fill
        made = {"queries": [x[2]], "lengths": torch.tensor([5, 12]), "probes": [x[3]]}
        return [
            get_compressor(name).compress(Prefill.from_tensors([x[0]], [x[1]], **made), 0.3).pack(u) for u in (0, 1)
        ]

    assert bytes_with(wrong) == bytes_with(0.0)


def test_the_first_number_that_is_none_is_named():
    bad = K.clone()
    bad[2, 1, 7, 3] = torch.nan
    for name in ("keys", "values", "queries"):
        with pytest.raises(
            ValueError, match=rf"^{name}\[0\]: expected finite numbers, not nan of user 2, head 1, slot 7$"
        ):
            Prefill.from_tensors(**{"keys": [K], "values": [K], name: [bad]})
    maps = torch.full((B, H, S, S), torch.nan)
    maps[..., :5, :5] = 0.2
    lengths = torch.full((B,), 5)
    prefill = Prefill.from_tensors([K], [K], attention=[maps], lengths=lengths)
    assert get_compressor("h2o").compress(prefill, 0.5).layers[0][0].fields["keys"].dense().isfinite().all()
    with pytest.raises(
        ValueError, match=r"^attention\[0\]: expected finite numbers, not nan of user 0, head 0, slot 0$"
    ):
        Prefill.from_tensors([K], [K], attention=[maps], lengths=lengths + 1)


@pytest.mark.parametrize(
    "name", ["knorm", "value_norm", "vatp", "expected_attention", "keydiff", "minicache", "fit_recent"]
)
def test_large_numbers_in_half_precision(name):
    """Their norms are beyond float16."""
    x = [(torch.randn(1, 2, 12, 128, generator=torch.Generator().manual_seed(i)) * 6e3).half() for i in range(3)]
    prefill = Prefill.from_tensors([x[0], x[1]], [x[1], x[0]], queries=[x[2] / 6e3] * 2, probes=[x[2] / 6e3] * 2)
    method = get_compressor(name)
    state = method.compress(prefill, 0.5 if method.takes_budget else None)
    assert all(v.dense().isfinite().all() for s in state.segments() for v in s.fields.values())


def test_numbers_of_numpy_are_budgets_and_what_no_state_has_is_none():
    assert Budget.parse(np.float32(0.25)) == Budget(0.25) and Budget.parse({"slots": np.int64(3)}) == Budget(slots=3)
    for large in (1e300, 10**30, {"slots": 10**30}, {"bytes": 10**30}):
        with pytest.raises(
            ValueError, match=r"^a budget is a fraction above 0.*; the largest are 1,000,000, and 2\^50"
        ):
            Budget.parse(large)

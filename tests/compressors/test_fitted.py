"""Codebooks that training users share: that they are k-means, what is stored, and how far from the vectors it reads."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor

from malloc_bench.backbones import get_backbone
from malloc_bench.compressors import get_compressor
from malloc_bench.compressors.base import MissingFit
from malloc_bench.compressors.quantization.codebooks import entries
from malloc_bench.compressors.quantization.rvq import RVQ
from malloc_bench.state import Fitted, Prefill, Sample, closest
from malloc_bench.state.sample import EACH
from malloc_bench.testing.worlds import World, check_packs, close

LENGTHS = (0, 1, 9, 40)
BOOKS = [("pq", {"group": 3, "bits": 4}), ("pq", {"group": 3}), ("rvq", {"stages": 3, "bits": 4}), ("rvq", {})]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prefill(seed=0, users=4, lengths=LENGTHS):
    keys, values = ([noise(users, 2, 40, d, seed=seed + 10 * i + d) for i in range(2)] for d in (8, 7))
    return Prefill.from_tensors(keys, values, lengths=torch.tensor(lengths))


@pytest.fixture(scope="module")
def training():
    return prefill(seed=50, users=30, lengths=(40,) * 30)


@pytest.mark.parametrize(("name", "params"), BOOKS, ids=str)
def test_each_vector_reads_as_its_nearest_entries(name, params, training):
    """Vector by vector, in float64, from the named tensors of the fit."""
    method, full = get_compressor(name, **params), prefill()
    fitted = method.fit(training)
    state = method.compress(full, fitted=fitted)
    for layer in range(2):
        for field, width in (("keys", 8), ("values", 7)):
            book, got = fitted[f"{layer}.{field}"].double(), state.layers[layer][0].fields[field].dense()
            for user, n in enumerate(LENGTHS):
                for head in range(2):
                    for slot in range(0, n, 7):
                        x = full.segment(layer).fields[field].dense()[user, head, slot].double()
                        want = torch.zeros(0).double() if name == "pq" else torch.zeros(width).double()
                        for i, table in enumerate(book[head]):
                            part = x - want if name == "rvq" else x[3 * i : 3 * i + 3]
                            part = torch.cat([part, torch.zeros(table.shape[1] - len(part)).double()])
                            best = table[(table - part).square().sum(1).argmin()]
                            want = want + best if name == "rvq" else torch.cat([want, best])
                        close(got[user, head, slot].double(), want[:width], "vector", 1e-6)


@pytest.mark.parametrize(("name", "params"), BOOKS, ids=str)
def test_bytes(name, params, training):
    method, full = get_compressor(name, **params), prefill()
    fitted = method.fit(training)
    codes = [3, 3] if name == "pq" else [method.stages] * 2  # of a key of width 8 and a value of width 7
    size = sum(-(-n * method.bits // 8) for n in codes)
    per_slot = 2 * 2 * size  # layers, heads
    assert method.compress(full, fitted=fitted).nbytes().tolist() == [8 + n * per_slot for n in LENGTHS]
    entry = [9, 9] if name == "pq" else [8 * method.stages, 7 * method.stages]
    assert fitted.nbytes == 2 * 2 * 2**method.bits * sum(entry) * 4


def test_more_bits_read_better(training):
    full = prefill(lengths=(40,) * 4)
    errors = {}
    for name, params in (*BOOKS, ("rvq", {"stages": 8}), ("pq", {"group": 1})):
        state = (method := get_compressor(name, **params)).compress(full, fitted=method.fit(training))
        gap = state.layers[0][0].fields["keys"].dense() - full.keys(0)
        errors[name, *params.values()] = float(gap.square().mean() / full.keys(0).square().mean())
    assert errors["pq", 1] < 0.01 and errors["pq", 3] < errors["pq", 3, 4] < 0.5
    assert errors["rvq", 8] < errors["rvq",] < errors["rvq", 3, 4] < 0.8


def unit(x):
    return x / x.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30)


def held(x, tables, beam):
    """Of a row [D]: the nearest of the sums that are held, each of which was tried with its two nearest entries."""
    sums = [torch.zeros(len(x)).double()]
    for stage, table in enumerate(tables):
        tried = []
        for each in sums:
            gaps = (table + each - x).square().sum(1)
            tried += [each + table[i] for i in gaps.argsort()[: 2 if stage else beam]]
        sums = sorted(tried, key=lambda each: float((each - x).square().sum()))[:beam]
    return sums[0]


@pytest.mark.parametrize("params", [{"stages": 3, "bits": 4, "beam": 5}, {"stages": 4}], ids=str)
def test_gain_shape_holds_the_nearest_sums_of_unit_entries(params, training):
    """Vector by vector, in float64: the shape as a beam finds it, and the size of the least error to an eighth of an
    octave. What it learns is what rvq learns of unit vectors."""
    full = prefill(lengths=(40,) * 4)
    method = get_compressor("gain_shape", **params)
    fitted = method.fit(training)
    every = Sample.of(training).some(40)
    for (layer, field), x in every.items() if method.bits == 4 else ():  # of 256 rounding decides where some lie
        assert x.shape[1] == 30 * 40, "all that there is, not `EACH`"
        close(fitted[f"{layer}.{field}"], RVQ(method.stages, method.bits).tables(unit(x)), field, 1e-4)
    state = method.compress(full, fitted=fitted)
    got, x = state.layers[1][0].fields["values"].dense(), full.segment(1).fields["values"].dense().double()
    for user, head, slot in ((0, 0, 0), (1, 1, 7), (2, 0, 21), (3, 1, 39)):
        row, read = x[user, head, slot], got[user, head, slot].double()
        shape = held(unit(row), fitted["1.values"][head].double(), method.beam)
        gain = float(row @ shape / shape.square().sum())
        ratio = float(read @ shape / shape.square().sum())
        close(read, ratio * shape, "shape", 1e-5)
        assert abs(torch.tensor(ratio / gain).log2()) <= 1 / 16 + 1e-6
    greedy = get_compressor("gain_shape", **{**params, "beam": 1}).compress(full, fitted=fitted)
    off = [float((s.layers[1][0].fields["values"].dense() - x).square().mean()) for s in (state, greedy)]
    assert off[0] < 0.97 * off[1]


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e3, 1e18, 1e30])
def test_gain_shape_reads_vectors_of_any_size_alike(size, training):
    """Fitted slots of SiLU, which has no normaliser, stand for all that is left out, and are far larger than events."""
    method, one = get_compressor("gain_shape", stages=4), prefill(lengths=(40,) * 4)
    fitted = method.fit(training)
    other = Prefill.from_tensors(*([f(i) * size for i in range(2)] for f in (one.keys, one.values)))
    plain, scaled = (
        torch.cat([s.fields["values"].dense().flatten() for s in method.compress(x, fitted=fitted).segments()]).double()
        for x in (one, other)
    )
    assert float((scaled / size - plain).norm() / plain.norm()) < 2 ** (1 / 8) - 1
    nothing = Prefill.from_tensors([torch.zeros(2, 1, 3, 8)], [torch.zeros(2, 1, 3, 8)])
    read = method.compress(nothing, fitted=method.fit(nothing)).layers[0][0].fields["keys"].dense()
    assert not bool(read.abs().max() > 1e-30)


def test_gain_shape_bytes_and_short_slots(training):
    method = get_compressor("gain_shape", stages=3, bits=4)
    state = method.compress(prefill(), fitted=method.fit(training))
    per_slot = 2 * 2 * 2 * (2 + 1)  # layers, heads, fields; 3 codes of 4 bits, a size
    assert state.nbytes().tolist() == [8 + 2 * 2 * 2 + n * per_slot for n in LENGTHS]
    world, made = World("tensors"), []
    ask = get_compressor("fit_omp", probes=8)
    full, sample = world.prefill(ask.needs), world.sample(ask)
    for encoder in ("rvq", "gain_shape"):
        chain = get_compressor("compose", steps=({"fit_omp": {"probes": 8}}, {encoder: {"stages": 4}}))
        few = chain.compress(full, {"slots": 3}, chain.fit(sample))
        made.append(check_packs(few, world.read).nbytes())
    heads, layers = full.segment(0).fields["keys"].shape[1], len(full.layers)
    for wide, narrow, n in zip(*map(Tensor.tolist, made), full.state.length.tolist()):
        masses = 2 if n > 3 else 0  # bytes that bfloat16 saves; a size takes one of each key and value
        assert wide - narrow == layers * heads * ((masses - 2) * min(n, 3) - 2)


@pytest.mark.parametrize("encoder", ["pq", "rvq", "gain_shape", "kvquant", "entropy", "kvtc"])
def test_slots_of_two_fields_are_written_with_what_was_learned_of_one(encoder):
    """MARM keeps one field; fitted slots are keys and values."""
    backbone = get_backbone("marm", 60, False, layers=2, dim=16, max_length=64).eval()
    world, chain = World("marm", backbone), get_compressor("compose", steps=({"fit_omp": {"probes": 8}}, encoder))
    with torch.no_grad():
        state = chain.compress(world.prefill(chain.needs), {"slots": 3}, chain.fit(world.sample(chain)))
        assert all(bool(x.isfinite().all()) for x in world.read(state))
    assert set(state.layers[0][0].fields) == {"keys", "values"}
    fitted = Fitted({"0.keys": torch.zeros(1), "0.values": torch.ones(1), "1.inputs": torch.ones(2)})
    assert torch.equal(fitted.of(1, "keys"), torch.ones(2))
    with pytest.raises(KeyError, match=r"0\.inputs"):
        fitted.of(0, "inputs")


def test_k_means_is_lloyds():
    x = torch.cat([noise(2, 50, 3, seed=i) / 50 + torch.tensor([i, -i, 1.0]) for i in range(4)], 1)
    found = entries(x, 16, rounds=30)
    near = closest(x, found)
    for head in range(2):
        assert near[head].tolist() == torch.cdist(x[head].double(), found[head].double()).argmin(1).tolist()
        for i in set(near[head].tolist()):
            close(found[head, i], x[head][near[head] == i].mean(0), "entry", 1e-4)
    assert torch.equal(entries(x, 16), entries(x, 16)) and entries(x[:, :3], 16).shape == (2, 16, 3)
    assert not bool(entries(x[:, :0], 16).any())


def test_a_sample_is_some_vectors_of_every_user_whatever_the_chunks(training):
    whole = Sample.of(training).vectors[1, "values"]
    assert whole.shape == (2, 30 * EACH, 7)
    parts = Sample.of(training.take(torch.arange(i, i + 10)) for i in (0, 10, 20))
    assert torch.equal(parts.vectors[1, "values"], whole)
    slots = [(2 * i + 1) * 40 // (2 * EACH) for i in range(EACH)]
    assert torch.equal(whole[:, :EACH], training.values(1)[0][:, slots])
    few = Sample.of(prefill()).vectors[0, "keys"]
    assert torch.equal(few[:, 1:10], prefill().keys(0)[2, :, :9]) and few.shape[1] == 0 + 1 + 9 + EACH
    calls = []
    lazy = Sample(lambda: calls.append(1) or [training])
    get_compressor("pq").fit(lazy)
    assert len(calls) == 1, "one pass for all layers and fields"


def test_a_chain_gives_each_step_its_own(training):
    full, steps = prefill(lengths=(40,) * 4), ("recent", {"pq": {"bits": 4}})
    chain, alone = get_compressor("compose", steps=steps), get_compressor("pq", bits=4)
    assert list(chain.fit_parts()) == ["1"] and chain.fit_parts()["1"] == alone
    both, own = chain.fit(training), alone.fit(training)
    assert both.part("1") == own and both.nbytes == own.nbytes
    state, want = chain.compress(full, {"slots": 40}, both), alone.compress(full, fitted=own)
    assert [state.pack(u) for u in range(4)] == [want.pack(u) for u in range(4)]
    short = chain.compress(full, 0.05, both)
    assert bool((short.nbytes() <= 0.05 * full.full_bytes()).all())
    with pytest.raises(MissingFit, match=r"^compose must be fitted first: compress\(prefill, budget, fitted=fit"):
        chain.compress(full, 0.05)
    assert get_compressor("compose", steps=("recent", "int8")).fit_parts() == {}


def test_fits_are_names_and_tensors():
    one = Fitted({"b": torch.ones(2, 3), "a": torch.zeros(4, dtype=torch.int32)})
    assert list(one) == ["a", "b"] and one.nbytes == 24 + 16
    assert one == Fitted({"a": one["a"].clone(), "b": one["b"]}) == pickle.loads(pickle.dumps(one))
    assert one != Fitted({"a": one["b"], "b": one["a"]}) and one != Fitted({"a": one["a"], "b": one["b"].view(3, 2)})
    with pytest.raises(TypeError):
        one.tensors["a"] = torch.ones(1)
    with pytest.raises(TypeError, match="learns nothing"):
        get_compressor("knorm").fit(prefill())


def test_two_fits_do_not_share_what_a_prefill_remembers(training):
    """One prefill, two fits of the same method: each state is its own fit's."""
    full, method = prefill(lengths=(40,) * 4), get_compressor("compose", steps=("knorm", {"pq": {"bits": 4}}))
    fits = [method.fit(training), method.fit(prefill(seed=80, lengths=(40,) * 4))]
    states = [method.compress(full, 0.05, fit) for fit in (*fits, fits[0])]
    packed = [[state.pack(u) for u in range(4)] for state in states]
    assert packed[0] == packed[2] != packed[1]

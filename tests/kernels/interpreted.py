"""Triton's reads beside the loops for CPUs and plain torch, in Triton's interpreter: `test_triton.py` runs these in a
process of their own, with TRITON_INTERPRET=1 from its start."""

import logging
from contextlib import contextmanager, nullcontext

import pytest
import torch

from malloc_bench import kernels
from malloc_bench.backbones import get_backbone
from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.kernels import gpu, reading, tiles
from malloc_bench.measure import Workload
from malloc_bench.state import Dense, Prefill
from malloc_bench.state.codebook import Codebook, FromCodebook
from malloc_bench.state.microscaled import microscaled
from malloc_bench.state.quantized import quantize

SOFTMAX, SILU = None, 7.0


@contextmanager
def loops():
    """Numba's, which stand behind."""
    patch = pytest.MonkeyPatch()
    patch.setattr(gpu, "_triton", lambda: None)
    try:
        yield
    finally:
        patch.undo()


def thrice(call):
    """What Triton, numba and plain torch give; numba's None where it has no loop."""
    found = call()
    with loops():
        looped = call()
    with kernels.eager():
        return found, looped, call()


def equal(found, looped, plain, size=1.0):
    near = {"rtol": 1e-4, "atol": 1e-4 * size}
    torch.testing.assert_close(found, plain, **near)
    if looped is not None:
        torch.testing.assert_close(found, looped, **near)


def written(kind, x, generator):
    b, h, s, d = x.shape
    real = torch.ones(b, 1, s, dtype=torch.bool)
    if kind == "plain":
        return Dense(x)
    if isinstance(kind, int):
        return microscaled(x, real, kind)
    if isinstance(kind, tuple):
        return quantize(x, real, *kind)
    tables = torch.randn(h, 3, 11, d if kind == "added" else -(-d // 3), generator=generator)
    codes = torch.randint(0, 256, (b, h, s, 3), generator=generator, dtype=torch.uint8)  # most that no entry has
    return FromCodebook(codes, Codebook(tables, 8, d, kind == "added"))


CODES = [
    (bits, group, along, bits in (2, 8)) for bits in (8, 4, 3, 2) for along, group in (("slots", 32), ("width", 5))
]
EVERY = ["plain", *CODES, (4, 64, "width", False), (1, 32, "slots", False), 4, 3, "added", "beside"]


@pytest.mark.parametrize("m", [1, 9])
@pytest.mark.parametrize("kind", [*EVERY, (5, 4, "width", True), 5], ids=str)
def test_products_and_sums(kind, m):
    generator = torch.Generator().manual_seed(1)
    x = written(kind, torch.randn(2, 2, 67, 20, generator=generator), generator)
    q, w = (torch.randn(2, 4, m, n, generator=generator) for n in (20, 67))  # two heads share vectors
    shared = x.dense().repeat_interleave(2, 1)
    for call, given, plain in ((kernels.dot, q, q @ shared.mT), (kernels.mix, w, w @ shared)):
        found, looped, none = thrice(lambda call=call, given=given: call(x.written(), given))
        assert none is None
        equal(found, looped, plain, 10)
    if kind != "plain":  # by the way that backbones go; plain vectors are multiplied as they are
        assert torch.equal(x.dot(q), kernels.dot(x.written(), q))


def attended(q, own, keys, values, count, mass, bias, normaliser):
    """In plain torch and float64, from the definition."""
    h = q.shape[1]
    each = [x.repeat_interleave(h // x.shape[1], 1).double() for x in (keys, values)]
    real = torch.arange(keys.shape[2]) < count.repeat_interleave(h // count.shape[1], 1)[:, :, None, None]
    logits, itself = q.double() @ each[0].mT, (q * own["keys"]).sum(-1, keepdim=True).double()
    if bias is not None:
        logits, itself = logits + bias[0], itself + bias[1].unsqueeze(-1)
    mass = torch.ones(1, 1, 1) if mass is None else mass
    if normaliser is None:
        peak = torch.maximum(logits.where(real, itself).amax(-1, keepdim=True), itself)
        weights, itself = (logits - peak).exp() * mass.clamp(min=1e-6).unsqueeze(2) * real, (itself - peak).exp()
        whole = weights.sum(-1, keepdim=True) + itself
        weights, itself = weights / whole, itself / whole
    else:
        silu = torch.nn.functional.silu
        weights, itself = silu(logits) * mass.unsqueeze(2) * real / normaliser, silu(itself) / normaliser
    return (weights @ each[1] + itself * own["values"]).float()


@pytest.mark.parametrize(
    "normaliser, more, m", [(SOFTMAX, False, 3), (SOFTMAX, True, 20), (SILU, True, 3), (SILU, False, 20)]
)
@pytest.mark.parametrize("kind", EVERY, ids=str)
def test_a_whole_read(kind, normaliser, more, m):
    generator = torch.Generator().manual_seed(2)
    b, h, s = 4, 2, 70
    # more: masses and biases
    count = torch.tensor([[s, 3], [0, 1], [64, 65], [33, s]], dtype=torch.int32)[:, : 1 if more else 2]
    data = [torch.randn(b, h, s, d, generator=generator) for d in (20, 12)]
    keys, values = (written(kind, x, generator) for x in data)
    q, own_keys, own_values = (torch.randn(b, h, m, d, generator=generator) for d in (20, 20, 12))
    mass = 3 * torch.rand(b, 1, s, generator=generator) if more else None
    bias = (torch.randn(1, h, m, s, generator=generator), torch.randn(b, 1, m, generator=generator)) if more else None
    own = {"keys": own_keys, "values": own_values}
    rest = count, mass, bias, normaliser
    found, looped, none = thrice(lambda: kernels.attend(q, own, keys.written(), values.written(), *rest))
    assert none is None
    equal(found, looped, attended(q, own, keys.dense(), values.dense(), *rest))


@pytest.mark.parametrize("m", [1, 6])
@pytest.mark.parametrize("kind", ["plain", (4, 32, "slots", False), (2, 5, "width", True), 4, "beside"], ids=str)
def test_heads_that_share_slots(kind, m):
    generator = torch.Generator().manual_seed(3)
    keys, values = (written(kind, torch.randn(3, 2, 40, 20, generator=generator), generator) for _ in range(2))
    q, *own = (torch.randn(3, 4, m, 20, generator=generator) for _ in range(3))
    known = dict(zip(("keys", "values"), own))
    rest = torch.tensor([[40, 4], [0, 1], [2, 40]]), torch.rand(3, 1, 40, generator=generator), None, None
    found, looped, _ = thrice(lambda: kernels.attend(q, known, keys.written(), values.written(), *rest))
    equal(found, looped, attended(q, known, keys.dense(), values.dense(), *rest))


@pytest.mark.parametrize("width", [5, 300])
def test_narrow_and_wide_vectors(width):
    generator = torch.Generator().manual_seed(4)
    x = written((4, 32, "slots", False), torch.randn(1, 1, 9, width, generator=generator), generator)
    one, many = torch.randn(1, 1, 2, width, generator=generator), torch.randn(1, 1, 30, width, generator=generator)
    equal(tiles.dot(x.written(), one), None, one @ x.dense().mT, width)
    assert (tiles.dot(x.written(), many) is None) == (width > 128)  # plain torch unpacks these once
    equal(x.dot(many), None, many @ x.dense().mT, width)


@pytest.mark.parametrize("normaliser", [SOFTMAX, SILU])
def test_padding_is_not_read(normaliser):
    generator = torch.Generator().manual_seed(5)
    x = written((4, 4, "slots", False), torch.randn(1, 1, 40, 20, generator=generator), generator)
    q = torch.randn(1, 1, 1, 20, generator=generator)
    rest = {"keys": q, "values": q}, x.written(), x.written(), torch.tensor([[8]]), None, None, normaliser
    before = kernels.attend(q, *rest)
    x.scale[:, :, 2:], x.zero[:, :, 2:] = torch.nan, torch.inf
    x.codes[:, :, 8:] = 255
    assert torch.equal(kernels.attend(q, *rest), before)


@pytest.mark.parametrize("normaliser", [SOFTMAX, SILU])
@pytest.mark.parametrize("size", [0.01, 20.0, 80.0])
def test_logits_far_apart(size, normaliser):
    generator = torch.Generator().manual_seed(6)
    keys, values = (
        size * torch.randn(1, 2, 300, 1, generator=generator),
        torch.eye(300)[None, None].expand(1, 2, -1, -1),
    )
    q, own = torch.ones(1, 2, 1, 1), {"keys": torch.zeros(1, 2, 1, 1), "values": torch.zeros(1, 2, 1, 300)}
    rest = torch.tensor([[300, 130]]), None, None, normaliser
    found = kernels.attend(q, own, kernels.Plain(keys), kernels.Plain(values), *rest)
    torch.testing.assert_close(found, attended(q, own, keys, values, *rest), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("normaliser", [SOFTMAX, SILU])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_no_number_is_seen(wrong, normaliser):
    keys, q = torch.zeros(1, 1, 5, 1), torch.ones(1, 1, 1, 1)
    keys[0, 0, 1] = wrong
    x = kernels.Plain(keys)
    assert not kernels.attend(q, {"keys": q, "values": q}, x, x, torch.tensor([[5]]), None, None, normaliser).isfinite()


METHODS = [("full", None), ("none", None), ("merge_adjacent", 0.2), ("kivi", None), ("recent", 0.3)]


@pytest.mark.parametrize("candidates", [1, 6])
@pytest.mark.parametrize("name", ["sasrec", "lsrm", "hstu"])
@torch.no_grad()
def test_backbones_read_by_it(name, candidates, monkeypatch):
    torch.manual_seed(0)
    work = Workload(users=3, history=40, candidates=candidates)
    backbone = get_backbone(name, 50, has_time=False, max_length=work.max_length, layers=2, heads=2, dim=16).eval()
    _, tokens, _ = work.events(50)
    prefill, calls, inner = work.prefill(backbone), [], tiles.attend

    def watched(*given):
        calls.append(given)
        return inner(*given)

    monkeypatch.setattr(tiles, "attend", watched)
    for method, share in METHODS:
        state = get_compressor(method).compress(prefill, share and Budget(share))
        before = len(calls)
        equal(*thrice(lambda state=state: backbone.read(tokens, state)))
        assert len(calls) - before in (0, 2), "once a layer, or never"
        assert len(calls) > before or method == "kivi"  # codes and the newest slots beside them: two segments


def test_low_rank_in_codes():
    generator = torch.Generator().manual_seed(7)
    keys, values = (torch.randn(2, 2, 40, 8, generator=generator) for _ in range(2))
    state = get_compressor("svd").compress(Prefill.from_tensors([keys], [values]), Budget(0.3))
    for field in state.layers[0][0].fields.values():
        q = torch.randn(2, 2, 1, 8, generator=generator)
        equal(*thrice(lambda field=field, q=q: field.dot(q)), 10)


def test_where_it_does_not_read():
    q = torch.randn(1, 1, 1, 4)
    x = kernels.Plain(torch.randn(1, 1, 3, 4))
    assert gpu.on_gpu(q) is tiles and gpu.on_gpu(q.to("meta")) is None
    assert kernels.dot(x, q.double()) is None
    q.requires_grad_()
    for context in (nullcontext, kernels.eager):
        with context():
            assert gpu.on_gpu(q) is None
    with torch.no_grad():
        assert reading.dot(x, q) is not None


def test_it_says_once_why_it_cannot(monkeypatch, caplog):
    gpu._tiles.cache_clear()
    monkeypatch.setattr(tiles, "dot", lambda *given: 1 / 0)
    q = torch.randn(1, 1, 1, 4)
    with caplog.at_level(logging.WARNING, "malloc_bench"):
        for _ in range(2):
            assert gpu.on_gpu(q) is None
            assert kernels.dot(kernels.Plain(q), q) is not None  # numba's
    gpu._tiles.cache_clear()
    assert [x.message for x in caplog.records] == [
        "Triton does not read on cpu, plain torch does: ZeroDivisionError: division by zero"
    ]

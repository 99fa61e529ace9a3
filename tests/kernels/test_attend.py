"""A read in one pass gives what the plain read gives, and no kernel weighs for a block that has its own way."""

from dataclasses import replace

import pytest
import torch

from malloc_bench import kernels
from malloc_bench.backbones import attention, folded, get_backbone
from malloc_bench.backbones.block import Places
from malloc_bench.backbones.hstu import HSTUBlock
from malloc_bench.backbones.lsrm import LSRMBlock
from malloc_bench.backbones.marm import MARMBlock
from malloc_bench.backbones.sasrec import SASRecBlock
from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.measure import Workload
from malloc_bench.state import Dense, Segment, Slots
from malloc_bench.state.codebook import Codebook, FromCodebook
from malloc_bench.state.lowrank import low_ranks
from malloc_bench.state.microscaled import microscaled
from malloc_bench.state.quantized import quantize

pytestmark = pytest.mark.skipif(not kernels.compiled(), reason="numba is not installed: there are no kernels")


def world(name, times, candidates=1, users=5):
    torch.manual_seed(0)
    work = Workload(users=users, history=40, candidates=candidates)
    backbone = get_backbone(name, 50, has_time=times, max_length=work.max_length, layers=2, heads=2, dim=16).eval()
    for weight in backbone.parameters():
        weight.data *= 3  # so that attention is far from even
    _, tokens, _ = work.events(50)
    prefill = work.prefill(backbone)
    return backbone, tokens, prefill


METHODS = [("full", None), ("none", None), ("recent", 0.3), ("merge_adjacent", 0.2), ("random", 0.3), ("svd", 0.3)]


@pytest.mark.parametrize("candidates", [1, 3, kernels.FEW + 1])
@pytest.mark.parametrize("name, times", [("sasrec", False), ("lsrm", False), ("hstu", False), ("hstu", True)])
@torch.no_grad()
def test_a_read_in_one_pass_is_the_plain_read(name, times, candidates, monkeypatch):
    backbone, tokens, prefill = world(name, times, candidates)
    passes = []

    def watched(*given):
        passes.append(inner(*given))
        return passes[-1]

    inner = kernels.attend
    monkeypatch.setattr(folded.kernels, "attend", watched)
    for method, share in METHODS:
        state = get_compressor(method).compress(prefill, share and Budget(share))
        found = backbone.read(tokens, state)
        with kernels.eager():
            plain = backbone.read(tokens, state)
        near = 5e-5 if method == "svd" else 1e-5  # two products, one after the other
        torch.testing.assert_close(found, plain, rtol=near, atol=near)
    ran = [x for x in passes if x is not None]
    assert len(ran) == 2 * len(METHODS)


def written(kind, x, real, generator):
    """x [B, H, S, D] as one kind of vectors."""
    if kind == "plain":
        return Dense(x)
    if kind.startswith("codes"):
        b, h, s, d = x.shape
        added = kind == "codes added"
        tables = torch.randn(h, 3, 4, d if added else 7, generator=generator)  # 3 x 7: one number too many
        codes = torch.randint(0, 256, (b, h, s, tables.shape[1]), generator=generator, dtype=torch.uint8)
        return FromCodebook(codes, Codebook(tables, 8, d, added))
    if kind == "microscaled":
        return microscaled(x, real, 4)
    if kind.startswith("thin"):
        ranks = torch.tensor([[5], [2], [1], [3]])
        return low_ranks([x], real, ranks[: len(x)], own=kind == "thin, of each head", bits=8)[0]
    bits, along, group, symmetric = KINDS[kind]
    return quantize(x, real, bits, group, along, symmetric)


KINDS = {
    "8 bits by channel": (8, "slots", 32, False), "4 bits by channel": (4, "slots", 4, True),
    "4 bits by slot": (4, "width", 20, False), "2 bits by group": (2, "width", 4, False),
    "3 bits by slot": (3, "width", 20, True),
}  # fmt: skip
EVERY = ["plain", *KINDS, "microscaled", "codes added", "codes side by side", "thin", "thin, of each head"]


@pytest.mark.parametrize(
    "m, slots",
    [(1, 23), (3, 1), (9, 23), *(pytest.param(*p, marks=pytest.mark.slow) for p in ((1, 1), (3, 23), (9, 1)))],
)
@pytest.mark.parametrize("masses", [False, True])
@pytest.mark.parametrize("make", [SASRecBlock, HSTUBlock])
@pytest.mark.parametrize("kind", EVERY)
@torch.no_grad()
def test_however_vectors_are_written(kind, make, masses, slots, m):
    generator = torch.Generator().manual_seed(5)
    b, h, d = 4, 2, 20
    more = () if make is SASRecBlock else (slots + 1, True)
    block = make(h * d, h, 0.0, *more).eval()
    counts = torch.tensor([[slots], [0], [1], [slots // 2]], dtype=torch.int32)
    real = torch.arange(slots) < counts[..., None]
    mass = 3 * torch.rand(b, 1, slots, generator=generator) if masses else None
    fields = {
        name: written(kind, torch.randn(b, h, slots, d, generator=generator), real, generator)
        for name in ("keys", "values")
    }
    times = torch.randint(0, 9999, (b, 1, slots + m), generator=generator)
    segment = Segment(fields, Slots(counts, timestamps=times[..., :slots], mass=mass))
    q, *own = (torch.randn(b, h, m, d, generator=generator) for _ in range(3))
    places = Places(counts[..., None].expand(b, 1, m), times[..., slots:])
    given = block, q, dict(zip(("keys", "values"), own)), None, (segment,), counts[:, 0], places, places
    found = attention._attend(*given)
    with kernels.eager():
        plain = attention._attend(*given)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    assert torch.equal(found, folded.in_one_pass(*given[:3], *given[4:]))


@pytest.mark.parametrize("m", [1, 7])
@pytest.mark.parametrize("kind", EVERY)
def test_heads_that_share_slots(kind, m):
    generator = torch.Generator().manual_seed(6)
    b, h, s, d = 3, 4, 11, 20
    real = torch.ones(b, 1, s, dtype=torch.bool)
    keys, values = (written(kind, torch.randn(b, 2, s, d, generator=generator), real, generator) for _ in range(2))
    q, *own = (torch.randn(b, h, m, d, generator=generator) for _ in range(3))
    known = dict(zip(("keys", "values"), own)), torch.tensor([[s, 4], [0, 1], [2, s]]), None, None, None
    found = kernels.attend(q, known[0], keys.written(), values.written(), *known[1:])
    apart = (kernels.Plain(x.dense().repeat_interleave(2, 1)) for x in (keys, values))
    plain = kernels.attend(q, known[0], *apart, known[1].repeat_interleave(2, 1), *known[2:])
    assert found is not None
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


def test_where_no_kernel_reads():
    q = torch.randn(1, 1, 1, 4)
    slots = [kernels.Plain(torch.randn(1, 1, 3, 4)) for _ in range(2)]
    rest = *slots, torch.tensor([[3]]), None, None, None
    assert kernels.attend(q, {"keys": q, "values": q}, *rest) is not None
    with kernels.eager():
        assert kernels.attend(q, {"keys": q, "values": q}, *rest) is None
    assert kernels.attend(q.double(), {"keys": q, "values": q}, *rest) is None
    asked = q.clone().requires_grad_()
    assert kernels.attend(asked, {"keys": q, "values": q}, *rest) is None
    with torch.no_grad():
        assert kernels.attend(asked, {"keys": q, "values": q}, *rest) is not None
    elsewhere = q.to("meta")
    assert kernels.attend(elsewhere, {"keys": elsewhere, "values": elsewhere}, *rest) is None


def attended(logits, normaliser=None, mass=None, counts=None):
    """Weights of slots and of the token itself for logits [N, S + 1], the last of the token."""
    n, s = logits.shape[0], logits.shape[1] - 1
    q = torch.ones(n, 1, 1, 1)
    values = torch.eye(s + 1).expand(n, 1, s + 1, s + 1)
    own = {"keys": logits[:, -1:].view(n, 1, 1, 1), "values": values[:, :, s:]}
    slots = kernels.Plain(logits[:, :-1].view(n, 1, s, 1)), kernels.Plain(values[:, :, :s])
    count = torch.full((n, 1), s) if counts is None else counts
    found = kernels.attend(q, own, *slots, count, mass, None, normaliser)
    assert found is not None
    return found[:, 0, 0]


@pytest.mark.parametrize("size", [0.01, 1.0, 20.0, 80.0])
@pytest.mark.parametrize("slots", [0, 1, 7, 33])
def test_weights_against_float64(size, slots):
    logits = size * torch.randn(6, slots + 1, generator=torch.Generator().manual_seed(slots))
    torch.testing.assert_close(attended(logits).double(), logits.double().softmax(-1), rtol=3e-6, atol=1e-12)
    silu = torch.nn.functional.silu(logits.double()) / 5
    torch.testing.assert_close(attended(logits, 5.0).double(), silu, rtol=3e-6, atol=1e-30)


def test_masses_and_counts():
    generator = torch.Generator().manual_seed(4)
    logits, mass = torch.randn(3, 6, generator=generator), 3 * torch.rand(3, 1, 5, generator=generator)
    counts = torch.tensor([[5], [0], [2]])
    real = torch.cat([torch.arange(5) < counts, torch.ones(3, 1, dtype=torch.bool)], 1)
    times = torch.cat([mass[:, 0], torch.ones(3, 1)], 1) * real
    weights = times * logits.exp()
    torch.testing.assert_close(attended(logits, None, mass, counts), weights / weights.sum(-1, keepdim=True))
    torch.testing.assert_close(attended(logits, 2.0, mass, counts), times * torch.nn.functional.silu(logits) / 2)


@pytest.mark.parametrize("far", [-200.0, -1e30, -1e36, -3e38, -torch.inf])
def test_what_is_far_below_weighs_nothing(far):
    logits = torch.tensor([[0.5, far, 2.0, 1.0], [far, far, 80.0, far], [-1.0, 3e38, far, 0.0]])
    torch.testing.assert_close(attended(logits), logits.softmax(-1), rtol=3e-6, atol=1e-30)
    if far > -torch.inf:
        torch.testing.assert_close(attended(logits, 2.0), torch.nn.functional.silu(logits) / 2, rtol=3e-6, atol=1e-30)


@pytest.mark.parametrize("m", [1, 4, 5, 16])
def test_tokens_of_one_user_whose_heads_share_slots(m):
    generator = torch.Generator().manual_seed(7)
    keys, values = (torch.randn(1, 2, 11, 20, generator=generator) for _ in range(2))
    q, *own = (torch.randn(1, m, 4, 20, generator=generator).transpose(1, 2) for _ in range(3))
    known = dict(zip(("keys", "values"), own)), torch.tensor([[7, 4]]), None, None, None
    found = kernels.attend(q, known[0], kernels.Plain(keys), kernels.Plain(values), *known[1:])
    each = (kernels.Plain(x.repeat_interleave(2, 1)) for x in (keys, values))
    plain = kernels.attend(q.contiguous(), known[0], *each, known[1].repeat_interleave(2, 1), *known[2:])
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("candidates", [1, 3, 9])
@pytest.mark.parametrize("name", ["sasrec", "hstu"])
@pytest.mark.parametrize("width", [4, 9])
@torch.no_grad()
def test_keys_of_another_width_are_refused_however_many_ask(name, width, candidates):
    backbone, tokens, prefill = world(name, False, candidates)
    odd = torch.nn.functional.pad
    layers = tuple(
        tuple(replace(s, fields={k: Dense(odd(v.dense(), (0, width - 8)) if k == "keys" else v.dense())
                                 for k, v in s.fields.items()}) for s in layer)
        for layer in prefill.state.layers
    )  # fmt: skip
    with pytest.raises(RuntimeError):
        backbone.read(tokens, replace(prefill.state, layers=layers))


def test_what_has_other_shapes_is_not_looked_at():
    q = torch.randn(2, 2, 1, 8)
    slots, own = kernels.Plain(torch.randn(2, 2, 5, 8)), {"keys": q, "values": q}

    def reads(own=own, keys=slots, values=slots, count=None, mass=None, bias=None):
        count = torch.tensor([[5]]) if count is None else count
        return kernels.attend(q, own, keys, values, count, mass, bias, None) is not None

    assert reads() and reads(mass=torch.rand(2, 1, 5), bias=(torch.rand(1, 2, 1, 5), torch.rand(2, 1, 1)))
    assert not reads(keys=kernels.Plain(torch.randn(2, 2, 5, 7))) and not reads(own={"keys": q[..., :7], "values": q})
    assert not reads(own={"keys": q, "values": q[..., :7]}) and not reads(mass=torch.rand(2, 1, 4))
    assert not reads(mass=torch.rand(3, 1, 5)) and not reads(count=torch.full((3, 1), 5))
    assert not reads(bias=(torch.rand(1, 1, 1, 4), torch.rand(1, 1, 1)))
    assert not reads(bias=(torch.rand(1, 1, 1, 5), torch.rand(1, 1, 2)))


@pytest.mark.parametrize("normaliser", [None, 3.0])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_no_number_is_seen(wrong, normaliser):
    logits = torch.zeros(1, 4)
    logits[0, 1] = wrong
    assert not attended(logits, normaliser).isfinite().all()


def test_a_block_with_its_own_way_is_not_weighed_for():
    assert SASRecBlock.weighing == LSRMBlock.weighing == "softmax" and HSTUBlock.weighing == "silu"
    assert MARMBlock.weighing is None

    class Sharper(SASRecBlock):
        def logits(self, q, segment, queries, slots):
            return 2 * super().logits(q, segment, queries, slots)

    class Deeper(SASRecBlock):
        def combine(self, x, mixed, gate):
            return super().combine(x, mixed, gate)

    assert Sharper.weighing is None and Deeper.weighing == "softmax"

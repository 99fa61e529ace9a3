"""Backbones against plain float64 code written from the papers, and statistics from whole attention matrices."""

import pytest
import torch
from torch.nn import functional as F

from malloc_bench.backbones import get_backbone
from malloc_bench.backbones.block import Places
from malloc_bench.backbones.hstu import _TimeBias
from malloc_bench.backbones.losses import next_item_loss
from malloc_bench.state import Batch, Dense, Events, Segment, Slots, Stats, UserState
from malloc_bench.testing import histories
from malloc_bench.testing.worlds import LENGTHS, close

CASES = (
    "sasrec",
    "sasrec-2-heads",
    "sasrec-paper-2-heads",
    "hstu-times",
    "hstu-times-2-heads",
    "hstu",
    "hstu-2-heads",
    "lsrm-2-heads",
)


def layer_norm(x, weight=None, bias=None, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    x = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return x if weight is None else x * weight + bias


def hstu(p, config, items, times, following):
    """One user's outputs [S, d] and attention maps per layer [H, S, S] (papers.md section 5, in loops)."""
    s, d, h = len(items), config.dim, config.heads
    x = p["items.weight"][items] * d**0.5 + p["positions.weight"][:s]
    maps = []
    for i in range(config.layers):
        uvqk = layer_norm(x, eps=1e-6) @ p[f"blocks.{i}.uvqk.weight"].T
        u, v, q, k = (uvqk / (1 + (-uvqk).exp())).chunk(4, -1)
        heads, attention = [], torch.zeros(h, s, s, dtype=torch.float64)
        for head in range(h):
            part = slice(head * d // h, (head + 1) * d // h)
            for row in range(s):
                for col in range(row + 1):
                    logit = q[row, part] @ k[col, part] + p[f"blocks.{i}.position_bias"][row - col]
                    if times is not None:
                        gap = max(abs(int(following[row]) - int(times[col])), 1)
                        bucket = min(int(torch.tensor(float(gap)).double().log() / 0.301), 128)
                        logit = logit + p[f"blocks.{i}.time_bias"][bucket]
                    attention[head, row, col] = logit / (1 + (-logit).exp()) / config.max_length
            heads.append(attention[head] @ v[:, part])
        gated = u * layer_norm(torch.cat(heads, -1), eps=1e-6)
        x = x + gated @ p[f"blocks.{i}.out.weight"].T + p[f"blocks.{i}.out.bias"]
        maps.append(attention)
    return x / x.norm(dim=-1, keepdim=True), maps


def sasrec(p, config, items, times, following):
    s, d, h = len(items), config.dim, config.heads
    x = p["items.weight"][items] * d**0.5 + p["positions.weight"][:s]
    maps = []
    for i in range(config.layers):
        b = {k.removeprefix(f"blocks.{i}."): v for k, v in p.items() if k.startswith(f"blocks.{i}.")}
        normed = layer_norm(x, b["norm_attention.weight"], b["norm_attention.bias"])
        paper = config.block == "paper"
        q = (normed @ b["qkv.weight"].T + b["qkv.bias"])[:, :d]
        k, v = ((x if paper else normed) @ b["qkv.weight"].T + b["qkv.bias"])[:, d:].chunk(2, -1)
        heads, attention = [], torch.zeros(h, s, s, dtype=torch.float64)
        for head in range(h):
            part = slice(head * d // h, (head + 1) * d // h)
            for row in range(s):
                e = (k[: row + 1, part] @ q[row, part] / (d // h) ** 0.5).exp()
                attention[head, row, : row + 1] = e / e.sum()
            heads.append(attention[head] @ v[:, part])
        x = (normed if paper else x) + torch.cat(heads, -1) @ b["out.weight"].T + b["out.bias"]
        normed = layer_norm(x, b["norm_ffn.weight"], b["norm_ffn.bias"])
        hidden = normed @ b["up.weight"].T + b["up.bias"]
        x = (normed if paper else x) + hidden.clamp(min=0) @ b["down.weight"].T + b["down.bias"]
        maps.append(attention)
    x = layer_norm(x, p["norm.weight"], p["norm.bias"])
    return x if config.head == "dot" else x / x.norm(dim=-1, keepdim=True), maps


def lsrm(p, config, items, times, following):
    s, d, h = len(items), config.dim, config.heads
    x = p["items.weight"][items] * d**0.5 + p["positions.weight"][:s]
    maps, future = [], torch.ones(s, s, dtype=torch.bool).triu(1)
    for i in range(config.layers):
        qkv, out, up, down = (p[f"blocks.{i}.{name}.weight"].T for name in ("qkv", "out", "up", "down"))
        q, k, v = (y.view(s, h, d // h).transpose(0, 1) for y in (layer_norm(x) @ qkv).chunk(3, -1))
        maps.append((q @ k.mT / (d // h) ** 0.5).masked_fill(future, -torch.inf).softmax(-1))
        x = x + torch.cat(list(maps[-1] @ v), -1) @ out
        hidden = layer_norm(x) @ up
        x = x + (hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))) @ down
    return layer_norm(x), maps


def reference(backbone, events, user):
    n = int(events.count[user])
    p = {name: x.double() for name, x in backbone.state_dict().items()}
    times = events.times[user, :n] if backbone.uses_times else None
    model = {"hstu": hstu, "sasrec": sasrec, "lsrm": lsrm}[backbone.name]
    return model(p, backbone.config, events.items[user, :n].long(), times, events.next_times[user, :n])


@pytest.mark.parametrize("case", CASES)
def test_forward_is_the_papers_formula(case, trained):
    backbone = trained(case)
    history, _ = histories(backbone, LENGTHS)
    outputs = backbone(history)
    for user in (1, 3, 4):
        n = LENGTHS[user]
        close(outputs[user, :n].double(), reference(backbone, history, user)[0], f"user {user}", 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_statistics_are_those_of_the_whole_attention_matrix(case, trained):
    backbone, window = trained(case), 5
    history, _ = histories(backbone, LENGTHS)
    prefill = backbone.prefill(history, stats=Stats(column_sum=True, window=window))
    assert bool((prefill.newest_attention(0, window) < 0).any()) == (backbone.name == "hstu")
    for user, n in enumerate(LENGTHS[:5]):
        maps = reference(backbone, history, user)[1] if n else [torch.zeros(backbone.config.heads, 0, 0)] * 2
        for layer, attention in enumerate(maps):
            received, newest = prefill.attention_received(layer)[user], prefill.newest_attention(layer, window)[user]
            close(received[:, :n].double(), attention.abs().sum(1).double(), "column sums", 1e-5)
            assert not received[:, n:].any() and not newest[..., n:].any()
            there = min(n, window)
            close(newest[:, window - there :, :n].double(), attention[:, n - there :].double(), "window", 1e-5)
            assert not newest[:, : window - there].any()


@pytest.mark.parametrize("case", ["sasrec", "hstu"])
def test_statistics_of_nobody(case, trained):
    history, _ = histories(trained(case), (0, 0))
    prefill = trained(case).prefill(history, stats=Stats(column_sum=True, window=4))
    assert prefill.attention_received(0).shape == (2, 1, 0)
    assert prefill.newest_attention(0, 4).shape == (2, 1, 4, 0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("copies", [1, 2, 5])
def test_a_slot_of_mass_m_is_m_slots(case, copies, trained):
    """Softmax and SiLU alike: the count says the same as the slot written down m times."""
    backbone = trained(case)
    history, tokens = histories(backbone, (9,))
    state = backbone.prefill(history).state
    _, tokens = histories(backbone, (9,))
    heavy, repeated = [], []
    for (segment,) in state.layers:
        old = segment.slots
        place = torch.arange(9, dtype=torch.int32).view(1, 1, 9)
        mass = torch.ones(1, 1, 9)
        mass[..., 4] = copies
        heavy.append((Segment(segment.fields, Slots(old.count, place, old.timestamps, mass)),))
        index = torch.tensor([0, 1, 2, 3, *[4] * copies, 5, 6, 7, 8])
        times = None if old.timestamps is None else old.timestamps[..., index]
        fields = {name: Dense(v.dense()[:, :, index]) for name, v in segment.fields.items()}
        count = torch.tensor([[len(index)]], dtype=torch.int32)
        repeated.append((Segment(fields, Slots(count, place[..., index], times)),))
    outputs = backbone.read(tokens, UserState(tuple(heavy), state.length))
    close(outputs, backbone.read(tokens, UserState(tuple(repeated), state.length)), "mass", 1e-5)
    moved = float((outputs - backbone.read(tokens, state)).abs().max())
    assert (moved < 1e-5) == (copies == 1)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_loss_is_cross_entropy(scale):
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(600, 8, generator=generator) * scale).requires_grad_()
    table = torch.randn(40, 8, generator=generator).requires_grad_()
    targets = torch.randint(40, (600,), generator=generator)
    ours = next_item_loss(hidden, table, targets)
    mine = torch.autograd.grad(3 * ours, (hidden, table))
    stock = F.cross_entropy(hidden @ table.T, targets)
    theirs = torch.autograd.grad(3 * stock, (hidden, table))
    close(ours, stock, "loss", 1e-5)
    for name, a, b in zip(("hidden", "table"), mine, theirs):
        assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max()), name


@pytest.mark.parametrize("head", ["cosine", "dot"])
def test_backbone_loss_is_cross_entropy_over_the_catalogue(head):
    backbone = get_backbone("sasrec", 30, dim=8, max_length=48, head=head).eval()
    history, _ = histories(backbone, LENGTHS)
    targets = torch.where(history.mask(), history.items.roll(-1, 1).clamp(min=1), 0)
    hidden, real = backbone(history), targets > 0
    logits = hidden[real] @ backbone.catalogue().T / (backbone.config.temperature if head == "cosine" else 1)
    close(backbone.loss(Batch(history, targets)), F.cross_entropy(logits, targets[real].long() - 1), "loss", 1e-5)


def test_time_bias_has_the_gradient_of_indexing():
    table = torch.randn(129, dtype=torch.float64, requires_grad=True)
    buckets = torch.randint(129, (2, 1, 7, 9))
    weight = torch.randn(buckets.shape, dtype=torch.float64)
    ours, stock = _TimeBias.apply(table, buckets), table[buckets]
    assert torch.equal(ours, stock)
    (a,), (b,) = (torch.autograd.grad((x * weight).sum(), table) for x in (ours, stock))
    close(a, b, "gradient", 1e-12)


def test_time_gaps_fall_into_the_papers_buckets():
    """floor(ln(max(gap, 1)) / 0.301), at most 128."""
    block = get_backbone("hstu", 5, True, dim=4, max_length=8).blocks[0]
    with torch.no_grad():
        block.position_bias.zero_()
        block.time_bias.copy_(torch.arange(129.0))
    gaps = torch.tensor([0, 1, 2, 59, 3_600, 86_400, 31_536_000, 2**62])
    where = Places(torch.zeros(1, 1, 1, dtype=torch.long), torch.full((1, 1, 1), 2**62))
    slots = Places(torch.zeros(1, 1, 8, dtype=torch.long), 2**62 - gaps.view(1, 1, 8))
    q = torch.zeros(1, 1, 1, 4)
    got = block.logits(q, Segment({"keys": Dense(torch.zeros(1, 1, 8, 4))}, None), where, slots)
    assert got.flatten().tolist() == [0, 0, 2, 13, 27, 37, 57, 128]


def test_times_matter_to_hstu_only_where_the_data_has_them(trained):
    for case, matters in (("hstu-times", True), ("hstu", False), ("sasrec", False)):
        backbone = trained(case)
        history, tokens = histories(backbone, LENGTHS)
        later = Events(tokens.items, tokens.count, tokens.times + 10**7, tokens.next_times + 10**7)
        state = backbone.prefill(history).state
        moved = (backbone.read(later, state) - backbone.read(tokens, state))[3:].abs().max()
        assert (float(moved) > 1e-3) == matters


def test_unknown_parameters_are_refused():
    with pytest.raises(ValueError, match="Did you mean 'layers'"):
        get_backbone("hstu", 5, layer=2)

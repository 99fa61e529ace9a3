"""FuXi-alpha against its equations in loops over channels, its bytes and its work."""

import pytest
import torch
from torch.nn import functional as F

from malloc_bench.backbones import get_backbone
from malloc_bench.backbones.block import Places
from malloc_bench.backbones.hstu import relative_bias
from malloc_bench.compressors import get_compressor
from malloc_bench.measure import count_flops
from malloc_bench.state import Dense, Events, Segment, UserState
from malloc_bench.testing import compressor_checks, histories
from malloc_bench.testing.worlds import LENGTHS, close

CASES = ["fuxi", "fuxi-times-2-heads"]


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def layer(block, x, events, n):
    """One layer of one user, [S, d], by the paper's equations: a loop over channels and heads."""
    s, d = x.shape
    heads, width = block.stored_heads, d // block.stored_heads
    channels = 3 if events.times is not None and block.time_bias is not None else 2
    u, v, q, k = F.silu(rms(x) @ block.uvqk.weight.T).split([channels * d, d, d, d], -1)
    past = torch.arange(s)[:, None] >= torch.arange(s)
    weights = [None, relative_bias(block.position_bias, None, torch.arange(s)[:, None] - torch.arange(s), None)]
    if channels == 3:
        gap = (events.next_times[0, :, None] - events.times[0, None]).abs().clamp(min=1)
        weights.insert(1, block.time_bias[(gap.float().log() / 0.301).long().clamp(max=128)])
    mixed = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        weights[0] = F.silu(q[:, part] @ k[:, part].T) / n
        mixed += [torch.where(past, w, 0.0) @ v[:, part] for w in weights]
    y = x + block.out(u * rms(torch.cat(mixed, -1)))
    return y + block.down(F.silu(block.gate(rms(y))) * block.up(rms(y)))


@pytest.mark.parametrize("case", CASES)
def test_a_stack_is_the_papers_equations(case, trained):
    backbone = trained(case)
    history, _ = histories(backbone, (23,))
    x = backbone._embed(history, torch.arange(23)[None])[0]
    for block in backbone.blocks:
        x = layer(block, x, history, backbone.max_length)
    close(backbone(history)[0], backbone._head(x), "plain pass", 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_each_channel_is_read_from_the_state(case, trained):
    """Without one of the channels what is read is another thing: none of them is idle, or stands for another."""
    backbone = trained(case)
    history, tokens = histories(backbone, LENGTHS)
    state, block = backbone.prefill(history).state, backbone.blocks[-1]
    clean, inner = backbone.read(tokens, state), block.weigh
    for channel in range(block.channels):

        def without(logits, masks, masses, channel=channel):
            return [w * (torch.arange(block.heads) % block.channels != channel)[:, None, None]
                    for w in inner(logits, masks, masses)]  # fmt: skip

        block.weigh = without
        try:
            moved = (backbone.read(tokens, state) - clean)[3:].norm() / clean[3:].norm()
        finally:
            del block.weigh
        assert moved > 0.01, f"channel {channel} moves the output by {moved:.2%} only"


def test_a_state_is_as_large_as_hstus():
    """One set of keys and values serves all channels."""
    states = []
    for name in ("fuxi", "hstu"):
        backbone = get_backbone(name, 60, True, heads=2, dim=16, max_length=64).eval()
        states.append(backbone.prefill(histories(backbone, LENGTHS)[0]).state)
    assert states[0].nbytes().tolist() == states[1].nbytes().tolist()


@pytest.mark.parametrize("times", [False, True])
@pytest.mark.parametrize("history", [20, 300])
def test_flops_are_what_the_counter_counts(times, history):
    backbone = get_backbone("fuxi", 60, times, dim=16, heads=2, max_length=320).eval()
    events, tokens = histories(backbone, (history,))
    with torch.inference_mode():
        state = backbone.prefill(events).state
        assert backbone.flops("prefill", history) == count_flops(lambda: backbone.prefill(events))
        assert backbone.flops("read", 2, state) == count_flops(lambda: backbone.read(tokens, state))
        assert backbone.flops("append", 2, state) == count_flops(lambda: backbone.append(state, tokens))
        raw = UserState((), events.count, events)
        assert backbone.flops("read", 2, raw) == count_flops(lambda: backbone.read(tokens, raw))


METHODS = ["recent", "h2o", "merge_adjacent", "fit_omp"]
MORE = ["snapkv", "kmeans", "kivi", "fit_constant"]


@pytest.mark.parametrize("method", [*METHODS, *(pytest.param(each, marks=pytest.mark.slow) for each in MORE)])
def test_methods_of_each_family_keep_their_promises(method, trained):
    for check in compressor_checks(get_compressor(method), backbones=[trained("fuxi-times-2-heads")]):
        if "tensors" not in str(check):
            check()


def test_a_merged_slot_counts_in_every_channel(trained):
    """Two events that are the same, at one place and time, and one slot that stands for both."""
    backbone = trained("fuxi-times-2-heads")
    block, x = backbone.blocks[0], torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(0))
    q, own, _ = block.project(x)
    logits = block.logits(q, *_at(own, [0, 1]))
    ones, two = torch.ones(1, 1, 1, 2, dtype=torch.bool), torch.tensor([[[1.0, 2.0]]])
    (single,), (double,) = (block.weigh([logits], [ones], [mass]) for mass in (None, two))
    assert torch.equal(double[..., 0], single[..., 0]) and torch.equal(double[..., 1], 2 * single[..., 1])


def _at(own, rows):
    positions, times = torch.arange(3)[None, None], torch.tensor([[[10, 70, 4000]]])
    places = Places(positions, times)
    return Segment({k: Dense(v[:, :, rows]) for k, v in own.items()}, None), places, places.rows(slice(0, len(rows)))


def test_a_search_head_by_head_is_refused():
    backbone = get_backbone("fuxi", 60, True, heads=2, dim=16)
    assert "fuxi share what is stored" in str(get_compressor("sdim").supports(backbone))
    assert get_compressor("sdim").supports(get_backbone("hstu", 60, True, heads=2, dim=16)) is None


def test_times_are_asked_for(trained):
    backbone = trained("fuxi-times-2-heads")
    with pytest.raises(ValueError, match="made for data with times"):
        backbone(Events(torch.ones(1, 2, dtype=torch.int32), torch.tensor([2], dtype=torch.int32)))

"""Head variants against the same layers with nothing shared, absorbed or narrowed."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from malloc_bench.backbones import get_backbone
from malloc_bench.backbones.hstu import HSTUBlock
from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.state import Dense, Segment, Stats, UserState
from malloc_bench.testing import histories
from malloc_bench.testing.worlds import LENGTHS, close, lively

DIM, HEADS = 16, 4
KINDS = [("sasrec", False), ("lsrm", False), ("hstu", False), ("hstu", True)]
kinds = pytest.mark.parametrize("name, has_time", KINDS)


def build(name, has_time=False, **sizes):
    torch.manual_seed(0)
    sizes = {"layers": 2, "heads": HEADS, "dim": DIM, "max_length": 64, "dropout": 0.0, **sizes}
    return lively(get_backbone(name, 60, has_time, **sizes)).eval().requires_grad_(False)


def adapted(backbone, part, **params):
    return get_compressor(part, **params).adapted(backbone).eval().requires_grad_(False)


def spread(grouped, plain, n_kv):
    """The plain backbone with the weights of a grouped one: each head of keys and values copied for its group."""
    weights = grouped.state_dict()
    width = DIM // HEADS
    copies = (torch.arange(HEADS) // (HEADS // n_kv)).repeat_interleave(width) * width + torch.arange(width).repeat(
        HEADS
    )
    for key in [k for k in weights if f".{plain.blocks[0].fused}." in k]:
        parts, rows = grouped.blocks[0].parts, []
        for part, x in zip(parts, weights[key].split(list(parts.values()))):
            rows.append(x[copies] if part in ("keys", "values") else x)
        weights[key] = torch.cat(rows)
    plain.load_state_dict(weights)
    return plain


@kinds
@torch.no_grad()
def test_as_many_heads_as_before_is_the_plain_backbone(name, has_time):
    plain = build(name, has_time)
    same = adapted(plain, "gqa", n_kv_heads=HEADS)
    history, tokens = histories(plain, LENGTHS)
    close(same(history), plain(history), "plain pass", 1e-6)
    outputs = [b.read(tokens, b.prefill(history).state) for b in (same, plain)]
    close(*outputs, "read", 1e-6)


@kinds
@pytest.mark.parametrize("n_kv", [1, 2])
@torch.no_grad()
def test_groups_read_as_copies_would(n_kv, name, has_time):
    """The plain pass, reads, statistics and states that each head has thinned out by itself."""
    grouped = adapted(build(name, has_time), "gqa", n_kv_heads=n_kv)
    copies = spread(grouped, build(name, has_time), n_kv)
    history, tokens = histories(grouped, LENGTHS)
    close(grouped(history), copies(history), "plain pass", 1e-5)
    stats, group = Stats(column_sum=True, window=4), HEADS // n_kv
    small, large = (b.prefill(history, stats=stats) for b in (grouped, copies))
    close(grouped.read(tokens, small.state), copies.read(tokens, large.state), "read", 1e-5)
    for layer in small.layers:
        assert small.keys(layer).shape[1] == n_kv
        mean = large.attention_received(layer).unflatten(1, (n_kv, group)).mean(2)
        close(small.attention_received(layer), mean, "column sums", 1e-5)
        mean = large.newest_attention(layer, 4).abs().unflatten(1, (n_kv, group)).mean(2)
        close(small.newest_attention(layer, 4).abs(), mean, "window", 1e-5)
    for method in (get_compressor("h2o"), get_compressor("merge_adjacent")):
        state = method.compress(small, Budget(0.3))
        close(grouped.read(tokens, state), copies.read(tokens, _copied(state, group)), f"read after {method}", 1e-5)


def _copied(state: UserState, group: int) -> UserState:
    """Every stored head `group` times, with what is known of its slots."""

    def each(x):
        return x if x is None or x.shape[1] == 1 else x.repeat_interleave(group, 1)

    def segment(s):
        slots = replace(s.slots, **{k: each(getattr(s.slots, k)) for k in ("count", "positions", "timestamps", "mass")})
        return Segment({k: Dense(v.dense().repeat_interleave(group, 1)) for k, v in s.fields.items()}, slots)

    return replace(state, layers=tuple(tuple(map(segment, layer)) for layer in state.layers))


@pytest.mark.parametrize("name", ["sasrec", "lsrm"])
@torch.no_grad()
def test_a_latent_is_a_thin_factor_of_the_key_and_value_maps(name):
    """Softmax: keys U_k (W x + b) and values U_v (W x + b) are a plain layer's, with products as its weights."""
    latent, plain = adapted(build(name), "mla", latent=6), build(name)
    weights = plain.state_dict() | {k: v for k, v in latent.state_dict().items() if "qkv." not in k and ".up_" not in k}
    for i, block in enumerate(latent.blocks):
        for end in ("weight", "bias"):
            down = getattr(block.qkv, end)
            if down is not None:
                q, c = down.split([DIM, 6])
                weights[f"blocks.{i}.qkv.{end}"] = torch.cat([q, block.up_keys.weight @ c, block.up_values.weight @ c])
    plain.load_state_dict(weights)
    history, tokens = histories(plain, LENGTHS)
    close(latent(history), plain(history), "plain pass", 1e-5)
    outputs = [b.read(tokens, b.prefill(history).state) for b in (latent, plain)]
    close(*outputs, "read", 1e-5)


class Unabsorbed(HSTUBlock):
    """Keys and values of all heads made of SiLU(W x) and stored."""

    def project(self, x):
        mapped = F.silu(self.uvqk(F.layer_norm(x, x.shape[-1:])))
        gate, q, c = mapped.split([DIM, DIM, 6], -1)
        heads = [y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (q, self.up_keys(c), self.up_values(c))]
        return heads[0], {"keys": heads[1], "values": heads[2]}, gate


@pytest.mark.parametrize("has_time", [False, True])
@torch.no_grad()
def test_hstu_reads_a_latent_as_it_would_read_what_is_mapped_up_from_it(has_time):
    latent, plain = (adapted(build("hstu", has_time), "mla", latent=6) for _ in range(2))
    plain.load_state_dict(latent.state_dict())
    for block in plain.blocks:
        block.__class__ = Unabsorbed
    history, tokens = histories(plain, LENGTHS)
    close(latent(history), plain(history), "plain pass", 1e-5)
    stats = Stats(column_sum=True, window=4)
    small, large = (b.prefill(history, stats=stats) for b in (latent, plain))
    close(latent.read(tokens, small.state), plain.read(tokens, large.state), "read", 1e-5)
    for layer in small.layers:
        assert small.segment(layer).fields["latent"].shape == (len(LENGTHS), 1, max(LENGTHS), 6)
        close(
            small.attention_received(layer),
            large.attention_received(layer).mean(1, keepdim=True),
            "column sums, the mean over all heads",
            1e-5,
        )


@kinds
@torch.no_grad()
def test_bytes_are_what_is_stored(name, has_time):
    plain = build(name, has_time)
    history, _ = histories(plain, LENGTHS)

    def vectors(backbone):
        """Beside them: a length, a count, and times."""
        events = torch.tensor(LENGTHS)
        return backbone.prefill(history).state.nbytes() - 8 - 8 * has_time * events

    full = vectors(plain)
    assert full.tolist() == [2 * 2 * DIM * 4 * n for n in LENGTHS]
    assert (vectors(adapted(plain, "mqa")) * HEADS).tolist() == full.tolist()
    assert (vectors(adapted(plain, "gqa", n_kv_heads=2)) * 2).tolist() == full.tolist()
    assert vectors(adapted(plain, "mla", latent=5)).tolist() == [2 * 5 * 4 * n for n in LENGTHS]


def test_what_is_not_narrowed_begins_as_it_would_have():
    plain = build("hstu")
    narrow = adapted(plain, "mqa")
    before, after = plain.state_dict(), narrow.state_dict()
    assert before.keys() == after.keys()
    for key in before:
        assert torch.equal(before[key], after[key]) or "uvqk" in key
    gate, values, queries, keys = after["blocks.0.uvqk.weight"].split([DIM, DIM // HEADS, DIM, DIM // HEADS])
    want = before["blocks.0.uvqk.weight"].split(DIM)
    for got, whole in zip((gate, values, queries, keys), want):
        assert torch.equal(got, whole[: len(got)])
    assert all(torch.equal(before[k], plain.state_dict()[k]) for k in before)  # `adapted` is a copy


@pytest.mark.parametrize(
    "part, params, name, sizes, why",
    [
        ("gqa", {"n_kv_heads": 3}, "sasrec", {}, "gqa needs a larger multiple of 3 heads, sasrec has 4"),
        ("gqa", {"n_kv_heads": 4}, "sasrec", {}, "larger multiple"),
        ("mqa", {}, "hstu", {"heads": 1}, "mqa needs a larger multiple of 1 heads, hstu has 1"),
        ("mla", {"latent": 32}, "lsrm", {}, "a latent of 32 is no less than keys and values, 32"),
        ("mla", {}, "marm", {}, "marm has no such map"),
        ("mqa", {}, "climber", {}, "climber has no such map"),
        ("compose", {"steps": ("mla", "knorm")}, "sasrec", {}, "knorm scores keys, sasrec stores latent"),
        ("compose", {"steps": ("mqa", "h2o")}, "marm", {}, "marm has no such map"),
    ],
)
def test_pairs_that_make_no_sense_say_why(part, params, name, sizes, why):
    assert why in get_compressor(part, **params).supports(build(name, **sizes))


def test_pairs_that_make_sense():
    for name, _ in KINDS:
        for part, params in (
            ("mqa", {}),
            ("gqa", {}),
            ("mla", {"latent": 31}),
            ("compose", {"steps": ("mqa", "knorm")}),
        ):
            assert get_compressor(part, **params).supports(build(name)) is None


@pytest.mark.parametrize(
    "part, params", [("gqa", {"n_kv_heads": 0}), ("mla", {"latent": 0}), ("mqa", {"n_kv_heads": 2})]
)
def test_parameters_out_of_range_are_refused(part, params):
    with pytest.raises(ValueError, match=part):
        get_compressor(part, **params)


# --- trained on from the un-adapted weights


def begun(plain, part, **params):
    """An adapted backbone of other weights, begun from the plain one's."""
    method = get_compressor(part, **params, finetune=3)
    made = method.adapted(lively(get_backbone(plain.name, 60, plain.uses_times, **vars(plain.config))))
    method.begin(made, plain.state_dict())
    return made.eval()


@kinds
@torch.no_grad()
def test_what_both_have_is_taken_over_and_heads_are_pooled(name, has_time):
    plain = build(name, has_time)
    history, _ = histories(plain, LENGTHS)
    close(begun(plain, "gqa", n_kv_heads=HEADS)(history), plain(history), "as many heads", 1e-6)
    fused, before = f"blocks.1.{plain.blocks[1].fused}.weight", plain.state_dict()
    after = begun(plain, "gqa", n_kv_heads=2).state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before if plain.blocks[0].fused not in k)
    widths = list(plain.blocks[1].parts.values())
    whole = dict(zip(plain.blocks[1].parts, before[fused].split(widths)))
    got = dict(
        zip(
            plain.blocks[1].parts,
            after[fused].split([w // (1 + (p in ("keys", "values"))) for p, w in plain.blocks[1].parts.items()]),
        )
    )
    assert torch.equal(got["queries"], whole["queries"])
    for part in ("keys", "values"):
        heads = whole[part].double().view(HEADS, DIM // HEADS, DIM)
        want = torch.cat([(heads[2 * i] + heads[2 * i + 1]) / 2 for i in range(2)])
        close(got[part].double(), want, part, 1e-6)


@pytest.mark.parametrize("name", ["sasrec", "lsrm"])
@torch.no_grad()
def test_a_latent_as_wide_as_the_input_begins_as_the_plain_backbone(name):
    plain = build(name)
    history, _ = histories(plain, LENGTHS)
    close(begun(plain, "mla", latent=DIM + 1)(history), plain(history), "plain pass", 1e-4)
    rough, rougher = (begun(plain, "mla", latent=r) for r in (12, 4))
    errors = [float((b(history) - plain(history)).norm()) for b in (rough, rougher)]
    assert 0 < errors[0] < errors[1]


def test_finetuning_has_its_own_identity():
    from malloc_bench.suite.cells import content

    plain, tuned = (content(get_compressor("mqa", finetune=n)) for n in (0, 5))
    assert "finetune" not in plain["params"] and tuned["params"]["finetune"] == 5  # older rows keep their ids
    with pytest.raises(ValueError, match="finetune must be at least 0"):
        get_compressor("mqa", finetune=-1)


# --- pooled without training


@kinds
@torch.no_grad()
def test_pooled_heads_read_as_copies_of_their_mean_would(name, has_time):
    plain = build(name, has_time)
    history, tokens = histories(plain, LENGTHS)
    full = plain.prefill(history)
    state = get_compressor("mean_heads", heads=2).compress(full)
    for (got,), (was,) in zip(state.layers, full.state.layers):
        for field in ("keys", "values"):
            x = was.fields[field].dense().double()
            want = torch.stack([(x[:, h // 2 * 2] + x[:, h // 2 * 2 + 1]) / 2 for h in range(HEADS)], 1)
            close(got.fields[field].dense().double(), want, field, 1e-6)
    copies = full.state.map(torch.clone)
    layers = [(Segment({k: Dense(v.dense()) for k, v in s.fields.items()}, s.slots),) for (s,) in state.layers]
    close(plain.read(tokens, state), plain.read(tokens, replace(copies, layers=tuple(layers))), "read", 1e-5)
    vectors = [2 * 2 * DIM * 4 * n for n in LENGTHS]
    assert (full.state.nbytes() - state.nbytes()).tolist() == [v // 2 for v in vectors]


def test_heads_that_cannot_be_pooled_say_why():
    for name, sizes, why in (("sasrec", {"heads": 1}, "has 1"), ("marm", {}, "stores hidden"),
                             ("gated_delta", {}, "stores memory")):  # fmt: skip
        assert why in get_compressor("mean_heads").supports(build(name, **sizes))
    with pytest.raises(ValueError, match="at least 1"):
        get_compressor("mean_heads", heads=0)

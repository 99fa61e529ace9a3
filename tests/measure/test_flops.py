from dataclasses import replace
from functools import cache, partial
from zlib import crc32

import pytest
import torch
from torch.nn import functional as F

from malloc_bench.backbones import get_backbone
from malloc_bench.backbones.block import Block
from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.compressors.fitted import descent, fit_omp
from malloc_bench.measure import Workload, closed_form, count_flops, some_facts
from malloc_bench.registry import names
from malloc_bench.state import Ask, Events, Stats

ITEMS, DIM, HEADS, LAYERS = 60, 16, 2, 2
PARAMS = {  # beside the defaults
    "compose": [
        {"steps": ("recent", "merge_adjacent")},
        {"steps": ("h2o", {"kivi": {"bits": 2}})},
        {"steps": ("recent", {"svd": {"rank": 3}})},
        {"steps": ({"mla": {"latent": 6}}, "h2o", {"kivi": {"bits": 2}})},
        {"steps": ({"fit_omp": {"probes": 8}}, "mxint")},
        {"steps": ({"fit_omp": {"probes": 8}}, {"gain_shape": {"stages": 2}})},
    ],
    "auto": [{"candidates": [[{"fit_omp": {"probes": 8}}, "mxint"]], "tests": 2}],
    "gqa": [{"n_kv_heads": 1}],
    "eigen": [{}, {"rank": 3, "share": "layer"}],
    "ids_below": [{}, {"inner": "recent"}],
    **{name: [{"probes": 8}] for name in ("fit_recent", "fit_top", "fit_omp", "fit_constant")},
    **{name: [{"probes": 8, "rounds": 3}] for name in ("fit_keys", "cartridge")},
    "moments": [{"probes": 8}, {"probes": 8, "about": "zero", "inner": "snapkv"}],
    "still": [{"bank": 4, "rounds": 1}],
    "mla": [{"latent": 6}],
    "longformer": [{}, {"window": 5, "globals": 1}],
    "linformer": [{}, {"slots": 3}],
    "seeds": [{"seeds": 3}],
    "reformer": [{}],
    **{name: [{}, {"top": 5}] for name in ("sim_soft", "sim_hard", "eta", "sdim")},
    "sampled": [{}, {"inner": "expected_attention"}],
    "collectivekv": [{"pool": 20}],
    "beacon": [{}, {"chunk": 3}],
    "rec2pm": [{}, {"memories": 2, "segment": 15}],
    "longer": [{}, {"merge": 3, "recent": 4}],
    "kuaiformer": [{}, {"large": 6, "small": 3, "middle": 1, "recent": 4}],
    "svd": [{}, {"rank": 5}, {"share": "none"}],
    "turboquant": [{}],
    "kivi": [{}, {"bits": 2, "tail": 4}],
    "entropy": [{}],
    "gain_shape": [{}, {"stages": 3, "beam": 4}],
    "zstd": [{}, {"inner": {"kivi": {"bits": 2}}}],
    "gear": [{}, {"inner": {"turboquant": {"bits": 2}}, "every": 64}],
    "intactkv": [{}, {"inner": {"turboquant": {"bits": 2}}}],
    "xquant": [{}, {"across": True}],
}
METHODS = [get_compressor(name, **params) for name in names("compressors") for params in PARAMS.get(name, [{}])]
TURNED, LOOKS = {"turboquant": {"bits": 2}}, "expected_attention"  # inner methods that multiply, one of them by queries
AROUND = [
    get_compressor(name, **params)
    for name, params in [
        *[(name, {"inner": LOOKS}) for name in ("ada", "cam", "chunkkv", "d2o", "pyramid", "resets", "squeeze")],
        ("critical", {"inner": "capkv"}),
        ("ids_below", {"inner": LOOKS}),
        ("moments", {"inner": LOOKS, "probes": 8}),
        ("intactkv", {"score": LOOKS, "inner": TURNED}),
        ("gear", {"inner": {"zstd": {"inner": TURNED}}}),
        ("entropy", {"inner": TURNED}),
        ("compose", {"steps": ({"critical": {"inner": "keyformer"}}, TURNED)}),
        ("compose", {"steps": ("kmeans", "by_age")}),
        ("compose", {"steps": ({"moments": {"probes": 8}}, "gear")}),
        # more probes than slots: values are rounded in turns
        ("compose", {"steps": ({"fit_recent": {"probes": 56}}, TURNED)}),
        ("compose", {"steps": ({"fit_recent": {"probes": 56}}, {"gain_shape": {"stages": 2, "bits": 4}})}),
        ("compose", {"steps": ({"fit_recent": {"probes": 56}}, {"intactkv": {"score": "knorm", "inner": TURNED}})}),
    ]
]
ATTENTION = [("sasrec", False), ("hstu", False), ("hstu", True), ("lsrm", False), ("marm", False)]
TOP = Stats(probes=Ask(4, "top"))
BACKBONES = [*ATTENTION, ("gated_delta", False), ("rwkv", False)]


WORKS = [Workload(3, 40), Workload(2, 300, 5, 2)]


@cache
def build(name, has_time, length, heads=HEADS, part=None):
    """part: what has adapted it."""
    torch.manual_seed(0)
    made = get_backbone(name, ITEMS, has_time, layers=LAYERS, heads=heads, dim=DIM, max_length=length).eval()
    return adapted(get_compressor(part), made) if part else made


def lot(method, names):
    """One of the names, by the method: each is tried somewhere, and `make test-slow` tries it everywhere."""
    return names[crc32(str(method).encode()) % len(names)]


def pairs(*among):
    """Methods behind one of `among`, and behind what keeps no keys; `make test-slow` and three of them: behind all."""
    for method in METHODS:
        drawn = lot(method, among)
        for pair in BACKBONES:
            if not method.supports(build(*pair, 41)):
                quick = pair == drawn or pair not in ATTENTION or type(method).name in ("full", "h2o", "kivi")
                yield pytest.param(method, *pair, marks=[] if quick else [pytest.mark.slow])


def shared():
    """Every method where several query heads share a stored one, or where layers have a part of the events each
    (Climber), `make test-slow`: in both, behind FuXi and two more; what wraps others, everywhere."""
    for name, heads, part in (
        ("fuxi", 2, None),
        ("climber", 2, None),
        ("sasrec", 4, "gqa"),
        ("sasrec", 2, "mqa"),
        ("hstu", 2, "mqa"),
    ):
        backbone = build(name, name == "fuxi", 41, heads, part)
        for method in METHODS + AROUND:
            if not (part and method.structural) and not method.supports(backbone):
                slow = (name, part) != lot(method, [("climber", None), ("sasrec", "gqa")]) and method in METHODS
                marks = [pytest.mark.slow] if slow else []
                yield pytest.param(method, backbone, id=f"{method}-{name}-{part}", marks=marks)
    for name in ("sasrec", "hstu"):
        yield from (pytest.param(m, build(name, False, 41), id=f"{m}-{name}") for m in AROUND)


def adapted(method, backbone):
    torch.manual_seed(0)
    return method.structural.adapted(backbone) if method.structural else backbone


@cache
def filled(backbone, work, stats):
    return work.prefill(backbone, stats)


def learned(method, full):
    """The prefill with what the method learns of its users."""
    return full.given(method.fit(full)) if method.fit_parts() else full


def budget(method, fraction=0.4):
    return Budget(fraction) if method.takes_budget else None


def per_user(fn, users):
    total = count_flops(fn)
    assert total % users == 0
    return total // users


def compared(backbone, method, work, monkeypatch):
    """The state and its closed forms, that of compress being what the counter counts."""
    monkeypatch.setattr(fit_omp, "_SPENT", 0.0)  # what is fitted well costs less
    monkeypatch.setattr(descent, "_RIGHT", -1.0)
    full = learned(method, replace(filled(backbone, work, method.needs | method.fit_needs), memo={}))
    state = method.compress(full, budget(method))
    found = closed_form(backbone, method, state, work, full.state)
    eigh, eigen = torch.linalg.eigh, []  # the counter does not see it: 9 d^3 a matrix
    monkeypatch.setattr(torch.linalg, "eigh", lambda x: eigen.append(9 * x.numel() * x.shape[-1]) or eigh(x))
    compressing = per_user(lambda: method.compress(replace(full, memo={}), budget(method)), work.users)
    statistics = backbone.flops("statistics", work.history, stats=method.needs)
    assert found["compress_flops"] == compressing + sum(eigen) / work.users + statistics
    return state, found


def works():
    """Long histories behind SASRec, short ones elsewhere; `make test-slow`: both behind all."""
    for pair in pairs(("hstu", True), ("marm", False)):
        far = pair.values[1] != "sasrec"
        yield pytest.param(*pair.values, WORKS[0], marks=pair.marks)
        yield pytest.param(*pair.values, WORKS[1], marks=[pytest.mark.slow] if far else [])


@pytest.mark.parametrize("method, name, has_time, work", list(works()), ids=str)
def test_the_closed_form_is_what_the_counter_counts(method, name, has_time, work, monkeypatch):
    backbone = adapted(method, build(name, has_time, work.max_length))
    events, tokens, new = work.events(ITEMS)
    with torch.no_grad():
        state, found = compared(backbone, method, work, monkeypatch)
        assert found["prefill_flops"] == per_user(lambda: backbone.prefill(events), work.users) > 0
        assert found["read_flops"] == per_user(lambda: backbone.read(tokens, state), work.users) > 0
        if state.events is not None:
            assert found["append_flops"] is None
        else:
            assert found["append_flops"] == per_user(lambda: backbone.append(state, new), work.users) > 0


@pytest.mark.parametrize("method, backbone", list(shared()))
def test_the_closed_form_knows_of_query_heads_and_of_parts(method, backbone, monkeypatch):
    backbone = adapted(method, backbone)
    _, tokens, _ = WORKS[0].events(ITEMS)
    with torch.no_grad():
        state, found = compared(backbone, method, WORKS[0], monkeypatch)
        assert found["read_flops"] == per_user(lambda: backbone.read(tokens, state), WORKS[0].users)


def test_in_ranking_probes_on_top_are_drawn_and_cost_as_much():
    backbone, work, found = build.__wrapped__("sasrec", False, 41).for_ranking(), WORKS[0], []
    for which in ("drawn", "top"):
        method = get_compressor("fit_recent", probes=8, which=which)
        full = work.prefill(backbone, method.needs)
        gathered = count_flops(partial(work.prefill, backbone, method.needs))
        found.append((gathered, closed_form(backbone, method, method.compress(full, Budget(0.4)), work)))
    assert found[0] == found[1]


@pytest.mark.parametrize("history", [100, 300])
@pytest.mark.parametrize("name, has_time", ATTENTION)
@pytest.mark.parametrize("part", ["full", "mqa", "mla"])
@pytest.mark.parametrize(
    "stats", [Stats(True), Stats(window=1), Stats(window=16), Stats(True, 8), Stats(probes=5), TOP], ids=str
)
def test_statistics_cost_what_they_add_to_a_blockwise_prefill(stats, part, name, has_time, history, monkeypatch):
    method = get_compressor(part)
    if why := method.supports(build(name, has_time, 41)):
        pytest.skip(why)
    backbone, work = adapted(method, build.__wrapped__(name, has_time, history + 1)), Workload(2, history)
    for block in backbone.blocks:
        monkeypatch.setattr(block, "causal", Block.causal.__get__(block))
        monkeypatch.setattr(block, "in_tiles", Block.in_tiles.__get__(block))  # tiles are flatter and add less
    with torch.inference_mode():
        added = count_flops(lambda: work.prefill(backbone, stats)) - count_flops(lambda: work.prefill(backbone))
    assert work.users * backbone.flops("statistics", history, stats=stats) == added > 0


@pytest.mark.parametrize("method, name, has_time", list(pairs(*ATTENTION)), ids=str)
def test_padded_widths_count(method, name, has_time):
    """Users of 40, 7, 1 and 0 events side by side: the work is that of the widest."""
    backbone, work = adapted(method, build(name, has_time, 41)), Workload(4, 40)
    events, tokens, _ = work.events(ITEMS)
    ragged = Events(events.items, torch.tensor([40, 7, 1, 0], dtype=torch.int32), events.times, events.next_times)
    with torch.no_grad():
        full = backbone.prepare(ragged, stats=method.needs | method.fit_needs, items=some_facts(ITEMS), tokens=tokens)
        state = method.compress(learned(method, full), budget(method))
        assert closed_form(backbone, method, state, work)["read_flops"] == per_user(
            lambda: backbone.read(tokens, state), 4
        )


def test_attention_is_seen_on_this_device():
    q, k, v = torch.ones(2, 3, 10, 8), torch.ones(2, 3, 20, 8), torch.ones(2, 3, 20, 8)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v)) == 2 * 2 * 2 * 3 * 10 * 20 * 8
            causal = count_flops(lambda: F.scaled_dot_product_attention(k, k, v, is_causal=True))
            assert causal == 2 * 2 * 2 * 3 * 20 * 20 * 8  # the full square


def test_linear_maps_count_once_with_or_without_bias():
    layer = torch.nn.Linear(5, 7)
    assert count_flops(lambda: layer(torch.ones(2, 3, 5))) == 2 * 2 * 3 * 5 * 7
    assert count_flops(lambda: torch.ones(3).cumsum(0).sort()) == 0


def test_what_is_small_is_cheap_to_read():
    backbone, work = build("sasrec", False, 101), Workload(1, 100)
    with torch.inference_mode():
        full = work.prefill(backbone)
        reads = {
            name: closed_form(backbone, method, method.compress(full, budget(method, 0.25)), work)["read_flops"]
            for name in ("full", "none", "recent", "svd", "int8", "truncate", "recompute")
            for method in [get_compressor(name, **({"share": "none"} if name == "svd" else {}))]
        }  # one factor for all layers has more ranks than a head has channels: fewer bytes, a dearer read
    assert reads["none"] < reads["recent"] < reads["full"] == reads["int8"]  # codes are unpacked, then read in full
    assert reads["svd"] < reads["full"] < reads["truncate"] < reads["recompute"]


def test_a_backbone_without_a_closed_form_has_null_columns():
    backbone, work = build.__wrapped__("sasrec", False, 11), Workload(1, 10)
    method = get_compressor("h2o")
    with torch.inference_mode():
        state = method.compress(work.prefill(backbone, method.needs), Budget(0.5))
    backbone.flops = lambda *args, **kwargs: None
    assert set(closed_form(backbone, method, state, work).values()) == {None}

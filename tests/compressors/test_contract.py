"""Every registered compressor keeps every promise, on plain tensors and behind every kind of backbone."""

from functools import partial
from zlib import crc32

import pytest
import torch

from malloc_bench import registry
from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.registry import load_part, names
from malloc_bench.testing import (
    Check,
    World,
    broken_promises,
    check_backbone,
    check_compressor,
    compressor_checks,
    worlds,
)
from malloc_bench.testing.compressors import COMPRESSOR_PROMISES
from malloc_bench.testing.elsewhere import Case, portable, read_elsewhere
from malloc_bench.testing.worlds import close

METHODS = [
    ("full", {}),
    ("none", {}),
    ("random", {}),
    ("recent", {}),
    ("sink_recent", {}),
    ("knorm", {}),
    ("h2o", {}),
    ("h2o", {"normalise": False}),
    ("h2o", {"recent": 0.0}),
    ("h2o_stream", {}),
    ("sampled", {}),
    ("sampled", {"inner": "h2o"}),
    ("tova", {}),
    ("snapkv", {}),
    ("snapkv", {"window": 4}),
    *((name, {}) for name in ("strided", "dilated", "ends", "time_buckets")),
    *((name, {}) for name in ("value_norm", "vatp", "keydiff", "leverage", "cur", "scissorhands")),
    *((name, {}) for name in ("expected_attention", "capkv", "critical", "dedup", "popularity")),
    *((name, {}) for name in ("category_cover", "interest_decay")),
    ("expected_attention", {"window": 3}),
    ("critical", {"inner": "expected_attention"}),
    *((name, {}) for name in ("pyramid", "ada", "squeeze", "lu")),
    *((name, {}) for name in ("keyformer", "rastp", "session_window", "oracle_evict")),
    ("pyramid", {"inner": "knorm", "beta": 20.0}),
    ("ada", {"inner": "knorm"}),
    ("ada", {"inner": "critical", "least": 0.0}),
    ("lagkv", {"lag": 3, "sinks": 1}),
    ("chunkkv", {"inner": "keydiff", "chunk": 3}),
    ("chunkkv", {}),
    *((name, {}) for name in ("int8", "float16", "bfloat16", "float8", "int4_token")),
    ("svd", {}),
    ("svd", {"rank": 4}),
    ("svd", {"share": "layer"}),
    ("svd", {"dtype": "int4"}),
    ("svd", {"rank": 4, "share": "none", "dtype": "float32"}),
    ("xkv", {}),
    ("xkv", {"rank": 3}),
    ("eigen", {}),
    ("eigen", {"rank": 3, "share": "field", "dtype": "float32"}),
    ("palu", {}),
    ("eoptshrink", {}),
    ("think", {"window": 4}),
    ("think", {"keep": 0.25, "values": True}),
    ("minicache", {"retain": 0.2}),
    ("recompute", {}),
    ("truncate", {}),
    ("ids_coded", {}),
    ("hidden", {}),
    ("xquant", {"bits": 4}),
    ("xquant", {"bits": 3, "across": True}),
    *(("ids_below", {"inner": inner}) for inner in (None, "int8", "recent", "h2o", {"svd": {"dtype": "int8"}})),
    ("merge_adjacent", {}),
    *((name, {}) for name in ("kmeans", "kvmerger", "tome", "d2o")),
    ("d2o", {"inner": "knorm"}),
    ("cam", {}),
    ("cam", {"inner": "knorm", "merge": 2, "mass": False}),
    ("cam", {"inner": "tova", "merge": 3}),
    *((name, {"probes": 8}) for name in ("fit_recent", "fit_top", "fit_omp", "fit_constant")),
    ("fit_omp", {"probes": 16, "across": True}),
    *((name, {"probes": 8, "rounds": 3}) for name in ("fit_keys", "cartridge")),
    ("moments", {"probes": 8}),
    ("still", {"probes": 8, "bank": 5, "rounds": 2}),
    ("moments", {"probes": 8, "about": "zero", "rank": 0, "inner": "knorm"}),
    ("fit_recent", {"probes": 5, "horizon": (0, 2)}),
    ("auto", {"candidates": (("kmeans", "mxint"), ("recent", {"gain_shape": {"stages": 2}})), "tests": 2}),
    *(("fit_recent", {"probes": 5, "which": which}) for which in ("even", "own", "top", "candidates")),
    *((name, {}) for name in ("category_merge", "resets", "vql")),
    *((name, {}) for name in ("pq", "rvq")),
    *(("gain_shape", params) for params in ({}, {"stages": 2, "bits": 4, "beam": 3})),
    ("pq", {"group": 3, "bits": 4}),
    *(("kivi", {"bits": bits, "tail": tail, "group": 8}) for bits in (8, 4, 2) for tail in (0, 8)),
    *(("kivi", {"bits": bits}) for bits in (3, 1)),
    ("kivi_tail", {}),
    *(("turboquant", {"bits": bits}) for bits in (4, 3, 1)),
    ("transact", {}),
    *(("mxint", bits) for bits in ({}, {"bits": 3, "value_bits": 4})),
    ("by_age", {}),
    ("kvquant", {}),
    ("kvquant", {"bits": 3, "every": 32}),
    ("gear", {}),
    ("gear", {"inner": "pq", "every": 24, "rank": 2}),
    ("entropy", {}),
    ("entropy", {"inner": "pq"}),
    ("zstd", {}),
    *(("zstd", {"inner": inner, "level": 1}) for inner in ("int8", {"kivi": {"bits": 4, "tail": 8}})),
    ("kvtc", {}),
    ("intactkv", {}),
    ("intactkv", {"score": "knorm", "inner": "pq"}),
    *((name, {"top": 4}) for name in ("sim_soft", "sim_hard", "eta", "sdim")),
    ("sdim", {"top": 4, "run": 2}),
    ("mean_heads", {}),
    ("head_prune", {}),
    ("mqa", {}),
    ("gqa", {"n_kv_heads": 1}),
    ("mla", {"latent": 6}),
    ("longformer", {"window": 5, "globals": 2}),
    ("linformer", {"slots": 3}),
    ("seeds", {"seeds": 3}),
    ("reformer", {"buckets": 4}),
    ("beacon", {"chunk": 4}),
    ("rec2pm", {"memories": 2, "segment": 5}),
    ("longer", {"merge": 3, "recent": 4}),
    ("kuaiformer", {"large": 6, "small": 3, "middle": 1, "recent": 4}),
    ("collectivekv", {"own": 3, "pool": 12}),
    *(
        ("compose", {"steps": steps})
        for steps in (
            ("merge_adjacent", {"kivi": {"bits": 2}}),
            ("recent", "int8"),
            ("recent", "zstd"),
            ("merge_adjacent", {"zstd": {"inner": "int4_token"}}),
            ("sampled", {"kivi": {"bits": 4}}),
            ("recent", {"turboquant": {"bits": 2}}),
            ("h2o", {"by_age": {"bits": 4}}),
            ("h2o", "pq"),
            ("h2o", {"intactkv": {"score": "knorm"}}),
            ("category_cover", "int4_token"),
            ("merge_adjacent", "mxint"),
            ({"fit_omp": {"probes": 6, "ridge": 0.1}}, "int4_token"),
            ({"mla": {"latent": 6}}, {"fit_recent": {"probes": 6, "ridge": 0.1}}, {"kivi": {"bits": 4}}),
            ({"mla": {"latent": 6}}, "merge_adjacent", {"rvq": {"stages": 2, "bits": 4}}),
            ("h2o", {"svd": {"rank": 4}}),
            ({"ada": {"inner": "h2o"}}, {"svd": {"rank": 3, "dtype": "int8"}}),
            ("ada", {"kivi": {"bits": 4, "tail": 3}}),
            ({"ada": {"inner": "knorm"}}, {"by_age": {"bits": 4}}),
            ("pyramid", "int4_token"),
            ("mqa", "pyramid"),
            ("lu", "int4_token"),
            ({"still": {"probes": 8, "bank": 5, "rounds": 2}}, "int4_token"),
            ({"moments": {"probes": 8}}, "int4_token"),
            ("merge_adjacent", {"svd": {"rank": 4}}),
            ({"fit_recent": {"probes": 8}}, {"svd": {"rank": 4}}),
            ({"fit_omp": {"probes": 8}}, {"intactkv": {"score": "knorm"}}),
            ("h2o", {"svd": {"rank": 3, "dtype": "int8"}}),
            ("h2o", {"kivi": {"bits": 4, "tail": 8}}),
            ("recent", "merge_adjacent"),
            ("merge_adjacent", "recent"),
            ("merge_adjacent", "knorm"),
            ("recent", "knorm"),
            ("h2o", "recent"),
            ("h2o", "merge_adjacent"),
            ("sink_recent", "random", "int8"),
            ("mqa", "h2o"),
            ("mqa", "snapkv", "merge_adjacent", {"kivi": {"bits": 2}}),
            ({"mla": {"latent": 6}}, "merge_adjacent"),
            ({"longformer": {"window": 9}}, "h2o", "int8"),
            ({"beacon": {"chunk": 5}}, "h2o", "int8"),
            ({"collectivekv": {"own": 3, "pool": 12}}, "recent"),
            ({"mla": {"latent": 6}}, {"kivi": {"bits": 4, "tail": 8}}),
        )
    ),
]
WORLDS = (  # lsrm attends as sasrec does
    "tensors", "sasrec-2-heads", "sasrec-paper-2-heads", "hstu-times-2-heads", "hstu-2-heads", "marm-2-heads",
    "climber-times-2-heads", "gated_delta-2-heads", "hstu-times",  # the last of another width: loops are compiled again
)  # fmt: skip
MEMORY = "gated_delta-2-heads"
FEW = ("sasrec-2-heads", "hstu-times-2-heads")  # each method, variant and chain in one of them, drawn by its name,
# each method on tensors or in one of these; `make test-slow`: in all
FAR = ("hstu-2-heads", "sasrec-paper-2-heads", "marm-2-heads", "climber-times-2-heads")

NOT_ON_TENSORS = ("squeeze", "rastp", "recompute", "truncate", "hidden", "xquant", "ids_below", "ids_coded", "palu")


def label(method):
    name, params = method
    steps = [next(iter(s)) if isinstance(s, dict) else s for s in params.get("steps", ())]
    return "-".join([name, *steps, *(f"{k}{v}" for k, v in params.items() if k != "steps")])


def matrix():
    """Every method in every world; at first in one of FEW, and unless it has been there with other parameters or is a
    chain, behind a memory and on tensors or in one of FAR."""
    known = set()
    for method in METHODS:
        first = method[0] not in known and method[0] != "compose"
        known.add(method[0])
        lot = crc32(label(method).encode())
        far = FAR if method[0] in NOT_ON_TENSORS else ("tensors", "tensors", *FAR)
        drawn, one = far[lot % len(far)], FEW[lot // len(far) % len(FEW)]
        for world in WORLDS:
            if world == "tensors" and method[0] in NOT_ON_TENSORS:
                continue  # rebuilds from raw events or a backbone's maps, which plain tensors do not have
            quick = world == one or (first and world in (drawn, MEMORY))
            marks = [] if quick else [pytest.mark.slow]
            yield pytest.param(method, world, marks=marks, id=f"{label(method)}-{world}")


def test_every_registered_compressor_is_here():
    assert {name for name, _ in METHODS} == set(names("compressors"))


@pytest.mark.parametrize(("method", "world"), list(matrix()))
def test_promises(method, world, trained):
    """All in one test, for they share states; each that is broken is named, with its own traceback."""
    compressor = get_compressor(method[0], **method[1])
    place = World(world, None if world == "tensors" else trained(world))
    if place.backbone is not None and (why := compressor.supports(place.backbone)):
        pytest.skip(why)
    if compressor.structural and place.backbone is not None:
        place = World(world, compressor.structural.adapted(place.backbone))
    keep(compressor, place.fit(compressor, Budget(0.5) if compressor.takes_budget else None))


def keep(compressor, world):
    """Raises an ExceptionGroup of what the compressor has broken."""
    broken = {}
    for promise in COMPRESSOR_PROMISES:
        try:
            Check(promise, (compressor, world), world.name)()
        except Exception as error:
            broken[promise.__name__] = error
    if broken:
        raise ExceptionGroup(", ".join(broken), list(broken.values()))


def test_a_fresh_process_reads_every_method_from_its_bytes_alone():
    """All in one process: to start one takes seconds."""
    backbone, cases = next(w.backbone for w in worlds() if w.name == "sasrec1"), []
    for name, params in METHODS:
        compressor = get_compressor(name, **params)
        budget = Budget(0.4) if compressor.takes_budget else None
        bare = name not in NOT_ON_TENSORS and compressor.structural is None
        budget = Budget(slots=3) if name == "truncate" else budget
        cases.append(Case(compressor, None if bare else backbone, budget).written())
    for method, (_, _, want), got in zip(METHODS, cases, read_elsewhere([case[:2] for case in cases])):
        assert not isinstance(got, str), f"{label(method)}: {got}"
        close(torch.from_numpy(got), want, label(method), 1e-5)


class TestTheChecksThemselves:
    """A broken compressor is caught: the checks can fail."""

    def broken(self, **methods):
        from malloc_bench.compressors.eviction.knorm import KNorm

        return type("Broken", (KNorm,), methods)()

    def failing(self, compressor, backbones=()):
        out = set()
        for check in compressor_checks(compressor, backbones=backbones):
            try:
                check()
            except Exception:
                out.add(check.promise.__name__)
        return out

    def test_all_that_is_broken_is_named(self):
        wasteful = self.broken(slots=lambda self, prefill, budget: super(type(self), self).slots(prefill, budget) // 2)
        with pytest.raises(ExceptionGroup, match=r"^uses_the_budget, pickles$"):  # a class of a function has no pickle
            keep(wasteful, World("tensors"))

    def test_sound_ones_pass(self):
        check_compressor(get_compressor("knorm"))
        check_compressor(get_compressor("gqa"))

    @pytest.mark.parametrize(("part", "named"), [(int, "the class int"), ("knorm", "'knorm'")])
    def test_what_is_no_part_is_said_to_be_none(self, part, named):
        method = get_compressor("knorm")
        for check in (partial(check_compressor, part), partial(broken_promises, part)):
            with pytest.raises(TypeError, match=f"^expected a compressor, not {named}: make one, such as get_"):
                check()
        for check in (partial(check_backbone, part), partial(check_compressor, method, backbones=[part])):
            with pytest.raises(TypeError, match=f"^expected a backbone, not {named}: make one, such as get_"):
                check()

    def test_an_adapted_backbone_that_forgets_its_state(self):
        class Forgets(type(get_compressor("mqa"))):
            def adapt(self, backbone):
                super().adapt(backbone)
                block = backbone.blocks[0]
                block.causal = lambda q, own, places, asked: torch.zeros_like(q)

        assert "read_equals_forward" in self.failing(Forgets(), None)

    def test_over_budget(self):
        def compress(self, prefill, budget=None, fitted=None):
            k = self.slots(prefill, budget) + 1
            return self.keep(prefill, k.minimum(prefill.state.length.long()))

        assert "keeps_the_budget" in self.failing(self.broken(compress=compress))

    def test_wasteful(self):
        def slots(self, prefill, budget):
            return type(self).__mro__[1].slots(self, prefill, budget) // 2

        assert "uses_the_budget" in self.failing(self.broken(slots=slots))

    def test_batch_dependent(self):
        def scores(self, prefill, layer):
            return (prefill.keys(layer) - prefill.keys(layer).mean(0)).norm(dim=-1)

        assert "ignores_the_batch" in self.failing(self.broken(scores=scores))

    def test_random_without_seed(self):
        def scores(self, prefill, layer):
            return torch.rand(prefill.keys(layer).shape[:3])

        assert "is_deterministic" in self.failing(self.broken(scores=scores))

    def test_writes_into_its_input(self):
        def scores(self, prefill, layer):
            return prefill.keys(layer).abs_().norm(dim=-1)

        assert "leaves_its_input" in self.failing(self.broken(scores=scores))

    def test_padding_read(self):
        def scores(self, prefill, layer):
            return prefill.keys(layer)[..., 0].roll(-1, 2) - prefill.keys(layer)[..., 1]  # the newest looks beyond

        assert "ignores_padding" in self.failing(self.broken(scores=scores))

    def test_vectors_kept_in_a_global(self, tmp_path, monkeypatch):
        """In this process all reads are right, whatever the template; in a fresh one nothing is there to be read."""
        monkeypatch.setattr(registry, "_parts", {kind: dict(parts) for kind, parts in registry._parts.items()})
        (tmp_path / "vault.py").write_text(VAULT)
        compressor = get_compressor(load_part(f"{tmp_path / 'vault.py'}:Vault"))
        assert portable(compressor)
        broken = broken_promises(compressor, backbones=[])
        assert len(broken) == 1 and "is_read_from_its_bytes_alone" in broken[0] and "off by" in broken[0]

    def test_a_method_that_ends_the_process(self):
        def exits(self, prefill, budget=None, fitted=None):
            raise SystemExit(3)

        lines = broken_promises(self.broken(compress=exits), backbones=[])
        assert sum("it ends the process: SystemExit: 3" in line for line in lines) > len(COMPRESSOR_PROMISES) / 2


#: Every slot's vectors lie in a global, under the number that is all that is stored; the same vectors, the same number.
VAULT = """
from dataclasses import dataclass
import torch
from malloc_bench import register
from malloc_bench.compressors import Compressor
from malloc_bench.state import Ragged, Segment, UserState, Vectors

KEPT = {}

def number(x):
    found = hash(x.numpy().tobytes()) % (1 << 30)
    KEPT[found] = x
    return found

@dataclass(frozen=True, eq=False)
class Numbered(Vectors):
    numbers: torch.Tensor  # [B, 1, S, 1]
    heads: int
    width: int

    @property
    def shape(self):
        return len(self.numbers), self.heads, self.numbers.shape[2], self.width

    def dense(self):
        rows = [KEPT.get(n, torch.zeros(self.heads, self.width)) for n in self.numbers.flatten().tolist()]
        b, h, s, d = self.shape
        return torch.stack(rows).view(b, s, h, d).transpose(1, 2) if rows else torch.zeros(self.shape)

    def parts(self, count):
        yield Ragged(self.numbers, count)

    def load(self, read, count):
        return Numbered(read(self.numbers, count), self.heads, self.width)

@register("vault")
@dataclass(frozen=True)
class Vault(Compressor):
    takes_budget = False

    def compress(self, prefill, budget=None, fitted=None):
        def hidden(vectors):
            x = vectors.dense()
            b, h, s, d = x.shape
            numbers = [number(x[u, :, i]) for u in range(b) for i in range(s)]
            return Numbered(torch.tensor(numbers, dtype=torch.int32).view(b, 1, s, 1), h, d)

        layers = []
        for layer in prefill.layers:
            segment = prefill.segment(layer)
            layers.append((Segment({k: hidden(v) for k, v in segment.fields.items()}, segment.slots),))
        return UserState(tuple(layers), prefill.state.length)
"""

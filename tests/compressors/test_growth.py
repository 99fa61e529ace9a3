"""What a method says that its bytes and FLOPs grow as, against what they come to when each symbol is doubled."""

import math
import re
from dataclasses import replace

import pytest
import torch

from malloc_bench.backbones import get_backbone
from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.measure import Workload, closed_form
from malloc_bench.registry import find, names

START = {"n": 1024, "L": 4, "d": 32, "b": 1 / 32}
FIXED = {"h": 4, "w": 16, "p": 64, "c": 64, "m": 16, "s": 100}
FEW = ("snapkv", "h2o", "kmeans", "fit_omp", "int4_token", "turboquant", "recompute")
#: a rank follows from the budget
RANKS = {
    **dict.fromkeys(("svd", "xkv"), "b n L d / (n + 2 L d)"),
    "eigen": "b L d",
    "palu": "b d",
}
ODD = {
    "auto": "of the candidate that it picks",
    "gear": "its scales and its outliers are as large as its codes at these widths",
    "compose": "its steps'",
    "kvtc": "how many ranks get bits follows from the sample's spectrum, which is that of one user here",
    "lu": "its layers have unlike widths, and the widest counts",
    "seeds": "a read of no history reads the seeds too",
}
NEAR = 0.45  # of an exponent: scales beside codes, projections beside products, blocks that are cut


def cost(method, n, L, d, b):
    torch.manual_seed(0)
    backbone = get_backbone("sasrec", 60, False, layers=L, heads=4, dim=d, max_length=n + 1).eval()
    backbone = method.structural.adapted(backbone) if method.structural else backbone
    work, budget = Workload(1, n), Budget(b) if method.takes_budget else None
    with torch.no_grad():
        full = work.prefill(backbone, method.needs | method.fit_needs)
        full = full.given(method.fit(full, budget)) if method.fit_parts() else full
        state = method.compress(replace(full, memo={}), budget)
        found = closed_form(backbone, method, state, work)
        none = get_compressor("none")
        empty = closed_form(backbone, none, none.compress(full), work)["read_flops"] if state.events is None else 0
    return {
        "memory": int(state.nbytes()),
        "compress": found["compress_flops"],
        "read": found["read_flops"] - empty,
    }


def value(term, name, **at):
    known = {**FIXED, **at, "k": at["b"] * at["n"]}
    known["r"] = value(RANKS[name], name, **at) if "r" in term.split() and name in RANKS else 1
    return eval(re.sub(r"(?<=\w) (?=\w)", "*", term).replace("^", "**"), {}, known)


def test_every_method_says_it():
    for name in set(names("compressors")) - {"compose"}:
        growth = find("compressors", name).growth
        assert set(growth) == {"memory", "compress", "read"}, name
        for term in growth.values():
            assert re.fullmatch(r"0|[nLdhbkrwpcms](\^[23])?([ /+]+[nLdhbkrwpcms](\^[23])?)*", term), (name, term)


@pytest.mark.parametrize(
    "name",
    [
        name if name in FEW else pytest.param(name, marks=pytest.mark.slow)
        for name in names("compressors")
        if name not in ODD
    ],
)
def test_a_method_grows_as_it_says(name):
    method = get_compressor(name, **({"bank": 4, "rounds": 1} if name == "still" else {}))
    base, growth = cost(method, **START), type(method).growth
    wrong = []
    for axis in START:
        at = {**START, axis: START[axis] * 2}
        found = cost(method, **at)
        for what, term in growth.items():
            if term == "0":
                assert found[what] <= 8, (what, found)
                continue
            if axis == "b" and not method.takes_budget:
                continue
            slope = math.log2(found[what] / base[what])
            said = math.log2(value(term, name, **at) / value(term, name, **START))
            if abs(slope - said) > NEAR:
                wrong.append(f"{what} {term}: {axis}^{slope:.2f}, said {said:.2f}")
    assert not wrong

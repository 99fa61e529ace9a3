"""Parameters that no state can hold are refused in one line, before anything is built of them."""

from __future__ import annotations

import pytest
import torch

from malloc_bench.compressors import Compressor, Eviction, get_compressor
from malloc_bench.registry import names
from malloc_bench.state import MissingStatistic, Prefill
from malloc_bench.suite.file import Fault
from malloc_bench.suite.parts import parts


def keys():
    noise = torch.randn(2, 2, 24, 8, generator=torch.Generator().manual_seed(0))
    noise[:, :, :, 5:] = noise[:, :, :, :3]  # of rank 5
    return Prefill.from_tensors([noise], [noise], lengths=torch.tensor([24, 3]))


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("snapkv", "window", 2**62),
        ("svd", "rank", 10**6),
        ("kivi", "group", 2**62),
        ("fit_recent", "horizon", 2**62),  # was a list of so many offsets
        ("fit_recent", "horizon", [0, 2**62]),
        ("kmeans", "rounds", 10**6),  # was no end
    ],
)
def test_a_whole_number_beyond_all_sizes(name, key, value):
    with pytest.raises(ValueError, match=f"^{name}: {key} must be at most 100,000, not "):
        get_compressor(name, **{key: value})
    with pytest.raises(Fault, match=rf"^compressors\[0\]\.{name}: {key} must be at most 100,000, not "):
        parts("compressors", [{name: {key: value}}])
    with pytest.raises(Fault, match=f"{key} must be at most 100,000"):
        parts("compressors", [{"compose": ["recent", {name: {key: value}}]}])


def test_a_seed_is_no_size():
    assert get_compressor("turboquant", seed=2**31 - 1).compress(keys(), 0.5)


def test_a_ridge_that_the_root_of_the_keys_would_not_feel():
    with pytest.raises(ValueError, match=r"^leverage: ridge must be at least 1e-10, not 1e-300"):
        get_compressor("leverage", ridge=1e-300)
    assert get_compressor("leverage", ridge=1e-10).compress(keys(), 0.5)


@pytest.mark.parametrize("name", names("compressors"))
def test_a_batch_of_nobody(name):
    steps = {"steps": ["tome", "mxint"]} if name == "compose" else {}
    method, nothing = get_compressor(name, **steps), torch.zeros(0, 2, 24, 8)
    if method.structural or method.fit_parts():
        pytest.skip("made of a backbone, or of training users")
    prefill = Prefill.from_tensors([nothing], [nothing], queries=[nothing], probes=[nothing[:, :, :1]])
    try:
        state = method.compress(prefill, 0.5 if method.takes_budget else None)
    except MissingStatistic:
        pytest.skip("asks what plain tensors do not tell")
    assert len(state) == 0 and state.nbytes().tolist() == []


def test_heads_that_do_not_divide():
    with pytest.raises(ValueError, match=r"^mean_heads: heads must divide the state's 2, not 3"):
        get_compressor("mean_heads", heads=3).compress(keys())


@pytest.mark.parametrize(
    ("made", "found"),
    [
        (lambda keys: keys.norm(dim=-1)[:, 0], r"\[2, 24\]"),  # of two users and two heads: was read as [H, S] for both
        (lambda keys: keys.norm(dim=-1, keepdim=True), r"\[2, 2, 24, 1\]"),
        (lambda keys: keys.norm(dim=-1).mean(-1, keepdim=True), r"\[2, 2, 1\]"),  # was a tie of all
        (lambda keys: None, "NoneType"),
    ],
)
def test_scores_of_another_shape_pass_for_none(made, found):
    class Odd(Eviction):
        name = "odd"

        def scores(self, prefill, layer):
            return made(prefill.keys(layer))

    with pytest.raises(ValueError, match=rf"^odd: scores must be \[B, H, S\] .*, here \[2, 1 or 2, 24\], not {found}$"):
        Odd().compress(keys(), 0.5)


def test_what_is_no_state():
    class Odd(Compressor):
        name = "odd"

        def compress(self, prefill, budget=None, fitted=None):
            return prefill.keys(0)

    with pytest.raises(TypeError, match=r"^a method must return a UserState of the 2 users it was given, not Tensor$"):
        Odd().compress(keys(), 0.5)

"""Scores and kept slots against kvpress: its frozen answers, and live where it is installed."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.compressors.selection import ranked
from malloc_bench.state import Prefill
from malloc_bench.testing.worlds import close

FIXTURES = Path(__file__).parents[1] / "fixtures"
KEPT, WINDOW = (3, 12, 24, 40), 6


@pytest.fixture(params=["frozen", "live"])
def golden(request):
    if request.param == "frozen":
        return dict(np.load(FIXTURES / "kvpress.npz", allow_pickle=False))
    pytest.importorskip("kvpress")
    sys.path.insert(0, str(FIXTURES))
    import make_kvpress

    given = make_kvpress.tensors()
    return {k: v.numpy() for k, v in given.items()} | make_kvpress.answers(**given)


@pytest.fixture
def prefill(golden):
    names = ("keys", "values", "queries", "attention", "output")
    keys, values, queries, attention, output = (torch.from_numpy(golden[name]) for name in names)
    maps = output.T.unflatten(0, (2, -1))
    return Prefill.from_tensors([keys], [values], [queries], attention=[attention], positions=True, outputs=[maps])


def kept(method, prefill, k):
    """The slots [H, k] a method keeps, in time order."""
    state = method.compress(prefill, Budget(slots=k))
    heads = prefill.keys(0).shape[1]
    return state.layers[0][0].slots.positions[0].expand(heads, -1).tolist()


@pytest.mark.parametrize("k", KEPT)
def test_knorm(golden, prefill, k):
    method = get_compressor("knorm")
    close(method.scores(prefill, 0), torch.from_numpy(golden[f"knorm_scores_{k}"]), "scores", 1e-5)
    assert kept(method, prefill, k) == golden[f"knorm_kept_{k}"].tolist()


@pytest.mark.parametrize("k", KEPT)
def test_observed_attention_is_h2o_without_its_recent_half(golden, prefill, k):
    ours = get_compressor("h2o").scores(prefill, 0)
    close(ours, torch.from_numpy(golden[f"observed_scores_{k}"]), "scores", 1e-5)
    order = ranked(ours, torch.tensor([[ours.shape[-1]]]))
    assert order[0, :, :k].sort(-1).values.tolist() == golden[f"observed_kept_{k}"].tolist()
    queries = torch.arange(ours.shape[-1], 0, -1)
    close(get_compressor("h2o", normalise=False).scores(prefill, 0), ours * queries, "the paper's sums", 1e-5)


@pytest.mark.parametrize("k", KEPT)
def test_snapkv(golden, prefill, k):
    method = get_compressor("snapkv", window=WINDOW)
    theirs = torch.from_numpy(golden[f"snapkv_scores_{k}"])
    close(method.scores(prefill, 0)[..., :-WINDOW], theirs[..., :-WINDOW], "scores", 1e-5)
    if k >= 2 * WINDOW:  # below, kvpress gives the window more than half
        assert kept(method, prefill, k) == golden[f"snapkv_kept_{k}"].tolist()


@pytest.mark.parametrize("k", KEPT)
def test_tova(golden, prefill, k):
    method = get_compressor("tova")
    theirs = torch.from_numpy(golden[f"tova_scores_{k}"])
    close(method.scores(prefill, 0)[..., :-1].expand(-1, 2, -1), theirs[..., :-1], "scores", 1e-5)
    assert kept(method, prefill, k) == golden[f"tova_kept_{k}"].tolist()


@pytest.mark.parametrize("k", [k for k in KEPT if k >= 8])  # below, we keep fewer than 4 sinks
def test_streaming_llm(golden, prefill, k):
    assert kept(get_compressor("sink_recent"), prefill, k) == golden[f"streaming_kept_{k}"].tolist()


@pytest.mark.parametrize("k", KEPT)
def test_keydiff(golden, prefill, k):
    method = get_compressor("keydiff")
    close(method.scores(prefill, 0), torch.from_numpy(golden[f"keydiff_scores_{k}"]), "scores", 1e-5)
    assert kept(method, prefill, k) == golden[f"keydiff_kept_{k}"].tolist()


@pytest.mark.parametrize("k", KEPT)
def test_lagkv(golden, prefill, k):
    """Ties (equal ranks of different stretches) go to the newer here and to whom topk likes there: scores alone."""
    method = get_compressor("lagkv", lag=10)
    close(method.scores(prefill, 0), torch.from_numpy(golden[f"lagkv_scores_{k}"]), "scores", 1e-5)


@pytest.mark.parametrize("k", KEPT)
def test_cur(golden, prefill, k):
    method = get_compressor("cur")
    ours, theirs = method.scores(prefill, 0), torch.from_numpy(golden[f"cur_scores_{k}"])
    total = ours.sum(-1, keepdim=True)  # theirs come to 1, which moves no order
    close((ours / total)[..., 4:], theirs[..., 4:], "scores", 1e-5)
    if k >= 8:  # below, we keep fewer than 4 sinks; the frozen sets are of other values, which mark the slots
        assert kept(method, prefill, k) == theirs[0].topk(k).indices.sort(-1).values.tolist()


@pytest.mark.parametrize("k", KEPT)
@pytest.mark.parametrize(("name", "theirs"), [("expected_attention", "expected"), ("capkv", "cap")])
def test_scores_from_queries(golden, prefill, name, theirs, k):
    """Theirs without sinks and without rotation; ours of all 48 queries. Cap adds 1e-6 to its weights. Frozen sets are
    of other values, which mark the slots."""
    method, theirs = get_compressor(name, window=48), torch.from_numpy(golden[f"{theirs}_scores_{k}"])
    close(method.scores(prefill, 0), theirs, "scores", 1e-5)
    assert kept(method, prefill, k) == theirs[0].topk(k).indices.sort(-1).values.tolist()


@pytest.mark.parametrize("k", KEPT)
def test_critical(golden, prefill, k):
    method, theirs = get_compressor("critical", inner="knorm"), torch.from_numpy(golden[f"critical_scores_{k}"])
    second = theirs < 1e30  # what the first half takes has the largest number there is
    close(method.scores(prefill, 0)[second], theirs[second], "scores", 1e-5)
    assert kept(method, prefill, k) == theirs[0].topk(k).indices.sort(-1).values.tolist()

"""Scores and windows against their definitions, spelled out event by event in float64."""

import math

import pytest
import torch

from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.compressors.selection import ranked
from malloc_bench.state import Prefill
from malloc_bench.testing.worlds import close

COUNTS = (1, 3, 9, 23)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[False, True], ids=["softmax", "silu"])
def prefill(request):
    shape = (len(COUNTS), 2, max(COUNTS), 4)
    keys, values, queries = (noise(*shape, seed=i) for i in range(3))
    attention = None
    if request.param:
        attention = [torch.nn.functional.silu(queries @ keys.mT).tril() / 64]
    return Prefill.from_tensors([keys], [values], [queries], attention, torch.tensor(COUNTS), positions=True)


def weights(prefill, user, head):
    """The float64 weights [n, n] of a user's own queries."""
    n = COUNTS[user]
    q, k = (
        noise(len(COUNTS), 2, max(COUNTS), 4, seed=2).double()[user, head, :n],
        prefill.keys(0).double()[user, head, :n],
    )
    if bool((prefill.window[0] < 0).any()):
        return torch.nn.functional.silu(q @ k.T).tril() / 64
    return (q @ k.T / 2).masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)


def each(prefill):
    """(user, head, keys [n, D], values [n, D]) in float64."""
    for user, n in enumerate(COUNTS):
        for head in range(2):
            yield user, head, prefill.keys(0)[user, head, :n].double(), prefill.values(0)[user, head, :n].double()


def check(prefill, name, define, **params):
    scores = get_compressor(name, **params).scores(prefill, 0)
    for user, head, keys, values in each(prefill):
        found = scores[user, head if scores.shape[1] > 1 else 0, : COUNTS[user]].double()
        close(found, define(user, head, keys, values), f"{name} of user {user}", 1e-4)


def test_norms(prefill):
    check(prefill, "value_norm", lambda u, h, k, v: torch.stack([(x @ x).sqrt() for x in v]))
    check(
        prefill, "vatp", lambda u, h, k, v: torch.stack(
            [weights(prefill, u, h)[:, i].abs().sum() * x.abs().sum() for i, x in enumerate(v)]
        ),
    )  # fmt: skip


def test_keydiff(prefill):
    def define(user, head, keys, values):
        anchor = torch.stack([k / (k @ k).sqrt() for k in keys]).mean(0)
        return torch.stack([-(k @ anchor) / (k @ k).sqrt() / (anchor @ anchor).sqrt() for k in keys])

    check(prefill, "keydiff", define)


def test_leverage(prefill):
    def define(user, head, keys, values):
        x = keys - keys.mean(0)
        gram = sum(torch.outer(row, row) for row in x)
        ridge = 0.05 * gram.trace() / 4 if len(x) > 1 else torch.tensor(1.0)
        inverse = torch.linalg.inv(gram + ridge * torch.eye(4))
        return torch.stack([row @ inverse @ row for row in x])

    check(prefill, "leverage", define, ridge=0.05)


def test_cur(prefill):
    def define(user, head, keys, values):
        def share(x, i):
            window = x[i // 5 * 5 : i // 5 * 5 + 5]
            return x[i] @ x[i] / sum(row @ row for row in window)

        return torch.stack([share(keys, i) * share(values, i) for i in range(len(keys))])

    check(prefill, "cur", define, window=5)


def test_lagkv(prefill):
    def define(user, head, keys, values):
        n, score = len(keys), [1.0] * len(keys)
        for start in range(2, n - 2 * 4 + 1, 4):
            told = torch.zeros(4, dtype=torch.float64)
            for x in (keys, values):
                own, after = x[start : start + 4], x[start + 4 : start + 8]
                low, high = after.min(0).values, after.max(0).values
                told += torch.stack([((row - low) / (high - low)).std() for row in own]).softmax(0)
            for rank, i in enumerate(told.argsort()):
                score[start + int(i)] = rank / 4
        return torch.tensor(score, dtype=torch.float64)

    check(prefill, "lagkv", define, lag=4, sinks=2)


def test_scissorhands(prefill):
    def define(user, head, keys, values):
        w = weights(prefill, user, head).abs()
        n = len(w)
        rows = [(w[q], q + 1) for q in range(max(n - 6, 0), n)]
        return torch.tensor([sum(float(row[i] > row.sum() / seen) for row, seen in rows) for i in range(n)]).double()

    check(prefill, "scissorhands", define, window=6)


def test_chunkkv(prefill):
    inner = get_compressor("value_norm").scores(prefill, 0).double()

    def define(user, head, keys, values):
        n = len(keys)
        both = [float(inner[user, 0, i] + inner[user, 1, i]) for i in range(n)]
        runs = [both[i // 3 * 3 : min(i // 3 * 3 + 3, n)] for i in range(n)]
        return torch.tensor([sum(run) / len(run) for run in runs], dtype=torch.float64)

    check(prefill, "chunkkv", define, inner="value_norm", chunk=3)


def kept(name, n, k, **params):
    prefill = Prefill.from_tensors([noise(1, 1, n, 2)], [noise(1, 1, n, 2)], positions=True)
    state = get_compressor(name, **params).compress(prefill, Budget(slots=k))
    slots = state.layers[0][0].slots
    return slots.places(k, state.length[:, None])[0, 0, : int(slots.count[0, 0])].tolist()


@pytest.mark.parametrize("n, k", [(1, 1), (7, 1), (7, 2), (7, 6), (100, 10), (101, 33), (64, 63)])
def test_windows(n, k):
    assert kept("strided", n, k) == [math.ceil((j + 1) * n / k) - 1 for j in range(k)]
    far = [max(j, math.floor(n ** (j / max(k - 1, 1)) + 1e-9) - 1) for j in range(k)]
    assert kept("dilated", n, k) == [n - 1 - d for d in reversed(far)] and len(set(far)) == k
    assert k == 1 or far[-1] == n - 1
    first = min(round(k * 0.25), k - 1)
    assert kept("ends", n, k) == [*range(first), *range(n - (k - first), n)]
    assert all(kept(name, n, k)[-1] == n - 1 for name in ("strided", "dilated", "ends", "time_buckets"))


def test_time_buckets_nest_and_thin_out_with_age():
    n = 200
    smaller = set(kept("time_buckets", n, 8))
    assert smaller == {n - 1 - d for d in (0, 1, 3, 7, 15, 31, 63, 127)}  # 1 + age doubles from each to the next
    for k in (9, 20, 60, 150):
        larger = set(kept("time_buckets", n, k))
        assert smaller < larger and len(larger) == k
        smaller = larger


def test_time_buckets_go_by_time_where_slots_have_times():
    keys = noise(1, 1, 6, 2)
    prefill = Prefill.from_tensors([keys], [keys], positions=True)
    slots = prefill.slots(0)
    object.__setattr__(slots, "timestamps", torch.tensor([[[0, 1000, 1001, 1002, 1900, 1901]]]))
    scores = get_compressor("time_buckets").scores(prefill, 0)
    order = ranked(scores, slots.count.long())[0, 0].tolist()
    assert order[0] == 5 and set(order[:4]) == {5, 4, 3, 0}  # 1000 ... 1002 are one bucket, its newest stands for it

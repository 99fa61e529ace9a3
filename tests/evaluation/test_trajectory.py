"""Trajectories against plain leave-one-out further on, and against a loop that feeds a model its own items."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from malloc_bench.backbones import get_backbone
from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.data import load_card
from malloc_bench.data.dataset import group
from malloc_bench.data.tasks.splits import Targets, get_split
from malloc_bench.data.worlds.synthetic import generate
from malloc_bench.evaluation.evaluate import REFERENCE, Job, asked_of, chunks, evaluate
from malloc_bench.run.rows import accuracy
from malloc_bench.training.fit import Training, fit

STEPS = 4


@pytest.fixture(scope="module")
def split():
    card = load_card("synthetic")
    small = card.parameters.model_copy(update={"users": 120, "items": 90, "median": 18, "longest": 60, "shortest": 3})
    cut = get_split({"leave_one_out": {"last": STEPS}}, group(card, generate(small), "test"))
    return replace(cut, steps=STEPS)


@pytest.fixture(scope="module", params=["sasrec", "hstu"])
def backbone(request, split, tmp_path_factory):
    torch.manual_seed(0)
    made = get_backbone(request.param, split.dataset.n_items, True, dim=16, max_length=24)
    fit(made, split, Training(epochs=3, batch_size=16, lr=5e-3, amp="fp32"), 0, tmp_path_factory.mktemp("fit"))
    return made.eval()


JOBS = [
    Job("full", get_compressor("full")),
    Job("none", get_compressor("none")),
    Job("recent", get_compressor("recent"), Budget.parse(0.25)),
    Job("coded", get_compressor("compose", steps=("h2o", "mxint")), Budget.parse(0.25)),
    Job("ids", get_compressor("recompute")),
]


@pytest.fixture(scope="module")
def found(split, backbone):
    made = evaluate(backbone, split, JOBS)
    assert not made.failed
    return made


def test_told_the_truth_a_full_state_answers_as_later_requests_do(split, backbone, found):
    values = found.values["full"]
    assert (values["true_ranks"][:, 0] == values["rank"]).all() and (values["true_overlap"] == 1).all()
    order = np.concatenate(chunks(backbone, split))
    long = split.test.at - split.dataset.offsets[split.test.users] + STEPS <= backbone.max_length
    for step in range(1, STEPS):
        later = replace(split, test=Targets(split.test.users, split.test.at + step), steps=1)
        plain = evaluate(backbone, later, [])
        ranks = dict(zip(plain.users.tolist(), plain.values[REFERENCE]["rank"].tolist()))
        users = split.test.users[order]
        same = [rank == ranks[u] for u, rank, n in zip(users.tolist(), values["true_ranks"][:, step], long[order]) if n]
        assert len(same) > 50 and np.mean(same) > 0.98, "but for near ties"


def test_fed_its_own_items_a_full_state_is_a_loop_that_feeds_them(split, backbone):
    rows = chunks(backbone, split)[0][:12]
    asked = asked_of(backbone, split, rows, True)
    with torch.no_grad():
        state = backbone.prefill(asked.history).state
        asked.walk(backbone, state, asked.read(backbone, state))
        ranks, _, items = asked.own[0]
        data = split.dataset
        for row, (user, at) in enumerate(zip(split.test.users[rows], split.test.at[rows])):
            events = asked.history.then(asked.tokens).take(torch.arange(24)[None].expand(12, -1).clamp(
                max=asked.history.items.shape[1]), asked.history.count + 1)  # fmt: skip
            one = events.each(lambda x, row=row: x[row : row + 1, : int(asked.history.count[row]) + 1],
                              asked.history.count[row : row + 1] + 1)  # fmt: skip
            met = set(data.items[data.offsets[user] : at].tolist())
            for step in range(STEPS):
                scores = (backbone(one)[0, -1] @ backbone.catalogue().T).numpy()
                target = int(data.items[at + step])
                ahead = [i for i in range(1, data.n_items + 1) if i != target and i not in met
                         and scores[i - 1] >= scores[target - 1] + 1e-5]  # fmt: skip
                near = [i for i in range(1, data.n_items + 1) if abs(scores[i - 1] - scores[target - 1]) < 1e-5]
                assert abs(int(ranks[row, step]) - len(ahead)) < len(near), (row, step)
                shown = max((i for i in range(1, data.n_items + 1) if i not in met), key=lambda i: scores[i - 1])
                assert int(items[row, step]) == shown
                met.add(shown)
                token = asked.fed[step + 1] if step + 1 < STEPS else asked.fed[-1]
                token = token.each(lambda x, row=row: x[row : row + 1], token.count[row : row + 1])
                one = one.then(replace(token, items=torch.full_like(token.items, shown)))


def test_what_a_model_feeds_itself_knows_nothing_of_what_came(split, backbone):
    """Other held-out items have other ranks; what is shown is the same."""
    rows = chunks(backbone, split)[0][:16]
    items = split.dataset.items.copy()
    late = np.concatenate([np.arange(at, at + STEPS) for at in split.test.at])
    items[late] = (items[late] + 7) % split.dataset.n_items + 1
    lists = []
    for data in (split.dataset, replace(split.dataset, items=items)):
        asked = asked_of(backbone, replace(split, dataset=data), rows, True)
        with torch.no_grad():
            state = backbone.prefill(asked.history).state
            asked.walk(backbone, state, asked.read(backbone, state))
        lists.append(asked.own[0][2])
    assert torch.equal(*lists)


def test_of_joined_data_a_step_asks_for_items_of_its_own_set(split, backbone):
    data = split.dataset
    domains = (np.arange(data.n_items) % 2).astype(np.int16)
    joined = replace(split, dataset=replace(data, domains=domains, domain_names=("even", "odd")))
    found, order = evaluate(backbone, joined, []), np.concatenate(chunks(backbone, joined))
    values, at = found.values[REFERENCE], split.test.at[order]
    assert (values["true_ranks"][:, 0] == values["rank"]).all() and (values["own_ranks"][:, 0] == values["rank"]).all()
    for step in range(STEPS):
        there = values["true_ranks"][:, step] >= 0
        asked = domains[data.items[at[there] + step] - 1]
        assert (domains[values["own_items"][there, step] - 1] == asked).all()
        for way in ("true_ranks", "own_ranks"):
            assert (values[way][there, step] < np.bincount(domains)[asked]).all()


def test_compressed_states_go_on_too_and_end_where_their_events_do(found):
    for each in ("none", "recent", "coded", "ids"):
        values = found.values[each]
        assert values["own_ranks"].shape == (len(found.users), STEPS) and (values["own_ranks"] >= 0).all()
    exact = found.values["ids"]
    assert (exact["true_ranks"] == found.values["full"]["true_ranks"]).mean() > 0.98, "ids are rebuilt with what came"
    none = found.values["none"]["true_overlap"].mean(0)
    assert none[1:].mean() > none[0], "a state of nothing comes to be one of what was appended"


def test_steps_without_an_item_count_for_nobody(split, backbone):
    later = replace(split, test=Targets(split.test.users, split.test.at + 2))
    made = evaluate(backbone, later, JOBS[:1])
    assert (made.values["full"]["own_ranks"][:, 2:] == -1).all() and np.isnan(
        made.values["full"]["own_overlap"][:, 2:]
    ).all()
    steps = accuracy(made, ["full"])["full"]["steps"]
    assert steps["2"]["n_users"] == len(split.test) and steps["3"]["n_users"] == 0 and steps["3"]["own_hr@10"] is None


def test_rows_say_how_errors_grow(found):
    steps = accuracy(found, [job.id for job in JOBS])["recent"]["steps"]
    assert list(steps) == ["1", "2", "3", "4"]
    one = steps["1"]
    assert one["true_hr@10"] == one["own_hr@10"] and one["n_users"] == len(found.users)
    ranks = found.values["recent"]["own_ranks"][:, 2]
    assert steps["3"]["own_hr@10"] == pytest.approx((ranks < 10).mean())

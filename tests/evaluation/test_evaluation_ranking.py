"""Ranking end to end: logits against a plain loop, independence, resume, fidelity, rows; it learns, and is resumed."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from malloc_bench.backbones import get_backbone
from malloc_bench.compressors import Budget, get_compressor
from malloc_bench.data import load_card
from malloc_bench.data.dataset import Dataset, group
from malloc_bench.data.tasks.impressions import expose, ranking_batches
from malloc_bench.data.tasks.splits import Ratio
from malloc_bench.data.worlds.synthetic import generate
from malloc_bench.evaluation import evaluate as evaluation
from malloc_bench.evaluation.evaluate import REFERENCE, Job, evaluate
from malloc_bench.evaluation.ranking import agreement
from malloc_bench.results import write_row
from malloc_bench.run.folder import Chunks
from malloc_bench.run.rows import accuracy, per_user
from malloc_bench.state import Events
from malloc_bench.training.fit import Training, fit, validation_auc

SETTINGS = Training(epochs=6, batch_size=16, lr=1e-2)


def liked_clusters() -> Dataset:
    """Users who like the items of one half of the catalogue only: the history says which."""
    card = load_card("synthetic")
    small = card.parameters.model_copy(update={"users": 120, "items": 60, "median": 20, "longest": 50, "shortest": 8})
    dataset = group(load_card("ml-100k"), generate(small), "test")
    users = np.repeat(np.arange(dataset.n_users), np.diff(dataset.offsets))
    side = np.random.default_rng(0).integers(0, 2, dataset.n_users)
    return replace(dataset, feedback={"rating": np.where(dataset.items % 2 == side[users], 5.0, 1.0)})


@pytest.fixture(scope="module")
def data():
    return expose(liked_clusters(), Ratio(), 0, 6, 0)


def fresh(data, name="sasrec"):
    torch.manual_seed(0)
    return get_backbone(name, data.dataset.n_items, True, dim=16, max_length=20).for_ranking()


@pytest.fixture(scope="module", params=["sasrec", "hstu"])
def backbone(request, data, tmp_path_factory):
    made = fresh(data, request.param)
    made.fit = fit(made, data, SETTINGS, 0, tmp_path_factory.mktemp("fit"))
    return made


def job(name, budget=None, **params):
    return Job(f"{name}{params or ''}@{budget}", get_compressor(name, **params), budget and Budget.parse(budget))


JOBS = [
    job("full"), job("none"), job("recent", 0.25), job("random", 0.5), job("h2o", 0.25), job("snapkv", 0.25, window=4),
    job("kivi", bits=4), job("svd", 0.5), job("merge_adjacent", 0.25), job("recompute"), job("truncate", {"slots": 3}),
]  # fmt: skip


@pytest.fixture(scope="module")
def result(backbone, data):
    found = evaluate(backbone, data, JOBS)
    assert not found.failed
    return found


@torch.no_grad()
def plain(backbone, data, keep=1000):
    """{(user, time shown): logit} by the plain causal pass over history and one candidate; the newest `keep` only."""
    found, shown = {}, data.shown
    for user, at, start, stop in zip(data.test.users, data.test.at, data.test.start, data.test.stop):
        first = max(data.dataset.offsets[user], at - min(keep, backbone.max_length))
        for place in range(start, stop):
            items = [*data.dataset.items[first:at].tolist(), int(shown.items[place])]
            times = [*data.dataset.times[first:at].tolist(), int(shown.times[place])]
            asked = [*times[1:-1], int(shown.times[start]), times[-1]] if len(times) > 1 else [times[-1]]
            line = Events(
                torch.tensor([items]), torch.tensor([len(items)]), torch.tensor([times]), torch.tensor([asked])
            )
            score = backbone.score(backbone(line)[:, -1:], Events(line.items[:, -1:], torch.tensor([1])))
            found[int(user), int(start), place - start] = float(score)
    return found


def by_candidate(result, data, name):
    """As `plain` has it; requests are told apart by user and history length and candidates."""
    starts = {}
    for user, start, stop in zip(data.test.users, data.test.start, data.test.stop):
        starts[int(user), tuple(data.shown.items[start:stop].tolist())] = int(start)
    found = {}
    for user, items, logits in zip(result.users, result.items, result.values[name]["logits"]):
        start = starts[int(user), tuple(items[items > 0].tolist())]
        assert np.isnan(logits[(items == 0).nonzero()]).all()
        found |= {(int(user), start, i): float(x) for i, x in enumerate(logits[items > 0])}
    return found


def test_logits_are_those_of_a_plain_loop_over_candidates(backbone, data, result):
    for name, keep in (("full@None", 1000), (REFERENCE, 1000), ("recompute@None", 1000)):
        want, got = plain(backbone, data, keep), by_candidate(result, data, name)
        assert want.keys() == got.keys() and len(want) > 300
        assert max(abs(want[key] - got[key]) for key in want) < 1e-4


def test_rows_have_the_metrics_of_ranking(backbone, data, result, tmp_path):
    rows = accuracy(result, [each.id for each in JOBS])
    full = rows["full@None"]
    logits = plain(backbone, data)
    labels = [bool(data.liked[start + i]) for _, start, i in logits]
    assert full["auc"] == pytest.approx(roc_auc_score(labels, list(logits.values())), abs=1e-3)
    assert full["n_users"] == len(np.unique(data.test.users)) and full["n_targets"] == len(data.test)
    assert full["agreement"] == 1 and full["logit_error"] == 0 and full["p_value"] is full["p_auc"] is None
    assert full["delta_gauc"] == full["delta_auc_lo"] == 0 and full["state_between"] == "rebuilt"
    bad = rows["none@None"]
    assert bad["gauc"] < full["gauc"] - 0.05 and bad["delta_gauc_hi"] < 0 and bad["p_value"] < 0.01
    assert bad["delta_gauc"] == pytest.approx(bad["gauc"] - full["gauc"])
    assert bad["delta_auc"] == pytest.approx(bad["auc"] - full["auc"])
    assert 0.3 < bad["agreement"] < 0.95 and bad["logit_error"] > 0 and bad["logloss"] > full["logloss"]
    assert rows["kivi{'bits': 4}@None"]["agreement"] > rows["recent@0.25"]["agreement"]
    named = {"dataset": "toy", "task": "ranking", "backbone": "sasrec", "compressor": "h2o", "seed": 0}
    for each, row in rows.items():
        assert not {"hr@10", "mrr", "overlap@10"} & row.keys() and 0 <= row["recall@5"] <= row["recall@50"] <= 1
        path = write_row(tmp_path, {"cell_id": each.split("@")[0], "status": "ok", **named, **row})
        assert json.loads(path.read_text())["gauc"] == row["gauc"]
    shown = per_user(result, "none@None", data.dataset.user_ids)
    assert shown["items"].shape == shown["labels"].shape == shown["logits"].shape == (len(data.test), 6)


def test_users_of_one_class_are_counted_and_left_out(data, result):
    users, labels = result.users, result.labels
    liked = {user: labels[users == user][result.items[users == user] > 0] for user in np.unique(users)}
    one = sum(own.all() or not own.any() for own in liked.values())
    changed = replace(result, labels=result.labels.copy())
    some = np.unique(users)[:3]
    changed.labels[np.isin(users, some)] = False
    before, after = (accuracy(each, ["full@None"])["full@None"]["users_one_class"] for each in (result, changed))
    assert before == one and after >= max(one, 3)


def test_chunks_order_and_resume_do_not_matter(backbone, data, result, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "_USERS", 37)
    parts = evaluate(backbone, data, JOBS[::-1], store=Chunks(tmp_path))
    resumed = evaluate(backbone, data, JOBS, store=Chunks(tmp_path))
    np.testing.assert_equal(parts.values, resumed.values)
    np.testing.assert_array_equal(parts.items, result.items)
    for each in JOBS:
        np.testing.assert_array_equal(parts.values[each.id]["bytes"], result.values[each.id]["bytes"])
        a, b = (x.values[each.id]["logits"][result.items > 0] for x in (parts, result))
        assert (np.abs(a - b) < 1e-3).mean() > 0.97  # selections may differ where scores tie


def test_it_learns_and_the_best_epoch_is_the_one_of_the_auc(backbone, data):
    assert validation_auc(fresh(data, backbone.name), data) < 0.65
    assert backbone.fit.best_auc == pytest.approx(validation_auc(backbone, data), abs=1e-9)
    assert backbone.fit.best_auc > 0.75 and backbone.fit.best_ndcg is None
    nobody = data.valid.rows(np.zeros(0, int))
    assert validation_auc(backbone, replace(data, valid=nobody)) == 0.5


def test_a_killed_fit_goes_on_and_a_finished_one_is_loaded(data, tmp_path):
    class Killed(BaseException):
        pass

    def kill(progress):
        assert progress.metric == "AUC"
        if progress.epoch == 1:
            raise Killed

    settings = Training(epochs=2, batch_size=32)
    whole, parts, loaded = fresh(data), fresh(data), fresh(data)
    fit(whole, data, settings, 3, tmp_path / "whole")
    with pytest.raises(Killed):
        fit(parts, data, settings, 3, tmp_path / "parts", kill)
    fit(parts, data, settings, 3, tmp_path / "parts")
    assert fit(loaded, data, settings, 3, tmp_path / "whole").best_auc is not None
    for a, b, c in zip(*(made.state_dict().values() for made in (whole, parts, loaded))):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_the_loss_is_the_mean_over_real_candidates(data):
    backbone = fresh(data).eval()
    history, tokens, labels = next(itertools.islice(ranking_batches(data, 20, 8, 0, 0), 2, None))
    with torch.no_grad():
        logits = backbone.score(backbone.read(tokens, backbone.prefill(history).state), tokens)
        losses = [
            float(torch.nn.functional.softplus(-x if y else x))
            for row, n in enumerate(tokens.count) for x, y in zip(logits[row, :n], labels[row, :n])
        ]  # fmt: skip
        assert float(backbone.ranking_loss(history, tokens, labels)) == pytest.approx(np.mean(losses), abs=1e-6)


def test_agreement_counts_pairs():
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.integers(0, 4, (20, 7)) / 2) for _ in range(2))
    real = torch.from_numpy(np.arange(7) < rng.integers(1, 8, 20)[:, None])
    got = agreement(a, b, real)
    for row in range(20):
        own = [(float(a[row, i]), float(b[row, i])) for i in range(int(real[row].sum()))]
        pairs = [((x - y), (u - v)) for (x, u), (y, v) in itertools.combinations(own, 2) if u != v]
        want = np.mean([0.5 if d == 0 else float(d * e > 0) for d, e in pairs]) if pairs else np.nan
        assert float(got[row]) == pytest.approx(want, nan_ok=True)

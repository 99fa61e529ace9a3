"""Ranks against a plain loop, independence of company and chunks, resume, and compressors that break their promise."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from malloc_bench.backbones import get_backbone
from malloc_bench.compressors import Budget, Compressor, get_compressor
from malloc_bench.data import load_card
from malloc_bench.data.dataset import group
from malloc_bench.data.tasks.batches import window
from malloc_bench.data.tasks.splits import Targets, leave_one_out
from malloc_bench.data.worlds.synthetic import generate
from malloc_bench.evaluation import evaluate as evaluation
from malloc_bench.evaluation import trial
from malloc_bench.evaluation.evaluate import PACKED_USERS, REFERENCE, SIZES, Job, evaluate
from malloc_bench.evaluation.requests import NextItem
from malloc_bench.run.folder import Chunks
from malloc_bench.state import Dense, UserState, map_tensors
from malloc_bench.training.fit import Training, fit


@pytest.fixture(scope="module")
def split():
    card = load_card("synthetic")
    small = card.parameters.model_copy(update={"users": 150, "items": 120, "median": 20, "longest": 60, "shortest": 3})
    return leave_one_out(group(card, generate(small), "test"))


@pytest.fixture(scope="module", params=["sasrec", "hstu"])
def backbone(request, split, tmp_path_factory):
    torch.manual_seed(0)
    made = get_backbone(request.param, split.dataset.n_items, True, dim=16, max_length=40)
    fit(made, split, Training(epochs=4, batch_size=16, lr=5e-3), 0, tmp_path_factory.mktemp("fit"))
    return made


@pytest.fixture(scope="module")
def sasrec(split):
    torch.manual_seed(0)
    return get_backbone("sasrec", split.dataset.n_items, True, dim=16, max_length=40)


def job(name, budget=None, **params):
    return Job(f"{name}{params or ''}@{budget}", get_compressor(name, **params), budget and Budget.parse(budget))


JOBS = [
    job("full"), job("none"), job("recent", 0.25), job("recent", 0.05), job("random", 0.5), job("knorm", 0.25),
    job("h2o", 0.25), job("tova", 0.25), job("snapkv", 0.25, window=4), job("kivi", bits=4), job("svd", 0.5),
    job("merge_adjacent", 0.25), job("recompute"), job("truncate", {"slots": 3}), job("oracle_evict", 0.25),
    job("pyramid", 0.25, inner="knorm"), job("ada", 0.25),
    job("compose", 0.2, steps=("merge_adjacent", "int8")),
]  # fmt: skip


@torch.no_grad()
def plain(backbone, split, events=None, filter_seen=True):
    """Score tables [N, items] and targets in the order of split.test, user by user; events: the newest so many only."""
    dataset, scores, targets = split.dataset, [], []
    for user, at in zip(split.test.users, split.test.at):
        one = window(dataset, np.array([user]), np.array([at]), events or backbone.max_length)
        own = backbone(one)[0, -1].double() @ backbone.catalogue().T.double()
        target = dataset.items[at] - 1
        if filter_seen:
            seen = dataset.items[dataset.offsets[user] : at] - 1
            own[seen[seen != target]] = -np.inf
        scores.append(own.numpy())
        targets.append(target)
    return np.array(scores), np.array(targets)


def assert_ranks(found, scores, targets, close=2e-5):
    """Equal to the count of items that score at least as much, but for scores that differ by rounding."""
    own = np.take_along_axis(scores, targets[:, None], 1)
    low, high = (scores > own + close).sum(1), (scores >= own - close).sum(1) - 1
    assert (low <= found).all() and (found <= high).all()
    assert (found == (scores >= own).sum(1) - 1).mean() > 0.97


def in_test_order(result, split, name, column="rank"):
    """Users of leave_one_out are distinct and ascending."""
    assert sorted(result.users.tolist()) == split.test.users.tolist()
    return result.values[name][column][np.argsort(result.users)]


@pytest.mark.parametrize("filter_seen", [True, False])
def test_full_and_none_rank_as_a_plain_loop_does(backbone, split, filter_seen):
    result = evaluate(backbone, split, [job("full"), job("none")], filter_seen=filter_seen)
    assert not result.failed
    for name in ("full@None", REFERENCE):
        assert_ranks(in_test_order(result, split, name), *plain(backbone, split, filter_seen=filter_seen))
    assert_ranks(in_test_order(result, split, "none@None"), *plain(backbone, split, 1, filter_seen))
    assert (result.values["full@None"]["overlap"] == 1).all()
    assert result.values["none@None"]["overlap"].mean() < 0.9


def test_overlap_is_that_of_the_top_10_sets(backbone, split):
    result = evaluate(backbone, split, [job("none")])
    tops = [np.argsort(-plain(backbone, split, n)[0])[:, :10] for n in (None, 1)]
    want = np.array([len(set(a) & set(b)) / 10 for a, b in zip(*map(np.ndarray.tolist, tops))])
    np.testing.assert_allclose(in_test_order(result, split, "none@None", "overlap"), want, atol=0.11)
    assert np.mean(np.abs(in_test_order(result, split, "none@None", "overlap") - want) > 1e-6) < 0.03


def test_the_columns_are_what_they_say(backbone, split):
    result = evaluate(backbone, split, JOBS)
    n, first = len(split.test), split.dataset.offsets[split.test.users]
    assert not result.failed and result.values.keys() == {REFERENCE, *(each.id for each in JOBS)}
    want = np.minimum(split.test.at - first, 40) - 1
    np.testing.assert_array_equal(result.length[np.argsort(result.users)], want)
    for values in result.values.values():
        assert {name: array.dtype for name, array in values.items()} == {**NextItem.columns, **SIZES}
        assert all(array.shape == (n,) for array in values.values())
        assert values["rank"].min() >= 0 and values["rank"].max() < split.dataset.n_items
    for name, parts in result.parts.items():
        np.testing.assert_array_equal(sum(parts.values()), result.values[name]["bytes"])
    scales = {name: {part for part in parts if part.endswith("scales")} for name, parts in result.parts.items()}
    assert scales["kivi{'bits': 4}@None"] == {"keys scales", "values scales"} and scales["svd@0.5"] == {"shared scales"}
    assert result.parts["recompute@None"].keys() >= {"length", "ids"} and not scales["full@None"]
    full = result.values["full@None"]
    np.testing.assert_array_equal(full["bytes"], result.bytes_full)
    assert not full["at_floor"].any() and (result.values["none@None"]["bytes"] == 4).all()
    for each in JOBS:
        values = result.values[each.id]
        if each.budget is None or each.budget.fraction is None:
            continue
        target = np.floor(each.budget.fraction * result.bytes_full)
        assert (values["bytes"][~values["at_floor"]] <= target[~values["at_floor"]]).all()
        np.testing.assert_array_equal(values["at_floor"], values["bytes"] > target)
    assert result.values["recent@0.05"]["at_floor"].any()


def assert_same(a, b):
    """Equal bytes; ranks and overlaps too, but for the odd user whose scores tie up to rounding."""
    np.testing.assert_array_equal(a["bytes"], b["bytes"])
    np.testing.assert_array_equal(a["at_floor"], b["at_floor"])
    assert (a["rank"] == b["rank"]).mean() >= 0.96 and (np.abs(a["overlap"] - b["overlap"]) < 1e-6).mean() >= 0.96


def test_a_job_does_not_depend_on_the_others(backbone, split):
    together = evaluate(backbone, split, JOBS, seed=5)
    backwards = evaluate(backbone, split, JOBS[::-1], seed=5)
    for each in JOBS:
        np.testing.assert_equal(together.values[each.id], backwards.values[each.id])
    for each in JOBS:
        alone = evaluate(backbone, split, [each], seed=5)
        np.testing.assert_array_equal(alone.users, together.users)
        assert_same(alone.values[each.id], together.values[each.id])


def test_a_user_does_not_depend_on_the_chunk(backbone, split, monkeypatch):
    whole = evaluate(backbone, split, JOBS)
    monkeypatch.setattr(evaluation, "_USERS", 23)
    calls = []
    parts = evaluate(backbone, split, JOBS, report=lambda done, total: calls.append((done, total)))
    assert calls == [(i + 1, 7) for i in range(7)]
    np.testing.assert_array_equal(parts.users, whole.users)
    np.testing.assert_array_equal(parts.length, whole.length)
    for each in JOBS:
        assert_same(parts.values[each.id], whole.values[each.id])
        np.testing.assert_equal(parts.parts[each.id], whole.parts[each.id])


def test_budgets_that_leave_the_same_slots_are_read_once(sasrec, split, monkeypatch):
    steps = ("recent", "int4_token")  # 4 bits of every event are within a half and within a quarter
    jobs = [job("compose", budget, steps=steps) for budget in (0.5, 0.25, 0.05)]
    alone = [evaluate(sasrec, split, [each]) for each in jobs]
    reads, plain_read = [], NextItem.read

    def counted(self, backbone, state, rows=None):
        reads.append(rows is None)
        return plain_read(self, backbone, state, rows)

    monkeypatch.setattr(NextItem, "read", counted)
    together = evaluate(sasrec, split, jobs)
    assert sum(reads) == 1 + 2  # the full state, and two of three
    for each, own in zip(jobs, alone):
        np.testing.assert_equal(together.values[each.id], own.values[each.id])


def test_the_seed_is_for_what_is_random_only(sasrec, split):
    a, b = (evaluate(sasrec, split, [job("random", 0.25), job("recent", 0.25)], seed=seed) for seed in (0, 1))
    assert (a.values["random@0.25"]["rank"] != b.values["random@0.25"]["rank"]).any()
    np.testing.assert_equal(a.values["recent@0.25"], b.values["recent@0.25"])


def test_chunks_are_bounded_by_users_and_by_the_catalogue(sasrec, split, monkeypatch):
    def sizes():
        return [len(rows) for rows in evaluation.chunks(sasrec, split)]

    assert sizes() == [150]
    monkeypatch.setattr(evaluation, "_SCORES", 60 * split.dataset.n_items)
    assert sizes() == [60, 60, 30]
    monkeypatch.setattr(evaluation, "_SCORES", 1)
    assert max(sizes()) == 16


def test_chunks_of_many_users_are_larger_but_not_too_large(sasrec, split, monkeypatch):
    def sizes():
        return [len(rows) for rows in evaluation.chunks(sasrec, split)]

    monkeypatch.setattr(evaluation, "_USERS", 16)
    monkeypatch.setattr(evaluation, "_CHUNKS", 4)
    assert sizes() == [37, 37, 37, 37, 2]  # a quarter of 150
    monkeypatch.setattr(evaluation, "_MANY", 30)
    assert sizes() == [30] * 5
    full = evaluate(sasrec, split, []).bytes_full.max()
    monkeypatch.setattr(evaluation, "_STATES", int(full) * 20)
    assert sizes() == [20] * 7 + [10]
    monkeypatch.setattr(evaluation, "_STATES", 1)
    assert sizes() == [16] * 9 + [6]


def test_what_was_kept_of_other_chunks_is_computed_again(sasrec, split, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "_USERS", 40)
    want = evaluate(sasrec, split, [job("recent", 0.5)])
    with pytest.raises(KeyboardInterrupt):
        evaluate(sasrec, split, [job("recent", 0.5)], store=Chunks(tmp_path), report=stop_at(2))
    monkeypatch.setattr(evaluation, "_USERS", 60)
    found = evaluate(sasrec, split, [job("recent", 0.5)], store=Chunks(tmp_path))
    np.testing.assert_equal(found.values["recent@0.5"]["rank"], want.values["recent@0.5"]["rank"])


def stop_at(chunk):
    def report(done, total):
        if done == chunk:
            raise KeyboardInterrupt

    return report


def test_nobody_to_test(sasrec, split):
    nobody = Targets(split.test.users[:0], split.test.at[:0])
    result = evaluate(sasrec, replace(split, test=nobody), [job("recent", 0.5)])
    assert len(result.users) == len(result.length) == len(result.bytes_full) == 0 and not result.failed


# --- resume ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """Counts prefills, and compress calls by method, but for the single users that templates are made of."""
    from malloc_bench.backbones.attention import AttentionBackbone
    from malloc_bench.compressors.baseline.none import NoHistory
    from malloc_bench.compressors.windowing.recent import Recent

    counts = {}

    def count(label, cls, name):
        inner = getattr(cls, name)

        def call(self, given, *args, **kwargs):
            counts[label] = counts.get(label, 0) + (name == "prefill" or len(given.users) > 1)
            return inner(self, given, *args, **kwargs)

        monkeypatch.setattr(cls, name, call)

    count("prefill", AttentionBackbone, "prefill")
    count("recent", Recent, "compress")
    count("none", NoHistory, "compress")
    return counts


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(evaluation, "_USERS", 40)  # 150 users: 4 chunks


class Killed(BaseException):
    pass


def test_finished_chunks_are_not_computed_again(sasrec, split, tmp_path, counted, small_chunks):
    jobs = [job("recent", 0.25), job("none")]
    want = evaluate(sasrec, split, jobs)
    assert counted == {"prefill": 4, "recent": 4, "none": 4}

    def kill(done, total):
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        evaluate(sasrec, split, jobs, store=Chunks(tmp_path), report=kill)
    counted.clear()
    resumed = evaluate(sasrec, split, jobs, store=Chunks(tmp_path))
    assert counted == {"prefill": 2, "recent": 2, "none": 2}
    for name in ("users", "length", "bytes_full", "values", "failed", "parts"):
        np.testing.assert_equal(getattr(resumed, name), getattr(want, name))
    counted.clear()
    np.testing.assert_equal(evaluate(sasrec, split, jobs, store=Chunks(tmp_path)).values, want.values)
    assert counted == {}


def test_a_part_that_some_chunks_lack_is_nought_there():
    """A chunk of short histories may be kept whole, another way than the next one."""
    chunks = [{"keys": [3, 4]}, {"keys": [5], "masses": [6]}, {"masses": [7]}]
    arrays = [evaluation._structured({name: torch.tensor(x) for name, x in own.items()}) for own in chunks]
    found = evaluation._side_by_side(arrays)
    assert {name: x.tolist() for name, x in found.items()} == {"keys": [3, 4, 5, 0], "masses": [0, 0, 6, 7]}
    assert evaluation._side_by_side([]) == {}


def test_only_missing_jobs_are_computed(sasrec, split, tmp_path, counted, small_chunks):
    evaluate(sasrec, split, [job("recent", 0.25)], store=Chunks(tmp_path))
    counted.clear()
    both = [job("recent", 0.25), job("none")]
    result = evaluate(sasrec, split, both, store=Chunks(tmp_path))
    assert counted == {"prefill": 4, "none": 4}
    np.testing.assert_equal(result.values, evaluate(sasrec, split, both).values)
    # a job that nobody asks for any more is not reported, but kept
    assert evaluate(sasrec, split, [job("none")], store=Chunks(tmp_path)).values.keys() == {REFERENCE, "none@None"}


def test_a_chunk_that_cannot_be_read_is_computed_again(sasrec, split, tmp_path, counted, small_chunks):
    jobs = [job("none")]
    want = evaluate(sasrec, split, jobs, store=Chunks(tmp_path))
    counted.clear()
    torn = tmp_path / "00001.npz"
    torn.write_bytes(torn.read_bytes()[:-40])
    np.testing.assert_equal(evaluate(sasrec, split, jobs, store=Chunks(tmp_path)).values, want.values)
    assert counted == {"prefill": 1, "none": 1}


# --- compressors that break their promise ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Broken(Compressor):
    """As full, with one flaw."""

    flaw: str = "raises"
    calls: tuple = ()  # (limit, list): fails from the limit-th call on
    family, name = "baseline", "broken"

    def compress(self, prefill, budget=None, fitted=None):
        state = prefill.state
        if self.calls:
            limit, made = self.calls
            made.append(None)
            if len(made) < limit:
                return state
        if self.flaw == "raises":
            raise ZeroDivisionError("a flaw")
        if self.flaw == "nan":
            bad = [
                replace(s, fields={k: Dense(v.dense() * float("nan")) for k, v in s.fields.items()})
                for (s,) in state.layers
            ]
            return UserState(tuple((s,) for s in bad), state.length)
        return state  # "greedy"


@pytest.mark.parametrize(
    ("flaw", "budget", "message"),
    [
        ("raises", None, "ZeroDivisionError: a flaw"),
        ("greedy", 0.5, "OverBudget: user"),
        ("greedy", {"bytes": 100}, "the budget allows 100"),
        ("nan", None, "ValueError: outputs read from the compressed state are not finite"),
    ],
)
def test_a_job_that_breaks_its_promise_fails_and_the_others_go_on(sasrec, split, small_chunks, flaw, budget, message):
    bad = Job("bad", Broken(flaw), budget and Budget.parse(budget))
    result = evaluate(sasrec, split, [job("none"), bad, job("recent", 0.25)])
    assert result.failed.keys() == {"bad"} and message in result.failed["bad"].reason
    assert result.failed["bad"].traceback.startswith("Traceback") and "bad" not in result.values
    np.testing.assert_equal(result.values, evaluate(sasrec, split, [job("none"), job("recent", 0.25)]).values)


def test_a_floor_excuses_who_cannot_get_smaller(sasrec, split):
    @dataclass(frozen=True)
    class Bulky(Broken):
        def floor(self, prefill):
            return prefill.state.nbytes()

    result = evaluate(sasrec, split, [Job("bulky", Bulky("greedy"), Budget.parse(0.5))])
    assert not result.failed and result.values["bulky"]["at_floor"].all()


def test_a_job_that_fails_late_is_left_out_and_tried_again_from_there(sasrec, split, tmp_path, small_chunks):
    made = []
    failing = Job("late", Broken(calls=(3, made)))
    result = evaluate(sasrec, split, [failing, job("none")], store=Chunks(tmp_path))
    assert result.failed.keys() == {"late"} and "late" not in result.values and len(made) == 3
    fixed = evaluate(sasrec, split, [Job("late", get_compressor("full")), job("none")], store=Chunks(tmp_path))
    assert not fixed.failed
    np.testing.assert_equal(fixed.values["late"], fixed.values[REFERENCE])
    np.testing.assert_equal(fixed.values["none@None"], result.values["none@None"])


@pytest.mark.parametrize(
    ("size", "users"), [(256, 150), (40, 150), (16, 150), (149, 150), (16, 33), (16, 20), (256, 5)]
)
def test_32_users_a_cell_are_packed_over_all_chunks(sasrec, split, monkeypatch, size, users):
    monkeypatch.setattr(evaluation, "_USERS", size)
    monkeypatch.setattr(evaluation, "check_model", lambda *_: None)  # it packs full states of the same users
    some = replace(split, test=Targets(split.test.users[:users], split.test.at[:users]))
    packed = []
    inner = UserState.packed

    def noting(self, users):
        packed.extend((id(self), user) for user in users)
        return inner(self, users)

    monkeypatch.setattr(UserState, "packed", noting)
    held = []  # states must live for ids to differ
    monkeypatch.setattr(trial, "checked_bytes", _holding(trial.checked_bytes, held))
    evaluate(sasrec, some, [job("recent", 0.25)])
    assert len(packed) == len(set(packed)) == min(PACKED_USERS, users)
    assert {user for _, user in packed} != set(range(len(packed))) or users <= PACKED_USERS or size == 16


def _holding(inner, held):
    def call(job, prefill, state):
        held.append(state)
        return inner(job, prefill, state)

    return call


def test_prefill_is_shared_and_not_changed(sasrec, split):
    """Every method gets the same prefill, and leaves it as it found it."""
    seen = []

    @dataclass(frozen=True)
    class Looks(Broken):
        def compress(self, prefill, budget=None, fitted=None):
            seen.append(prefill)
            seen.append(map_tensors(torch.clone, prefill.state))
            return prefill.state

    evaluate(sasrec, split, [Job("first", Looks()), *JOBS, Job("last", Looks())])
    before, copy, after, _ = seen
    assert before.state is after.state
    for a, b in zip(before.state.segments(), copy.segments()):
        assert all(torch.equal(a.fields[k].dense(), b.fields[k].dense()) for k in a.fields)


def test_a_backbone_that_reads_something_else_than_was_trained_is_told(sasrec, split, monkeypatch):
    """And one whose full state is not in its bytes, as all else that is read is held against."""
    forward, read = type(sasrec).forward, type(sasrec).read
    with monkeypatch.context() as patch:
        patch.setattr(type(sasrec), "forward", lambda self, events: forward(self, events).flip(-1))
        with pytest.raises(ValueError, match=r"sasrec reads something else from its full state than its forward gives"):
            evaluate(sasrec, split, [job("none")])
    noisy = lambda self, tokens, state: (out := read(self, tokens, state)) + torch.randn(out.shape)  # noqa: E731
    monkeypatch.setattr(type(sasrec), "read", noisy)
    with pytest.raises(trial.NotInTheBytes, match="something that is read is not in the bytes"):
        evaluate(sasrec, split, [job("none")])

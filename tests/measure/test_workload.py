import pytest

from malloc_bench.measure import Workload

SMALL = Workload(users=2, history=20, candidates=3, appended=2)


def test_a_workload_is_made_of_its_seed():
    a, b, other = (Workload(seed=s).events(50) for s in (1, 1, 2))
    for x, y, z in zip(a, b, other):
        assert x.items.equal(y.items) and x.times.equal(y.times) and not x.items.equal(z.items)
    history, tokens, new = SMALL.events(50)
    assert history.items.shape == (2, 20) and tokens.items.shape == (2, 3) and new.items.shape == (2, 2)
    assert int(history.items.min()) >= 1 and int(history.items.max()) <= 50
    assert (history.times.diff() > 0).all() and (history.next_times > history.times).all()
    assert (history.times[:, -1:] < tokens.times).all() and (tokens.times == tokens.times[:, :1]).all()
    assert new.times[:, :1].equal(history.next_times[:, -1:])


def test_an_impossible_workload_is_refused():
    for wrong in ({"users": 0}, {"history": -1}, {"candidates": 0}, {"appended": 0}):
        with pytest.raises(ValueError, match="workload"):
            Workload(**wrong)

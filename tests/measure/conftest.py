import os

import pytest

from malloc_bench.measure import STORES, StoreError, sampling


class Clock:
    """Stands in for `time`: moves a little at every look, and as told."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 1e-3
        return self.now

    process_time = perf_counter


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(sampling, "time", clock)
    return clock


@pytest.fixture(scope="session")
def installed():
    """installed(name): the class of a store; the test is skipped where the store is missing, and fails so in CI."""

    def find(name):
        try:
            STORES[name].check()
        except StoreError as error:
            if os.environ.get("CI") == "true":
                pytest.fail(str(error))
            pytest.skip(str(error))
        return STORES[name]

    return find


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Folders of stores lie below the cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_BENCH_HOME", str(tmp_path_factory.mktemp("home")))
        yield

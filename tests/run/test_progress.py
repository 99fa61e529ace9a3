"""How far a run says it is: one number over training, evaluation and measuring, by a clock of our own."""

import time

import pytest
from rich.console import Console

from malloc_bench.run import progress
from malloc_bench.run.progress import Track, duration, watching
from malloc_bench.suite.plan import Cost
from malloc_bench.training.fit import Progress


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def step(epoch, step, epochs=4, steps=2, best=None):
    return Progress(epoch, epochs, step, steps, 0.5, best)


def test_all_phases_count_and_the_rest_is_told_by_the_pace():
    clock = Clock()
    track = Track(200.0, clock)
    cost = Cost(40.0, 50.0, 10.0, epochs=8)
    track.group("first", cost)
    assert track.done == 0 and track.left() is None and str(track) == "0% after 0 s"
    clock.now = 10.0
    track.fit(step(1, 2))  # 2 of 8 epochs: 10 of 40
    assert track.done == pytest.approx(10) and track.left() == pytest.approx(190)
    track.fit(step(3, 2))
    track.fit(step(0, 2))  # a second training of the group, after 4 epochs of the first
    assert track.done == pytest.approx(25)
    clock.now = 30.0
    track.chunk(1, 2)  # what training had left was not needed
    assert track.done == pytest.approx(40 + 25) and "chunk 1/2" in track.doing
    clock.now = 60.0
    track.measure(3)
    assert track.done == pytest.approx(90)  # of a group without drift
    track.group("second", Cost(0.0, 100.0, 0.0))
    assert track.done == pytest.approx(100) and track.left() == pytest.approx(60)
    assert str(track) == "50% after 60 s, about 60 s left"
    clock.now = 70.0
    track.chunk(4, 4)
    assert track.done == pytest.approx(200) and track.left() == 0
    assert track.times() == {"train": 40.0, "evaluate": 30.0, "drift": 0.0, "measure": 0.0}


def test_drift_is_a_phase_of_its_own():
    clock = Clock()
    track = Track(200.0, clock)
    track.group("one", Cost(0.0, 50.0, 50.0, drift=100.0))
    clock.now = 50.0
    track.drift(1, 4)
    assert track.done == pytest.approx(50 + 25) and track.doing == "drift: appended events, part 1/4"
    clock.now = 150.0
    track.measure(3)
    assert track.done == pytest.approx(150) and track.times()["drift"] == 100.0


def test_a_group_without_a_cost_does_no_harm():
    track = Track(0.0, Clock())
    track.group("none", None)
    track.fit(step(0, 1))
    track.chunk(1, 1)
    assert track.done == 0 and str(track) == "100% after 0 s"


def test_lanes_of_workers_add_up_and_what_begins_again_counts_once(capsys):
    clock = Clock()
    with watching(False, 200.0, clock) as watch:
        one = watch.lane("a", "first", Cost(40.0, 60.0, 0.0, epochs=4))
        two = watch.lane("b", "second", Cost(0.0, 100.0, 0.0))
        clock.now = 10.0
        one.fit(step(1, 2))
        two.chunk(1, 4)
        assert watch.track.done == pytest.approx(20 + 25)
        two = watch.lane("b", "second", Cost(0.0, 100.0, 0.0))  # its worker has died
        assert watch.track.done == pytest.approx(20)
        clock.now = 30.0
        two.chunk(2, 4)
        assert watch.track.left() == pytest.approx(30 * (200 - 70) / 70)
        one.end()
        assert watch.track.done == pytest.approx(100 + 50) and watch.track.now() == "evaluate: users, chunk 2/4"
        clock.now = 50.0
        two.end()
        assert watch.track.done == pytest.approx(200)
    assert watch.track.times() == {"train": 50.0, "evaluate": 20.0, "drift": 0.0, "measure": 0.0}
    said = capsys.readouterr().err.splitlines()
    assert said[:3] == ["first", "second", "second"] and said[3].startswith("35% after 30 s")
    assert "train: epoch 2/4, loss 0.500; evaluate: users, chunk 2/4" in " ".join(" ".join(said[3:]).split())


def test_durations():
    assert [duration(x) for x in (5, 119, 600, 7300)] == ["5 s", "119 s", "10 min", "2.0 h"]


def test_without_a_terminal_a_line_each_half_minute(capsys):
    clock = Clock()
    with watching(False, 100.0, clock) as watch:
        watch.group("ml-100k, sasrec, seed 0: 3 cells", Cost(50.0, 50.0, 0.0, epochs=10))
        for n in range(1, 101):
            clock.now = float(n)
            watch.fit(step((n - 1) // 10, (n - 1) % 10 + 1, epochs=10, steps=10))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "ml-100k, sasrec, seed 0: 3 cells" and len(lines) == 4
    assert lines[1].startswith("15% after 30 s") and "train: epoch 3/10, loss 0.500" in lines[1]


def test_quiet_says_nothing_and_a_terminal_gets_a_bar(capsys, monkeypatch):
    with watching(True, 10.0) as watch:
        watch.group("some", Cost(1.0, 9.0, 0.0))
        watch.chunk(1, 1)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(Console, "is_terminal", True)
    with watching(False, 10.0) as watch:
        watch.group("a [b] c", Cost(1.0, 9.0, 0.0))
        watch.chunk(1, 2)
    assert "a [b] c" in capsys.readouterr().err


def test_a_silent_phase_says_its_line_again(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.02)
    with watching(False, 100.0) as watch:
        watch.group("some", Cost(1.0, 9.0, 90.0))
        watch.measure(3)
        time.sleep(0.5)  # nothing is told
    said = capsys.readouterr().err
    assert said.count("measure: latency and FLOPs of 3 cells") > 2
    time.sleep(0.1)
    assert not capsys.readouterr().err  # and it ends with the run

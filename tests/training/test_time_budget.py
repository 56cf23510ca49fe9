import itertools

import pytest

from finestsam.training import time_budget as pace
from finestsam.training.time_budget import TimeBudget


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when a test says so."""

    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(pace, "time", clock)
    return clock


@pytest.mark.parametrize(("chore_seconds", "times"), [(0.0, 100), (0.01, 100), (1.0, 5), (50.0, 1)])
def test_a_chore_takes_a_twentieth_of_the_time(clock, chore_seconds, times):
    done = itertools.count()

    def chore() -> None:
        clock.now += chore_seconds
        next(done)

    steady = TimeBudget()
    for _ in range(100):
        clock.now += 1
        steady.do_if_due(chore)

    assert next(done) == times


def test_what_is_done_anyway_counts(clock):
    done = []

    def chore() -> None:
        clock.now += 1
        done.append(clock.now)

    steady = TimeBudget()
    steady.do(chore)
    steady.do_if_due(chore)
    clock.now += 20
    steady.do_if_due(chore)

    assert len(done) == 2

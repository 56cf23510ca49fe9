"""How often a run does what takes a while and can wait."""

import time
from collections.abc import Callable

# Of the run's time, for each chore.
SHARE = 0.05


class TimeBudget:
    """Does a chore again once so much time has passed that it takes a small share of it.

    An epoch of seconds would otherwise wait longer for its checkpoint and its curves than it learns.
    """

    def __init__(self) -> None:
        self._seconds = 0.0  # that the chore took when it was last done
        self._done_at = float("-inf")

    def do_if_due(self, chore: Callable[[], None]) -> None:
        if time.perf_counter() - self._done_at >= self._seconds / SHARE:
            self.do(chore)

    def do(self, chore: Callable[[], None]) -> None:
        started = time.perf_counter()
        chore()
        self._done_at = time.perf_counter()
        self._seconds = self._done_at - started

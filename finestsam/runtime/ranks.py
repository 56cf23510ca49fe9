"""What the processes of a run do together: what stops one of them stops all, at the same place."""

from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch.distributed
from lightning.fabric import Fabric

from finestsam.errors import UserError
from finestsam.runtime.signals import WARNING, Interrupted, Interruption

# One may check a dataset or download for hours while the others wait.
PATIENCE = timedelta(days=1000)

Result = TypeVar("Result")
Problem = Interrupted | UserError


class Ranks:
    """The processes of a run; with one there is nobody to agree with.

    Args:
        interruption: what a signal to this process does; it reaches the others on this machine as well.
    """

    def __init__(self, fabric: Fabric, interruption: Interruption):
        self._interruption = interruption
        self.rank, self.count = fabric.global_rank, fabric.world_size
        if self.count > 1:
            self._group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
            interruption.warn_each_other(self._exchange)

    def join(self, work: Callable[[], Result], may_stop: bool = True) -> Result:
        """Do the work on every rank, and return this rank's result when all are done.

        Args:
            may_stop: whether a signal stops the work at once; otherwise it waits.

        Raises:
            Interrupted: a signal stopped the work of any rank.
            UserError: that of any rank; on the first one. The others leave quietly.
        """
        result, problem = None, None
        try:
            with self._interruption.released() if may_stop else nullcontext():
                result = work()
        except (Interrupted, UserError) as error:
            problem = error
        found = [other for other in self._exchange(problem) if other is not None]
        if found:
            self._leave(found)
        return result

    def join_after_first(self, work: Callable[[], Result]) -> Result:
        """Do the work on the first rank, then on the others, which find what that one has kept."""
        first = self.join(work if self.rank == 0 else lambda: None)
        others = self.join(work if self.rank > 0 else lambda: None)
        return first if self.rank == 0 else others

    def gather(self, work: Callable[[], Result], may_stop: bool = True) -> list[Result]:
        """Do the work on every rank, and return all results on each, as `join` does."""
        return self._exchange(self.join(work, may_stop))

    @property
    def was_signalled(self) -> bool:
        """Whether a signal waits for the work to come to a place where it can stop."""
        return self._interruption.received is not None

    def find_signal(self) -> int:
        """Return the signal that any rank received."""
        return _choose_signal([number for number in self._exchange(self._interruption.received) if number is not None])

    def _exchange(self, mine: Result) -> list[Result]:
        """Return every rank's object, on every rank."""
        if self.count == 1:
            return [mine]
        shares = [None] * self.count
        torch.distributed.all_gather_object(shares, mine, group=self._group)
        return shares

    def _leave(self, problems: list[Problem]) -> NoReturn:
        mistakes = [problem for problem in problems if isinstance(problem, UserError)]
        if not mistakes:
            raise Interrupted(_choose_signal([problem.number for problem in problems]))
        if self.rank == 0:
            raise mistakes[0]
        raise SystemExit(2)


def _choose_signal(numbers: list[int]) -> int:
    """Return what stopped the ranks: what came from outside rather than the warning that they sent each other."""
    return min(numbers, key=lambda number: number == WARNING)

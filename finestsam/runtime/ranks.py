"""Keep the processes of a run together: whatever stops one of them stops all, at the same point of the work."""

from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch.distributed
from lightning.fabric import Fabric

from finestsam.errors import UserError
from finestsam.runtime.signals import WARNING, Interrupted, Interruption

# One process may check a dataset or download for hours while the others wait.
TIMEOUT = timedelta(days=1000)

Result = TypeVar("Result")
Problem = Interrupted | UserError


class Ranks:
    """The processes of a run. With a single process every exchange is trivial.

    Args:
        interruption: handles signals to this process, and forwards them to the other processes on this machine.
    """

    def __init__(self, fabric: Fabric, interruption: Interruption):
        self._interruption = interruption
        self.rank, self.count = fabric.global_rank, fabric.world_size
        if self.count > 1:
            self._group = torch.distributed.new_group(backend="gloo", timeout=TIMEOUT)
            interruption.warn_each_other(self._exchange)

    def join(self, work: Callable[[], Result], may_stop: bool = True) -> Result:
        """Do the work on every rank, and return this rank's result when all are done.

        Args:
            may_stop: whether a signal stops the work at once; False: the signal waits.

        Raises:
            Interrupted: a signal stopped the work of a rank.
            UserError: a rank raised it. Only rank 0 raises it here; the others exit with code 2.
        """
        result, problem = None, None
        try:
            with self._interruption.released() if may_stop else nullcontext():
                result = work()
        except (Interrupted, UserError) as error:
            problem = error
        problems = [found for found in self._exchange(problem) if found is not None]
        if problems:
            self._leave(problems)
        return result

    def join_after_first(self, work: Callable[[], Result]) -> Result:
        """Do the work on the first rank, then on the others, which find the files that the first has cached."""
        first = self.join(work if self.rank == 0 else lambda: None)
        others = self.join(work if self.rank > 0 else lambda: None)
        return first if self.rank == 0 else others

    def gather(self, work: Callable[[], Result], may_stop: bool = True) -> list[Result]:
        """Do the work on every rank as `join` does, and return the results of all ranks on each rank."""
        return self._exchange(self.join(work, may_stop))

    @property
    def was_signalled(self) -> bool:
        """Whether a signal waits for a point where the work can stop."""
        return self._interruption.received is not None

    def find_signal(self) -> int:
        """Return the signal that any rank received."""
        return _choose_signal([number for number in self._exchange(self._interruption.received) if number is not None])

    def _exchange(self, mine: Result) -> list[Result]:
        """Return the objects of all ranks, on every rank."""
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
    """Return the signal that stopped the ranks; one from outside counts before the warning of another rank."""
    return min(numbers, key=lambda number: number == WARNING)

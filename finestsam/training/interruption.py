"""Turn Ctrl-C, SIGTERM and SIGUSR1 into a request to stop at the next step, where a checkpoint can be saved."""

import signal
import threading
from types import FrameType

# A scheduler that takes the machine away sends SIGTERM, or SIGUSR1 where it is asked to warn first.
WATCHED = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class Interruption:
    """While it is entered, the first signal only sets `received`; the second acts as it always did."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in WATCHED}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells do: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + (self.received or signal.SIGINT)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

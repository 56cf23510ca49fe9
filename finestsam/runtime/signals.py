"""What Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 do: end the work where it stands, or where next nothing is lost."""

import _thread
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

# A scheduler that takes the machine away sends SIGTERM, or SIGUSR1 where it is set to warn first; a terminal that is
# closed, or loses its connection, SIGHUP.
WATCHED = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
WARNING = getattr(signal, "SIGUSR1", None)
HANGUP = getattr(signal, "SIGHUP", None)
# Modules whose functions Python calls when a process forks or an object goes.
CALLED_BACK = ("logging", "weakref")
# What an object is destroyed by: left in the middle, it would be closed again, and be no file any more.
DESTROYING = ("__del__", "close", "_close")

_watching: "Interruption | None" = None


class Interrupted(KeyboardInterrupt):
    """A signal came and the work was left; `exit_code` is 128 + its number, as shells do: 130 after Ctrl-C."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        return 128 + self.number


class Interruption:
    """The first signal raises `Interrupted`, where it is held only sets `received`; the second ends the process.

    Args:
        is_command: False: the process is someone else's (a notebook's, say), and the second signal does what it did
            before the signals were watched.
    """

    def __init__(self, is_command: bool = False):
        self.received: int | None = None
        self._companions: list[int] = []
        self._is_command = is_command
        self._is_held = False
        self._pid = os.getpid()
        self._previous: dict[int, object] = {}
        self._terminals: list[int] = []  # what of stdout and stderr is shown on one

    def warn_each_other(self, exchange: Callable[[object], list]) -> None:
        """Let a signal to any process of a run reach all that are on its machine.

        Args:
            exchange: returns what each of the processes gives it.
        """
        me = (socket.gethostname(), os.getpid())
        self._companions = [pid for host, pid in exchange(me) if host == me[0] and pid != me[1] and WARNING]

    def install(self) -> None:
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)] if self._is_command else []
        # nohup lets a process outlive its terminal: it ignores that signal already.
        watched = [number for number in WATCHED if number != HANGUP or signal.getsignal(number) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._receive) for number in watched}

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let the first signal wait: the work inside looks at `received` where it can stop."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False

    @contextmanager
    def released(self) -> Iterator[None]:
        """Let a signal raise at once within held work, in a part that changes nothing which is to be saved."""
        self._is_held = False
        try:
            self.stop_if_received()
            yield
            self.stop_if_received()  # one that came while an object was destroyed, where nothing can be raised
        finally:
            self._is_held = True

    def stop_if_received(self) -> None:
        if self.received is not None:
            raise Interrupted(self.received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a process that was just forked; its parent handles the signal
        if not self._is_held and _must_end_first(frame):
            _thread.start_new_thread(_send_later, (number,))  # threading's own would take locks, which may be taken
            return
        is_first = self.received is None
        if is_first or self.received == WARNING:
            self.received = number
        if number == HANGUP:
            self._leave_terminal()
        if number != WARNING:  # which companions send each other, and which is no reason to hurry
            for other, before in self._previous.items():
                if other not in (WARNING, HANGUP):
                    signal.signal(other, signal.SIG_DFL if self._is_command else before)
        if is_first:
            for pid in self._companions:
                with suppress(OSError):
                    os.kill(pid, WARNING)
            if not self._is_held:
                raise Interrupted(number)

    def _leave_terminal(self) -> None:
        """Go on without a terminal that is gone, where writing would fail, and whose shell says so once more."""
        signal.signal(HANGUP, signal.SIG_IGN)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in self._terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)


def _must_end_first(frame: FrameType | None) -> bool:
    """Whether this destroys an object or forks: Python drops what is raised there, and says so, or half is left."""
    while frame is not None:
        if frame.f_code.co_name in DESTROYING or frame.f_globals.get("__name__") in CALLED_BACK:
            return True
        frame = frame.f_back
    return False


def _send_later(number: int) -> None:
    time.sleep(0.01)
    os.kill(os.getpid(), number)


@contextmanager
def watch_signals(is_command: bool = False) -> Iterator[Interruption]:
    """Watch the signals, and afterwards leave them as they were; inside another watch, return that one.

    Args:
        is_command: see `Interruption`.
    """
    global _watching
    if _watching is not None or threading.current_thread() is not threading.main_thread():
        yield _watching or Interruption()
        return
    _watching = Interruption(is_command)
    try:
        _watching.install()
        yield _watching
    finally:
        _watching.restore()
        _watching = None


def leave_signals_to_parent(but_end_on_sigterm: bool = False) -> None:
    """Let the process that started this one handle the signals that reach both, and end with it.

    Args:
        but_end_on_sigterm: for a pool that ends its processes so.
    """
    for number in WATCHED:
        is_end = but_end_on_sigterm and number == signal.SIGTERM
        signal.signal(number, signal.SIG_DFL if is_end else signal.SIG_IGN)
    end_with_parent()


def end_with_parent() -> None:
    """End this process within a second when the one that started it is gone, however that ended."""
    threading.Thread(target=_wait_for_parent, args=(os.getppid(),), daemon=True).start()


def _wait_for_parent(pid: int) -> None:
    while os.getppid() == pid:
        time.sleep(1)
    os._exit(1)

"""Handle Ctrl-C, SIGTERM, SIGHUP and SIGUSR1: stop the work at once, or at the next point where nothing is lost."""

import _thread
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

# A scheduler that ends a job sends SIGTERM, or SIGUSR1 if it is configured to warn first. A terminal that closes or
# loses its connection sends SIGHUP.
WATCHED = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
WARNING = getattr(signal, "SIGUSR1", None)
HANGUP = getattr(signal, "SIGHUP", None)
# Modules with functions that Python calls when a process forks or an object is destroyed.
CALLBACK_MODULES = ("logging", "weakref")
# Functions that close or destroy an object. An interrupted one would run again on a file that is already closed.
DESTROYING_FUNCTIONS = ("__del__", "close", "_close")

_watching: "Interruption | None" = None


class Interrupted(KeyboardInterrupt):
    """A signal stopped the work. `exit_code` is 128 + its number, as in shells: 130 after Ctrl-C."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        return 128 + self.number


class Interruption:
    """Signal handler. The first signal raises `Interrupted`, or only sets `received` while signals are held.

    The second signal ends the process.

    Args:
        is_command: False: finestsam runs inside another program, such as a notebook. A second signal then does what it
            did before the signals were watched.
    """

    def __init__(self, is_command: bool = False):
        self.received: int | None = None
        self._companions: list[int] = []
        self._is_command = is_command
        self._is_held = False
        self._pid = os.getpid()
        self._previous: dict[int, object] = {}
        self._terminals: list[int] = []  # the descriptors of stdout and stderr that are terminals

    def warn_each_other(self, exchange: Callable[[object], list]) -> None:
        """Forward a signal to all processes of the run on this machine.

        Args:
            exchange: takes the object of this process, returns the objects of all processes.
        """
        me = (socket.gethostname(), os.getpid())
        self._companions = [pid for host, pid in exchange(me) if host == me[0] and pid != me[1] and WARNING]

    def install(self) -> None:
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)] if self._is_command else []
        # Under nohup SIGHUP is already ignored, so that the process outlives its terminal.
        watched = [number for number in WATCHED if number != HANGUP or signal.getsignal(number) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._receive) for number in watched}

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let the first signal wait. The work inside checks `received` where it can stop."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False

    @contextmanager
    def released(self) -> Iterator[None]:
        """Let a signal raise at once inside held work, in a part that changes nothing that is saved."""
        self._is_held = False
        try:
            self.stop_if_received()
            yield
            self.stop_if_received()  # the signal may have come in a destructor, where nothing can be raised
        finally:
            self._is_held = True

    def stop_if_received(self) -> None:
        if self.received is not None:
            raise Interrupted(self.received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a newly forked process; its parent handles the signal
        if not self._is_held and _must_end_first(frame):
            _thread.start_new_thread(_send_later, (number,))  # threading.Thread needs locks that may be held here
            return
        is_first = self.received is None
        if is_first or self.received == WARNING:
            self.received = number
        if number == HANGUP:
            self._leave_terminal()
        if number != WARNING:  # after a warning, the next signal still counts as the first
            for watched, handler in self._previous.items():
                if watched not in (WARNING, HANGUP):
                    signal.signal(watched, signal.SIG_DFL if self._is_command else handler)
        if is_first:
            for pid in self._companions:
                with suppress(OSError):
                    os.kill(pid, WARNING)
            if not self._is_held:
                raise Interrupted(number)

    def _leave_terminal(self) -> None:
        """Redirect the output away from a closed terminal, and ignore the second SIGHUP that its shell sends."""
        signal.signal(HANGUP, signal.SIG_IGN)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in self._terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)


def _must_end_first(frame: FrameType | None) -> bool:
    """Return whether the code destroys an object or forks: Python would drop the exception or leave it half done."""
    while frame is not None:
        if frame.f_code.co_name in DESTROYING_FUNCTIONS or frame.f_globals.get("__name__") in CALLBACK_MODULES:
            return True
        frame = frame.f_back
    return False


def _send_later(number: int) -> None:
    time.sleep(0.01)
    os.kill(os.getpid(), number)


@contextmanager
def watch_signals(is_command: bool = False) -> Iterator[Interruption]:
    """Watch the signals, and restore the old handlers afterwards. Inside another watch, give that one.

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
    """Ignore signals, which the parent process handles, and end when the parent ends.

    Args:
        but_end_on_sigterm: for a pool that ends its processes with SIGTERM.
    """
    for number in WATCHED:
        is_end = but_end_on_sigterm and number == signal.SIGTERM
        signal.signal(number, signal.SIG_DFL if is_end else signal.SIG_IGN)
    end_with_parent()


def end_with_parent() -> None:
    """End this process within a second after its parent process has ended for any reason."""
    threading.Thread(target=_wait_for_parent, args=(os.getppid(),), daemon=True).start()


def _wait_for_parent(pid: int) -> None:
    while os.getppid() == pid:
        time.sleep(1)
    os._exit(1)

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from finestsam.errors import UserError
from finestsam.runtime.processes import count_cores, map_in_processes
from finestsam.runtime.signals import WATCHED, Interrupted, watch_signals

ROOT = Path(__file__).parents[2]
# On one the work is done in the process itself, which no test may then end.
needs_two_cores = pytest.mark.skipif(count_cores() < 2, reason="no other process is started on one core")


@pytest.fixture(autouse=True)
def in_a_terminal():
    """Let a signal of a closed terminal arrive, also where the tests themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # Python runs a handler between two of its own instructions


@pytest.mark.parametrize("number", WATCHED)
def test_a_signal_ends_the_work_and_leaves_the_handlers_as_they_were(number):
    before = [signal.getsignal(one) for one in WATCHED]

    with pytest.raises(Interrupted) as caught, watch_signals():
        send(number)

    assert caught.value.exit_code == 128 + number
    assert isinstance(caught.value, KeyboardInterrupt)  # what a notebook expects
    assert [signal.getsignal(one) for one in WATCHED] == before


def test_held_work_is_finished_and_a_released_part_is_left():
    done = []
    with watch_signals() as interruption, interruption.held():
        send(signal.SIGTERM)
        done.append("step")
        with pytest.raises(Interrupted), interruption.released():
            done.append("measurement")
        done.append("saved")

    assert done == ["step", "saved"]
    assert interruption.received == signal.SIGTERM


def test_a_signal_within_a_released_part_leaves_it_at_once():
    with watch_signals() as interruption, interruption.held():
        with pytest.raises(Interrupted), interruption.released():
            send(signal.SIGINT)
            raise AssertionError("not left")
        assert interruption.received == signal.SIGINT


@pytest.fixture
def usual_ctrl_c():
    """Shells start what runs in the background without it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_second_signal_does_what_it_always_did(usual_ctrl_c):
    with pytest.raises(KeyboardInterrupt) as caught, watch_signals() as interruption, interruption.held():
        send(signal.SIGINT)
        send(signal.SIGINT)

    assert not isinstance(caught.value, Interrupted)


def test_a_signal_while_an_object_is_destroyed_is_not_lost(capsys):
    class Destroyed:
        def __del__(self) -> None:
            send(signal.SIGTERM)
            done.append("destroyed")

    done = []
    with pytest.raises(Interrupted), watch_signals():
        del_me = Destroyed()
        del del_me
        time.sleep(10)
        done.append("slept")

    assert done == ["destroyed"]
    assert "ignored" not in capsys.readouterr().err


def test_a_signal_while_something_is_closed_leaves_it_closed_once():
    class Pipe:
        closed = 0

        def close(self) -> None:
            self.closed += 1
            send(signal.SIGTERM)
            self.is_closed = True

    pipe = Pipe()
    with pytest.raises(Interrupted), watch_signals():
        pipe.close()
        time.sleep(10)

    assert pipe.closed == 1 and pipe.is_closed


def test_a_warning_between_processes_is_no_second_signal():
    with watch_signals() as interruption, interruption.held():
        send(signal.SIGUSR1)
        send(signal.SIGUSR1)
        send(signal.SIGTERM)

        assert interruption.received == signal.SIGTERM


def test_a_watch_within_a_watch_is_the_same_and_another_thread_watches_nothing():
    before = signal.getsignal(signal.SIGINT)
    with watch_signals() as outer, watch_signals() as inner:
        assert outer is inner

    def watch() -> None:
        with watch_signals():
            found.append(signal.getsignal(signal.SIGINT))

    found = []
    thread = threading.Thread(target=watch)
    thread.start()
    thread.join()
    assert found == [before]


def run_script(text: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def test_the_second_signal_ends_a_command_even_within_its_cleaning_up():
    process = run_script(
        """
        import time
        from finestsam.runtime.signals import watch_signals
        with watch_signals(is_command=True) as interruption:
            try:
                print("ready", flush=True)
                time.sleep(60)
            finally:
                print("cleaning", flush=True)
                time.sleep(60)
        """
    )
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "cleaning\n"
    process.send_signal(signal.SIGINT)

    _, error = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGINT
    assert error == ""


CLOSES_ITS_TERMINAL = """
    import os, pty, signal, sys, time
    child, terminal = pty.fork()  # the child leads a session whose terminal this is
    if child == 0:
        from finestsam.runtime.signals import Interrupted, watch_signals
        try:
            with watch_signals(is_command=True) as interruption, interruption.held():
                print("ready", flush=True)
                while interruption.received is None:
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGHUP)  # a shell that ends says it once more
                print("saved", flush=True)
                with open(sys.argv[1], "w") as file:
                    file.write("saved")
                interruption.stop_if_received()
        except Interrupted as error:
            os._exit(error.exit_code)
    os.read(terminal, 5)
    os.close(terminal)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="how terminals are closed differs")
def test_a_closed_terminal_lets_the_work_be_saved(tmp_path):
    process = run_script(CLOSES_ITS_TERMINAL, tmp_path / "saved")

    _, error = process.communicate(timeout=300)

    assert (process.returncode, error) == (129, "")
    assert (tmp_path / "saved").read_text() == "saved"


def test_what_outlives_its_terminal_under_nohup_still_does():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with watch_signals() as interruption:
            send(signal.SIGHUP)
            assert interruption.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def list_processes(session: int) -> list[int]:
    """Return the processes of a session that live, those that only wait to be collected left out."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, own_session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(own_session) == session and state != "Z":
            found.append(int(folder.name))
    return found


def wait_for_end(session: int, seconds: float = 60) -> list[int]:
    deadline = time.monotonic() + seconds
    while list_processes(session) and time.monotonic() < deadline:
        time.sleep(0.1)
    return list_processes(session)


def sleep_a_little(item: int) -> int:
    time.sleep(0.02)
    return item


WORK = """
    import sys
    sys.path.insert(0, "tests/runtime")
    from finestsam.cli import main
    from finestsam.runtime.processes import map_in_processes
    from finestsam.runtime.signals import Interrupted, watch_signals
    from test_signals import sleep_a_little
    try:
        with watch_signals(is_command=True):
            for item in map_in_processes(sleep_a_little, range(10_000), ""):
                print(item, flush=True)
    except Interrupted as error:
        sys.exit(error.exit_code)
"""


@needs_two_cores
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("to_group", [False, True], ids=["to the process", "to the whole group"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_one_that_started_it(number, to_group):
    process = run_script(WORK)
    process.stdout.readline()
    assert len(list_processes(process.pid)) >= 2

    (os.killpg if to_group else os.kill)(process.pid, number)
    _, error = process.communicate(timeout=300)

    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert error == ""
    assert wait_for_end(process.pid) == []


@needs_two_cores
def test_a_pool_that_lost_a_process_is_reported_and_does_not_hang():
    with pytest.raises(UserError, match="was killed"):
        list(map_in_processes(end_itself, range(100), ""))


def end_itself(item: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return item

"""Tools for all benchmarks: measure processes, time functions, describe the machine, print a table."""

import argparse
import csv
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil

ROOT = Path(__file__).parents[1]
SECONDS_BETWEEN_SAMPLES = 0.05
SAMPLING_SHARE = 0.02  # largest share of the time for sampling: the system visits all pages of a process


@dataclass
class Cost:
    """The cost of one process together with all processes that it started."""

    seconds: float
    cpu_seconds: float
    peak_megabytes: float  # of all processes together; shared memory counts once
    output: str

    @property
    def cores(self) -> float:
        return self.cpu_seconds / self.seconds


def run_process(arguments: Sequence[str], environment: dict[str, str] | None = None) -> Cost:
    """Run a command with this Python and wait for its end.

    Args:
        arguments: after the interpreter.
        environment: environment variables to set, in addition to those of this process.

    Raises:
        RuntimeError: the command failed; the message contains its output.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    peak = _Peak(process.pid)
    output, _ = process.communicate()
    seconds = time.perf_counter() - start
    peak.stop()
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {process.returncode}:\n{output[-4000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(seconds, used, peak.megabytes, output)


def run_training(flags: Sequence[str], folder: Path) -> tuple[Cost, list[dict[str, float]]]:
    """Run a training in the new run folder `folder`; return its cost and the rows of its metrics.csv."""
    cost = run_process(
        ["-m", "finestsam", "--mode=train", f"--sav_dir={folder.parent}", f"--run_name={folder.name}", *flags]
    )
    with (folder / "metrics.csv").open() as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    return cost, rows


class _Peak:
    """The peak memory of a process and its children together, sampled by a thread."""

    def __init__(self, pid: int) -> None:
        self.megabytes = 0.0
        self._process = psutil.Process(pid)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        pause = SECONDS_BETWEEN_SAMPLES
        while not self._ended.wait(pause):
            start = time.perf_counter()
            try:
                family = [self._process, *self._process.children(recursive=True)]
            except psutil.Error:
                return
            self.megabytes = max(self.megabytes, sum(map(_read_share, family)) / 1e6)
            pause = max(SECONDS_BETWEEN_SAMPLES, (time.perf_counter() - start) / SAMPLING_SHARE)


def _read_share(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except psutil.Error:
        return 0


def time_in_turn(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each function. They are called in turn, so that a busy moment affects all of them.

    The first call of each is not counted.
    """
    seconds = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


def describe_machine() -> str:
    """Return processor, cores, memory, Python and torch in one line."""
    import torch

    names = [line.partition(":")[2].strip() for line in _read_lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = psutil.virtual_memory().total / 2**30
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (
        f"{names[0] if names else platform.processor()}, {len(psutil.Process().cpu_affinity())} cores, "
        f"{memory:.0f} GiB{gpu}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads"
    )


def _read_lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


def parse_with_settings(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line; `settings` are the flags of finestsam after a `--`."""
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    return argparse.Namespace(**vars(parser.parse_args(words[:end])), settings=words[end + 1 :])


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print an aligned table in Markdown."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    for line in lines:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")

"""Kill training runs, send them signals, fill their disk, and give broken files to every reader: `make faults`.

`python -m benchmarks.faults --only images yaml --images 500` runs only some kinds of faults, and fewer of one.

Every run is compared bit for bit with an unbroken run: weights, optimizer, best weights and metrics.csv. The commands
run in forks of this process, which has imported everything already, so that they start at once.
"""

import argparse
import csv
import ctypes
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.broken_files import BrokenFiles
from benchmarks.lying_servers import try_servers
from benchmarks.mutations import mutate_annotations, mutate_bytes
from finestsam.cli import main
from finestsam.data.synthetic import write_scenes
from finestsam.model.architectures import build_sam
from finestsam.training.checkpoint import load_state
from finestsam.training.train import train

EPOCHS = 30
SECONDS_TO_STOP = 20  # long enough for a busy machine
SECONDS_TO_CHECK = 30
PEAK_BYTES = 2_000_000_000  # largest peak of a process that reads broken files
CHECK_BYTES = 2_000_000_000  # memory that a check may take, in addition to that of this process
IMAGE_KINDS = (("PNG", {}), ("JPEG", {}), ("GIF", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {}))
PARTS = ("last.ckpt", "best.pth", "rows", "names")  # the parts of a finished run that are compared
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: orphaned processes become children of this one, so it can count them


@dataclass
class End:
    """How a process ended."""

    code: int  # exit code; -n: ended by signal n
    seconds: float
    peak_bytes: int
    output: str
    left: int  # number of its child processes that outlived it


@dataclass
class Findings:
    """The problems that were found, one line each."""

    lines: list[str] = field(default_factory=list)

    def expect(self, is_right: bool, line: str) -> None:
        if not is_right:
            self.lines.append(line)
            print(f"  WRONG: {line}", flush=True)


def run_apart(
    arguments: list[str],
    limits: dict[int, int] | None = None,
    number: int | None = None,
    delay: float = 0.0,
    seconds: float = 300.0,
) -> End:
    """Run the command in a fork of this process.

    Args:
        limits: for `resource.setrlimit`.
        number: a signal that is sent after `delay` seconds.
        seconds: time limit, after which the command is killed.
    """
    with tempfile.TemporaryFile("w+") as output:
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _become_command(arguments, output, limits or {})
        is_sent = number is None
        while True:
            ended, status, usage = os.wait4(pid, os.WNOHANG)
            passed = time.monotonic() - start
            if ended:
                break
            if not is_sent and passed >= delay:
                is_sent = True
                os.kill(pid, number)
            if passed > seconds:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        left = _count_orphans()
        output.seek(0)
        return End(os.waitstatus_to_exitcode(status), passed, usage.ru_maxrss * 1024, output.read(), left)


def _become_command(arguments: list[str], output: io.TextIOBase, limits: dict[int, int]) -> None:
    os.setsid()
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, errors="backslashreplace")
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))
    sys.argv = ["finestsam", *arguments]
    code = 1
    try:
        code = main()
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(code)


def _count_orphans() -> int:
    """Wait five seconds for orphaned processes to end; kill and count those that do not."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return 0
        if pid == 0:
            time.sleep(0.02)
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
        os.waitpid(int(child), 0)
    return len(children)


class BrokenRuns:
    """One dataset, one unbroken run on it, and broken runs that must end with the same result."""

    def __init__(self, folder: Path, findings: Findings, generator: np.random.Generator):
        self.folder, self.findings, self.generator = folder, findings, generator
        self.dataset = write_scenes(folder / "dataset", count=6, seed=1, size=(96, 96))
        end = run_apart(self.list_arguments("unbroken"))
        findings.expect(end.code == 0, f"the unbroken run ended with {end.code}: {end.output[-500:]}")
        self.seconds = end.seconds
        print(f"unbroken run: {EPOCHS} epochs in {end.seconds:.1f} s", flush=True)

    def list_arguments(self, name: str) -> list[str]:
        """Return the arguments that start a run, or resume it if it exists."""
        run = self.folder / name
        if (run / "config.yaml").is_file():
            return ["--mode=train", f"--resume={run}"]
        return [
            "--mode=train", f"--dataset={self.dataset}", "--model.type=vit_tiny_test", f"--sav_dir={self.folder}",
            "--device=cpu", "--num_devices=1", "--num_workers=2", f"--num_epochs={EPOCHS}", "--model.checkpoint=none",
            "--model_layer.freeze.image_encoder=false", "--model_layer.freeze.prompt_encoder=false", "--save_top_k=2",
            "--opt.learning_rate=1e-3", "--dataset.val_size=0.4", "--generator.points_per_side=4", f"--run_name={name}",
            "--best_metric=val_per_mask_iou",
        ]  # fmt: skip

    def sample_moment(self) -> float:
        """Return random seconds after which to stop a run. Most lie before its end, on any machine."""
        return self.generator.uniform(0.2, 0.4 * self.seconds)

    def finish(self, name: str) -> None:
        """Resume a run to its end, and compare it with the unbroken run."""
        end = run_apart(self.list_arguments(name))
        self.findings.expect(end.code == 0, f"{name} could not be continued: {end.output[-500:]}")
        if end.code == 0:
            for difference in compare_runs(self.folder / "unbroken", self.folder / name):
                self.findings.expect(False, f"{name}: {difference}")
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def kill(self, count: int) -> str:
        """Kill runs at `count` random moments, resume them each time, and compare each finished run."""
        moments, finished = Counter(), 0
        while moments.total() < count:
            end = run_apart(self.list_arguments("killed"), number=signal.SIGKILL, delay=self.sample_moment())
            self.findings.expect(
                end.code in (-signal.SIGKILL, 0), f"killed: ended with {end.code}: {end.output[-500:]}"
            )
            self.findings.expect(end.left == 0, f"killed: {end.left} processes were left")
            if end.code == 0:  # it finished before the kill
                self.finish("killed")
                finished += 1
            else:
                moments[describe_moment(self.folder / "killed")] += 1
        self.finish("killed")
        shown = ", ".join(f"{number} {name}" for name, number in sorted(moments.items()))
        return f"{moments.total()} kills in {finished + 1} runs: {shown}"

    def signal(self, count: int) -> str:
        """Send signals at random moments. The run must stop soon, and continue to the same result."""
        codes, slowest, finished = Counter(), 0.0, 0
        while codes.total() < count:
            number = int(self.generator.choice([signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]))
            delay = self.sample_moment()
            end = run_apart(self.list_arguments("signalled"), number=number, delay=delay)
            if end.code == 0:  # it finished before the signal
                self.finish("signalled")
                finished += 1
                continue
            codes[end.code] += 1
            slowest = max(slowest, end.seconds - delay)
            self.findings.expect(end.code == 128 + number, f"signal {number}: ended with {end.code}: {end.output}")
            self.findings.expect(end.seconds - delay < SECONDS_TO_STOP, f"signal {number}: {end.seconds - delay:.1f} s")
            self.findings.expect("Traceback" not in end.output, f"signal {number}: {end.output[-800:]}")
            self.findings.expect(end.left == 0, f"signal {number}: {end.left} processes were left")
        self.finish("signalled")
        found = ", ".join(f"{number} x {code}" for code, number in sorted(codes.items()))
        return f"{count} signals in {finished + 1} runs; exit codes {found}; the slowest stop took {slowest:.1f} s"

    def fill_disk(self, count: int) -> str:
        """Limit the size of files at random. Old files must stay complete; without the limit the run must go on."""
        codes = Counter()
        # No workers: the limit would also apply to their shared memory, which a full disk does not affect.
        flags = ["--num_epochs=4", "--num_workers=0"]
        run_apart([*self.list_arguments("short"), *flags])
        for number in range(count):
            name = f"full_{number}"
            run_apart([*self.list_arguments(name), *flags, f"--max_steps={self.generator.integers(1, 12)}"])
            limit = int(10 ** self.generator.uniform(3.5, 6.5))
            end = run_apart([*self.list_arguments(name), *flags, "--max_steps=0"], {resource.RLIMIT_FSIZE: limit})
            codes[end.code] += 1
            self.findings.expect(end.code in (0, 2), f"disk of {limit} bytes: ended with {end.code}: {end.output}")
            self.findings.expect("Traceback" not in end.output, f"disk of {limit} bytes: {end.output[-800:]}")
            self._check_files(self.folder / name, limit)
            end = run_apart([*self.list_arguments(name), *flags, "--max_steps=0"])
            # The only allowed loss is that of best weights that could not be saved. They are reported again.
            is_reported = end.code == 2 and "best.pth does not hold the best weights" in end.output
            self.findings.expect(end.code == 0 or is_reported, f"after a disk of {limit} bytes: {end.output[-500:]}")
            for difference in compare_runs(self.folder / "short", self.folder / name, ["last.ckpt"]):
                self.findings.expect(False, f"after a disk of {limit} bytes: {difference}")
            shutil.rmtree(self.folder / name)
        return f"{count} full disks; exit codes {', '.join(f'{amount} x {code}' for code, amount in codes.items())}"

    def _check_files(self, run: Path, limit: int) -> None:
        try:
            load_state(run)
            torch.load(run / "best.pth", weights_only=True)
        except Exception as error:  # any exception is a finding
            self.findings.expect(False, f"disk of {limit} bytes: {error}")
        partial = [path.name for path in run.glob(".*.tmp")]
        self.findings.expect(not partial, f"disk of {limit} bytes: {partial} left")


def train_briefly(folder: Path) -> Path:
    """Train for one epoch, and return the folder of the run."""
    dataset = write_scenes(folder / "scenes", count=3, seed=4, size=(96, 96))
    end = run_apart(list_training_arguments(dataset, folder, "brief", "--num_epochs=1"))
    assert end.code == 0, end.output
    return folder / "brief"


def list_training_arguments(dataset: Path, sav_dir: Path, name: str, *flags: str) -> list[str]:
    """Return the arguments of a short training of the smallest model."""
    return [
        "--mode=train", f"--dataset={dataset}", "--model.type=vit_tiny_test", f"--sav_dir={sav_dir}",
        f"--run_name={name}", "--device=cpu", "--num_devices=1", "--num_workers=0", "--model.checkpoint=none",
        "--dataset.val_size=0.25", "--generator.points_per_side=4", *flags,
    ]  # fmt: skip


class Pairs:
    """Two processes at once that use the same folder, run name, store or cache."""

    def __init__(self, folder: Path, findings: Findings):
        self.folder, self.findings = folder / "pairs", findings

    def run(self, count: int) -> str:
        """Run every kind of pair `count` times. The second process starts a little later each time."""
        self.dataset = write_scenes(self.folder / "dataset", count=4, seed=3, size=(96, 96))
        self.images = self.dataset / "data" / "images"
        self.weights = [self._write_weights(seed) for seed in range(2)]
        self.alone = [self._predict_alone(weights) for weights in self.weights]
        codes = Counter()
        for number in range(count):
            delay = 0.5 * number / count
            for work in (self._share_out_dir, self._share_run_name, self._share_store, self._share_cache):
                ends = work(self.folder / f"{work.__name__}_{number}", delay)
                codes[f"{work.__name__.removeprefix('_share_')} {sorted(end.code for end in ends)}"] += 1
                for end in ends:
                    self.findings.expect(end.code in (0, 2), f"{work.__name__}: ended with {end.code}: {end.output}")
                    self.findings.expect("Traceback" not in end.output, f"{work.__name__}: {end.output[-800:]}")
        return f"{4 * count} pairs: {', '.join(f'{amount} x {code}' for code, amount in sorted(codes.items()))}"

    def _write_weights(self, seed: int) -> Path:
        torch.manual_seed(seed)
        sam = build_sam("vit_tiny_test")
        for weight in sam.image_encoder.parameters():
            if not weight.count_nonzero():
                torch.nn.init.normal_(weight, std=0.3)
        torch.save(sam.state_dict(), self.folder / f"{seed}.pth")
        return self.folder / f"{seed}.pth"

    def _predict(self, weights: Path, out_dir: Path, *flags: str) -> list[str]:
        return [
            "--mode=predict", "--input", str(self.images), f"--model.checkpoint={weights}", f"--out_dir={out_dir}",
            "--device=cpu", "--generator.points_per_side=4", "--generator.pred_iou_thresh=0", "--precision=32-true",
            "--generator.stability_score_thresh=0", "--generator.box_nms_thresh=1", *flags,
        ]  # fmt: skip

    def _predict_alone(self, weights: Path) -> list:
        out_dir = self.folder / f"alone_{weights.stem}"
        end = run_apart(self._predict(weights, out_dir))
        self.findings.expect(end.code == 0, f"predict alone ended with {end.code}: {end.output[-500:]}")
        return read_found(out_dir)

    def _share_out_dir(self, folder: Path, delay: float) -> list[End]:
        ends = run_pair([self._predict(weights, folder) for weights in self.weights], delay)
        self.findings.expect(any(end.code == 0 for end in ends), f"out_dir: both failed: {ends[0].output[-500:]}")
        self.findings.expect(read_found(folder) in self.alone, "out_dir: the masks are of neither model alone")
        return ends

    def _share_run_name(self, folder: Path, delay: float) -> list[End]:
        arguments = list_training_arguments(self.dataset, folder, "one", "--num_epochs=2")
        ends = run_pair([arguments, arguments], delay)
        codes = sorted(end.code for end in ends)
        self.findings.expect(codes == [0, 2], f"run_name: ended with {codes}: {ends[0].output[-300:]}")
        rows = len(read_rows(folder / "one"))
        self.findings.expect(rows == 3, f"run_name: {rows} rows in metrics.csv, expected 3")
        return ends

    def _share_store(self, folder: Path, delay: float) -> list[End]:
        folder.mkdir()
        flags = f"--store.folder={folder / 'store'}"
        jobs = [self._predict(self.weights[0], folder / name, flags) for name in ("first", "second")]
        ends = run_pair(jobs, delay)
        for name in ("first", "second"):
            self.findings.expect(read_found(folder / name) == self.alone[0], f"store: {name} found other masks")
        return ends

    def _share_cache(self, folder: Path, delay: float) -> list[End]:
        before = os.environ["FINESTSAM_CACHE"]
        os.environ["FINESTSAM_CACHE"] = str(folder / "cache")
        outs = [folder / "first", folder / "second"]
        jobs = [["--mode=check", f"--dataset={self.dataset}", f"--out_dir={out}", "--check.samples=0"] for out in outs]
        ends = run_pair(jobs, delay)
        os.environ["FINESTSAM_CACHE"] = before
        reports = [(out / "dataset_report.json").read_text() for out in outs]
        self.findings.expect(reports[0] == reports[1], "cache: two checks of one dataset differ")
        return ends


def run_pair(jobs: list[list[str]], delay: float) -> list[End]:
    """Run two commands at once, the second `delay` seconds after the first."""
    begun = []
    for arguments in jobs:
        output = tempfile.TemporaryFile("w+")  # noqa: SIM115, it is read after its process has ended
        pid = os.fork()
        if pid == 0:
            _become_command(arguments, output, {})
        begun.append((pid, output, time.monotonic()))
        time.sleep(delay)
    ends = []
    for pid, output, start in begun:
        _, status, usage = os.wait4(pid, 0)
        output.seek(0)
        code, seconds = os.waitstatus_to_exitcode(status), time.monotonic() - start
        ends.append(End(code, seconds, usage.ru_maxrss * 1024, output.read(), 0))
        output.close()
    return ends


def read_found(out_dir: Path) -> list:
    """Return the masks and scores of a prediction, without its settings."""
    path = out_dir / "predictions.json"
    if not path.is_file():
        return []
    content = json.loads(path.read_text())
    return [(found["image_id"], found["segmentation"], found["score"]) for found in content["annotations"]]


def describe_moment(run: Path) -> str:
    """Return what a killed run was doing, judged by its files."""
    if not (run / "config.yaml").is_file():
        return "before the run's folder"
    if any(run.glob(".*.tmp")):
        return "while saving"
    return "between two checkpoints" if (run / "last.ckpt").is_file() else "before the first checkpoint"


def compare_runs(first: Path, second: Path, parts: Sequence[str] = PARTS) -> list[str]:
    """Return the differences between two finished runs."""
    differences = []
    states = [load_state(run) for run in (first, second)]
    if "last.ckpt" in parts:
        differences += [
            f"{part} differ"
            for part in ("model", "optimizer", "scheduler")
            if not is_same(*(state[part] for state in states))
        ]
    if "best.pth" in parts:
        best = [torch.load(run / "best.pth", weights_only=True) for run in (first, second)]
        differences += [] if is_same(*best) else ["best.pth differs"]
    if "rows" in parts and read_rows(first) != read_rows(second):
        differences.append("metrics.csv differs")
    names = [sorted(path.name for path in run.iterdir() if path.name != "last.prev.ckpt") for run in (first, second)]
    if "names" in parts and names[0] != names[1]:
        differences.append(f"files differ: {set(names[0]) ^ set(names[1])}")
    return differences


def is_same(first: object, second: object) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(is_same(value, second[key]) for key, value in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(is_same, first, second))
    return first == second


def read_rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return [
            {name: value for name, value in row.items() if not name.endswith("seconds")} for row in csv.DictReader(file)
        ]


class Fuzz:
    """Randomly broken datasets. The command checks each in a process with limited memory."""

    def __init__(self, folder: Path, findings: Findings, generator: np.random.Generator):
        self.folder, self.findings, self.generator = folder / "fuzz", findings, generator
        self.dataset = write_scenes(self.folder / "dataset", count=3, seed=2, size=(96, 96)) / "data"
        self.annotations = self.dataset / "annotations.json"
        self.content = json.loads(self.annotations.read_text())

    def break_annotations(self, count: int) -> str:
        def write() -> bytes:
            broken = mutate_annotations(self.content, self.generator)
            self.annotations.write_bytes(broken)
            return broken

        return self._check_all("annotation files", count, write)

    def break_dataset_images(self, count: int) -> str:
        self.annotations.write_text(json.dumps(self.content))
        path = self.dataset / "images" / self.content["images"][0]["file_name"]
        whole = Image.open(path).convert("RGB")
        whole.load()

        def write() -> bytes:
            kind, options = IMAGE_KINDS[self.generator.integers(len(IMAGE_KINDS))]
            data = io.BytesIO()
            whole.save(data, format=kind, **options)
            broken = mutate_bytes(data.getvalue(), self.generator)
            path.write_bytes(broken)
            return broken

        return self._check_all("dataset_images", count, write)

    def _check_all(self, title: str, count: int, write: Callable[[], bytes]) -> str:
        own_bytes = 1024 * int(Path("/proc/self/status").read_text().split("VmSize:")[1].split()[0])
        limits = {resource.RLIMIT_AS: own_bytes + CHECK_BYTES}
        arguments = ["--mode=check", f"--dataset={self.dataset}", f"--out_dir={self.folder / 'out'}"]
        arguments += ["--check.samples=0", "--dataset.use_cache=false"]
        codes, slowest, peak = Counter(), 0.0, 0
        for number in range(count):
            broken = write()
            end = run_apart(arguments, limits, seconds=SECONDS_TO_CHECK)
            codes[end.code] += 1
            slowest, peak = max(slowest, end.seconds), max(peak, end.peak_bytes)
            is_right = end.code in (0, 2) and "Traceback" not in end.output
            if not is_right:
                kept = Path(tempfile.gettempdir()) / f"broken_{title.split()[0]}_{number}"
                kept.write_bytes(broken)
                self.findings.expect(False, f"{kept}: ended with {end.code}: {end.output[-800:]}")
        shown = ", ".join(f"{number} x {code}" for code, number in sorted(codes.items()))
        return f"{count} {title}; exit codes {shown}; slowest {slowest:.1f} s, peak {peak / 1e6:.0f} MB"


# By kind: the number of faults to try.
COUNTS = {
    "kills": 30, "signals": 30, "disks": 6, "annotations": 1000, "dataset_images": 300, "images": 5000,
    "checkpoints": 1000, "yaml": 500, "outlines": 100, "servers": 100, "pairs": 4,
}  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, count in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--only", nargs="+", choices=COUNTS, default=list(COUNTS), help="kinds of faults to try")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def run() -> int:
    """Run all kinds of faults, print the results, and return 1 if there was a problem."""
    arguments = parse_arguments()
    torch.set_num_threads(1)
    assert train  # imported before forking, so that every fork has it
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    generator, findings = np.random.default_rng(arguments.seed), Findings()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        os.environ["FINESTSAM_CACHE"] = str(Path(name) / "cache")
        folder = Path(name)
        wanted = {kind: getattr(arguments, kind) for kind in arguments.only if getattr(arguments, kind)}
        runs = BrokenRuns(folder, findings, generator) if {"kills", "signals", "disks"} & {*wanted} else None
        fuzz, broken, pairs = (
            Fuzz(folder, findings, generator),
            BrokenFiles(folder, generator, train_briefly),
            Pairs(folder, findings),
        )
        works = {
            "kills": lambda count: runs.kill(count),
            "signals": lambda count: runs.signal(count),
            "disks": lambda count: runs.fill_disk(count),
            "annotations": fuzz.break_annotations,
            "dataset_images": fuzz.break_dataset_images,
            "images": broken.read_images,
            "checkpoints": broken.read_checkpoints,
            "yaml": broken.read_yaml,
            "outlines": broken.read_outlines,
            "servers": lambda count: try_servers(folder, findings, generator, count),
            "pairs": pairs.run,
        }
        for kind, count in wanted.items():
            result = works[kind](count)
            if isinstance(result, tuple):
                title, tally = result
                for line in tally.wrong:
                    findings.expect(False, line)
                findings.expect(tally.peak_bytes < PEAK_BYTES, f"{title}: {tally.peak_bytes / 1e6:.0f} MB")
                result = tally.describe(title)
            print(result, flush=True)
    print(f"{len(findings.lines)} problems, in {time.monotonic() - start:.0f} s")
    return min(len(findings.lines), 1)


if __name__ == "__main__":
    sys.exit(run())

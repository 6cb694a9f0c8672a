"""The runs of a suite, each in a process of its own; what is finished is never run again."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from crd.bench.suite import Run
from crd.errors import CRDError
from crd.recipe import dump_config
from crd.run_folder import RunFolder

POLL = 0.2  # seconds
TAIL = 15  # lines of the log of a failed run
PROBLEMS = (CRDError, OSError)  # what may be wrong with one run while others go on; OSError: a full disk, say
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TQDM_MININTERVAL": "10"}


def log_file(run: Run) -> Path:
    return run.folder.parent / f"{run.folder.name}.log"


def is_finished(run: Run) -> bool:
    """Whether the run has its result; raises CRDError if its folder belongs to other settings."""
    folder = RunFolder(run.folder)
    folder.open(run.config, write=False)
    if not (folder.result(run.config).exists() and folder.summary.exists()):
        return False
    try:
        summary, asked = json.loads(folder.summary.read_text()), run.config.train.epochs
    except ValueError:  # half of it: `crd train` writes it again
        return False
    if summary["epochs"] > asked:
        raise CRDError(f"{run.folder} was trained for {summary['epochs']} epochs, more than the {asked} asked for now.")
    halted = run.config.alarm.action != "flag" and bool(summary["alarms"])  # its end comes before the last epoch
    return halted or summary["epochs"] == asked


def epochs_done(run: Run) -> int:
    """Epochs in the record of a run."""
    path = RunFolder(run.folder).metrics
    return path.read_bytes().count(b'{"kind": "train"') if path.exists() else 0


def state(run: Run) -> str:
    """How far a run is, in words."""
    try:
        return "finished" if is_finished(run) else f"{epochs_done(run)} of {run.config.train.epochs} epochs"
    except PROBLEMS as error:
        return str(error)


def tail(path: Path) -> str:
    """The last lines of a log; a progress bar, which rewrites its line, counts as its last state."""
    text = path.read_bytes().decode(errors="replace")  # read_text() would make lines of a bar's states
    lines = [line.rstrip().rsplit("\r", 1)[-1] for line in text.split("\n")]
    return "\n".join(f"    {line}" for line in [line for line in lines if line][-TAIL:])


@dataclass(frozen=True)
class Child:
    run: Run
    gpu: str | None
    process: subprocess.Popen[bytes]
    began: float


def gpus() -> list[str]:
    """The GPUs of this machine, as CUDA_VISIBLE_DEVICES names them; none where there is no GPU."""
    import torch  # here, since it takes seconds to load

    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def start(run: Run, gpu: str | None = None) -> Child:
    """Starts ``crd train`` on the written settings, on one GPU; raises CRDError if another process is at work on the run."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with log_file(run).open("ab") as log:
        try:
            # the child inherits the lock with the file: it lasts as long as the child, whatever becomes of this process
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CRDError("another process is at work on this run. Wait for it or end it, then run the suite again.") from None
        recipe = run.folder.parent / f"{run.folder.name}.yaml"
        recipe.write_text(dump_config(run.config))
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "crd", "train", str(recipe)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ONE_THREAD, **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})},
            process_group=0,  # else a Ctrl-C would reach it from the terminal and from us, which means: stop at once
        )
    return Child(run, gpu, process, time.monotonic())


class Pool:
    """Runs as subprocesses, ``workers`` at a time (default: one per GPU or CPU core), under one bar over all their epochs."""

    def __init__(self, runs: list[Run], workers: int | None):
        self.runs, self.gpus = runs, gpus()
        self.workers = workers or len(self.gpus) or os.cpu_count() or 1
        self.failed: list[str] = []
        self.finished: list[Run] = []
        self.waiting: list[Run] = []
        self.children: list[Child] = []
        self.asked = self.told = 0  # interrupts that came, and that the children were told of

    def work(self) -> bool:
        """Runs what is not finished; whether it came to its end, failures included, without being interrupted."""
        total = sum(run.config.train.epochs for run in self.runs)
        self._sort()
        interval = 1 if sys.stderr.isatty() else 60  # seconds; in a file every state of the bar is a line
        with self._listening(), tqdm(total=total, initial=self._epochs(), unit="epoch", smoothing=0, mininterval=interval) as bar:
            try:
                while self.children or (self.waiting and not self.asked):
                    self._fill()
                    time.sleep(POLL)
                    self._pass_on()
                    self._reap()
                    bar.set_postfix(finished=f"{len(self.finished)}/{len(self.runs)}", failed=len(self.failed), refresh=False)
                    bar.update(self._epochs() - bar.n)
            finally:
                self._end()
        return not self.asked

    def _sort(self) -> None:
        for run in self.runs:
            try:
                (self.finished if is_finished(run) else self.waiting).append(run)
            except PROBLEMS as error:
                self._fail(run, str(error))

    def _epochs(self) -> int:
        done = sum(run.config.train.epochs for run in self.finished)
        return done + sum(epochs_done(run) for run in [*self.waiting, *(child.run for child in self.children)])

    def _fill(self) -> None:
        while self.waiting and len(self.children) < self.workers and not self.asked:
            run = self.waiting.pop(0)
            try:
                self.children.append(start(run, self._free_gpu()))
            except PROBLEMS as error:
                self._fail(run, str(error))

    def _free_gpu(self) -> str | None:
        """The GPU with the fewest runs on it."""
        taken = [child.gpu for child in self.children]
        return min(self.gpus, key=taken.count, default=None)

    def _reap(self) -> None:
        for child in [child for child in self.children if child.process.poll() is not None]:
            self.children.remove(child)
            run, log = child.run, log_file(child.run)
            try:
                finished = is_finished(run)
            except PROBLEMS as error:
                self._fail(run, str(error))
                continue
            if finished and not child.process.returncode:
                self.finished.append(run)
                reward = json.loads(RunFolder(run.folder).summary.read_text())["after"]["reward"]
                tqdm.write(f"finished  {run.name}: reward {reward:.3f}, {time.monotonic() - child.began:.0f} s")
            elif not self.asked:
                self._fail(run, f"exit code {child.process.returncode}, the end of {log}:\n{tail(log)}")

    def _fail(self, run: Run, why: str) -> None:
        self.failed.append(run.name)
        tqdm.write(f"failed    {run.name}: {why}")

    def _pass_on(self) -> None:
        """Tells the children of an interrupt: of the first they save and stop after their epoch, of the second at once."""
        if self.asked > self.told:
            for child in self.children:
                child.process.send_signal(signal.SIGINT)
            tqdm.write("Stopping: each run ends its epoch and saves. Press Ctrl-C again to stop at once.")
            self.told = self.asked

    def _end(self) -> None:
        """Leaves no child behind if something unforeseen ends this process."""
        for child in self.children:
            child.process.send_signal(signal.SIGINT)
        for child in self.children:
            child.process.wait()

    @contextmanager
    def _listening(self) -> Iterator[None]:
        def handle(number: int, frame: Any) -> None:
            self.asked += 1

        previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

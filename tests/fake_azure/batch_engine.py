"""Azure's batch engine on this machine: a scoring script in several processes, over files, with retries."""

import json
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from .inference_server import container_environment


class BatchSettings(NamedTuple):
    """A deployment's settings, as azureml/batch-deployment.yml explains them."""

    processes: int = 1
    """instance_count times max_concurrency_per_instance"""
    mini_batch_size: int = 1
    max_retries: int = 3
    timeout: float = 1800
    error_threshold: int = 0


class MiniBatchFailed(Exception):
    """`run()` raised an exception, or its process died or was killed. The message says which."""


class BatchJob(threading.Thread):
    """A scoring script over files, as Azure runs it: what `run()` returns is appended to one file. Call `start()`.

    A mini-batch that fails is tried again, by any process, and its rows are those of the one try that succeeds. The job
    fails when more files than `error_threshold` have failed in all tries; then there is no result.

    Args:
        root: the folder of the code.
        script: the scoring script, its path in that folder.
        files: the input. Each mini-batch gets `mini_batch_size` of them.
        output: the file for the rows: no header, mini-batches in any order.
        settings: see there.
        environment: variables for the processes, AZUREML_MODEL_DIR among them.
        log: the file that gets what the processes write, and why mini-batches failed.
    """

    def __init__(
        self,
        root: Path,
        script: str,
        files: list[Path],
        output: Path,
        settings: BatchSettings,
        environment: dict[str, str],
        log: Path,
    ) -> None:
        super().__init__(daemon=True)
        self.status = "Running"
        """Running, Completed, Failed or Canceled."""
        self.failures = 0
        """Tries that failed."""
        self.root, self.script, self.log, self._output, self._settings = root, script, log, output, settings
        # On Azure each process has a machine for itself, or a GPU; here they share the cores.
        threads = str(max(1, (os.cpu_count() or 1) // settings.processes))
        defaults = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": threads}
        self.environment = container_environment() | defaults | environment
        size = settings.mini_batch_size
        batches = [[str(file) for file in files[start : start + size]] for start in range(0, len(files), size)]
        self._waiting = deque((batch, 0) for batch in batches)
        self._unfinished = len(batches)
        self._failed_files = 0
        self._rows: list[list[str]] = []
        self._lock = threading.Lock()
        self.processes: set[int] = set()
        """The ids of the processes that run."""
        self._canceled = threading.Event()

    def run(self) -> None:
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self._settings.processes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._too_many_failed():
            self.status = "Failed"
        elif self._unfinished:
            self.status = "Canceled"
        else:
            random.Random(0).shuffle(self._rows)
            self._output.parent.mkdir(parents=True)
            self._output.write_text("".join(f"{row}\n" for rows in self._rows for row in rows))
            self.status = "Completed"

    def cancel(self) -> None:
        """End the processes and return when they have ended."""
        self._canceled.set()
        self.join()

    def _too_many_failed(self) -> bool:
        return 0 <= self._settings.error_threshold < self._failed_files

    def over(self) -> bool:
        return self._canceled.is_set() or self._too_many_failed() or not self._unfinished

    def _work(self) -> None:
        """Keep one process busy until the job is over, and start another one when it dies."""
        worker = None
        while not self.over():
            with self._lock:
                mini_batch, failed = self._waiting.popleft() if self._waiting else (None, 0)
            if mini_batch is None:
                time.sleep(0.05)  # another process may fail, and leave its mini-batch to this one
                continue
            try:
                worker = worker or _Worker(self)
                rows = worker.score(mini_batch, self._settings.timeout)
            except MiniBatchFailed as failure:
                with self._lock:
                    self._retry(mini_batch, failed + 1, str(failure))
                if worker and not worker.alive():
                    worker = None
            else:
                with self._lock:
                    self._rows.append(rows)
                    self._unfinished -= 1
        if worker:
            worker.stop()

    def _retry(self, mini_batch: list[str], failed: int, reason: str) -> None:
        self.failures += 1
        with self.log.open("a") as log:
            log.write(f"try {failed} of {', '.join(mini_batch)} failed: {reason}\n")
        if failed <= self._settings.max_retries:
            self._waiting.append((mini_batch, failed))
        else:
            self._failed_files += len(mini_batch)
            self._unfinished -= 1


class _Worker:
    """A process with the script. Made when `init()` has run; raises MiniBatchFailed if it hasn't in ten minutes."""

    def __init__(self, job: BatchJob) -> None:
        self._job = job
        reading, writing = os.pipe()
        # -P: this folder is not to be on the script's path.
        worker = Path(__file__).with_name("batch_worker.py")
        command = [sys.executable, "-P", str(worker), str(job.root), job.script, str(writing)]
        with job.log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                cwd=job.root,
                env=job.environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[writing],
                start_new_session=True,
                text=True,
            )
        os.close(writing)
        self._answers = os.fdopen(reading)
        job.processes.add(self._process.pid)
        self._answer(600)

    def alive(self) -> bool:
        return self._process.poll() is None

    def score(self, mini_batch: list[str], timeout: float) -> list[str]:
        """Return the rows of a mini-batch. Raises MiniBatchFailed, also when the job is over."""
        with suppress(BrokenPipeError):  # it is dead, and that is what comes instead of an answer
            self._process.stdin.write(json.dumps(mini_batch) + "\n")
            self._process.stdin.flush()
        return self._answer(timeout)

    def _answer(self, timeout: float) -> list[str]:
        end = time.monotonic() + timeout
        while not select.select([self._answers], [], [], 0.1)[0]:
            if time.monotonic() > end or self._job.over():
                self.stop()
                raise MiniBatchFailed(f"no answer in {timeout} s, or nobody waits for it: the process was killed")
        answer = self._answers.readline()
        if not answer.endswith("\n"):
            self.stop()
            raise MiniBatchFailed(f"the process ended with {self._process.returncode}")
        answer = json.loads(answer)
        if "error" in answer:
            raise MiniBatchFailed(answer["error"])
        return answer["rows"]

    def stop(self) -> None:
        if self.alive():
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._job.processes.discard(self._process.pid)
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._answers.close()

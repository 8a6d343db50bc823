"""How a batch job scales with its processes on this machine: `python tests/batch_scaling.py [SHARDS [PAIRS]]`.

The real script on the stand-in, or the model in the folder RERANKER_MODEL, over the same shards with 1, 2 and 4
processes. Each has one thread, as if it had a core, or a machine, of its own. The last run is one process with a thread
for each core, which is how a machine without a GPU is used by azureml/batch-deployment.yml.

What limits it, two bare loops show: matrix products that stay in a core's cache, and sums over more memory than any
cache holds, in 1 and in 2 processes. Where the second grows less than the first, processes share the memory's speed.
"""

import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fake_azure import BatchJob, BatchSettings

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "data" / "python_faq"

# The real script. Its processes wait for each other, so that only work is measured, and not how long a start takes.
TOGETHER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {folder!r})
import batch_score
run, ready = batch_score.run, Path(__file__ + ".ready")

def init():
    batch_score.init()
    ready.mkdir(exist_ok=True)
    (ready / str(os.getpid())).touch()
    while len(list(ready.iterdir())) < {processes}:
        time.sleep(0.01)
"""

LOOP = """
import sys, time, torch
torch.set_num_threads(1)
matrix, vector = torch.randn(256, 256), torch.randn(2**24)
operation = (lambda: matrix @ matrix) if sys.argv[1] == "products" else (lambda: vector.add_(1))
operation()
time.sleep(max(0, float(sys.argv[2]) - time.time()))
end, count = time.perf_counter() + 3, 0
while time.perf_counter() < end:
    operation()
    count += 1
print(count)
"""


def loops(kind: str, processes: int) -> int:
    """Return how many operations so many processes do together in three seconds."""
    together = str(time.time() + 10)
    command = [sys.executable, "-c", LOOP, kind, together]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    return sum(int(process.communicate()[0]) for process in running)


def write_shards(folder: Path, shards: int, pairs: int) -> list[Path]:
    """Write questions of the Python FAQ, each with ten of its answers."""
    texts = {
        name: [json.loads(line)["text"] for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("queries", "documents")
    }
    queries, documents = itertools.cycle(texts["queries"]), itertools.cycle(texts["documents"])
    files = []
    for shard in range(shards):
        lines = [
            {"id": f"{shard}-{number}", "query": next(queries), "documents": [next(documents)[:300] for _ in range(10)]}
            for number in range(pairs // 10)
        ]
        files.append(folder / f"{shard}.jsonl")
        files[-1].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return files


def seconds(folder: Path, files: list[Path], processes: int, threads: int) -> float:
    """Run a job, check its rows, and return how long it took when all processes had started."""
    name = f"{processes}-{threads}"
    model = os.environ.get("RERANKER_MODEL", "").strip() or str(ROOT / "tests" / "stand_in_model")
    environment = {"AZUREML_MODEL_DIR": model, "OMP_NUM_THREADS": str(threads), "RERANKER_DEVICE": "cpu"}
    output, log = folder / name / "scores.jsonl", folder / f"{name}.txt"
    script = folder / f"{name}.py"
    script.write_text(TOGETHER.format(folder=str(ROOT / "azureml_batch"), processes=processes))
    job = BatchJob(folder, script.name, files, output, BatchSettings(processes), environment, log)
    job.start()
    job.join()
    ended = time.time()
    assert job.status == "Completed", log.read_text()[-2000:]
    rows = [json.loads(row) for row in output.read_text().splitlines()]
    ids = {json.loads(line)["id"] for file in files for line in file.read_text().splitlines()}
    assert {row["id"] for row in rows} == ids
    assert len(rows) == 10 * len(ids)
    return ended - max(mark.stat().st_mtime for mark in Path(f"{script}.ready").iterdir())


def main(shards: int = 16, pairs: int = 20) -> None:
    match = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    print(f"{os.cpu_count()} cores, {match[1] if match else platform.processor()}; {shards} shards of {pairs} pairs")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_shards(folder, shards, pairs)
        alone = 0.0
        for processes, threads in [(1, 1), (2, 1), (4, 1), (1, os.cpu_count() or 1)]:
            took = seconds(folder, files, processes, threads)
            alone = alone or took
            speed = shards * pairs / took
            print(
                f"{processes} processes of {threads} threads: {took:6.1f} s, {speed:6.1f} pairs a second, "
                f"{alone / took:.2f} times one",
                flush=True,
            )

    for kind in ("products", "sums"):
        print(f"2 processes of bare {kind}: {loops(kind, 2) / loops(kind, 1):.2f} times one")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

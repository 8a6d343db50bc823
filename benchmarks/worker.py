"""One variant in a process of its own: loads it, then answers each line of JSON on stdin with one on stdout.

A process for each variant keeps their memory apart, and lets a variant have another environment. While one works, the
others sleep.
"""

import json
import os
import statistics
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = [
    "torch",
    "transformers",
    "tokenizers",
    "sentence-transformers",
    "FlagEmbedding",
    "rerankers",
    "optimum",
    "optimum-intel",
    "optimum-onnx",
    "onnxruntime",
    "openvino",
]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")  # libraries may print: their stdout becomes stderr
    os.dup2(2, 1)
    task = json.loads(sys.stdin.readline())
    import torch

    from benchmarks.variants import VARIANTS

    device, dtype = task["device"], task["dtype"]
    begin = time.perf_counter()
    run = VARIANTS[task["variant"]][0](task["model"], device, dtype)
    run(task["query"], task["documents"][:2])  # warm up
    reply(answers, load_seconds=time.perf_counter() - begin, threads=torch.get_num_threads(), versions=versions())
    for line in sys.stdin:
        order = json.loads(line)
        if order == "peak":
            reply(answers, gflops=matmul_peak(device, dtype, task["clock"]))
            continue
        forget_peak(device)
        begin, begin_cpu = time.perf_counter(), time.process_time()
        scores = run(task["query"], order)
        wall = time.perf_counter() - begin  # scores are Python floats: a GPU has finished
        cpu = time.process_time() - begin_cpu
        seconds = cpu if task["clock"] == "cpu" else wall
        reply(answers, seconds=seconds, wall_seconds=wall, scores=scores, peak_mb=peak(device))


def reply(answers, **fields: object) -> None:
    answers.write(json.dumps(fields) + "\n")
    answers.flush()


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def forget_peak(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> float | None:
    """Return the process's peak memory in MB since `forget_peak`, weights included; on a GPU, that of torch there."""
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return next(int(line.split()[1]) / 1000 for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def matmul_peak(device: str, dtype: str, clock: str) -> float:
    """Return the GFLOP/s of the fastest of torch's and oneDNN's products, over the model's shapes and generous batches,
    each the median of 9 runs."""
    import torch
    import torch.nn.functional as F

    now = time.process_time if clock == "cpu" else time.perf_counter
    routes = [F.linear]
    if device == "cpu" and dtype == "float32" and torch.backends.mkldnn.is_available():
        routes.append(lambda x, w, b: torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], ""))
    best = 0.0
    with torch.inference_mode():
        scale = 1 if device == "cpu" else 16  # a GPU needs more to be busy
        for rows, inner, outer in [(512, 1024, 1024), (2048, 1024, 1024), (2048, 1024, 4096), (2048, 4096, 1024)]:
            rows *= scale
            x, w, b = (
                torch.randn(size, device=device).to(getattr(torch, dtype))
                for size in [(rows, inner), (outer, inner), (outer,)]
            )
            for route in routes:
                seconds = []
                for _ in range(9):
                    begin = now()
                    route(x, w, b)
                    if device != "cpu":
                        torch.cuda.synchronize()
                    seconds.append(now() - begin)
                best = max(best, 2 * rows * inner * outer / statistics.median(seconds) / 1e9)
    return best


if __name__ == "__main__":
    main()

"""One run of one variant in a process of its own: a task in JSON on stdin, the answer in JSON as stdout's last line.

A process for each run keeps memory apart, and lets a variant have another environment.
"""

import json
import sys
import time
from importlib.metadata import distributions
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

from benchmarks.variants import VARIANTS
from reranker_helpers.products import linear

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PACKAGES = ["torch", "transformers", "tokenizers", "sentence-transformers", "FlagEmbedding", "rerankers"]
PACKAGES += ["optimum", "optimum-intel", "optimum-onnx", "onnxruntime", "openvino"]


def main() -> None:
    task = json.load(sys.stdin)
    device, peak_dtype, now = task["device"], task["peak_dtype"], CLOCKS[task["clock"]]
    run = VARIANTS[task["variant"]][0](task["model"], device, task["dtype"])
    run(task["query"], task["documents"][:2])  # warm up
    forget_peak_memory(device)
    found = {package.name: package.version for package in distributions()}
    versions = {name: found[name] for name in PACKAGES if name in found}
    begin = now()
    scores = run(task["query"], task["documents"])  # Python floats: a GPU has finished
    answer = {"seconds": now() - begin, "scores": scores, "peak_mb": peak_memory(device), "versions": versions}
    if peak_dtype:  # in the same minute: what the machine gives changes; and after, for its memory not to count
        answer["matmul_peak"] = matmul_peak(device, peak_dtype, now)
    print("\n" + json.dumps(answer))


def forget_peak_memory(device: str) -> None:
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: str) -> float:
    """Return the process's peak in MB since `forget_peak_memory`, weights included; on a GPU, that of torch there. 0
    where the system does not tell."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) / 1000 for line in lines if line.startswith("VmHWM"))


def matmul_peak(device: str, dtype: str, now) -> float:
    """Return the GFLOP/s of the fastest product, by the fastest route that the helper knows, over the model's shapes
    and generous batches, each the median of half a second."""
    timer = {"timer": now} if device == "cpu" else {}  # its own waits for the GPU
    best = 0.0
    for rows, inner, outer in [(512, 1024, 1024), (2048, 1024, 1024), (2048, 1024, 4096), (2048, 4096, 1024)]:
        rows *= 1 if device == "cpu" else 16  # a GPU needs more to be busy
        sizes = [(rows, inner), (outer, inner), (outer,)]
        operands = [torch.randn(size, device=device).to(getattr(torch, dtype)) for size in sizes]
        names = {"linear": linear, "operands": operands}
        product = Timer("linear(*operands)", globals=names, num_threads=torch.get_num_threads(), **timer)
        best = max(best, 2 * rows * inner * outer / product.blocked_autorange(min_run_time=0.5).median / 1e9)
    return best


if __name__ == "__main__":
    main()

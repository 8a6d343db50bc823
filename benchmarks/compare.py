"""Run `rerank` and its peers side by side: python -m benchmarks.compare --help

Only ratios are meant to be read. All variants run in turn, A B C A B C, each in its own process, so that whatever else
the machine does hits them alike; the ratio is of the medians.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import report
from benchmarks.variants import ON_A_GPU, VARIANTS
from benchmarks.workload import QUERY, ROOT, build_model, stretches, texts

RESULTS = Path(__file__).parent / "results"


class Worker:
    """A variant in a process of its own, or the reason why it can't be had."""

    def __init__(self, name: str, python: str, task: dict):
        self.name, self.error, self.runs = name, None, []
        self.stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process lives
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.worker"],
            cwd=ROOT,
            env=os.environ | ({"OMP_NUM_THREADS": str(task["threads"])} if task["threads"] else {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if task["verbose"] else self.stderr,
            text=True,
        )
        self.loaded = self._ask(task)

    def _ask(self, message: object) -> dict:
        if self.error:
            return {}
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            self.stderr.seek(0)
            said = self.stderr.read().strip().replace(str(ROOT), "...").splitlines()
            self.error = said[-1][:200] if said else "the process ended"
            return {}

    def run(self, documents: list[str]) -> dict:
        answer = self._ask(documents)
        if answer:
            self.runs.append(answer)
        return answer

    def matmul_peak(self) -> float:
        return self._ask("peak").get("gflops", float("nan"))

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.stderr.close()


def main() -> None:
    options = parse()
    if options.quick:
        options.layers, options.documents = 4, 40
    device = options.device
    usual = "float32" if device == "cpu" else "float16"
    model, note = build_model(options.layers)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    documents = texts(tokenizer, options.documents)
    result = {
        "date": datetime.date.today().isoformat(),
        "command": "python -m benchmarks.compare " + " ".join(sys.argv[1:]).replace(options.backends or "\0", "..."),
        "machine": machine(device),
        "model": note,
        "layers": options.layers,
        "device": device,
        "dtype": usual,
        "workload": describe(tokenizer, documents),
        "clock": options.clock,
        "rounds": options.rounds,
        "once": options.once,
        "variants": {},
    }
    names = options.variants or (list(VARIANTS) if device == "cpu" else ON_A_GPU)
    name = options.name or f"{'quick' if options.quick else f'{options.layers}-layers'}-{device}"
    path = RESULTS / f"{name}.json"
    RESULTS.mkdir(exist_ok=True)

    def save() -> None:
        path.write_text(json.dumps(result, indent=1) + "\n")
        report.write(path)

    if options.rounds:
        for so_far in side_by_side(names, model, documents, tokenizer, usual, options):
            result |= so_far
            save()  # a full run takes an hour, and may be cut off
    if options.scaling:
        result["scaling"] = scaling(model, tokenizer, usual, options)
        save()
    print(path.with_suffix(".md").read_text())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="4 layers and 40 documents, in under five minutes")
    parser.add_argument("--layers", type=int, default=24, help="of the model; default all 24")
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3, help="0 leaves the comparison out")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no new round after these")
    parser.add_argument("--variants", type=lambda text: text.split(","), help=f"default all: {','.join(VARIANTS)}")
    parser.add_argument("--once", type=lambda text: text.split(","), default=[], help="variants to run in round 1 only")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for float16 on a GPU")
    parser.add_argument("--threads", type=int, help="of torch; default one for each core")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: count CPU seconds, on a machine that others use"
    )
    parser.add_argument("--scaling", action="store_true", help="also time against number and length of documents")
    parser.add_argument("--backends", help="the Python of an environment with requirements-backends.txt")
    parser.add_argument("--name", help="of the result files")
    parser.add_argument("--verbose", action="store_true", help="show what the libraries print")
    options = parser.parse_args()
    unknown = {*(options.variants or []), *options.once} - set(VARIANTS)
    if unknown:
        parser.error(f"no such variants: {', '.join(sorted(unknown))}")
    return options


def start(name: str, model: str, documents: list[str], usual: str, options: argparse.Namespace) -> Worker:
    _, dtype, environment = VARIANTS[name]
    task = {
        "variant": name,
        "model": model,
        "device": options.device,
        "dtype": dtype or usual,
        "query": QUERY,
        "documents": documents,
        "verbose": options.verbose,
        "threads": options.threads,
        "clock": options.clock,
    }
    python = options.backends if environment == "backends" and options.backends else sys.executable
    worker = Worker(name, python, task)
    print(f"{name}: {worker.error or 'loaded in {load_seconds:.0f} s'.format(**worker.loaded)}", file=sys.stderr)
    return worker


def side_by_side(
    names: list[str], model: str, documents: list[str], tokenizer, usual: str, options: argparse.Namespace
) -> Iterator[dict]:
    """Run the variants in turn, and after each round yield all results so far."""
    workers = [start(name, model, documents, usual, options) for name in names]
    peaks = []
    measure = next((worker for worker in workers if worker.name == "rerank"), workers[0])
    needed = gflop(tokenizer, documents, options.layers)
    end = time.monotonic() + 60 * options.minutes
    for number in range(options.rounds):
        if number and time.monotonic() > end:
            break
        for worker in workers:
            if number and worker.name in options.once:
                continue
            if worker is measure:  # just before and after: what the machine gives changes within minutes
                peaks.append(measure.matmul_peak())
            seconds = worker.run(documents).get("seconds", float("nan"))
            print(f"round {number + 1}: {worker.name} {seconds:.2f} s", file=sys.stderr)
            if worker is measure:
                peaks.append(measure.matmul_peak())
        peak = statistics.median(peaks)
        scores = {worker.name: worker.runs[0]["scores"] for worker in workers if worker.runs}
        against = next((name for name in ("plain", "rerank") if name in scores), None)
        reference = scores.get(against)
        yield {
            "variants": {worker.name: summary(worker, documents, usual, needed, peak, reference) for worker in workers},
            "matmul_peak_gflops": peak,
            "reference": against,
            "gflop_needed": needed,
        }
    for worker in workers:
        worker.stop()


def summary(
    worker: Worker, documents: list[str], usual: str, needed: float, peak: float, reference: list[float] | None
) -> dict:
    """Return what the result file says of one variant. `needed` is in GFLOP, `peak` in GFLOP/s."""
    if not worker.runs:
        return {"error": worker.error}
    seconds = statistics.median(run["seconds"] for run in worker.runs)
    scores = worker.runs[0]["scores"]
    return {
        "dtype": VARIANTS[worker.name][1] or usual,
        "seconds": [run["seconds"] for run in worker.runs],
        "wall_seconds": [run["wall_seconds"] for run in worker.runs],
        "documents_per_second": len(documents) / seconds,
        "peak_mb": max(run["peak_mb"] or 0 for run in worker.runs),
        "gflops": needed / seconds,
        "share_of_peak": needed / seconds / peak,
        "largest_difference": reference and max(abs(a - b) for a, b in zip(scores, reference, strict=True)),
        "kendall_tau": reference and kendall_tau(scores, reference),
        "threads": worker.loaded["threads"],
        "versions": worker.loaded["versions"],
    }


def scaling(model: str, tokenizer, usual: str, options) -> dict:
    """Time `rerank` against the number of documents, and against the length of one, each the median of a few runs."""
    worker = start("rerank", model, ["warm up"], usual, options)
    counts = {}
    everything = texts(tokenizer, 1000, seed=1)
    # Ten runs of 100 hold the same documents as the one of 1000, which runs in their middle: noise hits both alike.
    counts[10] = sum(worker.run(everything[i : i + 10])["seconds"] for i in range(0, 100, 10)) / 10
    counts[100] = sum(worker.run(everything[i : i + 100])["seconds"] for i in range(0, 500, 100)) / 10
    counts[1000] = worker.run(everything)["seconds"]
    counts[100] += sum(worker.run(everything[i : i + 100])["seconds"] for i in range(500, 1000, 100)) / 10
    counts = dict(sorted(counts.items()))
    worker.stop()
    return {"documents": counts, "lengths": lengths(model, tokenizer)}


def lengths(model: str, tokenizer) -> dict[int, float]:
    """Return the seconds for one document, by the number of tokens of the pair."""
    from reranker_helpers import load_reranker, score

    reranker = load_reranker(model, device="cpu", dtype="float32")
    query = "Why?"  # short, so that the document makes the length
    overhead = len(tokenizer(query, "")["input_ids"])
    seconds = {}
    for length in (20, 64, 128, 256, 512, 1024, 2048, 4096, 8192):
        (text,) = stretches(tokenizer, [length - overhead + 8])
        times = []
        for _ in range(3 if length <= 2048 else 1):
            begin = time.perf_counter()
            score([(query, text)], *reranker, max_length=length)
            times.append(time.perf_counter() - begin)
        seconds[length] = statistics.median(times)
    return seconds


def gflop(tokenizer, documents: list[str], layers: int) -> float:
    """Return the arithmetic that the scores need, in GFLOP: real tokens only, and of the last layer the first token."""
    total = 0
    for ids in tokenizer([QUERY] * len(documents), documents, truncation="only_second", max_length=512)["input_ids"]:
        length = len(ids)
        layer = 2 * 12 * 1024**2 * length + 4 * 1024 * length**2
        last = 2 * 2 * 1024**2 * length + 2 * 10 * 1024**2 + 4 * 1024 * length
        total += (layers - 1) * layer + last
    return total / 1e9


def kendall_tau(ours: list[float], theirs: list[float]) -> float:
    """Return Kendall's tau-a: 1 where all pairs of documents are in the same order, -1 where none is."""
    pairs = [(i, j) for i in range(len(ours)) for j in range(i)]
    agree = sum((ours[i] > ours[j]) == (theirs[i] > theirs[j]) for i, j in pairs)
    return 2 * agree / len(pairs) - 1


def describe(tokenizer, documents: list[str]) -> dict:
    lengths = sorted(len(ids) for ids in tokenizer([QUERY] * len(documents), documents)["input_ids"])
    return {
        "documents": len(documents),
        "text": "one query, stretches of the Python FAQ in tests/data, lengths log-normal",
        "tokens_of_pairs": {
            "shortest": lengths[0],
            "mean": round(statistics.mean(lengths), 1),
            "longest": lengths[-1],
            "sum": sum(lengths),
        },
        "max_length": 512,
    }


def machine(device: str) -> dict:
    import torch

    model = platform.processor()
    flags = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
        flags = next((line.split(":")[1] for line in lines if line.startswith("flags")), "")
    interesting = [flag for flag in flags.split() if flag.startswith(("avx2", "avx512", "amx", "avx_"))]
    found = {
        "processor": model,
        "cores": os.cpu_count(),
        "instructions": interesting,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    if device != "cpu":
        found["gpu"] = torch.cuda.get_device_name()
    return found


if __name__ == "__main__":
    main()

"""Run `rerank` and its peers side by side, and write NAME.json, NAME.md and NAME.png.

Only ratios are meant to be read. All variants run in turn, A B C A B C, each run in its own process, so that whatever
else the machine does hits them alike; the ratio is of the medians.
"""

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer

from benchmarks import report
from benchmarks.variants import ON_A_GPU, VARIANTS
from benchmarks.worker import CLOCKS
from benchmarks.workload import QUERY, ROOT, build_model, stretches, texts
from reranker_helpers import load_reranker, score

RESULTS = Path(__file__).parent / "results"


def parse(program: str = "python -m benchmarks.compare", **defaults: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=program, description=__doc__)
    parser.add_argument("--quick", action="store_true", help="4 layers and 40 documents")
    parser.add_argument("--layers", type=int, default=24, help="of the model; default all 24")
    parser.add_argument("--model", type=Path, help="the folder of another model")
    parser.add_argument("--documents", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="default all that the device can run")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for float16 on a GPU")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default one for each core")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: CPU seconds, where other programs run")
    parser.add_argument("--backends", help="the Python of an environment with requirements-backends.txt")
    parser.add_argument("--scaling", action="store_true", help="instead: time against number and length of documents")
    parser.add_argument("--out", type=Path, help="the result files, without .json; default in benchmarks/results")
    parser.set_defaults(**defaults)
    options = parser.parse_args()
    if options.quick:
        options.layers, options.documents = 4, 40
    options.variants = options.variants or (list(VARIANTS) if options.device == "cpu" else ON_A_GPU)
    options.out = options.out or RESULTS / f"{'quick' if options.quick else 'full'}-{options.device}"
    # Results are public: they name no folder of whoever ran them.
    options.command = re.sub(r"(?<![\w.])/\S*/", "", shlex.join([*program.split(), *sys.argv[1:]]))
    torch.set_num_threads(options.threads)
    return options


def main(options: argparse.Namespace) -> None:
    model, note = build_model(options.layers, options.model)
    tokenizer, config = AutoTokenizer.from_pretrained(model), AutoConfig.from_pretrained(model)
    documents = texts(tokenizer, options.documents)
    encoded = tokenizer([QUERY] * len(documents), documents, truncation="only_second", max_length=512)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    result = {
        "date": datetime.date.today().isoformat(),
        "command": options.command,
        "machine": machine(options.device),
        "model": note,
        "layers": config.num_hidden_layers,
        "device": options.device,
        "dtype": "float32" if options.device == "cpu" else "float16",
        "threads": options.threads,
        "workload": {
            "documents": len(documents),
            "text": "one query, stretches of the Python FAQ in tests/data, lengths log-normal",
            "tokens_of_pairs": {"shortest": min(lengths), "longest": max(lengths), "sum": sum(lengths)}
            | {"mean": round(statistics.mean(lengths), 1)},
        },
        "clock": options.clock,
        "rounds": options.rounds,
        "variants": {},
        "gflop_needed": gflop(lengths, config),
    }
    if options.scaling:
        parts = [{"scaling": scaling(model, result["dtype"], options)}]
    else:
        parts = side_by_side(model, documents, result, options)
    for part in parts:  # a full run takes an hour, and may be cut off
        result |= part
        options.out.parent.mkdir(parents=True, exist_ok=True)
        path = Path(f"{options.out}.json")
        path.write_text(json.dumps(result, indent=1) + "\n")
        report.write(path)
    print(path.with_suffix(".md").read_text())


def side_by_side(model: str, documents: list[str], settings: dict, options: argparse.Namespace) -> Iterator[dict]:
    """Run the variants in turn, and after each round yield all results so far."""
    runs, errors = {name: [] for name in options.variants}, {}
    measures_peak = "rerank" if "rerank" in runs else options.variants[0]
    tasks, pythons = {}, {}
    for name in options.variants:
        _, dtype, environment = VARIANTS[name]
        tasks[name] = {"variant": name, "model": model, "query": QUERY, "documents": documents}
        tasks[name] |= {"device": options.device, "dtype": dtype or settings["dtype"], "clock": options.clock}
        tasks[name]["peak_dtype"] = settings["dtype"] if name == measures_peak else None
        pythons[name] = options.backends if environment == "backends" and options.backends else sys.executable
        if environment == "backends":  # exports the model if it has to, which must not count as memory of a run
            work(pythons[name], tasks[name] | {"documents": documents[:2]}, options.threads)
    for number in range(options.rounds):
        for name in [name for name in options.variants if name not in errors]:
            answer = work(pythons[name], tasks[name], options.threads)
            if "error" in answer:
                errors[name] = answer["error"]
            else:
                runs[name].append(answer)
            said = answer.get("error") or f"{answer['seconds']:.2f} s"
            print(f"round {number + 1}: {name}: {said}", file=sys.stderr)
        peaks = [run["matmul_peak"] for run in runs[measures_peak]]
        peak = statistics.median(peaks) if peaks else float("nan")
        against = next((name for name in ("plain", "rerank") if runs.get(name)), None)
        reference = runs[against][0]["scores"] if against else None
        yield {
            "variants": {
                name: summary(name, runs[name], settings, peak, reference) if runs[name] else {"error": errors[name]}
                for name in options.variants
            },
            "matmul_peak_gflops": peak,
            "reference": against,
        }


def work(python: str, task: dict, threads: int) -> dict:
    """Return what a worker answers, or {"error": the reason why there is no answer}."""
    process = subprocess.run(
        [python, "-m", "benchmarks.worker"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        input=json.dumps(task),
        capture_output=True,
        text=True,
    )
    if process.returncode:
        said = process.stderr.strip().replace(str(ROOT), "...").split("\n")[-1]
        return {"error": f"exit status {process.returncode}: {said[:200]}"}
    return json.loads(process.stdout.splitlines()[-1])


def summary(name: str, runs: list[dict], settings: dict, peak: float, reference: list[float] | None) -> dict:
    """Return what the result file says of one variant. `peak` is in GFLOP/s."""
    seconds = statistics.median(run["seconds"] for run in runs)
    scores = runs[0]["scores"]
    return {
        "dtype": VARIANTS[name][1] or settings["dtype"],
        "seconds": [run["seconds"] for run in runs],
        "documents_per_second": len(scores) / seconds,
        "peak_mb": max(run["peak_mb"] for run in runs),
        "share_of_peak": settings["gflop_needed"] / seconds / peak,
        "largest_difference": reference and max(abs(a - b) for a, b in zip(scores, reference, strict=True)),
        "kendall_tau": reference and kendall_tau(scores, reference),
        "versions": runs[0]["versions"],
    }


def scaling(model: str, dtype: str, options: argparse.Namespace) -> dict:
    """Time `rerank` against the number of documents, and against the length of one in tokens of the pair."""
    reranker, now = load_reranker(model, device=options.device, dtype=dtype), CLOCKS[options.clock]

    def seconds(documents: list[str], query: str = QUERY, max_length: int = 512) -> float:
        begin = now()
        score([(query, document) for document in documents], *reranker, max_length=max_length)
        return now() - begin

    everything = texts(reranker.tokenizer, 1000, seed=1)
    seconds(everything[:2])  # warm up
    # Ten runs of 100 hold the same documents as the one of 1000, which runs in their middle: noise hits both alike.
    tens = [seconds(everything[i : i + 10]) for i in range(0, 100, 10)]
    hundreds = [seconds(everything[i : i + 100]) for i in range(0, 500, 100)]
    thousand = seconds(everything)
    hundreds += [seconds(everything[i : i + 100]) for i in range(500, 1000, 100)]
    lengths = {}
    for length in (20, 64, 128, 256, 512, 1024, 2048, 4096, 8192):
        if length <= reranker.tokenizer.model_max_length:
            long = stretches(reranker.tokenizer, [length])
            lengths[length] = statistics.median(seconds(long, "Why?", length) for _ in range(3 if length < 4096 else 1))
    counts = {10: statistics.mean(tens), 100: statistics.mean(hundreds), 1000: thousand}
    return {"documents": counts, "lengths": lengths}


def gflop(lengths: list[int], config) -> float:
    """Return the arithmetic that the scores of pairs of these lengths need, in GFLOP: real tokens only, and of the
    last layer the first token."""
    width, inner = config.hidden_size, config.intermediate_size
    total = 0
    for length in lengths:
        layer = 2 * (4 * width**2 + 2 * width * inner) * length + 4 * width * length**2
        last = 2 * 2 * width**2 * length + 2 * (2 * width**2 + 2 * width * inner) + 4 * width * length
        total += (config.num_hidden_layers - 1) * layer + last
    return total / 1e9


def kendall_tau(ours: list[float], theirs: list[float]) -> float:
    """Return Kendall's tau-a: 1 where all pairs of documents are in the same order, -1 where none is."""
    pairs = [(i, j) for i in range(len(ours)) for j in range(i)]
    agree = sum((ours[i] > ours[j]) == (theirs[i] > theirs[j]) for i, j in pairs)
    return 2 * agree / len(pairs) - 1


def machine(device: str) -> dict:
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    found = dict(re.findall(r"^(model name|flags)\s*: (.*)$", text, re.M))
    flags = found.get("flags", "").split()
    return {
        "processor": found.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "instructions": [flag for flag in flags if flag.startswith(("avx2", "avx512", "amx", "avx_"))],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **({"gpu": torch.cuda.get_device_name()} if device != "cpu" else {}),
    }


if __name__ == "__main__":
    main(parse())

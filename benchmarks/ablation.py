"""What each trick of the packed path gives, and where its time goes: python -m benchmarks.ablation --help

All in one process, in turn. Each line of the first table leaves one thing out of the packed path, or adds one that it
does not have. The options are those of benchmarks.compare; with --threads 1 --clock cpu other programs disturb least.
"""

import argparse
import functools
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch
import torch.nn.functional as F

from benchmarks.compare import machine, parse
from benchmarks.worker import CLOCKS
from benchmarks.workload import QUERY, build_model, texts
from reranker_helpers import load_reranker, packed, products, score, scoring


def batches(tokens: int, **changes):
    return patch.multiple(scoring, BATCH_TOKENS={"cpu": tokens, "packed": tokens}, **changes)


def one_at_a_time():
    return patch.object(scoring, "_several_at_a_time", scoring._one_at_a_time)


@contextmanager
def busy_process():
    """Keep one core busy, as a browser or a neighbour's container would."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


def padded(tokens: int = scoring.BATCH_TOKENS["cpu"]):
    """The model's own forward, in sorted batches: what every other model gets."""
    return batches(tokens, can_pack=lambda *_: False)


def route(chosen):
    return patch.object(products, "_route", lambda weight, bias: chosen)


def prepacked():
    """Weights in oneDNN's own order: a second copy of them all."""
    onednn = torch.ops.mkldnn
    reorder = functools.cache(lambda weight: onednn._reorder_linear_weight(weight.detach(), 512))
    return route(lambda rows, weight, bias: onednn._linear_pointwise(rows, reorder(weight), bias, "none", [], ""))


def whole_last_layer():
    """Compute the last layer for all tokens, and read the first ones after it. Only the time means something."""
    block = packed._attention_block

    def whole(layer, query_tokens, tokens, query_lengths, lengths):
        if query_tokens is tokens:
            return block(layer, query_tokens, tokens, query_lengths, lengths)
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        return packed._feed_forward(layer, block(layer, tokens, tokens, lengths, lengths))[starts]

    return patch.object(packed, "_attention_block", whole)


def profile(pairs, reranker) -> list[str]:
    """Return a table of the operations that take most of the time. The profiler sees one thread only."""
    with one_at_a_time(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        score(pairs, *reranker)
    operations = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in operations)
    rows = [f"| {event.key} | {event.self_cpu_time_total / total:.1%} |" for event in operations[:9]]
    return ["| operation | share of the packed path's time |", "|---|---|", *rows]


def main(options: argparse.Namespace) -> None:
    model, note = build_model(options.layers, options.model)
    reranker, narrow = (load_reranker(model, device="cpu", dtype=dtype) for dtype in ("float32", "int8"))
    pairs = [(QUERY, text) for text in texts(reranker.tokenizer, options.documents)]
    variants = {
        "the packed path": nullcontext(),
        "the packed path in int8": nullcontext(),
        "batches one at a time, on all threads": one_at_a_time(),
        "padded, the model's own forward": padded(),
        "torch's products only": route(F.linear),
        "oneDNN's products only": route(products._onednn_linear),
        "oneDNN's with prepacked weights": prepacked(),
        "the last layer for all tokens": whole_last_layer(),
        **{f"budget {tokens}": batches(tokens) for tokens in (512, 1024, 2048, 4096)},
        **{f"padded, budget {tokens}": padded(tokens) for tokens in (256, 512, 1024, 2048)},
    }
    expected, now = score(pairs[:4], *reranker), CLOCKS[options.clock]
    seconds = {name: [] for name in variants}
    for _ in range(options.rounds):
        for name, changed in variants.items():
            with changed:
                begin = now()
                score(pairs, *(narrow if name == "the packed path in int8" else reranker))
                seconds[name].append(now() - begin)
    beside = {True: [], False: []}  # by whether batches run side by side
    with busy_process():
        for _ in range(options.rounds):
            for together, times in beside.items():
                with nullcontext() if together else one_at_a_time():
                    begin = time.perf_counter()
                    score(pairs, *reranker)
                    times.append(time.perf_counter() - begin)
    assert score(pairs[:4], *reranker) == expected
    found, usual = machine("cpu"), statistics.median(seconds["the packed path"])
    routes = {str(tuple(q[1])): chosen.__name__ for q, chosen in products._found.items() if q[0] == "route"}
    lines = [
        "# ablation",
        "",
        f"{note}; {len(pairs)} documents, {options.rounds} rounds, {options.threads} threads of {found['processor']}",
        f"({' '.join(found['instructions'])}), torch {torch.__version__}",
        "",
        "| | time against the packed path |",
        "|---|---|",
        *(f"| {name} | {statistics.median(times) / usual:.2f} |" for name, times in seconds.items()),
        "",
        f"The budget of {scoring.BATCH_TOKENS['packed']} is the packed path again: its distance from 1 is the noise.",
        "",
        f"Beside one busy process: {statistics.median(beside[True]) / usual:.2f} times its time alone, "
        f"and {statistics.median(beside[False]) / usual:.2f} times with batches one at a time.",
        "",
        f"routes that were measured as faster: {routes}",
        "",
        *profile(pairs, reranker),
        "",
        "The same in int8:",
        "",
        *profile(pairs, narrow),
    ]
    options.out.with_name("ablation.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main(parse("python -m benchmarks.ablation", layers=4, documents=24))

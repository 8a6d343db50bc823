"""What each trick of the engine gives, and where its time goes:
python -m benchmarks.ablation [layers] [documents] [rounds]

All in one process, in turn: by the wall clock, or with one thread (OMP_NUM_THREADS=1) in CPU seconds, which other
programs disturb less. Each line of the first table leaves one thing out of the engine, or adds
one that it does not have.
"""

import contextlib
import json
import statistics
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F

from benchmarks.compare import machine
from benchmarks.workload import QUERY, build_model, texts
from reranker_helpers import load_reranker, packed, products, score, scoring

now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
RESULTS = Path(__file__).parent / "results"


def without_padding_only(*_):
    """The model's own forward, in sorted batches: what every other model gets."""
    return patch.object(scoring, "can_pack", lambda *_: False)


def route(chosen):
    return patch.object(products, "_route", lambda weight, bias: chosen)


def whole_last_layer():
    """Compute the last layer for all tokens, and read the first ones after it. Only the time means something."""
    attend = packed._attend

    def whole(layer, readers, tokens, reader_lengths, lengths):
        if readers is tokens:
            return attend(layer, readers, tokens, reader_lengths, lengths)
        firsts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        return packed._feed_forward(layer, attend(layer, tokens, tokens, lengths, lengths))[firsts]

    return patch.object(packed, "_attend", whole)


def fused_gelu():
    def feed_forward(layer, hidden):
        first, second = layer.intermediate.dense, layer.output.dense
        slices = []
        for rows in hidden.split(packed.SLICE):
            inner = torch.ops.mkldnn._linear_pointwise(rows, first.weight, first.bias, "gelu", [], "none")
            slices.append(packed._norm(packed._linear(inner, second).add_(rows), layer.output.LayerNorm))
        return torch.cat(slices)

    return patch.object(packed, "_feed_forward", feed_forward)


def prepacked():
    """Weights in oneDNN's own order: a second copy of them all."""
    copies = {}

    def product(rows, weight, bias):
        if weight.data_ptr() not in copies:
            copies[weight.data_ptr()] = torch.ops.mkldnn._reorder_linear_weight(weight, 512)
        return torch.ops.mkldnn._linear_pointwise(rows, copies[weight.data_ptr()], bias, "none", [], "")

    return route(product)


def budget(tokens):
    return patch.dict(scoring.BATCH_TOKENS, {"cpu": tokens, "packed": tokens})


def route_seconds(model) -> float:
    """Return what the first call spends on finding the fastest route for each shape of weights."""
    parts = [part for part in model.modules() if isinstance(part, torch.nn.Linear)]
    shapes = {part.weight.shape: part for part in parts}
    begin = now()
    for part in shapes.values():
        products._faster_route(part.weight.detach(), part.bias.detach())
    return now() - begin


def profile(pairs, reranker) -> list[str]:
    """Return a table of the operations that take most of the time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        score(pairs, *reranker)
    operations = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in operations)
    rows = [f"| {event.key} | {event.self_cpu_time_total / total:.1%} |" for event in operations[:9]]
    return ["| operation | share of the engine's time |", "|---|---|", *rows]


def main() -> None:
    layers, count, rounds = (int(value) for value in [*sys.argv[1:], "4", "24", "3"][:3])
    model, note = build_model(layers)
    reranker, narrow = load_reranker(model, device="cpu"), load_reranker(model, device="cpu", dtype="int8")
    pairs = [(QUERY, text) for text in texts(reranker.tokenizer, count)]
    variants = {
        "the engine": contextlib.nullcontext,
        "the engine in int8": contextlib.nullcontext,
        "padded, the model's own forward": without_padding_only,
        "torch's products only": lambda: route(F.linear),
        "oneDNN's products only": lambda: route(products._onednn_linear),
        "oneDNN's with prepacked weights": prepacked,
        "the last layer for all tokens": whole_last_layer,
        "GELU fused into oneDNN's product": fused_gelu,
        **{f"budget {tokens}": lambda tokens=tokens: budget(tokens) for tokens in (512, 1024, 2048, 4096)},
        **{
            f"padded, budget {tokens}": lambda tokens=tokens: stacked(without_padding_only(), budget(tokens))
            for tokens in (256, 512, 1024, 2048)
        },
    }
    seconds = {name: [] for name in variants}
    expected = score(pairs[:4], *reranker)
    for _ in range(rounds):
        for name, variant in variants.items():
            with variant():
                begin = now()
                score(pairs, *(narrow if name == "the engine in int8" else reranker))
                seconds[name].append(now() - begin)
    found = machine("cpu")
    lines = [f"{note}; {count} documents, {rounds} rounds, {torch.get_num_threads()} threads of {found['processor']}"]
    lines += [f"({' '.join(found['instructions'])}), torch {torch.__version__}", ""]
    lines += ["| | time against the engine |", "|---|---|"]
    usual = statistics.median(seconds["the engine"])
    lines += [f"| {name} | {statistics.median(times) / usual:.2f} |" for name, times in seconds.items()]
    routes = {str(tuple(q[1])): chosen.__name__ for q, chosen in products._measured.items() if q[0] == "route"}
    lines += [
        "",
        f"The budget of {scoring.BATCH_TOKENS['packed']} is the engine once more: its distance from 1 is the noise.",
    ]
    lines += ["", f"routes that were measured as faster: {json.dumps(routes)}"]
    first, whole = route_seconds(reranker.model), usual / count * 100 * 24 / layers
    lines += ["", f"Finding them took {first:.2f} s, {first / whole:.1%} of what 100 documents take with 24 layers."]
    lines += ["", *profile(pairs, reranker), "", "The same in int8:", "", *profile(pairs, narrow)]
    assert score(pairs[:4], *reranker) == expected
    (RESULTS / "ablation.md").write_text("\n".join(["# ablation", "", *lines]) + "\n")
    print("\n".join(lines))


@contextlib.contextmanager
def stacked(*contexts):
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


if __name__ == "__main__":
    main()

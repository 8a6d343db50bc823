"""From a result file to a table and plots: python -m benchmarks.report benchmarks/results/NAME.json"""

import json
import statistics
import sys
from pathlib import Path

CLOCKS = {
    "wall": "wall clock",
    "cpu": "CPU seconds of each process, because others used the machine at the same time; read the ratios only",
}
HEADER = (
    "| | times as fast as plain | `rerank` is faster by | documents/s | runs | peak memory, MB | share of peak | "
    "largest difference | Kendall's tau |"
)


def write(path: Path) -> None:
    """Write NAME.md and NAME.png next to NAME.json."""
    result = json.loads(path.read_text())
    path.with_suffix(".md").write_text(render(result, path.stem))
    plot(result, path.with_suffix(".png"))


def render(result: dict, name: str) -> str:
    """Return the whole Markdown file."""
    lines = [f"# {name}{result.get('title', '')}", "", *_settings(result)]
    if result["variants"]:
        lines += ["", *table(result), "", *_legend(result)]
    if "scaling" in result:
        lines += ["", *_scaling(result)]
    return "\n".join([*lines, "", f"![The rows of the tables as a plot]({name}.png)"]) + "\n"


def _settings(result: dict) -> list[str]:
    machine, workload = result["machine"], result["workload"]
    tokens = workload["tokens_of_pairs"]
    threads = sorted({str(variant["threads"]) for variant in result["variants"].values() if "threads" in variant})
    versions = {}
    for variant in result["variants"].values():
        for package, version in variant.get("versions", {}).items():
            versions.setdefault(package, []).append(version)
    listed = ", ".join(f"{package} {'/'.join(dict.fromkeys(found))}" for package, found in versions.items())
    return [
        "Written by the script, not by hand.",
        "",
        f"- command: `{result['command'].strip()}`",
        f"- date: {result['date']}",
        f"- machine: {machine.get('gpu') or machine['processor']}, {machine['cores']} cores, "
        f"{' '.join(machine['instructions'])}, {machine['system']}, Python {machine['python']}",
        f"- model: {result['model']}; {result['dtype']} unless the name says otherwise",
        f"- workload: {workload['documents']} documents, {workload['text']}; pairs of {tokens['shortest']} to "
        f"{tokens['longest']} tokens, {tokens['mean']} on average, {tokens['sum']} in all",
        f"- threads: {', '.join(threads)}" if threads else "- threads: one for each core",
        f"- time: {CLOCKS[result['clock']]}",
        *([f"- versions: {listed}"] if listed else []),
    ]


def table(result: dict) -> list[str]:
    """Return the lines of the Markdown table, fastest first."""
    variants = {name: v for name, v in result["variants"].items() if "error" not in v}
    seconds = {name: statistics.median(v["seconds"]) for name, v in variants.items()}
    rows = [
        HEADER,
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in sorted(variants, key=seconds.get):
        v = variants[name]
        plain = f"{seconds['plain'] / seconds[name]:.2f}" if "plain" in seconds else "-"
        ours = f"{seconds[name] / seconds['rerank']:.2f}" if "rerank" in seconds else "-"
        difference = "-" if v["largest_difference"] is None else f"{v['largest_difference']:.1e}"
        tau = "-" if v["kendall_tau"] is None else f"{v['kendall_tau']:.3f}"
        rows.append(
            f"| {name} | {plain} | {ours} | {v['documents_per_second']:.2f} | {len(v['seconds'])} | {v['peak_mb']:.0f} "
            f"| {v['share_of_peak']:.0%} | {difference} | {tau} |"
        )
    return rows


def _legend(result: dict) -> list[str]:
    lines = [
        "Ratios of medians, all variants in turn. Peak memory is the whole process's while it scores, weights "
        f"included. Share of peak: {result['gflop_needed']:.0f} GFLOP that the scores need (real tokens only, of the "
        "last layer the first token only), in the time taken, against the fastest matrix product measured in the same "
        f"run, {result['matmul_peak_gflops']:.0f} GFLOP/s in {result['dtype']}. Differences and Kendall's tau are "
        f"against {result.get('reference', 'plain')}."
    ]
    failed = {name: v["error"] for name, v in result["variants"].items() if "error" in v}
    return lines + [f"- {name} could not be run: {reason}" for name, reason in failed.items()]


def _scaling(result: dict) -> list[str]:
    documents, lengths = result["scaling"]["documents"], result["scaling"]["lengths"]
    ratio = documents["1000"] / (10 * documents["100"])
    return [
        "| documents | " + " | ".join(documents) + " |",
        "|---" * (len(documents) + 1) + "|",
        "| seconds | " + " | ".join(f"{seconds:.2f}" for seconds in documents.values()) + " |",
        "",
        f"1000 documents take {ratio:.2f} times what ten runs of 100 take.",
        "",
        "| tokens of the pair | " + " | ".join(lengths) + " |",
        "|---" * (len(lengths) + 1) + "|",
        "| seconds | " + " | ".join(f"{seconds:.2f}" for seconds in lengths.values()) + " |",
        "| ms per token | " + " | ".join(f"{1000 * s / int(n):.2f}" for n, s in lengths.items()) + " |",
    ]


def plot(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = ([_bars] if result["variants"] else []) + ([_documents, _lengths] if "scaling" in result else [])
    figure, axes = plt.subplots(1, len(panels), figsize=(max(8, 4.5 * len(panels)), 3.6), layout="constrained")
    for panel, ax in zip(panels, [axes] if len(panels) == 1 else axes, strict=True):
        panel(ax, result)
        ax.spines[["top", "right"]].set_visible(False)
    where = result["machine"].get("gpu") or f"{result['machine']['processor']}, {result['machine']['cores']} cores"
    figure.suptitle(f"{result['layers']} layers, {result['dtype']} unless named otherwise, {where}", fontsize=10)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _bars(ax, result: dict) -> None:
    """Draw documents per second, fastest on top."""
    rates = {name: v["documents_per_second"] for name, v in result["variants"].items() if "error" not in v}
    names = sorted(rates, key=rates.get)
    colours = ["#D55E00" if name.startswith("rerank") and name != "rerankers" else "#0072B2" for name in names]
    bars = ax.barh(names, [rates[name] for name in names], color=colours)
    ax.bar_label(bars, fmt="%.2f", padding=3)
    ax.set(xlabel="documents per second")


def _documents(ax, result: dict) -> None:
    _line(ax, result["scaling"]["documents"], "documents")


def _lengths(ax, result: dict) -> None:
    _line(ax, result["scaling"]["lengths"], "tokens of one pair")


def _line(ax, seconds: dict, label: str) -> None:
    """Draw measured times, and what they would be if they grew in proportion from the first on."""
    x, y = [int(key) for key in seconds], list(seconds.values())
    proportional = [y[0] * value / x[0] for value in x]
    ax.loglog(x, y, marker="o", color="#D55E00")
    ax.loglog(x, proportional, linestyle=":", color="gray")
    ax.annotate("rerank", (x[-1], y[-1]), xytext=(-4, 4), textcoords="offset points", ha="right", color="#D55E00")
    middle = len(x) // 2
    ax.annotate(
        "in proportion", (x[middle], proportional[middle]), xytext=(-8, 6), textcoords="offset points", ha="right"
    )
    ax.set(xlabel=label, ylabel="seconds")


if __name__ == "__main__":
    write(Path(sys.argv[1]))

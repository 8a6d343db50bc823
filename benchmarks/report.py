"""From a result file to a table and plots: python -m benchmarks.report benchmarks/results/NAME.json"""

import json
import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure

CLOCKS = {
    "wall": "wall clock",
    "cpu": "CPU seconds of each process, because others used the machine at the same time; read the ratios only",
}
REMARKS = {
    "full-cpu-avx-vnni": ", measured before int8 was added",
    "full-cpu-avx2": ", measured before int8 was added",
}
"""What has changed since a result was measured, by the file's name. It is added to the title."""

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
    found, workload = result["machine"], result["workload"]
    tokens = workload["tokens_of_pairs"]
    ran = [variant for variant in result["variants"].values() if "error" not in variant]
    versions = {}
    for package, version in [item for variant in ran for item in variant["versions"].items()]:
        versions[package] = list(dict.fromkeys([*versions.get(package, []), version]))
    lines = [
        f"# {name}{REMARKS.get(name, '')}",
        "",
        "Written by the script, not by hand.",
        "",
        f"- command: `{result['command'].strip()}`",
        f"- date: {result['date']}",
        f"- machine: {found.get('gpu') or found['processor']}, {found['cores']} cores, "
        f"{' '.join(found['instructions'])}, {found['system']}, Python {found['python']}",
        f"- model: {result['model']}; {result['dtype']} unless the name says otherwise",
        f"- workload: {workload['documents']} documents, {workload['text']}; pairs of {tokens['shortest']} to "
        f"{tokens['longest']} tokens, {tokens['mean']} on average, {tokens['sum']} in all",
        f"- threads: {result['threads']}",
        f"- time: {CLOCKS[result['clock']]}",
    ]
    if ran:
        lines.append("- versions: " + ", ".join(f"{package} {'/'.join(each)}" for package, each in versions.items()))
    lines += ["", *(_scaling(result["scaling"]) if "scaling" in result else [*_table(result), "", *_legend(result)])]
    return "\n".join([*lines, "", f"![The rows of the tables as a plot]({name}.png)"]) + "\n"


def _table(result: dict) -> list[str]:
    """Return the lines of the table, fastest first."""
    variants = {name: v for name, v in result["variants"].items() if "error" not in v}
    seconds = {name: statistics.median(v["seconds"]) for name, v in variants.items()}
    rows = [HEADER, "|---" * 9 + "|"]
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
    failed = {name: v["error"] for name, v in result["variants"].items() if "error" in v}
    return [
        "Ratios of medians, all variants in turn. Peak memory is the whole process's while it scores, weights "
        f"included. Share of peak: {result['gflop_needed']:.0f} GFLOP that the scores need (real tokens only, of the "
        "last layer the first token only), in the time taken, against the fastest matrix product measured in the same "
        f"run, {result['matmul_peak_gflops']:.0f} GFLOP/s in {result['dtype']}. Differences and Kendall's tau are "
        f"against {result['reference']}.",
        *(f"- {name} could not be run: {reason}" for name, reason in failed.items()),
    ]


def _scaling(scaling: dict) -> list[str]:
    documents, lengths = scaling["documents"], scaling["lengths"]
    return [
        f"| documents | {' | '.join(documents)} |",
        "|---" * (len(documents) + 1) + "|",
        f"| seconds | {' | '.join(f'{seconds:.2f}' for seconds in documents.values())} |",
        "",
        f"1000 documents take {documents['1000'] / (10 * documents['100']):.2f} times what ten runs of 100 take.",
        "",
        f"| tokens of the pair | {' | '.join(lengths)} |",
        "|---" * (len(lengths) + 1) + "|",
        f"| seconds | {' | '.join(f'{seconds:.2f}' for seconds in lengths.values())} |",
        f"| ms per token | {' | '.join(f'{1000 * seconds / int(n):.2f}' for n, seconds in lengths.items())} |",
    ]


def plot(result: dict, path: Path) -> None:
    where = result["machine"].get("gpu") or f"{result['machine']['processor']}, {result['machine']['cores']} cores"
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(f"{result['layers']} layers, {result['dtype']} unless named otherwise, {where}", fontsize=10)
    if "scaling" in result:
        axes = figure.subplots(1, 2)
        for ax, (name, seconds) in zip(axes, result["scaling"].items(), strict=True):
            x, y = [int(number) for number in seconds], list(seconds.values())
            ax.loglog(x, y, marker="o", color="#D55E00", label="rerank")
            ax.loglog(x, [y[0] * number / x[0] for number in x], ":", color="gray", label="in proportion")
            ax.set(xlabel={"documents": "documents", "lengths": "tokens of one pair"}[name], ylabel="seconds")
            ax.legend(frameon=False)
    else:
        rates = {name: v["documents_per_second"] for name, v in result["variants"].items() if "error" not in v}
        names, ax = sorted(rates, key=rates.get), figure.subplots()
        colours = ["#D55E00" if name.split()[0] == "rerank" else "#0072B2" for name in names]
        ax.bar_label(ax.barh(names, [rates[name] for name in names], color=colours), fmt="%.2f", padding=3)
        ax.set(xlabel="documents per second")
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    write(Path(sys.argv[1]))

"""How many requests a second, and how long does each take? More and more users ask, and each waits for its answer.

    pip install locust
    locust -f tests/load/locustfile.py --headless --host https://NAME.REGION.inference.ml.azure.com --curve load.png

The host is an endpoint, to which your `az login` must give access, or `azmlinfsrv` on this machine. Throughput grows
with the users until the service is busy all the time; from there on only the waiting grows. Requests are of one size,
`--documents`; an answer that is not 200, or lacks a document, counts as failed.
"""

import itertools
import json
import math
from pathlib import Path
from statistics import quantiles

from locust import HttpUser, LoadTestShape, events, task

DATA = Path(__file__).parent.parent / "data" / "python_faq"


def texts(name: str) -> list[str]:
    return [json.loads(line)["text"] for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


QUERIES, DOCUMENTS = itertools.cycle(texts("queries.jsonl")), texts("documents.jsonl")
measured: dict[int, list[tuple[float, bool]]] = {}
"""For each number of users: milliseconds of each request, and whether it was answered."""


@events.init_command_line_parser.add_listener
def add_options(parser):
    parser.add_argument("--documents", type=int, default=50, help="in each request")
    parser.add_argument("--steps", default="1,2,4,8", help="numbers of users, one after the other")
    parser.add_argument(
        "--seconds", type=int, default=60, help="for each number of users; the first fifth is not counted"
    )
    parser.add_argument("--curve", default="", help="file for the plot")


class Steps(LoadTestShape):
    """Some users for a while, then more."""

    def tick(self):
        options = self.runner.environment.parsed_options
        steps, step = options.steps.split(","), int(self.get_run_time() / options.seconds)
        return (int(steps[step]), 100) if step < len(steps) else None


class Searcher(HttpUser):
    """A search that waits for its ranking, and then the next one."""

    def on_start(self):
        self.token = None
        if self.host.rstrip("/").endswith(".ml.azure.com"):
            from azure.identity import DefaultAzureCredential, get_bearer_token_provider

            self.token = get_bearer_token_provider(DefaultAzureCredential(), "https://ml.azure.com/.default")

    @task
    def rerank(self):
        options = self.environment.parsed_options
        request = {"query": next(QUERIES), "documents": DOCUMENTS[: options.documents]}
        headers = {"Authorization": f"Bearer {self.token()}"} if self.token else {}
        with self.client.post("/score", json=request, headers=headers, catch_response=True) as response:
            if response.ok and len(response.json()["results"]) != len(request["documents"]):
                response.failure("documents are missing")
        milliseconds, answered = response.request_meta["response_time"], response.request_meta["exception"] is None
        if self.environment.shape_class.get_run_time() % options.seconds > options.seconds / 5:
            measured.setdefault(self.environment.runner.user_count, []).append((milliseconds, answered))


@events.quitting.add_listener
def report(environment):
    """Print a line for each number of users, and draw the curve."""
    options, curve = environment.parsed_options, []
    print(f"\n{'users':>5} {'requests/s':>11} {'median ms':>10} {'99th percentile':>16} {'failed':>7}")
    for users, requests in sorted(measured.items()):
        times = [milliseconds for milliseconds, answered in requests if answered]
        cuts = quantiles(times, n=100) if len(times) > 1 else [math.nan] * 99
        rate, failed = len(times) / (0.8 * options.seconds), 1 - len(times) / len(requests)
        print(f"{users:5} {rate:11.2f} {cuts[49]:10.0f} {cuts[98]:16.0f} {failed:7.0%}")
        curve.append((rate, cuts[49], cuts[98]))
    if options.curve and curve:
        draw(options.curve, curve)


def draw(file: str, curve: list[tuple[float, float, float]]) -> None:
    from matplotlib.figure import Figure  # here: the table needs no matplotlib

    figure = Figure(figsize=(6, 3.5))
    axes = figure.subplots()
    rates, medians, highest = zip(*curve, strict=True)
    axes.plot(rates, medians, marker="o", label="median")
    axes.plot(rates, highest, marker="o", label="99th percentile")
    axes.set(xlabel="requests per second", ylabel="ms", xlim=0, ylim=0, title="Latency under load")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=150)

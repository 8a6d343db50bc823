"""Load on Azure's inference server with azureml/score.py: nothing is lost, nothing is wrong, memory is steady.

`LOAD_REQUESTS=2000 LOAD_CLIENTS=8 pytest -n 0 -s tests/test_azure_load.py` shows the figures of a longer run. Nothing
leaves the machine.
"""

import gzip
import json
import os
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple

import pytest
import requests
from fake_azure import InferenceServer

from reranker_helpers import load_reranker, rerank

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "data" / "python_faq"
REQUESTS = int(os.environ.get("LOAD_REQUESTS", "100"))
CLIENTS = int(os.environ.get("LOAD_CLIENTS", "8"))
JSON = {"Content-Type": "application/json"}


class Job(NamedTuple):
    """A request, and the status that it deserves. `request` is what a valid body says."""

    status: int
    body: bytes
    headers: dict[str, str] = JSON
    request: dict | None = None


def texts(name: str) -> list[str]:
    return [json.loads(line)["text"] for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


QUERIES, DOCUMENTS = texts("queries.jsonl"), texts("documents.jsonl")
GOOD = {"query": QUERIES[0], "documents": ["a"]}
INVALID = [
    Job(400, b"{"),
    Job(400, b"\xff\xfe"),
    Job(400, b"[" * 5000),
    Job(400, b'{"query": NaN, "documents": []}'),
    Job(400, json.dumps({"query": QUERIES[0]}).encode()),
    Job(400, json.dumps(GOOD | {"documents": ["\ud800"]}).encode()),
    Job(400, json.dumps(GOOD | {"documents": [None]}).encode()),
    Job(413, json.dumps(GOOD | {"documents": ["a"] * 1001}).encode()),
    Job(413, json.dumps(GOOD | {"documents": ["a" * 9_000_000]}).encode()),
    Job(415, json.dumps(GOOD).encode(), {"Content-Type": "text/plain"}),
    Job(415, json.dumps(GOOD).encode(), {}),
    Job(415, gzip.compress(json.dumps(GOOD).encode(), mtime=0), JSON | {"Content-Encoding": "gzip"}),
    Job(400, b'{"query": "a", "query": "b", "documents": []}'),
    Job(422, json.dumps(GOOD | {"query": " "}).encode()),
    Job(422, json.dumps(GOOD | {"top_n": 0}).encode()),
]


def make_jobs(count: int, seed: int) -> list[Job]:
    """Seven valid requests of ten: 1 to 12 short documents, some with top_n, cut off, or read in windows."""
    generator = random.Random(seed)
    jobs = []
    for _ in range(count):
        if generator.random() < 0.3:
            jobs.append(generator.choice(INVALID))
            continue
        documents = [text[:200] for text in generator.sample(DOCUMENTS, generator.randint(1, 12))]
        options = generator.choice([{}, {"top_n": 3}, {"max_length": 48}, {"max_length": 48, "stride": 8}])
        request = {"query": generator.choice(QUERIES), "documents": documents, **options}
        jobs.append(Job(200, json.dumps(request).encode(), request=request))
    return jobs


def send(url: str, jobs: list[Job]) -> list[tuple[requests.Response, float]]:
    def one(job: Job) -> tuple[requests.Response, float]:
        started = time.perf_counter()
        response = requests.post(url, data=job.body, headers=job.headers, timeout=120)
        return response, time.perf_counter() - started

    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(one, jobs))


def memory(server: InferenceServer) -> float:
    """Resident megabytes of the worker, the server's only child."""
    pid = server.process.pid
    worker = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]
    return int(Path(f"/proc/{worker}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.fixture(scope="module")
def model() -> Path:
    return Path(os.environ["RERANKER_MODEL"])


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log.txt"
    environment = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}  # as in online-deployment-cpu.yml
    with InferenceServer(ROOT, ROOT / "azureml" / "score.py", model, environment, log) as server:
        yield server


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
def test_under_load_no_answer_is_lost_or_wrong_and_memory_is_steady(server, model):
    jobs = make_jobs(REQUESTS, seed=0)
    reranker = load_reranker(model, device="cpu")
    send(server.url, make_jobs(50, seed=1))  # until the allocator has its working size
    answers, megabytes, started = [], [memory(server)], time.perf_counter()
    for quarter in range(4):
        answers += send(server.url, jobs[quarter * len(jobs) // 4 : (quarter + 1) * len(jobs) // 4])
        megabytes.append(memory(server))
    seconds = time.perf_counter() - started

    statuses = Counter(response.status_code for response, _ in answers)
    times = [1000 * seconds for job, (_, seconds) in zip(jobs, answers, strict=True) if job.status == 200]
    cuts = quantiles(times, n=100)
    print(f"\n{REQUESTS} requests from {CLIENTS} clients in {seconds:.0f} s: {dict(sorted(statuses.items()))}")
    print(f"valid ones, waiting included: median {cuts[49]:.0f} ms, 99th percentile {cuts[98]:.0f} ms")
    print("memory of the worker in MB, before and after each quarter:", *map(round, megabytes))

    assert statuses == Counter(job.status for job in jobs)
    for job, (response, _) in zip(jobs, answers, strict=True):
        assert response.status_code == job.status
        if job.status != 200:
            assert response.json()["error"]["message"]
            continue
        options = {name: value for name, value in job.request.items() if name not in ("query", "documents")}
        local = rerank(job.request["query"], job.request["documents"], *reranker, **options)
        results = response.json()["results"]
        assert [result["index"] for result in results] == [result.index for result in local]
        assert [result["logit"] for result in results] == pytest.approx([r.score for r in local], abs=1e-4)
    # It grows at first, while torch prepares for each new shape, and then it stays. The largest bodies are 9 MB.
    assert megabytes[-1] - megabytes[-2] < 50
    log = server.log.read_text()
    assert "Booting worker" in log
    assert log.count("Booting worker") == 1, "a worker that died would have been replaced"
    assert not [text for text in DOCUMENTS if text[:40] in log], "no document is logged"


@pytest.mark.parametrize("job", INVALID, ids=lambda job: f"{job.status}-{job.body[:20]!r}")
def test_the_server_answers_each_invalid_request(server, job):
    ((response, _),) = send(server.url, [job])
    assert response.status_code == job.status
    assert response.json()["error"].keys() == {"code", "message"}


def test_a_request_that_takes_too_long_ends_and_the_worker_goes_on(model, tmp_path):
    """Azure tells the client 408 and forgets it. Without SCORING_TIMEOUT_MS the worker would go on for nobody."""
    long = GOOD | {"documents": [f"{text[:150]} {i}" for i in range(5) for text in DOCUMENTS]}
    environment = {"SCORING_TIMEOUT_MS": "500"}
    with InferenceServer(ROOT, ROOT / "azureml" / "score.py", model, environment, tmp_path / "log.txt") as server:
        response = requests.post(server.url, json=long, timeout=60)
        assert response.status_code == 500
        assert response.elapsed.total_seconds() < 3
        assert f"request {response.headers['x-request-id']} failed: TimeoutError" in server.log.read_text()
        assert requests.post(server.url, json=GOOD, timeout=60).status_code == 200


def test_methods_other_than_post_are_405(server):
    for method in ("GET", "OPTIONS"):
        assert requests.request(method, server.url, params={"query": "a"}, timeout=10).status_code == 405


def test_a_compressed_body_is_refused_by_name(server):
    """Its bytes are no JSON, and "invalid start byte" would send people looking in the wrong place."""
    body, headers = gzip.compress(json.dumps(GOOD).encode(), mtime=0), JSON | {"Content-Encoding": "gzip"}
    error = requests.post(server.url, data=body, headers=headers, timeout=10).json()["error"]
    assert error["message"].startswith("the header Content-Encoding is 'gzip': send")
    assert requests.post(server.url, json=GOOD, headers={"Content-Encoding": "identity"}, timeout=10).ok


def test_a_body_in_chunks_is_limited_too(server):
    """It has no Content-Length to look at."""
    response = requests.post(server.url, data=(b"a" * 2**20 for _ in range(20)), headers=JSON, timeout=30)
    assert response.status_code == 413


def test_the_request_id_of_the_client_comes_back(server):
    response = requests.post(server.url, json=GOOD, headers={"x-request-id": "mine"}, timeout=30)
    assert response.headers["x-request-id"] == "mine"

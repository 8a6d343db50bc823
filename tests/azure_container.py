"""A scoring script among the packages of its container, and no others: `python tests/azure_container.py online`.

Run it in an environment made of the pip list of azureml/conda-cpu.yml, and with `batch` in one of that of
azureml/conda-batch-cpu.yml, as CI does each week:

    sed -n 's/^      - \\([^#]*\\)$/\\1/p' azureml/conda-cpu.yml > container.txt && pip install -r container.txt

The online script runs on Azure's inference server, the batch script is imported as Azure's batch engine does it, beside
the real azureml-core. Each must rank as the package does here.
"""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import requests
from fake_azure import BatchJob, BatchSettings, InferenceServer

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "tests" / "stand_in_model"
REQUEST = {"query": "what is a panda?", "documents": ["Hi!", "The giant panda is a bear.", "Pandas is a library."]}
# Without azureml-core batch_worker.py would make do with an empty package.
PACKAGES = {"online": ["azureml-inference-server-http"], "batch": ["azureml-core", "pandas"]}


def online(folder: Path) -> list[float]:
    """Return each document's logit, as the endpoint answers."""
    with InferenceServer(ROOT, ROOT / "azureml" / "score.py", MODEL, {}, folder / "online.txt") as server:
        results = requests.post(server.url, json=REQUEST, timeout=60).json()["results"]
    return [result["logit"] for result in sorted(results, key=lambda result: result["index"])]


def batch(folder: Path) -> list[float]:
    """Return each document's logit, as a batch job writes it."""
    file, output, log = folder / "shard.jsonl", folder / "score" / "scores.jsonl", folder / "batch.txt"
    file.write_text(json.dumps({"id": 1, **REQUEST}))
    settings, environment = BatchSettings(max_retries=0), {"AZUREML_MODEL_DIR": str(MODEL)}
    job = BatchJob(ROOT, "azureml_batch/batch_score.py", [file], output, settings, environment, log)
    job.start()
    job.join()
    assert job.status == "Completed", log.read_text()
    rows = [json.loads(row) for row in output.read_text().splitlines()]
    return [row["logit"] for row in sorted(rows, key=lambda row: row["index"])]


if __name__ == "__main__":
    script = sys.argv[1]
    for package in ("torch", "transformers", "tokenizers", *PACKAGES[script]):
        print(f"{package:30} {version(package)}")
    with tempfile.TemporaryDirectory() as name:
        logits = {"online": online, "batch": batch}[script](Path(name))
    sys.path.insert(0, str(ROOT))  # the package is not installed here
    from reranker_helpers import load_reranker, rerank

    results = rerank(REQUEST["query"], REQUEST["documents"], *load_reranker(MODEL, device="cpu"))
    here = [result.score for result in sorted(results, key=lambda result: result.index)]
    print(f"{script + ':':8}", [round(logit, 4) for logit in logits])
    print("here:   ", [round(logit, 4) for logit in here])
    assert max(abs(a - b) for a, b in zip(logits, here, strict=True)) < 1e-4

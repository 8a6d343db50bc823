"""Both scoring scripts among the packages of Azure's container, and no others: `python tests/azure_container.py`.

Run it in an environment made of the pip list of azureml/conda-cpu.yml, as CI does each week:

    sed -n 's/^      - \\([^#]*\\)$/\\1/p' azureml/conda-cpu.yml > container.txt && pip install -r container.txt

The online script runs on Azure's inference server, the batch script is imported as Azure's batch engine does it, beside
the real azureml-core. Both must rank as the package does here.
"""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import azureml.core  # noqa: F401, it must be there, or batch_worker.py would make do with an empty package
import pandas  # noqa: F401, the batch engine's
import requests
from fake_azure import BatchJob, BatchSettings, InferenceServer

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "tests" / "stand_in_model"
REQUEST = {"query": "what is a panda?", "documents": ["Hi!", "The giant panda is a bear.", "Pandas is a library."]}


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
    for package in ("torch", "transformers", "tokenizers", "azureml-inference-server-http", "azureml-core", "pandas"):
        print(f"{package:30} {version(package)}")
    with tempfile.TemporaryDirectory() as name:
        endpoint, job = online(Path(name)), batch(Path(name))
    print("online:", [round(logit, 4) for logit in endpoint])
    print("batch: ", [round(logit, 4) for logit in job])
    assert max(endpoint) == endpoint[1], "the panda comes first"
    assert max(abs(a - b) for a, b in zip(endpoint, job, strict=True)) < 1e-4

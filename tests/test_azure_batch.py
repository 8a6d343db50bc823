"""Batch jobs in the local Azure: the real script in several processes, through crashes, and from end to end with the
real SDK. Input ids and output ids are equal sets in each of them."""

import json
import os
import shutil
import signal
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
from azure.ai.ml import (
    Input,
    load_batch_deployment,
    load_batch_endpoint,
    load_compute,
    load_environment,
    load_model,
)
from azure.core.exceptions import HttpResponseError, ResourceNotFoundError
from fake_azure import BatchJob, BatchSettings

from reranker_helpers import load_reranker, rerank

ROOT = Path(__file__).parent.parent
AZUREML = ROOT / "azureml"
QUERY = "what is a panda"
DOCUMENTS = ["bread and oven", "the panda is a bear", "law and contract"]

# The real script; it goes down at the place that the file's name says, on the first try.
CRASHING = f"""
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT / "azureml_batch")!r})
import batch_score

init = batch_score.init

def run(mini_batch):
    file = mini_batch[0]
    where, tried = Path(file).stem, Path(file + ".tried")
    first = not tried.exists()
    tried.touch()
    if first and where == "killed-before":
        os.kill(os.getpid(), signal.SIGKILL)
    if first and where == "hangs":
        time.sleep(600)
    if first and where == "raises":
        raise OSError("the file share is away")
    if where == "always":
        os._exit(3)
    rows = batch_score.run(mini_batch)
    if first and where == "killed-after":
        os.kill(os.getpid(), signal.SIGKILL)
    return rows
"""


def write_shard(file: Path, count: int = 3) -> set[str]:
    """Write lines, one of them with documents that are no list. Return their ids."""
    ids = [f"{file.stem} {number}" for number in range(count)]
    lines = [{"id": id_, "query": QUERY, "documents": DOCUMENTS} for id_ in ids]
    lines[-1]["documents"] = "no list"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return set(ids)


@pytest.fixture
def job(tmp_path, tiny_folder):
    """Run a job over shards of these names, and return it with its rows, if it has any, and the ids of its input."""
    jobs = []

    def job(*names: str, **settings) -> tuple[BatchJob, list[dict] | None, set[str]]:
        (tmp_path / "crashing.py").write_text(CRASHING)
        files = [tmp_path / f"{name}.jsonl" for name in names]
        ids = set().union(*map(write_shard, files))
        output = tmp_path / "score" / "scores.jsonl"
        environment = {"AZUREML_MODEL_DIR": str(tiny_folder)}
        settings, log = BatchSettings(**settings), tmp_path / "log.txt"
        jobs.append(BatchJob(tmp_path, "crashing.py", files, output, settings, environment, log))
        jobs[0].start()
        jobs[0].join(120)
        rows = [json.loads(row) for row in output.read_text().splitlines()] if output.exists() else None
        return jobs[0], rows, ids

    yield job
    for each in jobs:
        each.cancel()


def test_nothing_is_lost_or_doubled_by_crashes(job, tmp_path):
    """Killed before the work and after it, when the rows were ready but not handed over; hanging; raising."""
    names = ("fine", "killed-before", "killed-after", "hangs", "raises", "also-fine")
    crashed, rows, ids = job(*names, processes=2, timeout=5)
    assert crashed.status == "Completed"
    assert crashed.failures == 4
    assert {row["id"] for row in rows} == ids
    count = Counter(row["id"] for row in rows)
    assert count == {id_: 1 if id_.endswith("2") else len(DOCUMENTS) for id_ in ids}
    assert {row["line"] for row in rows if "error" in row} == {3}
    log = (tmp_path / "log.txt").read_text()
    for reason in ("the process ended with -9", "no answer in 5 s", "OSError: the file share is away"):
        assert reason in log


def test_a_file_that_always_fails_fails_the_job_instead_of_missing_in_its_result(job):
    failed, rows, _ = job("fine", "always", max_retries=1)
    assert (failed.status, failed.failures, rows) == ("Failed", 2, None)


def test_an_error_threshold_lets_the_job_complete_without_the_file(job):
    """Azure's default, -1, does it for any number: the status does not say that rows are missing."""
    lossy, rows, ids = job("fine", "always", max_retries=0, error_threshold=-1)
    assert lossy.status == "Completed"
    assert {row["id"] for row in rows} == {id_ for id_ in ids if id_.startswith("fine")}


def test_mini_batches_of_several_files(job):
    _, rows, ids = job("one", "two", "three", mini_batch_size=2)
    assert {row["id"] for row in rows} == ids


def test_a_script_in_a_folder_of_microsofts_name_is_not_found(tmp_path, tiny_folder):
    """The batch script used to be azureml/batch_score.py. Azure's engine imports it as azureml.batch_score when
    azureml-core has loaded its own package azureml, which has no such module, and every job failed before its first
    line; here it worked, because this engine loaded it by its path. The folder's name alone makes the difference."""
    (tmp_path / "shard.jsonl").write_text(json.dumps({"id": 1, "query": QUERY, "documents": DOCUMENTS}))
    environment = {"AZUREML_MODEL_DIR": str(tiny_folder), "RERANKER_DEVICE": "cpu"}
    for folder in ("azureml", "azureml_batch"):
        root, log = tmp_path / f"code_{folder}", tmp_path / f"{folder}.txt"
        for name in ("reranker_helpers", "azureml", "azureml_batch"):
            shutil.copytree(ROOT / name, root / name)
        if folder == "azureml":
            shutil.move(root / "azureml_batch" / "batch_score.py", root / "azureml")
        files, output = [tmp_path / "shard.jsonl"], tmp_path / folder / "scores.jsonl"
        script, settings = f"{folder}/batch_score.py", BatchSettings(max_retries=0)
        job = BatchJob(root, script, files, output, settings, environment, log)
        job.start()
        job.join(120)
        assert job.status == ("Failed" if folder == "azureml" else "Completed"), log.read_text()
        assert ("No module named 'azureml.batch_score'" in log.read_text()) == (folder == "azureml")


@pytest.fixture(scope="module")
def client(azure, tiny_folder):
    azure.quota["Standard_NC4as_T4_v3"] = 8
    client = azure.client()
    client.environments.create_or_update(load_environment(AZUREML / "environment.yml"))
    client.models.create_or_update(load_model(AZUREML / "model.yml", params_override=[{"path": str(tiny_folder)}]))
    client.compute.begin_create_or_update(load_compute(AZUREML / "batch-compute.yml")).result()
    return client


def deployment():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the class of the flat form, which the SDK calls old
        deployment = load_batch_deployment(AZUREML / "batch-deployment.yml")
    deployment.environment_variables["RERANKER_DEVICE"] = "cpu"
    return deployment


@pytest.fixture(scope="module")
def endpoint(client):
    endpoint = load_batch_endpoint(AZUREML / "batch-endpoint.yml")
    client.batch_endpoints.begin_create_or_update(endpoint).result()
    client.batch_deployments.begin_create_or_update(deployment()).result()
    endpoint.defaults = {"deployment_name": "scorer"}
    return client.batch_endpoints.begin_create_or_update(endpoint).result()


def wait(client, name: str) -> str:
    end = time.monotonic() + 120
    while (status := client.jobs.get(name).status) not in ("Completed", "Failed", "Canceled"):
        assert time.monotonic() < end
        time.sleep(0.3)
    return status


def test_from_the_yaml_files_to_the_rows(azure, client, endpoint, tmp_path, tiny_folder):
    """With a process killed from outside."""
    shards = tmp_path / "shards"
    shards.mkdir()
    ids = set().union(*(write_shard(shards / f"{number}.jsonl") for number in range(5)))
    job = client.batch_endpoints.invoke(endpoint.name, input=Input(type="uri_folder", path=str(shards)))
    running = azure._jobs[job.name]
    while not running.processes:
        time.sleep(0.05)
    os.kill(min(running.processes), signal.SIGKILL)
    assert wait(client, job.name) == "Completed"
    assert running.failures >= 1
    (step,) = client.jobs.list(parent_job_name=job.name)
    client.jobs.download(step.name, download_path=tmp_path, output_name="score")
    content = (tmp_path / "named-outputs" / "score" / "scores.jsonl").read_text()
    rows = [json.loads(row) for row in content.splitlines()]
    assert {row["id"] for row in rows} == ids
    expected = rerank(QUERY, DOCUMENTS, *load_reranker(tiny_folder, device="cpu"))
    for id_ in ids:
        ranked = sorted((row for row in rows if row["id"] == id_), key=lambda row: row.get("rank", 0))
        if "error" in ranked[0]:
            assert id_.endswith("2")
            continue
        assert [row["index"] for row in ranked] == [result.index for result in expected]
        assert [row["logit"] for row in ranked] == pytest.approx([result.score for result in expected], abs=1e-4)


def test_a_job_without_quota_stays_queued(azure, client, endpoint, tmp_path, monkeypatch):
    """Azure says nothing: the machines that the cluster asks for never come."""
    monkeypatch.setitem(azure.quota, "Standard_NC4as_T4_v3", 4)
    write_shard(tmp_path / "shard.jsonl")
    job = client.batch_endpoints.invoke(endpoint.name, input=Input(type="uri_folder", path=str(tmp_path)))
    assert client.jobs.get(job.name).status == "Queued"
    assert not azure._jobs[job.name].is_alive()


def test_a_deployment_without_its_compute(client, endpoint):
    orphan = deployment()
    orphan.name, orphan.compute = "orphan", "nothing"
    orphan.code_configuration = client.batch_deployments.get("scorer", endpoint.name).code_configuration
    with pytest.raises(HttpResponseError, match="nothing"):
        client.batch_deployments.begin_create_or_update(orphan)


def test_an_endpoint_without_a_default_deployment(client, tmp_path):
    endpoint = load_batch_endpoint(AZUREML / "batch-endpoint.yml", params_override=[{"name": "empty"}])
    client.batch_endpoints.begin_create_or_update(endpoint).result()
    write_shard(tmp_path / "shard.jsonl")
    with pytest.raises(HttpResponseError, match="no default deployment"):
        client.batch_endpoints.invoke("empty", input=Input(type="uri_folder", path=str(tmp_path)))
    client.batch_endpoints.begin_delete("empty").result()


def test_what_is_deleted_is_no_longer_listed(client):
    client.compute.begin_create_or_update(
        load_compute(AZUREML / "batch-compute.yml", params_override=[{"name": "bge-other"}])
    ).result()
    assert {item.name for item in client.compute.list()} == {"bge-batch", "bge-other"}
    client.compute.begin_delete("bge-other").result()
    assert [item.name for item in client.compute.list()] == ["bge-batch"]
    assert [item.name for item in client.batch_endpoints.list()] == ["bge-reranker-batch"]
    client.batch_endpoints.begin_delete("bge-reranker-batch").result()
    assert list(client.batch_endpoints.list()) == []
    with pytest.raises(ResourceNotFoundError):
        client.batch_deployments.get("scorer", "bge-reranker-batch")

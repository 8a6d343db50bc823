"""The real Azure SDK against tests/fake_azure: from the YAML files to an answer of Azure's own inference server."""

import json
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
import torch
from azure.ai.ml import (
    load_environment,
    load_model,
    load_online_deployment,
    load_online_endpoint,
)
from azure.core.exceptions import HttpResponseError, ResourceNotFoundError
from fake_azure import FakeAzure

from reranker_helpers import load_reranker, rerank

AZUREML = Path(__file__).parent.parent / "azureml"
QUERY = "what is a panda"
DOCUMENTS = ["bread and oven", "the panda is a bear", "law and contract"]


@pytest.fixture(scope="module")
def client(azure):
    return azure.client()


def deployment(name: str = "blue", file: str = "online-deployment-cpu.yml"):
    return load_online_deployment(AZUREML / file, params_override=[{"name": name}])


@pytest.fixture
def next_deployment(client, endpoint):
    """A deployment with the code of blue: the SDK needs long to look for files to upload, if there is a .venv."""

    def next_deployment(*arguments: str):
        result = deployment(*arguments)
        result.code_configuration = client.online_deployments.get("blue", endpoint.name).code_configuration
        return result

    return next_deployment


@pytest.fixture(scope="module")
def endpoint(client, tiny_folder):
    """An endpoint with the deployment blue, which gets all traffic."""
    for file in ("environment.yml", "environment-cpu.yml"):
        client.environments.create_or_update(load_environment(AZUREML / file))
    client.models.create_or_update(load_model(AZUREML / "model.yml", params_override=[{"path": str(tiny_folder)}]))
    endpoint = client.online_endpoints.begin_create_or_update(
        load_online_endpoint(AZUREML / "online-endpoint.yml")
    ).result()
    client.online_deployments.begin_create_or_update(deployment()).result()
    endpoint.traffic = {"blue": 100}
    return client.online_endpoints.begin_create_or_update(endpoint).result()


@pytest.fixture
def ask(client, endpoint):
    def ask(request: object, **headers: str) -> requests.Response:
        token = client.online_endpoints.get_keys(endpoint.name).access_token
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json", **headers}
        return requests.post(endpoint.scoring_uri, data=json.dumps(request), headers=headers, timeout=60)

    return ask


def test_the_endpoint_ranks_as_the_package_does_here(ask, tiny_folder):
    response = ask({"query": QUERY, "documents": DOCUMENTS})
    assert response.status_code == 200
    local = rerank(QUERY, DOCUMENTS, *load_reranker(tiny_folder, device="cpu"))
    answer = response.json()
    assert answer["model"] == "bge-reranker-v2-m3"
    assert [result["index"] for result in answer["results"]] == [result.index for result in local]
    assert [result["logit"] for result in answer["results"]] == pytest.approx([r.score for r in local], abs=1e-4)


def test_invoke_of_the_sdk(client, endpoint, tmp_path):
    file = tmp_path / "request.json"
    file.write_text(json.dumps({"query": QUERY, "documents": DOCUMENTS}))
    answer = json.loads(client.online_endpoints.invoke(endpoint.name, request_file=file, deployment_name="blue"))
    assert len(answer["results"]) == 3


def test_a_bad_request_is_424_and_the_real_status_is_in_a_header(ask):
    response = ask({"query": QUERY})
    assert response.status_code == 424
    assert response.headers["ms-azureml-model-error-statuscode"] == "400"
    assert response.json()["error"]["code"] == "MissingField"


def test_headers_reach_the_script_and_a_request_has_an_id(ask):
    """The caller's own id comes back; x-request-id is Azure's, whatever the caller sends, and is in the log."""
    headers = {"Content-Encoding": "gzip", "x-ms-client-request-id": "mine", "x-request-id": "mine"}
    response = ask({"query": QUERY, "documents": DOCUMENTS}, **headers)
    assert response.headers["ms-azureml-model-error-statuscode"] == "415", "the script refuses what says it is gzip"
    assert response.headers["x-ms-client-request-id"] == "mine"
    assert len(response.headers["x-request-id"]) == 36


def test_a_deployment_that_takes_too_long_is_408(azure, ask, endpoint, monkeypatch):
    settings = azure._resources[f"onlineEndpoints/{endpoint.name}/deployments/blue"]["properties"]["requestSettings"]
    monkeypatch.setitem(settings, "requestTimeout", "PT0.001S")
    assert ask({"query": QUERY, "documents": [f"the panda {i}" for i in range(900)]}).status_code == 408


def test_a_caller_without_the_right_token(ask, endpoint):
    assert ask({}, Authorization="Bearer nonsense").status_code == 401
    assert ask({}, Authorization="").status_code == 401


def test_the_second_upload_of_the_same_weights_sends_nothing(azure, client, endpoint, tiny_folder):
    before = len(azure.requests)
    client.models.create_or_update(load_model(AZUREML / "model.yml", params_override=[{"path": str(tiny_folder)}]))
    assert not [url for method, url in azure.requests[before:] if method == "PUT" and "blob" in url]


def test_large_files_arrive_in_blocks_and_whole(azure, client, tmp_path):
    """From 64 MB on the blob client sends parts, at the same time and in any order."""
    content = random.Random(0).randbytes(70 * 2**20)
    (tmp_path / "weights.bin").write_bytes(content)
    client.models.create_or_update(
        load_model(AZUREML / "model.yml", params_override=[{"name": "large"}, {"path": str(tmp_path)}])
    )
    assert [url for _, url in azure.requests if "comp=blocklist" in url]
    (stored,) = azure._root.glob("blobs/**/weights.bin")
    assert stored.read_bytes() == content


def test_logs(client, endpoint, ask):
    ask({"query": QUERY, "documents": []})
    log = client.online_deployments.get_logs("blue", endpoint.name, 200)
    assert log.startswith("Instance status:"), "Azure's own lines come first"
    assert "POST /score 200" in log
    assert "bge-reranker-v2-m3 ready on cpu in torch.float32" in log


def test_a_new_subscription_has_no_gpu(client, endpoint, next_deployment):
    with pytest.raises(
        HttpResponseError, match=r"(?s)Not enough quota.*Current usage/limit: 0/0\. Additional needed: 8"
    ):
        client.online_deployments.begin_create_or_update(next_deployment("gpu", "online-deployment.yml")).result()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the CUDA device that must be missing")
def test_a_crash_in_init_fails_the_deployment_and_is_in_the_log(azure, client, endpoint, monkeypatch, next_deployment):
    """A machine with a GPU whose driver is missing: the deployment says "cuda", and must not fall back to the CPU."""
    monkeypatch.setitem(azure.quota, "Standard_NC4as_T4_v3", 8)
    with pytest.raises(HttpResponseError, match="crashed"):
        client.online_deployments.begin_create_or_update(next_deployment("gpu", "online-deployment.yml")).result()
    assert "sees 0 CUDA devices" in client.online_deployments.get_logs("gpu", endpoint.name, 200)
    assert client.online_deployments.get("gpu", endpoint.name).provisioning_state == "Failed"
    client.online_deployments.begin_delete("gpu", endpoint.name).result()


def test_traffic_is_split_and_a_second_deployment_is_another_process(azure, client, endpoint, ask, next_deployment):
    client.online_deployments.begin_create_or_update(next_deployment("green")).result()
    changed = client.online_endpoints.get(endpoint.name)
    changed.traffic = {"blue": 75, "green": 25}
    client.online_endpoints.begin_create_or_update(changed).result()
    answered = Counter(ask({"query": QUERY, "documents": []}).headers["azureml-model-deployment"] for _ in range(40))
    assert answered == {"blue": pytest.approx(30, abs=1), "green": pytest.approx(10, abs=1)}
    assert ask({}, **{"azureml-model-deployment": "green"}).headers["azureml-model-deployment"] == "green"
    assert len({server.process.pid for server in azure._servers.values()}) == len(azure._servers) == 2
    changed.traffic = {"blue": 100}
    client.online_endpoints.begin_create_or_update(changed).result()
    client.online_deployments.begin_delete("green", endpoint.name).result()
    assert [
        deployment.name for deployment in client.online_deployments.list(endpoint.name) if deployment.name == "green"
    ] == []


def test_more_than_two_requests_at_once_are_too_many(ask):
    """max_concurrent_requests_per_instance is 1, and Azure lets as many wait as are served."""
    request = {"query": QUERY, "documents": [f"the panda {i}" for i in range(300)]}
    with ThreadPoolExecutor(6) as pool:
        responses = list(pool.map(ask, [request] * 6))
    statuses = Counter(response.status_code for response in responses)
    assert statuses[200] >= 2
    assert statuses[429] == 6 - statuses[200] > 0
    refused = next(response for response in responses if response.status_code == 429)
    assert refused.text == "", "no JSON, unlike the script's errors"
    assert refused.headers["ms-azureml-model-error-reason"] == "too_many_pending_request"


def test_traffic_to_a_deployment_that_does_not_exist(client, endpoint):
    changed = client.online_endpoints.get(endpoint.name)
    changed.traffic = {"purple": 100}
    with pytest.raises(HttpResponseError, match="purple"):
        client.online_endpoints.begin_create_or_update(changed).result()
    changed = client.online_endpoints.get(endpoint.name)
    changed.mirror_traffic = {"purple": 60}
    with pytest.raises(HttpResponseError, match="at most 50"):
        client.online_endpoints.begin_create_or_update(changed).result()


def test_an_endpoint_with_keys_takes_its_key_only(client):
    keyed = load_online_endpoint(
        AZUREML / "online-endpoint.yml", params_override=[{"name": "keyed"}, {"auth_mode": "key"}]
    )
    uri = client.online_endpoints.begin_create_or_update(keyed).result().scoring_uri
    key = client.online_endpoints.get_keys("keyed").primary_key
    statuses = [
        requests.post(uri, json={}, headers={"Authorization": f"Bearer {secret}"}, timeout=5).status_code
        for secret in (key, "nonsense")
    ]
    assert statuses == [404, 401], "no deployment yet, and no access"
    client.online_endpoints.begin_delete("keyed").result()


def test_a_deployment_without_its_endpoint_or_model(client, endpoint, next_deployment):
    with pytest.raises(ResourceNotFoundError):
        client.online_deployments.begin_create_or_update(
            load_online_deployment(
                AZUREML / "online-deployment-cpu.yml", params_override=[{"endpoint_name": "nothing"}]
            )
        )
    orphan = next_deployment("orphan")
    orphan.model = "azureml:nothing:1"
    with pytest.raises(ResourceNotFoundError, match="nothing"):
        client.online_deployments.begin_create_or_update(orphan)


def test_deleting_the_endpoint_ends_its_servers(azure, client, endpoint):
    """After all other tests of this endpoint, and before another FakeAzure takes over what the SDK sends."""
    servers = list(azure._servers.values())
    assert servers
    client.online_endpoints.begin_delete(endpoint.name).result()
    assert all(server.process.poll() is not None for server in servers)
    with pytest.raises(ResourceNotFoundError):
        client.online_endpoints.get(endpoint.name)
    assert list(client.online_endpoints.list()) == []


def test_other_hosts_are_refused():
    with FakeAzure() as azure:
        with pytest.raises(requests.ConnectionError, match=r"example\.com is refused"):
            requests.get("https://example.com/", timeout=5)
        assert azure.blocked == ["example.com"]

"""azureml/rollout.py, as .github/workflows/deploy.yml runs it: a good version takes over, a broken one never stays."""

import os
import re
import shlex
from pathlib import Path

import pytest
import yaml
from azure.ai.ml import load_environment, load_model, load_online_deployment, load_online_endpoint
from azure_scripts import load_script
from fake_azure import FakeAzure

AZUREML = Path(__file__).parent.parent / "azureml"
FILE = AZUREML / "online-deployment-cpu.yml"
WORKFLOW = yaml.safe_load((AZUREML.parent / ".github/workflows/deploy.yml").read_text())
(JOB,) = WORKFLOW["jobs"].values()
rollout = load_script("azureml/rollout.py")


class Azure(FakeAzure):
    """A subscription where green may die as soon as users reach it."""

    green_dies = False

    def _put_endpoint(self, workspace, path, endpoint, sent):
        if self.green_dies and sent["properties"].get("traffic", {}).get("green"):
            self._servers[f"{path}/deployments/green"].stop()
            self._resources[f"{path}/deployments/green"]["properties"]["requestSettings"]["requestTimeout"] = "PT1S"
        return super()._put_endpoint(workspace, path, endpoint, sent)


@pytest.fixture(scope="module")
def azure():
    with Azure() as azure:
        yield azure
        assert not azure.blocked


@pytest.fixture(scope="module")
def client(azure):
    """For a workspace whose endpoint has the deployment blue, which gets all traffic."""
    client = azure.client()
    client.environments.create_or_update(load_environment(AZUREML / "environment-cpu.yml"))
    model = load_model(AZUREML / "model.yml", params_override=[{"path": os.environ["RERANKER_MODEL"]}])
    client.models.create_or_update(model)
    endpoint = load_online_endpoint(AZUREML / "online-endpoint.yml")
    client.online_endpoints.begin_create_or_update(endpoint).result()
    client.online_deployments.begin_create_or_update(load_online_deployment(FILE)).result()
    return client


@pytest.fixture
def traffic(client, azure, monkeypatch):
    """All of it is blue's again, and only blue is there. Returns a function that tells who has any, and how much."""
    for name, value in zip(rollout.VARIABLES, ("subscription", "group", "workspace"), strict=True):
        monkeypatch.setenv(name, value)
    endpoint = client.online_endpoints.get("bge-reranker")
    endpoint.traffic = {"blue": 100}
    client.online_endpoints.begin_create_or_update(endpoint).result()
    client.online_deployments.begin_delete("green", "bge-reranker").result()
    return lambda: {name: n for name, n in client.online_endpoints.get("bge-reranker").traffic.items() if n}


def run(file: Path = FILE) -> None:
    """Run the command of the workflow's last step."""
    step = JOB["steps"][-1]
    values = {"ENDPOINT": "bge-reranker", "FILE": str(file)}
    assert step["env"].keys() == values.keys()
    python, script, *arguments = shlex.split(re.sub(r"\$(\w+)", lambda match: values[match[1]], step["run"]))
    assert (python, script) == ("python", "azureml/rollout.py")
    rollout.main(arguments)


@pytest.fixture
def changed(tmp_path):
    """Write the deployment with other environment variables."""

    def changed(**variables: str) -> Path:
        content = yaml.safe_load(FILE.read_text())
        content["environment_variables"] |= variables
        content["code_configuration"]["code"] = str(AZUREML.parent)
        (tmp_path / "deployment.yml").write_text(yaml.safe_dump(content))
        return tmp_path / "deployment.yml"

    return changed


def test_a_good_green_gets_all_and_then_it_is_blues_turn(traffic, caplog):
    caplog.set_level("INFO", "rollout")
    run()
    assert traffic() == {"green": 100}
    shares = [record.args[1] for record in caplog.records if "of the traffic" in record.msg]
    assert shares == [10, 100]
    run()
    assert traffic() == {"blue": 100}


def test_a_green_that_refuses_is_found_before_any_user_gets_it(traffic, changed, azure):
    asked = len(azure.requests)
    with pytest.raises(SystemExit, match=r"not rolled out: green answered 413: .*documents"):
        run(changed(RERANKER_MAX_DOCUMENTS="2"))
    assert traffic() == {"blue": 100}
    assert len([url for _, url in azure.requests[asked:] if url.endswith("/score")]) == 1


def test_a_green_that_fails_under_traffic_loses_it(traffic, azure, monkeypatch, caplog):
    monkeypatch.setattr(azure, "green_dies", True)
    caplog.set_level("INFO", "rollout")
    with pytest.raises(SystemExit, match="not rolled out: no answer"):
        run()
    assert traffic() == {"blue": 100}
    assert "green still costs money" in caplog.text


def test_a_green_that_does_not_start_never_gets_any(traffic, changed):
    with pytest.raises(SystemExit, match=r"not rolled out: .*crashed"):
        run(changed(RERANKER_MAX_LENGTH="many"))
    assert traffic() == {"blue": 100}


def test_a_cancelled_roll_out_gives_the_traffic_back(traffic, monkeypatch):
    def cancelled(uri, token, deployment=None):
        if deployment is None:
            raise KeyboardInterrupt
        return deployment

    monkeypatch.setattr(rollout, "ask", cancelled)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert traffic() == {"blue": 100}


def test_what_is_not_there_is_named(traffic, client, monkeypatch):
    with pytest.raises(SystemExit, match="no endpoint nothing: create it as in chapters 8 and 9"):
        rollout.main(["nothing", str(FILE)])
    with pytest.raises(SystemExit, match=r"rollout\.py ENDPOINT FILE"):
        rollout.main([])
    endpoint = client.online_endpoints.get("bge-reranker")
    endpoint.traffic = {"blue": 0}
    client.online_endpoints.begin_create_or_update(endpoint).result()
    with pytest.raises(SystemExit, match=r"the traffic is \{'blue': 0\}: give all of it to one deployment first"):
        run()
    monkeypatch.delenv("AZURE_RESOURCE_GROUP")
    with pytest.raises(SystemExit, match="set AZURE_RESOURCE_GROUP"):
        run()


def test_the_workflow_runs_only_by_hand_and_keeps_no_secret():
    assert WORKFLOW[True].keys() == {"workflow_dispatch"}, "YAML reads `on` as True"
    assert WORKFLOW["permissions"]["id-token"] == "write"
    assert "secrets." not in str(WORKFLOW)
    assert {*rollout.VARIABLES} == JOB["env"].keys()

"""BGE_Reranker_AzureML.ipynb: it addresses Azure with the same cells, keeps no secret, and always cleans up.

That the rehearsal's stored outputs are true, nbval checks.
"""

import json
import logging
import os
import re
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from fake_azure import FakeAzure, InferenceServer
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOK = nbformat.read(ROOT / "BGE_Reranker_AzureML.ipynb", as_version=4)
CELLS = {cell.id: cell for cell in NOTEBOOK.cells}
ACCOUNT = {
    "AZURE_SUBSCRIPTION_ID": "3f2504e0-4f89-41d3-9a0c-0305e82c3301",
    "AZURE_RESOURCE_GROUP": "a-group",
    "AZUREML_WORKSPACE_NAME": "a-workspace",
}
FROM_OUTSIDE = (
    f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import fake_azure; fake_azure.FakeAzure().install()"
)


def printed(cell) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def test_with_an_account_the_same_cells_address_azure(tmp_path, monkeypatch):
    """The three variables are set and the fake is installed before the first cell, so that no cell knows of it."""
    startup = tmp_path / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00-fake-azure.py").write_text(FROM_OUTSIDE)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    for name, value in ACCOUNT.items():
        monkeypatch.setenv(name, value)

    notebook = nbformat.from_dict(NOTEBOOK)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}, coalesce_streams=True)
    client.execute()

    assert printed(client.nb.cells[[c.id for c in client.nb.cells].index("config")]).startswith("*** AZURE ***")
    assert "REHEARSAL" not in "".join(printed(cell) for cell in client.nb.cells if cell.cell_type == "code")
    assert ACCOUNT["AZURE_SUBSCRIPTION_ID"] not in nbformat.writes(client.nb)
    differ = [
        cell.id
        for cell in client.nb.cells
        if cell.cell_type == "code"
        and "nbval-ignore-output" not in cell.metadata.get("tags", [])
        and printed(cell) != printed(CELLS[cell.id])
    ]
    named = ["names", "create-endpoint", "cleanup"]
    assert differ == ["config", *named], "the banner, and the names that are the workspace's own"


@pytest.fixture
def run(monkeypatch):
    """Run some cells in this process, and return their variables."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    variables = {}

    def run(*ids: str) -> SimpleNamespace:
        for id_ in ids:
            exec(compile(CELLS[id_].source, id_, "exec"), variables)
        return SimpleNamespace(**variables)

    yield run
    logging.disable(logging.NOTSET)


SIGN_IN = ["setup", "config", "names", "sign-in", "wait", "monitors", "monitor-helper"]
DEPLOY = ["weights", "register-model", "register-environment", "create-endpoint", "deploy-logs", "deploy-helper"]


@pytest.fixture
def account(monkeypatch):
    for name, value in ACCOUNT.items():
        monkeypatch.setenv(name, value)


def test_cleaning_up_after_a_failure_half_way(run, account, capsys):
    with FakeAzure(quota={}):
        run(*SIGN_IN, "look", *DEPLOY)
        with pytest.raises(RuntimeError, match=r"(?s)Not enough quota available for Standard_F8s_v2.*no log") as raised:
            run("deploy-blue")
        assert ACCOUNT["AZURE_SUBSCRIPTION_ID"] not in str(raised.value), "Azure's message has it"
        assert len(list(run("cleanup").client.online_endpoints.list())) == 0
        run("verify")
    assert "bge-reranker-" in capsys.readouterr().out


def test_cleaning_up_in_a_new_kernel_and_twice(run, account, capsys):
    with FakeAzure():
        space = run(*SIGN_IN, "create-endpoint")
        assert [item.name for item in space.client.online_endpoints.list()] == [space.ENDPOINT]
        run(*SIGN_IN, "cleanup", "verify", "cleanup", "verify")
    assert capsys.readouterr().out.count("rule of this notebook is left") == 2


def test_cleaning_up_covers_the_cluster_and_the_batch_endpoint(run, account, capsys):
    with FakeAzure():
        run(*SIGN_IN, "cluster", "batch-endpoint")
        space = run(*SIGN_IN, "cleanup", "verify")
        assert [item.name for item in space.client.compute.list()] == []
        assert [item.name for item in space.client.batch_endpoints.list()] == []
    out = capsys.readouterr().out
    assert f"{space.CLUSTER} deleted" in out
    assert f"{space.BATCH_ENDPOINT} deleted" in out


def test_cleaning_up_covers_the_monitoring(run, account, capsys):
    """The endpoint goes, but what watches it stays in the resource group, unless it is deleted."""
    with FakeAzure():
        space = run(*SIGN_IN, "create-endpoint", "diagnostics", "alert", "monitored")
        assert space.monitor("PUT", "autoscale setting", {"location": "westeurope", "properties": {}}).ok
        out = capsys.readouterr().out
        assert out.count("created") == 2
        assert "kept:  ['AmlOnlineEndpointTrafficLog']\nalert: Callers are refused" in out
        with pytest.raises(AssertionError, match=r"still there: .*'diagnostic setting', 'alert', 'autoscale setting'"):
            exec(CELLS["cleanup"].source.partition("\n\n\nfor")[0] + "\n" + CELLS["verify"].source, vars(space))
        run("cleanup", "verify")
        assert {space.monitor("GET", what).status_code for what in space.MONITORS} == {404}


def test_without_the_right_to_monitor_the_notebook_goes_on(run, account, capsys):
    with FakeAzure(role="AzureML Data Scientist"):
        run(*SIGN_IN, "create-endpoint", "diagnostics", "alert", "monitored")
    out = capsys.readouterr().out
    assert out.count("not created: ") == 2
    assert "perform action 'Microsoft.Insights/metricAlerts/write'" in out
    assert "alert: none" in out
    assert ACCOUNT["AZURE_SUBSCRIPTION_ID"] not in out


MISTAKES = [
    ("alert", '"RequestsPerMinute"', '"Requests"', "Couldn't find a metric named Requests"),
    ("alert", '"statusCode"', '"StatusCodes"', "no dimension {'StatusCodes'}"),
    ("alert", '"skipMetricValidation"', '"skipValidation"', "Could not find member {'skipValidation'}"),
    ("alert", '"PT15M"', '"PT1M"', "do not fit"),
    ("alert", '"description": "Callers are refused", ', "", "Required properties not found in JSON: ['description']"),
    ("alert", "[endpoint.id]", '[endpoint.id + "s"]', "was not found"),
    ("alert", '"location": "global"', '"location": "westeurope"', "is 'global'"),
    ("diagnostics", "AmlOnlineEndpointTrafficLog", "Traffic", "Category 'Traffic' is not supported."),
    ("diagnostics", '"workspaceId"', '"workspace"', "At least one data sink needs to be specified."),
]


@pytest.mark.parametrize(("cell", "right", "wrong", "message"), MISTAKES, ids=lambda value: value[:20])
def test_what_azure_monitor_would_refuse_is_refused_here(
    run, account, capsys, monkeypatch, cell, right, wrong, message
):
    assert right in CELLS[cell].source
    with FakeAzure():
        run(*SIGN_IN, "create-endpoint", "diagnostics")
        capsys.readouterr()
        monkeypatch.setitem(CELLS[cell], "source", CELLS[cell].source.replace(right, wrong))
        run(cell)
    out = capsys.readouterr().out
    assert out.startswith("not created: ")
    assert message in out


def test_the_names_are_ones_that_azure_takes(run, account):
    """A cluster's name ends with a letter and has at most 16 characters; an endpoint's has at most 32."""
    with FakeAzure():
        space = run("setup", "config", "names")
    assert re.fullmatch(r"[a-z][a-z0-9-]{1,14}[a-z]", space.CLUSTER)
    for name in (space.ENDPOINT, space.BATCH_ENDPOINT):
        assert re.fullmatch(r"[a-z][a-z0-9-]{2,31}", name)


def test_cleaning_up_touches_nobody_elses_endpoint(run, account):
    with FakeAzure():
        space = run(*SIGN_IN, "create-endpoint")
        space.endpoint.name = "of-a-colleague"
        space.client.online_endpoints.begin_create_or_update(space.endpoint).result()
        run("cleanup", "verify")
        assert [item.name for item in space.client.online_endpoints.list()] == ["of-a-colleague"]


def test_a_crash_in_init_shows_the_containers_log(run, account, monkeypatch, tmp_path, tiny_folder):
    (tmp_path / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    monkeypatch.setenv("RERANKER_MODEL", str(tmp_path))
    with FakeAzure():
        run(*SIGN_IN, "look", *DEPLOY)
        with pytest.raises(RuntimeError, match=r"(?s)crashed.*log of inference-server ends with.*config\.json"):
            run("deploy-blue")


def test_a_model_that_cannot_be_downloaded_shows_the_log_of_the_container_that_tried(run, account):
    with FakeAzure() as azure:
        run(*SIGN_IN, "look", *DEPLOY)
        (stored,) = azure._root.glob("blobs/**/stand_in_model")
        shutil.rmtree(stored)
        with pytest.raises(RuntimeError, match=r"(?s)Unable to download.*log of storage-initializer.*failed"):
            run("deploy-blue")


def test_waiting_has_a_limit_and_says_where_to_look(run, account):
    """An image that is built for ever, a machine that never comes, a job that stays queued."""
    never = SimpleNamespace(done=lambda: False, wait=lambda seconds: None)
    with FakeAzure():
        space = run(*SIGN_IN)
        with pytest.raises(TimeoutError, match=r"blue: not ready after 0\.001 minutes\. Look at the build log"):
            space.wait("blue", lambda: never, minutes=0.001, look="the build log")
    exec(CELLS["follow"].source.partition("\n\nfollow(")[0], variables := {"time": time})
    variables["client"] = SimpleNamespace(jobs=SimpleNamespace(get=lambda name: SimpleNamespace(status="Queued")))
    variables["time"] = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: None)
    with pytest.raises(TimeoutError, match=r"Queued for 0\.001 minutes: look at the quota"):
        variables["follow"]("a job", queued=0.001)


def test_one_token_serves_many_requests(run, account, monkeypatch):
    """After `az login` each get_token starts a process: the latency would be that of the command line."""
    with FakeAzure():
        space = run(*SIGN_IN)
        asked = []
        for name in ("get_token", "get_token_info"):
            real = getattr(space.credential, name)
            spy = lambda scope, real=real, **options: asked.append(scope) or real(scope, **options)  # noqa: E731
            monkeypatch.setattr(space.credential, name, spy)
        space = run("create-endpoint", "ask")
        for _ in range(5):
            assert space.ask({}).status_code == 404
    assert asked.count("https://ml.azure.com/.default") == 1


def test_a_near_tie_does_not_stop_a_notebook_that_costs_money(run, account):
    """Two documents whose scores differ by less than rounding may change places; other scores may not."""
    with FakeAzure():
        space = run("setup", "config", "names")
    exec(CELLS["same-ranking"].source.partition("\n\nlocal =")[0], variables := {"HARDWARE": space.HARDWARE})
    tolerance, agree = variables["TOLERANCE"], variables["agree"]
    near = [SimpleNamespace(index=0, score=2.0), SimpleNamespace(index=1, score=2.0 - tolerance / 2)]
    swapped = [{"index": 1, "logit": 2.0}, {"index": 0, "logit": 2.0 - tolerance / 2}]
    wrong = [{"index": 1, "logit": 2.5}, {"index": 0, "logit": 2.0}]
    assert agree(swapped, near)
    assert not agree(wrong, near)


@pytest.mark.parametrize(("hardware", "dtype", "bits"), [("cpu", "float32", 0), ("gpu", "bfloat16", 3)])
def test_the_tolerance_is_what_was_measured(hardware, dtype, bits):
    measured = json.loads((ROOT / "benchmarks/results/full-cpu-avx512.json").read_text())["variants"]
    runs = [run for name, run in measured.items() if run["dtype"] == dtype and "int8" not in name]
    exec(CELLS["same-ranking"].source.partition("\n\nlocal =")[0], variables := {"HARDWARE": hardware})
    reckoned = 10 * max(run["largest_difference"] for run in runs) / 2**bits
    assert variables["TOLERANCE"] == pytest.approx(reckoned, rel=0.2)


def test_two_variables_of_three(run, account, monkeypatch):
    monkeypatch.delenv("AZURE_RESOURCE_GROUP")
    with pytest.raises(RuntimeError, match="set AZURE_RESOURCE_GROUP too, or none of the three for a rehearsal"):
        run("setup", "config")


def test_nothing_secret_is_stored():
    text = nbformat.writes(NOTEBOOK)
    identifiers = set(re.findall(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", text))
    assert identifiers <= {"00000000-0000-0000-0000-000000000000"}
    outputs = "".join(str(cell.get("outputs", "")) for cell in NOTEBOOK.cells)
    for secret in ("Bearer", "sig=", "fake-token", "-key-1", "/subscriptions/", str(Path.home())):
        assert secret not in outputs
    assert "REHEARSAL" in printed(CELLS["config"]), "the stored outputs are labelled"


def test_coheres_client(tmp_path, installed):
    """The snippet in TROUBLESHOOTING.md, against the real server."""
    cohere = installed("cohere")
    assert cohere
    source = re.search(r"```python\n(.+?)```", (ROOT / "TROUBLESHOOTING.md").read_text(), re.DOTALL)[1]
    snippet, call = source.rsplit("\n", 2)[0], source.rsplit("\n", 2)[1]
    model = Path(os.environ["RERANKER_MODEL"])
    with InferenceServer(ROOT, ROOT / "azureml" / "score.py", model, {}, tmp_path / "log.txt") as server:
        space = {
            "endpoint": SimpleNamespace(scoring_uri=server.url),
            "token": lambda: "a token",
            "query": "which is a fruit?",
            "documents": ["a car", "an apple is a fruit", "the law"],
        }
        exec(snippet, space)
        results = eval(call, space)
    assert results[0].index == 1

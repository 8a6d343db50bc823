"""The files of azureml/: they load with the Azure SDK, and hold what the SDK does not check and Azure does."""

import re
from pathlib import Path

import pytest
import yaml
from azure.ai.ml import (
    load_batch_deployment,
    load_batch_endpoint,
    load_compute,
    load_environment,
    load_model,
    load_online_deployment,
    load_online_endpoint,
)
from azure.ai.ml._utils._asset_utils import get_ignore_file, get_upload_files_from_folder
from azure_scripts import wire

ROOT = Path(__file__).parent.parent
AZUREML = ROOT / "azureml"
DEPLOYMENTS = ["online-deployment.yml", "online-deployment-cpu.yml"]
ENVIRONMENTS = ["environment.yml", "environment-cpu.yml"]
BATCH_ENVIRONMENTS = ["environment-batch.yml", "environment-batch-cpu.yml"]


def pins(lines: list[str]) -> dict[str, str]:
    return dict(line.split("==") for line in lines if "==" in line)


@pytest.mark.parametrize("name", ENVIRONMENTS + BATCH_ENVIRONMENTS)
def test_versions_are_pinned_and_tested(name):
    environment = load_environment(AZUREML / name)
    body = environment._to_rest_object().as_dict()["properties"]
    assert re.fullmatch(r"mcr\.microsoft\.com/azureml/.+ubuntu22\.04:\d{8}\.v\d+", body["image"]), "pinned"
    (pip,) = [item["pip"] for item in yaml.safe_load(body["condaFile"])["dependencies"] if isinstance(item, dict)]
    packages = pins(pip)
    # Batch jobs need two packages by Microsoft's documentation, and pandas, which their engine imports. An endpoint has
    # none of them: they are half a gigabyte, and one is out of support.
    engine = {"azureml-core", "azureml-dataset-runtime[fuse]", "pandas"}
    own = engine if "batch" in name else {"azureml-inference-server-http"}
    assert packages.keys() == {"torch", "transformers", "tokenizers"} | own
    assert packages.get("pandas", "2.").startswith("2.")
    packages["torch"], _, build = packages["torch"].partition("+")
    assert build == ("cpu" if "cpu" in name else "cu126"), "without it pip would take another one from PyPI"
    requirements = pins((ROOT / "requirements.txt").read_text().splitlines())
    tested = {name: pin for name, pin in packages.items() if name not in engine}
    assert tested.items() <= requirements.items(), "the versions that were tested"
    assert all("==" in line or line.startswith("--extra-index-url") for line in pip)


def test_the_model_has_a_type_and_a_name_azure_takes():
    body = load_model(AZUREML / "model.yml")._to_rest_object().as_dict()["properties"]
    assert body["modelType"] == "custom_model"
    assert re.fullmatch(r"[a-zA-Z0-9][\w.-]*", load_model(AZUREML / "model.yml").name), "Azure forbids a slash"


def test_clients_sign_in_with_entra_id_and_the_endpoint_has_a_name_azure_takes():
    endpoint = load_online_endpoint(AZUREML / "online-endpoint.yml")
    assert endpoint._to_rest_online_endpoint("westeurope").as_dict()["properties"]["authMode"] == "AADToken"
    assert re.fullmatch(r"[a-z][a-z0-9-]{2,24}", endpoint.name), "at most 32 characters, and the notebook adds seven"


@pytest.fixture(params=DEPLOYMENTS)
def deployment(request):
    return load_online_deployment(AZUREML / request.param)


def body_of(deployment) -> dict:
    return deployment._to_rest_object(location="westeurope").as_dict()


def test_deployment_says_all_that_azure_needs(deployment):
    """The SDK takes a deployment without model, environment, code or a known machine."""
    body = body_of(deployment)
    assert body["sku"] == {"name": "Default", "capacity": 1}
    assert deployment.instance_type in ("Standard_NC4as_T4_v3", "Standard_F8s_v2")
    assert (AZUREML / deployment.code_configuration.code / deployment.code_configuration.scoring_script).is_file()
    model = load_model(AZUREML / "model.yml")
    assert deployment.model == f"{model.name}:{model.version}"
    environments = [load_environment(AZUREML / name) for name in ENVIRONMENTS]
    assert deployment.environment in [f"{env.name}:{env.version}" for env in environments]
    assert (deployment.environment_variables["RERANKER_DEVICE"] == "cpu") == ("-cpu:" in deployment.environment)
    assert all(isinstance(value, str) for value in deployment.environment_variables.values())


CACHE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
"""A setting of the library that computes on a CPU."""


def test_deployments_differ_only_in_the_machine_and_what_follows_from_it():
    gpu, cpu = (yaml.safe_load((AZUREML / name).read_text()) for name in DEPLOYMENTS)
    assert gpu.keys() == cpu.keys()
    assert {key for key in gpu if gpu[key] != cpu[key]} == {
        "environment",
        "instance_type",
        "environment_variables",
        "request_settings",
    }
    assert gpu["environment_variables"].keys() == cpu["environment_variables"].keys() - {CACHE}


# Floating-point operations a second that the machine is assumed to sustain: a quarter of the T4's float16 peak, 65e12
# by NVIDIA's data sheet, and 25e9 in float32 for each of 8 vCPUs with AVX-512.
SUSTAINED = {"Standard_NC4as_T4_v3": 16e12, "Standard_F8s_v2": 200e9}
LAYERS, HIDDEN = 24, 1024  # bge-reranker-v2-m3
TOKENISING = 3.6e-6  # seconds a token on one core, measured with the real vocabulary's size


def worst_seconds(deployment) -> float:
    """The longest that an accepted request can take: all its tokens in inputs of the greatest length."""
    variables = deployment.environment_variables
    tokens, length = int(variables["RERANKER_MAX_TOKENS"]), int(variables["RERANKER_MAX_LENGTH"])
    weights = 2 * 12 * HIDDEN**2  # a multiplication and an addition for each weight of a layer
    attention = 2 * 2 * length * HIDDEN  # query times key, and weight times value
    model = tokens * LAYERS * (weights + attention) / SUSTAINED[deployment.instance_type]
    return model + 2 * wire.TOKENIZER_TOKENS * TOKENISING  # once to count the tokens, once to score them


def test_the_worst_request_and_one_that_waits_for_it_end_in_time(deployment):
    body = body_of(deployment)["properties"]
    settings = deployment.request_settings
    assert settings.request_timeout_ms <= 180_000, "Azure's maximum, which the SDK does not check"
    assert settings.max_concurrent_requests_per_instance == int(deployment.environment_variables["WORKER_COUNT"])
    assert int(deployment.environment_variables["SCORING_TIMEOUT_MS"]) == settings.request_timeout_ms
    assert body["requestSettings"]["requestTimeout"] in ("PT2M", "PT3M")
    seconds = worst_seconds(deployment)
    assert settings.request_timeout_ms / 1000 / 2 > seconds > settings.request_timeout_ms / 1000 / 3, "no idle reserve"


def test_the_limits_are_those_that_the_script_reads(deployment, monkeypatch):
    for name, value in deployment.environment_variables.items():
        monkeypatch.setenv(name, value)
    limits = wire.Limits.from_environment()
    assert limits.tokens == int(deployment.environment_variables["RERANKER_MAX_TOKENS"])
    read = {name for file in AZUREML.glob("*.py") for name in re.findall(r"RERANKER_\w+", file.read_text())}
    written = {name for name in deployment.environment_variables if name.startswith("RERANKER_")}
    assert written <= read, "a misspelt variable would be ignored"


def test_probes_leave_time_to_load_and_to_score(deployment):
    for probe in (deployment.liveness_probe, deployment.readiness_probe):
        patience = probe.period * probe.failure_threshold
        assert patience > worst_seconds(deployment), "the worker answers no probe while it scores"
        assert probe.initial_delay + patience >= 600, "loading 2.3 GB from a mounted disk"
        assert probe.timeout <= probe.period


@pytest.fixture
def scorer():
    with pytest.warns(UserWarning, match="intended as a base class"):  # the flat form's class is called old
        return load_batch_deployment(AZUREML / "batch-deployment.yml")


@pytest.fixture
def cluster():
    return load_compute(AZUREML / "batch-compute.yml")


def test_the_batch_deployment_says_all_that_azure_needs(scorer, cluster):
    """The SDK takes one without compute, environment or code, and every default of Azure's that does not fit."""
    body = body_of(scorer)["properties"]
    model, environment = load_model(AZUREML / "model.yml"), load_environment(AZUREML / BATCH_ENVIRONMENTS[0])
    assert body["model"]["assetId"] == f"{model.name}:{model.version}"
    assert body["environmentId"] == f"{environment.name}:{environment.version}"
    assert body["compute"] == cluster.name
    assert (AZUREML / scorer.code_configuration.code / scorer.code_configuration.scoring_script).is_file()
    assert scorer.endpoint_name == load_batch_endpoint(AZUREML / "batch-endpoint.yml").name
    assert (body["outputAction"], body["outputFileName"]) == ("AppendRow", "scores.jsonl")
    assert body["errorThreshold"] == 0, "a job that is Completed has all rows"
    assert body["retrySettings"] == {"maxRetries": 3, "timeout": "PT30M"}
    assert body["maxConcurrencyPerInstance"] == 1, "one GPU, one process"
    assert all(isinstance(value, str) for value in scorer.environment_variables.values())


def test_the_cluster_scales_to_zero(scorer, cluster):
    body = cluster._to_rest_object().as_dict()["properties"]["properties"]
    assert body["scaleSettings"]["minNodeCount"] == 0
    assert scorer.instance_count <= body["scaleSettings"]["maxNodeCount"]
    assert body["vmSize"] == load_online_deployment(AZUREML / "online-deployment.yml").instance_type
    assert re.fullmatch(r"[a-z][a-z0-9-]{0,14}[a-z]", cluster.name), "2 to 16 characters"


def test_a_batch_endpoint_knows_no_keys():
    endpoint = load_batch_endpoint(AZUREML / "batch-endpoint.yml")
    body = endpoint._to_rest_batch_endpoint("westeurope").as_dict()["properties"]
    assert body["authMode"].lower() == "aadtoken"
    assert re.fullmatch(r"[a-z][a-z0-9-]{2,31}", endpoint.name)


def test_a_file_of_the_recommended_size_ends_in_time_at_its_slowest(scorer, cluster):
    """10,000 pairs of 512 tokens, all in inputs of the greatest length: the comment's arithmetic."""
    weights, attention = 2 * 12 * HIDDEN**2, 2 * 2 * wire.Limits().length * HIDDEN
    seconds = 10_000 * 512 * LAYERS * (weights + attention) / SUSTAINED[cluster.size]
    assert scorer.mini_batch_size == 1
    assert 5 > scorer.retry_settings.timeout / seconds > 3


def test_the_upload_is_the_scripts_and_the_package():
    """Named by the SDK's own code. Without .amlignore it would be the whole repository with its .git."""
    ignore = get_ignore_file(ROOT)
    uploaded = {Path(name).as_posix() for _, name in get_upload_files_from_folder(ROOT, ignore_file=ignore)}
    uploaded = {name.removeprefix(f"{ROOT.name}/") for name in uploaded}
    files = [file for name in ("azureml", "azureml_batch", "reranker_helpers") for file in (ROOT / name).iterdir()]
    assert uploaded == {file.relative_to(ROOT).as_posix() for file in files if file.suffix in (".py", ".typed")}

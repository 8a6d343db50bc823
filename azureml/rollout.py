"""Roll out a new version beside the one that serves: `python azureml/rollout.py ENDPOINT FILE`.

The steps of chapter 12 of BGE_Reranker_AzureML.ipynb without a person: deploy FILE, ask it alone, give it a tenth of
the traffic, ask as users do, and give it all, or none and exit with 1. The old deployment stays, ready to take over.
.github/workflows/deploy.yml runs this. AZURE_SUBSCRIPTION_ID, AZURE_RESOURCE_GROUP and AZUREML_WORKSPACE_NAME say
where; what FILE names must be registered (chapter 7).
"""

import logging
import os
import sys
import time
from collections.abc import Callable

import requests
from azure.ai.ml import MLClient, load_online_deployment
from azure.core.exceptions import HttpResponseError, ResourceNotFoundError
from azure.identity import DefaultAzureCredential, get_bearer_token_provider

VARIABLES = ("AZURE_SUBSCRIPTION_ID", "AZURE_RESOURCE_GROUP", "AZUREML_WORKSPACE_NAME")
SCOPES = ("https://management.azure.com/.default", "https://ml.azure.com/.default")
QUERY = "What are the benefits of regular exercise?"
DOCUMENTS = ["The marathon has a long history.", "Regular exercise improves health, mood and sleep.", "Bread is baked."]
BEST = 1
"""The document that any reranker puts first."""
ANSWERS = 5
"""Right answers that the new deployment must give to requests that do not name it."""

logger = logging.getLogger("rollout")


class Faulty(Exception):
    """The endpoint does not answer as it should."""


def main(arguments: list[str]) -> None:
    """Raises SystemExit with the reason if the old deployment serves as before."""
    if len(arguments) != 2:
        raise SystemExit(__doc__)
    if missing := [name for name in VARIABLES if not os.environ.get(name)]:
        raise SystemExit(f"set {', '.join(missing)}")
    credential = DefaultAzureCredential()
    for scope in SCOPES:  # at once: what a workflow signs in with is good for minutes, the tokens for an hour
        credential.get_token(scope)
    workspace = [os.environ[name] for name in VARIABLES]
    client = MLClient(credential, *workspace, enable_telemetry=False, show_progress=False)
    try:
        roll_out(client, get_bearer_token_provider(credential, SCOPES[1]), *arguments)
    except (Faulty, HttpResponseError) as error:
        raise SystemExit(f"not rolled out: {error}") from None


def roll_out(client: MLClient, token: Callable[[], str], endpoint_name: str, file: str) -> None:
    """Deploy a file, and give it the traffic if it answers well. Raises Faulty, or HttpResponseError from Azure."""
    try:
        endpoint = client.online_endpoints.get(endpoint_name)
    except ResourceNotFoundError:
        raise Faulty(f"there is no endpoint {endpoint_name}: create it as in chapters 8 and 9") from None
    serving = [name for name, share in endpoint.traffic.items() if share]
    if len(serving) != 1:
        raise Faulty(f"the traffic is {endpoint.traffic}: give all of it to one deployment first")
    (old,) = serving
    new = "green" if old == "blue" else "blue"
    deployment = load_online_deployment(file, params_override=[{"name": new}, {"endpoint_name": endpoint_name}])
    # As many instances as have carried the load so far.
    now = client.online_deployments.get(old, endpoint_name).instance_count
    deployment.instance_count = max(deployment.instance_count, now)
    logger.info("deploying %s, while %s serves", new, old)
    client.online_deployments.begin_create_or_update(deployment).result()

    def give(share: int) -> None:
        endpoint = client.online_endpoints.get(endpoint_name)
        endpoint.traffic = {old: 100 - share, new: share}
        client.online_endpoints.begin_create_or_update(endpoint).result()
        logger.info("%s has %d %% of the traffic", new, share)

    try:
        ask(endpoint.scoring_uri, token, new)
        give(10)
        answered = 0
        for _ in range(100 * ANSWERS):
            answered += ask(endpoint.scoring_uri, token) == new
            if answered == ANSWERS:
                break
        else:
            raise Faulty(f"{new} answered {answered} of {100 * ANSWERS} requests, with 10 % of the traffic")
        give(100)
    except BaseException:  # a cancelled workflow, too
        give(0)
        logger.info("%s still costs money: read its log, then delete it", new)
        raise
    logger.info("%s has no traffic and still costs money: delete it when %s has proven itself", old, new)
    logger.info("a rule for autoscaling belongs to one deployment: make one for %s", new)


def ask(uri: str, token: Callable[[], str], deployment: str | None = None) -> str:
    """Send a request whose answer is known. Return who answered; raise Faulty if it is wrong or no answer."""
    for pause in (1, 2, 4, 8, 0):
        headers = {"Authorization": f"Bearer {token()}"}
        if deployment:
            headers["azureml-model-deployment"] = deployment
        body = {"query": QUERY, "documents": DOCUMENTS}
        try:
            response = requests.post(uri, json=body, headers=headers, timeout=200)
        except requests.RequestException as error:
            raise Faulty(f"no answer: {error}") from None
        if response.status_code != 429:  # others use it, too
            break
        time.sleep(pause)
    name = response.headers.get("azureml-model-deployment", deployment or "the endpoint")
    if not response.ok:
        status = response.headers.get("ms-azureml-model-error-statuscode", response.status_code)
        raise Faulty(f"{name} answered {status}: {response.text[:300]}")
    results = response.json()["results"]
    if len(results) != len(DOCUMENTS) or results[0]["index"] != BEST:
        raise Faulty(f"{name} ranks the documents as {[result['index'] for result in results]}, expected {BEST} first")
    return name


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    main(sys.argv[1:])

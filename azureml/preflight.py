"""Before anything costs money: is everything there that the notebook needs?

The checks change nothing. Chapters are those of BGE_Reranker_AzureML.ipynb.
"""

import math
import re
from typing import NamedTuple

import requests
from azure.ai.ml import MLClient
from azure.core.credentials import TokenCredential
from azure.core.exceptions import ClientAuthenticationError, HttpResponseError, ResourceNotFoundError

ARM = "https://management.azure.com"
ML = "Microsoft.MachineLearningServices"

MACHINES = {
    "Standard_F8s_v2": ("FSv2", 8),
    "Standard_D8as_v4": ("DASv4", 8),
    "Standard_NC4as_T4_v3": ("NCASv3_T4", 4),
}
"""The machine's family in Azure's quotas, and its number of cores."""

BUILD = 4
"""Cores of the machine that builds an image. Azure chooses it, of any family; on one bill it was an E4ds_v4."""

PROVIDERS = (ML, "Microsoft.PolicyInsights", "Microsoft.Cdn")
"""Resource providers that a subscription must have registered before it can have a managed online endpoint."""

ACTIONS = {
    "workspace": {
        f"{ML}/workspaces/models/versions/write": "chapter 7 on",
        f"{ML}/workspaces/onlineEndpoints/write": "chapters 8 to 15",
        f"{ML}/workspaces/onlineEndpoints/score/action": "chapters 10 to 16",
        "Microsoft.Insights/diagnosticSettings/write": "chapter 13",
        f"{ML}/workspaces/batchEndpoints/write": "chapter 16",
        f"{ML}/workspaces/computes/write": "chapter 16",
    },
    "resource group": {
        "Microsoft.Insights/metricAlerts/write": "chapter 13",
        "Microsoft.Insights/autoscaleSettings/write": "chapter 14",
    },
}
"""Actions that the caller's role must allow, where, and the chapters that need them."""

OFFLINE = "Chapters 1, 2 and 4 to 6 need no account"


class Check(NamedTuple):
    """The result of one check. `ok` is None if Azure did not let the caller see it."""

    ok: bool | None
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        mark = {True: "ok      ", False: "MISSING ", None: "UNKNOWN "}[self.ok]
        return mark + self.what + ("" if self.ok else f"\n        {self.remedy}")


def preflight(client: MLClient, credential: TokenCredential, machine: str) -> list[Check]:
    """Check sign-in, workspace, resource providers, role and quota.

    Args:
        client: for the workspace.
        credential: of the person who will run the notebook.
        machine: the type of machine for the online deployments and the batch cluster, one of `MACHINES`.

    Returns:
        The checks, in that order. The list ends early if sign-in or the workspace is missing.
    """
    try:
        token = credential.get_token(f"{ARM}/.default").token
    except ClientAuthenticationError:
        return [Check(False, "sign-in", f"Run `az login` in a terminal. {OFFLINE}.")]
    checks = [Check(True, "signed in")]
    try:
        workspace = client.workspaces.get(client.workspace_name)
    except ResourceNotFoundError:
        remedy = f"Check the three variables of chapter 2, and `az account show`. {OFFLINE}."
        return [*checks, Check(False, "the workspace", remedy)]
    except HttpResponseError as error:
        remedy = f"Azure answered {error.status_code}. Ask its owner for a role on it, see below. {OFFLINE}."
        return [*checks, Check(False, "the workspace", remedy)]
    checks.append(Check(True, f"workspace in {workspace.location}"))

    def get(path: str, version: str) -> dict | None:
        headers = {"Authorization": f"Bearer {token}"}
        response = requests.get(f"{ARM}{path}", {"api-version": version}, headers=headers, timeout=30)
        if not response.ok:
            return None
        found = response.json()
        while link := found.pop("nextLink", None):
            more = requests.get(link, headers=headers, timeout=30).json()
            found = {**more, "value": found["value"] + more["value"]}
        return found

    checks += _providers(client, get)
    checks += _role(workspace.id, get)
    return checks + _quota(workspace.location, client, machine, get)


def _providers(client: MLClient, get) -> list[Check]:
    checks = []
    for name in PROVIDERS:
        found = get(f"/subscriptions/{client.subscription_id}/providers/{name}", "2021-04-01")
        ok = None if found is None else found.get("registrationState") == "Registered"
        remedy = f"Run `az provider register --namespace {name}`. Without it no endpoint: chapters 1 to 7 can be run."
        checks.append(Check(ok, f"provider {name}", remedy))
    return checks


def _role(workspace: str, get) -> list[Check]:
    remedy = (
        "Ask for the role Contributor on the resource group; AzureML Data Scientist does for chapters 7 to 13 and 15."
    )
    scopes = {"workspace": workspace, "resource group": workspace.partition("/providers/")[0]}
    checks = []
    for where, actions in ACTIONS.items():
        found = get(f"{scopes[where]}/providers/Microsoft.Authorization/permissions", "2022-04-01")
        for action, needed_for in actions.items():
            ok = None if found is None else any(_allows(permission, action) for permission in found["value"])
            checks.append(Check(ok, f"your role on the {where}, for {needed_for}: {action.partition('/')[2]}", remedy))
    return checks


def _allows(permission: dict, action: str) -> bool:
    """Whether a role's actions, less its notActions, include this one.

    "computes/*/write" excludes "computes/write" too: Microsoft's description of AzureML Data Scientist implies it.
    """

    def has(patterns: list[str]) -> bool:
        return any(
            re.fullmatch(re.escape(pattern).replace(r"/\*/", "/(.*/)?").replace(r"\*", ".*"), action, re.IGNORECASE)
            for pattern in patterns
        )

    return has(permission.get("actions", [])) and not has(permission.get("notActions", []))


def _quota(location: str, client: MLClient, machine: str, get) -> list[Check]:
    family, cores = MACHINES[machine]
    # Not client.compute.list_usage(): in azure-ai-ml 1.35.2 its current_value is always None.
    found = get(f"/subscriptions/{client.subscription_id}/providers/{ML}/locations/{location}/usages", "2024-04-01")
    usages = [] if found is None else found["value"]
    of_family = _free(usages, f"standard{family.lower()}family")
    of_all = _free(usages, "totaldedicatedcores", "totalclusterdedicatedregionalvcpus")
    if of_family is None or of_all is None:
        remedy = (
            "Azure shows you no number: look in Azure ML Studio, Quota. A free trial has no cores for Azure ML; with "
            "pay-as-you-go it gets some."
        )
        return [Check(None, f"quota of {family}, and of all dedicated cores", remedy)]
    checks = []
    one = cores * 2  # an instance, and a fifth of the instances, rounded up, that Azure reserves for upgrades
    for needed, what in [
        (one, "one deployment, chapters 9 to 15"),
        (2 * one, "a second one beside it, chapter 12"),
        (one + 2 * cores, "a batch job beside the first, chapter 16"),  # on two machines, see batch-deployment.yml
    ]:
        left = min(of_family, of_all)
        remedy = (
            f"Free are {left} cores. Ask for {needed} of {family} and of all dedicated cores: Azure ML Studio, Quota."
        )
        checks.append(Check(left >= needed, f"quota of {needed} cores of {family} for {what}", remedy))
    what = f"quota of {BUILD} more cores, of any family, for building the images, chapters 9 and 16"
    remedy = f"Free are {of_all} of all dedicated cores. Ask for {one + BUILD}: Azure ML Studio, Quota."
    return [*checks, Check(of_all >= one + BUILD, what, remedy)]


def _free(usages: list[dict], *names: str) -> float | None:
    """Return the dedicated cores that are free where a name starts with one of these, or None if Azure does not say.

    Names are compared in lower case and without blanks. Azure answers with codes, such as standardFSv2Family, which the
    low-priority cores have too: the tier is in the type. In its REST specification names are labels, such as Standard
    FSv2 Family Cluster Dedicated vCPUs, and hold the tier; workspaces are listed with them, by the same names.
    """
    free = []
    for usage in usages:
        name, kind = usage["name"]["value"].lower().replace(" ", ""), usage["type"].lower()
        if name.startswith(names) and "dedicated" in kind + name and "/workspace" not in kind:
            limit, current = usage["limit"], usage["currentValue"]
            if limit is None or current is None:
                return None
            free.append(math.inf if limit < 0 else limit - current)
    return min(free, default=None)

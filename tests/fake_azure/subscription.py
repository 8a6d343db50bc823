"""What Azure says about a subscription and a caller: registered providers, roles, quota."""

ML = "Microsoft.MachineLearningServices"
FAMILIES = {"Standard_F8s_v2": "Standard FSv2", "Standard_NC4as_T4_v3": "Standard NCASv3_T4"}
CORES = {"Standard_F8s_v2": 8, "Standard_NC4as_T4_v3": 4}

# As Azure defines them, shortened: what this local Azure does not have is left out.
ROLES = {
    "Contributor": {"actions": ["*"], "notActions": ["Microsoft.Authorization/*/Write"]},
    "AzureML Data Scientist": {
        "actions": [f"{ML}/workspaces/*/{verb}" for verb in ("read", "action", "delete", "write")],
        "notActions": [
            f"{ML}/workspaces/delete",
            f"{ML}/workspaces/write",
            f"{ML}/workspaces/computes/*/write",
            f"{ML}/workspaces/computes/*/delete",
        ],
    },
    "Reader": {"actions": ["*/read"], "notActions": []},
}


def may(role: str, method: str, provider: str, collections: list[str]) -> bool:
    """Whether a role may make or delete a resource. Written out: the rules above are for the caller to read."""
    if method not in ("PUT", "DELETE") or role == "Contributor":
        return True
    return role == "AzureML Data Scientist" and provider == ML and collections[0] != "computes"


def forbidden(provider: str, collections: list[str], method: str, scope: str) -> str:
    """Azure's words for it."""
    workspace = "workspaces/" if provider == ML else ""
    action = f"{provider}/{workspace}{'/'.join(collections)}/{'write' if method == 'PUT' else 'delete'}"
    return (
        f"The client 'someone' does not have authorization to perform action '{action}' over scope '{scope}' or the "
        "scope is invalid. If access was recently granted, please refresh your credentials."
    )


def no_quota(machine: str, subscription: str, used: int, limit: int, needed: int) -> str:
    """Azure's words for too few cores."""
    return (
        'InferencingClient HttpRequest error, error detail: {"errors":{"VmSize":["Not enough quota available for '
        f"{machine} in SubscriptionId {subscription}. Current usage/limit: {used}/{limit}. Additional needed: {needed} "
        'Please see troubleshooting guide, available here: https://aka.ms/oe-tsg#error-outofquota"]},'
        '"title":"One or more validation errors occurred.","status":400}'
    )


def usages(quota: dict[str, int], used: dict[str, int]) -> list[dict]:
    """The list of quotas: a family is named again for each workspace and cluster that uses it."""

    def usage(level: str, name: str, current: int, limit: int) -> dict:
        return {"type": f"{ML}/{level}", "currentValue": current, "limit": limit, "name": {"value": name}}

    total = "Total Cluster Dedicated Regional vCPUs"
    listed = [usage("dedicatedCores/usages", total, sum(used.values()), max(100, sum(quota.values())))]
    for machine, family in FAMILIES.items():
        name, current = f"{family} Family Cluster Dedicated vCPUs", used.get(machine, 0)
        listed.append(usage("vmFamily/usages", name, current, quota.get(machine, 0)))
        listed.append(usage("workspaces/usages", name, current, -1))
        listed.append(usage("vmFamily/usages", f"{family} Family Cluster LowPriority vCPUs", 0, -1))
    return listed

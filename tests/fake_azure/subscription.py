"""What Azure says about a subscription and a caller: registered providers, roles, quota."""

ML = "Microsoft.MachineLearningServices"
# The code and the label of a machine's family: the one has blanks where Azure has them.
FAMILIES = {
    "Standard_F8s_v2": ("standardFSv2Family", "Standard FSv2"),
    "Standard_NC4as_T4_v3": ("Standard NCASv3_T4 Family", "Standard  NCASv3_T4 "),
}
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


def usages(quota: dict[str, int], total: int, used: dict[str, int]) -> list[dict]:
    """The list of quotas as recorded: low priority has the same names again, and its families no limit of their own."""

    def usage(kind: str, name: str, label: str, current: int, limit: int) -> dict:
        names = {"value": name, "localizedValue": label}
        return {"type": f"{ML}/{kind}/usages", "unit": "Count", "currentValue": current, "limit": limit, "name": names}

    label = "Total Cluster Dedicated Regional vCPUs"
    listed = [
        usage("totalClusters", "TotalClusters", "Total Clusters", 0, 200),
        usage("totalDedicatedCores", "TotalDedicatedCores", label, sum(used.values()), total),
        usage("totalLowPriorityCores", "TotalLowPriorityCores", "Total Cluster LowPriority Regional vCPUs", 0, 0),
    ]
    for machine, (code, label) in FAMILIES.items():
        dedicated, low = f"{label} Family Cluster Dedicated vCPUs", f"{label} Family Cluster LowPriority vCPUs"
        current, limit = used.get(machine, 0), quota.get(machine, 0)
        listed.append(usage("vmFamily/dedicatedCores", code, dedicated, current, limit))
        listed.append(usage("vmFamily/lowPriorityCores", code, low, 0, -1))
    return listed

"""azureml/preflight.py: what is missing is named, with the way to get it and what can be done without it."""

import re

import pytest
from azure.core.exceptions import ClientAuthenticationError, HttpResponseError
from azure.identity import DefaultAzureCredential
from azure_scripts import load_script
from fake_azure import FakeAzure
from fake_azure.subscription import ML, usages

preflight = load_script("azureml/preflight.py")
CPU, GPU = "Standard_F8s_v2", "Standard_NC4as_T4_v3"


def look(machine: str = CPU, **settings) -> list:
    with FakeAzure(**settings) as azure:
        return preflight.preflight(azure.client(), DefaultAzureCredential(), machine)


def missing(checks: list) -> str:
    assert all(check.ok is not None for check in checks)
    return "\n".join(str(check) for check in checks if not check.ok)


def test_all_is_there():
    checks = look(quota={CPU: 32})
    assert all(check.ok for check in checks)
    assert "workspace in westeurope" in [check.what for check in checks]


def test_a_new_subscription_with_little_quota():
    """Enough for a deployment, not for two, nor for a batch job beside it; and nothing with a GPU."""
    found = missing(look(quota={CPU: 24}))
    assert "32 cores of FSv2 for a second one beside it, chapter 12" in found
    assert "32 cores of FSv2 for a batch job" in found
    assert "16 cores" not in found
    assert "Free are 24 cores. Ask for 32 of FSv2" in found
    assert missing(look(GPU, quota={CPU: 24})).count("Free are 0 cores") == 3


def test_a_new_pay_as_you_go_account():
    """As recorded in November 2025: chapter 9 fits exactly, with the image's build, and nothing beside it."""
    found = missing(look(quota={CPU: 16}, total=20))
    assert "one deployment" not in found
    assert "building the images" not in found
    assert found.count("MISSING") == 2
    found = missing(look(quota={CPU: 16}, total=19))
    assert "4 more cores, of any family, for building the images" in found
    assert "Free are 19 of all dedicated cores. Ask for 20" in found


def as_specified(quota: dict[str, int], total: int, used: dict[str, int]) -> list[dict]:
    """As in the example of Azure's REST specification: the tier is in the name, and workspaces are listed."""
    listed = []
    for usage in usages(quota, total, used):
        kind = usage["type"].replace("totalDedicatedCores", "dedicatedCores")
        kind = re.sub("vmFamily/[a-zA-Z]+/", "vmFamily/", kind)
        names = {"value": usage["name"]["localizedValue"].replace("  ", " ")}
        listed.append({**usage, "type": kind, "name": names})
        listed.append({**usage, "type": f"{ML}/workspaces/usages", "name": names, "limit": 1})
    return listed


def test_the_specifications_answer_is_understood_too(monkeypatch):
    monkeypatch.setattr("fake_azure.usages", as_specified)
    assert "32 cores of FSv2 for a second one" in missing(look(quota={CPU: 24}))
    assert not missing(look(GPU, quota={GPU: 16}))


def without_numbers(*arguments) -> list[dict]:
    return [{**usage, "currentValue": None} for usage in usages(*arguments)]


def of_other_families(*arguments) -> list[dict]:
    return [usage for usage in usages(*arguments) if "FSv2" not in usage["name"]["value"]]


@pytest.mark.parametrize("answer", [without_numbers, of_other_families, lambda *arguments: []])
def test_quotas_without_a_number_are_unknown(monkeypatch, answer):
    """On a free trial currentValue is null and the limit a template's. Names may change again."""
    monkeypatch.setattr("fake_azure.usages", answer)
    *others, quota = look()
    assert all(check.ok for check in others)
    assert quota.ok is None
    assert "Azure ML Studio, Quota" in str(quota)


def test_a_data_scientist_may_not_make_a_cluster():
    """The role's notActions have computes/*/write; monitoring and autoscale are another provider's."""
    found = missing(look(role="AzureML Data Scientist"))
    assert "on the workspace, for chapter 16: workspaces/computes/write" in found
    assert "on the workspace, for chapter 13: diagnosticSettings/write" in found
    assert "on the resource group, for chapter 13: metricAlerts/write" in found
    assert "on the resource group, for chapter 14: autoscaleSettings/write" in found
    assert found.count("MISSING") == 4
    assert "Contributor" in found


def test_alerts_and_autoscale_settings_are_written_to_the_resource_group():
    """A Contributor on the workspace may not, whether the group can be read or not."""
    found = missing(look(group_role="Reader"))
    unknown = [check for check in look(group_role="") if check.ok is None]
    for name in ("metricAlerts/write", "autoscaleSettings/write"):
        assert name in found
        assert any(name in check.what for check in unknown)
    assert len(unknown) == found.count("MISSING") == 2


def test_what_the_roles_may_is_what_the_local_azure_lets_them_do():
    for role, count in (("Reader", 8), ("Contributor", 0)):
        assert missing(look(role=role)).count("your role") == count
    for role in ("Reader", "AzureML Data Scientist"):
        with FakeAzure(role=role) as azure:
            client = azure.client()
            with pytest.raises(HttpResponseError, match=r"AuthorizationFailed.*perform action '[^']*computes/delete'"):
                client.compute.begin_delete("anything")


def test_providers_that_are_not_registered():
    found = missing(look(unregistered=("Microsoft.Cdn",)))
    assert "az provider register --namespace Microsoft.Cdn" in found
    assert found.count("MISSING") == 1


def test_not_signed_in(monkeypatch):
    with FakeAzure() as azure:
        monkeypatch.setenv("AZURE_CLIENT_SECRET", "expired")
        credential = DefaultAzureCredential()
        (check,) = preflight.preflight(azure.client(), credential, CPU)
        with pytest.raises(ClientAuthenticationError, match="AADSTS7000215"):
            credential.get_token(f"{preflight.ARM}/.default")
    assert not check.ok
    assert "az login" in check.remedy

"""Azure Monitor's diagnostic settings and metric alerts, and the Application Insights component that names their log.

Requests are checked as far as these sources describe them, and a little beyond: Azure takes a misspelt metric where
`skipMetricValidation` is set, and the rule then never fires.

- Azure/azure-rest-api-specs, specification/monitor/resource-manager/Microsoft.Insights: required properties, the
  answers 200 and 204, and errors as {"code", "message"} without "error" around them, in
  preview/2021-05-01-preview/diagnosticsSettings_API.json and stable/2018-03-01/metricAlert_API.json; the bodies in
  examples/createOrUpdateDiagnosticSetting.json and examples/createOrUpdateMetricAlertWithDimensions.json there.
- MicrosoftDocs/azure-monitor-docs, articles/azure-monitor/reference, supported-metrics and supported-logs of
  Microsoft.MachineLearningServices/workspaces/onlineEndpoints: names, dimensions, categories.
- The words of errors, from reports: hashicorp/terraform-provider-azurerm #2985 ("Category ... is not supported") and
  #22210 ("Couldn't find a metric named ...").
"""

import re

GROUP = r"/subscriptions/[^/]+/resourceGroups/[^/]+/providers"
ENDPOINT = rf"{GROUP}/Microsoft\.MachineLearningServices/workspaces/[^/]+/(?P<endpoint>onlineEndpoints/[^/]+)"
RESOURCE = re.compile(
    rf"(?:{ENDPOINT}/providers|{GROUP})/Microsoft\.Insights/"
    r"(?P<name>(?P<kind>diagnosticSettings|metricAlerts|components)/[^/]+)",
    re.IGNORECASE,
)
VERSIONS = {"diagnosticSettings": "2021-05-01-preview", "metricAlerts": "2018-03-01", "components": "2020-02-02"}

LOGS = {"AmlOnlineEndpointTrafficLog", "AmlOnlineEndpointConsoleLog", "AmlOnlineEndpointEventLog"}
METRICS = {
    "RequestLatency_P99": {"deployment"},
    "RequestsPerMinute": {"deployment", "statusCode", "statusCodeClass", "modelStatusCode"},
}
NAMESPACE = "Microsoft.MachineLearningServices/workspaces/onlineEndpoints"
CRITERIA = "Microsoft.Azure.Monitor.MultipleResourceMultipleMetricCriteria"
CRITERION = {"name", "metricNamespace", "metricName", "dimensions", "criterionType", "timeAggregation"}
CRITERION |= {"operator", "threshold", "skipMetricValidation"}
FREQUENCIES = ["PT1M", "PT5M", "PT15M", "PT30M", "PT1H"]
WINDOWS = [*FREQUENCIES, "PT6H", "PT12H", "P1D"]
DESTINATION = "/subscriptions/{}/resourceGroups/logs/providers/Microsoft.OperationalInsights/workspaces/logs"


def answer(method: str, path: str, version: str, sent: dict, resources: dict[str, dict]) -> tuple[int, dict | None]:
    """Return status and body for a path that `RESOURCE` matches. What exists is kept in `resources`."""
    match = RESOURCE.fullmatch(path)
    kind = match["kind"]
    if version != VERSIONS[kind]:
        message = f"The api-version '{version}' is invalid. The supported one here is '{VERSIONS[kind]}'."
        return 400, {"error": {"code": "InvalidApiVersionParameter", "message": message}}
    if kind == "components":
        return 200, {"id": path, "properties": {"WorkspaceResourceId": DESTINATION.format(path.split("/")[2])}}
    if match["endpoint"] and match["endpoint"] not in resources:
        return 404, _missing(match["endpoint"])
    if method == "DELETE":
        return (200 if resources.pop(path, None) else 204), None
    if method == "GET":
        return (200, resources[path]) if path in resources else (404, _missing(match["name"]))
    if kind == "metricAlerts":
        for scope in sent["properties"]["scopes"]:
            if scope.partition("/workspaces/")[2].partition("/")[2] not in resources:
                return 404, _missing(scope)
        fault = _alert_fault(sent)
    else:
        fault = _diagnostics_fault(sent["properties"])
    if fault:
        return 400, {"code": "BadRequest", "message": fault}
    resources[path] = {"id": path, "name": path.split("/")[-1], "type": f"Microsoft.Insights/{kind}", **sent}
    return 200, resources[path]


def _missing(resource: str) -> dict:
    return {"code": "ResourceNotFound", "message": f"The Resource '{resource}' was not found."}


def _diagnostics_fault(properties: dict) -> str | None:
    if "Microsoft.OperationalInsights/workspaces/" not in (properties.get("workspaceId") or ""):
        return "At least one data sink needs to be specified."
    if unknown := properties.keys() - {"workspaceId", "logs", "metrics", "logAnalyticsDestinationType"}:
        return f"Could not find member {unknown}"
    for log in properties.get("logs", []):
        if log.get("category") not in LOGS and log.get("categoryGroup") != "allLogs":
            return f"Category '{log.get('category')}' is not supported."
        if not isinstance(log.get("enabled"), bool):
            return "Required property 'enabled' not found in JSON."
    return None


def _alert_fault(sent: dict) -> str | None:
    properties = sent["properties"]
    required = {"enabled", "description", "severity", "evaluationFrequency", "windowSize", "criteria"}
    if lacking := required - properties.keys():
        return f"Required properties not found in JSON: {sorted(lacking)}"
    if unknown := properties.keys() - required - {"scopes", "actions", "autoMitigate"}:
        return f"Could not find member {unknown}"
    if sent.get("location") != "global" or properties["severity"] not in range(5):
        return "The location of a metric alert is 'global', and its severity 0 to 4."
    window, frequency = properties["windowSize"], properties["evaluationFrequency"]
    if window not in WINDOWS or frequency not in FREQUENCIES or WINDOWS.index(window) < WINDOWS.index(frequency):
        return f"Window size {window} and evaluation frequency {frequency} do not fit."
    criteria = properties["criteria"]
    if criteria.get("odata.type") != CRITERIA:
        return f"The criteria's odata.type is {criteria.get('odata.type')}"
    for criterion in criteria["allOf"]:
        if unknown := criterion.keys() - CRITERION:
            return f"Could not find member {unknown}"
        name = criterion["metricName"]
        if name not in METRICS or criterion["metricNamespace"] != NAMESPACE:
            return f"Couldn't find a metric named {name}. Make sure the name is correct."
        if criterion["timeAggregation"] != "Average" or criterion["criterionType"] != "StaticThresholdCriterion":
            return f"The metric {name} is aggregated by Average only, here against a fixed threshold."
        unknown = {dimension["name"] for dimension in criterion.get("dimensions", [])} - METRICS[name]
        if unknown or not isinstance(criterion["threshold"], int | float):
            return f"The metric {name} has no dimension {unknown}, or the threshold is no number."
    return None

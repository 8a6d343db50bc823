"""A local Azure for the real Azure SDK: `with FakeAzure(): ...`. README.md says what it checks and what it does not."""

import atexit
import base64
import io
import json
import math
import os
import re
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

import requests
import urllib3
import yaml
from requests.adapters import HTTPAdapter

from . import monitor
from .batch_engine import BatchJob, BatchSettings
from .inference_server import InferenceServer
from .subscription import CORES, ML, ROLES, forbidden, may, no_quota, usages

__all__ = ["BatchJob", "BatchSettings", "FakeAzure", "InferenceServer"]

ARM = "management.azure.com"
LOGIN = "login.microsoftonline.com"
STORAGE = "fakeaccount.blob.core.windows.net"
REGION = "westeurope"
SCORING = f".{REGION}.inference.ml.azure.com"
HISTORY = f"{REGION}.api.azureml.ms"
SUBSCRIPTION = re.compile(r"/subscriptions/([^/]+)/providers/([^/]+)(/locations/[^/]+/usages)?")
OPERATION = re.compile(rf"/subscriptions/[^/]+/providers/{ML}/locations/[^/]+/mfeOperationsStatus/(.+)")
PERMISSIONS = re.compile(r"/subscriptions/[^/]+/resourceGroups/[^/]+/providers/Microsoft\.Authorization/permissions")
WORKSPACE = re.compile(
    rf"(/subscriptions/([^/]+)/resourceGroups/[^/]+/providers/{ML}/workspaces/([^/]+))/?(.*)", re.IGNORECASE
)
AUTOSCALE = re.compile(
    r"(/subscriptions/[^/]+/resourceGroups/[^/]+/providers/Microsoft\.Insights)/(autoscaleSettings/.+)"
)
# A service principal, so that DefaultAzureCredential signs in by itself and looks for no other account.
CREDENTIALS = {
    "AZURE_TENANT_ID": str(uuid.UUID(int=1)),
    "AZURE_CLIENT_ID": str(uuid.UUID(int=2)),
    "AZURE_CLIENT_SECRET": "fake",
}
COLLECTIONS = ("versions", "onlineEndpoints", "batchEndpoints", "deployments", "computes")
DATASTORE = {
    "name": "workspaceblobstore",
    "properties": {
        "datastoreType": "AzureBlob",
        "accountName": STORAGE.split(".")[0],
        "containerName": "models",
        "protocol": "https",
        "endpoint": "core.windows.net",
        "credentials": {"credentialsType": "AccountKey"},
        "isDefault": True,
    },
}

# What Azure puts above the last lines of the log.
STATUS = """Instance status:
SystemSetup: Succeeded
UserContainerImagePull: Succeeded
ModelDownload: Succeeded
UserContainerStart: {}

Container events:
Kind: Pod, Name: Started, Type: Normal, Time: 2025-11-04T09:35:39.221305Z, Message: Started container inference-server

Container logs:
"""

# Headers that belong to one connection, or to Azure.
NOT_TO_THE_SERVER = (
    "authorization",
    "azureml-model-deployment",
    "connection",
    "content-length",
    "host",
    "x-request-id",
)
NOT_FROM_THE_SERVER = ("connection", "date", "server")

send_for_real = HTTPAdapter.send


class Answer(Exception):
    """An HTTP answer. Errors are raised from where they are found."""

    def __init__(self, status: int, body: object = None, **headers: object):
        self.status = status
        self.body = b"" if body is None else json.dumps(body).encode()
        self.headers = {"Content-Type": "application/json", "Content-Length": str(len(self.body))}
        self.headers |= {name.replace("_", "-"): str(value) for name, value in headers.items()}


def error(status: int, code: str, message: str) -> Answer:
    return Answer(status, {"error": {"code": code, "message": message}}, x_ms_error_code=code)


def token(audience: str) -> str:
    return f"fake-token-for-{audience}"


def seconds(duration: str) -> float:
    """Read a duration as the SDK sends it, such as PT1M30S."""
    parts = re.fullmatch(r"PT(?:(\d+)M)?(?:([\d.]+)S)?", duration).groups(default="0")
    return 60 * float(parts[0]) + float(parts[1])


class FakeAzure:
    """Answers what the SDK sends to Azure, from this process, while it is installed.

    Args:
        quota: cores that the subscription has for each type of machine. Default: enough for two CPU deployments of one
            instance, and none with a GPU, as in a new subscription.
        total: cores of all types together, for which it has a quota too.
        role: of the caller, one of `ROLES`.
        group_role: the caller's role on the resource group, if it is another one. With "" the group may not be read.
        unregistered: resource providers that the subscription has not registered.
    """

    def __init__(
        self,
        quota: dict[str, int] | None = None,
        total: int = 100,
        role: str = "Contributor",
        group_role: str | None = None,
        unregistered: tuple[str, ...] = (),
    ):
        self.quota, self.total = {"Standard_F8s_v2": 32} if quota is None else quota, total
        self.role, self.group_role = role, role if group_role is None else group_role
        self.unregistered = unregistered
        self.blocked: list[str] = []
        """Hosts that were refused."""
        self.requests: list[tuple[str, str]] = []
        """Method and URL of what was sent to Azure."""
        self._resources: dict[str, dict] = {}
        self._operations: dict[str, Callable[[], dict]] = {}
        self._metadata: dict[str, dict[str, str]] = {}
        self._servers: dict[str, InferenceServer] = {}
        self._jobs: dict[str, BatchJob] = {}
        self._children: dict[str, str] = {}
        self._initializers: dict[str, str] = {}
        self._calls: dict[str, int] = {}
        self._busy: dict[str, int] = {}
        self._lock = threading.Lock()

    def install(self) -> "FakeAzure":
        """Take over the SDK's HTTP calls and its credentials, until `uninstall` or the end of the process."""
        self._root = Path(tempfile.mkdtemp(prefix="fake_azure_"))
        self._environment = {name: os.environ.get(name) for name in CREDENTIALS}
        os.environ.update(CREDENTIALS)
        atexit.register(self.uninstall)
        HTTPAdapter.send = lambda adapter, request, **options: self._send(adapter, request, options)
        return self

    def uninstall(self) -> None:
        """Stop the servers, delete all files, and let HTTP calls out again."""
        atexit.unregister(self.uninstall)
        HTTPAdapter.send = send_for_real
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        for server in self._servers.values():
            server.stop()
        for job in self._jobs.values():
            if job.is_alive():
                job.cancel()
        shutil.rmtree(self._root, ignore_errors=True)

    def __enter__(self) -> "FakeAzure":
        return self.install()

    def __exit__(self, *exception: object) -> None:
        self.uninstall()

    def client(self):
        """An `MLClient` without retries, so that a fault of this Azure shows at once."""
        # Not above: tests/azure_container.py runs where the SDK is not installed.
        from azure.ai.ml import MLClient
        from azure.identity import DefaultAzureCredential

        options = {"enable_telemetry": False, "show_progress": False, "retry_total": 0}
        return MLClient(DefaultAzureCredential(), "subscription", "group", "workspace", **options)

    def _send(self, adapter: HTTPAdapter, request: requests.PreparedRequest, options: dict) -> requests.Response:
        url = urlsplit(request.url)
        if url.hostname in ("127.0.0.1", "localhost"):
            return send_for_real(adapter, request, **options)
        handler = {LOGIN: self._sign_in, ARM: self._manage, STORAGE: self._store, HISTORY: self._describe_run}.get(
            url.hostname
        )
        if url.hostname.endswith(SCORING):
            handler = self._submit if url.path == "/jobs" else self._score
        if handler is None:
            self.blocked.append(url.hostname)
            raise requests.ConnectionError(f"fake_azure: {url.hostname} is refused, nothing leaves this machine")
        body = request.body.read() if hasattr(request.body, "read") else request.body or b""
        body = body.encode() if isinstance(body, str) else body
        self.requests.append((request.method, request.url))
        try:
            answer = handler(request, url, body)
        except Answer as raised:
            answer = raised
        raw = urllib3.HTTPResponse(
            body=io.BytesIO(b"" if request.method == "HEAD" else answer.body),
            headers=answer.headers,
            status=answer.status,
            preload_content=False,
            request_method=request.method,
        )
        return adapter.build_response(request, raw)

    def _sign_in(self, request: requests.PreparedRequest, url: SplitResult, body: bytes) -> Answer:
        """Microsoft Entra ID: a token for the audience that is asked for."""
        base = f"https://{LOGIN}/{CREDENTIALS['AZURE_TENANT_ID']}"
        if url.path.endswith("/token"):
            form = parse_qs(body.decode())
            if form["client_secret"] != [CREDENTIALS["AZURE_CLIENT_SECRET"]]:
                raise Answer(401, {"error": "invalid_client", "error_description": "AADSTS7000215: Invalid secret"})
            return Answer(
                200, {"token_type": "Bearer", "expires_in": 3600, "access_token": token(form["scope"][0].split()[0])}
            )
        endpoints = {"authorization_endpoint": f"{base}/authorize", "token_endpoint": f"{base}/oauth2/v2.0/token"}
        return Answer(200, {"issuer": f"{base}/v2.0", "tenant_discovery_endpoint": base, "metadata": [], **endpoints})

    def _manage(self, request: requests.PreparedRequest, url: SplitResult, body: bytes) -> Answer:
        """Azure Resource Manager: the workspace, its assets, endpoints and deployments."""
        if request.headers.get("Authorization") != f"Bearer {token('https://management.azure.com/.default')}":
            raise error(401, "InvalidAuthenticationToken", "The access token is missing or for another audience.")
        path = unquote(url.path)
        sent = json.loads(body) if body else {}
        if match := SUBSCRIPTION.fullmatch(path):
            if match[3]:
                return Answer(200, {"value": usages(self.quota, self.total, self._cores())})
            state = "NotRegistered" if match[2] in self.unregistered else "Registered"
            return Answer(200, {"namespace": match[2], "registrationState": state})
        if match := OPERATION.fullmatch(path):
            with self._lock:
                return Answer(200, {"id": path, "name": match[1], **self._operations[match[1]]()}, Retry_After=0.3)
        if PERMISSIONS.fullmatch(path):
            if not self.group_role:
                raise error(403, "AuthorizationFailed", "The client 'someone' may not read the resource group.")
            return Answer(200, {"value": [ROLES[self.group_role]]})
        if match := monitor.RESOURCE.fullmatch(path):
            role = self.role if match["endpoint"] else self.group_role
            self._authorise(role, request.method, "Microsoft.Insights", match["name"], path)
            version = parse_qs(url.query)["api-version"][0]
            with self._lock:
                return Answer(*monitor.answer(request.method, path, version, sent, self._resources))
        if match := AUTOSCALE.fullmatch(path):
            self._authorise(self.group_role, request.method, "Microsoft.Insights", match[2], path)
            with self._lock:
                return self._autoscale(request.method, *match.groups(), sent)
        match = WORKSPACE.fullmatch(path)
        if not match:
            raise error(404, "InvalidResourceType", f"fake_azure knows no {url.path}")
        workspace, _, name, path = match.groups()
        parts = path.split("/")
        self._authorise(self.role, request.method, ML, path, f"{workspace}/{path}")
        with self._lock:
            match [request.method, *parts]:
                case ["GET", ""]:
                    insights = f"{workspace.partition(ML)[0]}Microsoft.Insights/components/insights"
                    properties = {"discoveryUrl": f"https://{HISTORY}/discovery", "applicationInsights": insights}
                    return Answer(200, {"id": workspace, "name": name, "location": REGION, "properties": properties})
                case ["GET", "providers", "Microsoft.Authorization", "permissions"]:
                    return Answer(200, {"value": [ROLES[self.role]]})
                case ["GET", "datastores"]:
                    return Answer(200, {"value": [DATASTORE]})
                case ["GET", "datastores", _]:
                    return Answer(200, DATASTORE)
                case ["POST", "datastores", _, "listSecrets"]:
                    return Answer(200, {"secretsType": "AccountKey", "key": base64.b64encode(b"fake").decode()})
                case ["POST", "codes", code, "versions", _, "startPendingUpload"]:
                    blob = f"https://{STORAGE}/code-{code}"
                    credential = {"credentialType": "SAS", "sasUri": f"{blob}?sig=fake"}
                    reference = {"blobUri": blob, "credential": credential}
                    upload = {"pendingUploadType": "TemporaryBlobReference", "blobReferenceForConsumption": reference}
                    return Answer(200, upload)
                case ["POST", "onlineEndpoints", endpoint, "listKeys"]:
                    return Answer(200, {"primaryKey": f"{endpoint}-key-1", "secondaryKey": f"{endpoint}-key-2"})
                case ["POST", "onlineEndpoints", _, "deployments", _, "getLogs"]:
                    deployment = path.removesuffix("/getLogs")
                    if sent.get("containerType") == "StorageInitializer" and deployment in self._initializers:
                        return Answer(200, {"content": self._initializers[deployment]})
                    if server := self._servers.get(deployment):
                        status = STATUS.format("Succeeded" if server.process.poll() is None else "Failed")
                        return Answer(200, {"content": status + server.tail(sent["tail"])})
                case ["PUT", "onlineEndpoints", endpoint]:
                    return self._put_endpoint(workspace, path, endpoint, sent)
                case ["PUT", "onlineEndpoints", endpoint, "deployments", deployment]:
                    return self._put_deployment(workspace, path, endpoint, deployment, sent)
                case ["PUT", "batchEndpoints", endpoint]:
                    sent["properties"]["scoringUri"] = f"https://{endpoint}{SCORING}/jobs"
                    return self._put(workspace, path, sent)
                case ["PUT", "batchEndpoints", _, "deployments", _]:
                    self._check_registered(workspace, path, sent["properties"])
                    return self._put(workspace, path, sent)
                case ["PUT", "computes", _]:
                    return self._put(workspace, path, sent)
                case ["GET", "jobs", job] if job in self._jobs:
                    return Answer(200, self._describe_job(workspace, job))
                case ["PUT", "environments", _, "versions", _]:
                    # Sent as YAML, it comes back as JSON.
                    conda = yaml.safe_load(sent["properties"]["condaFile"])
                    sent["properties"]["condaFile"] = json.dumps(conda, indent=2)
                    return Answer(201, self._keep(workspace, path, sent))
                case ["PUT", _, _, "versions", _]:
                    return Answer(201, self._keep(workspace, path, sent))
                case ["DELETE", "onlineEndpoints" | "batchEndpoints" | "computes", *_]:
                    return self._delete(workspace, path)
                case ["GET", *_] if parts[-1] in COLLECTIONS:
                    depth = path.count("/") + 1
                    keys = [k for k in self._resources if k.startswith(f"{path}/") and k.count("/") == depth]
                    return Answer(200, {"value": [self._resources[key] for key in keys]})
                case ["GET", *_] if path in self._resources:
                    return Answer(200, self._resources[path])
        raise error(404, "ResourceNotFound", f"fake_azure has no {path} for {request.method}")

    def _authorise(self, role: str, method: str, provider: str, path: str, scope: str) -> None:
        collections = path.split("/")[::2]
        if not may(role, method, provider, collections):
            raise error(403, "AuthorizationFailed", forbidden(provider, collections, method, scope))

    def _autoscale(self, method: str, scope: str, path: str, sent: dict) -> Answer:
        if method == "PUT":
            return Answer(200, self._keep(scope, path, sent))
        if method == "DELETE":
            return Answer(200 if self._resources.pop(path, None) else 204)
        if path not in self._resources:
            raise error(404, "ResourceNotFound", f"fake_azure has no {path}")
        return Answer(200, self._resources[path])

    def _keep(self, workspace: str, path: str, sent: dict) -> dict:
        resource = {"id": f"{workspace}/{path}", "name": path.split("/")[-1], "location": REGION, **sent}
        resource["properties"] = {"provisioningState": "Succeeded", **sent["properties"]}
        if path.startswith("models/"):
            resource["properties"].setdefault("flavors", {})
        self._resources[path] = resource
        return resource

    def _put(
        self, workspace: str, path: str, sent: dict, poll: Callable[[], dict] = lambda: {"status": "Succeeded"}
    ) -> Answer:
        """Keep a resource, and answer as when the operation begins: not ready, and a new endpoint has no address."""
        state = "Updating" if path in self._resources else "Creating"
        resource = self._keep(workspace, path, sent)
        begun = {**resource["properties"], "provisioningState": state}
        if state == "Creating" and "scoringUri" in begun:
            begun["scoringUri"] = None
        return self._long_running(workspace, 201, {**resource, "properties": begun}, resource["id"], poll)

    def _long_running(
        self, workspace: str, status: int, resource: dict | None, location: str, poll: Callable[[], dict]
    ) -> Answer:
        operation = f"oe:{uuid.uuid4()}"
        self._operations[operation] = poll
        poll_at = f"https://{ARM}{self._region(workspace)}/mfeOperationsStatus/{operation}?api-version=fake"
        location = f"https://{ARM}{location}?api-version=fake"
        # Azure sends no Retry-After, and the SDK asks every 5 s.
        return Answer(status, resource, Azure_AsyncOperation=poll_at, Location=location, Retry_After=1)

    def _region(self, workspace: str) -> str:
        return f"{workspace.partition('/resourceGroups/')[0]}/providers/{ML}/locations/{REGION}"

    def _put_endpoint(self, workspace: str, path: str, endpoint: str, sent: dict) -> Answer:
        if self.unregistered:
            message = (
                "Resource provider [N/A] isn't registered with Subscription [N/A]. Please see troubleshooting guide."
            )
            raise error(400, "SubscriptionNotRegistered", message)
        traffic, mirrored = (sent["properties"].setdefault(name, {}) for name in ("traffic", "mirrorTraffic"))
        if sum(mirrored.values()) > 50 or len(mirrored) > 1:
            raise error(400, "BadRequest", "mirrored traffic: one deployment, and at most 50 percent")
        unknown = [name for name in (*traffic, *mirrored) if f"{path}/deployments/{name}" not in self._resources]
        if unknown:
            raise error(400, "BadRequest", f"traffic names deployments that do not exist: {unknown}")
        sent["properties"]["scoringUri"] = f"https://{endpoint}{SCORING}/score"
        return self._put(workspace, path, sent)

    def _check_registered(self, workspace: str, path: str, properties: dict) -> tuple[str, str]:
        """Raise 404 unless what a deployment names is registered. Return the keys of its model and its code."""
        model = properties["model"]
        names = [model if isinstance(model, str) else model["assetId"], properties["codeConfiguration"]["codeId"]]
        names += [properties["environmentId"], properties.get("compute", "/".join(path.split("/")[:2]))]
        keys = ["/".join(path.split("/")[:2]), *(name.removeprefix(f"{workspace}/") for name in names)]
        missing = [key for key in keys if key not in self._resources]
        if missing:
            raise error(404, "ResourceNotFound", f"not registered: {missing}")
        return keys[1], keys[2]

    def _put_deployment(self, workspace: str, path: str, endpoint: str, deployment: str, sent: dict) -> Answer:
        properties = sent["properties"]
        properties.setdefault("scaleSettings", {"scaleType": "Default"})
        model, code = self._check_registered(workspace, path, properties)
        self._check_quota(workspace, path, sent)
        if path in self._servers:
            self._servers.pop(path).stop()
        failure = None
        try:
            self._servers[path] = self._start(model, code, properties, f"{endpoint}-{deployment}")
            self._initializers[path] = "the model was downloaded"
        except FileNotFoundError as missing:
            failure = {"code": "BadArgument", "message": "Unable to download user model artifacts."}
            self._initializers[path] = f"downloading the model failed: {missing}"

        def poll() -> dict:
            server = self._servers.get(path)
            if server and server.healthy():
                return {"status": "Succeeded"}
            crash = {"code": "ResourceNotReady", "message": "User container has crashed: see the deployment's logs."}
            if failure or server is None or server.process.poll() is not None:
                self._resources[path]["properties"]["provisioningState"] = "Failed"
                return {"status": "Failed", "error": failure or crash}
            return {"status": "Updating"}

        return self._put(workspace, path, sent, poll)

    def _cores(self, but: str = "") -> dict[str, int]:
        """Return the cores in use. Azure keeps a fifth of the instances, rounded up, in reserve for upgrades."""
        used: dict[str, int] = {}
        for path, resource in self._resources.items():
            if path != but and path.startswith("onlineEndpoints/") and "/deployments/" in path:
                machine, instances = resource["properties"]["instanceType"], resource["sku"]["capacity"]
                if resource["properties"]["provisioningState"] != "Failed":
                    used[machine] = used.get(machine, 0) + CORES[machine] * (instances + math.ceil(instances / 5))
        return used

    def _check_quota(self, workspace: str, path: str, sent: dict) -> None:
        machine, instances = sent["properties"]["instanceType"], sent["sku"]["capacity"]
        needed = CORES[machine] * (instances + math.ceil(instances / 5))
        used, limit = self._cores(but=path).get(machine, 0), self.quota.get(machine, 0)
        if used + needed > limit:
            message = no_quota(machine, workspace.split("/")[2], used, limit, needed)
            detail = {"code": "InferencingClientCreateDeploymentFailed", "message": message}
            body = {"code": "BadRequest", "message": "The request is invalid.", "details": [detail]}
            raise Answer(400, {"error": body}, x_ms_error_code="BadRequest")

    def _start(self, model: str, code: str, properties: dict, name: str) -> InferenceServer:
        """Start Azure's server on the uploaded files."""
        app_root, model_dir = self._lay_out(model, code, name)
        script = app_root / "code" / properties["codeConfiguration"]["scoringScript"]
        variables = properties.get("environmentVariables", {})
        return InferenceServer(app_root, script, model_dir, variables, app_root.parent / "log.txt")

    def _lay_out(self, model: str, code: str, name: str) -> tuple[Path, Path]:
        """Put the uploaded files where Azure's container has them. Return the root of it, and the model's folder."""
        app_root = self._root / "instances" / f"{name}-{uuid.uuid4()}" / "var" / "azureml-app"
        blobs = self._resources[code]["properties"]["codeUri"].removeprefix(f"https://{STORAGE}/")
        shutil.copytree(self._root / "blobs" / blobs, app_root / "code")
        _, model_name, _, version = model.split("/")
        model_dir = app_root / "azureml-models" / model_name / version
        source = self._blobs(self._resources[model]["properties"]["modelUri"])
        # Links, not copies: the real weights are 2.3 GB.
        shutil.copytree(source, model_dir / source.name, copy_function=os.link)
        return app_root, model_dir

    def _blobs(self, uri: str) -> Path:
        """Return the folder of a URI of the datastore."""
        return self._root / "blobs" / "models" / uri.split("/paths/")[1].rstrip("/")

    def _submit(self, request: requests.PreparedRequest, url: SplitResult, body: bytes) -> Answer:
        """A batch endpoint's address: start a job with the default deployment on the files of a folder."""
        name, path, endpoint = self._admit(request, url, "batchEndpoints")
        chosen = (endpoint["properties"].get("defaults") or {}).get("deploymentName")
        deployment = self._resources.get(f"{path}/deployments/{chosen}")
        if deployment is None:
            raise error(400, "BadRequest", f"the endpoint has no default deployment that exists: {chosen}")
        properties = deployment["properties"]
        retries = properties["retrySettings"]
        settings = BatchSettings(
            properties["resources"]["instanceCount"] * properties["maxConcurrencyPerInstance"],
            properties["miniBatchSize"],
            retries["maxRetries"],
            seconds(retries["timeout"]),
            properties["errorThreshold"],
        )
        (data,) = json.loads(body)["properties"]["inputData"].values()
        workspace = deployment["id"].removesuffix(f"/{path}/deployments/{chosen}")
        model, code = self._check_registered(workspace, f"{path}/deployments/{chosen}", properties)
        job, child = f"batchjob-{uuid.uuid4()}", str(uuid.uuid4())
        self._children[job] = child
        app_root, model_dir = self._lay_out(model, code, name)
        self._jobs[job] = BatchJob(
            app_root / "code",
            properties["codeConfiguration"]["scoringScript"],
            sorted(file for file in self._blobs(data["uri"]).rglob("*") if file.is_file()),
            self._root / "blobs" / "models" / "azureml" / child / "score" / properties["outputFileName"],
            settings,
            properties["environmentVariables"] | {"AZUREML_MODEL_DIR": str(model_dir)},
            app_root.parent / "log.txt",
        )
        machine = self._resources[properties["compute"].removeprefix(f"{workspace}/")]["properties"]["properties"][
            "vmSize"
        ]
        cores = CORES[machine] * properties["resources"]["instanceCount"]
        if self._cores().get(machine, 0) + cores <= self.quota.get(machine, 0):
            self._jobs[job].start()
        else:
            self._jobs[job].status = "Queued"  # for ever, as on Azure
        return Answer(201, self._describe_job(workspace, job))

    def _describe_job(self, workspace: str, job: str) -> dict:
        tags = {"azureml.batchrun": "true", "azureml.jobtype": "azureml.batchjob"}
        properties = {"jobType": "Pipeline", "status": self._jobs[job].status, "properties": {}, "tags": tags}
        return {"id": f"{workspace}/jobs/{job}", "name": job, "properties": properties}

    def _describe_run(self, request: requests.PreparedRequest, url: SplitResult, body: bytes) -> Answer:
        """The run history: a batch job is a pipeline of one step, and what the step wrote lies under the step's id."""
        if url.path == "/discovery":
            return Answer(200, dict.fromkeys(("api", "history"), f"https://{HISTORY}"))
        if match := re.fullmatch(r".*/runs/([^/]+)/children", url.path):
            step = {"runId": self._children[match[1]], "name": "batchscoring", "status": self._jobs[match[1]].status}
            return Answer(200, {"value": [step]})
        return Answer(200, {"runMetadata": {"outputs": None}})  # the SDK looks where they are

    def _delete(self, workspace: str, path: str) -> Answer:
        if path not in self._resources:
            return Answer(204)
        for key in [key for key in self._resources if key == path or key.startswith(f"{path}/")]:
            del self._resources[key]
            if key in self._servers:
                self._servers.pop(key).stop()
        location = f"{self._region(workspace)}/mfeOperationResults/{uuid.uuid4()}"
        return self._long_running(workspace, 202, None, location, lambda: {"status": "Succeeded"})

    def _store(self, request: requests.PreparedRequest, url: SplitResult, body: bytes) -> Answer:
        """Blob storage, on disk."""
        query = parse_qs(url.query)
        signed = request.headers.get("Authorization", "").startswith("SharedKey fakeaccount:")
        if not signed and query.get("sig") != ["fake"]:
            raise error(403, "AuthenticationFailed", "the account's key or a shared access signature is missing")
        path = unquote(url.path).strip("/")
        file = self._root / "blobs" / path
        blocks = self._root / "blocks" / path
        written = {
            "ETag": '"0"',
            "Last_Modified": "Mon, 01 Jan 2024 00:00:00 GMT",
            "x_ms_request_server_encrypted": "true",
        }
        match [request.method, *query.get("comp", [])]:
            case ["PUT", "block"]:
                file = blocks / query["blockid"][0].replace("/", "_")
            case ["PUT", "blocklist"]:
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("wb") as whole:
                    for name in re.findall(r"<Latest>(.+?)<", body.decode()):
                        whole.write((blocks / name.replace("/", "_")).read_bytes())
                shutil.rmtree(blocks)
                return Answer(201, **written)
            case ["PUT", "metadata"]:
                self._metadata[path] = {k: v for k, v in request.headers.items() if k.lower().startswith("x-ms-meta-")}
                return Answer(200, **written)
            case ["GET", "list"]:
                container = self._root / "blobs" / path
                files = [item for item in container.rglob("*") if item.is_file()]
                sizes = {item.relative_to(container).as_posix(): item.stat().st_size for item in files}
                properties = "<Etag>0</Etag><BlobType>BlockBlob</BlobType><Content-Length>{}</Content-Length>"
                blobs = "".join(
                    f"<Blob><Name>{name}</Name><Properties>{properties.format(size)}</Properties></Blob>"
                    for name, size in sorted(sizes.items())
                    if name.startswith(query["prefix"][0])
                )
                xml = f"<EnumerationResults><Blobs>{blobs}</Blobs><NextMarker/></EnumerationResults>".encode()
                answer = Answer(200, Content_Type="application/xml", Content_Length=len(xml))
                answer.body = xml
                return answer
            case ["HEAD" | "GET"] if file.is_file():
                size = file.stat().st_size
                answer = Answer(200, **written)
                answer.headers |= self._metadata.get(path, {}) | {"Content-Length": str(size)}
                answer.body = file.read_bytes() if request.method == "GET" else b""
                if "x-ms-range" in request.headers and size:
                    first, last = map(int, request.headers["x-ms-range"].removeprefix("bytes=").split("-"))
                    answer.status, answer.body = 206, answer.body[first : last + 1]
                    answer.headers["Content-Range"] = f"bytes {first}-{first + len(answer.body) - 1}/{size}"
                    answer.headers["Content-Length"] = str(len(answer.body))
                return answer
            case ["HEAD" | "GET", *_]:
                raise error(404, "BlobNotFound", f"no blob {path}")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(body)
        return Answer(201, **written)

    def _score(self, request: requests.PreparedRequest, url: SplitResult, body: bytes) -> Answer:
        """The endpoint's address: who may call, which deployment answers, and what Azure makes of its answer."""
        _, path, endpoint = self._admit(request, url, "onlineEndpoints")
        named = request.headers.get("azureml-model-deployment")
        deployment = named or self._choose(path, endpoint["properties"]["traffic"])
        if not named and (mirror := self._choose(f"{path} mirror", endpoint["properties"]["mirrorTraffic"])):
            # Nobody waits for it on Azure; here the call does, so that counts are the same each time.
            with suppress(Answer):
                self._ask(request, f"{path}/deployments/{mirror}", mirror, body)
        return self._ask(request, f"{path}/deployments/{deployment}", deployment, body)

    def _ask(self, request: requests.PreparedRequest, path: str, deployment: str | None, body: bytes) -> Answer:
        server = self._servers.get(path)
        if server is None:
            raise error(404, "NotFound", "The endpoint has no deployment that gets traffic.")
        settings = self._resources[path]["properties"]["requestSettings"]
        allowed = 2 * settings["maxConcurrentRequestsPerInstance"] * self._resources[path]["sku"]["capacity"]
        with self._lock:
            if self._busy.get(path, 0) >= allowed:
                busy = Answer(429, ms_azureml_model_error_reason="too_many_pending_request")
                busy.headers["Content-Type"] = "text/plain"
                raise busy
            self._busy[path] = self._busy.get(path, 0) + 1
        try:
            return self._forward(request, server, deployment, settings, body)
        finally:
            with self._lock:
                self._busy[path] -= 1

    def _forward(
        self,
        request: requests.PreparedRequest,
        server: InferenceServer,
        deployment: str | None,
        settings: dict,
        body: bytes,
    ) -> Answer:
        headers = {k: v for k, v in request.headers.items() if k.lower() not in NOT_TO_THE_SERVER}
        headers["x-request-id"] = str(uuid.uuid4())
        try:
            reply = requests.request(
                request.method, server.url, data=body, headers=headers, timeout=seconds(settings["requestTimeout"])
            )
        except requests.Timeout:
            raise error(408, "RequestTimeout", "The deployment did not answer in request_timeout_ms.") from None
        answer = Answer(reply.status_code if reply.ok else 424, None, azureml_model_deployment=deployment)
        answer.body = reply.content
        answer.headers |= {k.title(): v for k, v in reply.headers.items() if k.lower() not in NOT_FROM_THE_SERVER}
        if not reply.ok:
            answer.headers["ms-azureml-model-error-reason"] = "model_error"
            answer.headers["ms-azureml-model-error-statuscode"] = str(reply.status_code)
        return answer

    def _admit(self, request: requests.PreparedRequest, url: SplitResult, kind: str) -> tuple[str, str, dict]:
        """Return an endpoint's name, path and properties, if there is one at this address and the caller may use it."""
        name = url.hostname.removesuffix(SCORING)
        path = f"{kind}/{name}"
        endpoint = self._resources.get(path)
        if endpoint is None:
            raise requests.ConnectionError(f"fake_azure: the name {url.hostname} is not known")
        mode = endpoint["properties"].get("authMode")
        secret = f"{name}-key-1" if mode == "Key" else token("https://ml.azure.com/.default")
        if request.headers.get("Authorization") != f"Bearer {secret}":
            raise error(401, "Unauthorized", f"the endpoint's authentication mode is {mode}: no or another credential")
        return name, path, endpoint

    def _choose(self, path: str, shares: dict[str, int]) -> str | None:
        """Split the traffic. Azure draws by chance; a golden-ratio sequence has the same shares and is repeatable."""
        with self._lock:
            self._calls[path] = self._calls.get(path, 0) + 1
        place = 100 * (self._calls[path] * 0.618033988749895 % 1)
        for deployment, share in shares.items():
            place -= share
            if place < 0:
                return deployment
        return None

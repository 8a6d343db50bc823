"""Azure's inference server, azmlinfsrv, as a process on this machine."""

import atexit
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import requests


def container_environment() -> dict[str, str]:
    """Return this process's variables, without those about models and Azure: a container does not have them."""
    private = ("AZURE", "AML", "RERANKER", "HF_", "PYTHON", "WORKER", "SCORING")
    return {name: value for name, value in os.environ.items() if not name.startswith(private)}


class InferenceServer:
    """Azure's real inference server on a scoring script, as in Azure's container. A context manager.

    Args:
        app_root: the folder that the server runs in.
        entry_script: the scoring script.
        model_dir: what AZUREML_MODEL_DIR says.
        environment: more variables. Those of this process about models and Azure are not passed on.
        log: the file that gets what the server writes.
    """

    def __init__(
        self, app_root: Path, entry_script: Path, model_dir: Path, environment: dict[str, str], log: Path
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        inherited = container_environment()
        # Its default is a socket in the home folder, one for all servers.
        inherited["GUNICORN_CMD_ARGS"] = "--no-control-socket"
        command = [sys.executable, "-m", "azureml_inference_server_http", "--entry_script", str(entry_script)]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "--model_dir", str(model_dir), "--port", str(self.port)],
                cwd=app_root,
                env=inherited | {"AML_APP_ROOT": str(app_root), "PYTHONUNBUFFERED": "1"} | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        atexit.register(self.stop)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/score"

    def healthy(self) -> bool:
        """Whether it answers Azure's probe."""
        try:
            return requests.get(f"http://127.0.0.1:{self.port}/", timeout=2).ok
        except requests.RequestException:
            return False

    def wait(self, seconds: float = 120) -> "InferenceServer":
        """Return when it is healthy. Raises RuntimeError with the log's end if it stops or takes too long."""
        end = time.monotonic() + seconds
        while not self.healthy():
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the inference server is not ready; its log ends with\n{self.tail(40)}")
            time.sleep(0.1)
        return self

    def tail(self, lines: int) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        """End the server and its worker at once: they have nothing to save."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        atexit.unregister(self.stop)

    def __enter__(self) -> "InferenceServer":
        return self.wait()

    def __exit__(self, *exception: object) -> None:
        self.stop()
